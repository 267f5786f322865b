"""What the Hopper kernels can take, and how they cut a grouped product into tiles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul import GroupedCase

# Mosaic GPU's interface changes with JAX's minor version; the kernels are compiled with 0.11.2.
JAX_VERSION = jax.__version_info__
SHARED_BYTES = 227 * 1024
NUM_PROCESSORS = 132
# Of two bytes each, in a row of a tile in shared memory: the widest swizzle, of 128 bytes. Also the depth of a step.
WIDTH = 64
# Copies address rows by eights: where a copy of several rows may begin.
ROW_ALIGNMENT = 8
# A box of a copy is at most that long, and the group sizes come in one.
MAX_GROUPS = 256


@dataclasses.dataclass(frozen=True)
class Tiles:
    """rows, columns: of the output, of one block of threads; split: the axis that two warpgroups share out, each with
    at most 64 x 256 or 128 x 128 sums; num_buffers: steps of 64 in shared memory; panel: tiles of rows that are walked
    through side by side, over all columns, before the next ones (what is read again lies in the chip's cache); lead:
    steps (fewer than `num_buffers`) that the first warpgroup is ahead of the second, so that one multiplies while the
    other rounds and writes its sums."""

    rows: int
    columns: int
    split: Literal["rows", "columns"]
    num_buffers: int
    panel: int
    lead: int = 0

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns of a warpgroup."""
        by_rows = self.split == "rows"
        return self.rows // (2 if by_rows else 1), self.columns // (1 if by_rows else 2)

    def by_rows(self) -> Tiles:
        """The same, with the rows shared out."""
        return dataclasses.replace(self, split="rows")


def choose_tiles(num_rows: int, num_groups: int, in_dim: int, out_dim: int) -> Tiles:
    """Of the product x [num_rows, in_dim] by as many matrices [in_dim, out_dim] as there are groups."""
    return Tiles(128, 256, "columns", 4, 16)


def choose_gradient_tiles(num_rows: int, num_groups: int, in_dim: int, out_dim: int) -> Tiles:
    """Of the gradient of those matrices."""
    return Tiles(128, 256, "columns", 4, 16)


def choose_gated_tiles(num_rows: int, num_groups: int, in_dim: int, out_dim: int) -> Tiles:
    """Of two products side by side, of as many sums each: half the columns."""
    return Tiles(128, 128, "rows", 4, 16)


def shared_bytes(tiles: Tiles) -> int:
    """Shared memory of a block of threads: the ring, two pieces of output of each warpgroup, sizes and barriers."""
    ring = tiles.num_buffers * (tiles.rows + tiles.columns) * WIDTH * 2
    return ring + 2 * 2 * WIDTH * WIDTH * 2 + 4 * MAX_GROUPS + 1024


def unsupported(case: GroupedCase, target: Target) -> str | None:
    """Why the kernels can't compute this; None where they can."""
    if target.platform != "gpu" or target.compute_capability != (9, 0):
        return f"the kernel is written for NVIDIA GPUs of compute capability 9.0, and the target is {target}"
    if JAX_VERSION < (0, 11):
        return f"the kernel needs JAX 0.11 (Python 3.12), and this is JAX {'.'.join(map(str, JAX_VERSION))}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.in_dim % WIDTH or case.out_dim % WIDTH or 0 in (case.in_dim, case.out_dim):
        return f"the kernel takes K and N in multiples of {WIDTH}, not K {case.in_dim} and N {case.out_dim}"
    if not 1 <= case.num_groups <= MAX_GROUPS:
        return f"the kernel takes 1 to {MAX_GROUPS} groups, not {case.num_groups}"
    return None
