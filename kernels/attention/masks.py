"""What hides a key from a query: as facts of a call, and as its data."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Masks:
    """What hides a key from a query, and what is data of it: `segments`, `positions` (which `causal` and `window` alone
    read: a call without either has none)."""

    num_queries: int
    num_keys: int
    causal: bool
    window: int | None
    segments: bool
    positions: bool

    @property
    def by_data(self) -> bool:
        return self.segments or self.positions

    def hide(self, block: int) -> bool:
        """Whether a block of keys may hold one that a query must not see, or one past the last."""
        return self.causal or self.window is not None or self.segments or self.num_keys % block != 0


class Marks(NamedTuple):
    """int32 [B, T] and [B, S], or None. Segment 0 sees nothing and is seen by none."""

    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    q_positions: jax.Array | None
    kv_positions: jax.Array | None
