"""The grouped product with weights of few bits on Hopper, for many rows of a group.

Tiles, their order and their copies are those of `persistent`; what is multiplied is as in
`kernels.quantized_matmul.weight_only`: yᵀ = wᵀ · xᵀ, the weight widened in registers. Two warpgroups have half of a
tile's columns each and share its rows, so that an element of x is read once for all of them; one widens while the
other multiplies. Rows of no group are tiles of no steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.grouped_matmul import persistent
from kernels.grouped_matmul.persistent import Tile, rows_from, store_rows
from kernels.grouped_matmul.weight_only_tiles import ManyTiles
from kernels.quantized_matmul import weight_only
from kernels.quantized_matmul.weight_only import Inputs, Operands, Statics
from kernels.quantized_matmul.weight_only_tiles import TILE


@dataclasses.dataclass(frozen=True)
class _Product(persistent.Kernel):
    """`statics`: of a warpgroup's half of the columns."""

    tiles: ManyTiles
    statics: Statics

    name = "grouped_matmul_weight_only_many"

    @property
    def depth(self) -> int:
        return self.tiles.depth

    def copy(self, tile: Tile, step, inputs: Inputs, buffers, arrived) -> None:
        depth, columns = self.depth, self.tiles.columns
        blocks = pl.ds(tile.column // TILE, columns // TILE)
        sources = [
            inputs.x.at[rows_from(tile.row, self.tiles.rows), pl.ds(step * depth, depth)],
            inputs.w.at[tile.group, blocks, pl.ds(step * self.statics.lines, self.statics.lines)],
        ]
        if self.statics.group is not None:
            count = depth // self.statics.group
            place = tile.group, pl.ds(step * count, count), pl.ds(tile.column, columns)
            sources += [ref.at[place] for ref in (inputs.scales, inputs.zeros) if ref is not None]
        for source, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer, arrived)


class _Shared(NamedTuple):
    """As `persistent.Shared`. ring: x, the weight, and scales and zero points of groups; out: 64 columns of each
    warpgroup."""

    sizes: Any
    ring: tuple[Any, ...]
    out: Any
    sizes_arrived: Any
    arrived: Any
    free: Any


def product(statics: Statics, inputs: Inputs, group_sizes: jax.Array, tiles: ManyTiles, interpret) -> jax.Array:
    """[M, N], as `gpu_weight_only.tiled_product` has it. `statics`: of the whole product."""
    M, N, K = statics.shape
    half = dataclasses.replace(statics, tiles=tiles.of_warpgroup)
    kernel = _Product(inputs.w.shape[0], M, K, N, tiles, half)
    # Copies are in units of 16 bytes.
    sizes = jnp.pad(group_sizes, (0, -kernel.num_groups % 4))
    arrays = {name: array for name, array in inputs._asdict().items() if array is not None}

    def body(*refs):
        given, (sizes_ref, out_ref, *shared) = refs[: len(arrays)], refs[len(arrays) :]
        refs = dict.fromkeys(Inputs._fields) | dict(zip(arrays, given, strict=True))
        _body(kernel, Inputs(**refs), sizes_ref, out_ref, _Shared(*shared))

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), statics.out_dtype),
        kernel_name=kernel.name,
        scratch_types=list(_scratch(kernel, sizes.shape)),
        grid=(kernel.num_programs,),
        grid_names=("program",),
        num_threads=persistent.NUM_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=weight_only.COMPILER,
        interpret=interpret,
    )
    return run(*arrays.values(), sizes)


def _scratch(kernel: _Product, sizes_shape) -> _Shared:
    tiles, statics = kernel.tiles, kernel.statics
    buffers = tiles.num_buffers
    container = jnp.uint32 if statics.w_dtype == jnp.int4 else statics.w_dtype
    ring = [
        plgpu.SMEM((buffers, tiles.rows, tiles.depth), statics.dtype, transforms=weight_only.tiled(statics)),
        plgpu.SMEM((buffers, tiles.columns // TILE, statics.lines, 256), container),
    ]
    if statics.group is not None:
        scales = plgpu.SMEM((buffers, tiles.depth // statics.group, tiles.columns), jnp.float32)
        ring += [scales] * (1 + statics.zero_points)
    return _Shared(
        sizes=plgpu.SMEM(sizes_shape, jnp.int32),
        ring=tuple(ring),
        out=plgpu.SMEM((2, tiles.rows, TILE), statics.out_dtype),
        sizes_arrived=plgpu.Barrier(num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=len(ring), num_barriers=buffers),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
    )


def _body(kernel: _Product, inputs: Inputs, sizes_ref, out_ref, shared: _Shared) -> None:
    compute = functools.partial(_compute, kernel, inputs, out_ref, shared)
    persistent.share_out(kernel, inputs, sizes_ref, shared, compute)


def _compute(kernel: _Product, inputs: Inputs, out_ref, shared: _Shared, tile: Tile, start) -> None:
    """A warpgroup's half of a tile, multiplied and on its way out."""
    statics = kernel.statics
    column = tile.column + lax.axis_index("warpgroup") * statics.tiles.columns
    zero = plgpu.layout_cast(jnp.zeros((TILE, kernel.tiles.rows), jnp.float32), hopper.MATRIX)
    zeros = (zero,) * statics.blocks
    store = functools.partial(_store, kernel, out_ref, shared, tile, column)

    @pl.when(tile.steps > 0)
    def _():
        own = inputs._replace(scales=inputs.scales.at[tile.group])
        totals = _multiply(kernel, shared, tile, start, zeros)
        store(weight_only.scaled(statics, own, column, totals))

    pl.when(tile.steps == 0)(lambda: store(zeros))


def _multiply(kernel: _Product, shared: _Shared, tile: Tile, start, totals):
    statics, warpgroup = kernel.statics, lax.axis_index("warpgroup")
    columns = pl.ds(warpgroup * statics.tiles.columns, statics.tiles.columns)

    def step(k, totals):
        buffer = hopper.remainder(start + k, kernel.tiles.num_buffers)
        plgpu.barrier_wait(shared.arrived.at[buffer])
        x, w, *of_groups = shared.ring
        own = [ref.at[buffer, :, columns] for ref in of_groups]
        blocks = pl.ds(warpgroup * statics.blocks, statics.blocks)
        operands = Operands(x.at[buffer], w.at[buffer, blocks], *own, *[None] * (2 - len(own)))
        totals = weight_only.add(statics, operands, totals)
        # What was read into registers, before copies fill its place.
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.free.at[buffer])
        return totals

    return lax.fori_loop(0, tile.steps, step, totals)


def _store(kernel: _Product, out_ref, shared: _Shared, tile: Tile, column, outputs) -> None:
    """Starts the copies of a warpgroup's outputs, the last of which is waited for where its place is written again."""
    smem = shared.out.at[lax.axis_index("warpgroup")]
    first, last = jnp.maximum(tile.begin - tile.row, 0), jnp.minimum(tile.end - tile.row, kernel.tiles.rows)
    for block, values in enumerate(outputs):
        columns = pl.ds(column + block * TILE, TILE)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        weight_only.stage(smem, [values])
        store_rows(lambda rows, columns=columns: out_ref.at[rows, columns], tile.row, smem, first, last)
