"""What the grouped kernel of few-bit weights for Hopper can take, and how it cuts a product."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels.grouped_matmul.tiles import MAX_GROUPS, ROW_ALIGNMENT
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.quantized_matmul import weight_only_tiles
from kernels.quantized_matmul.weight_only_tiles import TILE, Tiles
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul.quantized import QuantizedGroupedCase

LEAST_SHARE = 0.75
"""Of the processors, that have a tile of many rows at least: else more, and smaller ones, are faster."""


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
    """Static in the shapes: for groups that share the rows evenly. Not measured.

    By bytes through L2: of few rows the weight's count alone; of more, x's are as many, which `ManyTiles` reads less
    often.
    """
    filled = min(case.num_groups, case.num_rows)
    # A group's first row may be the last of eight, which copies begin at.
    rows = -(-case.num_rows // filled) + ROW_ALIGNMENT - 1
    many = _choose_many(case, filled, rows) if _aligned(rows, 1) > weight_only_tiles.FEW_ROWS else None
    if many is not None:
        return many
    alike = dataclasses.replace(case, num_rows=rows)
    tiles = weight_only_tiles.choose_tiles(dataclasses.replace(alike, out_dim=filled * case.out_dim))
    if case.out_dim % tiles.columns:
        tiles = weight_only_tiles.choose_tiles(alike)
    return dataclasses.replace(tiles, num_parts=1)


def _choose_many(case: QuantizedGroupedCase, filled: int, rows: int) -> ManyTiles | None:
    """For `filled` groups of `rows` rows; None where that are too few tiles for the processors."""
    most = _most_rows(case)
    count = -(-rows // most)
    # One or two tiles of a group are alike; of more the last one is a small part.
    length = _aligned(rows, count) if count <= 2 else most // TILE * TILE or most
    # Where registers hold the sums of few rows only, they do so for half of the columns.
    for columns in (4 * TILE, 2 * TILE) if most >= TILE else (2 * TILE,):
        num_tiles = filled * count * (case.out_dim // columns)
        if case.out_dim % columns == 0 and num_tiles >= LEAST_SHARE * NUM_PROCESSORS:
            return _with_buffers(case, ManyTiles(length, columns, num_buffers=2))
    return None


def _aligned(rows: int, count: int) -> int:
    """Of each of `count` tiles."""
    return -(-rows // (count * ROW_ALIGNMENT)) * ROW_ALIGNMENT


def _with_buffers(case: QuantizedGroupedCase, tiles: ManyTiles) -> ManyTiles:
    """As many as there is room for, but two at least."""
    numbers = [n for n in range(3, 9) if shared_bytes(case, dataclasses.replace(tiles, num_buffers=n)) <= SHARED_BYTES]
    return dataclasses.replace(tiles, num_buffers=max(numbers, default=2))


def _most_rows(case: QuantizedGroupedCase) -> int:
    """That the 240 registers of a thread hold the sums of without spills, by `python -m kernels.aot`, for 128 columns
    of a warpgroup; of fewer rows than 64, for 64 columns. Where groups have scales, they have sums of their own too."""
    if case.w_block[0] == case.in_dim and not case.zero_points:
        return 128
    if case.zero_points or case.w_block[0] == 32:
        return 32
    return 72 if case.w_block[0] == 128 else 64


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
