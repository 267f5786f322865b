"""How tokens are shared out to the blocks of threads of the kernels of dispatch for Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.row_tiles import Tiles
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.dispatch import DispatchCase

MAX_WIDTH = 8192
_IN_FLIGHT = 192 * 1024
"""Bytes of rows in shared memory on a processor."""


def choose_tiles(num_tokens: int, width: int, num_inputs: int) -> Tiles:
    """8 blocks on a processor where rows fit, and 2 to 4 buffers of each. `num_inputs`: rows read for a token."""
    row_bytes = 2 * num_inputs * width
    per_processor = 8
    while per_processor > 1 and 2 * per_processor * row_bytes > _IN_FLIGHT:
        per_processor -= 1
    buffers = max(2, min(4, _IN_FLIGHT // (per_processor * row_bytes)))
    piece = 1024 if width % 1024 == 0 else 512
    return Tiles(min(per_processor * NUM_PROCESSORS, num_tokens), buffers, piece, in_registers=width <= 2048)


def shared_bytes(tiles: Tiles, width: int, num_inputs: int) -> int:
    """Of one block: its buffers, barriers, and what Mosaic takes for reductions."""
    return tiles.num_buffers * (2 * num_inputs * width + 8) + 2048


def unsupported(case: DispatchCase, target: Target) -> str | None:
    """Why the kernels can't compute a case; None where they can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if not case.rounded:
        return f"the kernel takes gradients of sums in the rows' dtype {case.dtype}"
    if case.width % 512 or not 0 < case.width <= MAX_WIDTH:
        return f"the kernel takes rows of a multiple of 512 up to {MAX_WIDTH}, not of {case.width}"
    num_inputs = 1 + case.per_token
    if shared_bytes(choose_tiles(case.num_tokens, case.width, num_inputs), case.width, num_inputs) > SHARED_BYTES:
        return f"{case.per_token} rows of {case.width} a token do not fit in shared memory"
    return None


def beats_xla(case: DispatchCase) -> bool:
    """Whether the kernels were measured to be faster."""
    return case.num_tokens >= 16384 and case.width == 1024 and case.per_token == 2
