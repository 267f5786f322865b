"""What the Hopper kernel of few-bit activations and weights can take, and how it cuts a product into tiles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.quantized_matmul import QuantizedCase

# Rows of one matrix product of a warpgroup.
WARPGROUP_ROWS = 64
# Elements along K of one buffer: a row of them, 128 bytes, is what shared memory swizzles; and between scales.
BLOCK = 128
# Columns that have one scale in a block-scaled tile.
SCALED_COLUMNS = 64
# Columns of a weight for which a kernel reads one scale where scales change along K, and how many scales a copy takes:
# it begins at a multiple of 16 bytes wherever a tile does, and fills 128.
STRETCH, SCALES_LINE = 16, 32
# Bytes of a row of the pieces in which results go out through shared memory, and how many pieces are under way.
OUT_BYTES, NUM_OUTS = 128, 2
# Columns of a piece of 16-bit results; of 32-bit results there are two pieces in it.
OUT_COLUMNS = 64
PAIRS = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """num_warpgroups: those that multiply, with 64 rows each; columns: of a tile; num_buffers: blocks of x and of w in
    shared memory; cluster: tiles along M that read a block of w together, once; group: clusters along M that are
    computed with the same columns before the next ones; lead: blocks along K that the first warpgroup is ahead of the
    others."""

    num_warpgroups: int
    columns: int
    num_buffers: int
    cluster: int
    group: int
    lead: int = 0

    @property
    def rows(self) -> int:
        return self.num_warpgroups * WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that copies: 65,536 in all, handed out in eights."""
        return (240, 24) if self.num_warpgroups == 2 else (160, 32)


def choose_tiles(case: QuantizedCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order.

    Wide tiles read the least for what they compute, and narrow ones keep all processors busy where there are few.
    TFLOP/s of 8192 cubed on an H100 (jax 0.11.2, 2026-11-23; XLA FP8 1213, int8 1187):
    (columns, num_buffers, cluster, group, lead)  FP8   int8
    (256, 4, 2, 8, 0)                             1384  1442
    (256, 4, 2, 8, 2)                             1301  1489
    (256, 4, 2, 4, 0)                             1297  1296
    (256, 4, 2, 16, 0)                            1293  1416
    (256, 4, 1, 8, 0)                             1252  1359
    (192, 4, 2, 8, 0)                             1223  1432
    (128, 6, 2, 8, 0)                             1252  1253
    In blocks of 128, (num_warpgroups, columns, num_buffers, cluster, group), on a chip that slows down under load,
    after a pause and later: (2, 192, 4, 2, 8) 1280 and 1097, (2, 192, 4, 2, 4) 1195 and 1159, (2, 192, 4, 1, 16) 1132
    and 1165, (2, 192, 4, 2, 16) 1071 and 1204, (3, 128, 4, 2, 8) 1055 and 1064, where scales of rows, in tiles of 256,
    have 1217 and 1227; in two runs before (2, 192, 4, 2, 8) 1277 and 1130, 1242 and 1142. With a wait for a block only
    when the one before is done 1130 and 1084. As products of 128 and of 64 columns, the first one's sums added while
    the second runs, 1140 later: what is left is not that wait. Products of 128 columns, eight blocks' begun ahead of
    the sums before them, 750: ptxas moves sums from registers to others. Microseconds, before scales came through
    shared memory and now, of 64 x 4096 x 14336 31.4 and 27.0, of 128 x 7168 x 2048 19.1 and 21.5, of 4096 cubed 135
    and 135.
    """
    outside = case.scales_outside
    # Two sums of a tile whose scales change along K are in registers at a time.
    columns = (256, 128, 64) if outside else (192, 128, 64)
    # Two tiles, one below the other, wait for each other's buffers: not where there is one.
    cluster = 2 if case.num_rows > 2 * WARPGROUP_ROWS else 1
    options = [Tiles(2, width, 2, cluster, 8) for width in columns]
    best = min(options, key=lambda tiles: _columns_in_turn(case, tiles))
    fitting = [dataclasses.replace(best, num_buffers=number) for number in range(2, 9)]
    fitting = [tiles for tiles in fitting if shared_bytes(tiles, outside) <= SHARED_BYTES]
    return dataclasses.replace(fitting[-1], lead=2 if outside and case.x_dtype == "int8" else 0)


def _columns_in_turn(case: QuantizedCase, tiles: Tiles) -> int:
    """That one processor computes, one tile after the other, with as many as 32 for the start and end of each; 128 in
    blocks, whose scaling a narrow product does not hide."""
    clusters = -(-case.num_rows // (tiles.rows * tiles.cluster)) * -(-case.out_dim // tiles.columns)
    more = 32 if case.scales_outside else 128
    return -(-clusters // (NUM_PROCESSORS // tiles.cluster)) * (tiles.columns + more)


def shared_bytes(tiles: Tiles, outside: bool) -> int:
    """Shared memory of one block of threads: the buffers, pieces of results, and barriers."""
    scales = 0 if outside else 4 * (tiles.rows + SCALES_LINE)
    buffers = tiles.num_buffers * ((tiles.rows + tiles.columns) * BLOCK + scales)
    return buffers + NUM_OUTS * tiles.rows * OUT_BYTES + 16 * tiles.num_buffers + 256


def unsupported(case: QuantizedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.x_dtype not in PAIRS or case.w_dtype not in PAIRS:
        return f"the kernel takes {', '.join(PAIRS)}, not {case.x_dtype} and {case.w_dtype}"
    if case.zero_points:
        return "the kernel takes no zero points"
    if case.w_layout != "columns":
        return f"the kernel reads a weight in columns, not in {case.w_layout}; quantize it with layout='columns'"
    if case.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"the kernel gives bfloat16, float16 and float32, not {case.out_dtype}"
    if 0 in (case.in_dim, case.out_dim):
        return f"the kernel needs an element, and K={case.in_dim} and N={case.out_dim}"
    if case.scales_outside:
        return None
    return _unsupported_blocks(case)


def _unsupported_blocks(case: QuantizedCase) -> str | None:
    along_k = (case.x_block[1], case.w_block[0])
    if any(length % BLOCK and length != case.in_dim for length in along_k):
        return f"the kernel takes scales of blocks of a multiple of {BLOCK} along K, not of {along_k}"
    if case.w_block[1] % BLOCK and case.w_block[1] != case.out_dim:
        return f"the kernel takes scales of a multiple of {BLOCK} columns where they change along K, not of " + str(
            case.w_block[1]
        )
    return None


def piece_columns(out_dtype) -> int:
    """Columns of a piece of results."""
    return OUT_BYTES // jnp.dtype(out_dtype).itemsize
