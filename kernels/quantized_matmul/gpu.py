"""int8 times int8 and FP8 times FP8 on Hopper, with scales outside of the sums or of blocks of 128 along K.

A tile is 128 rows of x by some columns of w. Two warpgroups multiply, 64 rows each, and one more copies blocks of 128
along K of both into a ring of buffers. Clusters of two tiles, one below the other, read each block of w once, for both.
Each cluster of processors takes tile after tile, and copies for the next one before it has finished one.

Scales that do not change along K multiply the finished sums. Where they do, a product of one block is scaled and added
to the total in registers, as DeepSeek-V3's technical report describes (arXiv 2412.19437, section 3.3): that also keeps
the total in full float32, where the tensor core's own FP8 sums have about 14 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.hopper_chip import NUM_PROCESSORS
from kernels.quantized_matmul import case_of
from kernels.quantized_matmul.tiles import (
    BLOCK,
    NUM_OUTS,
    OUT_BYTES,
    OUT_COLUMNS,
    SCALED_COLUMNS,
    SCALES_LINE,
    STRETCH,
    WARPGROUP_ROWS,
    Tiles,
    choose_tiles,
    piece_columns,
)
from quantization.qarray import QArray

# Without the barriers that Pallas would put around every load and store: all threads of a warpgroup arrive at the
# barriers below, and the results that a warpgroup writes to shared memory lie between two `commit_smem`.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced: shapes, `w_columns` (elements of w along N that share a scale) and
    whether scales are `outside` of the sums."""

    num_rows: int
    in_dim: int
    out_dim: int
    w_columns: int
    outside: bool
    tiles: Tiles

    @property
    def steps(self) -> int:
        return -(-self.in_dim // BLOCK)

    @property
    def grid(self) -> tuple[int, int]:
        """Clusters of tiles along M, and tiles along N."""
        return -(-self.num_rows // (self.tiles.rows * self.tiles.cluster)), -(-self.out_dim // self.tiles.columns)

    @property
    def num_programs(self) -> int:
        return min(math.prod(self.grid), NUM_PROCESSORS // self.tiles.cluster)

    @property
    def scaled_columns(self) -> int:
        """Columns of a tile that share a scale in every block along K."""
        columns = self.tiles.columns
        return columns if self.w_columns % columns == 0 or self.w_columns >= self.out_dim else SCALED_COLUMNS


class _Inputs(NamedTuple):
    """x [M, K], w [N, K]; outside: x_scales [M], w_scales [N]; else x_scales [K / 128, M], w_scales [K / 128, N / 16].
    bias [N] or None. All but the first two float32, and vectors of whole tiles."""

    x: Any
    w: Any
    x_scales: Any
    w_scales: Any
    bias: Any


class _Shared(NamedTuple):
    """Shared memory of a block of threads: the ring of buffers, each warpgroup's pieces of results, and the barriers.
    Scales are in the ring where they change along K: from device memory, a step ahead, products would wait for them.
    `arrived`: the copies are there. `free`: all warpgroups, of the whole cluster, are done with a buffer. `led`: the
    first warpgroup is ahead as far as it shall be; None where none is."""

    x: Any
    w: Any
    x_scales: Any
    w_scales: Any
    out: Any
    arrived: Any
    free: Any
    led: Any


class _Tile(NamedTuple):
    """Its first row and column; its first block along K is the `start`-th that the program copies."""

    row: jax.Array
    column: jax.Array
    start: jax.Array


def quantized_matmul(x: QArray, w: QArray, bias: jax.Array | None, out_dtype) -> jax.Array:
    """[M, N] of x [M, K] in rows and w [K, N] in columns, in tiles chosen for the shapes."""
    return product(x, w, bias, out_dtype, choose_tiles(case_of(x, w, bias, out_dtype)))


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "tiles", "interpret"))
def product(x: QArray, w: QArray, bias: jax.Array | None, out_dtype, tiles: Tiles, interpret=None) -> jax.Array:
    """[M, N] of x [M, K] in rows and w [K, N] in columns. `interpret`: parameters of Pallas's interpreter."""
    M, N, out_dtype = x.shape[0], w.shape[1], jnp.dtype(out_dtype)
    if M == 0:
        return jnp.zeros((M, N), out_dtype)
    outside = x.scales.shape[1] == 1 and w.scales.shape[0] == 1
    # Copies take whole rows of shared memory, eight at a time. A model's widths are such multiples already.
    x_values = _filled(_filled(x.values, BLOCK), 8, 0)
    w_values = _filled(_filled(w.values, BLOCK), OUT_COLUMNS, 0)
    statics = _Statics(x_values.shape[0], x_values.shape[1], w_values.shape[0], w.block[1], outside, tiles)
    # Of one stretch of columns Mosaic drops the axis, and a copy past it would go there.
    assert tiles.columns == OUT_COLUMNS or statics.out_dim > OUT_COLUMNS, (tiles, statics.out_dim)
    x_scales = jnp.repeat(x.scales, x.block[0], axis=0)
    # Vectors are read straight into registers, in whole tiles.
    if outside:
        x_scales = _filled(x_scales[:, 0], tiles.rows * tiles.cluster)
        w_scales = _filled(jnp.repeat(w.scales[0], w.block[1]), tiles.columns)
    else:
        x_scales = _filled(_per_block(x_scales.T, x.block[1]), tiles.rows * tiles.cluster)
        w_scales = jnp.repeat(_per_block(w.scales, w.block[0]), -(-w.block[1] // STRETCH), axis=1)
        w_scales = _filled(w_scales, SCALES_LINE)
    bias = None if bias is None else _filled(bias.astype(jnp.float32), tiles.columns)
    y = _call(statics, _Inputs(x_values, w_values, x_scales, w_scales, bias), out_dtype, interpret)
    return y[:M, :N]


def _filled(x: jax.Array, multiple: int, axis: int = -1) -> jax.Array:
    """`x` with zeros after it, up to a multiple along an axis."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def _per_block(scales: jax.Array, length: int) -> jax.Array:
    """Scales of `length` elements along K, its first axis, as scales of 128 of them."""
    return jnp.repeat(scales, -(-length // BLOCK), axis=0)


def _call(statics: _Statics, inputs: _Inputs, out_dtype, interpret) -> jax.Array:
    tiles = statics.tiles
    given = [name for name, array in inputs._asdict().items() if array is not None]
    shared = {name: scratch for name, scratch in _scratch(statics, inputs, out_dtype)._asdict().items() if scratch}

    def body(*refs):
        arrays = dict.fromkeys(_Inputs._fields) | dict(zip(given, refs, strict=False))
        memory = dict.fromkeys(_Shared._fields) | dict(zip(shared, refs[len(given) + 1 :], strict=True))
        _body(statics, _Inputs(**arrays), refs[len(given)], _Shared(**memory))

    clusters = {"cluster": (tiles.cluster,), "cluster_names": ("tile",)} if tiles.cluster > 1 else {}
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((statics.num_rows, statics.out_dim), out_dtype),
        kernel_name="quantized_matmul",
        scratch_types=list(shared.values()),
        grid=(statics.num_programs,),
        grid_names=("program",),
        num_threads=tiles.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
        interpret=interpret,
        **clusters,
    )
    return run(*(array for array in inputs if array is not None))


def _scratch(statics: _Statics, inputs: _Inputs, out_dtype) -> _Shared:
    tiles, buffers, outside = statics.tiles, statics.tiles.num_buffers, statics.outside

    def tiled(*shape, dtype):
        transforms = (
            plgpu.TilingTransform((8, OUT_BYTES // jnp.dtype(dtype).itemsize)),
            plgpu.SwizzleTransform(OUT_BYTES),
        )
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    free = {"num_arrivals": tiles.num_warpgroups, "num_barriers": buffers}
    together = tiles.cluster > 1
    return _Shared(
        x=tiled(buffers, tiles.rows, BLOCK, dtype=inputs.x.dtype),
        w=tiled(buffers, tiles.columns, BLOCK, dtype=inputs.w.dtype),
        x_scales=None if outside else plgpu.SMEM((buffers, tiles.rows), jnp.float32),
        w_scales=None if outside else plgpu.SMEM((buffers, SCALES_LINE), jnp.float32),
        out=tiled(tiles.num_warpgroups, NUM_OUTS, WARPGROUP_ROWS, piece_columns(out_dtype), dtype=out_dtype),
        arrived=plgpu.Barrier(num_arrivals=2 if outside else 4, num_barriers=buffers),
        free=plgpu.ClusterBarrier(collective_axes=("tile",), **free) if together else plgpu.Barrier(**free),
        led=plgpu.Barrier(num_arrivals=1, num_barriers=1) if tiles.lead else None,
    )


def _body(statics: _Statics, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    warpgroup, tiles = lax.axis_index("warpgroup"), statics.tiles
    for_products, for_copies = tiles.registers
    rest = math.prod(statics.grid) - lax.axis_index("program")
    rounds = hopper.floor(rest + (statics.num_programs - 1), statics.num_programs)

    @pl.when(warpgroup == tiles.num_warpgroups)
    def _():
        plgpu.set_max_registers(for_copies, action="decrease")
        _copy_all(statics, rounds, inputs, shared)

    @pl.when(warpgroup < tiles.num_warpgroups)
    def _():
        plgpu.set_max_registers(for_products, action="increase")
        multiply = _multiply if statics.outside else _multiply_scaled
        if tiles.lead:
            pl.when(warpgroup > 0)(lambda: plgpu.barrier_wait(shared.led.at[0]))

        def compute(number, _):
            tile = _tile(statics, number)
            multiply(statics, tile, warpgroup, inputs, out_ref, shared)

        lax.fori_loop(0, rounds, compute, None)
        plgpu.wait_smem_to_gmem(0)


def _tile(statics: _Statics, number) -> _Tile:
    tiles, index = statics.tiles, number * statics.num_programs + lax.axis_index("program")
    row, column = plgpu.planar_snake(index, statics.grid, 0, min(tiles.group, statics.grid[0]))
    if tiles.cluster > 1:
        row = row * tiles.cluster + lax.axis_index("tile")
    return _Tile(row * tiles.rows, column * tiles.columns, number * statics.steps)


def _copy_all(statics: _Statics, rounds, inputs: _Inputs, shared: _Shared) -> None:
    """The copies of all tiles of the program."""
    buffers = statics.tiles.num_buffers

    def copy_tile(number, _):
        tile = _tile(statics, number)
        rows, columns = pl.ds(tile.row, statics.tiles.rows), pl.ds(tile.column, statics.tiles.columns)

        def copy(step, _):
            count = tile.start + step
            buffer = hopper.remainder(count, buffers)
            pl.when(count >= buffers)(lambda: plgpu.barrier_wait(shared.free.at[buffer]))
            block, arrived = pl.ds(step * BLOCK, BLOCK), shared.arrived.at[buffer]
            plgpu.copy_gmem_to_smem(inputs.x.at[rows, block], shared.x.at[buffer], arrived)
            together = {"collective_axes": ("tile",)} if statics.tiles.cluster > 1 else {}
            plgpu.copy_gmem_to_smem(inputs.w.at[columns, block], shared.w.at[buffer], arrived, **together)
            if not statics.outside:
                plgpu.copy_gmem_to_smem(inputs.x_scales.at[step, rows], shared.x_scales.at[buffer], arrived)
                stretches = pl.ds(hopper.floor(tile.column, STRETCH), SCALES_LINE)
                plgpu.copy_gmem_to_smem(inputs.w_scales.at[step, stretches], shared.w_scales.at[buffer], arrived)

        lax.fori_loop(0, statics.steps, copy, None)

    lax.fori_loop(0, rounds, copy_tile, None)
    # Every completion of a barrier is waited for: no block of a cluster ends before another has arrived at its
    # barriers.
    for buffer in range(buffers):
        pl.when(buffer < rounds * statics.steps)(functools.partial(plgpu.barrier_wait, shared.free.at[buffer]))


def _operands(tile: _Tile, step, warpgroup, shared: _Shared):
    """(buffer, the warpgroup's x, w) of one block along K, when they are there."""
    buffer = _buffer_of(tile, step, shared)
    plgpu.barrier_wait(shared.arrived.at[buffer])
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    return buffer, shared.x.at[buffer, rows], shared.w.at[buffer].T


def _lead(statics: _Statics, count, warpgroup, shared: _Shared) -> None:
    """Lets the other warpgroups begin after the first one's first blocks. They stay that far apart, so that one
    multiplies while another stores its results."""
    if statics.tiles.lead:
        last = min(statics.tiles.lead, statics.tiles.num_buffers, statics.steps) - 1
        pl.when((warpgroup == 0) & (count == last))(lambda: plgpu.barrier_arrive(shared.led.at[0]))


def _multiply(statics: _Statics, tile: _Tile, warpgroup, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    """One warpgroup's rows of a tile whose scales multiply the finished sums."""
    exact = jnp.int32 if inputs.x.dtype == jnp.int8 else jnp.float32

    def accumulate(acc):
        def step(k, before):
            buffer, x_smem, w_smem = _operands(tile, k, warpgroup, shared)
            plgpu.wgmma(acc, x_smem, w_smem)
            _lead(statics, tile.start + k, warpgroup, shared)
            # All but the product just begun are done.
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(shared.free.at[before]))
            return buffer

        last = lax.fori_loop(0, statics.steps, step, jnp.int32(0))
        # Loaded while the last product runs.
        columns = pl.ds(tile.column, statics.tiles.columns)
        x_scales = plgpu.load(inputs.x_scales.at[_rows(tile, warpgroup)], layout=hopper.ROWS, optimized=False)
        w_scales = plgpu.load(inputs.w_scales.at[columns], layout=hopper.COLUMNS, optimized=False)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.free.at[last])
        sums = acc[...].astype(jnp.float32)
        return sums * hopper.along(x_scales, sums.shape, 0) * hopper.along(w_scales, sums.shape, 1)

    y = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, statics.tiles.columns), exact))
    _store(statics, tile, warpgroup, [y], inputs, out_ref, shared)


def _multiply_scaled(statics: _Statics, tile: _Tile, warpgroup, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    """One warpgroup's rows of a tile whose scales change along K. Totals, as scales of w, are of groups of columns."""
    tiles, width = statics.tiles, statics.scaled_columns
    exact = jnp.int32 if inputs.x.dtype == jnp.int8 else jnp.float32

    def arrive(k):
        """Waits for the copies of block k."""
        plgpu.barrier_wait(shared.arrived.at[_buffer_of(tile, k, shared)])

    def scales_of(k):
        return _scales_of(statics, warpgroup, shared, _buffer_of(tile, k, shared))

    def step(k, carry):
        """(totals, scales of block k) to those of the next one."""
        (totals, scales), buffer = carry, _buffer_of(tile, k, shared)
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def multiply(acc):
            plgpu.wgmma(acc, shared.x.at[buffer, rows], shared.w.at[buffer].T)
            _lead(statics, tile.start + k, warpgroup, shared)
            # While the product runs, what the next one waits for.
            following = jnp.minimum(k + 1, statics.steps - 1)
            pl.when(k + 1 < statics.steps)(lambda: arrive(following))
            scales_after = scales_of(following)
            # Between the last read of the buffer's scales and the copies that fill it again.
            plgpu.commit_smem()
            return acc[...], scales_after

        sums, scales_after = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, tiles.columns), exact))
        plgpu.barrier_arrive(shared.free.at[buffer])
        return _add(totals, sums, scales), scales_after

    arrive(0)
    zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, width), jnp.float32), hopper.MATRIX)
    carry = [zeros] * (tiles.columns // width), scales_of(0)
    totals, _ = lax.fori_loop(0, statics.steps, step, carry)
    _store(statics, tile, warpgroup, totals, inputs, out_ref, shared)


def _buffer_of(tile: _Tile, k, shared: _Shared):
    """Where the tile's block k along K lies in the ring."""
    return hopper.remainder(tile.start + k, shared.x.shape[0])


def _scales_of(statics: _Statics, warpgroup, shared: _Shared, buffer) -> tuple[jax.Array, list[jax.Array]]:
    """Of a buffer: x's, of the warpgroup's rows, and w's, of each group of columns."""
    rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    x_scales = plgpu.load(shared.x_scales.at[buffer, rows], layout=hopper.ROWS, optimized=False)
    groups = range(0, statics.tiles.columns, statics.scaled_columns)
    return x_scales, [shared.w_scales[buffer, group // STRETCH] for group in groups]


def _add(totals: list[jax.Array], sums, scales: tuple[jax.Array, list[jax.Array]]) -> list[jax.Array]:
    """The totals of groups of columns, with one block's sums times its scales."""
    (x_scales, w_scales), width = scales, totals[0].shape[1]
    parts = [sums[:, i * width : (i + 1) * width] for i in range(len(totals))] if len(totals) > 1 else [sums]
    return [
        total + part.astype(jnp.float32) * hopper.along(x_scales * w_scale, part.shape, 0)
        for total, part, w_scale in zip(totals, parts, w_scales, strict=True)
    ]


def _rows(tile: _Tile, warpgroup):
    """A warpgroup's rows of a tile."""
    return pl.ds(tile.row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _store(statics: _Statics, tile: _Tile, warpgroup, parts, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    """Starts the copies of the results, in `parts` side by side, piece after piece."""
    width, number = shared.out.shape[-1], 0
    rows, column = _rows(tile, warpgroup), tile.column
    for part in parts:
        for offset in range(0, part.shape[1], width):
            piece = part[:, offset : offset + width]
            columns, place = pl.ds(column, width), shared.out.at[warpgroup, number % NUM_OUTS]
            if inputs.bias is not None:
                bias = plgpu.load(inputs.bias.at[columns], layout=hopper.COLUMNS, optimized=False)
                piece = piece + hopper.along(bias, piece.shape, 1)
            # All but the last copy have been read from their places, and the tile's first piece finds none under way.
            plgpu.wait_smem_to_gmem(NUM_OUTS - 1 if number else 0, wait_read_only=True)
            plgpu.commit_smem()
            place[...] = piece.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out_ref.at[rows, columns])
            column, number = column + width, number + 1
