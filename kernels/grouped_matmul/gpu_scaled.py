"""The grouped product of few-bit rows and weights on Hopper: int8 times int8 and FP8 times FP8, with scales.

Tiles and their order are those of `persistent`; what is multiplied, and where the scales come in, is as in
`kernels.quantized_matmul.gpu`. Rows of no group are tiles of no steps.
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
from kernels.grouped_matmul.persistent import Tile, rows_from
from kernels.grouped_matmul.scaled_tiles import DEPTH, choose_scaled_tiles
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT, WIDTH
from kernels.quantized_matmul.tiles import SCALES_LINE, STRETCH
from quantization.qarray import QArray

_ROWS = 64


@dataclasses.dataclass(frozen=True)
class _Product(persistent.Kernel):
    """x [M, K] and w [E, N, K]. `w_columns`: elements of w along N that share a scale; `outside`: no scale changes
    along K."""

    w_columns: int
    outside: bool

    name = "grouped_matmul_scaled"
    depth = DEPTH

    @property
    def shapes(self):
        return (self.tiles.rows, DEPTH), (self.tiles.columns, DEPTH)

    @property
    def num_steps(self) -> int:
        return -(-self.in_dim // DEPTH)

    @property
    def scaled_columns(self) -> int:
        """Columns of a tile that share a scale in every step."""
        columns = self.tiles.columns
        return columns if self.outside or self.w_columns % columns == 0 or self.w_columns >= self.out_dim else WIDTH

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        x, w, x_scales, w_scales = inputs
        rows, columns = rows_from(tile.row, self.tiles.rows), pl.ds(tile.column, self.tiles.columns)
        depth = pl.ds(step * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(x.at[rows, depth], buffers[0], arrived)
        plgpu.copy_gmem_to_smem(w.at[tile.group, columns, depth], buffers[1], arrived)
        if not self.outside:
            plgpu.copy_gmem_to_smem(x_scales.at[step, rows], buffers[2], arrived)
            stretches = pl.ds(hopper.floor(tile.column, STRETCH), SCALES_LINE)
            plgpu.copy_gmem_to_smem(w_scales.at[tile.group, step, stretches], buffers[3], arrived)


class _Inputs(NamedTuple):
    """x [M, K], w [E, N, K]; scales in float32, outside: [M] and [E, N], vectors of whole tiles; else [K / 128, M] and
    [E, K / 128, N / 16]."""

    x: Any
    w: Any
    sizes: Any
    x_scales: Any
    w_scales: Any


class _Shared(NamedTuple):
    """As `persistent.Shared`; in the ring are a step's scales too, where they change along K."""

    sizes: Any
    ring: tuple[Any, Any]
    out: Any
    sizes_arrived: Any
    arrived: Any
    free: Any


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "tiles", "interpret"))
def product(x: QArray, w: QArray, group_sizes, out_dtype=jnp.bfloat16, *, tiles=None, interpret=None) -> jax.Array:
    """[M, N] of x [M, K] in rows and w [E, K, N] in columns.

    `tiles`: None for the choice of `choose_scaled_tiles`. `interpret`: parameters of Pallas's interpreter.
    """
    (M, K), (E, _, N) = x.shape, w.shape
    outside = x.scales.shape[1] == 1 and w.scales.shape[1] == 1
    tiles = choose_scaled_tiles(outside, N) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    rows = -(-M // ROW_ALIGNMENT) * ROW_ALIGNMENT
    x_scales = jnp.repeat(x.scales, x.block[0], axis=0)
    if outside:
        # Vectors are read straight into registers, in whole tiles, the last of which may begin at the last row.
        x_scales = jnp.pad(x_scales[:, 0], (0, rows - M + tiles.rows))
        w_scales = jnp.repeat(w.scales[:, 0], w.block[2], axis=1)
        w_scales = jnp.pad(w_scales, ((0, 0), (0, -N % tiles.columns)))
    else:
        x_scales = jnp.pad(_per_step(x_scales.T, x.block[1], 0), [(0, 0), (0, rows - M)])
        w_scales = jnp.repeat(_per_step(w.scales, w.block[1], 1), w.block[2] // STRETCH, axis=2)
        w_scales = jnp.pad(w_scales, ((0, 0), (0, 0), (0, -w_scales.shape[2] % SCALES_LINE)))
    values = jnp.pad(x.values, ((0, rows - M), (0, 0))) if rows > M else x.values
    sizes = jnp.pad(group_sizes.astype(jnp.int32), (0, -E % 4))
    kernel = _Product(E, rows, K, N, tiles, w.block[2], outside)
    return _call(kernel, _Inputs(values, w.values, sizes, x_scales, w_scales), jnp.dtype(out_dtype), interpret)[:M]


def _per_step(scales: jax.Array, length: int, axis: int) -> jax.Array:
    """Scales of `length` elements along an axis as scales of `DEPTH` of them."""
    return jnp.repeat(scales, -(-length // DEPTH), axis=axis)


def _call(kernel: _Product, inputs: _Inputs, out_dtype, interpret) -> jax.Array:
    run = plgpu.kernel(
        lambda *refs: _body(kernel, _Inputs(*refs[:5]), refs[5], _Shared(*refs[6:])),
        out_type=jax.ShapeDtypeStruct((kernel.num_rows, kernel.out_dim), out_dtype),
        kernel_name=kernel.name,
        scratch_types=list(_scratch(kernel, inputs.x.dtype, out_dtype, inputs.sizes.shape)),
        grid=(kernel.num_programs,),
        grid_names=("program",),
        num_threads=persistent.NUM_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return run(*inputs)


def _scratch(kernel: _Product, dtype, out_dtype, sizes_shape) -> _Shared:
    def tiled(shape, dtype, width):
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))

    buffers = kernel.tiles.num_buffers
    scales = (
        () if kernel.outside else tuple(plgpu.SMEM((buffers, n), jnp.float32) for n in (kernel.tiles.rows, SCALES_LINE))
    )
    outputs = (2, 2, WIDTH, WIDTH)
    return _Shared(
        sizes=plgpu.SMEM(sizes_shape, jnp.int32),
        ring=(*(tiled((buffers, *shape), dtype, DEPTH) for shape in kernel.shapes), *scales),
        out=persistent.in_one_place(tiled(outputs, out_dtype, WIDTH), plgpu.SMEM(outputs, out_dtype)),
        sizes_arrived=plgpu.Barrier(num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=2 + len(scales), num_barriers=buffers),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
    )


def _body(kernel: _Product, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    compute = functools.partial(_compute, kernel, inputs, out_ref, shared)
    arrays = inputs.x, inputs.w, inputs.x_scales, inputs.w_scales
    persistent.share_out(kernel, arrays, inputs.sizes, shared, compute)


def _compute(kernel: _Product, inputs: _Inputs, out_ref, shared: _Shared, tile: Tile, start) -> None:
    warpgroup, width = lax.axis_index("warpgroup"), kernel.scaled_columns
    multiply = _multiply if kernel.outside else _multiply_scaled
    zeros = plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), hopper.MATRIX)
    parts = lax.cond(
        tile.steps > 0,
        lambda: multiply(kernel, warpgroup, inputs, shared, tile, start),
        lambda: [zeros] * (kernel.tiles.columns // width),
    )
    for i, part in enumerate(parts):
        values, turn = part.astype(out_ref.dtype), i * (width // WIDTH)
        persistent.store(kernel, warpgroup, out_ref, shared, tile, values, offset=i * width, turn=turn)


def _operands(warpgroup, shared: _Shared, count):
    """(buffer, the warpgroup's x, w) of a step, when they are there."""
    x, w = shared.ring[:2]
    buffer = hopper.remainder(count, x.shape[0])
    plgpu.barrier_wait(shared.arrived.at[buffer])
    return buffer, x.at[buffer, pl.ds(warpgroup * _ROWS, _ROWS)], w.at[buffer].T


def _multiply(kernel: _Product, warpgroup, inputs: _Inputs, shared: _Shared, tile: Tile, start):
    """The scaled sums of a warpgroup's rows."""
    exact = jnp.int32 if inputs.x.dtype == jnp.int8 else jnp.float32

    def accumulate(acc):
        def step(k, before):
            buffer, x_smem, w_smem = _operands(warpgroup, shared, start + k)
            plgpu.wgmma(acc, x_smem, w_smem)
            # All but the product just begun are done.
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(shared.free.at[before]))
            return buffer

        last = lax.fori_loop(0, kernel.num_steps, step, jnp.int32(0))
        rows, columns = pl.ds(tile.row + warpgroup * _ROWS, _ROWS), pl.ds(tile.column, kernel.tiles.columns)
        x_scales = plgpu.load(inputs.x_scales.at[rows], layout=hopper.ROWS, optimized=False)
        w_scales = plgpu.load(inputs.w_scales.at[tile.group, columns], layout=hopper.COLUMNS, optimized=False)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.free.at[last])
        sums = acc[...].astype(jnp.float32)
        return sums * hopper.along(x_scales, sums.shape, 0) * hopper.along(w_scales, sums.shape, 1)

    return [pl.run_scoped(accumulate, plgpu.ACC((_ROWS, kernel.tiles.columns), exact))]


def _multiply_scaled(kernel: _Product, warpgroup, inputs: _Inputs, shared: _Shared, tile: Tile, start):
    """The sums of a warpgroup's rows, scaled step by step, of groups of columns."""
    exact = jnp.int32 if inputs.x.dtype == jnp.int8 else jnp.float32
    columns, width = kernel.tiles.columns, kernel.scaled_columns
    (x, w, x_scales, w_scales), rows = shared.ring, pl.ds(warpgroup * _ROWS, _ROWS)

    def buffer_of(k):
        return hopper.remainder(start + k, x.shape[0])

    def arrive(k):
        plgpu.barrier_wait(shared.arrived.at[buffer_of(k)])

    def scales_of(k):
        of_rows = plgpu.load(x_scales.at[buffer_of(k), rows], layout=hopper.ROWS, optimized=False)
        return of_rows, [w_scales[buffer_of(k), column // STRETCH] for column in range(0, columns, width)]

    def add(totals, sums, of_rows, of_columns):
        parts = [sums[:, i * width : (i + 1) * width] for i in range(len(totals))] if len(totals) > 1 else [sums]
        return [
            total + part.astype(jnp.float32) * hopper.along(of_rows * scale, part.shape, 0)
            for total, part, scale in zip(totals, parts, of_columns, strict=True)
        ]

    def step(k, carry):
        """(totals, scales of step k) to those of the next one."""
        (totals, scales), buffer = carry, buffer_of(k)

        def multiply(acc):
            plgpu.wgmma(acc, x.at[buffer, rows], w.at[buffer].T)
            # While the product runs, what the next one waits for.
            following = jnp.minimum(k + 1, kernel.num_steps - 1)
            pl.when(k + 1 < kernel.num_steps)(lambda: arrive(following))
            scales_after = scales_of(following)
            # Between the last read of the buffer's scales and the copies that fill it again.
            plgpu.commit_smem()
            return acc[...], scales_after

        sums, following = pl.run_scoped(multiply, plgpu.ACC((_ROWS, columns), exact))
        plgpu.barrier_arrive(shared.free.at[buffer])
        return add(totals, sums, *scales), following

    arrive(0)
    zeros = plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), hopper.MATRIX)
    return lax.fori_loop(0, kernel.num_steps, step, ([zeros] * (columns // width), scales_of(0)))[0]
