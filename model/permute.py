"""Tokens to expert-sorted rows and back, with gradients that gather instead of scatter."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.target import Target


class Order(NamedTuple):
    """Assignments (token n, choice a) numbered n·A + a, sorted by expert, earlier tokens first."""

    sorted_M: jax.Array
    """Assignment at each sorted place."""
    place_M: jax.Array
    """Sorted place of each assignment: the inverse of `sorted_M`."""
    group_sizes: jax.Array
    """Assignments per expert, int32 [E]."""


_BLOCK = 256
"""Assignments, or sums, that are compared with each other in one step."""
_MOST_COMPARED = 2**24
"""Assignments times experts, up to which they are counted. On an H100 32,768 for 8 experts take 25 us, sorted 114;
131,072 for 128 take 46 us, sorted 104."""


def sort_by_expert(experts_NA: jax.Array, num_experts: int) -> Order:
    """Order of what experts, all in [0, num_experts), are assigned.

    By counting: an assignment's place is that of the first one of its expert in its block, and how many of that expert
    the block has before it. A sort would be six launches on a GPU, which end what is launched together besides; its
    work doesn't grow with the experts.
    """
    experts_M = experts_NA.reshape(-1)
    counted = experts_M.size * num_experts <= _MOST_COMPARED
    return Order(*(_counted if counted else _sorted)(experts_M, num_experts))


def _sorted(experts_M: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    sorted_M = jnp.argsort(experts_M, stable=True)
    index_M = jnp.arange(sorted_M.size, dtype=sorted_M.dtype)
    place_M = jnp.zeros_like(sorted_M).at[sorted_M].set(index_M, unique_indices=True)
    return sorted_M, place_M, jnp.zeros(num_experts, jnp.int32).at[experts_M].add(1)


def _counted(experts_M: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    M = experts_M.size
    # Padding is no expert's.
    experts_XB = jnp.pad(experts_M, (0, -M % _BLOCK), constant_values=num_experts).reshape(-1, _BLOCK)
    counts_EX = jnp.sum(experts_XB == jnp.arange(num_experts)[:, None, None], axis=2, dtype=jnp.int32)
    first_EX = _sums_before(counts_EX.reshape(-1)).reshape(counts_EX.shape)
    same_XBB = (experts_XB[:, :, None] == experts_XB[:, None, :]) & jnp.tri(_BLOCK, k=-1, dtype=bool)
    within_XB = jnp.sum(same_XBB, axis=2, dtype=jnp.int32)
    place_XB = jnp.take_along_axis(first_EX.T, experts_XB, axis=1, mode="clip") + within_XB
    place_M = place_XB.reshape(-1)[:M]
    index_M = jnp.arange(M, dtype=jnp.int32)
    sorted_M = jnp.zeros_like(index_M).at[place_M].set(index_M, unique_indices=True)
    return sorted_M, place_M, counts_EX.sum(axis=1, dtype=jnp.int32)


def _sums_before(x_L: jax.Array) -> jax.Array:
    """Sum of the elements before each. Written out, since XLA makes as many launches of a cumulative sum as it has
    levels of two."""
    if x_L.size <= 4 * _BLOCK:
        return jnp.sum(jnp.where(jnp.tri(x_L.size, k=-1, dtype=bool), x_L, 0), axis=1, dtype=x_L.dtype)
    x_XB = jnp.pad(x_L, (0, -x_L.size % _BLOCK)).reshape(-1, _BLOCK)
    within_XB = jnp.sum(jnp.where(jnp.tri(_BLOCK, k=-1, dtype=bool), x_XB[:, None], 0), axis=2, dtype=x_L.dtype)
    before_X = _sums_before(x_XB.sum(axis=1, dtype=x_L.dtype))
    return (before_X[:, None] + within_XB).reshape(-1)[: x_L.size]


def expand(x_ND: jax.Array, order: Order, impl: dispatch.Impl = "auto", target: Target | None = None) -> jax.Array:
    """Row of each sorted assignment [M, D]. `target`: device kind; None for the default device."""
    return dispatch.expand(x_ND, order.sorted_M, order.place_M, impl=impl, target=target)


@jax.custom_vjp
def permute(x_MD: jax.Array, index_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """Rows of x in another order; `inverse_M` is the inverse permutation of `index_M`."""
    return x_MD[index_M]


permute.defvjp(
    lambda x_MD, index_M, inverse_M: (x_MD[index_M], inverse_M),
    lambda inverse_M, dy_MD: (dy_MD[inverse_M], None, None),
)


def combine(
    y_MD: jax.Array,
    weights_NA: jax.Array,
    order: Order,
    dtype: jax.typing.DTypeLike = jnp.float32,
    impl: dispatch.Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Weighted sum of each token's rows [N, D], added up in float32."""
    how = {"out_dtype": dtype, "impl": impl, "target": target}
    return dispatch.combine(y_MD, weights_NA, order.sorted_M, order.place_M, **how)
