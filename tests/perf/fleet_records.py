"""Summaries and records of made-up runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from perf.records import RunRecord, config_hash, distribution, from_summary

HOUR = 3600.0
BEGIN = 1.79e9
"""Unix seconds of the first run's end."""

COMMITS = ("a" * 40, "b" * 40)


def summary(*, mfu: float | None = 0.5, size: int = 8, hour: int = 0, **changes: Any) -> dict[str, Any]:
    """As a training run of ten minutes leaves it; `hour` after the first."""
    ended = BEGIN + HOUR * hour
    steps = [distribution(host, [0.25, 0.25, 0.26, 0.3]) for host in range(max(1, size // 8))]
    unknown = {f"{name}_reason": "no peak is known" for name in ("mfu", "mfu_palm", "hfu") if mfu is None}
    return {
        "event": "summary",
        "mode": "train",
        "workload": "train",
        "config": "dense-1b",
        "config_hash": config_hash({"model": "dense-1b"}),
        "chip": "H100 SXM",
        "num_devices": size,
        "num_processes": max(1, size // 8),
        "mesh": {"fsdp": size},
        "versions": {"python": "3.12.3", "jax": "0.11.2", "commit": COMMITS[0]},
        "first_started": ended - 600.0,
        "started": ended - 600.0,
        "ended": ended,
        "profiled": False,
        "mfu": mfu,
        "mfu_palm": mfu and 1.05 * mfu,
        "hfu": mfu and 1.01 * mfu,
        "tokens_per_second": 1e5 * size * (mfu or 0.5),
        "tokens_per_second_per_device": 1e5 * (mfu or 0.5),
        "goodput": 0.8,
        "goodput_step_seconds": 480.0,
        "goodput_compile_seconds": 90.0,
        "goodput_input_wait_seconds": 30.0,
        "goodput_lost_work_seconds": 0.0,
        "goodput_wall_seconds": 600.0,
        "goodput_between_attempts_seconds": 5.0,
        "scaling_tax": None,
        "scaling_tax_reason": "no baseline",
        "step_times": steps,
        **unknown,
        **changes,
    }


def record(**changes: Any) -> RunRecord:
    return from_summary(summary(**changes))


def runs(mfu: float, count: int, *, noise: float = 0.01, seed: int = 0, hour: int = 0, **changes: Any):
    """`count` records, one an hour, whose MFU is normal with a standard deviation of `noise` × `mfu`."""
    drawn = mfu * (1 + noise * np.random.default_rng(seed).standard_normal(count))
    return [record(mfu=float(one), hour=hour + number, **changes) for number, one in enumerate(drawn)]
