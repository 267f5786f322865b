"""How many tokens to draft in the next step: as many as the measured times and acceptance say pay off."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import statistics
from collections.abc import Sequence

# Times kept per (batch, length). Their median stands for the step: a pause of the machine doesn't move it.
_TIMES_KEPT = 16
# Drafts that were looked at, after which what was seen before counts half.
_HALF_LIFE = 128
# Acceptance assumed before any draft was looked at, and how many drafts that is worth.
_PRIOR_ACCEPTANCE, _PRIOR_DRAFTS = 0.6, 8.0


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """What speculation did so far. A round is one row of one step; without drafts it counts in `plain_rounds` alone."""

    drafted: int
    accepted: int
    rounds: int
    emitted: int
    plain_rounds: int
    acceptance: float
    """Share of the drafts accepted, of those whose predecessors were; 0 before any."""
    tokens_per_round: float
    expected_tokens_per_round: float
    """Mean over the rounds of (1 - p^(n+1)) / (1 - p), for p = `acceptance` and the n drafts that each row had."""


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens of a round of `length` drafts, each accepted with this probability: 1 + p + ... + p^length."""
    return sum(acceptance**i for i in range(length + 1))


class DraftController:
    """Picks the draft length of each step that gives the most tokens per second.

    Tokens per second = rows x expected tokens / measured time of the step. Times come from `record_time` (warm-up) and
    `update` (each step), acceptance from `update`. Until a batch size has times of length 0 and of another one, batches
    below `prior_batch` draft the most, others nothing.

    A choice that never changes would never be measured again, so other lengths are tried: for each second of steps,
    `explore_share` seconds are set aside, and a length is tried once the loss that must be feared from it has been
    saved. So trying costs at most that share of the time, whatever is found.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_sizes: Sequence[int],
        *,
        prior_batch: int = 16,
        explore_share: float = 0.01,
        explore_interval: int = 32,
    ) -> None:
        """`lengths` and `batch_sizes` are those that programs are compiled for; a step is measured as the smallest
        compiled batch that holds it. Between two trials lie at least `explore_interval` steps."""
        if not lengths or min(lengths) != 0:
            raise ValueError(f"lengths={tuple(lengths)} must hold 0, the step without drafts, and no negative length")
        if not batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"batch_sizes={tuple(batch_sizes)} must hold at least one size, and none below 1")
        if not 0 <= explore_share < 1:
            raise ValueError(f"explore_share={explore_share} must be at least 0 and below 1")
        self._lengths = sorted(set(lengths))
        self._batch_sizes = sorted(set(batch_sizes))
        self._prior_batch = prior_batch
        self._explore_share = explore_share
        self._explore_interval = explore_interval
        self._times: dict[tuple[int, int], collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_TIMES_KEPT)
        )
        self._median: dict[tuple[int, int], float] = {}
        self._step = 0
        self._used_at: dict[tuple[int, int], int] = collections.defaultdict(int)
        self._savings = 0.0
        self._last_trial = 0
        # Running counts, that fade: drafts looked at and accepted, rows that had drafts and all rows.
        self._tested, self._kept = _PRIOR_DRAFTS, _PRIOR_ACCEPTANCE * _PRIOR_DRAFTS
        self._rows_drafted, self._rows = 1.0, 1.0
        self._total: collections.Counter[str] = collections.Counter()
        self._rounds_of: collections.Counter[int] = collections.Counter()

    @property
    def acceptance(self) -> float:
        """Running estimate: the probability that a draft is accepted if those before it are."""
        return self._kept / self._tested

    @property
    def coverage(self) -> float:
        """Running share of the rows of drafting steps that had a draft: n-grams don't always find one."""
        return self._rows_drafted / self._rows

    def record_time(self, batch: int, length: int, seconds: float) -> None:
        """One measured step, of `batch` rows and `length` drafts each: target, drafts and verification."""
        key = (self._size(batch), length)
        self._times[key].append(seconds)
        self._median[key] = statistics.median(self._times[key])

    def choose(self, batch: int) -> int:
        """Draft length of the next step of `batch` rows."""
        size = self._size(batch)
        best = self._best(size, batch)
        if self._step - self._last_trial < self._explore_interval:
            return best
        trial = self._trial(size, best)
        if trial is None:
            return best
        loss = self._loss(size, trial, best)
        if loss > self._savings:
            return best
        self._savings -= loss
        self._last_trial = self._step
        return trial

    def update(self, batch: int, length: int, drafted: Sequence[int], accepted: Sequence[int], seconds: float) -> None:
        """After a round that took `seconds`: drafts proposed and accepted, by row."""
        assert len(drafted) == len(accepted), (drafted, accepted)
        assert all(0 <= a <= n <= length for n, a in zip(drafted, accepted, strict=True)), (length, drafted, accepted)
        self._step += 1
        self._used_at[self._size(batch), length] = self._step
        self.record_time(batch, length, seconds)
        # No more is saved than any trial costs, so that trials never come in a row.
        most = (self._lengths[-1] + 1) * seconds
        self._savings = min(self._savings + self._explore_share * seconds, most)
        if length == 0:
            self._total["plain_rounds"] += len(drafted)
            return
        # A rejected draft is looked at, those behind it are not.
        kept = sum(accepted)
        tested = kept + sum(a < n for n, a in zip(drafted, accepted, strict=True))
        fade = 0.5 ** (tested / _HALF_LIFE)
        self._kept, self._tested = fade * self._kept + kept, fade * self._tested + tested
        fade = 0.5 ** (len(drafted) / _HALF_LIFE)
        self._rows_drafted = fade * self._rows_drafted + sum(n > 0 for n in drafted)
        self._rows = fade * self._rows + len(drafted)
        self._total.update(drafted=sum(drafted), accepted=kept, tested=tested)
        self._rounds_of.update(drafted)

    @property
    def stats(self) -> SpeculationStats:
        total, rounds = self._total, self._rounds_of.total()
        emitted = rounds + total["accepted"]
        acceptance = total["accepted"] / total["tested"] if total["tested"] else 0.0
        expected = sum(count * expected_tokens(acceptance, length) for length, count in self._rounds_of.items())
        return SpeculationStats(
            drafted=total["drafted"],
            accepted=total["accepted"],
            rounds=rounds,
            emitted=emitted,
            plain_rounds=total["plain_rounds"],
            acceptance=acceptance,
            tokens_per_round=emitted / rounds if rounds else 0.0,
            expected_tokens_per_round=expected / rounds if rounds else 0.0,
        )

    def _size(self, batch: int) -> int:
        index = bisect.bisect_left(self._batch_sizes, batch)
        assert index < len(self._batch_sizes), f"batch of {batch} rows; the largest compiled is {self._batch_sizes[-1]}"
        return self._batch_sizes[index]

    def _measured(self, size: int) -> list[int]:
        return [length for length in self._lengths if (size, length) in self._median]

    def _gain(self, length: int) -> float:
        """Expected tokens per row."""
        return 1 + self.coverage * (expected_tokens(self.acceptance, length) - 1)

    def _best(self, size: int, batch: int) -> int:
        measured = self._measured(size)
        if 0 not in measured or len(measured) < 2:
            return self._lengths[-1] if batch < self._prior_batch else 0
        return max(measured, key=lambda length: self._gain(length) / self._median[size, length])

    def _trial(self, size: int, best: int) -> int | None:
        """The length to try next: one without a time, else what tells most of what may have changed."""
        others = [length for length in self._lengths if length != best]
        if not others:
            return None
        unmeasured = [length for length in others if (size, length) not in self._median]
        if unmeasured:
            return unmeasured[0]
        if best == 0:
            # Only the acceptance may have risen unseen, and the shortest drafts show it at the least cost.
            return others[0]
        return min(others, key=lambda length: self._used_at[size, length])

    def _loss(self, size: int, trial: int, best: int) -> float:
        """Seconds that a step of length `trial` loses against the best one, at worst: if nothing is accepted."""
        if (size, best) not in self._median:
            return 0.0
        time = self._median[size, best]
        # Without a measurement, drafts are taken to cost a whole step each.
        trial_time = self._median[size, trial] if (size, trial) in self._median else (trial + 1) * time
        return max(trial_time - time / self._gain(best), 0.0)
