"""Step times into tokens/s and utilisation of the hardware, with everything needed to recompute them.

`mfu` = model FLOPs, `mfu_palm` = FLOPs of the 6·N + 12·L·H·Q·T convention, `hfu` = FLOPs executed, each over
(seconds × devices × peak FLOP/s of a device). `flops.Ledger` gives the three numerators. Peak is the dense peak of
the compute dtype; products that the model keeps in float32 (the router) are divided by it as well.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from perf.chips import Peak
from perf.flops import Ledger

# Fewer steps than this make no utilisation: one reading that came late moves up to a step's time to its neighbour.
MIN_STEPS = 4


class ImplausibleMeasurement(ValueError):
    """A utilisation above 1: the FLOPs, the step time, the device count or the peak is wrong."""


@dataclasses.dataclass(frozen=True)
class Utilization:
    """One utilisation and what it is made of. `value` is None exactly if `reason` says why."""

    name: str
    value: float | None
    reason: str | None
    flops: float
    """Numerator: FLOPs of all devices during `seconds`."""
    seconds: float
    num_devices: int
    peak: Peak

    @property
    def flops_per_second_per_device(self) -> float | None:
        return self.flops / self.seconds / self.num_devices if self.seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class _Span:
    """Work and time of one step, or of several."""

    seconds: float = 0.0
    tokens: int = 0
    model_flops: float = 0.0
    palm_flops: float = 0.0
    hardware_flops: float = 0.0

    def __add__(self, other: _Span) -> _Span:
        return _Span(
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.model_flops + other.model_flops,
            self.palm_flops + other.palm_flops,
            self.hardware_flops + other.hardware_flops,
        )


class StepMeter:
    """Turns step times into rates. Fed on the host, with one call per step, in order.

    `ledger` describes the whole step over all `num_devices`; `peak` is that of one device. The first `warmup_steps`
    steps (compilation) are not measured. A step's rates are those of the last `window` measured steps together:
    a host that reads one metric late makes that step look long and the next one short.
    """

    def __init__(self, ledger: Ledger, *, num_devices: int, peak: Peak, warmup_steps: int = 2, window: int = 8) -> None:
        if num_devices < 1 or warmup_steps < 0 or window < 1:
            raise ValueError(
                f"num_devices={num_devices} and window={window} must be at least 1, warmup_steps={warmup_steps} "
                "at least 0"
            )
        self._ledger = ledger
        self._num_devices = num_devices
        self._peak = peak
        self._warmup_steps = warmup_steps
        self._window = window
        self._recent: deque[_Span] = deque(maxlen=window)
        self._total = _Span()
        self._times = array("d")
        self._seen = 0

    def record(
        self,
        seconds: float,
        *,
        tokens: int | None = None,
        documents: Iterable[int] | None = None,
        measured: bool = True,
    ) -> dict[str, Any]:
        """One step of `seconds` of wall time; returns its flat record for a log: times, rates, utilisations, and the
        numerators (FLOPs during `measured_seconds`), device count and peak behind them.

        `documents`: lengths of the packed documents of the whole batch, for exact attention; else `tokens`, those of
        the whole batch that are not padding, scales the ledger's step (None: as the ledger has it).
        `measured=False`: the interval is no step time (an evaluation, a checkpoint or a compilation fell into it).

        Raises ValueError for a time or token count that is not positive, ImplausibleMeasurement for a rate above peak.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"step time of {seconds} s; give the wall seconds between two steps, above 0")
        step = self._step(seconds, tokens, documents)
        self._seen += 1
        reason = None
        if self._seen <= self._warmup_steps:
            reason = f"warm-up: step {self._seen} of {self._warmup_steps} that are not measured"
        elif not measured:
            reason = "something other than steps ran during the interval"
            self._recent.clear()
        else:
            self._recent.append(step)
            self._total += step
            self._times.append(seconds)
            needed = min(MIN_STEPS, self._window)
            if len(self._recent) < needed:
                reason = f"needs {needed} measured steps in a row, has {len(self._recent)}"
        span = sum(self._recent, _Span()) if reason is None else step
        return {"step_seconds": seconds, "tokens": step.tokens, **self._rates(span, reason)}

    @property
    def step_seconds(self) -> Sequence[float]:
        """Wall seconds of every measured step."""
        return self._times

    def utilizations(self) -> tuple[Utilization, ...]:
        """`mfu`, `mfu_palm` and `hfu` of all measured steps together. Raises ImplausibleMeasurement."""
        return self._utilizations(self._total, None if self._times else self._nothing())

    def summary(self) -> dict[str, Any]:
        """As `record`, of all measured steps together, with step time percentiles."""
        reason = None if self._times else self._nothing()
        p50, p90 = np.percentile(self._times, (50, 90)).tolist() if self._times else (None, None)
        record: dict[str, Any] = {
            "measured_steps": len(self._times),
            "step_seconds_median": p50,
            "step_seconds_p50": p50,
            "step_seconds_p90": p90,
            **self._rates(self._total, reason),
        }
        return record

    def _nothing(self) -> str:
        return f"no step was measured: {self._seen} ran, of which the first {self._warmup_steps} are warm-up"

    def _step(self, seconds: float, tokens: int | None, documents: Iterable[int] | None) -> _Span:
        book = self._ledger if documents is None else self._ledger.for_documents(documents)
        if tokens is None or documents is not None:
            scale = 1.0
        elif tokens < 1:
            raise ValueError(f"tokens={tokens} in a step; give the tokens of the whole batch that are not padding")
        else:
            scale = tokens / book.tokens
        return _Span(
            seconds,
            round(book.tokens * scale),
            book.model_flops * scale,
            book.palm_flops * scale,
            # Padding costs the device what tokens cost: the executed step is the same.
            float(book.hardware_flops),
        )

    def _rates(self, span: _Span, reason: str | None) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if reason is None:
            rate = span.tokens / span.seconds
            record["tokens_per_second"] = rate
            record["tokens_per_second_per_device"] = rate / self._num_devices
        else:
            record["tokens_per_second"] = record["tokens_per_second_per_device"] = None
            record["tokens_per_second_reason"] = reason
        for utilization in self._utilizations(span, reason):
            name = utilization.name
            record[name] = utilization.value
            if utilization.reason is not None:
                record[f"{name}_reason"] = utilization.reason
            record[f"{name}_numerator_flops"] = utilization.flops
            record[f"{name}_flops_per_second_per_device"] = utilization.flops_per_second_per_device
        record["measured_seconds"] = span.seconds
        record["num_devices"] = self._num_devices
        record["peak_flops_per_device"] = self._peak.value
        record["peak_dtype"] = self._peak.dtype
        record["peak_source"] = self._peak.source
        if self._peak.reason is not None:
            record["peak_reason"] = self._peak.reason
        return record

    def _utilizations(self, span: _Span, reason: str | None) -> tuple[Utilization, ...]:
        mfu = self._utilization("mfu", span.model_flops, span, reason)
        hfu = self._utilization("hfu", span.hardware_flops, span, reason)
        return mfu, self._palm(span, reason), hfu

    def _utilization(self, name: str, flops: float, span: _Span, reason: str | None) -> Utilization:
        seconds = span.seconds
        reason = reason or self._peak.reason
        if reason is not None:
            return Utilization(name, None, reason, flops, seconds, self._num_devices, self._peak)
        assert self._peak.value is not None
        value = flops / (seconds * self._num_devices * self._peak.value)
        if value > 1:
            raise ImplausibleMeasurement(
                f"{name}={value:.4g} is above 1: {flops:.4g} FLOPs in {seconds:.4g} s on {self._num_devices} devices "
                f"of {self._peak.value:.4g} FLOP/s {self._peak.dtype} ({self._peak.source}); check that a step is "
                "timed until the device has finished, the device count, and that the peak is of the dtype computed in"
            )
        return Utilization(name, value, None, flops, seconds, self._num_devices, self._peak)

    def _palm(self, span: _Span, reason: str | None) -> Utilization:
        """PaLM's convention counts masked pairs that a kernel may skip: above 1 it can be true and means nothing."""
        flops = span.palm_flops
        if reason is None and self._peak.value is not None:
            share = flops / (span.seconds * self._num_devices * self._peak.value)
            if share > 1 and flops > span.hardware_flops:
                reason = (
                    f"12·L·H·Q·T counts {flops / span.hardware_flops:.3g} times the FLOPs that were executed (causal "
                    f"or windowed attention), {share:.3g} of the peak: not a utilisation"
                )
        return self._utilization("mfu_palm", flops, span, reason)
