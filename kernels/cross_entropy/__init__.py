"""Softmax cross-entropy of rows of logits, and its gradient with respect to them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kernels import hopper_chip
from kernels.choice import by_name
from kernels.cross_entropy import reference
from kernels.cross_entropy.reference import Rows, statistics
from kernels.target import Target, default_target

Impl = Literal["auto", "xla", "pallas"]

__all__ = ["CrossEntropyCase", "Impl", "Rows", "choose", "cross_entropy_rows", "statistics", "supports"]


@dataclasses.dataclass(frozen=True)
class CrossEntropyCase:
    """The static facts of a call: dtype of the logits, how many of a row this device has, whether others have more, and
    whether they are capped."""

    dtype: str
    length: int
    sharded: bool = False
    soft_cap: bool = False


def supports(impl: Impl, case: CrossEntropyCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "xla":
            return None
        case "pallas":
            return _unsupported(case, target)
        case _:
            raise ValueError(f"cross_entropy impl={impl!r} is unknown; choose auto, xla or pallas")


def _unsupported(case: CrossEntropyCase, target: Target) -> str | None:
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.sharded:
        return "the kernel takes whole rows, and here devices share the vocabulary"
    if case.soft_cap:
        return "the kernel takes logits without a cap"
    if case.dtype != "float32":
        return f"the kernel takes float32 logits, not {case.dtype}"
    if case.length % 128 or not case.length:
        return f"the kernel takes a vocabulary in multiples of 128, not {case.length}"
    return None


def choose(impl: Impl, case: CrossEntropyCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it. Raises ValueError for a named one that can't run."""
    if impl == "auto":
        if target.platform != "gpu":
            return "xla", f"the only implementation for {target.platform}"
        reason = supports("pallas", case, target)
        if reason is not None:
            return "xla", f"pallas can't: {reason}"
        return (
            "pallas",
            "fastest measured on an H100 (4096 rows of 32,000: 0.30 ms, XLA 0.66; 2048 of 128,256: 0.91, 1.22)",
        )
    return by_name("cross_entropy", impl, supports(impl, case, target))


def cross_entropy_rows(
    logits_CV: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    *,
    z_loss_coef: float = 0.0,
    soft_cap: float | None = None,
    axes: tuple[str, ...] = (),
    dtype: jax.typing.DTypeLike,
    impl: Impl = "auto",
    target: Target | None = None,
) -> tuple[Rows, jax.Array]:
    """What a token's loss is made of, and weight · d(lse - target's logit + z_loss_coef · lse²) / d logit, in `dtype`
    [C, V]. Not differentiable: it is the derivative.

    Args:
      logits_CV: float32 or wider; capped already where there is a `soft_cap`, whose derivative the gradient then has.
      targets_C: int, in [0, V) wherever the weight is not 0. weights_C: of the logits' dtype.
      axes: mesh axes over which the vocabulary is cut, in a program of each device; V is this one's part.
      impl: "xla", or "pallas" on Hopper; a named one that can't run raises. target: None for the default device.

    Raises ValueError for shapes that disagree and for an `impl` that is unknown or can't run.
    """
    if logits_CV.ndim != 2 or {targets_C.shape, weights_C.shape} != {logits_CV.shape[:1]}:
        raise ValueError(
            f"cross_entropy_rows of logits {list(logits_CV.shape)}, targets {list(targets_C.shape)} and weights "
            f"{list(weights_C.shape)}: needs [C, V], [C] and [C]"
        )
    case = CrossEntropyCase(logits_CV.dtype.name, logits_CV.shape[1], bool(axes), soft_cap is not None)
    impl, _ = choose(impl, case, default_target() if target is None else target)
    if impl == "pallas" and logits_CV.shape[0]:
        from kernels.cross_entropy import gpu

        return gpu.rows_and_gradient(logits_CV, targets_C, weights_C, z_loss_coef=z_loss_coef, dtype=jnp.dtype(dtype))
    rows = reference.statistics(logits_CV, targets_C, axes)
    gradient = reference.gradient(
        logits_CV, targets_C, weights_C, rows, z_loss_coef=z_loss_coef, soft_cap=soft_cap, axes=axes
    )
    return rows, gradient.astype(dtype)
