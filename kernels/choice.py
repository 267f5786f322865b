"""What every operator's `choose` says of an implementation that was asked for by name."""

from __future__ import annotations

from typing import TypeVar

Impl = TypeVar("Impl", bound=str)


def by_name(
    operator: str, impl: Impl, lacking: str | None, others: str = "'auto' or 'xla'", setting: str | None = None
) -> tuple[Impl, str]:
    """The implementation and the reason for it.

    Args:
      lacking: why `impl` can't run, None where it can. others: what can be asked for instead.
      setting: of a run's `kernels`; None for the one that has the operator's name.

    Raises ValueError where it can't run: nothing falls back in silence.
    """
    if lacking is not None:
        where = f"impl (of a run: kernels.{setting or operator})"
        raise ValueError(f"{operator} impl={impl!r} can't run: {lacking}; set {where} to {others}")
    return impl, "asked for by name"
