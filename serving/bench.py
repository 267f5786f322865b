"""`--bench`: what the engine reaches without HTTP around it, as one JSON line."""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from serving.config import BenchConfig
from serving.request import Delta, Request, SamplingParams
from serving.resolve import Resolved
from serving.startup import Started


@dataclasses.dataclass
class _Timeline:
    """When the tokens of one request came."""

    submitted: float
    deliveries: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """Time, and tokens that came together."""
    error: str | None = None

    @property
    def first(self) -> float:
        return self.deliveries[0][0]

    @property
    def last(self) -> float:
        return self.deliveries[-1][0]


class Bench:
    """Measures one engine. Prompts are random tokens and all different: they share no prefix. Nothing stops early."""

    def __init__(self, resolved: Resolved, started: Started, say: Callable[[str], None]) -> None:
        self._resolved, self._started, self._say = resolved, started, say
        self._random, self._count = random.Random(resolved.run.seed), 0

    def run(self) -> dict[str, Any]:
        config = self._resolved.run.benchmark
        decode = {str(batch): self._decode(config, batch) for batch in self._batches(config)}
        prefill = {str(length): self._prefill(config, length) for length in self._lengths(config)}
        summary = {
            "name": self._resolved.run.name,
            "device": self._resolved.devices[0].device_kind,
            "devices": len(self._resolved.devices),
            "dtype": self._resolved.dtype,
            "kv_dtype": self._resolved.kv_dtype,
            "precision": dataclasses.asdict(self._resolved.run.precision),
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "speculation": self._resolved.run.speculation.kind,
            "drafts": None if (stats := self._started.engine.speculation) is None else dataclasses.asdict(stats),
            "choices": list(self._resolved.choices),
            "decode": decode,
            "prefill": prefill,
            "offline": None if config.offline is None else self._offline(*config.offline),
            "ready_seconds": round(self._started.seconds, 2),
            "compile_seconds": round(self._started.compiled.seconds, 2),
            "programs": self._started.compiled.programs,
            "decode_mbu": {batch: row["mbu"] for batch, row in decode.items()},
            "decode_tokens_per_second": {batch: row["tokens_per_second"] for batch, row in decode.items()},
            "ttft_ms": {length: row["ttft_ms"] for length, row in prefill.items()},
            "itl_ms": {batch: {"p50": row["itl_ms_p50"], "p99": row["itl_ms_p99"]} for batch, row in decode.items()},
            "compiles_after_ready": self._started.compilations.count,
        }
        print(json.dumps(summary))
        return summary

    def _batches(self, config: BenchConfig) -> list[int]:
        most = self._resolved.run.engine.max_sequences
        for batch in config.batches:
            if batch > most:
                self._say(f"decode, batch {batch}: left out, engine.max_sequences={most}")
        return [batch for batch in config.batches if batch <= most]

    def _lengths(self, config: BenchConfig) -> list[int]:
        """A prompt that fills the context leaves room for one token."""
        return sorted({min(length, self._resolved.max_context - 1) for length in config.prompts})

    def _decode(self, config: BenchConfig, batch: int) -> dict[str, Any]:
        tokens = min(config.decode_tokens, self._resolved.max_context - config.decode_prompt)
        before = dataclasses.replace(self._started.meter.totals)
        timelines = self._serve(batch, config.decode_prompt, tokens)
        after = self._started.meter.totals
        # From when the last sequence has its first token to when the first one ends, all of them decode.
        begin, end = max(t.first for t in timelines), min(t.last for t in timelines)
        if begin >= end:
            raise ValueError(
                f"the {batch} sequences never decoded together for benchmark.decode_tokens={tokens}; raise it, or "
                "engine.num_pages, so that all of them fit"
            )
        inside = [(at, count) for t in timelines for at, count in t.deliveries if begin < at <= end]
        rate = sum(count for _, count in inside) / (end - begin)
        gaps = sorted(gap for t in timelines for gap in _gaps(t, begin, end))
        rounds = after.decode_rounds - before.decode_rounds
        moved = (after.decode_bytes - before.decode_bytes) / max(rounds, 1)
        mbu = self._started.meter.mbu(int(moved), batch / rate) if rounds else None
        row = {
            "tokens_per_second": round(rate, 1),
            "step_ms": round(1e3 * batch / rate, 3),
            "mbu": None if mbu is None else round(mbu, 4),
            "itl_ms_p50": _quantile_ms(gaps, 0.5),
            "itl_ms_p99": _quantile_ms(gaps, 0.99),
            "prompt": config.decode_prompt,
            "tokens": tokens,
        }
        share = "unknown" if mbu is None else f"{mbu:.1%}"
        self._say(f"decode, batch {batch}: {rate:,.1f} tokens/s, {row['step_ms']} ms a round, MBU {share}")
        return row

    def _prefill(self, config: BenchConfig, length: int) -> dict[str, Any]:
        before = dataclasses.replace(self._started.meter.totals)
        times = [self._serve(1, length, 1)[0] for _ in range(config.repeats)]
        after = self._started.meter.totals
        seconds = statistics.median(t.first - t.submitted for t in times)
        mfu = self._started.meter.mfu((after.prefill_flops - before.prefill_flops) // config.repeats, seconds)
        row = {
            "ttft_ms": round(1e3 * seconds, 2),
            "tokens_per_second": round(length / seconds, 1),
            "mfu": None if mfu is None else round(mfu, 4),
        }
        share = "unknown" if mfu is None else f"{mfu:.1%}"
        self._say(f"prefill of {length}: first token after {row['ttft_ms']} ms, MFU {share}")
        return row

    def _offline(self, requests: int, prompt: int, tokens: int) -> dict[str, Any]:
        timelines = self._serve(requests, prompt, tokens)
        seconds = max(t.last for t in timelines) - min(t.submitted for t in timelines)
        rate = sum(count for t in timelines for _, count in t.deliveries) / seconds
        self._say(f"offline, {requests} requests of {prompt} in and {tokens} out: {rate:,.0f} output tokens/s")
        return {
            "requests": requests,
            "prompt": prompt,
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "output_tokens_per_second": round(rate, 1),
        }

    def _serve(self, requests: int, prompt: int, tokens: int) -> list[_Timeline]:
        """Submits that many requests at once and waits for all of them."""
        ended, timelines = threading.Semaphore(0), []
        vocabulary = self._resolved.model.vocab_size
        for _ in range(requests):
            timeline = _Timeline(time.monotonic())
            timelines.append(timeline)
            self._count += 1
            request = Request(
                id=f"bench-{self._count}",
                prompt=tuple(self._random.randrange(vocabulary) for _ in range(prompt)),
                params=SamplingParams(max_tokens=tokens, temperature=0),
                on_delta=lambda delta, timeline=timeline: _record(delta, timeline, ended),
            )
            timeline.submitted = time.monotonic()
            self._started.engine.submit(request)
        for _ in range(requests):
            ended.acquire()
        failed = [timeline.error for timeline in timelines if timeline.error]
        if failed:
            raise ValueError(f"{len(failed)} of {requests} requests failed, the first with: {failed[0]}")
        return timelines


def _record(delta: Delta, timeline: _Timeline, ended: threading.Semaphore) -> None:
    if delta.tokens:
        timeline.deliveries.append((time.monotonic(), len(delta.tokens)))
    if delta.finish is not None:
        if delta.finish != "length":
            timeline.error = delta.error or delta.finish
        ended.release()


def _gaps(timeline: _Timeline, begin: float, end: float) -> list[float]:
    """Seconds a token, of each token between two times: tokens that come together share the time since the last."""
    gaps = []
    for (before, _), (at, count) in zip(timeline.deliveries, timeline.deliveries[1:], strict=False):
        if begin < at <= end:
            gaps += [(at - before) / count] * count
    return gaps


def _quantile_ms(seconds: Sequence[float], q: float) -> float | None:
    """Of sorted times; None of none."""
    return round(1e3 * seconds[min(int(q * len(seconds)), len(seconds) - 1)], 3) if seconds else None
