"""What the Hopper kernels can take, and how they cut a grouped product into tiles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from kernels import hopper_chip
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul import GroupedCase

# Elements of two bytes in a row of a tile in shared memory: the widest swizzle, of 128 bytes. Also the depth of a step.
WIDTH = 64
# Copies address rows by eights: where a copy of several rows may begin.
ROW_ALIGNMENT = 8
# A copy brings at most so many numbers along an axis, and the group sizes come in one.
MAX_GROUPS = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
    """rows, columns: of the output, of one block of threads; split: the axis that two warpgroups share out, each with
    at most 64 x 256 or 128 x 128 sums; num_buffers: steps of 64 in shared memory; panel: tiles of rows that are walked
    through side by side, over all columns, before the next ones (what is read again lies in the chip's cache); cluster:
    blocks of threads with tiles one below the other, which panel counts as one and which read a group's matrix together
    (not of gradients of weights)."""

    rows: int
    columns: int
    split: Literal["rows", "columns"]
    num_buffers: int
    panel: int
    cluster: int = 1

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of a warpgroup."""
        by_rows = self.split == "rows"
        return self.rows // (2 if by_rows else 1), self.columns // (1 if by_rows else 2)


# Measured on an H100 (80GB HBM3, jax 0.11.2, 2026-11-23), TFLOP/s at 16384 x 4096 x 14336 and the two products of
# moe-1b, 32768 x 1024 x 3584 and x 3584 x 1024, 8 equal groups; and 131072 x 7168 x 2048, 128 groups; beside 751 of a
# dense product of 8192 cubed. Runs differ by 5 to 10% (clocks): no reason to choose by shape.
#   (rows, columns, split, panel)   product              transposed           weight gradient
#   (128, 256, "columns", 4)                             707  674  677  686
#   (128, 256, "columns", 16)       687  679  621  681   684  665  620  630   668  661  660  706
#   (128, 256, "columns", 64)                                                 729  706  723
#   (128, 256, "rows", 4)           706  619  644  718   703  646  620  624   612  707  650  672
#   (128, 256, "rows", 16)          716  607  713  710   717  659  617  580   685  618  642  607
#   (128, 256, "rows", 64)          711  613  644  713                        603  662  660  651
# A first warpgroup that is a step or two ahead of the second, to multiply while that one writes: 4% slower in all.
_PRODUCT = Tiles(128, 256, "rows", 4, 16)
_TRANSPOSED = Tiles(128, 256, "columns", 4, 4)
_WEIGHT_GRADIENT = Tiles(128, 256, "columns", 4, 64)
# Of two products side by side, of half the columns each: 636 TFLOP/s at moe-1b's shape; with panels of 4 631, of 8 628,
# of 32 600.
_GATED = Tiles(128, 128, "rows", 4, 16)
# Of the gradients of gate and up, in microseconds at moe-1b's shape, pairs of one run: (128, 256, "rows", 4) and panel,
# cluster 4, 1: 581, 593, 612; 4, 2: 567, 566, 577; 2, 2 and 8, 2: 567 and 566; 2, 2 of uneven groups 621, and 604
# without. Other products gained nothing from clusters.
_GATED_GRADIENT = Tiles(128, 256, "rows", 4, 4, cluster=2)
# Rows of a group, on average, below which half of many a cluster would have no rows. Not measured.
_CLUSTER_ROWS = 2048


def choose_tiles(out_dim: int, transpose: bool) -> Tiles:
    """Of the product, or of that with the transposed matrices, whose result is `out_dim` wide."""
    return _fit(_TRANSPOSED if transpose else _PRODUCT, out_dim)


def choose_gradient_tiles(out_dim: int) -> Tiles:
    """Of the gradient of matrices [K, out_dim]."""
    return _fit(_WEIGHT_GRADIENT, out_dim)


def choose_gated_tiles() -> Tiles:
    return _GATED


def choose_gated_gradient_tiles(num_rows: int, num_groups: int, out_dim: int) -> Tiles:
    cluster = _GATED_GRADIENT.cluster if num_rows >= _CLUSTER_ROWS * num_groups else 1
    return _fit(dataclasses.replace(_GATED_GRADIENT, cluster=cluster), out_dim)


def _fit(tiles: Tiles, out_dim: int) -> Tiles:
    """Half the columns, and more buffers for it, where a result has no more. Not measured."""
    return dataclasses.replace(tiles, columns=128, num_buffers=6) if out_dim <= 128 else tiles


def shared_bytes(tiles: Tiles, num_matrices: int = 1) -> int:
    """Shared memory of a block of threads: the ring, two places for outputs of each warpgroup, sizes and barriers.
    `num_matrices`: products side by side."""
    ring = tiles.num_buffers * (tiles.rows + num_matrices * tiles.columns) * WIDTH * 2
    return ring + 2 * 2 * WIDTH * WIDTH * 2 + 4 * MAX_GROUPS + 1024


def unsupported(case: GroupedCase, target: Target) -> str | None:
    """Why the kernels can't compute this; None where they can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.in_dim % WIDTH or case.out_dim % WIDTH or 0 in (case.in_dim, case.out_dim):
        return f"the kernel takes K and N in multiples of {WIDTH}, not K {case.in_dim} and N {case.out_dim}"
    if not 1 <= case.num_groups <= MAX_GROUPS:
        return f"the kernel takes 1 to {MAX_GROUPS} groups, not {case.num_groups}"
    return None
