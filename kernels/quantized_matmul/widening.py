"""Weights of few bits, in fragments, widened in device memory on Hopper: for products of more rows than
`weight_only` takes, which XLA then multiplies.

XLA turns the layout of packed int4 back by a transposition of nine axes: with a product of 64 rows, 8192 x 28672 takes
it 0.65 ms on an H100. Here a thread's elements go out through shared memory as the fragment that they are:
0.24 ms (2.4 TB/s; jax 0.11.2, 2026-11-23), as with buffers of 64 and of 256 rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.quantized_matmul.weight_only_fragments import fragment
from kernels.quantized_matmul.weight_only_tiles import TILE
from quantization.qarray import QArray

if TYPE_CHECKING:
    from kernels.quantized_matmul import QuantizedCase

# Rows of the weight in one buffer, and buffers of a block of threads.
_DEPTH, _NUM_BUFFERS = 128, 3
_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced; `group`: rows of the weight that share a scale."""

    in_dim: int
    out_dim: int
    group: int
    w_dtype: Any
    dtype: Any

    @property
    def depth(self) -> int:
        """Of an axis of one piece Mosaic forgets the coordinate: nothing may lie past it."""
        return min(_DEPTH, self.in_dim)

    @property
    def width(self) -> int:
        """Rows of the weight in one piece: they share a scale."""
        return 64 if self.group % 64 == 0 else 32

    @property
    def lines(self) -> int:
        """Rows of 256 in one buffer."""
        return self.depth * TILE // (8 if self.w_dtype == jnp.int4 else 1) // 256

    @property
    def steps(self) -> int:
        """Of 64 columns."""
        return -(-self.in_dim // self.depth)

    @property
    def num_steps(self) -> int:
        return self.out_dim // TILE * self.steps

    @property
    def num_programs(self) -> int:
        """As many as share the processors at one time. The chip takes 1 KiB for a block of threads."""
        return min(self.num_steps, SHARED_BYTES // (self.shared_bytes + 1024) * NUM_PROCESSORS)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block of threads."""
        buffer = self.depth * TILE * (4 if self.w_dtype == jnp.int4 else 8) // 8
        # Mosaic takes 2 KiB for reductions and a few bytes for barriers.
        return _NUM_BUFFERS * buffer + 2 * self.depth * TILE * 2 + 2048 + 8 * _NUM_BUFFERS

    @property
    def pieces(self) -> int:
        return self.depth // self.width


def shared_bytes(case: QuantizedCase) -> int:
    """Shared memory of one block of threads."""
    w_dtype, dtype = jnp.dtype(case.w_dtype), jnp.dtype(case.x_dtype)
    return _Statics(case.in_dim, case.out_dim, case.w_block[0], w_dtype, dtype).shared_bytes


def product(x: jax.Array, w: QArray, bias: jax.Array | None, out_dtype, interpret=None) -> jax.Array:
    """[M, N] of x [M, K] and w [K, N] in fragments: XLA's product of the widened weight, summed in float32 and rounded
    once (without a bias by the product itself, which saves a pass)."""
    sums = out_dtype if bias is None else jnp.float32
    wide_NK = widened(w, x.dtype, interpret)
    y = lax.dot_general(x, wide_NK, (((1,), (1,)), ((), ())), preferred_element_type=sums)
    return y if bias is None else (y + bias.astype(jnp.float32)).astype(out_dtype)


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def widened(w: QArray, dtype, interpret=None) -> jax.Array:
    """[N, K] of w [K, N] in fragments: `w.dequantize(dtype)` transposed, bit by bit.

    dtype: bfloat16 or float16. `interpret`: parameters of Pallas's interpreter.
    """
    K, N = w.shape
    statics = _Statics(K, N, w.block[0], w.dtype, jnp.dtype(dtype))
    arrays = [w.values.reshape(N // TILE, -1, 256), w.scales]
    arrays += [] if w.zero_points is None else [w.zero_points]
    swizzle = 2 * statics.width
    run = plgpu.kernel(
        functools.partial(_body, statics, w.zero_points is not None),
        out_type=jax.ShapeDtypeStruct((N, K), dtype),
        kernel_name="widened_weight",
        scratch_types=[
            plgpu.SMEM((_NUM_BUFFERS, 1, statics.lines, 256), arrays[0].dtype),
            plgpu.SMEM(
                (2 * statics.pieces, TILE, statics.width),
                dtype,
                transforms=(plgpu.TilingTransform((8, statics.width)), plgpu.SwizzleTransform(swizzle)),
            ),
            plgpu.Barrier(num_arrivals=1, num_barriers=_NUM_BUFFERS),
        ],
        grid=(statics.num_programs,),
        grid_names=("program",),
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    return run(*arrays)


def _body(statics: _Statics, zero_points: bool, w_ref, scales_ref, *refs) -> None:
    zeros_ref = refs[0] if zero_points else None
    out_ref, w_smem, out_smem, arrived = refs[zero_points:]
    # Each program takes as many steps as another, or one more: all of some columns and some of others.
    program, programs = lax.axis_index("program"), statics.num_programs
    first = hopper.floor(program * statics.num_steps, programs)
    end = hopper.floor((program + 1) * statics.num_steps, programs)

    def place_of(number):
        """(columns, rows) that a step begins at, in tiles and in steps."""
        column = hopper.floor(number, statics.steps)
        return column, number - column * statics.steps

    def fetch(number):
        buffer, (column, step) = hopper.remainder(number - first, _NUM_BUFFERS), place_of(number)
        lines = pl.ds(step * statics.lines, statics.lines)
        plgpu.copy_gmem_to_smem(w_ref.at[pl.ds(column, 1), lines], w_smem.at[buffer], arrived.at[buffer])

    def per_column(ref, columns, row):
        group = jnp.minimum(hopper.floor(row, statics.group), ref.shape[0] - 1)
        values = plgpu.load(ref.at[group, columns], layout=hopper.ROWS, optimized=False)
        return hopper.along(values, (TILE, statics.width), 0)

    def widen(number, _):
        buffer, turn = hopper.remainder(number - first, _NUM_BUFFERS), hopper.remainder(number, 2) * statics.pieces
        column, step = place_of(number)
        columns = pl.ds(column * TILE, TILE)
        plgpu.barrier_wait(arrived.at[buffer])
        pieces = []
        for piece in range(statics.pieces):
            row = step * statics.depth + piece * statics.width
            place = {"block": 0, "start": piece * statics.width, "size": statics.width}
            wide = fragment(w_smem.at[buffer], **place, w_dtype=statics.w_dtype, dtype=statics.dtype)
            wide = wide.astype(jnp.float32)
            wide = wide if zeros_ref is None else wide - per_column(zeros_ref, columns, row)
            pieces.append((wide * per_column(scales_ref, columns, row)).astype(statics.dtype))
        # The copies from these places, two steps ago, have read them.
        plgpu.wait_smem_to_gmem(statics.pieces, wait_read_only=True)
        plgpu.commit_smem()
        for piece, wide in enumerate(pieces):
            out_smem[turn + piece] = wide
        plgpu.commit_smem()
        for piece in range(statics.pieces):
            rows = pl.ds(step * statics.depth + piece * statics.width, statics.width)
            plgpu.copy_smem_to_gmem(out_smem.at[turn + piece], out_ref.at[columns, rows])
        # All four warps are done with the buffer since its results were committed.
        pl.when(number + _NUM_BUFFERS < end)(lambda: fetch(number + _NUM_BUFFERS))

    for i in range(_NUM_BUFFERS):
        pl.when(first + i < end)(functools.partial(fetch, first + i))
    lax.fori_loop(first, end, widen, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
