"""What a run is held against: the median of the runs before it, and how low one more run of their kind can fall.

Median and its interval: two order statistics whose binomial coverage is at least the confidence asked for, whatever
the distribution (David and Nagaraja, Order Statistics, 3rd edition, section 7.1).

Limit for one more run: median − K·Qn. Qn is the scale of Rousseeuw and Croux (Alternatives to the Median Absolute
Deviation, JASA 88, 1993): half of the baseline may be outliers before it breaks, and it loses little to the standard
deviation where there are none. K makes it a one-sided prediction limit for one future value of a normal sample of this
size (Hahn and Meeker, Statistical Intervals, section 4.8, has it for mean and standard deviation), by simulation. An
interval of the median alone would be the wrong limit: it narrows with every record, and one run does not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

MIN_RECORDS = 8
"""Runs of a baseline. On average the limit of 2% false alarms lies 2.9 standard deviations below the median with 8 of
them, 2.6 with 12 and 2.2 with 50; with 6 it would be 3.4."""
MAX_RECORDS = 50
"""The latest ones make the baseline: older ones describe machines and versions of long ago."""
CONFIDENCE = 0.95

# Normal samples from which K is taken; the memory of their pairwise differences is held to 80 MB.
_SAMPLES, _DIFFERENCES = 20_000, 10_000_000


@dataclasses.dataclass(frozen=True)
class Median:
    """Of `count` values. The interval holds the distribution's median with at least `confidence`."""

    value: float
    low: float | None
    high: float | None
    count: int
    confidence: float = CONFIDENCE
    reason: str | None = None
    """Why there is no interval."""


def median(values: Sequence[float], confidence: float = CONFIDENCE) -> Median:
    """The interval is None, with the reason, below the least count that can have one (6 for 95%)."""
    assert len(values) and 0 < confidence < 1
    ordered, count = sorted(values), len(values)
    middle = float(np.median(ordered))
    rank = _rank(count, confidence)
    if rank == 0:
        least = math.ceil(1 - math.log2(1 - confidence))
        reason = f"{count} runs; an interval of {confidence:.0%} needs {least}"
        return Median(middle, None, None, count, confidence, reason)
    return Median(middle, ordered[rank - 1], ordered[count - rank], count, confidence)


def _rank(count: int, confidence: float) -> int:
    """Largest k for which the k-th smallest and the k-th largest of `count` values enclose the median often enough.

    Each misses where fewer than k of the values fall on its side: twice P(Binomial(count, 1/2) < k).
    """
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 1 - confidence:
            return rank
        rank += 1
    return rank


def qn_scale(values: np.ndarray) -> np.ndarray:
    """Scale of each sample, [..., n] -> [...]: about the first quartile of the distances between its values.

    2.2219 makes it the standard deviation of a large normal sample.
    """
    count = values.shape[-1]
    first, second = np.triu_indices(count, 1)
    half = count // 2 + 1
    place = math.comb(half, 2) - 1
    distances = np.abs(values[..., first] - values[..., second])
    return 2.2219 * np.partition(distances, place, axis=-1)[..., place]


@functools.lru_cache(maxsize=256)
def limit_factor(count: int, rate: float) -> float:
    """K for which one more value of a normal distribution is below median − K·Qn of `count` others with chance `rate`.

    The chance for given median and Qn is known, so simulation averages over those alone. Measured for a rate of 2% and
    8 to 50 values: 1.8% to 2.2%. Of Laplace or Student (4 degrees of freedom) values 3% to 5% are below, of values
    with a long tail on the bad side (minus a lognormal of sigma 0.5) 6% to 9%.
    """
    assert count >= 2 and 0 < rate < 0.5
    samples = min(_SAMPLES, _DIFFERENCES // math.comb(count, 2))
    drawn = np.random.default_rng(count).standard_normal((samples, count))
    medians, scales = np.median(drawn, axis=-1), qn_scale(drawn)
    erfc = np.frompyfunc(math.erfc, 1, 1)

    def chance(factor: float) -> float:
        return float(np.mean(erfc((factor * scales - medians) / math.sqrt(2)).astype(float))) / 2

    low, high = 0.0, 2.0
    while chance(high) > rate:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) > rate else (low, middle)
    return high


Verdict = Literal["pass", "regression", "too few", "unknown"]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One metric of a run against the baseline's."""

    metric: str
    value: float | None
    baseline: Median | None
    limit: float | None
    """The worst value that one more run of the baseline's kind has but for the rate of false alarms."""
    verdict: Verdict
    reason: str | None
    larger_is_better: bool

    @property
    def change(self) -> float | None:
        """Of the baseline's median: -0.05 is 5% less."""
        if self.value is None or self.baseline is None or self.baseline.value == 0:
            return None
        return self.value / self.baseline.value - 1

    @property
    def blind(self) -> float | None:
        """Largest loss that is still within the limit, as a share of the median: what this baseline can't show."""
        if self.limit is None or self.baseline is None or self.baseline.value == 0:
            return None
        return abs(1 - self.limit / self.baseline.value)

    @property
    def change_interval(self) -> tuple[float, float] | None:
        """`change` against both ends of the median's interval."""
        if self.value is None or self.baseline is None or not self.baseline.low or not self.baseline.high:
            return None
        return self.value / self.baseline.high - 1, self.value / self.baseline.low - 1


def judge(
    metric: str,
    value: float | None,
    values: Sequence[float],
    *,
    rate: float,
    threshold: float,
    larger_is_better: bool = True,
    reason: str | None = None,
) -> Judgement:
    """`values`: the baseline's, of positive figures. A regression is worse than the limit, and than the median by more
    than `threshold` (a share of it). `rate`: chance that a run like the baseline's is worse than the limit.

    `reason`: why `value` is None.
    """
    whole = median(values) if values else None
    if value is None:
        return Judgement(metric, None, whole, None, "unknown", reason, larger_is_better)
    if len(values) < MIN_RECORDS:
        few = f"{len(values)} runs to compare with; {MIN_RECORDS} are needed"
        return Judgement(metric, value, whole, None, "too few", few, larger_is_better)
    assert whole is not None
    sign = 1 if larger_is_better else -1
    room = limit_factor(len(values), rate) * float(qn_scale(np.asarray(values, float)))
    limit = whole.value - sign * room
    is_worse = sign * value < sign * limit and sign * (whole.value - value) > threshold * whole.value
    return Judgement(metric, value, whole, limit, "regression" if is_worse else "pass", None, larger_is_better)
