"""The pages of each row laid end to end."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.paged_attention.quantize import dequantize


def attend_gathered(
    attention: Callable[..., tuple[jax.Array, jax.Array]],
    q_BTNH,
    k_pages_PSKH,
    v_pages_PSKH,
    page_table_BM,
    lengths_B,
    starts_B,
    *,
    k_scale,
    v_scale,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks,
) -> jax.Array:
    """out_BTNH in q's dtype, by an implementation of `kernels.attention`; the other arguments as in
    `kernels.paged_attention.paged_attention`."""
    keys = gather_pages(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B, k_scale, v_scale)
    out, _ = attention(q_BTNH, **keys, scale=scale, causal=True, window=window, soft_cap=soft_cap, sinks=sinks)
    return out


def gather_pages(
    q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B, k_scale, v_scale
) -> dict[str, jax.Array]:
    """Keys and values [B, M·S, K, H] of each row in the order of positions, with the positions and the segments
    (1 where a key counts) that an attention over them takes."""
    B, T = q_BTNH.shape[:2]
    S, K = k_pages_PSKH.shape[1:3]
    width = page_table_BM.shape[1] * S
    sides = ((k_pages_PSKH, k_scale), (v_pages_PSKH, v_scale))
    k_BSKH, v_BSKH = (_taken(*side, page_table_BM, q_BTNH.dtype).reshape(B, width, K, -1) for side in sides)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (B, width))
    counts = positions < lengths_B[:, None]
    # What an earlier owner left in a page has weight 0, and 0 times infinity is NaN: it is taken out of the values.
    v_BSKH = jnp.where(counts[..., None, None], v_BSKH, 0)
    return {
        "k_BSKH": k_BSKH,
        "v_BSKH": v_BSKH,
        "q_positions": starts_B[:, None] + jnp.arange(T, dtype=jnp.int32),
        "kv_positions": positions,
        "q_segments": jnp.ones((B, T), jnp.int32),
        "kv_segments": counts.astype(jnp.int32),
    }


def _taken(pages_PSKH, scale_PKS, page_table_BM, dtype) -> jax.Array:
    """[B, M, S, K, H] in `dtype`, or as the pages are where they have no scales."""
    taken = jnp.take(pages_PSKH, page_table_BM, axis=0, mode="clip")
    if scale_PKS is None:
        return taken
    scale = jnp.take(scale_PKS, page_table_BM, axis=0, mode="clip")
    return dequantize(taken, jnp.swapaxes(scale, -1, -2), dtype)
