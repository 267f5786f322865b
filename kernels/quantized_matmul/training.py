"""The linear layer's product in FP8 for training: forward, input gradient and weight gradient, all three."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from kernels.quantized_matmul import Impl, quantized_matmul
from kernels.target import Target
from quantization.qarray import LARGEST, QArray, quantize, round_to

FORWARD, BACKWARD = "float8_e4m3fn", "float8_e5m2"

HISTORY = 16
"""Steps whose magnitudes delayed scaling goes by, unless told otherwise."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingState:
    """Largest magnitudes of the last steps, newest first, float32 [length]: of x, of w and of the result's gradient.

    One for each use of `fp8_matmul` with delayed scaling. A zero is a step that has not been: with nothing but zeros
    the scale is 1.
    """

    x: jax.Array
    w: jax.Array
    gradient: jax.Array

    @staticmethod
    def initial(length: int = HISTORY) -> ScalingState:
        """Raises ValueError for a length below 1."""
        if length < 1:
            raise ValueError(f"a history of {length} steps for delayed scaling: it needs at least 1")
        return ScalingState(*(jnp.zeros(length, jnp.float32) for _ in range(3)))


@dataclasses.dataclass(frozen=True)
class _Call:
    gradient_dtype: str
    impl: Impl
    target: Target | None


def fp8_matmul(
    x: jax.Array,
    w: jax.Array,
    state: ScalingState | None = None,
    *,
    gradient_dtype: str = BACKWARD,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """x · w, both rounded to e4m3 with a scale for each array, summed in float32, rounded once to x's dtype.

    Its gradients are FP8 products too: dx = dy · wᵀ and dw = xᵀ · dy, with dy rounded to `gradient_dtype` and x and w
    as in the forward pass; x is kept for them in 8 bits. dx has x's dtype and dw has w's.

    Scales: without `state`, by each array's largest magnitude now (current scaling); an infinity or a NaN among its
    elements makes NaN of all results. With `state`, by the largest of its history, so that rounding needs no pass over
    the array before it (delayed scaling, as Transformer Engine has it); what is larger saturates, an infinity too. The
    gradient with respect to `state` is the state of the next step, this step's magnitudes in front: put it in the
    state's place, and not through an optimizer. A state that serves two calls would get their sum: give each its own.

    Args:
      x: [..., K]; w: [K, N]; bfloat16, float16 or float32 each.
      gradient_dtype: "float8_e5m2", or "float8_e4m3fn" for one more bit of precision and less range.
      impl, target: as in `quantized_matmul`, for all three products.

    Returns [..., N] in x's dtype. Raises ValueError for shapes or dtypes that disagree.
    """
    if gradient_dtype not in (FORWARD, BACKWARD):
        raise ValueError(f"fp8_matmul gradient_dtype={gradient_dtype!r}: choose {BACKWARD!r} or {FORWARD!r}")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"fp8_matmul of x {list(x.shape)} and w {list(w.shape)}: needs [..., K] and [K, N]")
    if not all(jnp.issubdtype(array.dtype, jnp.floating) for array in (x, w)):
        raise ValueError(f"fp8_matmul of x {x.dtype} and w {w.dtype}: both need to be floating-point")
    call = _Call(gradient_dtype, impl, target)
    with jax.named_scope("fp8_matmul"):
        y = _product(call, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w, state)
    return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: _Call, x, w, state):
    return _forward(call, x, w, state)[0]


def _forward(call: _Call, x, w, state):
    x_8 = _rounded(x, FORWARD, None if state is None else state.x)
    w_8 = _rounded(w, FORWARD, None if state is None else state.w)
    y = _multiply(call, x_8, w_8, x.dtype)
    # Empty arrays that carry the dtypes.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)
    return y, (x_8, w_8, dtypes, None if state is None else (state, _magnitude(x), _magnitude(w)))


def _backward(call: _Call, saved, dy):
    x_8, w_8, (like_x, like_w), history = saved
    dy_8 = _rounded(dy, call.gradient_dtype, None if history is None else history[0].gradient)
    dx = _multiply(call, dy_8, _transposed(w_8), like_x.dtype)
    dw = _multiply(call, _transposed(x_8), dy_8, like_w.dtype)
    if history is None:
        return dx, dw, None
    state, x_max, w_max = history
    pairs = ((x_max, state.x), (w_max, state.w), (_magnitude(dy), state.gradient))
    return dx, dw, ScalingState(*(jnp.concatenate([newest[None], old[:-1]]) for newest, old in pairs))


_product.defvjp(_forward, _backward)


def _magnitude(x: jax.Array) -> jax.Array:
    return jnp.abs(x).max(initial=0).astype(jnp.float32)


def _rounded(x: jax.Array, dtype: str, history: jax.Array | None) -> QArray:
    """With one scale: by its own largest magnitude, or by that of a history. There an infinity or a NaN counts as none,
    so that one bad step does not spoil the next ones."""
    if history is None:
        return quantize(x, dtype, (None, None))
    magnitude = jnp.where(jnp.isfinite(history), history, 0).max()
    scale = jnp.where(magnitude > 0, jnp.maximum(magnitude / LARGEST[dtype], jnp.finfo(jnp.float32).tiny), 1.0)
    return QArray(round_to(x.astype(jnp.float32) / scale, dtype), scale.reshape(1, 1))


def _transposed(x: QArray) -> QArray:
    """The same values in the same place, read as the transposed array."""
    return QArray(x.values, x.scales, None, "columns" if x.layout == "rows" else "rows")


def _multiply(call: _Call, x: QArray, w: QArray, dtype) -> jax.Array:
    """x in rows and w in columns: what FP8's tensor cores read. Moving bytes is what it takes, where they lie
    otherwise."""
    if x.layout != "rows":
        x = QArray(x.values.T, x.scales)
    if w.layout != "columns":
        w = QArray(w.values.T, w.scales, None, "columns")
    return quantized_matmul(x, w, out_dtype=dtype, impl=call.impl, target=call.target)
