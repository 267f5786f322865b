"""AdamW's update on Hopper, in place, in one pass over device memory: 26 bytes a parameter.

A block of threads takes a piece of each array, 16 bytes of float32 to a thread at a time, and reads all of its piece
before it computes: enough blocks have their reads under way on a processor to fill the memory. It is a kernel because
the halves of a parameter must come from one computation of it, and XLA may do it twice, with roundings that differ.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.adamw.halves import from_bits, join
from kernels.adamw.reference import Hyperparameters, moved
from kernels.adamw.tiles import LANES, TILES, Tiles

_COMPILER = plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True)


@functools.partial(jax.jit, static_argnames=("how", "tiles", "interpret"))
def adamw(
    gradient,
    rounded,
    rest,
    mean,
    square,
    factors,
    how: Hyperparameters,
    *,
    tiles: Tiles = TILES,
    interpret: Any = None,
):
    """(rounded, rest, mean, square), in place where those given are not used again.

    `interpret`: parameters of Pallas's interpreter, of tests.
    """
    shape = (gradient.size // (tiles.lines * LANES), tiles.lines, LANES)
    layout = plgpu.Layout.WG_STRIDED(shape[1:], vec_size=tiles.vector)

    def body(gradient_ref, factors_ref, *refs):
        piece = lax.axis_index("piece")
        gradient, rounded, rest, mean, square = (
            plgpu.load(ref.at[piece], layout=layout, optimized=False) for ref in (gradient_ref, *refs)
        )
        apply, *factors = (factors_ref[i] for i in range(5))

        @pl.when(apply != 0)
        def _():
            param, new_mean, new_square = moved(gradient, join(rounded, rest), mean, square, factors, how)
            bits = lax.bitcast_convert_type(param, jnp.int32)
            news = (*from_bits(bits, param != param), new_mean.astype(mean.dtype), new_square)
            for ref, new in zip(refs, news, strict=True):
                ref[piece] = new

    mesh = plgpu.Mesh(grid=(shape[0],), grid_names=("piece",))
    run = pl.kernel(body, (), mesh=mesh, compiler_params=_COMPILER, interpret=interpret, name="adamw")
    refs = [jax.new_ref(one.reshape(shape)) for one in (rounded, rest, mean, square)]
    run(gradient.reshape(shape), factors, *refs)
    return tuple(jax.freeze(ref).reshape(gradient.shape) for ref in refs)
