"""How rows are shared out to the blocks of threads of the norms' kernels for Hopper."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.norm import NormCase

LINE = 256
"""Columns in a line of shared memory: the most that one copy has of an axis."""
MAX_WIDTH = 8192
_IN_FLIGHT = 64 * 1024
"""Bytes of rows in shared memory on a processor."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`piece`: columns of a row that a block takes at a time. `num_buffers` rows of each input are in its shared
    memory, and what is read of one stays in registers or is read twice."""

    num_programs: int
    num_buffers: int
    piece: int
    in_registers: bool


def choose_tiles(num_rows: int, width: int, num_inputs: int, itemsize: int) -> Tiles:
    per_processor = 4 if width <= 2048 else 2
    row_bytes = num_inputs * width * itemsize
    buffers = max(2, min(8, _IN_FLIGHT // (per_processor * row_bytes)))
    while per_processor * (buffers * row_bytes + 2048) > SHARED_BYTES and per_processor > 1:
        per_processor -= 1
    piece = 1024 if width % 1024 == 0 else 512
    return Tiles(min(per_processor * NUM_PROCESSORS, num_rows), buffers, piece, width <= 2048)


def shared_bytes(tiles: Tiles, width: int, num_inputs: int, itemsize: int) -> int:
    """Of one block: its buffers, barriers, and what Mosaic takes for reductions."""
    return tiles.num_buffers * (num_inputs * width * itemsize + 8) + 2048


def unsupported(case: NormCase, target: Target) -> str | None:
    """Why the kernels can't compute a case; None where they can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.width % 512 or not 0 < case.width <= MAX_WIDTH:
        return f"the kernel takes rows of a multiple of 512 up to {MAX_WIDTH}, not of {case.width}"
    return None
