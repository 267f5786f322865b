"""Scores of a block of keys and a tile of queries on a TPU core, and how their operands lie in memory.

Scores are [keys, queries]. A query's maximum and sum then lie along the lanes, as rows: the sums over keys are sums of
whole registers, and nothing is transposed or spread over lanes. Counted in the compiler's schedule (bundles of a step
of 512 x 512, 2 heads of 128, JAX 0.11.2), against scores [queries, keys]: v5e 3,106 for 3,801, v5p 3,049 for 3,877,
v6e 2,325 for 2,999, tpu7x 1,993 for 2,937.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from kernels.attention.masks import Marks, Masks
from kernels.attention.tpu_steps import code_of, inner
from kernels.attention.tpu_tiles import LANES, AllTiles, Tiles

# Of a hidden key: its weight is 0 whatever the maximum, which is never below _LEAST.
_HIDDEN = -1e30
LEAST = -5e29
# Segment 0 sees nothing, itself neither: among queries it becomes a number that no segment of keys has.
_NO_SEGMENT = -(2**31)


@dataclasses.dataclass(frozen=True)
class Statics:
    """What is fixed when a kernel is traced. `share` query heads read one kv head."""

    masks: Masks
    share: int
    key_dim: int
    value_dim: int
    scale: float
    soft_cap: float | None
    tiles: AllTiles
    interpret: bool
    exact: bool
    """Of float32 inputs: exponents to the base e. To the base 2 a weight takes one product less, the scale's and the
    base's being one, and the error of a rounded log2(e) more, which is nothing beside that of bfloat16 weights."""

    @property
    def unit(self) -> float:
        """Scores and log-sum-exps are kept times this."""
        return 1.0 if self.exact else math.log2(math.e)

    def power(self, exponent):
        return jnp.exp(exponent) if self.exact else jnp.exp2(exponent)


class Scores(NamedTuple):
    """`exponent` float32 [keys, queries]: scores times `unit`. `slope`: derivative of the soft cap, or None."""

    exponent: jax.Array
    slope: jax.Array | None


def product(a, b, *, over: tuple[int, int]) -> jax.Array:
    """float32 sums of products of two matrices over an axis of each; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scores_of(statics: Statics, q, k, seen) -> Scores:
    """Of q [queries, H] and k [keys, H]; `seen` bool [keys, queries], or None."""
    raw, slope = product(k, q, over=(1, 1)), None
    if statics.soft_cap is None:
        exponent = raw * (statics.scale * statics.unit)
    else:
        capped = jnp.tanh(raw * (statics.scale / statics.soft_cap))
        exponent, slope = capped * (statics.soft_cap * statics.unit), 1 - capped * capped
    return Scores(exponent if seen is None else jnp.where(seen, exponent, _HIDDEN), slope)


def seen_by(masks: Masks, tiles: Tiles, tile, block, marks: Marks):
    """bool [keys, queries] of a pair, None where the mask hides nothing; `marks` are references to rows [1, ...]."""
    shape = (tiles.keys, tiles.queries)
    conditions = []
    if masks.num_keys % tiles.keys:
        conditions.append(lax.broadcasted_iota(jnp.int32, shape, 0) < masks.num_keys - block * tiles.keys)
    if masks.segments:
        conditions.append(marks.q_segments[...] == _column(marks.kv_segments))
    if masks.causal or masks.window is not None:
        if masks.positions:
            distance = marks.q_positions[...] - _column(marks.kv_positions)
        else:
            distance = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
            distance = distance + (tile * tiles.queries - block * tiles.keys)
        if masks.causal:
            conditions.append(distance >= 0)
        if masks.window is not None:
            conditions.append(distance < masks.window)
            if not masks.causal:
                conditions.append(distance > -masks.window)
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return seen


def _column(row_ref):
    """[keys, 1] of a reference to [1, keys]. Whole registers are transposed, since Mosaic transposes nothing less."""
    return jnp.broadcast_to(row_ref[...], (LANES, row_ref.shape[1])).T[:, :1]


def padded(array, axis: int, size: int):
    """`array`, an axis filled up with zeros to a multiple of `size`."""
    if array is None or array.shape[axis] % size == 0:
        return array
    return jnp.pad(array, [(0, -array.shape[axis] % size if i == axis else 0) for i in range(array.ndim)])


def laid_out_queries(array_BTNH, tiles: Tiles):
    """[B, N / heads, heads, T, H], T in whole tiles."""
    array = padded(array_BTNH, 1, tiles.queries).transpose(0, 2, 1, 3)
    return array.reshape(array.shape[0], -1, tiles.heads, *array.shape[2:])


def laid_out_rows(array_BTN, tiles: Tiles):
    """[B, N / heads, heads, 1, T] of a number for each query and head."""
    array = array_BTN.transpose(0, 2, 1)
    return array.reshape(array.shape[0], -1, tiles.heads, 1, array.shape[2])


def laid_out_marks(marks: Marks, tiles: Tiles) -> Marks:
    """[B, 1, T] and [B, 1, S], in whole tiles and blocks."""
    q_segments = marks.q_segments
    if q_segments is not None:
        q_segments = jnp.where(q_segments == 0, _NO_SEGMENT, q_segments)
    lengths = (tiles.queries, tiles.keys, tiles.queries, tiles.keys)
    arrays = (q_segments, *marks[1:])
    return Marks(*(None if a is None else padded(a, 1, n)[:, None] for a, n in zip(arrays, lengths, strict=True)))


class Specs:
    """Block specs over a grid whose first two axes are rows of the batch and heads. `place(b, h, *rest, outer, codes)`
    gives (program of query heads, kv head, tile of queries, block of keys)."""

    def __init__(self, tiles: Tiles, place):
        self._tiles, self._place = tiles, place

    def _spec(self, shape, index):
        return pl.BlockSpec(shape, lambda b, *grid: index(b, *self._place(b, *grid)))

    def queries(self, width: int):
        """[heads, queries, width] of `laid_out_queries`."""
        shape = (None, None, self._tiles.heads, self._tiles.queries, width)
        return self._spec(shape, lambda b, program, head, tile, block: (b, program, 0, tile, 0))

    def queries_across(self, width: int):
        """[heads, width, queries]; a width of 1 for rows."""
        shape = (None, None, self._tiles.heads, width, self._tiles.queries)
        return self._spec(shape, lambda b, program, head, tile, block: (b, program, 0, 0, tile))

    def keys(self, width: int):
        """[keys, width] of an array [B, K, S, width]."""
        shape = (None, None, self._tiles.keys, width)
        return self._spec(shape, lambda b, program, head, tile, block: (b, head, block, 0))

    def keys_across(self, width: int):
        """[width, keys] of an array [B, K, width, S]."""
        shape = (None, None, width, self._tiles.keys)
        return self._spec(shape, lambda b, program, head, tile, block: (b, head, 0, block))

    def marks(self, marks: Marks) -> Marks:
        q = self._spec((None, 1, self._tiles.queries), lambda b, program, head, tile, block: (b, 0, tile))
        k = self._spec((None, 1, self._tiles.keys), lambda b, program, head, tile, block: (b, 0, block))
        return Marks(*(None if a is None else s for a, s in zip(marks, (q, k, q, k), strict=True)))


def place_by_queries(statics: Statics, tiles: Tiles, number: int):
    """For a grid (batch, programs of heads, steps), steps by tiles of queries."""

    def place(b, program, step, outer, codes):
        return program, program * tiles.heads // statics.share, outer[step], inner(code_of(number, codes, b, step))

    return place
