"""What a server tells a fleet's store: a record of each bench, and one of each server's traffic when it stops.

`--prompt` leaves none: one answer measures nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from checkpoint.provenance import code_version
from perf.chips import chip_name
from perf.fleet_store import open_store
from perf.meter import ImplausibleMeasurement
from perf.records import Workload, config_hash, from_summary, software_versions
from perf.traffic import decode_mbu
from serving.resolve import Resolved
from serving.startup import Started

# Settings that no call to the device depends on, and those that the model itself replaces.
_FREE = (
    *("name", "source", "model", "dtype", "api", "bench", "benchmark", "prompt", "max_tokens", "temperature", "seed"),
    *("cache_dir", "fleet"),
)

# What serving.bench leaves unsaid.
_NO_MBU = "no round without drafts was decoded, or what a round reads may stay in the chip's caches"


class FleetRecorder:
    """To be made when the process starts, whose time it notes. `path` None: no store, and nothing is recorded.

    Raises ValueError for a path that is, and can become, no store: before anything is compiled.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._began = path, time.time()
        if path is not None:
            open_store(path, create=True)

    def bench(self, resolved: Resolved, started: Started, summary: Mapping[str, Any]) -> None:
        """Appends what `Bench.run` returned. Raises OSError if the store can't be written."""
        self._append({**self._facts(resolved, started, "bench"), **bench_figures(resolved, started, summary)})

    @contextlib.contextmanager
    def traffic(self, resolved: Resolved, started: Started) -> Iterator[None]:
        """Around the serving of requests: appends what they made of the device once it ends in order."""
        ready = time.monotonic()
        yield
        figures = traffic_figures(resolved, started, time.monotonic() - ready)
        self._append({**self._facts(resolved, started, "traffic"), **figures})

    def _facts(self, resolved: Resolved, started: Started, workload: Workload) -> dict[str, Any]:
        device, mesh = resolved.devices[0], resolved.placement.mesh.shape if resolved.placement is not None else {}
        return {
            "mode": "serve",
            "workload": workload,
            "config": resolved.run.name,
            "config_hash": config_hash(work_settings(resolved, workload)),
            "chip": chip_name(device.device_kind),
            "num_devices": len(resolved.devices),
            "num_processes": jax.process_count(),
            "mesh": {axis: size for axis, size in mesh.items() if size > 1},
            "versions": software_versions(device.platform, code_version()),
            "first_started": self._began,
            "started": self._began,
            "ended": time.time(),
            "profiled": started.metrics.profiled,
            "mfu_reason": "a server's MFU is of prefill alone: prefill_mfu_* in the measures of a bench",
            "goodput_reason": "goodput is of training runs",
        }

    def _append(self, summary: Mapping[str, Any]) -> None:
        if self._path is not None and jax.process_index() == 0:
            open_store(self._path, create=True).append(from_summary(summary))


def work_settings(resolved: Resolved, workload: Workload) -> dict[str, Any]:
    """The settings that define a call's work, and the architectures in place of where their weights come from."""
    run, settings = resolved.run, dataclasses.asdict(resolved.run)
    for name in _FREE:
        settings.pop(name, None)
    del settings["speculation"]["draft"]
    bench = {"prompt": run.benchmark.decode_prompt, "tokens": run.benchmark.decode_tokens}
    return {
        **settings,
        "model": dataclasses.asdict(resolved.model),
        "draft": None if resolved.draft is None else dataclasses.asdict(resolved.draft.config),
        "dtype": resolved.dtype,
        **({"bench": bench} if workload == "bench" else {}),
    }


def bench_figures(resolved: Resolved, started: Started, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of a bench: its largest batch as the headline, and every batch and prompt among the measures."""
    decode, prefill = summary["decode"], summary["prefill"]
    measures: dict[str, float | None] = {}
    for batch, row in decode.items():
        measures[f"decode_mbu_{batch}"] = row["mbu"]
        measures[f"decode_tokens_per_second_{batch}"] = row["tokens_per_second"]
    for length, row in prefill.items():
        measures[f"prefill_mfu_{length}"] = row["mfu"]
        measures[f"ttft_{length}_ms"] = row["ttft_ms"]
    if summary["offline"] is not None:
        measures["offline_tokens_per_second"] = summary["offline"]["output_tokens_per_second"]
    largest = max(decode, key=int, default=None)
    known = {name: value for name, value in measures.items() if value is not None}
    if largest is None:
        nothing = "no batch was decoded"
        return {"measures": known, "decode_mbu_reason": nothing, "tokens_per_second_reason": nothing}
    row = decode[largest]
    return {
        "decode_mbu": row["mbu"],
        "decode_mbu_reason": started.meter.bandwidth.reason or _NO_MBU,
        **_rate(row["tokens_per_second"], resolved),
        "compiles": started.compilations.count,
        "measures": known,
        "step_times_reason": "a bench times each batch by itself: see the measures",
    }


def traffic_figures(resolved: Resolved, started: Started, seconds: float) -> dict[str, Any]:
    """Of `seconds` of serving. The MBU is of all decode calls without drafts, over the time that the host took them
    to last, so that small and large batches weigh as they came."""
    sample = started.metrics.registry.get_sample_value
    totals, bandwidth = started.meter.totals, started.meter.bandwidth
    on_device = sample("step_seconds_sum", {"kind": "decode"})
    mbu, reason = None, "no round without drafts was decoded"
    if totals.decode_rounds and on_device:
        try:
            reached = decode_mbu(
                totals.decode_bytes,
                on_device,
                bandwidth,
                steps=totals.decode_rounds,
                num_devices=len(resolved.devices),
            )
            mbu, reason = reached.value, reached.reason
        except ImplausibleMeasurement as error:
            reason = str(error)
    return {
        "decode_mbu": mbu,
        "decode_mbu_reason": reason,
        **_rate((sample("generation_tokens_total") or 0.0) / seconds, resolved),
        "compiles": started.compilations.count,
        "measures": {"requests": _requests(started), "serving_seconds": seconds},
        "step_times_reason": "a server's steps are of many sizes: see step_seconds at /metrics while it runs",
    }


def _requests(started: Started) -> float:
    """However they ended."""
    return sum(
        sample.value
        for family in started.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "requests_total"
    )


def _rate(tokens_per_second: float, resolved: Resolved) -> dict[str, float]:
    per_device = tokens_per_second / len(resolved.devices)
    return {"tokens_per_second": tokens_per_second, "tokens_per_second_per_device": per_device}
