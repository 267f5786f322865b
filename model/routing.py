"""What a router takes over the experts of a token: scores, the best of them, and shares.

Of few experts it is written out, one [B, T] after another. XLA ends a launch at each reduction, and sorts for a
`top_k`; a chain of elementwise steps it joins to what is around, forward and back.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_FEW = 16
"""Experts, up to which it is written out: the steps of a choice are as many for each token that is chosen."""


def softmax(x_BTE: jax.Array) -> jax.Array:
    if not _few(x_BTE):
        return jax.nn.softmax(x_BTE, axis=-1)
    _, parts, total_BT = _exponentials(x_BTE)
    return jnp.stack([part_BT / total_BT for part_BT in parts], axis=-1)


def log_sum(x_BTE: jax.Array) -> jax.Array:
    """Logarithm of the sum of exponentials [B, T]."""
    if not _few(x_BTE):
        return jax.nn.logsumexp(x_BTE, axis=-1)
    most_BT, _, total_BT = _exponentials(x_BTE)
    return most_BT + jnp.log(total_BT)


def _exponentials(x_BTE: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """(the largest, exp(x - the largest) of each expert, their sum)."""
    most_BT = functools.reduce(jnp.maximum, _columns(jax.lax.stop_gradient(x_BTE)))
    parts = [jnp.exp(x_BT - most_BT) for x_BT in _columns(x_BTE)]
    return most_BT, parts, functools.reduce(jnp.add, parts)


def shares(x_BTE: jax.Array) -> jax.Array:
    """x over its sum; what is all zeros stays so."""
    if not _few(x_BTE):
        return x_BTE / (x_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    parts = _columns(x_BTE)
    total_BT = functools.reduce(jnp.add, parts) + 1e-20
    return jnp.stack([part_BT / total_BT for part_BT in parts], axis=-1)


def top(x_BTE: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest, int32 [B, T, A]: the largest first, and of equal ones the first one."""
    if not _few(x_BTE):
        return jax.lax.top_k(x_BTE, count)[1]
    left, chosen = _columns(x_BTE), []
    for _ in range(count):
        best_BT, index_BT = left[0], jnp.zeros(x_BTE.shape[:-1], jnp.int32)
        for i, x_BT in enumerate(left[1:], 1):
            better_BT = x_BT > best_BT
            best_BT, index_BT = jnp.where(better_BT, x_BT, best_BT), jnp.where(better_BT, i, index_BT)
        chosen.append(index_BT)
        left = [jnp.where(index_BT == i, -jnp.inf, x_BT) for i, x_BT in enumerate(left)]
    return jnp.stack(chosen, axis=-1)


def pick(x_BTE: jax.Array, index_BTA: jax.Array) -> jax.Array:
    """x at each index [B, T, A]."""
    if not _few(x_BTE):
        return jnp.take_along_axis(x_BTE, index_BTA, axis=-1)
    columns, picked = _columns(x_BTE), []
    for index_BT in _columns(index_BTA):
        found = [jnp.where(index_BT == i, x_BT, 0) for i, x_BT in enumerate(columns)]
        picked.append(functools.reduce(jnp.add, found))
    return jnp.stack(picked, axis=-1)


def _few(x_BTE: jax.Array) -> bool:
    return x_BTE.shape[-1] <= _FEW


def _columns(x_BTE: jax.Array) -> list[jax.Array]:
    return [x_BTE[..., i] for i in range(x_BTE.shape[-1])]
