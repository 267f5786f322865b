"""Ways to run a train step on given devices: which there are, which are worth compiling, and what to try after those.

A candidate is a mesh, a number of microbatches, and what the backward pass recomputes. Estimates choose among them
(perf/step_model.py); what is compiled answers for itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from perf.chips import Chip
from perf.flops import Remat
from perf.step_model import Layout, StepEstimate

REMATS: tuple[Remat, ...] = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """`accumulation`, `remat` and `scan` as in a run's settings; `options`: XLA options beside the run's own."""

    layout: Layout
    accumulation: int = 1
    remat: Remat = "none"
    scan: bool = True
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [str(self.layout)]
        if self.accumulation > 1:
            words.append(f"{self.accumulation} microbatches")
        words.append(f"remat {self.remat}")
        words.append("scanned" if self.scan else "unrolled")
        return ", ".join([*words, *self.options])


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate with its estimate. `fits`: by the estimate, in the bytes that a device has."""

    candidate: Candidate
    estimate: StepEstimate
    fits: bool


@dataclasses.dataclass(frozen=True)
class Answer:
    """The compiler's, to a candidate, in plain values. Only `refused` is set where the program can't be made at all.

    `need_bytes` of `limit_bytes`: memory of a device, None with the `reason` where the compiler names none; at least so
    much if `is_least`. `prediction` (of a device, as in perf/prediction.py) and `mfu` are None where it doesn't fit.
    `kept`: it was found, and not compiled again. `windowed`: products are cut into the parts of a gather."""

    refused: str | None = None
    fits: bool | None = None
    need_bytes: float | None = None
    is_least: bool = False
    limit_bytes: float | None = None
    reason: str | None = None
    compile_seconds: float | None = None
    kept: bool = False
    windowed: bool = False
    prediction: dict[str, Any] | None = None
    mfu: float | None = None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        took = "kept from before" if self.kept else f"compiled in {self.compile_seconds:.0f} s"
        return f"{'fits' if self.fits else 'does not fit'}, {took}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A candidate of a report. `answer`: the compiler's, None where nothing was compiled; `command` starts the run,
    None where no entry point does. `mbu`: of a decode step."""

    ranked: Ranked
    answer: Answer | None
    command: str | None
    mbu: float | None = None

    @property
    def fits(self) -> bool | None:
        """None for one that can't be made."""
        return self.ranked.fits if self.answer is None else self.answer.fits

    @property
    def seconds(self) -> float | None:
        """Predicted, of one step; None where there is no program."""
        if self.answer is None:
            return self.ranked.estimate.seconds
        return None if self.answer.prediction is None else self.answer.prediction["step_seconds"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Candidates for one set of devices. `length`: tokens of a row; `num_candidates`: all
    that the run's settings allow."""

    name: str
    chip: Chip
    num_devices: int
    rows: int
    length: int
    dtype: str
    entries: tuple[Entry, ...]
    num_candidates: int
    notes: tuple[str, ...]

    @property
    def best(self) -> Entry | None:
        """The fastest that fits."""
        fitting = [one for one in self.entries if one.fits and one.seconds is not None]
        return min(fitting, key=lambda one: one.seconds or math.inf, default=None)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def layouts(num_devices: int, num_slices: int = 1) -> Iterator[Layout]:
    """Every way to spread exactly `num_devices`, of `num_slices` equal slices, over the mesh axes."""
    num_axes, each = len(dataclasses.fields(Layout)) - 1, num_devices // num_slices
    for first in itertools.product(divisors(each), repeat=num_axes - 1):
        rest, remainder = divmod(each, math.prod(first))
        if not remainder and rest:
            yield Layout(*first, rest, slice=num_slices)


def enumerate_candidates(
    num_devices: int,
    accumulations: Iterable[int],
    remats: Iterable[Remat],
    scans: Iterable[bool],
    num_slices: int = 1,
) -> Iterator[Candidate]:
    """Every combination; what a run's settings refuse is among them."""
    choices = list(itertools.product(accumulations, remats, scans))
    for layout in layouts(num_devices, num_slices):
        for choice in choices:
            yield Candidate(layout, *choice)


def rank(
    candidates: Iterable[Candidate],
    estimate: Callable[[Candidate], StepEstimate],
    usable_bytes: float,
) -> list[Ranked]:
    """Fastest first of those that fit by the estimate; then those that do not, with the least bytes first. Of equals
    the simpler: fewer ways to split a product, fewer microbatches, less that is computed again."""

    def order(ranked: Ranked) -> tuple:
        candidate = ranked.candidate
        simplicity = (candidate.layout.tensor, candidate.accumulation, REMATS.index(candidate.remat))
        if ranked.fits:
            return (0, ranked.estimate.seconds, *simplicity)
        return (1, ranked.estimate.memory_bytes, *simplicity)

    made = []
    for candidate in candidates:
        estimated = estimate(candidate)
        made.append(Ranked(candidate, estimated, estimated.memory_bytes <= usable_bytes))
    return sorted(made, key=order)


def shortlist(ranked: Sequence[Ranked], count: int) -> list[Ranked]:
    """The best of each of the `count` best meshes: estimates tell meshes apart no better than what is recomputed, and
    the latter has `next_smaller` where it does not fit."""
    chosen: dict[Layout, Ranked] = {}
    for one in ranked:
        if len(chosen) < count:
            chosen.setdefault(one.candidate.layout, one)
    return list(chosen.values())


def next_smaller(
    ranked: Sequence[Ranked], failed: Candidate, need: float, limit: float, tried: Iterable[Candidate]
) -> Ranked | None:
    """What to compile after `failed`, which needs `need` bytes of `limit`: the first of the same mesh whose estimate is
    smaller in that proportion, else the smallest; None if all were tried or none is smaller.
    """
    done = set(tried)
    estimates = {one.candidate: one.estimate.memory_bytes for one in ranked}
    same = [one for one in ranked if one.candidate.layout == failed.layout and one.candidate not in done]
    smaller = [one for one in same if one.estimate.memory_bytes < estimates[failed]]
    enough = [one for one in smaller if one.estimate.memory_bytes <= estimates[failed] * limit / need]
    if enough:
        return min(enough, key=lambda one: one.estimate.seconds)
    return min(smaller, key=lambda one: one.estimate.memory_bytes, default=None)


def with_setting(config: Any, path: str, value: Any) -> Any:
    """A copy of nested dataclasses with one field changed."""
    name, _, rest = path.partition(".")
    new = with_setting(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: new})


def command_line(entry_point: str, name: str, config: Any, changed: Any) -> str:
    """What starts a run: the entry point with each setting in which it differs from the config."""
    return " ".join([entry_point, name, *_flags(config, changed, "")])


def _flags(before: Any, after: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        path = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(old) and type(old) is type(new):
            yield from _flags(old, new, f"{path}.")
        elif old == new:
            continue
        elif isinstance(new, bool):
            yield f"--{path}" if new else f"--{prefix}no-{field.name.replace('_', '-')}"
        elif isinstance(new, tuple):
            yield " ".join([f"--{path}", *map(str, new)])
        else:
            yield f"--{path} {new}"
