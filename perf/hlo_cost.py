"""FLOPs and bytes of HLO instructions, from their shapes, and the collectives of a module, each once."""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import NamedTuple

from perf.hlo import Array, Computation, Instruction, Module

# Make a view or nothing: no bytes move.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_SLICES = ("dynamic-slice", "slice", "gather")


def flops(module: Module, scope: Computation, instruction: Instruction) -> int:
    """Multiply-adds of matrix products, two FLOPs each, of an instruction and of what it calls once; loops excluded."""
    if instruction.opcode == "convolution":
        return _convolution_flops(scope, instruction)
    if instruction.opcode == "dot":
        return _dot_flops(scope, instruction)
    if _is_cublas(instruction):
        return _cublas_flops(scope, instruction)
    if instruction.opcode in ("fusion", "call", "async-start"):
        callees = module.callees(instruction, "calls", "to_apply")
        return sum(flops(module, callee, one) for callee in callees for one in callee.instructions)
    return 0


def has_product(module: Module, instruction: Instruction) -> bool:
    return (
        instruction.opcode in ("convolution", "dot")
        or _is_cublas(instruction)
        or any(
            has_product(module, one) for callee in module.callees(instruction, "calls") for one in callee.instructions
        )
    )


def _dot_flops(scope: Computation, dot: Instruction) -> int:
    left = scope.operands(dot)[0].results[0]
    contracted = dot.attribute("lhs_contracting_dims") or ""
    depth = math.prod(left.dims[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * dot.results[0].size * depth


def _is_cublas(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and (instruction.target or "").startswith("__cublas")


def _cublas_flops(scope: Computation, call: Instruction) -> int:
    """Of a product that XLA gives to cuBLAS: (product, workspace), the axes in its settings."""
    left = scope.operands(call)[0].results[0]
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    assert contracted is not None, call.name
    depth = math.prod(left.dims[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    return 2 * call.results[0].size * depth


def _convolution_flops(scope: Computation, convolution: Instruction) -> int:
    """TPU's compiler writes every matrix product as a convolution, batch axes as windows that are mostly padding: only
    products with an element of the input count, as in XLA's own cost analysis."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", convolution.attributes)
    assert labels is not None, convolution.name
    image, kernel = (operand.results[0].dims for operand in scope.operands(convolution)[:2])
    output = convolution.results[0].dims
    size = {"image": dict(zip(labels[1], image, strict=True)), "output": dict(zip(labels[3], output, strict=True))}
    features = dict(zip(labels[2], kernel, strict=True))
    window = {
        name: _window(convolution.attributes, name) for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    products = 1
    for axis in range(sum(label.isdigit() for label in labels[1])):
        label = str(axis)
        low = int(window["pad"][axis].split("_")[0]) if window["pad"] else 0
        products *= valid_positions(
            size["image"][label],
            features[label],
            size["output"][label],
            _number(window["stride"], axis),
            low,
            _number(window["lhs_dilate"], axis),
            _number(window["rhs_dilate"], axis),
        )
    return 2 * size["output"]["b"] * size["output"]["f"] * features["i"] * products


def _window(attributes: str, name: str) -> list[str]:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    match = re.search(rf"\b{name}=([\dx_\-]+)", window[1]) if window else None
    return match[1].split("x") if match else []


def _number(values: list[str], axis: int) -> int:
    return int(values[axis]) if values else 1


@functools.lru_cache(maxsize=4096)
def valid_positions(image: int, kernel: int, output: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Pairs of an output and a kernel position that meet an element of the image, not padding or a gap of dilation.

    `low`: padding before the image; `dilate`: of the image; `spread`: of the kernel.
    """
    count, last = 0, (image - 1) * dilate
    for position in range(kernel):
        shift = position * spread - low
        if dilate == 1:
            first = max(0, -(shift // stride))
            final = min(output - 1, (last - shift) // stride)
            count += max(0, final - first + 1)
        else:
            places = (index * stride + shift for index in range(output))
            count += sum(0 <= place <= last and place % dilate == 0 for place in places)
    return count


def memory_bytes(module: Module, scope: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads and writes in the device's main memory.

    What lies in VMEM is free. An operand of which a fusion takes a slice counts as the slice, and a result that is an
    operand updated in place counts as the update.
    """
    if instruction.opcode in _FREE:
        return 0
    operands = scope.operands(instruction)
    if instruction.opcode == "fusion":
        (callee,) = module.callees(instruction, "calls")
        return _fusion_bytes(callee, instruction, operands)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _main(operands[1].results)
    read = _main(instruction.results) if instruction.opcode in _SLICES else sum(_main(one.results) for one in operands)
    return read + _main(instruction.results)


def _main(results: tuple[Array, ...]) -> int:
    return sum(array.num_bytes for array in results if array.memory_space == 0)


def _fusion_bytes(callee: Computation, fusion: Instruction, operands: tuple[Instruction, ...]) -> int:
    users: dict[str, list[Instruction]] = {}
    for one in callee.instructions:
        for name in one.operands:
            users.setdefault(name, []).append(one)
    read = 0
    for parameter in (one for one in callee.instructions if one.opcode == "parameter"):
        operand = operands[int(parameter.literal)]
        if not any(array.memory_space == 0 for array in operand.results):
            continue
        read += _read_bytes(parameter, users, operand)
    return read + _written_bytes(callee, fusion)


def _read_bytes(parameter: Instruction, users: dict[str, list[Instruction]], operand: Instruction) -> int:
    used = users.get(parameter.name, [])
    if used and all(
        one.opcode in (*_SLICES, "dynamic-update-slice") and one.operands[0] == parameter.name for one in used
    ):
        return sum(one.num_bytes for one in used if one.opcode in _SLICES)
    return _main(operand.results)


def _written_bytes(callee: Computation, fusion: Instruction) -> int:
    root = callee.root
    outputs = callee.operands(root) if root.opcode == "tuple" else (root,)
    if len(outputs) != len(fusion.results):
        return _main(fusion.results)
    written = 0
    for output, array in zip(outputs, fusion.results, strict=True):
        if array.memory_space != 0 or output.opcode == "parameter":
            continue
        if output.opcode == "dynamic-update-slice":
            written += callee.operands(output)[1].num_bytes
        else:
            written += array.num_bytes
    return written


class Collective(NamedTuple):
    """One collective of a program. `num_bytes`: of the group's whole array for all-gather and reduce-scatter, of each
    device's for the others. `shapes`: results. `groups`: None for a permute, which has `pairs`."""

    name: str
    kind: str
    num_bytes: int
    shapes: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...] | None
    pairs: tuple[tuple[int, int], ...]
    channel: int | None
    scope: str
    one_ring: bool
    """TPU's compiler names its algorithm: one ring through all devices, instead of all torus axes at once."""

    @property
    def group_size(self) -> int | None:
        return None if self.groups is None else len(self.groups[0])


def collective(module: Module, scope: Computation, instruction: Instruction) -> Collective:
    """Of a collective instruction, or its start."""
    assert instruction.is_collective, instruction.opcode
    kind, results = instruction.kind, instruction.results
    if kind == "all-reduce" and scope.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # (operands, results, handles): the results come after the operands.
        given = len(list(itertools.chain.from_iterable(one.results for one in scope.operands(instruction))))
        results = results[given : 2 * given]
    num_bytes = sum(array.num_bytes for array in results)
    if instruction.kind == "reduce-scatter":
        num_bytes = scope.operand_bytes(instruction)
    groups = None if instruction.kind == "collective-permute" else instruction.groups(module.num_devices)
    return Collective(
        instruction.name,
        kind,
        num_bytes,
        results,
        groups,
        instruction.pairs,
        instruction.channel,
        instruction.scope,
        _one_ring(instruction),
    )


def _one_ring(instruction: Instruction) -> bool:
    emitter, strategy = instruction.attribute("emitter"), instruction.attribute("strategy")
    return (emitter or "").startswith("1D") or strategy in ("StrategyRing", "UniDirection1DRingStrategy")


def inner_collectives(module: Module, instruction: Instruction) -> tuple[Collective, ...]:
    """Collectives in the computations that a fusion or an async-start calls."""
    outer = _one_ring(instruction)
    return tuple(
        found._replace(one_ring=found.one_ring or outer)
        for callee in module.callees(instruction, "calls", "called_computations")
        for one in callee.instructions
        for found in (
            (collective(module, callee, one),)
            if one.is_collective and not one.opcode.endswith(("-done", "-update"))
            else inner_collectives(module, one)
        )
    )


def collectives(module: Module) -> list[Collective]:
    """Collectives of a program, each once, a loop's body once.

    TPU's compiler repeats an asynchronous collective in every fusion that it overlaps with, under one channel (only
    channel 1 is shared, by whatever `shard_map` asks for); and it writes a reduce-scatter as a fusion
    `all-reduce-scatter...` around an all-reduce.
    """
    found: dict[int | str, Collective] = {}
    for scope, instruction in module.instructions():
        if instruction.is_collective and not instruction.opcode.endswith(("-done", "-update")):
            one = collective(module, scope, instruction)
            found.setdefault(one.name if one.channel in (None, 1) else one.channel, one)
    return list(found.values())
