"""A residual sum and its RMSNorm in XLA's own steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_rms_norm(x, residual, scale, *, epsilon: float, offset: float) -> tuple[jax.Array, jax.Array]:
    """(sum, normed); arguments as in `kernels.norm.add_rms_norm`."""
    total = x if residual is None else x + residual
    # fp32: a bfloat16 sum of squares loses the small terms, and this error multiplies the whole residual stream.
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    # The factor taken after the product slows a decode step down.
    return total, (wide * (scale.astype(jnp.float32) + offset)).astype(x.dtype)
