"""What each host measures of its steps while it trains, what the hosts tell each other of it, and who is too slow.

Every host times its own waiting, and nothing else: at the hosts' barrier before a step, for its batch, and for the end
of the step before. On some steps a probe goes behind the step in the devices' queue (perf/stragglers.py says what each
shows). Every `stragglers.every` steps these times go over the hosts' coordination service to all of them; no collective
is added to the devices' work, and they have a step to do meanwhile. Process 0 writes the file and the warnings.

A probe is timed on the host, from seeing the step's end to seeing its own: good to some ten microseconds where a core
is free for the host, as beside an accelerator. Where processes fight for CPU cores it is mostly the time to wake up:
noise that is alike on all hosts, and names none.

Cost, measured on two CPU cores that other work kept busy (JAX 0.10.2): 11 µs a step in a run of one process; with 8
hosts 0.23 ms on process 0, and 4.5 ms for an exchange of 8 processes on those cores (0.9 ms a step): together 0.4% of a
step of 0.3 s, where the host waits for the devices anyway. The summary has what a run itself paid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel import distributed
from perf.change_point import Change, ChangeDetector
from perf.host_steps import FILE_NAME, HostSteps, Row, from_rows, to_json
from perf.stragglers import Straggler, StragglerJudge
from training.config import StragglerConfig
from training.profile import WARMUP_STEPS
from training.report import Reporter, explain_write_error

PROBE_SHARE = 0.0025
"""Of the time of a step, at most, for its probe: where it takes longer, it follows fewer steps."""
# Seconds; a wait for a step that had ended takes 10 to 20 µs.
_LEAST_WAIT = 1e-4
# (rows and columns, products) of a probe. 16 products of 2048: 0.27 TFLOP, 0.4 ms of an H100 at 70% of its peak. A CPU
# core has 1/10,000 of that.
_PROBE_SIZE = {"cpu": (256, 4)}
_PROBE_SIZE_ACCELERATOR = (2048, 16)


class Probe:
    """The same computation on each of this process's devices, without a collective, once a step has ended there."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """Compiles it, and runs it once."""
        size, products = _PROBE_SIZE.get(devices[0].platform, _PROBE_SIZE_ACCELERATOR)
        dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
        # A rotation of the axes: a product with it neither grows nor vanishes.
        weights = np.roll(np.eye(size, dtype=np.float32), 1, axis=0).astype(dtype)
        self._weights = {device: jax.device_put(weights, device) for device in devices}

        def products_after(loss: jax.Array, weights: jax.Array) -> jax.Array:
            # The loss decides no more than a sign, but the first product can't start without it.
            value = jnp.where(jnp.isnan(loss), -weights, weights)
            for _ in range(products):
                value = value @ weights
            return value[0].sum()

        self._run = jax.jit(products_after)
        for device in devices:
            jax.block_until_ready(self._run(jax.device_put(np.float32(0), device), self._weights[device]))

    def __call__(self, loss: jax.Array) -> list[jax.Array]:
        """Queues it behind the step that `loss` (a replicated scalar) is of."""
        return [self._run(shard.data, self._weights[shard.device]) for shard in loss.addressable_shards]


@dataclasses.dataclass
class HostWatch:
    """Used by the loop: `span` around its waits, `queue_probe` behind a step, `wait` for its end, `done` with a step.

    In a run of one process only the waits are measured, and changes of the step time found. Every process of a run
    calls each method equally often.
    """

    config: StragglerConfig
    run_dir: Path
    reporter: Reporter
    cost_seconds: float = 0.0
    """Of this host so far, in all of the watching: probes, telling and judging, without waiting for other hosts."""

    def __post_init__(self) -> None:
        self.hosts = distributed.process_info().count
        self.changes: list[Change] = []
        self.named: list[Straggler] = []
        self._spent = dict.fromkeys(("input", "result", "barrier"), 0.0)
        self._detector = ChangeDetector()
        self._measured: list[int] = []
        """Steps that the detector has seen."""
        self._steps: list[int] = []
        self._rows: list[Row] = []
        self._done = self._queued = 0
        self._probe: Probe | None = None
        self._probe_every = self.config.every
        self._exchanges = self.hosts > 1 and self.config.every > 0
        self._judge = StragglerJudge(self.hosts) if self._exchanges and distributed.is_primary() else None

    def compile(self) -> None:
        """Before the first step."""
        if self._exchanges and self.config.probe:
            self._probe = Probe(jax.local_devices())

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A wait: input, result or barrier."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - began

    def queue_probe(self, loss: jax.Array) -> list[jax.Array]:
        """Behind the step of this loss, if it is this step's turn."""
        self._queued += 1
        if self._probe is None or self._queued % self._probe_every:
            return []
        began = time.perf_counter()
        queued = self._probe(loss)
        self.cost_seconds += time.perf_counter() - began
        return queued

    def wait(self, loss: jax.Array, probe: list[jax.Array]) -> float | None:
        """Until the step of this loss has ended, and its probe; seconds of the probe. None without one, and where the
        step had ended before: nobody saw when the probe began."""
        before = self._spent["result"]
        with self.span("result"):
            jax.block_until_ready(loss)
        # `is_ready` is no guide: on CPUs it stays false until somebody has waited.
        if not probe or self._spent["result"] - before < _LEAST_WAIT:
            return None
        began = time.perf_counter()
        jax.block_until_ready(probe)
        seconds = time.perf_counter() - began
        self.cost_seconds += seconds
        return seconds

    def done(self, step: int, seconds: float | None, probe: float | None, *, measured: bool) -> dict[str, float]:
        """A step and the time since the one before (None: unknown); what was waited for in it, for the record.

        `measured=False`: something other than steps ran during that time.
        """
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        record = {f"{name}_seconds": value for name, value in spent.items() if name != "barrier" or self.hosts > 1}
        if seconds is not None and measured and self._done >= WARMUP_STEPS:
            self._watch_step_time(step, seconds)
            self._steps.append(step)
            self._rows.append({"seconds": seconds, **spent, "probe": probe})
        self._done += 1
        if self._exchanges and self._done % self.config.every == 0:
            self._exchange()
        return record

    def _watch_step_time(self, step: int, seconds: float) -> None:
        began = time.perf_counter()
        self._measured.append(step)
        found = self._detector.update(seconds)
        if found is not None:
            change = dataclasses.replace(found, index=self._measured[found.index])
            self.changes.append(change)
            self.reporter.say(
                f"step time changed after step {change.index - 1}: from {change.before * 1e3:.4g} ms to "
                f"{change.after * 1e3:.4g} ms ({change.ratio - 1:+.1%})"
            )
        self.cost_seconds += time.perf_counter() - began

    def _exchange(self) -> None:
        """Every host's rows to all of them. The wait for the last host is one at a barrier, of the next step."""
        steps, rows = self._steps, self._rows
        self._steps, self._rows = [], []
        # Steps are measured on all hosts or on none.
        with self.span("barrier"):
            texts = distributed.gather(json.dumps(rows))
        if not steps:
            return
        began = time.perf_counter()
        data = from_rows(steps, [json.loads(text) for text in texts])
        self._set_probe_rate(data)
        if self._judge is not None:
            self._write(data)
            for straggler in self._judge.update(data):
                self.named.append(straggler)
                self.reporter.say(straggler.sentence())
        self.cost_seconds += time.perf_counter() - began

    def _set_probe_rate(self, data: HostSteps) -> None:
        """The same on all hosts: it comes from what all were told."""
        if not np.isnan(data.probe).all():
            share = float(np.nanmedian(data.probe) / np.median(data.seconds))
            self._probe_every = max(1, math.ceil(share / PROBE_SHARE))

    def _write(self, data: HostSteps) -> None:
        line = {"attempt": self.reporter.attempt, "time": time.time(), **to_json(data)}
        path = self.run_dir / FILE_NAME
        with explain_write_error(path), path.open("a+b") as file:
            # A line that a kill cut short must not take the next one with it.
            torn = file.tell() and not _ends_line(file)
            file.write(b"\n" * bool(torn) + json.dumps(line, allow_nan=False).encode() + b"\n")

    def summary(self) -> dict[str, Any]:
        """For the run's: on process 0, who was too slow. `steps`: how many were timed."""
        record: dict[str, Any] = {
            "step_time_changes": [
                {"step": change.index, "before_seconds": change.before, "after_seconds": change.after}
                for change in self.changes
            ],
            "watch_seconds_per_step": self.cost_seconds / self._done if self._done else 0.0,
        }
        if self._exchanges:
            record["stragglers"] = [dataclasses.asdict(one) for one in self.named]
        return record


def _ends_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"
