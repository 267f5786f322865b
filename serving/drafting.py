"""Drafts without a model: what followed the last time the text read like this (prompt lookup)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ngram_drafts(
    tokens_BW: jax.Array, length_B: jax.Array, k: int, *, max_ngram: int = 3, min_ngram: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Propose k tokens after each row's text: drafts int32 [B, k], and how many of them count, int32 [B] (0 or k).

    Of the suffixes of `max_ngram` down to `min_ngram` tokens, the longest one that occurs earlier in the text is taken,
    at its most recent earlier occurrence, and what followed that is proposed. Where this reaches the end of the text it
    goes on with its own proposal, so a text that repeats itself is continued with its period. `tokens_BW` holds a row's
    tokens from position 0, and anything beyond `length_B`. Reads the history max_ngram times, in the order of B x W.
    """
    assert 1 <= min_ngram <= max_ngram, (min_ngram, max_ngram)
    batch, width = tokens_BW.shape
    index_W = jnp.arange(width)
    # `end` is where an earlier occurrence ends: before the last token.
    matches_BW = index_W < length_B[:, None] - 1
    end_B = jnp.full(batch, -1)
    for back in range(max_ngram):
        suffix_B1 = jnp.take_along_axis(tokens_BW, jnp.maximum(length_B - 1 - back, 0)[:, None], axis=1)
        shifted_BW = jnp.pad(tokens_BW, ((0, 0), (back, 0)))[:, :width]
        matches_BW = matches_BW & (index_W >= back) & (shifted_BW == suffix_B1)
        if back + 1 >= min_ngram:
            latest_B = jnp.max(jnp.where(matches_BW, index_W, -1), axis=1)
            end_B = jnp.where(latest_B >= 0, latest_B, end_B)
    period_B = jnp.maximum(length_B - 1 - end_B, 1)
    from_BK = end_B[:, None] + 1 + jnp.arange(k) % period_B[:, None]
    drafts_BK = jnp.take_along_axis(tokens_BW, jnp.minimum(from_BK, width - 1), axis=1)
    return drafts_BK, jnp.where(end_B >= 0, k, 0).astype(jnp.int32)
