"""What the grouped kernel of few-bit weights for Hopper can take, and how it cuts a product."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels.grouped_matmul.tiles import ROW_ALIGNMENT
from kernels.quantized_matmul import weight_only_tiles
from kernels.quantized_matmul.weight_only_tiles import TILE, Tiles
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul.quantized import QuantizedGroupedCase

MAX_GROUPS = 1024
"""Each block of threads reads all group sizes."""


def choose_tiles(case: QuantizedGroupedCase) -> Tiles:
    """Static in the shapes: for groups that share the rows evenly. Not measured."""
    filled = min(case.num_groups, case.num_rows)
    # A group's first row may be the last of eight, which copies begin at.
    rows = -(-case.num_rows // filled) + ROW_ALIGNMENT - 1
    alike = dataclasses.replace(case, num_rows=rows)
    tiles = weight_only_tiles.choose_tiles(dataclasses.replace(alike, out_dim=filled * case.out_dim))
    if case.out_dim % tiles.columns:
        tiles = weight_only_tiles.choose_tiles(alike)
    return dataclasses.replace(tiles, num_parts=1)


def max_visits(num_rows: int, num_groups: int, length: int) -> int:
    """At least as many stretches of `length` rows, each of one group or of none, as there are for any group sizes.

    A group covers its rows by eights, and shares one with the next at most: of e eights and g groups with rows there
    are e + g - 1, in stretches that may each be full but for the last of a group.
    """
    filled, eights = min(num_groups + 1, num_rows), -(-num_rows // ROW_ALIGNMENT)
    return filled + (eights - 1) // (length // ROW_ALIGNMENT)


def unsupported(case: QuantizedGroupedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := weight_only_tiles.unsupported(case, target)) is not None:
        return reason
    if not 1 <= case.num_groups <= MAX_GROUPS:
        return f"the kernel takes 1 to {MAX_GROUPS} groups, not {case.num_groups}"
    if 0 in (case.in_dim, case.out_dim) or case.in_dim % TILE or case.out_dim % TILE:
        return f"the kernel takes K and N in multiples of {TILE}, not K {case.in_dim} and N {case.out_dim}"
    return None
