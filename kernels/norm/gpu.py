"""A residual sum and its RMSNorm on Hopper, forward and backward, each in one pass over device memory.

A block of threads is one warpgroup, which takes every P-th row of P blocks. Rows come to a ring in shared memory, a few
ahead of the one that is computed: what is on its way does not depend on what registers hold. A row is read from there
once for its sum, and again for its values where registers do not hold it. XLA makes two passes of either direction,
since all of a row is needed before any of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.norm.tiles import LINE, Tiles, choose_tiles

_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


class _Rows:
    """What both directions share: a block's rows, and their pieces."""

    def __init__(self, width: int, num_rows: int, tiles: Tiles):
        self.width, self.num_rows, self.tiles = width, num_rows, tiles
        self.piece = tiles.piece
        # 16 bytes to a thread at a time, side by side; 8 where a piece is narrower.
        shape = (self.piece // LINE, LINE)
        self.layout = plgpu.Layout.WG_STRIDED(shape, vec_size=self.piece // 128)
        self.lines = [pl.ds(start // LINE, self.piece // LINE) for start in range(0, width, self.piece)]

    def read(self, ref, offset: float = 0.0) -> list[Callable[[], jax.Array]]:
        """What gives the pieces of a row, or of a scale with its offset, float32: from registers where they fit there,
        and else it reads them again each time."""

        def load(lines):
            return plgpu.load(ref.at[lines], layout=self.layout, optimized=False)

        def widen(piece):
            piece = piece.astype(jnp.float32)
            return piece + offset if offset else piece

        if self.tiles.in_registers:
            return [functools.partial(widen, load(lines)) for lines in self.lines]
        return [lambda lines=lines: widen(load(lines)) for lines in self.lines]

    def zero(self):
        return plgpu.layout_cast(jnp.zeros((self.piece // LINE, LINE), jnp.float32), self.layout)

    def walk(self, inputs, ring, arrived, compute, carry):
        """`compute(row, buffers, carry, released)` for each row of this block, its inputs in `buffers`; `released` is
        to be called when they were read for the last time."""
        program, depth = lax.axis_index("program"), self.tiles.num_buffers
        count = hopper.floor(self.num_rows - program + self.tiles.num_programs - 1, self.tiles.num_programs)

        def fetch(number, buffer):
            row = program + number * self.tiles.num_programs
            for array, smem in zip(inputs, ring, strict=True):
                plgpu.copy_gmem_to_smem(array.at[row], smem.at[buffer], arrived.at[buffer])

        for number in range(depth):
            pl.when(number < count)(functools.partial(fetch, number, number))

        def step(number, carry):
            buffer = hopper.remainder(number, depth)
            plgpu.barrier_wait(arrived.at[buffer])

            def released():
                # All four warps are done with the buffer before this one.
                plgpu.commit_smem()
                pl.when(number + depth < count)(functools.partial(fetch, number + depth, buffer))

            row = program + number * self.tiles.num_programs
            return compute(row, [smem.at[buffer] for smem in ring], carry, released)

        return lax.fori_loop(0, count, step, carry)

    def call(self, body, inputs, rows, out_types, name: str, interpret):
        """`body(*inputs, *rows, *outs, ring, arrived)`: `rows` of the inputs go through the ring."""
        ring = [plgpu.SMEM((self.tiles.num_buffers, self.width // LINE, LINE), array.dtype) for array in rows]
        arrived = plgpu.Barrier(num_arrivals=len(rows), num_barriers=self.tiles.num_buffers)
        run = plgpu.kernel(
            body,
            out_type=out_types,
            kernel_name=name,
            scratch_types=[tuple(ring), arrived],
            grid=(self.tiles.num_programs,),
            grid_names=("program",),
            compiler_params=_COMPILER,
            interpret=interpret,
        )
        return run(*inputs, *rows)

    def lined(self, array):
        """Rows in lines of what one copy can have of an axis."""
        return array.reshape(*array.shape[:-1], self.width // LINE, LINE)


# A jit of its own each, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("epsilon", "offset", "tiles", "interpret"))
def forward(x, residual, scale, *, epsilon: float, offset: float, tiles: Tiles | None = None, interpret=None):
    """(sum, normed, rstd): x and `residual` [M, D] added; the norm of the sum; and 1 / rms, float32 [M].

    `tiles`: None for the choice of `choose_tiles`. `interpret`: parameters of Pallas's interpreter, of tests.
    """
    num_rows, width = x.shape
    tiles = choose_tiles(num_rows, width, 2, x.dtype.itemsize) if tiles is None else tiles
    kernel = _Rows(width, num_rows, tiles)

    def body(scale_ref, x_ref, residual_ref, sum_ref, normed_ref, rstd_ref, ring, arrived):
        gain = kernel.read(scale_ref, offset)

        def compute(row, buffers, carry, released):
            x_pieces, residual_pieces = map(kernel.read, buffers)

            def summed(i):
                # As if it had been written and read again.
                return (x_pieces[i]() + residual_pieces[i]()).astype(x.dtype).astype(jnp.float32)

            if tiles.in_registers:
                released()
            squares = kernel.zero()
            for i, lines in enumerate(kernel.lines):
                wide = summed(i)
                squares = squares + wide * wide
                sum_ref[row, lines] = wide.astype(x.dtype)
            rstd = lax.rsqrt(jnp.sum(squares) * (1 / width) + epsilon)
            for i, lines in enumerate(kernel.lines):
                normed_ref[row, lines] = (summed(i) * rstd * gain[i]()).astype(x.dtype)
            rstd_ref[row] = rstd
            if not tiles.in_registers:
                released()
            return carry

        kernel.walk((x_ref, residual_ref), ring, arrived, compute, ())

    whole = jax.ShapeDtypeStruct((num_rows, width // LINE, LINE), x.dtype)
    outs = [whole, whole, jax.ShapeDtypeStruct((num_rows,), jnp.float32)]
    rows = [kernel.lined(x), kernel.lined(residual)]
    total, normed, rstd = kernel.call(body, [kernel.lined(scale)], rows, outs, "add_rms_norm", interpret)
    return total.reshape(num_rows, width), normed.reshape(num_rows, width), rstd


@functools.partial(jax.jit, static_argnames=("offset", "tiles", "interpret"))
def backward(x, rstd, scale, d_normed, d_sum, *, offset: float, tiles: Tiles | None = None, interpret=None):
    """(dx, dscale): of the sum x [M, D] that was normed, its `rstd` [M], the gradients of the normed rows, a tuple of
    [M, D] that are added up, and that of the sum. dscale is float32 [D]; other arguments as of `forward`."""
    num_rows, width = x.shape
    num_inputs = 2 + len(d_normed)
    tiles = choose_tiles(num_rows, width, num_inputs, x.dtype.itemsize) if tiles is None else tiles
    kernel = _Rows(width, num_rows, tiles)

    def body(scale_ref, rstd_ref, *refs):
        inputs, (dx_ref, d_scale_ref, ring, arrived) = refs[:num_inputs], refs[num_inputs:]
        gain = kernel.read(scale_ref, offset)

        def compute(row, buffers, totals, released):
            rstd = rstd_ref[row]
            pieces = [kernel.read(buffer) for buffer in buffers]
            x, dy = pieces[0], pieces[1:-1]

            def gradient(i):
                return functools.reduce(jnp.add, [one[i]() for one in dy])

            if tiles.in_registers:
                released()
            products, totals = kernel.zero(), list(totals)
            for i in range(len(kernel.lines)):
                products = products + gradient(i) * gain[i]() * x[i]()
            # rstd comes from device memory: what has not waited for it is done by now.
            mean = jnp.sum(products) * (1 / width) * rstd
            for i, lines in enumerate(kernel.lines):
                normed, dy_piece = x[i]() * rstd, gradient(i)
                totals[i] = totals[i] + dy_piece * normed
                dx = (dy_piece * gain[i]() - normed * mean) * rstd + pieces[-1][i]()
                dx_ref[row, lines] = dx.astype(dx_ref.dtype)
            if not tiles.in_registers:
                released()
            return tuple(totals)

        totals = kernel.walk(inputs, ring, arrived, compute, tuple(kernel.zero() for _ in kernel.lines))
        for total, lines in zip(totals, kernel.lines, strict=True):
            d_scale_ref[lax.axis_index("program"), lines] = total

    outs = [
        jax.ShapeDtypeStruct((num_rows, width // LINE, LINE), x.dtype),
        jax.ShapeDtypeStruct((tiles.num_programs, width // LINE, LINE), jnp.float32),
    ]
    rows = [kernel.lined(array) for array in (x, *d_normed, d_sum)]
    dx, parts = kernel.call(body, [kernel.lined(scale), rstd], rows, outs, "add_rms_norm_gradient", interpret)
    return dx.reshape(num_rows, width), parts.reshape(tiles.num_programs, width).sum(axis=0)
