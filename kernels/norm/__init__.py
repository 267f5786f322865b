"""A residual sum and its RMSNorm."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.choice import by_name
from kernels.norm import reference, tiles
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class NormCase:
    """The static facts of one call: dtype, number and length of the rows (of one shard, where sharded), whether the
    kernel adds a residual to them, how many readers give gradients back, and the columns of the narrow matrix."""

    dtype: str
    num_rows: int
    width: int
    added: bool
    uses: int = 1
    num_columns: int = 0


def supports(impl: Impl, case: NormCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return tiles.unsupported(case, target)
        case _:
            raise ValueError(f"add_rms_norm impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def choose(impl: Impl, case: NormCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it. Raises ValueError for a named one that can't run."""
    if impl == "auto":
        if target.platform != "gpu":
            return "xla", f"the only implementation for {target.platform}"
        if (reason := tiles.unsupported(case, target)) is not None:
            return "xla", f"pallas can't: {reason}"
        if not tiles.beats_xla(case):
            return "xla", "pallas was measured for 8192 rows and more of 1024 to 4096"
        return "pallas", "fastest measured on an H100 (16384 rows of 1024: 52 us, back 54; XLA 62 and 86)"
    return by_name("norm", impl, supports(impl, case, target))


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array,
    narrow: jax.Array | None = None,
    *,
    epsilon: float,
    offset: float = 0.0,
    uses: int = 1,
    impl: Impl = "auto",
    target: Target | None = None,
) -> tuple[jax.Array, ...]:
    """(sum, normed): x + residual, rounded to their dtype, and sum / rms(sum) · (scale + offset) over the last axis.
    With `narrow`, a matrix of few columns as that of a router, (sum, normed, products): normed · narrow besides.

    The norm is taken in float32 and rounded once. What reads x after the norm should read this sum, without a residual
    too: so the gradients of both meet in one pass.

    Args:
      x: [..., D], float; residual: the same, or None for the norm of x itself. scale: [D], float.
      narrow: None or [D, C], float32. The products [..., C] are of the rounded rows, float32 like their sums and their
        gradients. "pallas": C up to 8, D up to 1024, and a residual.
      epsilon: added to the mean square. offset: 1 for a scale that is stored as its distance from 1.
      uses: how many readers the normed rows have. They are returned so many times, and with "pallas" the gradients of
        the readers are added up in float32 as they are read, which is a pass less.
      impl: "auto", "xla" (as "reference") or "pallas" (Hopper); a named one that can't run raises.
      target: device kind; None for the default device.

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that is unknown or can't run.
    """
    _check(x, residual, scale, narrow, uses)
    num_columns = 0 if narrow is None else narrow.shape[1]
    num_rows = math.prod(x.shape[:-1])
    case = NormCase(jnp.dtype(x.dtype).name, num_rows, x.shape[-1], residual is not None, uses, num_columns)
    if impl in ("auto", "pallas"):
        target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    with jax.named_scope("rms_norm"):
        if impl == "pallas" and case.num_rows:
            rows = [None if array is None else array.reshape(case.num_rows, case.width) for array in (x, residual)]
            results = _add_rms_norm(_Statics(epsilon, offset, uses, case.added), *rows, scale, narrow)
            return tuple(result.reshape(*x.shape[:-1], result.shape[-1]) for result in results)
        total, normed, _ = reference.add_rms_norm(x, residual, scale, epsilon=epsilon, offset=offset)
        return total, *(normed,) * uses, *(() if narrow is None else (reference.multiply(normed, narrow),))


def _check(x, residual, scale, narrow, uses: int) -> None:
    given = f"x {x.dtype}{list(x.shape)}, residual {None if residual is None else (residual.dtype, residual.shape)}"
    given = f"{given}, scale {list(scale.shape)}"
    if x.ndim < 1 or scale.shape != x.shape[-1:]:
        raise ValueError(f"add_rms_norm of {given}: needs x [..., D] and scale [D]")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"add_rms_norm of {given}: x and residual need one shape and one dtype")
    if narrow is not None and (narrow.ndim != 2 or narrow.shape[:1] != scale.shape or narrow.dtype != jnp.float32):
        raise ValueError(
            f"add_rms_norm of {given}: narrow {narrow.dtype}{list(narrow.shape)} needs to be float32 [D, C]"
        )
    if uses < 1:
        raise ValueError(f"add_rms_norm: uses={uses}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class _Statics:
    epsilon: float
    offset: float
    uses: int
    added: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_rms_norm(statics: _Statics, x, residual, scale, narrow):
    return _forward(statics, x, residual, scale, narrow)[0]


def _forward(statics: _Statics, x, residual, scale, narrow):
    how = {"epsilon": statics.epsilon, "offset": statics.offset}
    if residual is None:
        # XLA takes the sum of squares in what makes x, and then one pass more (16384 rows of 2048 in 52 us on an H100,
        # a kernel 54).
        total, normed, rstd = reference.add_rms_norm(x, None, scale, **how)
        rstd, products = rstd.squeeze(-1), None
    else:
        # Not at import: Pallas's modules take half a second.
        from kernels.norm import gpu

        total, normed, rstd, products = gpu.forward(x, residual, scale, narrow, **how)
    results = total, *(normed,) * statics.uses, *(() if narrow is None else (products,))
    return results, (total, rstd, scale, narrow)


def _backward(statics: _Statics, saved, gradients):
    from kernels.norm import gpu

    (total, rstd, scale, narrow), (d_total, *d_normed) = saved, gradients
    d_products = None if narrow is None else d_normed.pop()
    given = (total, rstd, scale, tuple(d_normed), d_total, narrow, d_products)
    dx, d_scale, d_narrow = gpu.backward(*given, offset=statics.offset)
    return dx, dx if statics.added else None, d_scale.astype(scale.dtype), d_narrow


_add_rms_norm.defvjp(_forward, _backward)
