"""Attention as its definition, with the whole [T, S] array of scores: what every implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    q_segments,
    kv_segments,
    q_positions,
    kv_positions,
    soft_cap: float | None,
    sinks,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in q's dtype, lse_BTN in float32 or wider); arguments as in `kernels.attention.attention`."""
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q, k, v = (array.astype(wide) for array in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (jnp.repeat(array, N // K, axis=2) for array in (k, v))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = visible(B, T, S, causal, window, q_segments, kv_segments, q_positions, kv_positions)[:, None]
    largest = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(wide)[None, :, None, None]
        largest = jnp.maximum(largest, sinks)
    # The shift cancels, so it takes no gradient; a query that sees nothing has no largest score to shift by.
    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - largest, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, v, precision="highest")
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(total))[..., 0]
    return out.astype(q_BTNH.dtype), lse.transpose(0, 2, 1)


def visible(B, T, S, causal, window, q_segments, kv_segments, q_positions, kv_positions) -> jax.Array:
    """bool [B, T, S]: whether a query sees a key."""
    if q_positions is None:
        q_positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        kv_positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    seen = jnp.ones((B, T, S), bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= jnp.abs(distance) < window
    if q_segments is not None:
        seen &= (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return seen
