"""The softmax of a row put together from the softmaxes of its parts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def combine_parts(out_XBKRH: jax.Array, lse_XBKR: jax.Array, sinks_KR: jax.Array | None) -> jax.Array:
    """float32 [B, K, R, H] from each part's normalised output and the base-2 log of its normaliser (-inf where empty).

    A sink (a natural-log logit for each query) joins the normaliser and carries no value. The sum over X parts is
    written out term by term, so that XLA makes one kernel of all of it; reductions would make three.
    """
    num_parts = out_XBKRH.shape[0]
    lse = [lse_XBKR[x] for x in range(num_parts)]
    if sinks_KR is not None:
        lse.append(jnp.broadcast_to(sinks_KR.astype(jnp.float32) * math.log2(math.e), lse[0].shape))
    highest = lse[0]
    for one in lse[1:]:
        highest = jnp.maximum(highest, one)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weights = [jnp.exp2(one - highest) for one in lse]
    total = sum(weights[1:], start=weights[0])
    total = jnp.where(total == 0, 1, total)
    terms = [(weights[x] / total)[..., None] * out_XBKRH[x] for x in range(num_parts)]
    return sum(terms[1:], start=terms[0])
