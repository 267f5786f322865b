"""Through XLA: few-bit products where its libraries have them, and else a product of dequantised arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from quantization.qarray import QArray


def quantized_matmul(x: jax.Array | QArray, w: QArray, bias: jax.Array | None, out_dtype) -> jax.Array:
    """[M, N] of x [M, K] and w [K, N]."""
    w_scales = jnp.repeat(w.scales, w.block[1], axis=1)
    if not _scales_outside(x, w):
        y = _dequantized(x, w, out_dtype)
    elif isinstance(x, QArray):
        exact = jnp.int32 if x.values.dtype in (jnp.int8, jnp.int4) else jnp.float32
        y = _product(_bytes(x.values), _bytes(w.values), w.layout, exact).astype(jnp.float32)
        # One after the other: two small scales multiplied would be a subnormal, or nothing.
        y = y * jnp.repeat(x.scales, x.block[0], axis=0) * w_scales
    else:
        # int8, int4 and FP8 values are exact in bfloat16 and float16.
        y = _product(x, w.values.astype(x.dtype), w.layout, jnp.float32) * w_scales
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


def _scales_outside(x: jax.Array | QArray, w: QArray) -> bool:
    """Whether all scales are factors of the finished sums, and there are no zero points."""
    arrays = (x, w) if isinstance(x, QArray) else (w,)
    outside = w.scales.shape[0] == 1 and (not isinstance(x, QArray) or x.scales.shape[1] == 1)
    return outside and all(a.zero_points is None and a.layout in ("rows", "columns") for a in arrays)


def _bytes(values: jax.Array) -> jax.Array:
    return values.astype(jnp.int8) if values.dtype == jnp.int4 else values


def _product(x: jax.Array, w: jax.Array, layout: str, dtype) -> jax.Array:
    """Sums of products. A w in columns stays as it lies: XLA's FP8 products want it so."""
    axis = 0 if layout == "rows" else 1
    return lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _dequantized(x: jax.Array | QArray, w: QArray, out_dtype) -> jax.Array:
    """Rounded to 16 bits before the product, unless x or the result has more."""
    narrow = x.dtype if not isinstance(x, QArray) else jnp.promote_types(out_dtype, jnp.bfloat16)
    wide = [a.dequantize(narrow) if isinstance(a, QArray) else a for a in (x, w)]
    return jnp.matmul(*wide, preferred_element_type=jnp.float32)
