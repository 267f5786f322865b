"""What the TPU product of few-bit numbers takes, how it cuts a call into tiles, and what a tile needs of a core's
vector memory."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.quantized_matmul import QuantizedCase

_MIB = 2**20
# Vector memory that the kernel may take, which the compiler is told: half of the least that a core of v5e, v5p, v6e or
# tpu7x has. Untold, the compiler stops at 16 MiB on v5e.
VMEM_BYTES = 32 * _MIB
LANES = 128
# Columns of w that become x's dtype at a time: while the matrix units have one strip, the vector units prepare another.
# The width of the matrix units of v6e and tpu7x.
STRIP = 256
# A step of decode copies about this much of w: enough that a step's fixed cost hides behind its copy, little enough
# that the first copy, which nothing hides, is a small part of all.
_DECODE_BYTES = 2 * _MIB
# The longest sum of int8 products that stays inside int32: 127 · 127 · 2^17 < 2^31.
_LONGEST_INTEGER_SUM = 2**17
BITS = {"int4": 4, "int8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "bfloat16": 16, "float32": 32}
_X_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")

Scaling = Literal["outside", "sums", "operands"]
"""Where scales are applied: "outside": to the finished sums. "sums": to each block's sums, before they are added up.
"operands": to w, rounded to x's dtype, of an x that has none (any more)."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one step: rows of x, columns of w, and the depth of K, which divides K."""

    rows: int
    columns: int
    depth: int


def scaling(case: QuantizedCase, tiles: Tiles) -> Scaling:
    """Scaling sums costs the vector units rows · columns for each block, scaling w block · columns."""
    if case.scales_outside and not case.zero_points:
        return "outside"
    block = block_of(case, tiles)
    return "operands" if case.zero_points or tiles.rows >= block or block % LANES else "sums"


def widened(case: QuantizedCase) -> QuantizedCase:
    """What the kernel multiplies: an x with scales along K becomes bfloat16 before it, unless its rows are few.

    The vector units are too slow to scale sums of each block. By the compiler's schedule for 4096³ in int8 with blocks
    of 128 (an estimate; JAX 0.11.2), v6e takes 924 thousand cycles so, which is 28% of the peak of bfloat16, and 49% of
    it where a step scales both operands first.
    """
    if case.weight_only or (case.scales_outside and not case.zero_points):
        return case
    block = _block(case)
    if case.num_rows < block and block % LANES == 0 and not case.zero_points:
        return case
    return dataclasses.replace(case, x_dtype="bfloat16", x_block=None)


def block_of(case: QuantizedCase, tiles: Tiles) -> int:
    """Elements along K that share all scales and lie in one step."""
    return math.gcd(_block(case), tiles.depth)


def _block(case: QuantizedCase) -> int:
    return math.gcd(case.in_dim if case.x_block is None else case.x_block[1], case.w_block[0])


def choose_tiles(case: QuantizedCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order. ValueError where none fits."""
    for limit in (1024, 768, 512, 256, 128):
        rows, columns = _length(case.num_rows, limit), _length(case.out_dim, limit, STRIP)
        for depth in depths_of(case, rows, columns):
            tiles = Tiles(rows, columns, depth)
            if needed_bytes(case, tiles) <= VMEM_BYTES:
                return tiles
    raise ValueError(
        f"no tile of {case.x_dtype} times {case.w_dtype} with K={case.in_dim} fits into {VMEM_BYTES / _MIB:.0f} MiB of "
        f"vector memory: K has no small divisor that is a multiple of {LANES}; pad K to a multiple of 1024"
    )


def _length(number: int, largest: int, unit: int = LANES) -> int:
    """A multiple of `unit` that covers `number` with little beyond. What is shorter is taken whole, or in registers."""
    if number <= unit:
        return number if number <= LANES else unit
    lengths = range(unit, max(unit, largest) + 1, unit)
    return min(lengths, key=lambda n: (-(-number // n) * n * (1 + LANES / n), -n))


def depths_of(case: QuantizedCase, rows: int, columns: int) -> list[int]:
    """Divisors of K, the longest first: a step that ends in an addition to earlier sums is slower."""
    K, longest = case.in_dim, case.in_dim
    if rows <= LANES:
        longest = max(LANES, _DECODE_BYTES * 8 // (BITS[case.w_dtype] * columns))
    if scaling(case, Tiles(rows, columns, K)) == "sums":
        # Blocks of a step are multiplied one after another: more of them make a longer program and no faster one.
        longest = min(longest, 8 * _block(case))
    depths = [d for d in range(LANES, K, LANES) if K % d == 0 and d <= longest]
    if longest >= K or not depths:
        depths.append(K)
    # A block of scales that a step cuts has its scales copied for both, and may be cut too fine.
    return sorted(depths, key=lambda d: (block_of(case, Tiles(rows, columns, d)) != min(d, _block(case)), -d))


def check(case: QuantizedCase, tiles: Tiles) -> None:
    """ValueError, naming the tile, for one that the shapes or a core's memory rule out."""
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    if (rows % 8 and rows != case.num_rows) or (columns % LANES and columns != case.out_dim) or min(rows, columns) < 1:
        raise ValueError(f"quantized_matmul {tiles}: rows must be a multiple of 8 and columns of {LANES}, or all")
    if depth < 1 or case.in_dim % depth or (depth % LANES and depth != case.in_dim):
        raise ValueError(
            f"quantized_matmul {tiles}: depth must divide K={case.in_dim} and be a multiple of {LANES}, or all"
        )
    check_block("quantized_matmul", case, tiles)
    if (needed := needed_bytes(case, tiles)) > VMEM_BYTES:
        raise ValueError(
            f"quantized_matmul {tiles} of {case.x_dtype} times {case.w_dtype} needs {needed / _MIB:.1f} MiB of vector "
            f"memory, and may take {VMEM_BYTES / _MIB:.0f} MiB; give it fewer rows, columns or depth"
        )


def check_block(op: str, case: QuantizedCase, tiles: Tiles) -> None:
    """ValueError where scales change along K in the middle of a register, or along what w can't be scaled along."""
    how = scaling(case, tiles)
    if how != "outside" and block_of(case, tiles) % 8:
        raise ValueError(f"{op} {tiles}: scales for each {_block(case)} of K; it must be a multiple of 8")
    if how == "operands" and case.w_layout == "columns":
        raise ValueError(
            "the TPU kernel scales weights in blocks along K only where they lie in rows; quantise w with layout='rows'"
        )


def strip_of(case: QuantizedCase, tiles: Tiles) -> int:
    """Columns that are multiplied at a time: all, where nothing is to be done to w first."""
    if case.x_block is not None and BITS[case.x_dtype] == BITS[case.w_dtype] and scaling(case, tiles) == "outside":
        return tiles.columns
    return next((n for n in (STRIP, LANES) if tiles.columns % n == 0), tiles.columns)


def needed_bytes(case: QuantizedCase, tiles: Tiles) -> int:
    """Blocks are twice there, one in use and one being copied; of a strip, what is computed before it is stored."""
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    strip, steps = strip_of(case, tiles), case.in_dim // depth
    live = 2 * matrix_bytes(rows, strip, 32) + conversion_bytes(case, tiles, strip)
    if case.x_dtype == "float32":
        # Multiplied as sums of parts in bfloat16.
        live += 3 * (matrix_bytes(depth, strip, 16) + matrix_bytes(rows, depth, 16))
    return 2 * copied_bytes(case, tiles) + live + (matrix_bytes(rows, columns, 32) if steps > 1 else 0)


def copied_bytes(case: QuantizedCase, tiles: Tiles) -> int:
    """Of the blocks of a step, each once."""
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    blocks = 1 if scaling(case, tiles) == "outside" else depth // block_of(case, tiles)
    w_shape = (depth, columns) if case.w_layout == "rows" else (columns, depth)
    copied = (
        matrix_bytes(rows, depth, BITS[case.x_dtype])
        + matrix_bytes(*w_shape, BITS[case.w_dtype])
        + matrix_bytes(rows, columns, BITS[case.out_dtype])
    )
    copied += (1 + case.zero_points) * matrix_bytes(blocks, columns, 32) + case.bias * matrix_bytes(1, columns, 32)
    return copied + (matrix_bytes(rows, blocks, 32) if case.x_block is not None else 0)


def conversion_bytes(case: QuantizedCase, tiles: Tiles, strip: int) -> int:
    """Of the values of a strip of w on their way to x's dtype."""
    x_bits, depth = BITS[case.x_dtype], tiles.depth
    if case.weight_only:
        return matrix_bytes(depth, strip, 32) + matrix_bytes(depth, strip, x_bits)
    return matrix_bytes(depth, strip, 8) if x_bits != BITS[case.w_dtype] else 0


def matrix_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix in vector memory: padded to 128 columns, and to 8 rows of 4 bytes."""
    sublanes = 8 * 32 // bits
    return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * bits // 8


def unsupported(case: QuantizedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if target.platform != "tpu":
        return f"the kernel is written for TPU, and the target is {target}"
    if case.x_dtype not in _X_DTYPES or case.w_dtype not in BITS or case.out_dtype not in ("bfloat16", "float32"):
        return (
            f"the TPU kernel takes x of {', '.join(_X_DTYPES)} and gives bfloat16 or float32, not {case.x_dtype} and "
            f"{case.out_dtype}"
        )
    if 0 in (case.num_rows, case.in_dim, case.out_dim):
        return f"the TPU kernel needs rows and columns, not M={case.num_rows}, K={case.in_dim}, N={case.out_dim}"
    if case.w_layout not in ("rows", "columns"):
        return f"the TPU kernel takes w in rows or columns, not in {case.w_layout!r}"
    case = widened(case)
    if not case.weight_only and case.x_dtype.startswith("int") and case.in_dim > _LONGEST_INTEGER_SUM:
        return f"sums of {case.in_dim} products of int8 do not fit into int32; at most {_LONGEST_INTEGER_SUM}"
    try:
        check(case, choose_tiles(case))
    except ValueError as error:
        return str(error)
    return None
