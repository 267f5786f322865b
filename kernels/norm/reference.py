"""A residual sum and its RMSNorm in XLA's own steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_rms_norm(x, residual, scale, *, epsilon: float, offset: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum, normed, rstd [..., 1]); arguments as in `kernels.norm.add_rms_norm`."""
    total = x if residual is None else x + residual
    # fp32: a bfloat16 sum of squares loses the small terms, and this error multiplies the whole residual stream.
    wide = total.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    # XLA's own launches in decode: a Hopper kernel of both in one launch gained nothing (8 layers of llama3-8b on an
    # H100, ms with it and without: 1.662 and 1.661 for 1 row, 1.699 and 1.691 for 8, 2.403 and 2.401 for 128, 3.142 and
    # 3.125 for 256). The factor taken after the product slows that.
    return total, (wide * rstd * (scale.astype(jnp.float32) + offset)).astype(x.dtype), rstd


def multiply(normed, narrow) -> jax.Array:
    """normed · narrow, float32 [..., C]."""
    return jnp.matmul(normed.astype(jnp.float32), narrow, precision=jax.lax.Precision.HIGHEST)
