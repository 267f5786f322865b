"""How the Hopper kernel of few-bit rows and weights cuts a grouped product into tiles, and what it can take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.grouped_matmul.tiles import MAX_GROUPS, WIDTH
from kernels.quantized_matmul.tiles import SCALES_LINE
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul.quantized import QuantizedGroupedCase

# Elements along K of a step: 128 bytes, and the least that share a scale.
DEPTH = 128
DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class ScaledTiles:
    """rows, columns: of the output, of one block of threads, whose two warpgroups have half of the rows each;
    num_buffers: steps of 128 in shared memory; panel: as in `tiles.Tiles`."""

    rows: int
    columns: int
    num_buffers: int
    panel: int

    split = "rows"


def choose_scaled_tiles(outside: bool, out_dim: int) -> ScaledTiles:
    """`outside`: no scale changes along K. Where one does, two sums of a tile are in registers.

    TFLOP/s of 16384 x 4096 x 14336, 8 groups, on an H100 (jax 0.11.2, 2026-11-23), two runs of some. FP8, (rows,
    columns, num_buffers, panel): as here 1318, (128, 256, 4, 8) 1290, (128, 128, 6, 16) 1039. In blocks, (columns,
    num_buffers, panel): as here 1234, 1196 and in two runs before 1243, 1179, 1209 and 1120, 1118; (192, 4, 4) 1207,
    1204, (192, 4, 8) 1132, 1140, (128, 5, 8) 971, and 909 where products of four steps follow each other without a
    wait. Two programs that share the copies of x, in a cluster: 1097.
    """
    if outside:
        return ScaledTiles(128, 256, 4, 16)
    # As `kernels.quantized_matmul.tiles` counts them: the narrower a product, the less it hides.
    columns = min((192, 128), key=lambda columns: -(-out_dim // columns) * (columns + 128))
    return ScaledTiles(128, columns, 4 if columns == 192 else 5, 16)


def shared_bytes(tiles: ScaledTiles, outside: bool) -> int:
    """Shared memory of a block of threads: the ring, two pieces of output of each warpgroup, sizes and barriers."""
    scales = 0 if outside else 4 * (tiles.rows + SCALES_LINE)
    ring = tiles.num_buffers * ((tiles.rows + tiles.columns) * DEPTH + scales)
    return ring + 2 * 2 * WIDTH * WIDTH * 2 + 4 * MAX_GROUPS + 1024


def unsupported(case: QuantizedGroupedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.x_dtype not in DTYPES or case.w_dtype not in DTYPES:
        return f"the kernel takes {', '.join(DTYPES)}, not {case.x_dtype} and {case.w_dtype}"
    if case.x_dtype.startswith("float8") != case.w_dtype.startswith("float8"):
        return f"integers and FP8 can't be multiplied together, and these are {case.x_dtype} and {case.w_dtype}"
    if case.zero_points:
        return "the kernel takes no zero points"
    if case.w_layout != "columns":
        return f"the kernel reads weights in columns, not in {case.w_layout}; quantize them with layout='columns'"
    if case.out_dtype not in ("bfloat16", "float16"):
        return f"the kernel gives bfloat16 and float16, not {case.out_dtype}"
    if case.in_dim % DEPTH or case.out_dim % WIDTH or 0 in (case.in_dim, case.out_dim):
        return f"the kernel takes K in multiples of {DEPTH} and N of {WIDTH}, not K {case.in_dim} and N {case.out_dim}"
    if not 1 <= case.num_groups <= MAX_GROUPS:
        return f"the kernel takes 1 to {MAX_GROUPS} groups, not {case.num_groups}"
    if case.scales_outside:
        return None
    along_k = (case.x_block[1], case.w_block[0])
    if any(length % DEPTH for length in along_k):
        return f"the kernel takes scales of blocks of a multiple of {DEPTH} along K, not of {along_k}"
    if case.w_block[1] % DEPTH:
        return f"the kernel takes scales of a multiple of {DEPTH} columns where they change along K, not of " + str(
            case.w_block[1]
        )
    return None
