"""What the weight-only kernel for Hopper can take, and how it cuts a product."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.quantized_matmul import QuantizedCase

# Columns of the weight in one matrix product of a warpgroup, and rows and columns of a tile of packed weights.
TILE = 64
GROUPS = (32, 64, 128)
"""Rows of the weight that may share a scale, if not all of them do."""
MAX_ROWS = 64
"""Rows of x of one block of threads."""
FEW_ROWS = 16
"""Rows of x up to which registers hold the sums of twice as many columns, or of four warpgroups of a processor."""
WARPGROUPS_PER_PROCESSOR = 3
"""So that one widens while another multiplies or waits; registers allow for no more of the largest."""
MAX_PARTS = 8
MOST_ROWS_NARROW = {"int4": 512, "int8": 256, "float8_e4m3fn": 256, "float8_e5m2": 256}
"""Rows of x up to which a weight is multiplied as it is; of more it is widened first, in device memory. Microseconds of
8192 x 28672 on an H100 (jax 0.11.2, 2026-11-23), as it is, widened by XLA, and widened by `widening`. int8: of 256 rows
302, 312; of 512 641, 472; of 1,024 -, 942, 920; of 2,048 -, 1895, 1661 and 1755. int4 in groups of 128: of 512 515,
879; of 1,024 -, -, 881; of 2,048 -, 2372, 1542."""
LEAST_ROWS_WIDENED = {"int4": 513, "int8": 1024}
"""Rows of x from which `widening` was measured to be faster than XLA."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """columns: of the weight, of one block of threads; depth: rows of the weight of one buffer; num_buffers: of each
    warpgroup; num_parts: parts that the weight's rows are cut into; rows: of x, of one block of threads;
    num_warpgroups: of one block of threads, which share a part's rows out among them."""

    columns: int
    depth: int
    num_buffers: int
    num_parts: int
    rows: int
    num_warpgroups: int = 1


def widened_first(case: QuantizedCase) -> bool:
    """Whether there are too many rows to multiply the weight as it is."""
    return case.num_rows > MOST_ROWS_NARROW[case.w_dtype]


def choose_tiles(case: QuantizedCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order.

    Microseconds on an H100 (jax 0.11.2, 2026-11-23), tiles as (columns, depth, warpgroups of a processor). 8192 x 28672
    in int8: of 1 row (64, 256, 4) 83.6, (128, 128, 3) 84.7, (64, 128, 4) 87; of 16 84.6, 84.8, 88; of 64 (128, 128, 2)
    97, (64, 128, 2) 137; of 256 278, 302. In int4 with groups of 128: of 1 (64, 512, 4) 47.2, (64, 256, 4) 49.0,
    (128, 256, 3) 49.3; of 16 (64, 256, 4) 48.8, (128, 256, 2) 51.7, (64, 512, 3) 60; of 32 (128, 128, 2) 52,
    (64, 128, 4) 72; of 64 (64, 128, 2) 71, (128, 128, 2) 77; of 128 123, 149. With groups of 64 (64, 256, 4) 51,
    (128, 128, 3) 54; of 32 63, 58. One row of int8 in 4 warpgroups of a block, and in 8: 4096 x 6144 18.7 and 13.2,
    14336 x 4096 28.6 and 25.9, 4096 x 4096 11.1 and 12.2; of int4 9.8 and 20, 18.5 and 24.
    """
    # Zero points and short groups take registers too.
    crowded = case.zero_points or case.w_block[0] < 64
    rows = min(-(-case.num_rows // 8) * 8, MAX_ROWS // 2 if crowded else MAX_ROWS)
    few = rows <= FEW_ROWS
    # 8 KiB of the weight for 64 columns where registers allow for it: what a copy's barrier costs is small beside that.
    depth = 256 if case.w_dtype == "int4" and few and case.w_block[0] >= 128 and not case.zero_points else 128
    row_tiles, steps = -(-case.num_rows // rows), -(-case.in_dim // depth)
    wide_programs = case.out_dim // (2 * TILE) * row_tiles if case.out_dim % (2 * TILE) == 0 else 0
    if wide_programs >= NUM_PROCESSORS and not crowded and rows <= _most_wide_rows(case):
        return _choose_wide(case, rows)
    if few and wide_programs >= NUM_PROCESSORS:
        return _with_buffers(case, Tiles(2 * TILE, depth, 2, 1, rows), WARPGROUPS_PER_PROCESSOR)
    programs = case.out_dim // TILE * row_tiles
    eight = rows <= 8 and case.w_dtype != "int4"
    most = (2 if eight else 1) * WARPGROUPS_PER_PROCESSOR * NUM_PROCESSORS // programs
    num_warpgroups = max(1, min(8 if eight else 4 if few else 2, most, steps // 2))
    # Adding up parts costs a launch: only where the warpgroups would be fewer than processors.
    num_parts = max(1, min(NUM_PROCESSORS // (programs * num_warpgroups), steps // (2 * num_warpgroups), MAX_PARTS))
    tiles = Tiles(TILE, depth, 2, num_parts, rows, num_warpgroups)
    return _with_buffers(case, tiles, max(1, WARPGROUPS_PER_PROCESSOR // num_warpgroups))


def _most_wide_rows(case: QuantizedCase) -> int:
    """Of one block of threads, up to which `_choose_wide` was measured to be faster."""
    return FEW_ROWS * 2 if case.w_dtype == "int4" else MAX_ROWS


def _choose_wide(case: QuantizedCase, rows: int) -> Tiles:
    """Where a weight is wide enough for all processors."""
    if case.w_dtype != "int4" or rows > FEW_ROWS:
        few = rows <= FEW_ROWS
        return _with_buffers(case, Tiles(2 * TILE, 128, 2, 1, rows), WARPGROUPS_PER_PROCESSOR if few else 2)
    # The fewest bytes beside the weight: 16 KiB of it for 64 columns, where registers allow for it.
    return _with_buffers(case, Tiles(TILE, 512 if rows <= 8 and case.w_block[0] >= 128 else 256, 2, 1, rows), 4)


def _with_buffers(case: QuantizedCase, tiles: Tiles, per_processor: int) -> Tiles:
    """As many buffers as `per_processor` blocks of threads have room for, but two at least."""
    share = SHARED_BYTES // per_processor - 1024
    numbers = [n for n in range(3, 9) if shared_bytes(case, dataclasses.replace(tiles, num_buffers=n)) <= share]
    return dataclasses.replace(tiles, num_buffers=max(numbers, default=2))


def shared_bytes(case: QuantizedCase, tiles: Tiles) -> int:
    """Shared memory of one block of threads."""
    buffer = buffer_bytes(case, tiles.rows, tiles.columns, tiles.depth)
    # Mosaic takes 2 KiB for reductions and a few bytes for barriers.
    buffers = tiles.num_warpgroups * tiles.num_buffers
    return buffers * buffer + 4 * tiles.num_warpgroups * tiles.rows * tiles.columns + 2048 + 8 * (buffers + 1)


def buffer_bytes(case: QuantizedCase, rows: int, columns: int, depth: int) -> int:
    """Of so many rows of x and columns of the weight, with their scales."""
    bits = 4 if case.w_dtype == "int4" else 8
    size = columns * depth * bits // 8 + 2 * rows * depth
    if case.zero_points or case.w_block[0] != case.in_dim:
        size += 4 * (1 + case.zero_points) * columns * (depth // case.w_block[0])
    return size


def unsupported(case: QuantizedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.x_dtype not in ("bfloat16", "float16"):
        return f"the kernel takes x of bfloat16 or float16, not {case.x_dtype}"
    if case.w_layout != "fragments":
        return f"the kernel takes a weight in fragments (quantization.qarray.to_fragments), not in {case.w_layout}"
    if case.w_dtype not in ("int4", "int8", "float8_e4m3fn", "float8_e5m2"):
        return f"the kernel takes weights of int4, int8, float8_e4m3fn or float8_e5m2, not {case.w_dtype}"
    if case.w_block[0] not in (*GROUPS, case.in_dim):
        return (
            f"the kernel takes a scale for 32, 64, 128 or all rows of a column of the weight, not for {case.w_block[0]}"
        )
    if case.zero_points and case.w_block[0] not in GROUPS:
        return (
            f"the kernel takes zero points for 32, 64 or 128 rows of a column of the weight, not for {case.w_block[0]}"
        )
    if case.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"the kernel writes bfloat16, float16 or float32, not {case.out_dtype}"
    return None
