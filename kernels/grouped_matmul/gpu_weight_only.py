"""The grouped product with weights of few bits on Hopper: only groups that have rows are read, and widened on the way.

What a block of threads does with its rows and columns is as in `kernels.quantized_matmul.weight_only`. Here its rows
are a stretch of one group's, and which one it finds itself, from the group sizes: they are data. There are as many
blocks of threads as any sizes need, and those that no stretch is left for end at once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.grouped_matmul import gpu_weight_only_many
from kernels.grouped_matmul.persistent import aligned, rows_from, store_rows, tiles_of
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT
from kernels.grouped_matmul.weight_only_tiles import ManyTiles, choose_tiles, max_visits
from kernels.quantized_matmul import weight_only
from kernels.quantized_matmul.weight_only import Inputs, Shared, Statics
from kernels.quantized_matmul.weight_only_tiles import TILE, Tiles
from quantization.qarray import QArray

# Group sizes that are read at a time, so that not each one waits for the one before.
_SIZES = 16


class _Visit(NamedTuple):
    """Rows of one block of threads, int32 each: their group (the number of groups for rows of none), the first of them,
    and which of those are the group's: [begin, end) of all rows. No rows at all where `begin` is `end`."""

    group: jax.Array
    row: jax.Array
    begin: jax.Array
    end: jax.Array


def product(x: jax.Array, w: QArray, group_sizes: jax.Array, out_dtype) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N] in fragments, as `quantized.quantized_grouped_matmul` has it."""
    from kernels.grouped_matmul.quantized import case_of

    return tiled_product(
        x, w, group_sizes, out_dtype=jnp.dtype(out_dtype), tiles=choose_tiles(case_of(x, w, out_dtype))
    )


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "tiles", "interpret"))
def tiled_product(x, w: QArray, group_sizes, *, out_dtype, tiles: Tiles | ManyTiles, interpret=None) -> jax.Array:
    """As `product`, with its tiles. `interpret`: parameters of Pallas's interpreter, which tests give."""
    (M, K), (E, _, N) = x.shape, w.shape
    group = None if w.scales.shape[1] == 1 and w.zero_points is None else w.block[1]
    assert group is None or tiles.depth % group == 0, f"groups of {group} in buffers of {tiles.depth}"
    if M > ROW_ALIGNMENT:
        # Copies divide the rows into eights; of fewer than eight they fill up the rest with zeros themselves.
        x = jnp.pad(x, ((0, -M % ROW_ALIGNMENT), (0, 0))) if M % ROW_ALIGNMENT else x
    statics = Statics((M, N, K), x.dtype, w.dtype, out_dtype, group, w.zero_points is not None, False, tiles)
    inputs = Inputs(x, w.values.reshape(E, N // TILE, -1, 256), w.scales, w.zero_points, None)
    sizes = group_sizes.astype(jnp.int32)
    if isinstance(tiles, ManyTiles):
        return gpu_weight_only_many.product(statics, inputs, sizes, tiles, interpret)
    assert tiles.num_parts == 1, "parts of sums have rows of their own"
    return weight_only.call(
        functools.partial(_body, statics, E, M),
        statics,
        inputs,
        (sizes,),
        jax.ShapeDtypeStruct((M, N), out_dtype),
        name="grouped_matmul_weight_only",
        # The last axis runs fastest: a group's columns are in L2 when its next rows want them.
        grid={"column": N // tiles.columns, "visit": max_visits(M, E, tiles.rows)},
        interpret=interpret,
    )


def _body(statics: Statics, num_groups: int, num_rows: int, inputs: Inputs, sizes_ref, out_ref, shared: Shared) -> None:
    column, number = lax.axis_index("column"), lax.axis_index("visit")
    visit = _visit(number, sizes_ref, num_groups, num_rows, statics.tiles.rows)
    of_none = visit.group == num_groups
    columns = pl.ds(column * statics.tiles.columns, statics.tiles.columns)

    def store():
        first = jnp.maximum(visit.begin - visit.row, 0)
        last = jnp.minimum(visit.end - visit.row, statics.tiles.rows)
        store_rows(lambda rows: out_ref.at[rows, columns], visit.row, shared.out, first, last)
        plgpu.wait_smem_to_gmem(0)

    @pl.when((visit.begin < visit.end) & ~of_none)
    def _():
        own = Inputs(*(None if array is None else array.at[visit.group] for array in inputs))._replace(x=inputs.x)
        rows = rows_from(visit.row, statics.tiles.rows)

        def finish(totals):
            weight_only.stage(shared.out, weight_only.scaled(statics, own, column * statics.tiles.columns, totals))
            store()

        weight_only.reduce(statics, shared, weight_only.multiply(statics, own, shared, rows, column), finish)

    @pl.when((visit.begin < visit.end) & of_none & (lax.axis_index("warpgroup") == 0))
    def _():
        zero = plgpu.layout_cast(jnp.zeros((TILE, statics.tiles.rows), jnp.float32), hopper.MATRIX)
        weight_only.stage(shared.out, [zero] * statics.blocks)
        store()


def _visit(number, sizes_ref, num_groups: int, num_rows: int, length: int) -> _Visit:
    """The `number`-th stretch of `length` rows."""

    def take(group, size, carry):
        before, begin, found = carry
        count = tiles_of(begin, size, length)
        here = (number >= before) & (number < before + count)
        row = aligned(begin) + (number - before) * length
        this = _Visit(group, row, begin, begin + size)
        found = _Visit(*(jnp.where(here, new, old) for new, old in zip(this, found, strict=True)))
        return before + count, begin + size, found

    def take_some(first, count: int, carry):
        sizes = [sizes_ref[first + i] for i in range(count)]
        for i, size in enumerate(sizes):
            carry = take(first + i, size, carry)
        return carry

    whole, left = divmod(num_groups, _SIZES)
    zero = jnp.int32(0)
    carry = (zero, zero, _Visit(zero, zero, zero, zero))
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, carry: take_some(i * _SIZES, _SIZES, carry), carry)
    before, begin, found = take_some(jnp.int32(whole * _SIZES), left, carry)
    return take(jnp.int32(num_groups), num_rows - begin, (before, begin, found))[2]
