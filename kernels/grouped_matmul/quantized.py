"""The grouped product with weights of few bits, and with few-bit rows too where asked for."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.choice import by_name
from kernels.debug import check_group_sizes
from kernels.grouped_matmul import grouped_matmul, reference, scaled_tiles, tpu_scaled_tiles, weight_only_tiles
from kernels.quantized_matmul import Activation, QuantizedCase
from kernels.target import Target, default_target
from quantization.qarray import QArray, quantize

Impl = Literal["auto", "reference", "widened", "pallas"]

_FLOATS = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class QuantizedGroupedCase(QuantizedCase):
    """As of one product, of all groups' rows; blocks of w are of one group's matrix."""

    num_groups: int = dataclasses.field(kw_only=True)


def supports(impl: Impl, case: QuantizedGroupedCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "widened":
            return None
        case "pallas":
            if target.platform == "tpu":
                return tpu_scaled_tiles.unsupported(case, target)
            return (weight_only_tiles if case.weight_only else scaled_tiles).unsupported(case, target)
        case _:
            raise ValueError(
                f"quantized_grouped_matmul impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}"
            )


def choose(impl: Impl, case: QuantizedGroupedCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it; "auto" is decided here.

    Raises ValueError for an unknown name and, with the reason, for a named implementation that can't run.
    """
    if impl != "auto":
        remedy = "impl to 'auto' or 'widened' (of a run: kernels.quantized_matmul to 'auto' or 'xla')"
        return by_name("quantized_grouped_matmul", impl, supports(impl, case, target), remedy)
    if target.platform != "gpu":
        return "widened", "the product of dequantised weights"
    reason = supports("pallas", case, target)
    if reason is not None:
        return "widened", f"the product of dequantised weights; pallas can't: {reason}"
    if case.weight_only:
        return "pallas", "fastest measured on an H100 (2 rows of each of 8 experts: w8 194 us, w4 106, widened 644)"
    return "pallas", "fastest measured on an H100 (16384 x 4096 x 14336 in FP8 1,318 TFLOP/s, bfloat16 716)"


def quantized_grouped_matmul(
    x: jax.Array | QArray,
    w: QArray,
    group_sizes: jax.Array,
    *,
    activation: Activation | None = None,
    activation_block: tuple[int | None, int | None] = (1, None),
    out_dtype=None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """y [M, N]: the first group_sizes[0] rows of x are multiplied by w[0], the next group_sizes[1] by w[1], and so on.

    Sums are float32 (int8 times int8: int32), and the result is rounded once. Rows past the sum of the group sizes
    give zeros. Groups may be empty. "pallas" has no gradient.

    Args:
      x: [M, K] bfloat16, float16 or float32; or a QArray [M, K] in rows.
      w: [E, K, N], scales of blocks of one expert each. For "pallas" on Hopper in columns, blocks of (1, K, 1) or
        (1, 128, 128), or weight-only in fragments, blocks of (1, K, 1) or (1, 32 or 64 or 128, 1). On TPU in rows, any
        blocks of a multiple of 8 along K; scales of columns, and of K in blocks longer than all rows, in columns too.
      group_sizes: int32 [E], none negative, with a sum of at most M (checked in debug mode: see `kernels.debug`).
      activation: what a float x is quantised to on the way; None multiplies it as it is (weight-only).
      activation_block: elements of x along M and K that share a scale, as in `quantize`.
      out_dtype: bfloat16, float16 or float32; x's where None, and bfloat16 for a QArray x.
      impl: "auto" chooses for `target`, as `choose` does; "widened" multiplies dequantised weights (and rows).
      target: device kind; None for the default device.

    Raises ValueError for shapes or dtypes that disagree, for an `impl` that is unknown or can't run, and for "pallas"
    where it is differentiated.
    """
    _check(x, w, group_sizes, activation)
    check_group_sizes("quantized_grouped_matmul", group_sizes, x.shape[0])
    if activation is not None:
        with jax.named_scope("quantize_activation"):
            x = quantize(x, activation, activation_block)
    out_dtype = (jnp.bfloat16 if isinstance(x, QArray) else x.dtype) if out_dtype is None else jnp.dtype(out_dtype)
    case = case_of(x, w, out_dtype)
    target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    if case.num_rows == 0:
        return jnp.zeros((0, case.out_dim), out_dtype)
    with jax.named_scope("grouped_matmul"):
        match impl:
            case "reference":
                wide = (a.dequantize() if isinstance(a, QArray) else a.astype(jnp.float32) for a in (x, w))
                return reference.grouped_matmul(*wide, group_sizes).astype(out_dtype)
            case "widened":
                narrow = jnp.promote_types(out_dtype, jnp.bfloat16) if isinstance(x, QArray) else x.dtype
                wide = (a.dequantize(narrow) if isinstance(a, QArray) else a for a in (x, w))
                return grouped_matmul(*wide, group_sizes, target=target).astype(out_dtype)
        # Not at import: Pallas's modules take half a second.
        if target.platform == "tpu":
            from kernels.grouped_matmul import tpu_scaled as kernel
        elif case.weight_only:
            from kernels.grouped_matmul import gpu_weight_only as kernel
        else:
            from kernels.grouped_matmul import gpu_scaled as kernel
        return kernel.product(*_without_gradient((x, w)), group_sizes, out_dtype)


@jax.custom_jvp
def _without_gradient(operands):
    return operands


@_without_gradient.defjvp
def _refuse(primals, tangents):
    raise ValueError("quantized_grouped_matmul impl='pallas' has no gradient; set the impl to 'widened'")


def _check(x, w, group_sizes, activation) -> None:
    if not isinstance(w, QArray):
        raise ValueError(f"quantized_grouped_matmul of a w of type {type(w).__name__}: needs a QArray; see quantize")
    w.check()
    given = f"x {list(x.shape)}, w {list(w.shape)}, group_sizes {list(group_sizes.shape)}"
    if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
        raise ValueError(f"quantized_grouped_matmul of {given}: needs x [M, K], w [E, K, N] and group_sizes [E]")
    if w.block[0] != 1:
        raise ValueError(f"quantized_grouped_matmul of w in blocks of {w.block}: each group needs its own scales")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"quantized_grouped_matmul: group_sizes are {group_sizes.dtype}; they need int32")
    if isinstance(x, QArray):
        if activation is not None or x.layout != "rows":
            raise ValueError(
                f"quantized_grouped_matmul of a QArray x in {x.layout} with activation={activation!r}: "
                "it must be in rows, and activation None"
            )
        x.check()
    elif jnp.dtype(x.dtype).name not in _FLOATS:
        raise ValueError(f"quantized_grouped_matmul of x {x.dtype}: needs bfloat16, float16 or float32, or a QArray")
    elif activation is not None and activation not in get_args(Activation):
        raise ValueError(
            f"quantized_grouped_matmul activation={activation!r}: None or one of {', '.join(get_args(Activation))}"
        )


def case_of(x: jax.Array | QArray, w: QArray, out_dtype) -> QuantizedGroupedCase:
    """Of x [M, K] and w [E, K, N], arrays or their descriptions."""
    quantised = isinstance(x, QArray)
    return QuantizedGroupedCase(
        x_dtype=jnp.dtype(x.dtype).name,
        w_dtype=jnp.dtype(w.dtype).name,
        num_rows=x.shape[0],
        num_groups=w.shape[0],
        in_dim=w.shape[1],
        out_dim=w.shape[2],
        x_block=x.block if quantised else None,
        w_block=w.block[1:],
        w_layout=w.layout,
        zero_points=w.zero_points is not None or (quantised and x.zero_points is not None),
        out_dtype=jnp.dtype(out_dtype).name,
    )
