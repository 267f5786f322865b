"""The gated feed-forward's products on Hopper, each with the elementwise step that would follow or precede it.

hidden: silu(x gate) · (x up) of one reading of x. Its gradients: those of x gate and x up, where d hidden = dy downᵀ
stays in registers. And dx, the sum of two products, as one. Apart, the elementwise steps would be passes of their own
over eight arrays of [M, F]: with them a step of moe-1b takes 93.8 ms on an H100 (jax 0.11.2), 90.3 without. What the
first two read and write would take a third and all of the time of their products, were it not beside them.

hidden at that shape, in microseconds of a layer (2026-11-23, each pair in one run): 779, 810 and 887 with a tile's
results on their way out before the next tile is multiplied, 757, 761 and 764 beside it; of uneven groups 899, and 767.
With one branch that multiplies, not two, so that ptxas no longer waits for each product: 753 beside 926.
Its gradients were slower so, 613 to 820 beside 581: what they read then comes between the operands of the next tile and
holds them up. Nor did it help to ask for that in the L2 cache ahead: 643 beside 593.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from kernels import hopper
from kernels.grouped_matmul import persistent
from kernels.grouped_matmul.gpu import Product, TransposedProduct
from kernels.grouped_matmul.persistent import Shared, Tile, rows_from
from kernels.grouped_matmul.tiles import (
    WIDTH,
    Tiles,
    choose_gated_gradient_tiles,
    choose_gated_tiles,
    choose_tiles,
)


@dataclasses.dataclass(frozen=True)
class _Hidden(Product):
    """x [M, D], gate and up [E, D, F]; hidden [M, F] and, `with_parts`, x gate and x up."""

    with_parts: bool

    name = "grouped_hidden"

    @property
    def shapes(self):
        x, weights = super().shapes
        return x, weights, weights

    @property
    def sums(self):
        return super().sums * 2

    @property
    def num_outs(self) -> int:
        return 3 if self.with_parts else 1

    @property
    def num_parts(self) -> int:
        return self.num_outs * (self.tiles.piece[1] // WIDTH)

    def emit_part(self, part, tile: Tile, warpgroup, kept, outs, shared: Shared) -> None:
        chunk, which = divmod(part, self.num_outs)
        columns = slice(chunk * WIDTH, (chunk + 1) * WIDTH)
        # Rounded, so that the gradient is that of what was computed.
        gate, up = (x[:, columns] for x in kept)
        values = (gate, up)[which - 1] if which else _gated(gate, up)
        persistent.store(self, warpgroup, outs[which], shared, tile, values, offset=columns.start, turn=part)


def _gated(gate, up):
    wide = gate.astype(jnp.float32)
    return (wide * _sigmoid(wide) * up.astype(jnp.float32)).astype(gate.dtype)


class _HiddenGradient(TransposedProduct):
    """dy [M, D], down [E, F, D], and x gate and x up [M, F]; the gradients of the last two.

    These arrive in the ring too, after a tile's steps: 64 columns of both in the place of a step's operands.
    """

    name = "grouped_hidden_gradient"

    @property
    def extra(self) -> int:
        return self.tiles.columns // WIDTH

    def extent(self, group, begin, size):
        num_rows, steps = super().extent(group, begin, size)
        return num_rows, steps + self.extra

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        dy, down, gate, up = inputs
        last = tile.steps - self.extra
        pl.when(step < last)(functools.partial(super().copy, tile, step, (dy, down), buffers, arrived))

        @pl.when(step >= last)
        def _():
            rows, columns = self.tiles.rows, pl.ds(tile.column + (step - last) * WIDTH, WIDTH)
            for array, smem in zip((gate, up), buffers, strict=True):
                source = array.at[rows_from(tile.row, rows), columns]
                plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(0, rows)], arrived)

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared: Shared) -> None:
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
                persistent.store(self, warpgroup, outs[turn], shared, tile, values, offset=i * WIDTH, turn=turn)


class _Sum(TransposedProduct):
    """dy [M, F] and w [E, D, F], and another pair; the sum of both dy wᵀ."""

    name = "grouped_matmul_sum"

    def extent(self, group, begin, size):
        num_rows, steps = super().extent(group, begin, size)
        return num_rows, 2 * steps

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        half = self.in_dim // WIDTH
        pl.when(step < half)(functools.partial(super().copy, tile, step, inputs[:2], buffers, arrived))
        pl.when(step >= half)(functools.partial(super().copy, tile, step - half, inputs[2:], buffers, arrived))


def _sigmoid(x):
    return reciprocal(1 + jnp.exp2(x * -hopper.LOG2_E))


def reciprocal(x) -> jax.Array:
    """1 / x of a float32 matrix, to about a unit in the last place: one instruction, where a division takes ten."""

    @plgpu.inline_mgpu(
        arg_types=(hopper.MATRIX,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=hopper.MATRIX)
    )
    def invert(ctx, matrix):
        del ctx
        return _reciprocals(matrix)

    return invert(x)


def _reciprocals(matrix):
    """Of a Mosaic GPU array, whose registers are pairs."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    inverted = np.empty_like(matrix.registers)
    for index, pair in np.ndenumerate(matrix.registers):
        for i in range(2):
            one = vector.extract(pair, dynamic_position=[], static_position=[i])
            one = llvm.inline_asm(ir.F32Type.get(), [one], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
            pair = vector.insert(one, pair, dynamic_position=[], static_position=[i])
        inverted[index] = pair
    return fragmented_array.FragmentedArray(_registers=inverted, _layout=matrix.layout, _is_signed=None)


# A jit of its own each, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("with_parts", "tiles", "interpret"))
def hidden(x, gate, up, group_sizes, *, with_parts: bool, tiles: Tiles | None = None, interpret=None):
    """silu(x gate) · (x up) [M, F] and, `with_parts`, x gate and x up; of x [M, D], M a multiple of 8, and [E, D, F].

    `tiles`: None for the choice of `choose_gated_tiles`. `interpret`: parameters of Pallas's interpreter, of tests.
    """
    (num_rows, in_dim), (num_groups, _, out_dim) = x.shape, gate.shape
    tiles = choose_gated_tiles() if tiles is None else tiles
    assert tiles.split == "rows", tiles
    kernel = _Hidden(num_groups, num_rows, in_dim, out_dim, tiles, with_parts)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), x.dtype)
    return persistent.call(kernel, (x, gate, up), group_sizes, [out_type] * kernel.num_outs, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def hidden_gradient(dy, down, gate, up, group_sizes, *, tiles: Tiles | None = None, interpret=None):
    """Gradients of x gate and x up [M, F], of dy [M, D], down [E, F, D] and those two; arguments as of `hidden`."""
    (num_rows, in_dim), (num_groups, out_dim, _) = dy.shape, down.shape
    tiles = choose_gated_gradient_tiles(num_rows, num_groups, out_dim) if tiles is None else tiles
    assert tiles.split == "rows" and tiles.rows <= tiles.columns, tiles
    kernel = _HiddenGradient(num_groups, num_rows, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), dy.dtype)
    return persistent.call(kernel, (dy, down, gate, up), group_sizes, [out_type] * 2, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def summed_product(dy, w, other_dy, other_w, group_sizes, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[M, D]: dy wᵀ, dy [M, F] and w [E, D, F], and that of the others, rounded once; arguments as of `hidden`."""
    (num_rows, in_dim), (num_groups, out_dim, _) = dy.shape, w.shape
    tiles = choose_tiles(out_dim, True) if tiles is None else tiles
    kernel = _Sum(num_groups, num_rows, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_rows, out_dim), dy.dtype)
    (dx,) = persistent.call(kernel, (dy, w, other_dy, other_w), group_sizes, [out_type], interpret)
    return dx
