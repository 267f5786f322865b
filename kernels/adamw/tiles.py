"""How a parameter is cut for the update's kernel for Hopper."""

from __future__ import annotations

import dataclasses

LANES = 128
"""Threads of a warpgroup, and numbers of a line."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A block of threads takes `lines` lines, and a thread `vector` numbers side by side at a time."""

    lines: int
    vector: int


TILES = Tiles(lines=8, vector=4)
NUMBERS = TILES.lines * LANES
"""Of a block: parameters are multiples of it."""
MANY = 1 << 23
"""From where the kernel is faster than XLA. What it saves of fewer is less than what it may cost: XLA's update reads a
gradient in the layout that a product gives it, and the kernel wants it copied (attention's projections of moe-1b)."""
