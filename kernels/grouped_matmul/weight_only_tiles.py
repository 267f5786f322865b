"""What the grouped kernel of few-bit weights for Hopper can take, and how it cuts a product."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels.grouped_matmul.tiles import MAX_GROUPS, ROW_ALIGNMENT
from kernels.hopper_chip import SHARED_BYTES
from kernels.quantized_matmul import weight_only_tiles
from kernels.quantized_matmul.weight_only_tiles import TILE, Tiles
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul.quantized import QuantizedGroupedCase


MANY_ROWS = 64
"""Of a group, above which its tiles have more of them, and are computed from one reading of x by two warpgroups."""


@dataclasses.dataclass(frozen=True)
class ManyTiles:
    """rows, columns: of the output, of one block of threads, whose two warpgroups have half of the columns each;
    num_buffers: steps in shared memory; panel: as in `tiles.Tiles`; depth: rows of the weight of a step."""

    rows: int
    columns: int
    num_buffers: int
    panel: int = 16
    depth: int = 128

    @property
    def of_warpgroup(self) -> Tiles:
        return Tiles(self.columns // 2, self.depth, self.num_buffers, 1, self.rows)


def choose_tiles(case: QuantizedGroupedCase) -> Tiles | ManyTiles:
    """Static in the shapes: for groups that share the rows evenly. Not measured."""
    if case.num_rows > MANY_ROWS * case.num_groups and case.out_dim % (2 * TILE) == 0:
        return _choose_many(case)
    filled = min(case.num_groups, case.num_rows)
    # A group's first row may be the last of eight, which copies begin at.
    rows = -(-case.num_rows // filled) + ROW_ALIGNMENT - 1
    alike = dataclasses.replace(case, num_rows=rows)
    tiles = weight_only_tiles.choose_tiles(dataclasses.replace(alike, out_dim=filled * case.out_dim))
    if case.out_dim % tiles.columns:
        tiles = weight_only_tiles.choose_tiles(alike)
    return dataclasses.replace(tiles, num_parts=1)


def _choose_many(case: QuantizedGroupedCase) -> ManyTiles:
    # A thread has 240 registers: 128 for sums; where groups have scales half of it, and as much for a group's own sums.
    outside = case.w_block[0] == case.in_dim and not case.zero_points
    columns = 4 * TILE if case.out_dim % (4 * TILE) == 0 else 2 * TILE
    tiles = ManyTiles(rows=128 if outside else 64, columns=columns, num_buffers=2)
    numbers = [n for n in range(3, 9) if shared_bytes(case, dataclasses.replace(tiles, num_buffers=n)) <= SHARED_BYTES]
    return dataclasses.replace(tiles, num_buffers=max(numbers, default=2))


def shared_bytes(case: QuantizedGroupedCase, tiles: Tiles | ManyTiles) -> int:
    """Shared memory of one block of threads."""
    if isinstance(tiles, Tiles):
        return weight_only_tiles.shared_bytes(case, tiles)
    ring = tiles.num_buffers * weight_only_tiles.buffer_bytes(case, tiles.rows, tiles.columns, tiles.depth)
    # Two places for outputs, sizes and barriers.
    return ring + 2 * tiles.rows * TILE * (4 if case.out_dtype == "float32" else 2) + 4 * MAX_GROUPS + 1024


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
