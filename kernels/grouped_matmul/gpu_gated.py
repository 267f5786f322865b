"""The gated feed-forward's products on Hopper, each with the elementwise step that would follow or precede it.

hidden: silu(x gate) · (x up) of one reading of x. Its gradients: those of x gate and x up, where d hidden = dy downᵀ
stays in registers. And dx, the sum of two products, as one. Apart, the elementwise steps would read and write seven
arrays of [M, F] between the products: measured in XLA on an H100, 0.67 ms a layer of 32,768 rows of 3,584.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.grouped_matmul import persistent
from kernels.grouped_matmul.gpu import Product, TransposedProduct
from kernels.grouped_matmul.persistent import Tile, rows_from
from kernels.grouped_matmul.tiles import WIDTH, Tiles, choose_gated_tiles, choose_tiles

_COPIER = 2


class _Shared(NamedTuple):
    """As `persistent.Shared`; `ring`: as many operands of a step as the kernel has."""

    sizes: Any
    ring: tuple[Any, ...]
    out: Any
    sizes_arrived: Any
    arrived: Any
    free: Any
    ahead: Any


class _Hidden(Product):
    """x [M, D], gate and up [E, D, F]; hidden [M, F], and x gate and x up where they are asked for."""

    name = "grouped_hidden"
    extra = 0

    @property
    def shapes(self):
        weights = (WIDTH, self.tiles.columns)
        return (self.tiles.rows, WIDTH), weights, weights

    @property
    def sums(self):
        return (self.tiles.piece,) * 2

    def start_copies(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        x, gate, up = inputs
        rows, depth = rows_from(tile.row, self.tiles.rows), pl.ds(step * WIDTH, WIDTH)
        plgpu.copy_gmem_to_smem(x.at[rows, depth], buffers[0], arrived)
        plgpu.copy_gmem_to_smem(self.weights(gate, tile, depth), buffers[1], arrived)
        plgpu.copy_gmem_to_smem(self.weights(up, tile, depth), buffers[2], arrived)

    def multiply(self, sums, buffers, warpgroup) -> None:
        x, gate, up = buffers
        mine = x.at[pl.ds(warpgroup * self.tiles.piece[0], self.tiles.piece[0])]
        plgpu.wgmma(sums[0], mine, gate)
        plgpu.wgmma(sums[1], mine, up)

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared: _Shared) -> None:
        for i in range(self.tiles.piece[1] // WIDTH):
            # Rounded first, so that the gradient is that of what was computed.
            gate, up = (x[:, i * WIDTH : (i + 1) * WIDTH].astype(outs[0].dtype) for x in sums)
            wide = gate.astype(jnp.float32)
            hidden = (wide * _sigmoid(wide) * up.astype(jnp.float32)).astype(outs[0].dtype)
            for j, (ref, values) in enumerate(zip(outs, (hidden, gate, up), strict=False)):
                turn = i * len(outs) + j
                persistent._store(self, warpgroup, ref, shared, tile, values, offset=i * WIDTH, turn=turn)


class _HiddenGradient(TransposedProduct):
    """dy [M, D], down [E, F, D], and x gate and x up [M, F]; the gradients of the last two.

    These arrive in the ring too, after a tile's steps: 64 columns of both in the place of a step's operands.
    """

    name = "grouped_hidden_gradient"

    @property
    def extra(self) -> int:
        return self.tiles.columns // WIDTH

    @property
    def sums(self):
        return (self.tiles.piece,)

    def extent(self, group, begin, size):
        num_rows, steps = super().extent(group, begin, size)
        return num_rows, steps + self.extra

    def start_copies(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        dy, down, gate, up = inputs
        rows, last = rows_from(tile.row, self.tiles.rows), tile.steps - self.extra

        @pl.when(step < last)
        def _():
            depth = pl.ds(step * WIDTH, WIDTH)
            plgpu.copy_gmem_to_smem(dy.at[rows, depth], buffers[0], arrived)
            plgpu.copy_gmem_to_smem(self.weights(down, tile, depth), buffers[1], arrived)

        @pl.when(step >= last)
        def _():
            columns = pl.ds(tile.column + (step - last) * WIDTH, WIDTH)
            plgpu.copy_gmem_to_smem(gate.at[rows, columns], buffers[0], arrived)
            plgpu.copy_gmem_to_smem(up.at[rows, columns], buffers[1].at[pl.ds(0, self.tiles.rows)], arrived)

    def multiply(self, sums, buffers, warpgroup) -> None:
        plgpu.wgmma(sums[0], *self.operands(*buffers, warpgroup))

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared: _Shared) -> None:
        first, (rows, _) = start + tile.steps - self.extra, self.tiles.piece
        for i in range(self.extra):
            buffer = hopper.remainder(first + i, self.tiles.num_buffers)
            plgpu.barrier_wait(shared.arrived.at[buffer])
            mine = pl.ds(warpgroup * rows, rows)
            gate, up = (plgpu.load(ring.at[buffer, mine], layout=hopper.MATRIX) for ring in shared.ring)
            # What was read is no longer needed there.
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.free.at[buffer])
            d_hidden = sums[0][:, i * WIDTH : (i + 1) * WIDTH]
            gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            slope = sigmoid + silu * (1 - sigmoid)
            for turn, values in enumerate((d_hidden * up * slope, d_hidden * silu)):
                values = values.astype(outs[turn].dtype)
                persistent._store(self, warpgroup, outs[turn], shared, tile, values, offset=i * WIDTH, turn=turn)


class _Sum(TransposedProduct):
    """dy [M, F] and w [E, D, F], and another pair; the sum of both dy wᵀ."""

    name = "grouped_matmul_sum"
    extra = 0

    @property
    def sums(self):
        return (self.tiles.piece,)

    def extent(self, group, begin, size):
        num_rows, steps = super().extent(group, begin, size)
        return num_rows, 2 * steps

    def start_copies(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        half = self.in_dim // WIDTH

        def copy(dy, w, step):
            rows, depth = rows_from(tile.row, self.tiles.rows), pl.ds(step * WIDTH, WIDTH)
            plgpu.copy_gmem_to_smem(dy.at[rows, depth], buffers[0], arrived)
            plgpu.copy_gmem_to_smem(self.weights(w, tile, depth), buffers[1], arrived)

        pl.when(step < half)(functools.partial(copy, *inputs[:2], step))
        pl.when(step >= half)(functools.partial(copy, *inputs[2:], step - half))

    def multiply(self, sums, buffers, warpgroup) -> None:
        plgpu.wgmma(sums[0], *self.operands(*buffers, warpgroup))

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared: _Shared) -> None:
        persistent._store(self, warpgroup, outs[0], shared, tile, sums[0].astype(outs[0].dtype))


_Kernel = _Hidden | _HiddenGradient | _Sum


def _sigmoid(x):
    return 1 / (1 + jnp.exp2(x * -hopper.LOG2_E))


# A jit of its own each, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("with_parts", "tiles", "interpret"))
def hidden(x, gate, up, group_sizes, *, with_parts: bool, tiles: Tiles | None = None, interpret=None):
    """silu(x gate) · (x up) [M, F] and, `with_parts`, x gate and x up; of x [M, D], M a multiple of 8, and [E, D, F].

    `tiles`: None for the choice of `choose_gated_tiles`. `interpret`: parameters of Pallas's interpreter, of tests.
    """
    (num_rows, in_dim), (num_groups, _, out_dim) = x.shape, gate.shape
    tiles = choose_gated_tiles(num_rows, num_groups, in_dim, out_dim) if tiles is None else tiles
    assert tiles.split == "rows", tiles
    kernel = _Hidden(num_groups, num_rows, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), x.dtype)
    return _call(kernel, (x, gate, up), group_sizes, [out_type] * (3 if with_parts else 1), interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def hidden_gradient(dy, down, gate, up, group_sizes, *, tiles: Tiles | None = None, interpret=None):
    """Gradients of x gate and x up [M, F], of dy [M, D], down [E, F, D] and those two; arguments as of `hidden`."""
    (num_rows, in_dim), (num_groups, out_dim, _) = dy.shape, down.shape
    tiles = choose_tiles(num_rows, num_groups, in_dim, out_dim) if tiles is None else tiles
    tiles = tiles.by_rows()
    kernel = _HiddenGradient(num_groups, num_rows, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), dy.dtype)
    return _call(kernel, (dy, down, gate, up), group_sizes, [out_type] * 2, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def summed_product(dy, w, other_dy, other_w, group_sizes, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[M, D]: dy wᵀ, dy [M, F] and w [E, D, F], and that of the others, rounded once; arguments as of `hidden`."""
    (num_rows, in_dim), (num_groups, out_dim, _) = dy.shape, w.shape
    tiles = choose_tiles(num_rows, num_groups, 2 * in_dim, out_dim) if tiles is None else tiles
    kernel = _Sum(num_groups, num_rows, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), dy.dtype)
    (dx,) = _call(kernel, (dy, w, other_dy, other_w), group_sizes, [out_type], interpret)
    return dx


def _call(kernel: _Kernel, inputs, group_sizes, out_types, interpret):
    sizes = jnp.pad(group_sizes.astype(jnp.int32), (0, -kernel.num_groups % 4))
    run = plgpu.kernel(
        functools.partial(_body, kernel, len(inputs), len(out_types)),
        out_type=out_types,
        kernel_name=kernel.name,
        scratch_types=list(_scratch(kernel, inputs[0].dtype, sizes.shape)),
        grid=(min(kernel.max_tiles, persistent.NUM_PROCESSORS),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=persistent._COMPILER,
        interpret=interpret,
    )
    return run(*inputs, sizes)


def _scratch(kernel: _Kernel, dtype, sizes_shape) -> _Shared:
    buffers = kernel.tiles.num_buffers
    tiled = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))
    outputs = (2, 2, WIDTH, WIDTH)
    return _Shared(
        sizes=plgpu.SMEM(sizes_shape, jnp.int32),
        ring=tuple(plgpu.SMEM((buffers, *shape), dtype, transforms=tiled) for shape in kernel.shapes),
        out=persistent._in_one_place(plgpu.SMEM(outputs, dtype, transforms=tiled), plgpu.SMEM(outputs, dtype)),
        sizes_arrived=plgpu.Barrier(num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=len(kernel.shapes), num_barriers=buffers),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
        ahead=plgpu.Barrier(num_barriers=1),
    )


def _body(kernel: _Kernel, num_inputs: int, num_outs: int, *refs):
    inputs, sizes_ref, outs = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 : num_inputs + 1 + num_outs]
    shared = _Shared(*refs[num_inputs + 1 + num_outs :])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COPIER)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(sizes_ref, shared.sizes, shared.sizes_arrived.at[0])
        plgpu.barrier_wait(shared.sizes_arrived.at[0])
        total = persistent.walk(kernel, shared.sizes, functools.partial(_copy, kernel, inputs, shared))
        # Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it).
        for buffer in range(kernel.tiles.num_buffers):
            pl.when(buffer < total)(functools.partial(plgpu.barrier_wait, shared.free.at[buffer]))

    @pl.when(warpgroup < _COPIER)
    def _():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(shared.sizes_arrived.at[0])
        persistent.walk(kernel, shared.sizes, functools.partial(_compute, kernel, warpgroup, outs, shared))
        plgpu.wait_smem_to_gmem(0)


def _copy(kernel: _Kernel, inputs, shared: _Shared, tile: Tile, start) -> None:
    buffers = kernel.tiles.num_buffers

    @pl.loop(0, tile.steps)
    def _(step):
        buffer = hopper.remainder(start + step, buffers)
        pl.when(start + step >= buffers)(lambda: plgpu.barrier_wait(shared.free.at[buffer]))
        kernel.start_copies(tile, step, inputs, [ring.at[buffer] for ring in shared.ring], shared.arrived.at[buffer])


def _compute(kernel: _Kernel, warpgroup, outs, shared: _Shared, tile: Tile, start) -> None:
    multiply = functools.partial(_multiply, kernel, warpgroup, shared, tile, start)
    sums = pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in kernel.sums))
    kernel.emit(tile, start, warpgroup, sums, outs, shared)


def _multiply(kernel: _Kernel, warpgroup, shared: _Shared, tile: Tile, start, *sums):
    buffers, lead = kernel.tiles.num_buffers, kernel.tiles.lead
    steps = tile.steps - kernel.extra

    def release(step):
        plgpu.barrier_arrive(shared.free.at[hopper.remainder(start + step, buffers)])

    # Of fewer steps the first warpgroup could be a whole tile ahead, and a barrier counts no further than one.
    staggered = steps >= buffers
    if lead:
        pl.when(staggered & (warpgroup == 1))(lambda: plgpu.barrier_wait(shared.ahead.at[0]))

    @pl.loop(0, steps)
    def _(step):
        buffer = hopper.remainder(start + step, buffers)
        plgpu.barrier_wait(shared.arrived.at[buffer])
        kernel.multiply(sums, [ring.at[buffer] for ring in shared.ring], warpgroup)
        # The products of the step before are complete, and these go on.
        plgpu.wgmma_wait(len(sums))
        if lead:
            begun = staggered & (warpgroup == 0) & (step == lead)
            pl.when(begun)(lambda: plgpu.barrier_arrive(shared.ahead.at[0]))
        pl.when(step > 0)(lambda: release(step - 1))

    plgpu.wgmma_wait(0)
    pl.when(steps > 0)(lambda: release(steps - 1))
    return tuple(sum_[...] for sum_ in sums)
