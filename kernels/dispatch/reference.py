"""Tokens' rows to sorted places and back in XLA's own steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expand(x_ND: jax.Array, sorted_M: jax.Array, per_token: int) -> jax.Array:
    """Row of each sorted assignment [M, D]."""
    return x_ND[sorted_M // per_token]


def expand_gradient(dy_MD: jax.Array, place_M: jax.Array, per_token: int) -> jax.Array:
    """Of x [N, D]: the sum of a token's rows."""
    dy_NAD = dy_MD[place_M].reshape(place_M.size // per_token, per_token, dy_MD.shape[-1])
    # fp32: a sum over choices, like any accumulation.
    return dy_NAD.astype(jnp.float32).sum(axis=1).astype(dy_MD.dtype)


def combine(y_MD: jax.Array, weights_NA: jax.Array, place_M: jax.Array) -> jax.Array:
    """Weighted sum of each token's rows, float32 [N, D]."""
    y_NAD = y_MD[place_M].reshape(*weights_NA.shape, y_MD.shape[-1])
    return jnp.sum(y_NAD.astype(jnp.float32) * weights_NA.astype(jnp.float32)[..., None], axis=1)


def combine_gradients(dy_ND, y_MD, weights_NA, sorted_M, place_M) -> tuple[jax.Array, jax.Array]:
    """(dy_rows [M, D], dweights [N, A]) of `combine`; a gradient of rows gathers."""
    wide_NAD = dy_ND.astype(jnp.float32)[:, None]
    y_NAD = y_MD[place_M].reshape(*weights_NA.shape, y_MD.shape[-1])
    d_weights_NA = jnp.sum(wide_NAD * y_NAD.astype(jnp.float32), axis=-1)
    dy_NAD = (wide_NAD * weights_NA.astype(jnp.float32)[..., None]).astype(y_MD.dtype)
    return dy_NAD.reshape(y_MD.shape)[sorted_M], d_weights_NA.astype(weights_NA.dtype)
