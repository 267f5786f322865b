"""What kind of work an op on a device's timeline is: from its HLO instruction where the program's text is at hand, else
from the names that compilers and libraries give their kernels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

from perf.hlo import COLLECTIVES, Computation, Instruction, Module
from perf.schedule import is_attention

Kind = Literal["matmul", "attention", "elementwise", "copy", "other", "collective"]

KINDS: tuple[Kind, ...] = ("matmul", "attention", "elementwise", "other", "copy", "collective")
"""Where two run at one moment on one device, the moment is the first one's in this order."""

# Scopes and names of well-known kernels, beside those of this tree.
_ATTENTION_SCOPE = re.compile(r"\b(paged_prefill|flash_attention|splash|sdpa|fmha)")
_ATTENTION_KERNEL = re.compile(
    # The last two are parts of cuDNN's backward pass.
    r"sdpa|fmha|flash|splash|attention|paged_prefill|mha_|compute_dot_do_o|convert_dq_to",
    re.IGNORECASE,
)
_MATMUL_KERNEL = re.compile(
    r"gemm|nvjet|cutlass|xmma|cublas|wgmma|dot_general|^dot\b|^dot[._]|_dot(_fusion|[._]|$)|^dot_|convolution|ragged.dot|"
    r"grouped_matmul|^ynn_fusion|matmul|custom-call.*gemm",
    re.IGNORECASE,
)
_COLLECTIVE_KERNEL = re.compile(
    r"nccl|rccl|^(" + "|".join(COLLECTIVES) + r")\b|all-reduce-scatter|async-collective|^(send|recv)(-done)?\b|"
    r"^(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute)",
    re.IGNORECASE,
)
_COPY_OPCODES = (
    *("copy", "bitcast", "bitcast-convert", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice"),
    *("concatenate", "pad", "broadcast", "async-start", "async-done", "slice-start", "slice-done", "gather", "reverse"),
)
_COPY_KERNEL = re.compile(
    r"^(memcpy|memset|wrapped_(copy|slice|concatenate|transpose|broadcast)|copy|transpose|slice|dynamic-slice|"
    r"dynamic_slice|dynamic-update-slice|dynamic_update_slice|dynamic_memcpy|concatenate|bitcast_copy|"
    r"(copy_|bitcast_|slice_|transpose_)+fusion)",
    re.IGNORECASE,
)
_ELEMENTWISE_KERNEL = re.compile(
    r"fusion|^(add|multiply|subtract|divide|maximum|minimum|select|compare|convert|exponential|exp|log|tanh|rsqrt|sqrt|"
    r"reduce|power|negate|iota|clamp|and|or|not|map|wrapped_)",
    re.IGNORECASE,
)
_MATMUL_OPCODES = ("dot", "convolution", "ragged-dot")
_NO_WORK = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")


@dataclasses.dataclass(frozen=True)
class OpFacts:
    """One instruction of a program, as far as its kind goes. `scope`: JAX's name of it, without transformations."""

    kind: Kind
    scope: str
    opcode: str


def program_ops(*modules: Module) -> Ops:
    """Facts of every instruction of programs, by its name, which is unique in one."""
    return Ops(
        {
            one.name: OpFacts(_kind(module, one), plain_scope(one.scope), one.opcode)
            for module in modules
            for _, one in module.instructions()
        }
    )


def plain_scope(scope: str) -> str:
    """jit(step)/transpose(jvp(attention))/attention/dot_general is step/attention/attention/dot_general."""
    return re.sub(r"//+", "/", re.sub(r"\w+\(|\)", "", scope))


def fused(module: Module, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """The instructions that a fusion or call is made of, those of nested ones too; nothing for any other."""
    for computation in module.callees(instruction, "calls", "called_computations"):
        for one in computation.instructions:
            yield computation, one
            yield from fused(module, one)


def _kind(module: Module, one: Instruction) -> Kind:
    if one.is_collective or one.kind in ("send", "recv") or _COLLECTIVE_KERNEL.search(one.name):
        return "collective"
    inside = [inner for _, inner in fused(module, one)]
    opcodes = {inner.opcode for inner in inside}
    targets = {inner.target for inner in inside if inner.opcode == "custom-call"}
    if targets & {"AsyncCollectiveStart", "AsyncCollectiveDone"}:
        return "collective"
    has_product = one.opcode in _MATMUL_OPCODES or bool(opcodes & set(_MATMUL_OPCODES))
    # TPU's compiler repeats a collective that is under way in the products that hide it.
    if not has_product and any(inner.is_collective for inner in inside):
        return "collective"
    target = one.target or ""
    if is_attention(one.scope) or _ATTENTION_SCOPE.search(one.scope) or _ATTENTION_KERNEL.search(target):
        return "attention"
    if has_product or _MATMUL_KERNEL.search(target):
        return "matmul"
    if one.opcode == "custom-call":
        # A Pallas kernel's target says nothing; its scope may.
        return "matmul" if _MATMUL_KERNEL.search(one.scope) else "other"
    if one.kind in _COPY_OPCODES or (opcodes and opcodes <= {*_COPY_OPCODES, *_NO_WORK}):
        return "copy"
    if one.opcode in ("while", "conditional", "call", "sort", "scatter", "rng-bit-generator", "infeed", "outfeed"):
        return "other"
    return "elementwise"


class Ops(Mapping[str, OpFacts]):
    """Facts by instruction, and by the name that its kernel has on a GPU: loop_add_fusion.3 is loop_add_fusion_3."""

    def __init__(self, facts: Mapping[str, OpFacts]) -> None:
        self._facts = facts
        self._kernels = {re.sub(r"[.\-]", "_", name): one for name, one in facts.items()}

    def __getitem__(self, name: str) -> OpFacts:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def of(self, kernel: str, op: str | None) -> OpFacts | None:
        """Of an event on a device's timeline; None for one that the programs have no instruction for."""
        return self._facts.get(op_name(kernel, op)) or self._kernels.get(kernel)


NO_OPS = Ops({})


def op_name(kernel: str, op: str | None) -> str:
    """What an event is called: the instruction that it says it is of, else its kernel. Kernels that a GPU starts
    together say that they are of the command buffer, which is no instruction."""
    return kernel if op is None or op.startswith("command_buffer") else op


def kernel_kind(kernel: str, op: str | None, facts: OpFacts | None) -> Kind:
    """Of an event on a device's timeline: `kernel` is its name there, `op` the HLO instruction that it says it is of,
    `facts` what the program's text says of that instruction."""
    if facts is not None:
        # One instruction may be several kernels: a product's library call also converts and transposes.
        return facts.kind
    name = op_name(kernel, op)
    for text in (name, kernel):
        for pattern, kind in _BY_NAME:
            if pattern.search(text):
                return kind
    return "elementwise" if _ELEMENTWISE_KERNEL.search(name) else "other"


_BY_NAME: tuple[tuple[re.Pattern, Kind], ...] = (
    (_COLLECTIVE_KERNEL, "collective"),
    (_ATTENTION_KERNEL, "attention"),
    (_MATMUL_KERNEL, "matmul"),
    (_COPY_KERNEL, "copy"),
)
