"""The record that a train or serve run leaves in a fleet's store: what ran, on what, and how near the limit it came."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

SCHEMA_VERSION = 1
"""Raised by one with every change of a field's name or meaning. A reader takes its own version and older ones."""

Workload = Literal["train", "bench", "traffic"]

UTILISATIONS = ("mfu", "mfu_palm", "hfu", "decode_mbu", "goodput")
METRICS = (*UTILISATIONS, "tokens_per_second", "tokens_per_second_per_device", "scaling_tax", "compiles")
"""Fields that may be None, each then with its reason in `reasons`."""


class NewerRecordError(ValueError):
    """A record of a schema version that this code does not know. It is left as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Wall seconds of a step on one host, over its `count` measured steps."""

    host: int
    """Process index."""
    count: int
    mean: float
    p10: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run. Raises ValueError for a metric that is missing without a reason, or a utilisation not in 0..1.

    Records are compared where `config_hash`, `chip`, `num_devices` and `workload` agree.
    """

    id: str
    """UTC time of the end and a hash of the contents: recording a run twice gives the same id."""
    schema_version: int
    mode: Literal["train", "serve"]
    workload: Workload
    """What was measured: training, `serve.py --bench`, or a server's own requests (whose load is its users')."""
    config: str
    config_hash: str
    chip: str
    """Name in perf/chips.py, or JAX's device kind where the table has none."""
    num_devices: int
    num_processes: int
    mesh: Mapping[str, int]
    """Sizes of the mesh axes above 1."""
    versions: Mapping[str, str]
    """python, jax, jaxlib and the accelerator's plugin; `commit` of this source where it is known."""
    first_started: float
    """Unix seconds, when the run's first attempt started. Attempts of one run, each with a record, agree in it; goodput
    and its parts are of all of them up to this one."""
    started: float
    """Unix seconds, of this attempt."""
    ended: float
    profiled: bool
    """A profiler ran: the absolute numbers do not count, and no baseline takes them in."""
    mfu: float | None
    mfu_palm: float | None
    hfu: float | None
    decode_mbu: float | None
    goodput: float | None
    """Share of wall time in steps that count, over all attempts of the run (perf/goodput.py)."""
    tokens_per_second: float | None
    tokens_per_second_per_device: float | None
    scaling_tax: float | None
    compiles: float | None
    """Compilations while steps or requests were served."""
    measures: Mapping[str, float]
    """Further figures by name; one that ends in _ms or _seconds is better when smaller, any other when larger."""
    goodput_seconds: Mapping[str, float]
    """Wall seconds by bucket of perf/goodput.py; empty where `goodput` is None."""
    step_times: tuple[StepTimes, ...]
    """One per host; empty with a reason."""
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in METRICS:
            value = getattr(self, name)
            if value is None and not self.reasons.get(name):
                raise ValueError(f"record {self.id}: {name} is null without a reason")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"record {self.id}: {name}={value} is not finite")
        for name in UTILISATIONS:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"record {self.id}: {name}={value} is not between 0 and 1")
        if not self.step_times and not self.reasons.get("step_times"):
            raise ValueError(f"record {self.id}: step_times is empty without a reason")

    def metric(self, name: str) -> float | None:
        """A metric or measure by name, None where this run has none."""
        return getattr(self, name) if name in METRICS else self.measures.get(name)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunRecord:
        """Raises NewerRecordError for a later schema version, ValueError for anything else that is not a record."""
        version = record.get("schema_version")
        if not isinstance(version, int):
            raise ValueError("it has no schema_version: not a record of a run")
        if version > SCHEMA_VERSION:
            raise NewerRecordError(
                f"schema version {version} is newer than this code's {SCHEMA_VERSION}; read it with the version of "
                "Ridgeline that wrote it, or a later one"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(known ^ set(record)):
            raise ValueError(f"fields missing or unknown: {', '.join(wrong)}")
        try:
            steps = tuple(StepTimes(**one) for one in record["step_times"])
        except TypeError as error:
            raise ValueError(f"step_times: {error}") from error
        return cls(**{**record, "step_times": steps})


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def config_hash(settings: Mapping[str, Any]) -> str:
    """Name of the settings that define a run's work: 16 hexadecimal digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]


# Packages that bring an accelerator's compiler and runtime; one of a platform's is installed.
_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")}


def software_versions(platform: str, code: Mapping[str, Any]) -> dict[str, str]:
    """Of Python, jax, jaxlib, the plugin of a JAX platform (where one of those known here is installed) and our source.

    `code`: `commit`, None where it is not known, and `modified`: whether files differ from it, which is said after it.
    """
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", *_PLUGINS.get(platform, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if code["commit"] is not None:
        found["commit"] = code["commit"] + ("+changes" if code["modified"] else "")
    return found


def work_per_device(amount: int, num_devices: int) -> str:
    """`amount` / `num_devices` as an exact fraction: equal for runs of every size that give a device the same work."""
    divisor = math.gcd(amount, num_devices)
    return f"{amount // divisor}/{num_devices // divisor}"


# What a summary must have to become a record: everything that the measures are compared by.
FACTS = (
    *("mode", "workload", "config", "config_hash", "chip", "num_devices", "num_processes", "mesh", "versions"),
    *("first_started", "started", "ended", "profiled"),
)


def from_summary(summary: Mapping[str, Any]) -> RunRecord:
    """The record of a run from the flat summary that ended it. A metric that the summary lacks is None with a reason.

    Raises ValueError, naming what is missing, for a JSON object that is no such summary.
    """
    if missing := [name for name in FACTS if summary.get(name) is None]:
        raise ValueError(
            f"not a summary that a record can be made of: it has no {', '.join(missing)}; give the summary of a run of "
            "this version"
        )
    reasons = {}
    for name in METRICS:
        if summary.get(name) is None:
            reasons[name] = summary.get(f"{name}_reason") or f"not measured by a run of kind {summary['workload']}"
    steps = tuple(StepTimes(**one) for one in summary.get("step_times") or ())
    if not steps:
        reasons["step_times"] = summary.get("step_times_reason") or "no step was measured"
    seconds = {
        name.removeprefix("goodput_").removesuffix("_seconds"): value
        for name, value in summary.items()
        if name.startswith("goodput_") and name.endswith("_seconds")
    }
    between = ("wall", "between_attempts")
    content = {
        "schema_version": SCHEMA_VERSION,
        **{name: summary[name] for name in FACTS},
        **{name: summary.get(name) for name in METRICS},
        "measures": dict(summary.get("measures") or {}),
        "goodput_seconds": {name: value for name, value in seconds.items() if name not in between},
        "step_times": [dataclasses.asdict(one) for one in steps],
        "reasons": reasons,
    }
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()[:8]
    moment = datetime.fromtimestamp(content["ended"], UTC).strftime("%Y%m%dT%H%M%SZ")
    return RunRecord.from_json({"id": f"{moment}-{digest}", **content})


def distribution(host: int, seconds: Sequence[float]) -> dict[str, Any] | None:
    """`StepTimes` of one host as plain values; None of no steps. Percentiles interpolate linearly."""
    import numpy as np

    if not len(seconds):
        return None
    p10, p50, p90, p99 = np.percentile(seconds, (10, 50, 90, 99)).tolist()
    return dataclasses.asdict(
        StepTimes(
            host=host,
            count=len(seconds),
            mean=float(np.mean(seconds)),
            p10=p10,
            p50=p50,
            p90=p90,
            p99=p99,
            max=float(np.max(seconds)),
        )
    )
