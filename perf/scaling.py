"""The scaling tax of a configuration: what a device loses because it is one of several, and to what.

tax = 1 - MFU(n) / MFU(base), over repeated runs of the same code. Each run gives one MFU: steps of one run share its
placement, its compilation and its moment, and their spread would make the interval far too narrow. The interval is
Student's for the difference of mean logarithms with unequal variances (Welch, Biometrika 34, 1947): of two to six runs
no distribution-free interval exists.

The tax is split by shares of a step's time. A part that takes the share s of a step on n devices and s0 on the base has
grown by s - s0·(1 - tax): the base's step takes (1 - tax) of this one's for the same work. What is left of the tax is
compute that became slower, and the parts and it sum to the tax exactly.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from perf.breakdown import Breakdown

CONFIDENCE = 0.95
PARTS = ("exposed communication", "imbalance", "input", "host", "jitter")
REST = "compute and the rest"


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One run, as its summary has it. Rates are of its measured steps together."""

    flops_per_second_per_device: float
    """Model FLOPs."""
    tokens_per_second_per_device: float
    peak: float | None
    """FLOP/s of a device; None with `peak_reason`."""
    peak_source: str
    peak_reason: str | None
    is_peak_measured: bool
    """By the run itself, as on a CPU: then every run has another."""
    step_mean: float
    step_median: float

    @property
    def jitter(self) -> float:
        """Share of the mean step that a step of median length does not have; below 0 where short steps are rarer."""
        return 1 - self.step_median / self.step_mean


@dataclasses.dataclass(frozen=True)
class Shares:
    """Parts of a step of a profiled run, as shares of it; None where the trace can't tell."""

    values: Mapping[str, float | None]
    reasons: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Size:
    """Runs on so many devices. `shares` None: none was profiled, or its trace said nothing, for `shares_reason`."""

    devices: int
    batch_size: int
    repeats: tuple[Repeat, ...]
    shares: Shares | None
    shares_reason: str | None


@dataclasses.dataclass(frozen=True)
class Mean:
    """Geometric mean of one or more positive figures; the interval is None for one, with the reason."""

    value: float
    low: float | None
    high: float | None
    count: int
    reason: str | None = None


def geometric_mean(values: Sequence[float]) -> Mean:
    logs = np.log(values)
    middle = math.exp(logs.mean())
    if len(logs) < 2:
        return Mean(middle, None, None, len(logs), "one run has no interval; raise --repeats")
    room = _t(len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return Mean(middle, middle * math.exp(-room), middle * math.exp(room), len(logs))


def _t(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


@dataclasses.dataclass(frozen=True)
class Tax:
    """Of a size against the base: a share, below 0 where a device does more. The interval is None for `reason`."""

    value: float
    low: float | None
    high: float | None
    reason: str | None = None

    @property
    def half_width(self) -> float:
        """Half of the interval; infinite without one."""
        return math.inf if self.low is None or self.high is None else (self.high - self.low) / 2


def scaling_tax(base: Sequence[float], size: Sequence[float]) -> Tax:
    """`base`, `size`: the same positive figure, MFU or tokens/s per device, of each run."""
    first, second = np.log(base), np.log(size)
    change = second.mean() - first.mean()
    value = -math.expm1(change)
    if min(len(first), len(second)) < 2:
        return Tax(value, None, None, "an interval needs two runs of both sizes; raise --repeats")
    errors = [logs.var(ddof=1) / len(logs) for logs in (first, second)]
    if sum(errors) == 0:
        return Tax(value, value, value)
    parts = sum(error**2 / (len(logs) - 1) for error, logs in zip(errors, (first, second), strict=True))
    room = _t(sum(errors) ** 2 / parts) * math.sqrt(sum(errors))
    return Tax(value, -math.expm1(change + room), -math.expm1(change - room))


def common_peak(sizes: Sequence[Size]) -> float | None:
    """FLOP/s of the machine that one process sees, where the runs measured it themselves: the median of all, so that no
    tax comes from its noise. None where it is a known chip's, or not known."""
    found = [
        repeat.peak * size.devices
        for size in sizes
        for repeat in size.repeats
        if repeat.is_peak_measured and repeat.peak
    ]
    return statistics.median(found) if found else None


def mfus(size: Size, machine_peak: float | None) -> list[float] | None:
    """Of each run; None where a peak is not known."""
    if machine_peak is not None:
        return [repeat.flops_per_second_per_device * size.devices / machine_peak for repeat in size.repeats]
    if any(repeat.peak is None for repeat in size.repeats):
        return None
    return [repeat.flops_per_second_per_device / repeat.peak for repeat in size.repeats if repeat.peak]


def rates(size: Size) -> list[float]:
    return [repeat.tokens_per_second_per_device for repeat in size.repeats]


def shares_of(found: Breakdown) -> Shares:
    """Of a profiled run: a profiler makes steps longer, and their parts' shares little different."""
    wait = found.collective_wait
    talking = found.per_step("collective")
    reasons = {}
    if wait is None and talking == 0:
        wait = 0.0
    elif wait is None:
        reasons["imbalance"] = "the trace has one device, on which waiting for others looks like communicating"
    values = {
        "exposed communication": (talking - (wait or 0.0)) / found.step,
        "imbalance": None if wait is None else wait / found.step,
        "input": found.share("input"),
        "host": found.share("host") + found.share("launch"),
    }
    return Shares(values, reasons)


def split(base: Size, size: Size, tax: Tax) -> tuple[dict[str, float | None], dict[str, str]]:
    """Points of the tax by part, which sum to it with what is left, and the reasons of those that are None."""
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for part in PARTS:
        before, reason = _share(base, part)
        after, other = _share(size, part)
        if before is None or after is None:
            found[part] = None
            reasons[part] = reason or other or ""
        else:
            found[part] = after - before * (1 - tax.value)
    found[REST] = tax.value - sum(value for value in found.values() if value is not None)
    return found, reasons


def _share(size: Size, part: str) -> tuple[float | None, str | None]:
    if part == "jitter":
        return statistics.median(repeat.jitter for repeat in size.repeats), None
    if size.shares is None:
        return None, size.shares_reason
    return size.shares.values[part], size.shares.reasons.get(part)
