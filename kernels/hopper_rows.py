"""Rows of arrays through a ring in shared memory, one at a time: what kernels for Hopper share that make one pass over
device memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.row_tiles import LINE, Tiles

_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


class Rows:
    """Rows of a block of threads, and their pieces."""

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

    def narrow(self, ref, count: int) -> list[jax.Array]:
        """The first columns of a narrow matrix, whose transposed is in `ref`; all of a row is one piece."""
        assert len(self.lines) == 1, self.width
        return [plgpu.load(ref.at[i], layout=self.layout, optimized=False) for i in range(count)]

    def walk(self, inputs, ring, arrived, compute, carry, places=None):
        """`compute(row, buffers, carry, released)` for each row of this block, its inputs in `buffers`; `released` is
        to be called when they were read for the last time. `places(row, i)`: the row of input i that is read for a
        row; None for the same one of all."""
        program, depth = lax.axis_index("program"), self.tiles.num_buffers
        count = hopper.floor(self.num_rows - program + self.tiles.num_programs - 1, self.tiles.num_programs)

        def fetch(number, buffer):
            row = program + number * self.tiles.num_programs
            for i, (array, smem) in enumerate(zip(inputs, ring, strict=True)):
                place = row if places is None else places(row, i)
                # Short rows do not fill theirs.
                to = smem.at[buffer] if array.ndim > 2 else smem.at[buffer, pl.ds(0, array.shape[1])]
                plgpu.copy_gmem_to_smem(array.at[place], to, arrived.at[buffer])

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

    def call(self, body, inputs, rows, out_types, name: str, interpret, scratch=()):
        """`body(*inputs, *rows, *outs, ring, arrived, *scratch)`: `rows` of the inputs go through the ring."""
        ring = [plgpu.SMEM((self.tiles.num_buffers, *_place(array)), array.dtype) for array in rows]
        arrived = plgpu.Barrier(num_arrivals=len(rows), num_barriers=self.tiles.num_buffers)
        run = plgpu.kernel(
            body,
            out_type=out_types,
            kernel_name=name,
            scratch_types=[tuple(ring), arrived, *scratch],
            grid=(self.tiles.num_programs,),
            grid_names=("program",),
            compiler_params=_COMPILER,
            interpret=interpret,
        )
        return run(*inputs, *rows)

    def lined(self, array):
        """Rows in lines of what one copy can have of an axis."""
        return array.reshape(*array.shape[:-1], self.width // LINE, LINE)


def _place(array) -> tuple[int, ...]:
    """Shape of a row's place in shared memory: copies write to multiples of 128 bytes."""
    shape, itemsize = array.shape[1:], array.dtype.itemsize
    return shape if len(shape) > 1 else (-(-shape[0] * itemsize // 128) * 128 // itemsize,)
