"""The grouped product as its definition: every group multiplies every row, and a mask keeps its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x_MK, w_EKN, group_sizes_E) -> jax.Array:
    """y_MN in x's dtype, summed in float32 or wider; arguments as in `kernels.grouped_matmul.grouped_matmul`."""
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    row = jnp.arange(x_MK.shape[0])[:, None]
    y = jnp.zeros((x_MK.shape[0], w_EKN.shape[2]), wide)
    stop = 0
    for group in range(w_EKN.shape[0]):
        start, stop = stop, stop + group_sizes_E[group]
        product = jnp.matmul(x_MK.astype(wide), w_EKN[group].astype(wide), precision="highest")
        y = jnp.where((row >= start) & (row < stop), product, y)
    return y.astype(x_MK.dtype)
