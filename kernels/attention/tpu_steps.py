"""Which pairs of a tile of queries and a block of keys the TPU kernels visit, in what order, and what each one needs.

A TPU core walks a grid one step after another, and reads a table of the steps from scalar memory: the copies of the
next step begin while one is computed. Pairs that the indices alone rule out are not in the table. Those that segments
or positions rule out are, since the length of a grid is static, but nothing is computed or copied for them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.masks import Marks, Masks

# What a step computes.
SKIPPED, MASKED, FULL = 0, 1, 2
_FIRST, _LAST, _INNER = 2, 3, 4


class Steps(NamedTuple):
    """`outer` int32 [steps]: the tile (or block) whose result a step adds to. `codes` int32 [rows · steps], of one row
    for the whole batch or one for each: what a step computes, whether it is the first and the last of its outer one,
    and the inner block (or tile) that it reads, which a skipped step repeats."""

    outer: jax.Array
    codes: jax.Array

    @property
    def number(self) -> int:
        return self.outer.shape[0]

    def code(self, row, step):
        return code_of(self.number, self.codes, row, step)


def code_of(number: int, codes, row, step):
    """The step's code of a row of the batch; `codes` an array or a reference to one."""
    return codes[step if codes.shape[0] == number else row * number + step]


def kind(code):
    return code & 3


def is_first(code):
    return (code >> _FIRST) & 1 == 1


def is_last(code):
    return (code >> _LAST) & 1 == 1


def inner(code):
    return code >> _INNER


def steps_of(masks: Masks, queries: int, keys: int, outer: Literal["queries", "keys"], marks: Marks) -> Steps:
    """Steps over tiles of `queries` and blocks of `keys`; all of one `outer` follow each other."""
    visible, full = pairs_by_index(masks, queries, keys)
    tiles, blocks = _pairs(visible, outer)
    outers, inners = (tiles, blocks) if outer == "queries" else (blocks, tiles)
    changes = outers[1:] != outers[:-1]
    flags = np.concatenate([[True], changes]) << _FIRST | np.concatenate([changes, [True]]) << _LAST
    if masks.by_data:
        visible, full = _pairs_by_data(masks, queries, keys, marks, visible, full)
    else:
        visible, full = jnp.asarray(visible)[None], jnp.asarray(full)[None]
    kinds = jnp.where(visible, jnp.where(full, FULL, MASKED), SKIPPED)[:, tiles, blocks]
    index = jnp.arange(len(outers), dtype=jnp.int32)
    read = jnp.asarray(inners, jnp.int32)[jax.lax.cummax(jnp.where(kinds == SKIPPED, 0, index), axis=1)]
    codes = (read << _INNER) | jnp.asarray(flags, jnp.int32) | kinds
    return Steps(jnp.asarray(outers, jnp.int32), codes.astype(jnp.int32).reshape(-1))


def count(masks: Masks, queries: int, keys: int) -> int:
    """The greater number of steps of the two orders."""
    visible, _ = pairs_by_index(masks, queries, keys)
    return int(visible.sum() + max((~visible.any(axis)).sum() for axis in (0, 1)))


def _pairs(visible: np.ndarray, outer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tiles and blocks of the steps. An outer one that sees nothing keeps a step, which writes its zeros."""
    visible = (visible if outer == "queries" else visible.T).copy()
    visible[~visible.any(axis=1), 0] = True
    first, second = np.nonzero(visible)
    return (first, second) if outer == "queries" else (second, first)


def pairs_by_index(masks: Masks, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """bool [tiles, blocks], as far as shapes and indices tell: whether some query of a tile sees some key of a block,
    and whether all see all."""
    tiles, blocks = -(-masks.num_queries // queries), -(-masks.num_keys // keys)
    low, first = np.arange(tiles)[:, None] * queries, np.arange(blocks)[None] * keys
    high, last = low + queries - 1, first + keys - 1
    visible = np.ones((tiles, blocks), bool)
    full = visible & (last < masks.num_keys)
    if masks.positions:
        return visible, full
    if masks.causal:
        visible &= first <= np.minimum(high, masks.num_queries - 1)
        full &= last <= low
    if masks.window is not None:
        visible &= low - np.minimum(last, masks.num_keys - 1) < masks.window
        full &= high - first < masks.window
        if not masks.causal:
            visible &= first - np.minimum(high, masks.num_queries - 1) < masks.window
            full &= last - low < masks.window
    return visible, full


def _pairs_by_data(masks: Masks, queries: int, keys: int, marks: Marks, visible, full):
    """The same, bool [B, tiles, blocks], judged by the least and greatest segment and position of each piece."""
    visible, full = jnp.asarray(visible)[None], jnp.asarray(full)[None]
    if masks.segments:
        low, high, rows_whole = _range(marks.q_segments, queries, marks.q_segments != 0)
        first, last, keys_whole = _range(marks.kv_segments, keys, marks.kv_segments != 0)
        low, high, rows_whole = low[:, :, None], high[:, :, None], rows_whole[:, :, None]
        first, last, keys_whole = first[:, None], last[:, None], keys_whole[:, None]
        visible = visible & (low <= last) & (first <= high)
        full = full & (low == last) & (first == high) & rows_whole & keys_whole
    if masks.positions:
        low, high, _ = (x[:, :, None] for x in _range(marks.q_positions, queries))
        first, last, _ = (x[:, None] for x in _range(marks.kv_positions, keys))
        if masks.causal:
            visible, full = visible & (first <= high), full & (last <= low)
        if masks.window is not None:
            visible, full = visible & (low - last < masks.window), full & (high - first < masks.window)
            if not masks.causal:
                visible, full = visible & (first - high < masks.window), full & (last - low < masks.window)
    return visible, full & visible


def _range(values, size: int, counts=None):
    """Least and greatest of the values that count in each piece [B, pieces], and whether all of them do. Of a piece
    without any, the greatest is below the least."""
    counts = jnp.ones(values.shape, bool) if counts is None else counts
    # Half of int32's range, so that differences of them fit.
    bound = 2**30

    def pieces(array, fill):
        padded = jnp.pad(array, ((0, 0), (0, -array.shape[1] % size)), constant_values=fill)
        return padded.reshape(len(array), -1, size)

    least = pieces(jnp.where(counts, values, bound), bound).min(-1)
    greatest = pieces(jnp.where(counts, values, -bound), -bound).max(-1)
    return least, greatest, pieces(counts, True).all(-1)
