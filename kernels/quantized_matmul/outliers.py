"""LLM.int8(): the few columns of activations that are far larger than the others multiplied in 16 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.quantized_matmul import Impl, quantized_matmul
from kernels.target import Target
from quantization.qarray import QArray


def int8_matmul_with_outliers(
    x: jax.Array,
    w: QArray,
    *,
    num_outliers: int,
    threshold: float = 6.0,
    bias: jax.Array | None = None,
    out_dtype=None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """x · w + bias with x in int8 but for its outlier columns (LLM.int8(), arXiv 2208.07339, section 3.2).

    A column of x is an outlier if its largest magnitude is `threshold` or more; where more than `num_outliers` are, the
    `num_outliers` largest (a fixed number, since shapes are). Outlier columns multiply w's dequantised rows in x's
    dtype; all others are quantised to int8, a scale for each row of what is left, and multiply w as `quantized_matmul`
    does. The two are added in float32 and rounded once. Products of an outlier row are rounded as x's dtype rounds the
    dequantised weight.

    Args:
      x: [..., K] bfloat16, float16 or float32.
      w: int8 [K, N].
      num_outliers: at least 1, at most K.
      bias, out_dtype, impl, target: as in `quantized_matmul`; out_dtype defaults to x's.

    Returns [..., N].

    Raises ValueError for `num_outliers` out of range, a w that isn't int8, and what `quantized_matmul` refuses.
    """
    if not 1 <= num_outliers <= x.shape[-1]:
        raise ValueError(f"num_outliers={num_outliers} of K={x.shape[-1]} columns: choose 1 to {x.shape[-1]}")
    if not isinstance(w, QArray) or w.values.dtype != jnp.int8:
        raise ValueError("int8_matmul_with_outliers: w needs to be an int8 QArray; see quantize")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    with jax.named_scope("outliers"):
        largest, columns = jax.lax.top_k(jnp.abs(x).max(tuple(range(x.ndim - 1))).astype(jnp.float32), num_outliers)
        # NaN is an outlier too: it stays in its own rows.
        chosen = ~(largest < threshold)
        is_outlier = jnp.zeros(x.shape[-1], bool).at[columns].set(chosen)
        x_outliers = jnp.where(chosen, x[..., columns], 0)
        y_outliers = jnp.matmul(x_outliers, _rows(w, columns).astype(x.dtype), preferred_element_type=jnp.float32)
    rest = jnp.where(is_outlier, 0, x)
    y = quantized_matmul(rest, w, activation="int8", bias=bias, out_dtype=jnp.float32, impl=impl, target=target)
    return (y + y_outliers).astype(out_dtype)


def _rows(w: QArray, rows: jax.Array) -> jax.Array:
    """float32 [rows, N] of a [K, N] that is stored in columns or in rows."""
    values = w.values[rows] if w.layout == "rows" else w.values[:, rows].T
    blocks = rows // w.block[0]
    values = values.astype(jnp.float32)
    if w.zero_points is not None:
        values = values - jnp.repeat(w.zero_points[blocks], w.block[1], axis=1)
    return values * jnp.repeat(w.scales[blocks], w.block[1], axis=1)
