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

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        (x, w), depth = inputs, pl.ds(step * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(x.at[rows_from(tile.row, self.tiles.rows), depth], buffers[0], arrived)
        columns = pl.ds(tile.column, self.tiles.columns)
        plgpu.copy_gmem_to_smem(w.at[tile.group, columns, depth], buffers[1], arrived)


class _Inputs(NamedTuple):
    """x [M, K], w [E, N, K]; outside: x_scales [M], w_scales [E, N]; else x_scales [K / 128, M], w_scales
    [E, N / .., K / 128], float32, vectors of whole tiles."""

    x: Any
    w: Any
    sizes: Any
    x_scales: Any
    w_scales: Any


class _Shared(NamedTuple):
    """As `persistent.Shared`."""

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
    tiles = choose_scaled_tiles(outside) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    rows = -(-M // ROW_ALIGNMENT) * ROW_ALIGNMENT
    x_scales = jnp.repeat(x.scales, x.block[0], axis=0)
    # Vectors are read straight into registers, in whole tiles, the last of which may begin at the last row.
    beyond = [(0, rows - M + tiles.rows)]
    if outside:
        x_scales = jnp.pad(x_scales[:, 0], beyond)
        w_scales = jnp.repeat(w.scales[:, 0], w.block[2], axis=1)
        w_scales = jnp.pad(w_scales, ((0, 0), (0, -N % tiles.columns)))
    else:
        x_scales = jnp.pad(_per_step(x_scales.T, x.block[1], 0), [(0, 0), *beyond])
        w_scales = jnp.swapaxes(_per_step(w.scales, w.block[1], 1), 1, 2)
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
    outputs = (2, 2, WIDTH, WIDTH)
    return _Shared(
        sizes=plgpu.SMEM(sizes_shape, jnp.int32),
        ring=tuple(tiled((buffers, *shape), dtype, DEPTH) for shape in kernel.shapes),
        out=persistent.in_one_place(tiled(outputs, out_dtype, WIDTH), plgpu.SMEM(outputs, out_dtype)),
        sizes_arrived=plgpu.Barrier(num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
    )


def _body(kernel: _Product, inputs: _Inputs, out_ref, shared: _Shared) -> None:
    compute = functools.partial(_compute, kernel, inputs, out_ref, shared)
    persistent.share_out(kernel, (inputs.x, inputs.w), inputs.sizes, shared, compute)


def _compute(kernel: _Product, inputs: _Inputs, out_ref, shared: _Shared, tile: Tile, start) -> None:
    warpgroup = lax.axis_index("warpgroup")
    multiply = _multiply if kernel.outside else _multiply_scaled
    zeros = plgpu.layout_cast(jnp.zeros((_ROWS, kernel.tiles.columns), jnp.float32), hopper.MATRIX)
    y = lax.cond(
        tile.steps > 0,
        lambda: multiply(kernel, warpgroup, inputs, shared, tile, start),
        lambda: zeros,
    )
    persistent.store(kernel, warpgroup, out_ref, shared, tile, y.astype(out_ref.dtype))


def _operands(warpgroup, shared: _Shared, count):
    """(buffer, the warpgroup's x, w) of a step, when they are there."""
    x, w = shared.ring
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

    return pl.run_scoped(accumulate, plgpu.ACC((_ROWS, kernel.tiles.columns), exact))


def _multiply_scaled(kernel: _Product, warpgroup, inputs: _Inputs, shared: _Shared, tile: Tile, start):
    """The sums of a warpgroup's rows, scaled step by step."""
    exact = jnp.int32 if inputs.x.dtype == jnp.int8 else jnp.float32
    rows, chain = pl.ds(tile.row + warpgroup * _ROWS, _ROWS), kernel.tiles.chain
    block = jnp.minimum(hopper.floor(tile.column, kernel.w_columns), inputs.w_scales.shape[1] - 1)

    def scales_of(k):
        x_scales = plgpu.load(inputs.x_scales.at[k, rows], layout=hopper.ROWS, optimized=False)
        return x_scales, inputs.w_scales[tile.group, block, k]

    def add(total, sums, scales):
        x_scales, w_scale = scales
        return total + sums.astype(jnp.float32) * hopper.along(x_scales * w_scale, sums.shape, 0)

    def step(k, total, scales, before):
        # A step ahead, since they come from device memory.
        following = scales_of(jnp.minimum(k + 1, kernel.num_steps - 1))
        buffer, x_smem, w_smem = _operands(warpgroup, shared, start + k)

        def multiply(acc):
            plgpu.wgmma(acc, x_smem, w_smem)
            # Added while the product runs.
            added = add(total, *before) if before else total
            return acc[...], added

        sums, added = pl.run_scoped(multiply, plgpu.ACC((_ROWS, kernel.tiles.columns), exact))
        plgpu.barrier_arrive(shared.free.at[buffer])
        return added, following, (sums, scales)

    def steps(first, length: int, carry):
        (total, scales), before = carry, ()
        for i in range(length):
            total, scales, before = step(first + i, total, scales, before)
        return add(total, *before), scales

    zeros = plgpu.layout_cast(jnp.zeros((_ROWS, kernel.tiles.columns), jnp.float32), hopper.MATRIX)
    whole, left = divmod(kernel.num_steps, chain)
    carry = lax.fori_loop(0, whole, lambda k, carry: steps(k * chain, chain, carry), (zeros, scales_of(0)))
    total, _ = steps(kernel.num_steps - left, left, carry) if left else carry
    return total
