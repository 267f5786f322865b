"""What the TPU kernel of few-bit grouped products takes, and how it cuts a call into tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.grouped_matmul.tpu_tiles import LANES, VMEM_BYTES, Shape, Tiles, check_table, depths, rows_of, strip_of
from kernels.grouped_matmul.tpu_tiles import length as length_of
from kernels.quantized_matmul.tpu_tiles import (
    BITS,
    check_block,
    conversion_bytes,
    copied_bytes,
    depths_of,
    matrix_bytes,
    scaling,
    widened,
)
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul.quantized import QuantizedGroupedCase

_X_DTYPES = ("bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
# The longest sum of int8 products that stays inside int32: 127 · 127 · 2^17 < 2^31.
_LONGEST_INTEGER_SUM = 2**17
_MIB = 2**20


def shape_of(case: QuantizedGroupedCase) -> Shape:
    """As the tables of visits need it."""
    return Shape(case.num_rows, case.num_groups, case.in_dim, case.out_dim, BITS[case.x_dtype] // 8)


def choose_tiles(case: QuantizedGroupedCase) -> Tiles:
    """Of what is `widened` already. Static in the shapes, so that equal calls add in equal order. ValueError where none
    fits."""
    rows = rows_of(case.num_rows, case.num_groups)
    for limit in (1024, 768, 512, 256, 128):
        columns = length_of(case.out_dim, limit, 256)
        outside = scaling(case, Tiles(rows, case.in_dim, columns)) == "outside"
        for depth in depths(case.in_dim) if outside else depths_of(case, rows, columns):
            tiles = Tiles(rows, depth, columns)
            if needed_bytes(case, tiles) <= VMEM_BYTES:
                return tiles
    raise ValueError(
        f"no tile of the grouped product with K={case.in_dim} fits into {VMEM_BYTES / _MIB:.0f} MiB of vector memory: "
        f"K has no small divisor that is a multiple of {LANES}; pad it to a multiple of 1024"
    )


def check(case: QuantizedGroupedCase, tiles: Tiles) -> None:
    """ValueError, naming the tile, for one that a core's memories rule out."""
    if tiles.depth < 1 or case.in_dim % tiles.depth:
        raise ValueError(f"grouped_matmul {tiles}: depth must divide {case.in_dim}")
    check_block("grouped_matmul", case, tiles)
    if (needed := needed_bytes(case, tiles)) > VMEM_BYTES:
        raise ValueError(
            f"grouped_matmul {tiles} of {case.x_dtype} times {case.w_dtype} needs {needed / _MIB:.1f} MiB of vector "
            f"memory, and may take {VMEM_BYTES / _MIB:.0f} MiB; give it fewer rows, columns or depth"
        )
    check_table(shape_of(case), tiles)


def needed_bytes(case: QuantizedGroupedCase, tiles: Tiles) -> int:
    """Blocks are twice there, one in use and one being copied; of a strip, what is computed before it is stored."""
    strip = strip_of(tiles.columns)
    live = 3 * matrix_bytes(tiles.rows, strip, 32) + conversion_bytes(case, tiles, strip)
    sums = matrix_bytes(tiles.rows, tiles.columns, 32) if tiles.depth < case.in_dim else 0
    return 2 * copied_bytes(case, tiles) + live + sums


def unsupported(case: QuantizedGroupedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if target.platform != "tpu":
        return f"the kernel is written for TPU, and the target is {target}"
    if case.x_dtype not in _X_DTYPES or case.w_dtype not in BITS or case.out_dtype not in ("bfloat16", "float32"):
        return (
            f"the TPU kernel takes x of {', '.join(_X_DTYPES)} and gives bfloat16 or float32, not {case.x_dtype} and "
            f"{case.out_dtype}"
        )
    if case.x_block is not None and case.x_dtype.startswith("float8") != case.w_dtype.startswith("float8"):
        return f"integers and FP8 can't be multiplied together, and these are {case.x_dtype} and {case.w_dtype}"
    if case.w_layout not in ("rows", "columns"):
        return f"the TPU kernel takes w in rows or columns, not in {case.w_layout!r}"
    if 0 in (case.num_rows, case.num_groups, case.in_dim, case.out_dim):
        return f"the TPU kernel needs rows, groups and columns, not {case}"
    case = widened(case)
    if case.x_dtype == "int8" and case.in_dim > _LONGEST_INTEGER_SUM:
        return f"sums of {case.in_dim} products of int8 do not fit into int32; at most {_LONGEST_INTEGER_SUM}"
    try:
        check(case, choose_tiles(case))
    except ValueError as error:
        return str(error)
    return None
