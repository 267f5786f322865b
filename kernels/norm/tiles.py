"""How rows are shared out to the blocks of threads of the norms' kernels for Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.row_tiles import Tiles
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.norm import NormCase

MAX_WIDTH = 8192
MAX_NARROW, MAX_WIDTH_NARROW = 8, 1024
"""Columns of a matrix that is multiplied on the way, and rows with which it is: a thread has its share of the matrix,
and back that of its gradient too, in registers, 64 of them each."""
_IN_FLIGHT = 192 * 1024
"""Bytes of rows in shared memory on a processor."""
_MANY_ROWS, _MEASURED_WIDTHS = 8192, (1024, 4096)
"""From where, and between which, the kernels were measured to be faster than XLA's."""


def choose_tiles(num_rows: int, width: int, num_inputs: int, itemsize: int, num_columns: int = 0) -> Tiles:
    """4 blocks on a processor, 8 of short rows and 2 of long ones, and 2 to 4 buffers of each: on an H100, sums of 8192
    rows of 4096 and their norms take 106 us with 4 blocks and 3 buffers, 109 with 2 and 4, 122 with 1 and 8."""
    row_bytes = num_inputs * width * itemsize
    per_processor = 2 if width > 4096 else 8 if num_inputs * width <= 2048 else 4
    if num_columns:
        # Registers have no more: about 110 a thread forward and 200 back.
        per_processor = 4 if num_inputs == 2 else 2
    while per_processor > 1 and 2 * per_processor * row_bytes > _IN_FLIGHT:
        per_processor -= 1
    buffers = max(2, min(4, _IN_FLIGHT // (per_processor * row_bytes)))
    piece = 1024 if width % 1024 == 0 else 512
    return Tiles(min(per_processor * NUM_PROCESSORS, num_rows), buffers, piece, in_registers=width <= 2048)


def shared_bytes(tiles: Tiles, width: int, num_inputs: int, itemsize: int, num_columns: int = 0) -> int:
    """Of one block: its buffers, barriers, sums of a narrow product, and what Mosaic takes for reductions."""
    narrow = 128 * tiles.num_buffers + 1024 if num_columns else 0
    return tiles.num_buffers * (num_inputs * width * itemsize + 8) + narrow + 2048


def unsupported(case: NormCase, target: Target) -> str | None:
    """Why the kernels can't compute a case; None where they can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.width % 512 or not 0 < case.width <= MAX_WIDTH:
        return f"the kernel takes rows of a multiple of 512 up to {MAX_WIDTH}, not of {case.width}"
    if case.num_columns and (case.num_columns > MAX_NARROW or case.width > MAX_WIDTH_NARROW):
        most = f"up to {MAX_NARROW} columns, and rows up to {MAX_WIDTH_NARROW}"
        return f"the kernel takes a narrow matrix of {most}, not [{case.width}, {case.num_columns}]"
    if case.num_columns and not case.added:
        return "the kernel multiplies with a narrow matrix where it adds a residual"
    shape = case.width, case.uses + 2, 2, case.num_columns
    if shared_bytes(choose_tiles(case.num_rows, *shape), *shape) > SHARED_BYTES:
        return f"the gradients of uses={case.uses} readers of rows of {case.width} do not fit in shared memory"
    return None


def beats_xla(case: NormCase) -> bool:
    """Whether the kernels were measured to be faster."""
    least, most = _MEASURED_WIDTHS
    if case.num_columns:
        # With 8 columns on an H100, us: 57 and back 74; without, 53 and 53, and XLA's products and their sums besides,
        # 189 in all where the kernels take 157.
        return case.num_rows >= 16384 and case.width == MAX_WIDTH_NARROW
    return case.num_rows >= _MANY_ROWS and least <= case.width <= most
