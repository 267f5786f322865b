"""The matmul FLOPs that a JAX program executes, counted in its jaxpr.

The count follows every call, loop and branch, so it cannot drift from the model: it is what the ledger is held
against. It says nothing about kernels whose inside JAX does not see, and raises for those instead of counting zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

KernelFlops = Mapping[str, Callable[[JaxprEqn], int]]

# Their work is not in the jaxpr: without a count from the caller, zero would be a lie.
OPAQUE = frozenset(
    {
        "conv_general_dilated",
        "custom_call",
        "dot_product_attention_bwd",
        "dot_product_attention_bwd_wrapper",
        "dot_product_attention_fwd",
        "dot_product_attention_fwd_wrapper",
        "ffi_call",
        "io_callback",
        "mosaic_gpu",
        "pallas_call",
        "pure_callback",
        "scaled_matmul",
        "scaled_matmul_wrapper",
        "triton_kernel_call",
    }
)
# Primitives that run their one inner jaxpr once.
CALLS = frozenset(
    {
        "checkpoint",
        "closed_call",
        "custom_jvp_call",
        "custom_partitioning",
        "custom_vjp_call",
        "custom_vmap_call",
        "jit",
        "pjit",
        "remat2",
    }
)


@dataclasses.dataclass(frozen=True)
class _Context:
    trip_counts: Mapping[str, int]
    kernel_flops: KernelFlops


def count_matmul_flops(
    program: ClosedJaxpr | Jaxpr | Callable[..., Any],
    *args: Any,
    trip_counts: Mapping[str, int] | None = None,
    kernel_flops: KernelFlops | None = None,
) -> dict[str, Any]:
    """FLOPs of the matmuls that a program executes, over all devices of its shard_maps.

    `program`: a jaxpr, or a function that is traced with `args` (arrays or ShapeDtypeStructs). A contraction is
    2 FLOPs per multiply-add; a product without contracted axes is no matmul. `scan` counts its length, `cond` its
    dearest branch. Equations whose results nobody uses are dropped first, as XLA drops them.

    `trip_counts`: iterations of `while` loops, by the name scope they stand in (the whole stack, or its last part).
    `kernel_flops`: FLOPs of opaque primitives, by primitive name; a `pallas_call` with a cost estimate needs none.

    Returns `total`, `by_primitive` {name: FLOPs}, `by_scope` {name stack: FLOPs}, and `vector_products`: the part of
    `total` in contractions where an operand has no axis of its own (a sum weighted by a vector, which no ledger lists).
    Raises ValueError for a matmul in a `while` of unknown length, and for an opaque primitive without a count.
    """
    if not isinstance(program, ClosedJaxpr | Jaxpr):
        program = jax.make_jaxpr(program)(*args)
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    counts = _count(live, _Context(trip_counts or {}, kernel_flops or {}), scope="")
    by_primitive: Counter[str] = Counter()
    by_scope: Counter[str] = Counter()
    vector_products = 0
    for (primitive, scope, is_vector), flops in counts.items():
        by_primitive[primitive] += flops
        by_scope[scope] += flops
        vector_products += flops if is_vector else 0
    return {
        "total": sum(counts.values()),
        "by_primitive": dict(by_primitive),
        "by_scope": dict(by_scope),
        "vector_products": vector_products,
    }


# Keys: primitive, scope, whether an operand has no axis of its own.
Counts = Counter[tuple[str, str, bool]]


def _count(jaxpr: Jaxpr, context: _Context, scope: str) -> Counts:
    counts: Counts = Counter()
    for eqn in jaxpr.eqns:
        inner = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        counts.update(_count_equation(eqn, context, inner))
    return counts


def _count_equation(eqn: JaxprEqn, context: _Context, scope: str) -> Counts:
    name = eqn.primitive.name
    if name in context.kernel_flops:
        return _one(name, scope, context.kernel_flops[name](eqn))
    if name == "dot_general":
        return _one(name, scope, _dot_general(eqn), is_vector=_has_vector(eqn))
    if name == "ragged_dot_general":
        return _one(name, scope, _ragged_dot(eqn))
    if name == "pallas_call" and eqn.params["cost_estimate"] is not None:
        return _one(name, scope, int(eqn.params["cost_estimate"].flops))
    if name == "scan":
        return _times(_count(_inner(eqn.params["jaxpr"]), context, scope), eqn.params["length"])
    if name == "while":
        return _while(eqn, context, scope)
    if name == "cond":
        return max((_count(_inner(b), context, scope) for b in eqn.params["branches"]), key=lambda c: c.total())
    if name == "shard_map":
        mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        devices = math.prod(mesh.shape[axis] for axis in axes)
        return _times(_count(_inner(eqn.params["jaxpr"]), context, scope), devices)
    if name in OPAQUE:
        raise ValueError(
            f"'{name}' {_where(eqn, scope)} does its work outside the jaxpr; pass kernel_flops={{'{name}': "
            "count_fn}" + (", or give the kernel a cost_estimate" if name == "pallas_call" else "")
        )
    return _call(eqn, context, scope)


def _call(eqn: JaxprEqn, context: _Context, scope: str) -> Counts:
    """Any other primitive: a plain call, or one whose inner jaxprs have no matmuls (reducers, comparators)."""
    counts = [_count(jaxpr, context, scope) for jaxpr in _inner_jaxprs(eqn)]
    name = eqn.primitive.name
    if not any(count.total() for count in counts):
        return Counter()
    if name in CALLS and len(counts) == 1:
        return counts[0]
    raise ValueError(
        f"'{name}' {_where(eqn, scope)} has matmuls in its inner jaxprs and is not known to this count; "
        f"pass kernel_flops={{'{name}': count_fn}}"
    )


def _while(eqn: JaxprEqn, context: _Context, scope: str) -> Counts:
    body = _count(_inner(eqn.params["body_jaxpr"]), context, scope)
    body.update(_count(_inner(eqn.params["cond_jaxpr"]), context, scope))
    if not body.total():
        return body
    for key in (scope, scope.rsplit("/", 1)[-1]):
        if key in context.trip_counts:
            return _times(body, context.trip_counts[key])
    raise ValueError(
        f"'while' {_where(eqn, scope)} runs {body.total()} matmul FLOPs an unknown number of times; "
        f"pass trip_counts={{'{scope}': n}}, under a jax.named_scope if the name is empty"
    )


def _dot_general(eqn: JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    if not contracting:
        return 0
    contracted = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
    return 2 * contracted * math.prod(eqn.outvars[0].aval.shape)


def _ragged_dot(eqn: JaxprEqn) -> int:
    """Every row is in one group: the groups together cost one product over all rows, whatever their sizes."""
    lhs, rhs = (var.aval.shape for var in eqn.invars[:2])
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contracting), (_, rhs_batch) = numbers.dot_dimension_numbers
    own = set(rhs_contracting) | set(rhs_batch) | set(numbers.rhs_group_dimensions)
    rhs_free = math.prod(size for axis, size in enumerate(rhs) if axis not in own)
    return 2 * math.prod(lhs) * rhs_free


def _has_vector(eqn: JaxprEqn) -> bool:
    contracting, batch = eqn.params["dimension_numbers"]
    return any(
        len(var.aval.shape) == len(contracting[side]) + len(batch[side]) for side, var in enumerate(eqn.invars[:2])
    )


def _one(name: str, scope: str, flops: int, *, is_vector: bool = False) -> Counts:
    return Counter({(name, scope, is_vector): flops}) if flops else Counter()


def _times(counts: Counts, factor: int) -> Counts:
    return Counter({key: flops * factor for key, flops in counts.items()})


def _inner(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    # JAX 0.10 closes the jaxprs of most primitives, 0.11 does not.
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield _inner(item)


def _where(eqn: JaxprEqn, scope: str) -> str:
    return f"at {source_info_util.summarize(eqn.source_info)}, scope '{scope}',"
