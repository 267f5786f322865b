"""What the Hopper kernel can take, and how it cuts a call into tiles of queries and blocks of keys."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import SHARED_BYTES
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.attention import AttentionCase

# Rows of one matrix product of a warpgroup.
WARPGROUP_ROWS = 64
# (key width, value width) that compile without spills, as `python -m kernels.aot` reports. Narrower tiles of shared
# memory hold 80 and 96 columns without padding.
WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
FLOAT8_WIDTHS = ((64, 64), (128, 128), (256, 256))
# Keys and values that may be in use at a time: an H100's second-level cache has 50 MiB, and queries and outputs pass
# through it too.
_CACHED_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiles:
    """num_warpgroups: those that multiply, with 64 rows of queries each; block: keys of one block; num_buffers: blocks
    of keys and of values in shared memory; num_queries: tiles of queries there; num_heads: kv heads, of whatever rows,
    whose tiles come in turn, before those of other heads (about)."""

    num_warpgroups: int
    block: int
    num_buffers: int
    num_queries: int
    num_heads: int

    @property
    def rows(self) -> int:
        return self.num_warpgroups * WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that copies: 65,536 in all, handed out in eights."""
        return (240, 24) if self.num_warpgroups == 2 else (160, 32)


def choose_tiles(case: AttentionCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order.

    Scores and outputs lie in registers, 64 rows of each: with wide heads only a short block of keys fits beside them,
    and with narrow ones a third warpgroup does.
    """
    if case.float8:
        num_warpgroups, block = _float8_block(case)
    else:
        num_warpgroups = 3 if case.key_dim <= 64 else 2
        block = 64 if case.value_dim > 128 else 128
    heads = _cached_heads(case)
    # The next tile's queries arrive while one is multiplied, where there is room, and then as many blocks as fit.
    options = [Tiles(num_warpgroups, block, buffers, queries, heads) for queries in (2, 1) for buffers in (4, 3, 2)]
    return next(tiles for tiles in options if shared_bytes(case, tiles) <= SHARED_BYTES)


def _float8_block(case: AttentionCase) -> tuple[int, int]:
    """(warpgroups that multiply, keys of a block). TFLOP/s on an H100 (jax 0.11.2, 2026-11-23), two runs of some:
    heads of 128, full 8192: as here 870, 824; (2, 192) 834, (3, 128) 826, (2, 128) 750, (3, 64) 715. Causal 8192: as
    here 758, 765; (2, 192) 769, 746; (2, 128) 746. Causal 1024: as here 339, (2, 192) 291, (2, 128) 272. Heads of 64:
    as here 581, (2, 256) 516. Heads of 256: as here 959, (2, 64) 915.
    """
    match case.value_dim:
        case 64:
            return 3, 128
        case 128:
            return 3, 96
        case _:
            return 2, 96


def _cached_heads(case: AttentionCase) -> int:
    """Of one row each: as many as the cache holds, so that each key is read from memory once, and then from there."""
    span = case.kv_length if case.window is None else min(case.kv_length, 2 * case.window)
    return max(1, _CACHED_BYTES // (_item_bytes(case) * span * (case.key_dim + case.value_dim)))


def _item_bytes(case: AttentionCase) -> int:
    return 1 if case.float8 else 2


def shared_bytes(case: AttentionCase, tiles: Tiles) -> int:
    """Shared memory of one block of threads: queries, the buffers, segments and positions of keys (int32), and what
    Mosaic takes for reductions and barriers."""
    queries = _item_bytes(case) * tiles.num_queries * tiles.rows * case.key_dim
    if case.float8:
        # Outputs have a place of their own.
        queries += 2 * tiles.rows * case.value_dim
    buffers = _item_bytes(case) * tiles.num_buffers * tiles.block * (case.key_dim + case.value_dim)
    marks = 4 * tiles.block * (1 + (tiles.num_buffers + 1) * (case.segments + case.positions))
    return queries + buffers + marks + 2048 + 1024


def swizzle(width: int) -> int:
    """Bytes of a row of a tile in shared memory, which divides a row of `width` bytes."""
    return math.gcd(width, 128)


def unsupported(case: AttentionCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16", "float8_e4m3fn"):
        return f"the kernel takes bfloat16, float16 and float8_e4m3fn, not {case.dtype}"
    allowed = FLOAT8_WIDTHS if case.float8 else WIDTHS
    if (case.key_dim, case.value_dim) not in allowed:
        widths = ", ".join(f"{key}/{value}" for key, value in allowed)
        return f"the kernel takes {case.dtype} key/value widths of {widths}, not {case.key_dim}/{case.value_dim}"
    if 0 in (case.query_length, case.kv_length):
        return f"the kernel needs a query and a key, not {case.query_length} and {case.kv_length} of them"
    return None
