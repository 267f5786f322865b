"""Matrix product with a weight of few bits, and with few-bit activations too where asked for."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.choice import by_name
from kernels.quantized_matmul import reference, xla
from kernels.target import Target, default_target
from quantization.qarray import QArray, quantize

Impl = Literal["auto", "reference", "xla", "pallas"]
Activation = Literal["int8", "float8_e4m3fn", "float8_e5m2"]

_FLOATS = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class QuantizedCase:
    """The static facts of one call: shapes (of one shard, where sharded), dtypes, and which elements share a scale.

    Attributes:
      x_dtype, w_dtype: of the values that are multiplied; a float x is one that stays as it is (weight-only).
      num_rows, in_dim, out_dim: M, K, N.
      x_block: elements of x along M and K that share a scale; None for a float x.
      w_block: the same of w, along K and N.
      w_layout: `QArray.layout` of w. x is always in rows.
      zero_points: whether x or w has them.
    """

    x_dtype: str
    w_dtype: str
    num_rows: int
    in_dim: int
    out_dim: int
    x_block: tuple[int, int] | None
    w_block: tuple[int, int]
    w_layout: str = "rows"
    zero_points: bool = False
    bias: bool = False
    out_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if (self.x_block is None) != (self.x_dtype in _FLOATS):
            raise ValueError(f"quantized_matmul of {self.x_dtype} x with x_block={self.x_block}: only floats have None")

    @property
    def weight_only(self) -> bool:
        return self.x_block is None

    @property
    def scales_outside(self) -> bool:
        """Whether no scale changes along K, so that all are factors of the finished sums."""
        x_outside = self.x_block is None or self.x_block[1] == self.in_dim
        return x_outside and self.w_block[0] == self.in_dim


def supports(impl: Impl, case: QuantizedCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return _tiles(case, target).unsupported(case, target)
        case _:
            raise ValueError(f"quantized_matmul impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def choose(impl: Impl, case: QuantizedCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it; "auto" is decided here.

    Raises ValueError, with the reason, for a named implementation that can't run.
    """
    if impl != "auto":
        return by_name("quantized_matmul", impl, supports(impl, case, target))
    if target.platform == "cpu":
        return "xla", "the only fast implementation for cpu"
    if target.platform == "tpu":
        return "xla", "pallas has been compiled for TPU, and not measured there"
    reason = supports("pallas", case, target)
    if reason is not None:
        return "xla", f"pallas can't: {reason}"
    return _choose_on_hopper(case)


# Of what `choose` says of Hopper: an H100 80GB HBM3, jax 0.11.2, 2026-11-23.
# 4096 x 14336 in FP8 takes XLA 31.5 us at 16 rows and pallas 39, at 64 rows 31.7 and 30.3; in int8 29.4 and 30.6, 38.8
# and 28.5.
_FEW_ROWS = 32


def _choose_on_hopper(case: QuantizedCase) -> tuple[Impl, str]:
    """What was measured fastest, of a case that pallas takes."""
    if case.weight_only:
        from kernels.quantized_matmul.weight_only_tiles import LEAST_ROWS_WIDENED, MOST_ROWS_NARROW, widened_first

        most, least = MOST_ROWS_NARROW[case.w_dtype], LEAST_ROWS_WIDENED.get(case.w_dtype)
        if not widened_first(case):
            return "pallas", f"fastest measured on an H100 up to {most} rows (of one: int8 2.8 TB/s, int4 2.5, XLA 2.1)"
        if least is not None and case.num_rows >= least:
            return (
                "pallas",
                "many rows: a kernel widens the weight first (2,048: int4 1.5 ms, int8 1.7; XLA 2.4 and 1.9)",
            )
        return "xla", f"of more than {most} rows the weight is widened first: faster on an H100"
    if case.scales_outside and case.num_rows <= _FEW_ROWS:
        return "xla", f"fastest measured on an H100 up to {_FEW_ROWS} rows"
    return "pallas", "fastest measured on an H100 (8192 cubed: FP8 1,380 TFLOP/s, int8 1,440; XLA 1,210 and 1,190)"


def _tiles(case: QuantizedCase, target: Target):
    """The module that knows what the target's kernel takes. Not imported before it is asked for."""
    if target.platform == "tpu":
        from kernels.quantized_matmul import tpu_tiles

        return tpu_tiles
    if case.weight_only:
        from kernels.quantized_matmul import weight_only_tiles

        return weight_only_tiles
    from kernels.quantized_matmul import tiles

    return tiles


def quantized_matmul(
    x: jax.Array | QArray,
    w: QArray,
    *,
    activation: Activation | None = None,
    activation_block: tuple[int | None, int | None] = (1, None),
    bias: jax.Array | None = None,
    out_dtype=None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """x · w + bias, summed in float32 (int8 times int8 in int32) and rounded once.

    Args:
      x: [..., K] bfloat16, float16 or float32; or a QArray [M, K] in rows.
      w: [K, N]. Layout "columns" where x is FP8: its tensor cores read columns.
      activation: what a float x is quantised to on the way; None multiplies it as it is (weight-only).
      activation_block: elements of x along M and K that share a scale, as in `quantize`: (1, None) a scale for each
        row, (None, None) one for all, (1, 128) one for each 128 along K.
      bias: [N], added in float32.
      out_dtype: bfloat16, float16 or float32; x's where None, and bfloat16 for a QArray x.
      impl: "auto" chooses for `target`, as `choose` does; a named one that can't run raises.
      target: device kind; None for the default device.

    Returns [..., N].

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that can't run.
    """
    x, rows = _operand(x, activation, activation_block)
    out_dtype = (jnp.bfloat16 if isinstance(x, QArray) else x.dtype) if out_dtype is None else jnp.dtype(out_dtype)
    case = case_of(x, w, bias, out_dtype)
    target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    with jax.named_scope("quantized_matmul"):
        match impl:
            case "reference":
                y = reference.quantized_matmul(x, w, bias, out_dtype)
            case "xla":
                y = xla.quantized_matmul(x, w, bias, out_dtype)
            case "pallas":
                y = _pallas(case, target)(x, w, bias, out_dtype)
    return y.reshape(*rows, case.out_dim)


def _pallas(case: QuantizedCase, target: Target):
    """The target's kernel. Not imported before it is asked for: Pallas's modules take half a second."""
    if target.platform == "tpu":
        from kernels.quantized_matmul import tpu

        return tpu.quantized_matmul
    if case.weight_only:
        from kernels.quantized_matmul import weight_only

        return weight_only.quantized_matmul
    from kernels.quantized_matmul import gpu

    return gpu.quantized_matmul


def _operand(x, activation, activation_block) -> tuple[jax.Array | QArray, tuple[int, ...]]:
    """(x as [M, K], the axes that M stands for)."""
    if isinstance(x, QArray):
        if activation is not None:
            raise ValueError(f"quantized_matmul with activation={activation!r} of an x that is quantised: leave it out")
        if x.ndim != 2 or x.layout != "rows":
            raise ValueError(f"quantized_matmul of a QArray x {list(x.shape)} in {x.layout}: needs [M, K] in rows")
        return x.check(), x.shape[:1]
    if x.ndim < 1 or jnp.dtype(x.dtype).name not in _FLOATS:
        raise ValueError(
            f"quantized_matmul of x {x.dtype}{list(x.shape)}: needs [..., K] of bfloat16, float16 or float32"
        )
    rows, x = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if activation is None:
        return x, rows
    if activation not in get_args(Activation):
        raise ValueError(
            f"quantized_matmul activation={activation!r}: choose None or one of {', '.join(get_args(Activation))}"
        )
    with jax.named_scope("quantize_activation"):
        return quantize(x, activation, activation_block), rows


def case_of(x: jax.Array | QArray, w: QArray, bias: jax.Array | None, out_dtype) -> QuantizedCase:
    """Of x [M, K] and w [K, N], arrays or their descriptions. Raises ValueError where they disagree."""
    if not isinstance(w, QArray):
        raise ValueError(f"quantized_matmul of a w of type {type(w).__name__}: needs a QArray; see quantize")
    w.check()
    given = f"x {list(x.shape)} and w {list(w.shape)}"
    if w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"quantized_matmul of {given}: needs [M, K] and [K, N]")
    if bias is not None and bias.shape != w.shape[1:]:
        raise ValueError(f"quantized_matmul of {given} with bias {list(bias.shape)}: it needs [N]")
    if jnp.dtype(out_dtype).name not in _FLOATS:
        raise ValueError(f"quantized_matmul out_dtype={out_dtype}: choose bfloat16, float16 or float32")
    quantised = isinstance(x, QArray)
    x_name, w_name = (jnp.dtype(array.dtype).name for array in (x, w))
    if quantised and x_name.startswith("float8") != w_name.startswith("float8"):
        raise ValueError(f"quantized_matmul of {x_name} and {w_name}: integers and FP8 can't be multiplied together")
    return QuantizedCase(
        x_dtype=x_name,
        w_dtype=w_name,
        num_rows=x.shape[0],
        in_dim=x.shape[1],
        out_dim=w.shape[1],
        x_block=x.block if quantised else None,
        w_block=w.block,
        w_layout=w.layout,
        zero_points=w.zero_points is not None or (quantised and x.zero_points is not None),
        bias=bias is not None,
        out_dtype=jnp.dtype(out_dtype).name,
    )
