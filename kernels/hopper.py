"""Pieces that the Mosaic GPU kernels for Hopper share: layouts of a warpgroup's registers, and its matrix products.

Kernels call these by the module's name, so that tests can put plain products in the place of those that Pallas's
interpreter does not know.
"""

from __future__ import annotations

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""Below any score, and finite: the difference of two of them is 0, not NaN."""
MATRIX = plgpu.Layout.WGMMA
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


def floor(x, divisor: int):
    """x // divisor of what is not negative."""
    return lax.div(x, jnp.int32(divisor)) if divisor > 1 else x


def remainder(x, divisor: int):
    """x % divisor of what is not negative."""
    return lax.rem(x, jnp.int32(divisor))


def along(x, shape: tuple[int, int], axis: int) -> jax.Array:
    """`x` of an axis, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [axis])
