"""When the time of a step changed for good: a rank test over every split of the latest steps.

A split's evidence is the rank sum of the values after it (Mann and Whitney, 1947; over all splits: Pettitt, A
non-parametric approach to the change-point problem, Applied Statistics 28, 1979). Ranks make it indifferent to what
step times have most of: single steps that took ten times as long. A moment without change raises an alarm with a chance
of at most `RATE` a check, whatever the distribution, as long as steps are exchangeable: the largest statistic over all
splits is held to the sum of their normal tails, and the tails of a rank sum are lighter than those.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterable

import numpy as np

RATE = 1e-5
"""Of false alarms in one check: at most 0.4 in a thousand runs of 200 steps, which have 40 checks."""
THRESHOLD = 0.03
"""Smallest change that is told, as a share of the time before."""
LEAST = 5
"""Values on either side of a split; the rank test asks for more than this by itself."""
WINDOW = 256
STRIDE = 5
"""Values between checks."""


@dataclasses.dataclass(frozen=True)
class Change:
    """`before` and `after` are the medians on both sides, in the values' unit."""

    index: int
    """Of the first value after the change."""
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def find_change(values: np.ndarray, *, rate: float = RATE, threshold: float = THRESHOLD) -> Change | None:
    """The split of `values` [steps], all positive, with the most evidence of a change; None below it.

    With 240 values before it, a change is found once 11 came after that are all larger or all smaller; with 25, 25.
    """
    if len(values) < 2 * LEAST:
        return None
    if rank_scores(values).max() < _limit(len(values) - 2 * LEAST + 1, rate):
        return None
    index = _place(values)
    change = Change(index, float(np.median(values[:index])), float(np.median(values[index:])))
    return change if abs(change.ratio - 1) >= threshold else None


def rank_scores(values: np.ndarray) -> np.ndarray:
    """Standardised rank sum, without its sign, for each split that leaves `LEAST` values on either side."""
    count = len(values)
    before = np.arange(LEAST, count - LEAST + 1)
    ranks = _ranks(values)
    rank_sum = np.cumsum(ranks)[before - 1]
    # Ties share a rank: the variance of the ranks as they are has their correction in it.
    variance = before * (count - before) / count * ranks.var(ddof=1)
    if variance[0] == 0:
        return np.zeros(len(before))
    return np.abs(rank_sum - before * (count + 1) / 2) / np.sqrt(variance)


def _place(values: np.ndarray) -> int:
    """The split with the smallest sum of distances from the medians of its two sides: where a change was. The largest
    rank sum is a poorer guide where few values came after: single long steps before the change draw it to them."""
    splits = range(LEAST, len(values) - LEAST + 1)
    return min(splits, key=lambda split: _distances(values[:split]) + _distances(values[split:]))


def _distances(values: np.ndarray) -> float:
    return float(np.abs(values - np.median(values)).sum())


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


@functools.lru_cache(maxsize=WINDOW)
def _limit(splits: int, rate: float) -> float:
    """Score that the largest of `splits` two-sided normal statistics exceeds with a chance of at most `rate`."""
    return -statistics.NormalDist().inv_cdf(rate / (2 * splits))


class ChangeDetector:
    """Watches values as they come: the last `WINDOW` of them, every `STRIDE`. After a change it begins anew there."""

    def __init__(self, *, rate: float = RATE, threshold: float = THRESHOLD) -> None:
        self._rate, self._threshold = rate, threshold
        self._window: list[float] = []
        self._seen = 0

    def update(self, value: float) -> Change | None:
        """A change that this value gave the last evidence of, with its index from the first value ever seen."""
        self._window.append(value)
        self._seen += 1
        if self._seen % STRIDE:
            return None
        del self._window[:-WINDOW]
        found = find_change(np.asarray(self._window), rate=self._rate, threshold=self._threshold)
        if found is None:
            return None
        first = self._seen - len(self._window)
        del self._window[: found.index]
        return dataclasses.replace(found, index=first + found.index)


def changes(values: Iterable[float], *, rate: float = RATE, threshold: float = THRESHOLD) -> tuple[Change, ...]:
    """All that a detector tells of a whole series. `before` and `after` are as they were known when it was told."""
    detector = ChangeDetector(rate=rate, threshold=threshold)
    found = (detector.update(value) for value in values)
    return tuple(change for change in found if change is not None)
