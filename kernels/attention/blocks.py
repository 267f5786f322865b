"""Which blocks of keys a tile of queries needs, and in which of them every query of it sees every key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.masks import Masks


class Extent(NamedTuple):
    """Blocks [first, end) hold all that is seen, and [full_first, full_end) of them need no mask."""

    first: jax.Array
    end: jax.Array
    full_first: jax.Array
    full_end: jax.Array


def extent_by_index(masks: Masks, block: int, low, high) -> Extent:
    """Of queries low..high, where their indices and those of the keys are their positions; int32 scalars."""
    top, bottom = jnp.int32(masks.num_keys), jnp.int32(0)
    full_top, full_bottom = top, bottom
    high = jnp.minimum(high, masks.num_queries - 1)
    low = jnp.minimum(low, masks.num_queries - 1)
    if masks.causal:
        top, full_top = jnp.minimum(top, high + 1), jnp.minimum(top, low + 1)
    elif masks.window is not None:
        top, full_top = jnp.minimum(top, high + masks.window), jnp.minimum(top, low + masks.window)
    if masks.window is not None:
        bottom = jnp.maximum(low - (masks.window - 1), 0)
        full_bottom = jnp.maximum(high - (masks.window - 1), 0)
    first, end = _floor(bottom, block), _floor(top + (block - 1), block)
    return Extent(first, jnp.maximum(first, end), _floor(full_bottom + (block - 1), block), _floor(full_top, block))


def _floor(x, divisor: int):
    return lax.div(x, jnp.int32(divisor))


def extents_by_data(masks: Masks, rows: int, block: int, q_segments, kv_segments, q_positions, kv_positions):
    """int32 [B, tiles, 4], an `Extent` of each tile of `rows` queries; arguments [B, T] and [B, S], or None.

    Whether a tile and a block can meet is judged by the least and greatest segment and position of each. All blocks
    from the first that can to the last are computed, and of those that need no mask the first run is taken as such.
    """
    visible = full = jnp.ones((1, -(-masks.num_queries // rows), -(-masks.num_keys // block)), bool)
    if masks.segments:
        query, key = _Range.of(q_segments, rows, q_segments != 0), _Range.of(kv_segments, block, kv_segments != 0)
        query, key = query.rows(), key.columns()
        visible &= (query.least <= key.greatest) & (key.least <= query.greatest)
        one = (query.least == key.greatest) & (key.least == query.greatest)
        full &= one & query.all & key.all
    if q_positions is None:
        q_positions = jnp.arange(masks.num_queries, dtype=jnp.int32)[None]
        kv_positions = jnp.arange(masks.num_keys, dtype=jnp.int32)[None]
    query, key = _Range.of(q_positions, rows).rows(), _Range.of(kv_positions, block).columns()
    # Keys past the last are none, and need a mask; queries past the last may see what they like.
    full &= (jnp.arange(full.shape[-1]) + 1) * block <= masks.num_keys
    if masks.causal:
        visible &= key.least <= query.greatest
        full &= key.greatest <= query.least
    if masks.window is not None:
        visible &= query.least - key.greatest < masks.window
        full &= query.greatest - key.least < masks.window
        if not masks.causal:
            visible &= key.least - query.greatest < masks.window
            full &= key.greatest - query.least < masks.window
    first, end = _run(visible, whole=True)
    return jnp.stack([first, end, *_run(full & visible, whole=False)], axis=-1).astype(jnp.int32)


class _Range(NamedTuple):
    """Least and greatest of the values that count in each piece of a row, and whether all of them do."""

    least: jax.Array
    greatest: jax.Array
    all: jax.Array

    @classmethod
    def of(cls, values, size: int, counts=None) -> _Range:
        counts = jnp.ones(values.shape, bool) if counts is None else counts
        info = jnp.iinfo(jnp.int32)

        def pieces(array, fill):
            padded = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size)), constant_values=fill)
            return padded.reshape(len(array), -1, size)

        least = pieces(jnp.where(counts, values, info.max), info.max).min(-1)
        greatest = pieces(jnp.where(counts, values, info.min), info.min).max(-1)
        return cls(least, greatest, pieces(counts, True).all(-1))

    def rows(self) -> _Range:
        return _Range(*(x[:, :, None] for x in self))

    def columns(self) -> _Range:
        return _Range(*(x[:, None, :] for x in self))


def _run(chosen, whole: bool):
    """First of the chosen of the last axis, and the one past the last (past the first run, where not `whole`)."""
    index = jnp.arange(chosen.shape[-1])
    first = jnp.argmax(chosen, axis=-1)
    if whole:
        return first, jnp.max(jnp.where(chosen, index + 1, 0), axis=-1)
    stops = jnp.where(~chosen & (index >= first[..., None]), index, chosen.shape[-1])
    end = jnp.where(chosen.any(-1), jnp.min(stops, axis=-1), first)
    return first, end
