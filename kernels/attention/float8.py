"""What attention with float8 operands has besides: their scales, and the order in which its kernel wants the values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quantization.qarray import QArray, quantize

DTYPE = "float8_e4m3fn"
"""Four bits of exponent, three of mantissa: numbers to 448, an eighth apart."""
NO_GRADIENT = f"attention of {DTYPE} has no gradient: train with bfloat16 or float16 operands"
# Of an array that is copied into shared memory, a whole number of the rows that are swizzled there.
_ROW = 128


def quantize_heads(x_BTNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float8_e4m3fn values [B, T, N, H], float32 scale [B, N]) whose product is `x_BTNH`, rounded to nearest.

    A scale for each head of each row of the batch: heads differ in size, and rows are of different texts. Not for each
    token: the keys' scale would then be one multiplication more for each score, and the values' would have to go into
    the weights before they are rounded.
    """
    array = quantize(x_BTNH, DTYPE, (1, None, 1, None))
    return array.values, array.scales[:, 0, :, 0]


def dequantize_heads(values_BTNH: jax.Array, scale_BN: jax.Array, dtype) -> jax.Array:
    """values · scale, computed in float32."""
    return QArray(values_BTNH, scale_BN[:, None, :, None]).dequantize(dtype)


def dequantized(attend: Callable, dtype) -> Callable:
    """`attend` on float8 operands, as numbers of `dtype`; out is bfloat16."""

    def run(q, k, v, *, scales, **arguments):
        operands = (dequantize_heads(x, scale, dtype) for x, scale in zip((q, k, v), scales, strict=True))
        out, lse = attend(*operands, **arguments)
        return out.astype(jnp.bfloat16), lse

    return run


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(run: Callable, q, k, v, scales, marks):
    """run(q, k, v, scales=.., **marks), whose derivative raises ValueError. Whatever is an array is an argument, since
    a function with a rule of its own may not close over traced values."""
    return run(q, k, v, scales=scales, **marks)


@without_gradient.defjvp
def _no_gradient(run, primals, tangents):
    raise ValueError(NO_GRADIENT)


def columns(v_BSKV: jax.Array) -> jax.Array:
    """[B, K, V, S up to a multiple of 128]: values with their keys side by side, within sixteen in the order 0 1 8 9,
    2 3 10 11, 4 5 12 13, 6 7 14 15.

    The matrix unit takes weights from registers with four neighbouring columns in a thread, and leaves scores with two
    of one eight columns and two of the next. A sum over keys does not mind their order, so the values take that of the
    scores, and no weight has to move between threads.
    """
    B, S, K, V = v_BSKV.shape
    if S % _ROW:
        v_BSKV = jnp.pad(v_BSKV, ((0, 0), (0, -S % _ROW), (0, 0), (0, 0)))
    # Of a key within sixteen: which eight, which of four threads, which of its two.
    parts = v_BSKV.reshape(B, -1, 2, 4, 2, K, V)
    return parts.transpose(0, 5, 6, 1, 3, 2, 4).reshape(B, K, V, -1)
