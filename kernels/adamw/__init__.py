"""AdamW's update of a parameter that is held in halves: what products read, in bfloat16, and the rest of its float32.

26 bytes a parameter go through memory and 12 stay there beside the gradient, where float32 parameters with a bfloat16
copy take 28 and 14.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kernels import hopper_chip
from kernels.adamw import reference
from kernels.adamw.halves import join, split
from kernels.adamw.reference import Hyperparameters, step_factors
from kernels.adamw.tiles import MANY, NUMBERS
from kernels.choice import by_name
from kernels.target import Target, default_target

Impl = Literal["auto", "xla", "pallas"]

__all__ = ["AdamWCase", "Hyperparameters", "Impl", "adamw", "choose", "join", "split", "step_factors", "supports"]


@dataclasses.dataclass(frozen=True)
class AdamWCase:
    """The static facts of an update: dtypes of the gradient and of the first moment, and how many numbers (of one
    shard, where sharded) are updated."""

    gradient: str
    mean: str
    num_elements: int


def supports(impl: Impl, case: AdamWCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "xla":
            return None
        case "pallas":
            return _unsupported(case, target)
        case _:
            raise ValueError(f"adamw impl={impl!r} is unknown; choose auto, xla or pallas")


def _unsupported(case: AdamWCase, target: Target) -> str | None:
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    for name, dtype in (("gradients", case.gradient), ("first moments", case.mean)):
        if dtype not in ("float32", "bfloat16"):
            return f"the kernel takes float32 and bfloat16 {name}, not {dtype}"
    if case.num_elements % NUMBERS or not case.num_elements:
        return f"the kernel takes parameters of a multiple of {NUMBERS} numbers, not of {case.num_elements}"
    return None


def choose(impl: Impl, case: AdamWCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it. Raises ValueError for a named one that can't run."""
    if impl == "auto":
        if target.platform != "gpu":
            return "xla", f"the only implementation for {target.platform}"
        if (reason := _unsupported(case, target)) is not None:
            return "xla", f"pallas can't: {reason}"
        if case.gradient != "bfloat16":
            return "xla", "pallas was measured with gradients in bfloat16"
        if case.num_elements < MANY:
            return "xla", f"pallas was measured for {MANY >> 20} million numbers and more"
        return "pallas", "fastest measured on an H100 (29 million numbers: 272 us; XLA 291, with a copy)"
    return by_name("adamw", impl, supports(impl, case, target))


def adamw(
    gradient: jax.Array,
    rounded: jax.Array,
    rest: jax.Array,
    mean: jax.Array,
    square: jax.Array,
    factors: jax.Array,
    how: Hyperparameters,
    *,
    impl: Impl = "auto",
    target: Target | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(rounded, rest, mean, square) after one update; with "pallas" in place where those given are not used again.

    Args:
      gradient: float32 or bfloat16. rounded, rest: the parameter as `split` gives it, bfloat16 and int16. mean: the
        first moment, float32 or bfloat16. square: the second, float32. Five arrays of one shape.
      factors: float32 [5], of `step_factors`; where they say so all stays as it is, bit for bit.
      how: settings of the optimizer.
      impl: "xla" (the specification: XLA may compute a parameter once for each half, with roundings that differ, so it
        is for tests), "pallas" (Hopper) or "auto"; a named one that can't run raises.
      target: device kind; None for the default device.

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that is unknown or can't run.
    """
    _check(gradient, rounded, rest, mean, square, factors)
    case = AdamWCase(jnp.dtype(gradient.dtype).name, jnp.dtype(mean.dtype).name, gradient.size)
    if impl in ("auto", "pallas"):
        target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    if impl == "pallas":
        # Not at import: Pallas's modules take half a second.
        from kernels.adamw import gpu

        return gpu.adamw(gradient, rounded, rest, mean, square, factors, how)
    return reference.adamw(gradient, rounded, rest, mean, square, factors, how)


def _check(gradient, rounded, rest, mean, square, factors) -> None:
    arrays = (gradient, rounded, rest, mean, square)
    given = f"gradient, rounded, rest, mean, square of {[f'{x.dtype}{list(x.shape)}' for x in arrays]}"
    if len({x.shape for x in arrays}) > 1:
        raise ValueError(f"adamw of {given}: they need one shape")
    if (rounded.dtype, rest.dtype, square.dtype) != (jnp.bfloat16, jnp.int16, jnp.float32):
        raise ValueError(f"adamw of {given}: rounded needs bfloat16, rest int16 and square float32")
    if (factors.shape, factors.dtype) != ((5,), jnp.float32):
        raise ValueError(f"adamw: factors {factors.dtype}{list(factors.shape)}; they must be float32[5]")
