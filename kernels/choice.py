"""What every operator's `choose` says of an implementation that was asked for by name."""

from __future__ import annotations

from typing import TypeVar

Impl = TypeVar("Impl", bound=str)


def by_name(operator: str, impl: Impl, lacking: str | None, remedy: str | None = None) -> tuple[Impl, str]:
    """The implementation and the reason for it.

    Args:
      lacking: why `impl` can't run, None where it can.
      remedy: what to set to what; None for the argument, or a run's setting of the operator's name, to 'auto' or 'xla'.

    Raises ValueError where it can't run: nothing falls back in silence.
    """
    if lacking is not None:
        remedy = remedy or f"impl (of a run: kernels.{operator}) to 'auto' or 'xla'"
        raise ValueError(f"{operator} impl={impl!r} can't run: {lacking}; set {remedy}")
    return impl, "asked for by name"
