"""The softmax of a row put together from the softmaxes of its parts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

MOST_TERMS = 16
"""Parts whose sum is written out; XLA takes a minute to compile one of 33."""


def combine_parts(out_XBKRH: jax.Array, lse_XBKR: jax.Array, sinks_KR: jax.Array | None) -> jax.Array:
    """float32 [B, K, R, H] from each part's normalised output and the base-2 log of its normaliser (-inf where empty).

    A sink (a natural-log logit for each query) joins the normaliser and carries no value. Sums over X parts are written
    out term by term, and weights belong to elements of the output from the start, though those of a query share them:
    so XLA makes one launch of all of it for 2 to 16 parts. Reductions would make three, weights of queries two.
    """
    num_parts = out_XBKRH.shape[0]
    if num_parts > MOST_TERMS:
        return _reduced(out_XBKRH, lse_XBKR, sinks_KR)
    lse = [jnp.broadcast_to(lse_XBKR[x][..., None], out_XBKRH.shape[1:]) for x in range(num_parts)]
    if sinks_KR is not None:
        sinks_KR = sinks_KR.astype(jnp.float32) * math.log2(math.e)
        lse.append(jnp.broadcast_to(sinks_KR[..., None], out_XBKRH.shape[1:]))
    highest = functools.reduce(jnp.maximum, lse)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights = [jnp.exp2(one - highest) for one in lse]
    total = functools.reduce(jnp.add, weights)
    out = functools.reduce(jnp.add, [weights[x] * out_XBKRH[x] for x in range(num_parts)])
    return out / jnp.where(total == 0, 1, total)


def _reduced(out_XBKRH: jax.Array, lse_XBKR: jax.Array, sinks_KR: jax.Array | None) -> jax.Array:
    """The same by reductions."""
    highest = jnp.max(lse_XBKR, axis=0)
    if sinks_KR is not None:
        sinks_KR = sinks_KR.astype(jnp.float32) * math.log2(math.e)
        highest = jnp.maximum(highest, sinks_KR)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights_XBKR = jnp.exp2(lse_XBKR - highest)
    total = jnp.sum(weights_XBKR, axis=0) + (0 if sinks_KR is None else jnp.exp2(sinks_KR - highest))
    out = jnp.sum(weights_XBKR[..., None] * out_XBKRH, axis=0)
    return out / jnp.where(total == 0, 1, total)[..., None]
