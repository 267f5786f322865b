"""Pieces that the Mosaic GPU kernels for Hopper share: layouts of a warpgroup's registers, and its matrix products.

Kernels call these by the module's name, so that tests can put plain products in the place of those that Pallas's
interpreter does not know.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""Below any score, and finite: the difference of two of them is 0, not NaN."""
MATRIX = plgpu.Layout.WGMMA
FLOAT8 = plgpu.Layout.WGMMA_8BIT
"""Of a float8 matrix that is the first operand of a product."""
ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Of a matrix: a value for each row, and one for each column."""


def product(a_smem, b_smem) -> jax.Array:
    """a · b of what is in shared memory, float32."""

    def multiply(acc):
        plgpu.wgmma(acc, a_smem, b_smem)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_smem.shape[0], b_smem.shape[1]), jnp.float32))


def weigh(out, weights, v_smem) -> jax.Array:
    """out + weights · V, accumulated in place. The interpreter knows neither `run_state` nor a product of what is in
    registers."""

    def multiply(acc):
        plgpu.wgmma(acc, weights, v_smem)

    return pl.run_state(multiply)(plgpu.ACC.init(out))


def weigh_and_score(out, weights, v_smem, q_smem, k_smem, issued) -> tuple[jax.Array, jax.Array]:
    """(out + weights · V, q · Kᵀ), one after the other without a wait between them; `issued` is called meanwhile."""

    def multiply(refs):
        out_acc, scores_acc = refs
        plgpu.wgmma(out_acc, weights, v_smem)
        plgpu.wgmma(scores_acc, q_smem, k_smem.T)
        issued()

    zeros = plgpu.layout_cast(jnp.zeros((q_smem.shape[0], k_smem.shape[0]), jnp.float32), MATRIX)
    return pl.run_state(multiply)((plgpu.ACC.init(out), plgpu.ACC.init(zeros)))


def score_and_weigh(q_smem, k_smem, out, weights, v_smem, issued, soften, num_rows: int):
    """(soften(q · Kᵀ), out + weights · V): the second goes on while the first is softened.

    `issued` is called as soon as both products are. `soften` gives [a matrix like the scores, from which the next
    weights are rounded, `num_rows` float32 values of each row], the first of these positive and made from the matrix.
    """

    def multiply(refs):
        scores_acc, out_acc, softened = refs
        plgpu.wgmma(scores_acc, q_smem, k_smem.T)
        plgpu.wgmma(out_acc, weights, v_smem)
        issued()
        matrix, first, *rest = soften(plgpu.wgmma_accumulator_load(scores_acc, wait_n=1))
        # Or the compiler waits for the second product before it makes the matrix, to have registers sooner.
        for ref, array in zip(softened, (matrix, _settled(first), *rest), strict=True):
            ref[...] = array

    shape = (q_smem.shape[0], k_smem.shape[0])
    zeros, row = (
        plgpu.layout_cast(jnp.zeros(*x, jnp.float32), y) for x, y in (((shape,), MATRIX), ((shape[:1],), ROWS))
    )
    _, out, softened = pl.run_state(multiply)((plgpu.ACC.init(zeros), plgpu.ACC.init(out), [zeros] + num_rows * [row]))
    return softened, out


def _settled(rows) -> jax.Array:
    """`rows`, positive numbers, behind a branch on them that is never taken: instructions do not move across it."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=plgpu.ShapeDtypeStruct(rows.shape, jnp.float32, layout=ROWS))
    def settle(ctx, array):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf, vector

        del ctx
        zero = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))
        numbers = [vector.extract(one, dynamic_position=[], static_position=[0]) for one in array.registers.flat]
        least = functools.reduce(arith.minimumf, numbers)
        branch = scf.IfOp(arith.cmpf(arith.CmpFPredicate.OLT, least, zero))
        with ir.InsertionPoint(branch.then_block):
            llvm.inline_asm(None, [], "nanosleep.u32 1;", "", has_side_effects=True)
            scf.yield_([])
        return array

    return settle(rows)


def floor(x, divisor: int):
    """x // divisor of what is not negative."""
    return lax.div(x, jnp.int32(divisor)) if divisor > 1 else x


def remainder(x, divisor: int):
    """x % divisor of what is not negative."""
    return lax.rem(x, jnp.int32(divisor))


def along(x, shape: tuple[int, int], axis: int) -> jax.Array:
    """`x` of an axis, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [axis])


def float8_operand(weights) -> jax.Array:
    """float32 [64, n] as the first operand of a float8_e4m3fn product, n a multiple of 16.

    Within sixteen columns their order becomes 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15, which moves nothing between
    threads: four in a row are what a thread has. The second operand's rows must have that order too. What is above 448
    becomes 448.
    """
    rows, columns = weights.shape

    @plgpu.inline_mgpu(
        arg_types=(MATRIX,),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn, layout=FLOAT8),
    )
    def pack(ctx, matrix):
        del ctx
        return _packed_float8(matrix)

    return pack(weights)


def _packed_float8(matrix):
    """A Mosaic GPU array of `float8_operand`'s layout."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    layout = fragmented_array.WGMMA_LAYOUT_8BIT
    shape = layout.registers_shape(matrix.shape)
    # Registers of a thread: pairs by [eights of columns, eights of rows], and fours by [sixteens, eights of rows].
    pairs = matrix.registers.reshape(matrix.shape[0] // 64, matrix.shape[1] // 8, 2)
    fours = np.empty((pairs.shape[0], pairs.shape[1] // 2, 2), dtype=object)
    word, bytes_of = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    narrow = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    for i, j, half in np.ndindex(fours.shape):
        floats = [
            vector.extract(pairs[i, 2 * j + k, half], dynamic_position=[], static_position=[one])
            for k in range(2)
            for one in range(2)
        ]
        packed = llvm.inline_asm(word, floats, narrow, "=r,f,f,f,f")
        one_word = vector.broadcast(ir.VectorType.get((1,), word), packed)
        fours[i, j, half] = vector.bitcast(bytes_of, one_word)
    return fragmented_array.FragmentedArray(_registers=fours.reshape(shape), _layout=layout, _is_signed=None)
