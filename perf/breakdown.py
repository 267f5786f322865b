"""Where the time of a step went, from a trace: every moment of a device belongs to one category, so that they sum to
the step.

The window is from the start of the first step that the trace has whole to the start of the last one: so many periods of
a device, each with what follows it before the next begins. A trace of one step alone is that step without what follows.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence

from perf.intervals import Piece, Span, clip, foremost, intersect, subtract, total, union
from perf.marks import INPUT_MARK
from perf.op_kind import KINDS, NO_OPS, Kind, Ops, kernel_kind, op_name
from perf.trace import Device, Event, Execution, Timeline

GAPS = ("launch", "input", "host")
"""Moments in which a device does nothing: within a program, and between programs with the host taking a batch or with
the host doing something else."""
CATEGORIES = (*KINDS, *GAPS)

# Upper bounds of the histogram of op times, nanoseconds. Starting a kernel takes a few microseconds.
LENGTH_BOUNDS = (2_000, 5_000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclasses.dataclass(frozen=True)
class OpTime:
    """One op of a device, nanoseconds a step. `exposed`: while nothing of another kind ran before it in KINDS."""

    op: str
    kind: Kind
    scope: str
    exposed: float
    count: float


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """One device. `nanoseconds` by category, over all of its `steps`, sum to the window exactly."""

    ordinal: int
    steps: int
    window: Span
    nanoseconds: Mapping[str, int]
    periods: tuple[Mapping[str, int], ...]
    """The same of each step by itself."""
    collective: int
    """Nanoseconds with a collective under way, hidden or not."""
    hidden: int
    """Of those, nanoseconds in which something else ran."""
    lengths: tuple[int, ...]
    """Ops by length: one count for each of LENGTH_BOUNDS, and one for longer ones."""
    ops: tuple[OpTime, ...]
    instances: Mapping[tuple[str, int], int]
    """Exposed nanoseconds of each collective, by name and occurrence."""

    @property
    def step(self) -> float:
        """Nanoseconds of a step."""
        return (self.window[1] - self.window[0]) / self.steps

    @property
    def compute(self) -> int:
        """Nanoseconds of all work that is no collective."""
        return sum(self.nanoseconds[kind] for kind in KINDS if kind != "collective")


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """All devices of a process. Values per step are means over devices, nanoseconds."""

    platform: str
    program: str
    devices: tuple[DeviceTime, ...]
    step_times: tuple[int, ...]
    """Start to start, of the first device."""
    collective_wait: float | None
    """Of exposed collectives, nanoseconds a step that a device waited for the last one to arrive: its exposed time of
    each collective above that of the device that had the least. None for one device, on which waiting looks like
    communicating."""
    transfers: Mapping[str, float]
    """Exposed nanoseconds a step of each collective op on the device that had the least: the transfer itself."""
    has_marks: bool
    """Whether the trace says when the host took its input."""
    whole: bool
    """False where the trace has one step only: what came after it is not known."""

    @property
    def steps(self) -> int:
        return self.devices[0].steps

    @property
    def step(self) -> float:
        return statistics.fmean(device.step for device in self.devices)

    def per_step(self, category: str) -> float:
        return statistics.fmean(device.nanoseconds[category] / device.steps for device in self.devices)

    @property
    def collective(self) -> float:
        return statistics.fmean(device.collective / device.steps for device in self.devices)

    @property
    def hidden(self) -> float:
        return statistics.fmean(device.hidden / device.steps for device in self.devices)

    @property
    def overlap(self) -> float | None:
        """Share of the time of collectives in which something else ran; None without collectives."""
        return self.hidden / self.collective if self.collective else None

    @property
    def spread(self) -> float | None:
        """Compute time of the slowest device over the median one's; None for one device, or none that computes."""
        times = [device.compute / device.steps for device in self.devices]
        middle = statistics.median(times)
        return max(times) / middle if len(times) > 1 and middle else None

    def typical(self, category: str) -> float:
        """Median over the steps, mean over devices: one step in which the host was held up is no property of a run."""
        return statistics.fmean(
            statistics.median(period[category] for period in device.periods) for device in self.devices
        )

    def share(self, category: str) -> float:
        return self.per_step(category) / self.step


def main_program(timeline: Timeline) -> str:
    """The program that the devices spent most time in. Raises ValueError where no event names its program."""
    spent: collections.Counter[str] = collections.Counter()
    for device in timeline.devices:
        for run in device.executions:
            spent[run.module] += run.end - run.start
    if not spent:
        raise ValueError(f"{timeline.source} says of no op which program it is of: a trace of jax.profiler does")
    return spent.most_common(1)[0][0]


def breakdown(timeline: Timeline, facts: Ops = NO_OPS) -> Breakdown:
    """`facts`: what the text of the main program says of its ops. Raises ValueError for a trace without a program."""
    program = main_program(timeline)
    found = tuple(
        _device(device, program, timeline, facts)
        for device in timeline.devices
        if any(run.module == program for run in device.executions)
    )
    runs = [run for run in timeline.devices[0].executions if run.module == program]
    wait, transfers = _waiting(found)
    return Breakdown(
        timeline.platform,
        program,
        found,
        tuple(later.start - run.start for run, later in itertools.pairwise(runs)),
        wait,
        transfers,
        bool(timeline.marks[INPUT_MARK]),
        len(runs) > 1,
    )


def _window(runs: Sequence[Execution]) -> tuple[Span, int]:
    if len(runs) == 1:
        return (runs[0].start, runs[0].end), 1
    return (runs[0].start, runs[-1].start), len(runs) - 1


def _device(device: Device, program: str, timeline: Timeline, facts: Ops) -> DeviceTime:
    runs = [run for run in device.executions if run.module == program]
    window, steps = _window(runs)
    pieces = clip(device.pieces, window)
    kinds = {
        event: kernel_kind(event.name, event.op, facts.of(event.name, event.op) if event.module == program else None)
        for _, _, event in pieces
    }
    rank = {kind: number for number, kind in enumerate(KINDS)}
    owned = foremost((start, end, rank[kinds[event]], event) for start, end, event in pieces)
    starts = [run.start for run in runs]
    bounds = [*starts[:-1], window[1]] if len(runs) > 1 else list(window)
    periods = tuple(_period(span, owned, kinds, device, timeline) for span in itertools.pairwise(bounds))
    spent = {category: sum(period[category] for period in periods) for category in CATEGORIES}
    assert sum(spent.values()) == window[1] - window[0], "categories do not sum to the window"
    busy = union((start, end) for start, end, event in pieces if kinds[event] != "collective")
    talking = union((start, end) for start, end, event in pieces if kinds[event] == "collective")
    return DeviceTime(
        device.ordinal,
        steps,
        window,
        spent,
        periods,
        total(talking),
        total(intersect(talking, busy)),
        _lengths(pieces),
        _ops(owned, kinds, steps, facts),
        _instances(owned, kinds),
    )


def _period(
    span: Span, owned: Sequence[Piece[Event]], kinds: Mapping[Event, Kind], device: Device, timeline: Timeline
) -> dict[str, int]:
    """Nanoseconds by category within a span; they sum to it."""
    spent = dict.fromkeys(CATEGORIES, 0)
    inside = clip(owned, span)
    for start, end, event in inside:
        spent[kinds[event]] += end - start
    return spent | _idle(subtract([span], union((start, end) for start, end, _ in inside)), device, timeline)


def _idle(idle: Sequence[Span], device: Device, timeline: Timeline) -> dict[str, int]:
    inside = union((run.start, run.end) for run in device.executions)
    between = subtract(idle, inside)
    taking = total(intersect(between, union(timeline.marks[INPUT_MARK])))
    return {"launch": total(intersect(idle, inside)), "input": taking, "host": total(between) - taking}


def _lengths(pieces: Sequence[Piece[Event]]) -> tuple[int, ...]:
    counts = [0] * (len(LENGTH_BOUNDS) + 1)
    for event in {event for _, _, event in pieces}:
        length = event.end - event.start
        counts[sum(length > bound for bound in LENGTH_BOUNDS)] += 1
    return tuple(counts)


def _ops(owned: Sequence[Piece[Event]], kinds: Mapping[Event, Kind], steps: int, facts: Ops) -> tuple[OpTime, ...]:
    """Longest first."""
    spent: collections.Counter[tuple[str, Kind]] = collections.Counter()
    events: dict[tuple[str, Kind], set[Event]] = collections.defaultdict(set)
    scopes: dict[str, str] = {}
    for start, end, event in owned:
        name, known = op_name(event.name, event.op), facts.of(event.name, event.op)
        key = name, kinds[event]
        scopes[name] = known.scope if known else ""
        spent[key] += end - start
        events[key].add(event)
    return tuple(
        OpTime(op, kind, scopes[op], time / steps, len(events[op, kind]) / steps)
        for (op, kind), time in spent.most_common()
    )


def _instances(owned: Sequence[Piece[Event]], kinds: Mapping[Event, Kind]) -> dict[tuple[str, int], int]:
    """Exposed time of each collective, numbered by occurrence, so that devices can be compared."""
    exposed: dict[Event, int] = {}
    for start, end, event in owned:
        if kinds[event] == "collective":
            exposed[event] = exposed.get(event, 0) + end - start
    seen: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, int], int] = {}
    for event in sorted(exposed, key=lambda event: event.start):
        name = op_name(event.name, event.op)
        found[name, seen[name]] = exposed[event]
        seen[name] += 1
    return found


def _waiting(devices: Sequence[DeviceTime]) -> tuple[float | None, dict[str, float]]:
    """The last device to arrive waits for none: its time is the transfer's."""
    least: dict[tuple[str, int], int] = dict(devices[0].instances)
    for device in devices[1:]:
        # A collective that one device had hidden, or that is outside of its window, has no exposed time there.
        least = {key: min(time, device.instances.get(key, 0)) for key, time in least.items()}
    transfers: collections.Counter[str] = collections.Counter()
    for (op, _), time in least.items():
        transfers[op] += time
    steps = devices[0].steps
    each = {op: time / steps for op, time in transfers.most_common()}
    if len(devices) == 1:
        return None, each
    mean = statistics.fmean(device.nanoseconds["collective"] / device.steps for device in devices)
    return mean - sum(each.values()), each
