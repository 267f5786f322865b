"""Attention in plain JAX over blocks of queries, with a gradient of its own.

Blocks run one after another, so that one block's scores exist at a time, and keys that a whole block can't see (the
future, or before its window) are not multiplied. Kept for the backward pass: the inputs, the output and its
log-sum-exp, from which the weights are computed again (FlashAttention-2, arXiv 2307.08691, section 3.1).

Memory beside arguments and results, compiled for a TPU v5e at T 8192, in units of one block's float32 scores: 1.0
forward, 2.2 backward. XLA's CPU compiler ignores the order, and holds the scores of all blocks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention.masks import Marks


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None


class _Block(NamedTuple):
    """Queries [start, stop) and the keys [low, high) that hold everything they see."""

    start: int
    stop: int
    low: int
    high: int


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
    """(out_BTNH in q's dtype, lse_BTN in float32); arguments as in `kernels.attention.attention`.

    A remat policy may save the named values "attention_out" and "attention_lse" to skip the forward pass's repeat.
    """
    static = _Static(scale, causal, window, soft_cap)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Query heads that share a kv head become a group axis G, so keys and values are never repeated.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    sinks_KG = None if sinks is None else sinks.reshape(K, N // K)
    masks = Marks(q_segments, kv_segments, q_positions, kv_positions)
    out, lse_BKTG = _attention(static, q_BTKGH, k_BSKH, v_BSKH, sinks_KG, masks)
    return out.reshape(B, T, N, v_BSKH.shape[3]), lse_BKTG.transpose(0, 2, 1, 3).reshape(B, T, N)


def block_length(num_queries: int) -> int:
    """Queries per block: 128, more (in steps of 128) where that would unroll over 8 blocks.

    Small blocks skip more of the future, and their scores stay in a CPU's cache: float32, T 512, two busy cores,
    forward + backward 196 ms with blocks of 128 and 298 with 256. More blocks compile longer: the backward pass in
    16 blocks (T 8192) took 74 s for a TPU v5e on the same cores.
    """
    return max(128, -(-num_queries // (8 * 128)) * 128)


def _blocks(static: _Static, num_queries: int, num_keys: int, positions: bool) -> list[_Block]:
    length = block_length(num_queries)
    blocks = []
    for start in range(0, num_queries, length):
        stop, low, high = min(start + length, num_queries), 0, num_keys
        # Positions are data, so which keys lie in the future is known here only when the index is the position.
        if not positions:
            if static.causal:
                high = min(high, stop)
            elif static.window is not None:
                high = min(high, stop + static.window - 1)
            if static.window is not None:
                low = max(0, start - static.window + 1)
        blocks.append(_Block(start, stop, min(low, high), high))
    return blocks


def _seen(static: _Static, masks: Marks, block: _Block) -> jax.Array | None:
    """bool [B or 1, 1, queries, 1, keys] of a block; None where everything is seen."""
    start, stop, low, high = block
    if masks.q_positions is None:
        query = jnp.arange(start, stop)[None, :, None]
        key = jnp.arange(low, high)[None, None, :]
    else:
        query = masks.q_positions[:, start:stop, None]
        key = masks.kv_positions[:, None, low:high]
    conditions = []
    if static.causal:
        conditions.append(key <= query)
    if static.window is not None:
        conditions.append(query - key < static.window)
        if not static.causal:
            conditions.append(key - query < static.window)
    if masks.q_segments is not None:
        segment = masks.q_segments[:, start:stop, None]
        conditions.append((segment == masks.kv_segments[:, None, low:high]) & (segment != 0))
    if not conditions:
        return None
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    return seen[:, None, :, None]


def _scores(static: _Static, masks: Marks, block: _Block, q, k) -> tuple[jax.Array, jax.Array | None]:
    """(scores [B,K,T,G,S] of a block, -inf where unseen; derivative of the soft cap or None).

    In float32 (as the softmax is): bfloat16 keeps 8 bits, so a score of 8 would carry an error of 0.03, which is 3%
    of its weight after exp, and a sum over thousands of keys would stop growing.
    """
    scores = static.scale * jnp.einsum("btkgh,bskh->bktgs", q, k, preferred_element_type=_wide(q))
    slope = None
    if static.soft_cap is not None:
        capped = jnp.tanh(scores / static.soft_cap)
        scores, slope = static.soft_cap * capped, 1 - capped * capped
    seen = _seen(static, masks, block)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf), slope


def _wide(array: jax.Array):
    return jnp.promote_types(array.dtype, jnp.float32)


def _after(array, previous):
    """`array`, but not before `previous`: blocks run one after another, so one block's scores exist at a time."""
    return array if previous is None else jax.lax.optimization_barrier((array, previous))[0]


def _forward(static: _Static, q, k, v, sinks, masks: Marks) -> tuple[jax.Array, jax.Array]:
    outs, lses, previous = [], [], None
    for block in _blocks(static, q.shape[1], k.shape[1], masks.q_positions is not None):
        q_block = _after(q[:, block.start : block.stop], previous)
        out, lse = _forward_block(static, masks, block, q_block, k, v, sinks)
        previous = out
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def _forward_block(static: _Static, masks: Marks, block: _Block, q, k, v, sinks):
    """(out [B,T,K,G,H], lse [B,K,T,G]) of one block of queries."""
    k, v = k[:, block.low : block.high], v[:, block.low : block.high]
    scores, _ = _scores(static, masks, block, q, k)
    largest = jnp.max(scores, axis=-1, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(scores.dtype)[None, :, None]
        largest = jnp.maximum(largest, sinks)
    # A query that sees nothing has -inf here, and -inf - -inf is NaN: any finite shift gives it weights of 0.
    shift = jnp.where(largest == -jnp.inf, 0, largest)
    weights = jnp.exp(scores - shift[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - shift)
    # Dividing after the product touches T·H elements instead of T·S.
    out = jnp.einsum("bktgs,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=_wide(v))
    divisor = jnp.where(total == 0, 1, total).transpose(0, 2, 1, 3)[..., None]
    return (out / divisor).astype(q.dtype), shift + jnp.log(total)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, sinks, masks: Marks):
    return _forward(static, q, k, v, sinks, masks)


def _attention_fwd(static: _Static, q, k, v, sinks, masks: Marks):
    out, lse = _forward(static, q, k, v, sinks, masks)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, sinks, masks, out, lse)


def _attention_bwd(static: _Static, saved, gradients):
    q, k, v, sinks, masks, out, lse = saved
    d_out, d_lse = gradients
    wide = _wide(q)
    # A score's gradient is weight · (d_out·v - d_out·out + d_lse).
    delta = jnp.einsum("btkgh,btkgh->bktg", d_out.astype(wide), out.astype(wide)) - d_lse
    dq, dk, dv, previous = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide), None
    for block in _blocks(static, q.shape[1], k.shape[1], masks.q_positions is not None):
        q_block = _after(q[:, block.start : block.stop], previous)
        dq_block, dk_block, dv_block = _backward_block(static, masks, block, q_block, k, v, d_out, delta, lse)
        dq.append(dq_block)
        dk, dv = _add_keys(dk, dk_block, block), _add_keys(dv, dv_block, block)
        previous = (dq_block, dk, dv)
    d_sinks = None
    if sinks is not None:
        # lse is finite wherever there is a sink.
        weight = jnp.exp(sinks.astype(wide)[None, :, None] - lse)
        d_sinks = -jnp.sum(weight * delta, axis=(0, 2)).astype(sinks.dtype)
    return jnp.concatenate(dq, axis=1), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


def _add_keys(total, part, block: _Block):
    """`total` with `part` added to the block's keys. Not `.at[].add`: a scatter is slower on GPUs, and its compilation
    inside a shard_map crashes XLA's CPU compiler in JAX 0.11.2."""
    kept = jax.lax.slice_in_dim(total, block.low, block.high, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, kept + part, block.low, axis=1)


def _backward_block(static: _Static, masks: Marks, block: _Block, q, k, v, d_out, delta, lse):
    """(dq in q's dtype, dk and dv in float32) of one block of queries."""
    queries, keys = slice(block.start, block.stop), slice(block.low, block.high)
    k, v, d_out, delta, lse = k[:, keys], v[:, keys], d_out[:, queries], delta[:, :, queries], lse[:, :, queries]
    scores, slope = _scores(static, masks, block, q, k)
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
    d_weights = jnp.einsum("btkgh,bskh->bktgs", d_out, v, preferred_element_type=_wide(q))
    d_scores = static.scale * weights * (d_weights - delta[..., None])
    if slope is not None:
        d_scores = d_scores * slope
    d_scores = d_scores.astype(q.dtype)
    dv = jnp.einsum("bktgs,btkgh->bskh", weights.astype(v.dtype), d_out, preferred_element_type=_wide(v))
    dq = jnp.einsum("bktgs,bskh->btkgh", d_scores, k, preferred_element_type=_wide(q))
    dk = jnp.einsum("bktgs,btkgh->bskh", d_scores, q, preferred_element_type=_wide(k))
    return dq.astype(q.dtype), dk, dv


_attention.defvjp(_attention_fwd, _attention_bwd)
