"""Which blocks of queries each block of keys walks over in the backward pass on Hopper, and when it may add to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels.attention.masks import Marks

if TYPE_CHECKING:
    from kernels.attention.gpu_backward import _Statics


def padded(array, padding: int, value=0):
    """`array` [B, tokens, ...] with `padding` tokens more."""
    widths = [(0, padding if axis == 1 else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value) if padding else array


def padded_masks(statics: _Statics, masks: Marks) -> Marks:
    """Padded to whole blocks, of no segment and at the last position of its row (for the least and the largest of a
    block). Positions that were not given are the indices, [1, T] and [1, S]."""

    def edge(array, padding):
        return jnp.pad(array, ((0, 0), (0, padding)), mode="edge") if padding else array

    q_padding, kv_padding = statics.query_padding, statics.key_padding
    q_segments, kv_segments, q_positions, kv_positions = masks
    if statics.segments:
        q_segments, kv_segments = padded(q_segments, q_padding), padded(kv_segments, kv_padding)
    if not statics.positions:
        q_positions, kv_positions = jnp.arange(statics.num_queries)[None], jnp.arange(statics.num_keys)[None]
    q_positions, kv_positions = edge(q_positions, q_padding), edge(kv_positions, kv_padding)
    masks = (q_segments, kv_segments, q_positions, kv_positions)
    return Marks(*(None if array is None else array.astype(jnp.int32) for array in masks))


def walks(statics: _Statics, masks: Marks):
    """(visited [B, I], runs, walk and turns as in the kernel's `_Inputs`): I blocks of queries, J of keys. The first
    axis is 1 where the masks are known beforehand.

    A pair of blocks is left out where the bounds of its positions and segments show that nothing is seen.
    """
    num_q, num_k = statics.query_blocks, statics.key_blocks
    (q_low, q_high), (k_low, k_high) = _bounds(masks.q_positions, num_q), _bounds(masks.kv_positions, num_k)
    q_low, q_high, k_low, k_high = q_low[:, None], q_high[:, None], k_low[..., None], k_high[..., None]
    shape = (q_low.shape[0], num_k, num_q)
    some, whole = jnp.ones(shape, bool), jnp.ones(shape, bool)
    if statics.key_padding:
        whole = whole & (jnp.arange(num_k) < num_k - 1)[:, None]
    if statics.causal:
        some, whole = some & (k_low <= q_high), whole & (k_high <= q_low)
    if statics.window is not None:
        some, whole = some & (q_low - k_high < statics.window), whole & (q_high - k_low < statics.window)
        if not statics.causal:
            some, whole = some & (k_low - q_high < statics.window), whole & (k_high - q_low < statics.window)
    if statics.segments:
        meet, same = _segments_meet(masks, num_q, num_k)
        some, whole = some & meet, whole & same
    # The visited ones first, from the last to the first.
    order = -jnp.sort(jnp.where(some, -jnp.arange(num_q), 0), axis=-1)
    before = jnp.cumsum(some, axis=1) - some
    turns = jnp.take_along_axis(before, order, axis=-1)
    runs = _runs(jnp.sum(some, axis=-1), jnp.take_along_axis(whole, order, axis=-1))
    return jnp.any(some, axis=1), *(array.astype(jnp.int32) for array in (runs, order, turns))


def _runs(counts, whole):
    """[B, J, 3]: the first whole run of a walk, from and until where, and the walk's length."""
    index = jnp.arange(whole.shape[-1])
    begin = jnp.min(jnp.where(whole, index, counts[..., None]), axis=-1)
    begin = jnp.minimum(begin, counts)
    rest = ~whole & (index >= begin[..., None])
    end = jnp.min(jnp.where(rest, index, counts[..., None]), axis=-1)
    return jnp.stack([begin, jnp.clip(end, begin, counts), counts], axis=-1)


def _bounds(array, blocks: int):
    """Least and largest of each block, [B, blocks]."""
    array = array.reshape(array.shape[0], blocks, -1)
    return array.min(axis=-1), array.max(axis=-1)


def _segments_meet(masks: Marks, query_blocks: int, key_blocks: int):
    """bool [B, J, I]: whether the ranges of segments of two blocks overlap; whether both are one and the same."""
    sides = ((masks.q_segments, query_blocks), (masks.kv_segments, key_blocks))
    # 0 is padding, which sees nothing and is seen by nothing.
    largest = jnp.iinfo(jnp.int32).max
    lows = [_bounds(jnp.where(array == 0, largest, array), blocks)[0] for array, blocks in sides]
    highs = [_bounds(jnp.where(array == 0, -largest, array), blocks)[1] for array, blocks in sides]
    padded = [jnp.any((array == 0).reshape(array.shape[0], blocks, -1), axis=-1) for array, blocks in sides]
    q_low, q_high, q_padded = (array[:, None] for array in (lows[0], highs[0], padded[0]))
    k_low, k_high, k_padded = (array[..., None] for array in (lows[1], highs[1], padded[1]))
    meet = (q_low <= k_high) & (k_low <= q_high)
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & ~q_padded & ~k_padded
    return meet, same
