"""Tokens to expert-sorted rows and back, with gradients that gather instead of scatter."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """Assignments (token n, choice a) numbered n·A + a, sorted by expert, earlier tokens first."""

    sorted_M: jax.Array
    """Assignment at each sorted place."""
    place_M: jax.Array
    """Sorted place of each assignment: the inverse of `sorted_M`."""
    group_sizes: jax.Array
    """Assignments per expert, int32 [E]."""
    per_token: int


def sort_by_expert(experts_NA: jax.Array, num_experts: int) -> Order:
    experts_M = experts_NA.reshape(-1)
    sorted_M = jnp.argsort(experts_M, stable=True)
    place_M = jnp.zeros_like(sorted_M).at[sorted_M].set(jnp.arange(sorted_M.size, dtype=sorted_M.dtype))
    group_sizes = jnp.zeros(num_experts, jnp.int32).at[experts_M].add(1)
    return Order(sorted_M, place_M, group_sizes, experts_NA.shape[1])


def expand(x_ND: jax.Array, order: Order) -> jax.Array:
    """Row of each sorted assignment [M, D]."""
    return _expand(x_ND, order.sorted_M, order.place_M, order.per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _expand(x_ND: jax.Array, sorted_M: jax.Array, place_M: jax.Array, per_token: int) -> jax.Array:
    return x_ND[sorted_M // per_token]


def _expand_forward(x_ND, sorted_M, place_M, per_token):
    return _expand(x_ND, sorted_M, place_M, per_token), place_M


def _expand_backward(per_token, place_M, dy_MD):
    dy_NAD = dy_MD[place_M].reshape(-1, per_token, dy_MD.shape[-1])
    # fp32: a sum over choices, like any accumulation.
    return dy_NAD.astype(jnp.float32).sum(axis=1).astype(dy_MD.dtype), None, None


_expand.defvjp(_expand_forward, _expand_backward)


@jax.custom_vjp
def permute(x_MD: jax.Array, index_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """Rows of x in another order; `inverse_M` is the inverse permutation of `index_M`."""
    return x_MD[index_M]


permute.defvjp(
    lambda x_MD, index_M, inverse_M: (x_MD[index_M], inverse_M),
    lambda inverse_M, dy_MD: (dy_MD[inverse_M], None, None),
)


def combine(y_MD: jax.Array, weights_NA: jax.Array, order: Order) -> jax.Array:
    """Weighted sum of each token's rows, float32 [N, D]."""
    y_NAD = permute(y_MD, order.place_M, order.sorted_M).reshape(*weights_NA.shape, -1)
    return jnp.sum(y_NAD.astype(jnp.float32) * weights_NA.astype(jnp.float32)[..., None], axis=1)
