"""Keys and values in 8 bits: a code for each element, and a float32 scale for each position and kv head.

A scale of its own for every vector needs no calibration, and a page that fills up is never quantised again. A kernel
can apply such a scale where there is little to multiply: to a key's scores, and to the weight of a value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantization.qarray import largest_magnitude

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest code of each dtype of quantised pages."""

# What is below the smallest normal float32 may be taken for zero: that is half a step of e4m3, and less of int8.
_LEAST_SCALE = 2**10 * float(jnp.finfo(jnp.float32).tiny)


def scale_bytes(dtype: str) -> int:
    """Bytes of the scale of one position and kv head in pages of `dtype`; 0 where pages have none."""
    return 4 if dtype in LARGEST else 0


def quantize_heads(x_BTKH: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """(codes in `dtype`, float32 scales [B, T, K]): codes · scale is `x`, to half a step of its format at the scale.

    What is not finite makes the scale NaN, and the codes 0: it shows in all that is computed from it, and codes are
    always finite.
    """
    x_BTKH = x_BTKH.astype(jnp.float32)
    scale_BTK = scale_of(largest_magnitude(x_BTKH, -1)[..., 0], dtype)
    codes = jnp.where(jnp.isfinite(scale_BTK)[..., None], x_BTKH / scale_BTK[..., None], 0)
    # The largest quotient may be a little above the largest code, which it then rounds to.
    if jnp.issubdtype(dtype, jnp.integer):
        codes = jnp.round(codes)
    return codes.astype(dtype), scale_BTK


def scale_of(largest, dtype):
    """float32 scale of codes that hold elements of magnitudes up to `largest`; NaN where that is not finite."""
    scale = jnp.maximum(largest * (1 / LARGEST[jnp.dtype(dtype).name]), _LEAST_SCALE)
    return jnp.where(largest < jnp.inf, scale, jnp.nan)


def dequantize(codes: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """Codes [..., H] times scale [...], in `dtype`; the product is taken in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return (codes.astype(wide) * scale[..., None].astype(wide)).astype(dtype)
