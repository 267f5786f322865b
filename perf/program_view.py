"""A compiled program as the findings look at it: who uses what, which collectives and products there are, what they
cost."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from perf.findings import Cost, Evidence, Trial
from perf.hlo import Array, Computation, Instruction, Module
from perf.hlo_cost import flops
from perf.schedule import is_attention

# A view of its operand, or the same values moved.
_PASSES = ("get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose")
# A smaller collective costs its latency, whatever kind it is.
LARGE = 2**20
# A product that reaches less of what the program's other products do is slow.
SLOW_PRODUCT = 0.75

NO_TIMES = "the program was neither traced nor compiled for a TPU slice: its ops have no times"


@dataclasses.dataclass(frozen=True)
class Place:
    """An instruction, where it stands, and how often a step runs it (None: in a loop whose length can't be read)."""

    scope: Computation
    instruction: Instruction
    times: int | None


class View:
    """Of one program; made once per examination."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def users(self, scope: Computation, name: str) -> list[Instruction]:
        if scope.name not in self._users:
            found: dict[str, list[Instruction]] = collections.defaultdict(list)
            for one in scope.instructions:
                for operand in one.operands:
                    found[operand].append(one)
            self._users[scope.name] = found
        return self._users[scope.name].get(name, [])

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """Instructions that run by themselves: those of the entry, of loops' bodies, branches and calls; not what a
        fusion is made of."""
        return tuple(self._walk(self.module.entry_computation, 1))

    def _walk(self, scope: Computation, times: int | None) -> Iterator[Place]:
        for one in scope.instructions:
            yield Place(scope, one, times)
            if one.opcode == "while":
                trips = self.module.trip_count(one)
                inner = None if trips is None or times is None else trips * times
                for body in self.module.callees(one, "body"):
                    yield from self._walk(body, inner)
            elif one.opcode in ("conditional", "call"):
                roles = ("branch_computations", "true_computation", "false_computation", "to_apply", "calls")
                for callee in self.module.callees(one, *roles):
                    yield from self._walk(callee, times)

    def in_loop(self, place: Place) -> bool:
        return place.times != 1 or place.scope.name != self.module.entry

    def is_sliced_only(self, scope: Computation, one: Instruction) -> bool:
        """Whether all that is done with the result is to take slices of it, each device its own."""
        users = self.users(scope, one.name)
        return bool(users) and all(self._slices(scope, one.name, user) for user in users)

    def _slices(self, scope: Computation, name: str, user: Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == name
        if user.opcode in _PASSES:
            return self.is_sliced_only(scope, user)
        if user.opcode != "fusion":
            return False
        (callee,) = self.module.callees(user, "calls")
        numbers = {str(number) for number, operand in enumerate(user.operands) if operand == name}
        parameters = [one for one in callee.instructions if one.opcode == "parameter" and one.literal in numbers]
        return all(self.is_sliced_only(callee, parameter) for parameter in parameters)

    def makers(self, scope: Computation, one: Instruction) -> set[str]:
        """Opcodes that make the first operand: of its fusion, if it is one."""
        if not one.operands or one.operands[0] not in scope.by_name:
            return set()
        maker = scope.by_name[one.operands[0]]
        if maker.opcode in _PASSES:
            return self.makers(scope, maker)
        if maker.opcode == "fusion":
            return {inner.opcode for callee in self.module.callees(maker, "calls") for inner in callee.instructions}
        return {maker.opcode}

    def products(self) -> Iterator[tuple[Place, Instruction, Computation]]:
        """(where it runs, the product itself, the computation that has it): fusions that hold a product, and products
        that stand alone. Not attention's, which are small, many and slower than a layer's."""
        for place in self.places:
            if is_attention(place.instruction.scope):
                continue
            found = list(self._products(place.scope, place.instruction))
            for scope, product in found:
                yield place, product, scope

    def _products(self, scope: Computation, one: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        if one.opcode in ("dot", "convolution"):
            yield scope, one
        elif one.opcode == "fusion":
            for callee in self.module.callees(one, "calls"):
                for inner in callee.instructions:
                    yield from self._products(callee, inner)

    def flops(self, place: Place) -> int:
        return flops(self.module, place.scope, place.instruction) * (place.times or 1)


def cost_of(evidence: Evidence, view: View, place: Place) -> Cost | None:
    """What it took, with the wait at its done where it is asynchronous. None where nothing was timed; nothing where
    others were and it wasn't."""
    if evidence.costs is None:
        return None
    one = place.instruction
    names = [one.name]
    if one.opcode.endswith("-start"):
        names += [user.name for user in view.users(place.scope, one.name) if user.opcode.endswith("-done")]
    found = [evidence.costs[name] for name in names if name in evidence.costs]
    return Cost(sum(cost.nanoseconds for cost in found), sum(cost.exposed for cost in found))


def total_cost(evidence: Evidence, view: View, places: list[Place]) -> Cost | None:
    costs = [cost_of(evidence, view, place) for place in places]
    if any(cost is None for cost in costs):
        return None
    return Cost(sum(cost.nanoseconds for cost in costs if cost), sum(cost.exposed for cost in costs if cost))


def largest(places: list[Place], count: int = 3) -> tuple[str, ...]:
    """Lines of evidence."""
    ordered = sorted(places, key=lambda place: -place.instruction.num_bytes * (place.times or 1))
    return tuple(describe(place) for place in ordered[:count])


def by_scope(evidence: Evidence) -> list[tuple[str, float, int]]:
    """(scope, exposed nanoseconds, ops) of the ops of a program that cost something, longest first: the layers of an
    unrolled program together. An op without a scope stands under its own name."""
    assert evidence.program is not None and evidence.costs is not None
    scopes = {one.name: one.scope for _, one in evidence.program.instructions()}
    spent: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for name, cost in evidence.costs.items():
        if cost.exposed:
            key = scopes.get(name) or name
            spent[key] += cost.exposed
            counts[key] += 1
    return [(scope, time, counts[scope]) for scope, time in spent.most_common()]


def describe(place: Place) -> str:
    one = place.instruction
    shapes = ", ".join(shape(array) for array in one.results[:2]) + (", ..." if len(one.results) > 2 else "")
    times = "" if place.times in (1, None) else f" × {place.times}"
    where = f" of {one.scope.rpartition('/')[0][-60:] or one.scope}" if one.scope else ""
    return f"{one.name}: {one.opcode} {shapes}{times}{where}"


def shape(array: Array) -> str:
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"


def arrays_of(place: Place, dims: Mapping[tuple[int, ...], str]) -> str | None:
    """Name of the array whose dimensions a result has, without axes of 1; None if it has none's."""
    for array in place.instruction.results:
        plain = tuple(size for size in array.dims if size > 1)
        if plain in dims:
            return dims[plain]
    return None


def rate_of(evidence: Evidence, view: View, places: Sequence[Place]) -> float | None:
    """FLOP/s of ops together, None where they have no times."""
    cost = total_cost(evidence, view, list(places))
    work = sum(view.flops(place) for place in places)
    return work / cost.nanoseconds * 1e9 if cost is not None and cost.nanoseconds and work else None


def is_small(evidence: Evidence, milliseconds: float | None) -> bool:
    """Whether it is not worth a change."""
    return (
        milliseconds is not None
        and evidence.step_ns is not None
        and milliseconds * 1e6 < evidence.worth * evidence.step_ns
    )


def option_trial(option: str) -> Trial:
    return Trial((("xla_options", option),), f"--xla-options {option}")
