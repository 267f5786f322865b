"""What a step compiled for a TPU slice will take, and where its time goes: a prediction from its scheduled HLO.

Instructions run one after another on the core, in the compiler's order, loops as often as they turn; asynchronous
copies and collectives run beside them from their start, and what is left of them at their done is exposed. The core's
time is the compiler's own estimate in cycles, times one scalar per TPU generation (perf/calibration.py); collectives
are priced by perf/interconnect.py. Not in it: contention for memory between copies and the core, jitter, the host.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from perf.calibration import Calibration, calibration_of, clock_of
from perf.chips import Chip
from perf.hlo import Computation, Instruction, Module
from perf.hlo_cost import Collective, collective, flops, has_product, inner_collectives, memory_bytes
from perf.interconnect import Network, axes_of

Category = Literal["matmul", "attention", "elementwise", "copies", "collectives"]
CATEGORIES: tuple[Category, ...] = ("matmul", "attention", "elementwise", "copies", "collectives")

PALLAS_SHARE = 0.6
"""Of the peak that a Pallas kernel's products are taken to reach: an assumption, its text has no estimate."""

# Instructions of the program that say nothing about time by themselves.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "transpose", "reshape")
_DMA = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")


@dataclasses.dataclass
class Spent:
    """Time of one instruction in a step: `count` runs of it, `seconds` together, and the FLOPs and bytes of them all.

    `floor_seconds`: its FLOPs at the peak or its bytes at the memory's bandwidth, the longer. `priced`: by the
    compiler's estimate; else by its FLOPs and bytes.
    """

    name: str
    opcode: str
    scope: str
    category: Category
    count: int
    seconds: float
    flops: float
    num_bytes: float
    floor_seconds: float
    priced: bool

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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step of one device, predicted. Categories sum to `step_seconds`; `flops` are those of the program, with what
    it recomputes; `assumptions` are sentences to print beside any of it."""

    step_seconds: float
    categories: Mapping[Category, float]
    transfers: tuple[Transfer, ...]
    waits: tuple[Wait, ...]
    spent: tuple[Spent, ...]
    flops: float
    peak: float
    calibration: Calibration
    assumptions: tuple[str, ...]

    @property
    def exposed_seconds(self) -> float:
        return sum(one.exposed_seconds for one in self.transfers)

    @property
    def hidden_seconds(self) -> float:
        return sum(one.hidden_seconds for one in self.transfers)

    @property
    def exposed_by_axis(self) -> dict[str, float]:
        """Exposed seconds by mesh axis; a collective over several counts for "a × b"."""
        return self._by_axis("exposed_seconds")

    @property
    def hidden_by_axis(self) -> dict[str, float]:
        return self._by_axis("hidden_seconds")

    @property
    def collective_bytes(self) -> dict[str, float]:
        """By kind."""
        found: dict[str, float] = collections.defaultdict(float)
        for one in self.transfers:
            found[one.kind] += one.num_bytes
        return dict(sorted(found.items()))

    @property
    def hfu(self) -> float:
        """The program's FLOPs over the peak."""
        return self.flops / self.step_seconds / self.peak

    def mfu(self, model_flops: float) -> float:
        """Of `model_flops`: FLOPs of one device in the step without recomputation. Raises ValueError above 1."""
        share = model_flops / self.step_seconds / self.peak
        if share > 1:
            raise ValueError(
                f"a predicted step of {self.step_seconds:.4g} s would be {share:.0%} MFU: {model_flops:.4g} FLOPs "
                "can't be done in it, so that the prediction is wrong; give the FLOPs of one device, not of all"
            )
        return share

    def losing(self, count: int = 5) -> tuple[Spent, ...]:
        """Instructions that lose most against their own floor."""
        return tuple(sorted(self.spent, key=lambda one: one.lost_seconds, reverse=True)[:count])

    def _by_axis(self, field: str) -> dict[str, float]:
        found: dict[str, float] = collections.defaultdict(float)
        for one in self.transfers:
            found[" × ".join(one.axes) or "none"] += getattr(one, field)
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "prediction: nothing ran",
            "step_seconds": self.step_seconds,
            "categories_seconds": dict(self.categories),
            "exposed_seconds_by_axis": self.exposed_by_axis,
            "hidden_seconds_by_axis": self.hidden_by_axis,
            "collective_bytes": self.collective_bytes,
            "transfers": [dataclasses.asdict(one) for one in self.transfers],
            "losing": [dataclasses.asdict(one) | {"lost_seconds": one.lost_seconds} for one in self.losing()],
            "program_flops": self.flops,
            "hfu": self.hfu,
            "calibration": dataclasses.asdict(self.calibration),
            "assumptions": list(self.assumptions),
        }


def predict(
    module: Module,
    *,
    chip: Chip,
    mesh: Mapping[str, int],
    network: Network,
    dtype: str = "bfloat16",
    calibration: Calibration | None = None,
) -> Prediction:
    """Of one device of a program for TPU. `mesh`: sizes by axis, in the mesh's order; `network`: its devices in that
    order. `calibration`: by default the chip generation's own.

    Raises ValueError for a program without estimates (one for a GPU or a CPU), for a mesh of another size than the
    program's, and for a prediction above the chip's peak.
    """
    if math.prod(mesh.values()) != module.num_devices or len(network.places) != module.num_devices:
        raise ValueError(
            f"mesh {dict(mesh)} and a network of {len(network.places)} devices are given for {module.name}, a program "
            f"of {module.num_devices} devices; give those that it was compiled for"
        )
    if all(one.estimated_cycles is None for _, one in module.instructions()):
        raise ValueError(
            f"program {module.name} has no estimated cycles: only TPU's compiler writes them; "
            "compile it for a TPU slice"
        )
    peak = chip.device_peak(dtype)
    if peak is None:
        raise ValueError(f"no dense {dtype} peak is published for {chip.name}; published: {', '.join(chip.peaks)}")
    calibration = calibration_of(chip) if calibration is None else calibration
    walk = _Walk(module, chip, mesh, network, peak, clock_of(chip), calibration.scale)
    seconds = walk.run(module.entry_computation, 1)
    prediction = walk.result(seconds, calibration)
    if prediction.hfu > 1:
        raise ValueError(
            f"program {module.name}: {prediction.flops:.4g} FLOPs in a predicted step of {seconds:.4g} s would be "
            f"{prediction.hfu:.0%} of {chip.name}'s peak: something in its text was not understood"
        )
    return prediction


class _Walk:
    """One pass over the schedule, and what it adds up. Times are of one device; a loop's body is walked once."""

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
        self.module, self.chip, self.mesh, self.network = module, chip, mesh, network
        self.peak, self.second_per_cycle = peak, scale / clock
        self.bandwidth = chip.memory_bandwidth / chip.devices_per_chip
        self.categories: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
        self.spent: dict[str, Spent] = {}
        self.transfers: dict[tuple[str, tuple[str, ...]], Transfer] = {}
        self.waits: list[Wait] = []
        self.notes: collections.Counter[str] = collections.Counter()

    def run(self, scope: Computation, times: int) -> float:
        """Seconds of one run of a computation of which a step does `times`."""
        queue = _Queue()
        for one in scope.instructions:
            self.step(scope, one, times, queue)
        return queue.now

    def step(self, scope: Computation, one: Instruction, times: int, queue: _Queue) -> None:
        if one.opcode == "while":
            queue.now += self.loop(one, times)
        elif one.opcode == "conditional":
            branches = self.module.callees(one, "branch_computations", "true_computation", "false_computation")
            # Each branch is walked for what it adds up; the step takes the longest.
            queue.now += max((self.run(branch, times) for branch in branches), default=0.0)
            self.notes["a conditional takes its longest branch"] += 1
        elif one.opcode == "call":
            queue.now += sum(self.run(callee, times) for callee in self.module.callees(one, "to_apply", "calls"))
        elif one.opcode.endswith("-done"):
            self.finish(one, times, queue)
        elif one.opcode == "fusion" and (kind := self.fused_transfer(one)):
            self.transfer_fusion(scope, one, kind, times, queue)
        elif one.is_collective:
            self.begin(scope, one, collective(self.module, scope, one), times, queue, one.opcode.endswith("-start"))
        elif one.opcode == "async-start" and (found := inner_collectives(self.module, one)):
            self.begin(scope, one, found[0], times, queue, True)
        elif one.opcode in _DMA:
            queue.copy(one.name, self.copied_bytes(one) / self.bandwidth)
        else:
            self.core(scope, one, times, queue)

    def loop(self, one: Instruction, times: int) -> float:
        count = self.module.trip_count(one)
        if count is None:
            self.notes["a loop whose length depends on data is counted as one iteration"] += 1
            count = 1
        return count * sum(self.run(body, times * count) for body in self.module.callees(one, "body"))

    def fused_transfer(self, one: Instruction) -> Literal["start", "done", "inside"] | None:
        """Whether a fusion starts a collective, waits for one, or holds one."""
        inner = [two for callee in self.module.callees(one, "calls") for two in callee.instructions]
        targets = {two.target for two in inner if two.opcode == "custom-call"}
        if "AsyncCollectiveStart" in targets:
            return "start"
        if "AsyncCollectiveDone" in targets:
            return "done"
        return "inside" if inner_collectives(self.module, one) else None

    def transfer_fusion(self, scope: Computation, one: Instruction, kind: str, times: int, queue: _Queue) -> None:
        found = inner_collectives(self.module, one)
        if kind == "start":
            self.begin(scope, one, found[0], times, queue, True)
        elif kind == "done":
            self.wait(str(found[0].channel), times, queue)
        elif all(str(inner.channel) in queue.known for inner in found):
            # It computes while a collective that was started before goes on: the collective is repeated in it.
            self.core(scope, one, times, queue)
        else:
            for inner in found:
                self.begin(scope, one, inner, times, queue, False)

    def begin(
        self, scope: Computation, one: Instruction, found: Collective, times: int, queue: _Queue, is_async: bool
    ) -> None:
        if found.groups is None:
            seconds = self.network.permute_seconds(found.num_bytes, found.pairs)
            group = found.pairs[0] if found.pairs else ()
        else:
            group = max(found.groups, key=len)
            seconds = self.network.seconds(found.kind, found.num_bytes, group)
        axes = axes_of(group, self.mesh)
        lanes = self.network.lanes(group, found.groups is None)
        name = str(found.channel) if found.channel not in (None, 1) else one.name
        queue.begin(name, seconds, lanes)
        queue.known[name] = (found, axes, seconds, is_async)
        if one.name != name:
            queue.known[one.name] = queue.known[name]
            queue.ends[one.name] = queue.ends[name]
        if not is_async:
            self.wait(name, times, queue)

    def wait(self, name: str, times: int, queue: _Queue) -> None:
        found, axes, seconds, is_async = queue.known[name]
        exposed = queue.wait(name)
        self.categories["collectives"] += exposed * times
        transfer = self.transfers.setdefault((found.kind, axes), Transfer(found.kind, axes))
        transfer.count += times
        transfer.num_bytes += found.num_bytes * times
        transfer.exposed_seconds += exposed * times
        transfer.hidden_seconds += max(0.0, seconds - exposed) * times
        self.waits.append(Wait(found, axes, times, seconds * times, exposed * times, is_async))

    def finish(self, one: Instruction, times: int, queue: _Queue) -> None:
        (start, *_) = one.operands
        if start in queue.known:
            self.wait(start, times, queue)
        elif start in queue.ends:
            self.categories["copies"] += queue.wait(start) * times
        # Else it was started outside of this computation, or moves nothing that is priced.

    def copied_bytes(self, one: Instruction) -> int:
        """(source, result, handle) of an asynchronous copy: as much as the smaller one, once on the memory's side."""
        sizes = [array.num_bytes for array in one.results if array.dims]
        return min(sizes, default=0)

    def core(self, scope: Computation, one: Instruction, times: int, queue: _Queue) -> None:
        """An instruction that the core is busy with."""
        target = one.target if one.opcode == "custom-call" else None
        if target in _FREE_CALLS:
            return
        work = flops(self.module, scope, one)
        num_bytes = memory_bytes(self.module, scope, one)
        priced = one.estimated_cycles is not None
        if priced:
            seconds = one.estimated_cycles * self.second_per_cycle
        elif target == "tpu_custom_call":
            work = pallas_flops(scope, one)
            seconds = max(work / self.peak / PALLAS_SHARE, num_bytes / self.bandwidth)
            self.notes[
                f"Pallas kernels are priced by their shapes, at {PALLAS_SHARE:.0%} of the peak (an assumption)"
            ] += 1
        else:
            seconds = max(work / self.peak, num_bytes / self.bandwidth)
        if not (seconds or work):
            return
        queue.now += seconds
        category = categorize(self.module, one)
        self.categories[category] += seconds * times
        floor = max(work / self.peak, num_bytes / self.bandwidth)
        # A name is unique in a program; a computation may be called from two places.
        entry = self.spent.setdefault(
            one.name, Spent(one.name, one.opcode, one.scope, category, 0, 0.0, 0.0, 0.0, 0.0, priced)
        )
        entry.count += times
        entry.seconds += seconds * times
        entry.flops += work * times
        entry.num_bytes += num_bytes * times
        entry.floor_seconds += floor * times

    def result(self, seconds: float, calibration: Calibration) -> Prediction:
        unpriced = sum(one.seconds for one in self.spent.values() if not one.priced)
        notes = [
            "a prediction: nothing ran on a TPU",
            calibration.sentence,
            f"collectives: {self.network.source}; no contention beyond one transfer at a time on each torus axis",
        ]
        if unpriced:
            notes.append(f"{unpriced / seconds:.1%} of the step has no estimate of the compiler: bytes over bandwidth")
        return Prediction(
            step_seconds=seconds,
            categories=self.categories,
            transfers=tuple(self.transfers.values()),
            waits=tuple(self.waits),
            spent=tuple(self.spent.values()),
            flops=sum(one.flops for one in self.spent.values()),
            peak=self.peak,
            calibration=calibration,
            assumptions=(*notes, *self.notes),
        )


class _Queue:
    """Where the core is in one computation, and when what runs beside it ends. Seconds from the computation's begin."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[str, float] = {}
        self.free: dict[str, float] = collections.defaultdict(float)
        self.known: dict[str, tuple[Collective, tuple[str, ...], float, bool]] = {}

    def begin(self, name: str, seconds: float, lanes: tuple[str, ...]) -> None:
        """A transfer goes once all its lanes are free, and holds them."""
        begins = max([self.now, *(self.free[lane] for lane in lanes)])
        self.ends[name] = begins + seconds
        for lane in lanes:
            self.free[lane] = begins + seconds

    def copy(self, name: str, seconds: float) -> None:
        self.begin(name, seconds, ("memory",))

    def wait(self, name: str) -> float:
        """Seconds that the core waits for it."""
        exposed = max(0.0, self.ends[name] - self.now)
        self.now += exposed
        return exposed


def categorize(module: Module, one: Instruction) -> Category:
    """By what it computes and the model's named scopes."""
    if is_attention(one.scope):
        return "attention"
    if has_product(module, one):
        return "matmul"
    if one.opcode in _COPIES or (one.opcode == "fusion" and _only_moves(module, one)):
        return "copies"
    return "elementwise"


def is_attention(scope: str) -> bool:
    """Scores and their product with values, kernel or not: not the projections, which share the layer's scope."""
    parts = [part.strip("()") for part in re.split(r"[/(]", scope)]
    return parts.count("attention") > 1 or "paged_attention" in parts


def _only_moves(module: Module, one: Instruction) -> bool:
    moves = (*_COPIES, "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "compare", "select", "clamp")
    inner = [two for callee in module.callees(one, "calls") for two in callee.instructions]
    # Index arithmetic is on scalars.
    return bool(inner) and all(two.opcode in moves or not any(array.dims for array in two.results) for two in inner)


def pallas_flops(scope: Computation, one: Instruction) -> float:
    """Of a kernel: its own estimate where its author gave one, else attention's, causal, from its operands' shapes.

    Scores, their product with values and, backward, the products of both gradients: 2 forward, 3 for the queries'
    gradient, 4 for the keys' and values'. 0 for another kernel: its bytes price it.
    """
    if match := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes):
        return float(match[1])
    big = [array for operand in scope.operands(one) for array in operand.results if len(array.dims) >= 3]
    if not is_attention(one.scope) or len(big) < 3:
        return 0.0
    query, key = big[0], big[1]
    products = 2 if len(big) == 3 else 3 if len(one.results) == 1 else 4
    # (..., T, H) and (..., S, H): every query meets half of the keys.
    return products * 2 * query.size * key.dims[-2] / 2
