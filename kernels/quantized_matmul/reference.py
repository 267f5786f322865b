"""The specification: dequantise, multiply, round once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantization.qarray import QArray


def quantized_matmul(x: jax.Array | QArray, w: QArray, bias: jax.Array | None, out_dtype) -> jax.Array:
    """[M, N] of x [M, K] and w [K, N], in float64 where JAX has it, else in float32."""
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    x_wide, w_wide = (a.dequantize(wide) if isinstance(a, QArray) else a.astype(wide) for a in (x, w))
    y = jnp.matmul(x_wide, w_wide, precision=jax.lax.Precision.HIGHEST)
    return (y if bias is None else y + bias.astype(wide)).astype(out_dtype)
