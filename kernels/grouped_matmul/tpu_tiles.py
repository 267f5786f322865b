"""What the TPU kernels of the grouped product take, how they cut a call into tiles, and what a tile needs of a core's
vector memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.grouped_matmul import GroupedCase

_MIB = 2**20
# Vector memory that a kernel may take, which the compiler is told: half of the least that a core of v5e, v5p, v6e or
# tpu7x has. Untold, the compiler stops at 16 MiB on v5e.
VMEM_BYTES = 32 * _MIB
# Scalar memory for the table of visits; a core has 1 MiB.
SMEM_BYTES = 512 * 2**10
LANES = 128
# Columns that are multiplied at a time, the width of the matrix units of v6e and tpu7x: while they have one strip, the
# vector units finish another.
STRIP = 256
# A longer tile costs less for each row, and wastes more where a group ends inside it.
_MOST_ROWS = 512
_ITEMSIZE = {"bfloat16": 2, "float32": 4}

Pass = Literal["product", "transposed", "weight_gradient"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one product: `depth` is what it sums over and `columns` what a row of the result has; of the gradient of
    weights [E, depth, columns], which sums over rows, the widths of x and dy."""

    rows: int
    groups: int
    depth: int
    columns: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one step: rows, depth and columns. Of a product the depth divides its own; of the gradient, depth and columns
    are those of its result."""

    rows: int
    depth: int
    columns: int


def shape_of(case: GroupedCase, which: Pass) -> Shape:
    widths = (case.in_dim, case.out_dim) if which != "transposed" else (case.out_dim, case.in_dim)
    return Shape(case.num_rows, case.num_groups, *widths, _ITEMSIZE[case.dtype])


def choose_tiles(shape: Shape, which: Pass) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order. ValueError where none fits."""
    rows = rows_of(shape.rows, shape.groups)
    for limit in (1024, 768, 512, 256, 128):
        columns = length(shape.columns, limit, STRIP)
        for depth in [length(shape.depth, 1024)] if which == "weight_gradient" else depths(shape.depth):
            tiles = Tiles(rows, depth, columns)
            if needed_bytes(shape, tiles, which) <= VMEM_BYTES:
                return tiles
    raise ValueError(
        f"no tile of the grouped product that sums over {shape.depth} fits into {VMEM_BYTES / _MIB:.0f} MiB of vector "
        f"memory: it has no small divisor that is a multiple of {LANES}; pad it to a multiple of 1024"
    )


def rows_of(rows: int, groups: int) -> int:
    """Of a tile: at most about as many as a group has on average."""
    return length(rows, min(_MOST_ROWS, max(LANES, -(-(rows // groups) // LANES) * LANES)))


def length(number: int, largest: int, unit: int = LANES) -> int:
    """A multiple of `unit` that covers `number` with little beyond. What is shorter is taken whole, or in registers."""
    if number <= unit:
        return number if number <= LANES else unit
    lengths = range(unit, max(unit, largest) + 1, unit)
    return min(lengths, key=lambda n: (-(-number // n) * n * (1 + LANES / n), -n))


def depths(depth: int) -> list[int]:
    """Divisors, the longest first: a step that ends in an addition to earlier sums is slower."""
    return [depth, *(n for n in range(depth // LANES * LANES, 0, -LANES) if depth % n == 0 and n < depth)]


def check(shape: Shape, tiles: Tiles, which: Pass) -> None:
    """ValueError, naming the tile, for one that the shapes or a core's memories rule out."""
    for name in ("rows", "depth", "columns"):
        size, most = getattr(tiles, name), getattr(shape, name)
        if size < 1 or (size % LANES and size != most):
            raise ValueError(f"grouped_matmul {tiles}: {name} must be a multiple of {LANES}, or all {most}")
    if which != "weight_gradient" and shape.depth % tiles.depth:
        raise ValueError(f"grouped_matmul {tiles}: depth must divide {shape.depth}")
    if (needed := needed_bytes(shape, tiles, which)) > VMEM_BYTES:
        raise ValueError(
            f"grouped_matmul {tiles} needs {needed / _MIB:.1f} MiB of vector memory in the {which.replace('_', ' ')}, "
            f"and may take {VMEM_BYTES / _MIB:.0f} MiB; give it fewer rows, columns or depth"
        )
    check_table(shape, tiles)


def check_table(shape: Shape, tiles: Tiles) -> None:
    """ValueError where the table of visits outgrows scalar memory."""
    if (needed := table_bytes(shape, tiles)) > SMEM_BYTES:
        raise ValueError(
            f"grouped_matmul {tiles} over {shape.rows} rows and {shape.groups} groups needs a table of "
            f"{needed / 2**10:.0f} KiB in scalar memory, and may take {SMEM_BYTES / 2**10:.0f} KiB; give it more rows"
        )


def num_visits(shape: Shape, tiles: Tiles) -> int:
    """Pairs of a tile of rows and a group with rows in it, at most: every group but the first begins a new one."""
    return -(-shape.rows // tiles.rows) + shape.groups


def table_bytes(shape: Shape, tiles: Tiles) -> int:
    return 4 * 4 * num_visits(shape, tiles)


def strip_of(columns: int) -> int:
    return next((n for n in (STRIP, LANES) if columns % n == 0), columns)


def needed_bytes(shape: Shape, tiles: Tiles, which: Pass) -> int:
    """Blocks are twice there, one in use and one being copied; of a strip, what is computed before it is stored."""
    rows, depth, columns, size = tiles.rows, tiles.depth, tiles.columns, shape.itemsize
    x, strip = _matrix(rows, depth, size), strip_of(columns)
    # Float32 operands are multiplied as sums of parts in bfloat16.
    parts = 3 if size == 4 else 0
    if which == "weight_gradient":
        # x is turned on its side; in a tile of several groups both operands are masked.
        copied = x + _matrix(rows, columns, size) + _matrix(depth, columns, size)
        live = 2 * _matrix(depth, strip, 4) + 2 * x + _matrix(rows, columns, size)
        live += parts * (_matrix(rows, depth, 2) + _matrix(rows, columns, 2))
        return 2 * copied + live + _matrix(depth, columns, 4)
    w_shape = (columns, depth) if which == "transposed" else (depth, columns)
    copied = x + _matrix(*w_shape, size) + _matrix(rows, columns, size)
    live = 3 * _matrix(rows, strip, 4) + parts * (_matrix(rows, depth, 2) + _matrix(depth, strip, 2))
    return 2 * copied + live + (_matrix(rows, columns, 4) if depth < shape.depth else 0)


def _matrix(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a matrix in vector memory: padded to 128 columns, and to 8 rows of 4 bytes."""
    sublanes = 8 * 4 // itemsize
    return -(-rows // sublanes) * sublanes * -(-columns // LANES) * LANES * itemsize


def unsupported(case: GroupedCase, target: Target) -> str | None:
    """Why the kernels can't compute this, gradients included; None where they can."""
    if target.platform != "tpu":
        return f"the kernel is written for TPU, and the target is {target}"
    if case.dtype not in _ITEMSIZE:
        return f"the TPU kernel takes {' and '.join(_ITEMSIZE)}, not {case.dtype}"
    if 0 in (case.num_rows, case.num_groups, case.in_dim, case.out_dim):
        return f"the TPU kernel needs rows, groups and columns, not {case}"
    try:
        for which in ("product", "transposed", "weight_gradient"):
            shape = shape_of(case, which)
            check(shape, choose_tiles(shape, which), which)
    except ValueError as error:
        return str(error)
    return None
