"""Activations quantised as they leave a norm or a gate, a scale for each row: the x of the products that follow."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels import hopper_chip
from kernels.choice import by_name
from kernels.quantized_matmul import Activation, Impl
from kernels.target import Target, default_target
from quantization.qarray import QArray, quantize

MAX_WIDTH = 16384
"""Of the kernel: a row lies in the registers of 128 threads."""
_MANY_ROWS = 8192
"""From which the kernel's norm was measured to be faster than XLA's, whose second reading is of the cache below."""


@dataclasses.dataclass(frozen=True)
class ActivationCase:
    """The static facts of one call: dtypes before and after, number and length of the rows that are made, whether by a
    gate, and whether that reads one array with both operands side by side."""

    x_dtype: str
    dtype: str
    num_rows: int
    width: int
    gated: bool
    joined: bool = False


def supports(impl: Impl, case: ActivationCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return _unsupported(case, target)
        case _:
            raise ValueError(f"quantized_activations impl={impl!r} is unknown; choose auto, xla or pallas")


def _unsupported(case: ActivationCase, target: Target) -> str | None:
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.x_dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.x_dtype}"
    if case.width % 512 or not 0 < case.width <= MAX_WIDTH:
        return f"the kernel takes rows of a multiple of 512 up to {MAX_WIDTH}, not of {case.width}"
    return None


def choose(impl: Impl, case: ActivationCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it. Raises ValueError for a named one that can't run."""
    if impl == "auto":
        if target.platform != "gpu":
            return "xla", f"the only implementation for {target.platform}"
        reason = supports("pallas", case, target)
        if reason is not None:
            return "xla", f"pallas can't: {reason}"
        if case.gated:
            return "pallas", "fastest measured on an H100 (16 to 8192 rows of 14336: 18 to 231 us, XLA 23 to 393)"
        if case.num_rows >= _MANY_ROWS:
            return "pallas", "fastest measured on an H100 (8192 rows of 4096: 50 us, XLA 115)"
        return "xla", "fastest measured on an H100 (1024 rows of 4096: 26 us, pallas 32; of fewer they are equal)"
    return by_name("quantized_activations", impl, supports(impl, case, target))


def rms_norm_quantized(
    x: jax.Array,
    gain: jax.Array,
    *,
    epsilon: float,
    offset: float = 0.0,
    dtype: Activation,
    impl: Impl = "auto",
    target: Target | None = None,
) -> QArray:
    """[M, D] with a scale for each row: x / rms(x) · (gain + offset) of x [..., D] in float32, rounded as x is, then
    quantised.

    Several products may read it. Not differentiable where the kernel computes it.

    Args:
      x: bfloat16, float16 or float32; gain: [D], one of these.
      offset: 1 for a gain that is stored as its distance from 1.
      impl: "auto", "xla" or "pallas" (Hopper); a named one that can't run raises. target: None for the default device.

    Raises ValueError for shapes that disagree and for an `impl` that can't run.
    """
    if x.ndim < 1 or gain.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm_quantized of x {list(x.shape)} and gain {list(gain.shape)}: needs [..., D] and [D]")
    return _quantized((x,), gain, {"dtype": dtype, "epsilon": epsilon, "offset": offset}, impl, target)


def swiglu_quantized(
    gate: jax.Array,
    up: jax.Array | None = None,
    *,
    dtype: Activation,
    impl: Impl = "auto",
    target: Target | None = None,
) -> QArray:
    """[M, F] with a scale for each row: silu(gate) · up of [..., F] in float32, rounded as they are, then quantised.

    Without `up`, `gate` is both side by side, [..., 2F] and itself first, as a joined projection leaves them: cut in
    two, they would be copied for a kernel. Other arguments and errors as of `rms_norm_quantized`.
    """
    if up is None:
        if gate.ndim < 1 or gate.shape[-1] % 2:
            raise ValueError(f"swiglu_quantized of {list(gate.shape)} alone: needs gate and up side by side, [..., 2F]")
        arrays = (gate,)
    elif gate.ndim < 1 or gate.shape != up.shape or gate.dtype != up.dtype:
        given = f"gate {gate.dtype}{list(gate.shape)} and up {up.dtype}{list(up.shape)}"
        raise ValueError(f"swiglu_quantized of {given}: they need one shape [..., F] and one dtype")
    else:
        arrays = (gate, up)
    return _quantized(arrays, None, {"dtype": dtype, "epsilon": None, "offset": 0.0}, impl, target)


def _quantized(arrays, gain, statics, impl: Impl, target: Target | None) -> QArray:
    arrays = tuple(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in arrays)
    num_rows, width = arrays[0].shape
    gated, joined = gain is None, gain is None and len(arrays) == 1
    width = width // 2 if joined else width
    case = ActivationCase(arrays[0].dtype.name, statics["dtype"], num_rows, width, gated, joined)
    impl, _ = choose(impl, case, default_target() if target is None else target)
    with jax.named_scope("quantize_activation"):
        if impl == "pallas" and case.num_rows:
            # Not at import: Pallas's modules take half a second.
            from kernels.quantized_matmul import activations_gpu

            return activations_gpu.quantized_rows(arrays, gain, **statics)
        arrays = jnp.split(arrays[0], 2, axis=-1) if joined else arrays
        factors = None if gain is None else gain.astype(jnp.float32) + statics["offset"]
        y = transformed([x.astype(jnp.float32) for x in arrays], factors, statics["epsilon"])
        return quantize(y.astype(case.x_dtype), case.dtype, (1, None))


def transformed(arrays, gain, epsilon: float | None) -> jax.Array:
    """The float32 norm or gate of whole rows, along the last axis."""
    if gain is None:
        gate, up = arrays
        return gate * jax.nn.sigmoid(gate) * up
    (x,) = arrays
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * gain
