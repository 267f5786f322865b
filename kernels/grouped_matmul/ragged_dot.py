"""The grouped product by `jax.lax.ragged_dot_general`: native on TPU.

On a CPU and on a GPU XLA multiplies every row by every group's matrix: 31 of 260-440 GFLOP/s on two CPU cores with
8 groups, 101 of 780 TFLOP/s on an H100.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def product(x, w, group_sizes, transpose: bool = False) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; with `transpose`, [M, K] of x [M, N] and the same w."""
    contract = 2 if transpose else 1
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contract,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    y = lax.ragged_dot_general(x, w, group_sizes, numbers, preferred_element_type=_wide(x))
    # What the primitive leaves in rows of no group is not specified.
    grouped = jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes)
    return jnp.where(grouped, y, 0).astype(x.dtype)


def weight_gradient(x, dy, group_sizes) -> jax.Array:
    """[E, K, N]: x^T dy over each group's rows, of x [M, K] and dy [M, N]."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x, dy, group_sizes, numbers, preferred_element_type=_wide(x)).astype(x.dtype)


def _wide(array: jax.Array):
    return jnp.promote_types(array.dtype, jnp.float32)
