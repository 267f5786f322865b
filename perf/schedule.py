"""A walk over scheduled HLO for TPU that prices every instruction, and lets what is asynchronous go on beside the core.

See perf/prediction.py for what is assumed. Times are seconds of one device.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from perf.chips import Chip
from perf.hlo import Computation, Instruction, Module
from perf.hlo_cost import Collective, collective, flops, has_product, inner_collectives, memory_bytes
from perf.interconnect import Network, axes_of
from perf.kernel_cost import PALLAS_SHARE, is_attention, is_ragged, pallas_flops

Category = Literal["matmul", "attention", "elementwise", "copies", "collectives"]
CATEGORIES: tuple[Category, ...] = ("matmul", "attention", "elementwise", "copies", "collectives")

# Instructions of the program that say nothing about time by themselves.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "transpose", "reshape")
# Kinds of a transfer between slices that are not named as the collective that they are.
_TRANSFERS = {"ONE_TO_ONE": "collective-permute"}
_HOST = 5  # The memory space.
_DMA = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")


@dataclasses.dataclass
class Spent:
    """Time of one instruction in a step: `count` runs of it, `seconds` together, and the FLOPs and bytes of them all.

    `floor_seconds`: its FLOPs at the peak or its bytes at the memory's bandwidth, the longer, which is its `bound`.
    `priced`: by the compiler's estimate; else by its FLOPs and bytes.
    """

    name: str
    opcode: str
    scope: str
    category: Category
    bound: Literal["compute", "memory"]
    priced: bool
    count: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    num_bytes: float = 0.0
    floor_seconds: float = 0.0

    @property
    def lost_seconds(self) -> float:
        return self.seconds - self.floor_seconds


@dataclasses.dataclass
class Transfer:
    """Collectives of a kind over the same mesh axes, in a step. `num_bytes` as in perf/hlo_cost.py's Collective.

    `exposed_seconds`: the core waits for them; `hidden_seconds`: it has other work meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    count: int = 0
    num_bytes: float = 0.0
    exposed_seconds: float = 0.0
    hidden_seconds: float = 0.0


class Wait(NamedTuple):
    """What one collective in the text costs in a step, with its scope: the evidence of a finding."""

    collective: Collective
    axes: tuple[str, ...]
    count: int
    seconds: float
    exposed_seconds: float
    is_async: bool


class Walk:
    """One pass over the schedule, and what it adds up. A loop's body is walked once.

    `peak`: FLOP/s of a device; `clock`: of its core; `scale`: of the estimates of products that compute bounds.
    """

    def __init__(
        self,
        module: Module,
        chip: Chip,
        mesh: Mapping[str, int],
        network: Network,
        peak: float,
        clock: float,
        scale: float,
    ) -> None:
        self.module, self.mesh, self.network = module, mesh, network
        self.peak, self.clock, self.scale = peak, clock, scale
        self.bandwidth = chip.memory_bandwidth / chip.devices_per_chip
        first = network.places[0].slice
        # A program for several slices numbers the partitions of its own slice.
        self.partitions = [index for index, place in enumerate(network.places) if place.slice == first]
        self.categories: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
        self.spent: dict[str, Spent] = {}
        self.transfers: dict[tuple[str, tuple[str, ...]], Transfer] = {}
        self.waits: list[Wait] = []
        # Channels of the collectives that a fusion starts and another waits for.
        self.started = {
            found.channel
            for _, one in module.instructions()
            if one.opcode == "fusion" and "AsyncCollectiveStart" in call_targets(module, one)
            for found in inner_collectives(module, one)
        }
        # An ordered set of sentences.
        self.notes: dict[str, None] = {}

    def run(self, scope: Computation, times: int) -> float:
        """Seconds of one run of a computation of which a step does `times`."""
        queue = Queue()
        for one in scope.instructions:
            self.step(scope, one, times, queue)
        return queue.now

    def step(self, scope: Computation, one: Instruction, times: int, queue: Queue) -> None:
        if one.opcode == "while":
            queue.now += self.loop(one, times)
        elif one.opcode == "conditional":
            queue.now += self.branch(one, times)
        elif one.opcode == "call":
            queue.now += sum(self.run(callee, times) for callee in self.module.callees(one, "to_apply", "calls"))
        elif one.opcode in ("send", "recv"):
            self.between_slices(one, queue)
        elif one.opcode.endswith("-done"):
            self.finish(one, times, queue)
        elif one.opcode in _DMA:
            if any(array.memory_space == _HOST for array in one.results):
                self.notes["copies to and from the host's memory are priced as copies within the device's"] = None
            queue.begin(one.name, copied_bytes(one) / self.bandwidth, ("memory",))
        elif one.is_collective:
            self.begin(one, collective(self.module, scope, one), times, queue, one.opcode.endswith("-start"))
        elif one.opcode == "async-start" and (found := inner_collectives(self.module, one)):
            self.begin(one, found[0], times, queue, True)
        elif one.opcode == "fusion" and (found := inner_collectives(self.module, one)):
            self.fusion(scope, one, found, times, queue)
        else:
            self.core(scope, one, times, queue)

    def loop(self, one: Instruction, times: int) -> float:
        count = self.module.trip_count(one)
        if count is None:
            self.notes["a loop whose length depends on data counts as one iteration"] = None
            count = 1
        return count * sum(self.run(body, times * count) for body in self.module.callees(one, "body"))

    def branch(self, one: Instruction, times: int) -> float:
        """The longest one is taken."""
        branches = self.module.callees(one, "branch_computations", "true_computation", "false_computation")
        self.notes["a conditional takes its longest branch"] = None
        longest = max(branches, key=lambda branch: self.scratch().run(branch, 1))
        return self.run(longest, times)

    def scratch(self) -> Walk:
        other = copy.copy(self)
        other.categories, other.spent, other.transfers = dict(self.categories), {}, {}
        other.waits, other.notes = [], {}
        return other

    def fusion(
        self, scope: Computation, one: Instruction, found: Sequence[Collective], times: int, queue: Queue
    ) -> None:
        """A fusion that holds collectives: it starts one, waits for one, computes while one goes on, or is one."""
        channels = {inner.channel for inner in found}
        if "AsyncCollectiveStart" in (targets := call_targets(self.module, one)):
            self.begin(one, found[0], times, queue, True)
        elif "AsyncCollectiveDone" in targets:
            self.wait_if_known(str(found[0].channel), times, queue)
        elif channels <= self.started:
            # Repeated in everything that runs until its end, within loops too.
            self.core(scope, one, times, queue)
        else:
            for inner in found:
                self.begin(one, inner, times, queue, False)
            self.core(scope, one, times, queue, only_priced=True)

    def begin(self, one: Instruction, found: Collective, times: int, queue: Queue, is_async: bool) -> None:
        members = found.groups or found.pairs
        group = [self.partitions[index] for index in max(members, key=len)] if members else []
        if found.groups is None:
            pairs = [(self.partitions[source], self.partitions[target]) for source, target in found.pairs]
            seconds = self.network.permute_seconds(found.num_bytes, pairs)
        else:
            seconds = self.network.seconds(found.kind, found.num_bytes, group, one_ring=found.one_ring)
        lanes = self.network.lanes(group, is_permute=found.groups is None)
        self.launch(one, found, axes_of(group, self.mesh), seconds, lanes, queue, is_async)
        if not is_async:
            self.wait(one.name, times, queue)

    def launch(
        self,
        one: Instruction,
        found: Collective,
        axes: tuple[str, ...],
        seconds: float,
        lanes: Sequence[str],
        queue: Queue,
        is_async: bool,
    ) -> None:
        queue.begin(one.name, seconds, lanes)
        queue.known[one.name] = Pending(found, axes, seconds, is_async, queue.ends[one.name])
        if found.channel is not None:
            # A fusion that waits names the channel, and not the fusion that began.
            queue.known[str(found.channel)] = queue.known[one.name]

    def between_slices(self, one: Instruction, queue: Queue) -> None:
        """Slices exchange by a send and a receive of one name: it goes on from the send to the receive's done."""
        kind, name = one.attribute("_xla_megascale_transfer_type"), one.attribute("_xla_host_transfer_rendezvous")
        if kind is None or name is None:
            self.notes["sends and receives that are not between slices take no time"] = None
            return
        kind = _TRANSFERS.get(kind, kind.lower().replace("_", "-"))
        queue.rendezvous[one.name] = name
        if one.opcode == "send":
            num_bytes = one.results[0].num_bytes
            seconds = self.network.between(kind, num_bytes, len({place.slice for place in self.network.places}))
            found = Collective(name, kind, num_bytes, one.results[:1], None, (), one.channel, one.scope, False)
            begun = dataclasses.replace(one, name=name)
            # Not known by its channel, which the receive doesn't have.
            axes = axes_of([self.partitions[0], self.peer()], self.mesh)
            self.launch(begun, found._replace(channel=None), axes, seconds, ("between slices",), queue, True)

    def peer(self) -> int:
        """The device of another slice at the place of this slice's first: they differ in the slices' mesh axis."""
        first = self.network.places[self.partitions[0]]
        others = [i for i, place in enumerate(self.network.places) if place.slice != first.slice]
        same = [i for i in others if self.network.places[i].coords == first.coords]
        return (same or others or [self.partitions[0]])[0]

    def wait(self, name: str, times: int, queue: Queue) -> None:
        pending = queue.known[name]
        found = pending.collective
        exposed = queue.wait(pending.end)
        self.categories["collectives"] += exposed * times
        transfer = self.transfers.setdefault((found.kind, pending.axes), Transfer(found.kind, pending.axes))
        transfer.count += times
        transfer.num_bytes += found.num_bytes * times
        transfer.exposed_seconds += exposed * times
        transfer.hidden_seconds += max(0.0, pending.seconds - exposed) * times
        seconds, exposed = pending.seconds * times, exposed * times
        self.waits.append(Wait(found, pending.axes, times, seconds, exposed, pending.is_async))

    def wait_if_known(self, name: str, times: int, queue: Queue) -> None:
        if name in queue.known:
            self.wait(name, times, queue)
        else:
            self.notes["a transfer that ends in another computation than it began in takes no time"] = None

    def finish(self, one: Instruction, times: int, queue: Queue) -> None:
        start = one.operands[0]
        if one.opcode == "send-done":
            # The receive's done is waited for.
            return
        if one.opcode == "recv-done":
            start = queue.rendezvous.get(start, start)
        if start in queue.ends and start not in queue.known:
            self.categories["copies"] += queue.wait(queue.ends[start]) * times
        else:
            self.wait_if_known(start, times, queue)

    def core(
        self, scope: Computation, one: Instruction, times: int, queue: Queue, *, only_priced: bool = False
    ) -> None:
        """An instruction that the core is busy with. `only_priced`: not for what has no estimate."""
        target = one.target if one.opcode == "custom-call" else None
        if target in _FREE_CALLS:
            return
        work = self.kernel(scope, one) if target == "tpu_custom_call" else flops(self.module, scope, one)
        num_bytes = memory_bytes(self.module, scope, one)
        floor = max(work / self.peak, num_bytes / self.bandwidth)
        bound = "compute" if work / self.peak > num_bytes / self.bandwidth else "memory"
        if one.estimated_cycles is not None:
            # Estimates of what memory bounds are near to its bandwidth: published training steps say nothing of them.
            seconds = one.estimated_cycles / self.clock * (self.scale if bound == "compute" else 1.0)
        elif target == "tpu_custom_call":
            seconds = max(work / self.peak / PALLAS_SHARE, num_bytes / self.bandwidth)
        else:
            seconds = floor
        if not (seconds or work) or (only_priced and one.estimated_cycles is None):
            return
        queue.now += seconds
        category = categorize(self.module, one)
        self.categories[category] += seconds * times
        # A name is unique in a program; its computation may be called from two places.
        priced = one.estimated_cycles is not None
        entry = self.spent.setdefault(one.name, Spent(one.name, one.opcode, one.scope, category, bound, priced))
        entry.count += times
        entry.seconds += seconds * times
        entry.flops += work * times
        entry.num_bytes += num_bytes * times
        entry.floor_seconds += floor * times

    def kernel(self, scope: Computation, one: Instruction) -> float:
        work = pallas_flops(scope, one)
        if work is None:
            self.notes[f"a kernel of unknown work ({one.name}) takes as long as its bytes"] = None
            return 0.0
        self.notes[
            f"Pallas kernels have no estimate: {PALLAS_SHARE:.0%} of the peak is assumed, and attention to all keys "
            "before a query"
        ] = None
        return work


class Pending(NamedTuple):
    """A transfer under way; `end` in the seconds of its queue."""

    collective: Collective
    axes: tuple[str, ...]
    seconds: float
    is_async: bool
    end: float


class Queue:
    """Where the core is in one computation, and when what runs beside it ends. Seconds from the computation's begin."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[str, float] = {}
        self.free: dict[str, float] = collections.defaultdict(float)
        self.known: dict[str, Pending] = {}
        self.rendezvous: dict[str, str] = {}

    def begin(self, name: str, seconds: float, lanes: Sequence[str]) -> None:
        """A transfer goes once all its lanes are free, and holds them."""
        begins = max([self.now, *(self.free[lane] for lane in lanes)])
        self.ends[name] = begins + seconds
        for lane in lanes:
            self.free[lane] = begins + seconds

    def wait(self, end: float) -> float:
        """Seconds until `end` that the core waits."""
        exposed = max(0.0, end - self.now)
        self.now += exposed
        return exposed


def call_targets(module: Module, one: Instruction) -> set[str | None]:
    """Of the custom calls in what a fusion calls."""
    inner = [two for callee in module.callees(one, "calls") for two in callee.instructions]
    return {two.target for two in inner if two.opcode == "custom-call"}


def copied_bytes(one: Instruction) -> int:
    """Of an asynchronous copy, whose results are its source, the copy and a handle: the smaller of both, once: the
    other side is VMEM."""
    return min((array.num_bytes for array in one.results if array.dims), default=0)


def categorize(module: Module, one: Instruction) -> Category:
    """By what it computes and the model's named scopes."""
    if is_attention(one.scope):
        return "attention"
    if has_product(module, one) or is_ragged(one):
        return "matmul"
    if one.opcode in _COPIES or (one.opcode == "fusion" and _only_moves(module, one)):
        return "copies"
    return "elementwise"


def _only_moves(module: Module, one: Instruction) -> bool:
    moves = (*_COPIES, "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "compare", "select", "clamp")
    inner = [two for callee in module.callees(one, "calls") for two in callee.instructions]
    # Index arithmetic is on scalars.
    return bool(inner) and all(two.opcode in moves or not any(array.dims for array in two.results) for two in inner)
