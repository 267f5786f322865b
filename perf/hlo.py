"""Optimised HLO text, as `jax.stages.Compiled.as_text()` gives it, read into computations and instructions.

Text of TPU's, GPU's and XLA's CPU compiler alike; only TPU's carries estimated cycles. Instructions stand in the order
in which the compiler scheduled them. What the text doesn't say is None.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from perf.replica_groups import replica_groups

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# What the compiler writes for an instruction that it has no estimate of: the largest 64-bit integer.
_UNPRICED = 2**63 - 1

# Width of an element in bits; pred is stored in a byte.
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=? ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations|"
    r"async_execution_thread_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%?([\w.\-]+)")


class Array(NamedTuple):
    """One array of a result. `memory_space`: 0 is the device's main memory, 1 VMEM on TPU, 5 the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Without the padding of its layout."""
        return (self.size * bits(self.dtype) + 7) // 8


def bits(dtype: str) -> int:
    """Of one element of an HLO dtype: f32, bf16, f8e4m3fn, s4, pred, ..."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    if match is None:
        raise ValueError(f"HLO dtype {dtype!r} has no known width")
    return int(match[1])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`operands` are names in the same computation; `attributes` is the text after them, as it stands."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    literal: str
    """Text between the parentheses: the value of a constant, the number of a parameter."""

    @property
    def num_bytes(self) -> int:
        """Of all results."""
        return sum(array.num_bytes for array in self.results)

    @property
    def kind(self) -> str:
        """The opcode without -start or -done: the collective, copy or send that an asynchronous pair does."""
        return re.sub(r"-(start|done|update)$", "", self.opcode)

    @property
    def is_collective(self) -> bool:
        return self.kind in COLLECTIVES

    @functools.cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Computations by role: calls, to_apply, body, condition, branch_computations, ..."""
        found: dict[str, tuple[str, ...]] = {}
        for role, names in _CALLED.findall(self.attributes):
            found.setdefault(role, tuple(_NAME.findall(names)))
        return found

    def attribute(self, name: str) -> str | None:
        """Value of a simple attribute: a word, a number, a quoted string or a list in braces without braces in it."""
        match = re.search(
            rf'(?:^|[\s,{{"])"?{re.escape(name)}"?[=:](?:"([^"]*)"|\{{([^{{}}]*)\}}|([^\s,{{}}]+))', self.attributes
        )
        return None if match is None else next(group for group in match.groups() if group is not None)

    @property
    def channel(self) -> int | None:
        value = self.attribute("channel_id")
        return None if value is None else int(value)

    @property
    def scope(self) -> str:
        """JAX's name of the operation it comes from, with its named scopes: jit(step)/layers/mlp/dot_general."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    @property
    def source(self) -> str | None:
        """file:line, where the text has it (newer texts number stack frames instead)."""
        file, line = self.attribute("source_file"), self.attribute("source_line")
        return None if file is None else f"{file}:{line}"

    @property
    def target(self) -> str | None:
        """Of a custom call: its name, tpu_custom_call for a Pallas kernel."""
        return self.attribute("custom_call_target")

    @functools.cached_property
    def estimated_cycles(self) -> int | None:
        """Cycles of the core's clock that TPU's cost model expects; None where it has no estimate."""
        match = re.search(r'"estimated_cycles":"?(\d+)"?', self.attributes)
        cycles = int(match[1]) if match else _UNPRICED
        return None if cycles == _UNPRICED else cycles

    def groups(self, num_devices: int) -> tuple[tuple[int, ...], ...] | None:
        """Partitions that take part together, each group in order; None where the attribute is missing.

        Partition i is the i-th device of the mesh, row-major. `num_devices` is what an empty list stands for.
        """
        return replica_groups(self.attributes, num_devices)

    @functools.cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, target) partitions of a permute."""
        match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", self.attributes)
        found = re.findall(r"\{(\d+),(\d+)\}", match[1]) if match else []
        return tuple((int(source), int(target)) for source, target in found)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((one for one in self.instructions if one.is_root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Instructions that make its operands."""
        return tuple(self.by_name[name] for name in instruction.operands)

    def operand_bytes(self, instruction: Instruction) -> int:
        return sum(operand.num_bytes for operand in self.operands(instruction))


@dataclasses.dataclass(frozen=True)
class Module:
    name: str
    computations: Mapping[str, Computation]
    entry: str
    num_devices: int
    """Partitions times replicas."""

    @property
    def entry_computation(self) -> Computation:
        return self.computations[self.entry]

    def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
        """Of all computations, in the order of the text."""
        for computation in self.computations.values():
            for instruction in computation.instructions:
                yield computation, instruction

    def callees(self, instruction: Instruction, *roles: str) -> tuple[Computation, ...]:
        """Computations that it calls, of the given roles or of all."""
        names = itertools.chain.from_iterable(
            names for role, names in instruction.called.items() if not roles or role in roles
        )
        return tuple(self.computations[name] for name in names if name in self.computations)

    def trip_count(self, loop: Instruction) -> int | None:
        """Iterations of a while, None where they depend on data or can't be read.

        TPU's text doesn't say them: the condition is `counter < constant`, and the counter starts at a constant and is
        raised by one (by two in the loops of a windowed einsum).
        """
        assert loop.opcode == "while", loop.name
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if match:
            return int(match[1])
        (condition,), (body,) = self.callees(loop, "condition"), self.callees(loop, "body")
        counters = [one.attribute("index") for one in condition.instructions if one.opcode == "get-tuple-element"]
        limit = self._limit(condition)
        if limit is None or len(counters) != 1:
            return None
        start = self._element(self._loops[loop.name], loop.operands[0], int(counters[0] or 0))
        raised = self._element(body, body.root.name, int(counters[0] or 0))
        step = None if raised is None else self._added(body, raised)
        if start is None or _scalar(start) is None or not step:
            return None
        return max(-(-(limit - (_scalar(start) or 0)) // step), 0)

    @functools.cached_property
    def _loops(self) -> Mapping[str, Computation]:
        """Where each while stands."""
        return {one.name: scope for scope, one in self.instructions() if one.opcode == "while"}

    def _limit(self, condition: Computation) -> int | None:
        inside = [one for scope in self._reached(condition) for one in scope.instructions]
        compares = [one for one in inside if one.opcode == "compare"]
        if len(compares) != 1 or compares[0].attribute("direction") != "LT":
            return None
        limits = [_scalar(one) for one in inside if _scalar(one) is not None]
        return limits[0] if len(limits) == 1 else None

    def _element(self, scope: Computation, name: str, index: int) -> Instruction | None:
        """What a tuple's element is made by, copies left out."""
        whole = scope.by_name[name]
        return _origin(scope, scope.by_name[whole.operands[index]]) if whole.opcode == "tuple" else None

    def _added(self, scope: Computation, one: Instruction) -> int | None:
        """The constant that an addition adds, in a fusion or not."""
        if one.opcode == "fusion":
            (callee,) = self.callees(one, "calls")
            given = scope.operands(one)
            root = _origin(callee, callee.root)
            parts = [_origin(callee, part) for part in callee.operands(root)] if root.opcode == "add" else []
            parts = [_origin(scope, given[int(part.literal)]) if part.opcode == "parameter" else part for part in parts]
        else:
            parts = [_origin(scope, part) for part in scope.operands(one)] if one.opcode == "add" else []
        constants = [_scalar(part) for part in parts if _scalar(part) is not None]
        return constants[0] if len(constants) == 1 else None

    def _reached(self, computation: Computation) -> list[Computation]:
        found = [computation]
        for one in computation.instructions:
            for callee in self.callees(one):
                found.extend(self._reached(callee))
        return found


def _origin(scope: Computation, one: Instruction) -> Instruction:
    """Through copies and views."""
    while one.opcode in ("copy", "bitcast", "copy-done", "copy-start") and one.operands:
        one = scope.by_name[one.operands[0]]
    return one


def _scalar(one: Instruction) -> int | None:
    """Value of a whole constant without dimensions."""
    is_whole = one.opcode == "constant" and one.results and not one.results[0].dims
    return int(one.literal) if is_whole and re.fullmatch(r"-?\d+", one.literal) else None


def parse(text: str) -> Module:
    """Raises ValueError for text that is not an HLO module, or one that ends within a computation."""
    header = text[: text.find("\n")]
    match = re.match(r"HloModule ([^\s,]+)", header)
    if match is None:
        raise ValueError(f"not HLO text: it begins with {header[:60]!r} where 'HloModule NAME' is required")
    partitions, replicas = (_count(header, word) for word in ("num_partitions", "replica_count"))
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, name, lines in _blocks(text.splitlines()[1:]):
        computations[name] = Computation(name, tuple(map(_instruction, lines)))
        if is_entry:
            entry = name
    if entry is None:
        raise ValueError(f"HLO module {match[1]} has no ENTRY computation: the text is truncated or not a whole module")
    return Module(match[1], computations, entry, partitions * replicas)


def _count(header: str, word: str) -> int:
    match = re.search(rf"{word}=(\d+)", header)
    return int(match[1]) if match else 1


def _blocks(lines: Sequence[str]) -> Iterator[tuple[bool, str, list[str]]]:
    """(is it the entry, name, instructions) of each computation. A Pallas call's metadata has line breaks, and lines
    that begin with braces: only a brace that stands alone, outside of an open string or brace, ends a computation."""
    name, is_entry, found = None, False, []
    for line in lines:
        if name is None:
            if header := _HEADER.match(line):
                is_entry, name, found = bool(header[1]), header[2], []
        elif line == "}" and (not found or _is_closed(found[-1])):
            yield is_entry, name, found
            name = None
        elif _START.match(line):
            found.append(line)
        elif found:
            found[-1] += "\n" + line
    if name is not None:
        raise ValueError(f"HLO text ends within computation {name}: it is truncated")


def _is_closed(text: str) -> bool:
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    return '"' not in bare and bare.count("{") == bare.count("}")


def _instruction(text: str) -> Instruction:
    start = _START.match(text)
    assert start is not None
    position = start.end()
    end = _closing(text, position) + 1 if text[position] == "(" else text.index(" ", position)
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inner = text[opening + 1 : closing]
    opcode = text[end:opening].strip()
    literal = opcode in ("constant", "parameter")
    return Instruction(
        name=start[2],
        opcode=opcode,
        results=tuple(arrays(text[position:end])),
        operands=() if literal else _operands(inner),
        attributes=text[closing + 1 :],
        is_root=start[1] is not None,
        literal=inner if literal else "",
    )


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, opening):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"HLO instruction without its closing parenthesis: {text[:80].strip()!r}")


def _operands(inner: str) -> tuple[str, ...]:
    named = re.findall(r"%([\w.\-]+)", inner)
    return tuple(named) if named or not inner else tuple(re.findall(r"([\w.\-]+)(?:,|$)", inner))


def arrays(result: str) -> Iterator[Array]:
    """Of a result's type, tuples flattened."""
    for dtype, dims, layout in _ARRAY.findall(result):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Array(dtype, sizes, int(space[1]) if space else 0)
