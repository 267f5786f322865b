"""What the weight-only kernel for Hopper can take, and how it cuts a product."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.quantized_matmul import QuantizedCase

# Mosaic GPU's interface changes with JAX's minor version; the kernel was compiled with 0.11.2.
JAX_VERSION = jax.__version_info__
# Columns of the weight in one matrix product of a warpgroup, and rows and columns of a tile of packed weights.
TILE = 64
SHARED_BYTES = 227 * 1024
NUM_PROCESSORS = 132
GROUPS = (32, 64, 128)
"""Rows of the weight that may share a scale, if not all of them do."""
MAX_ROWS = 64
"""Rows of x of one block of threads."""


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


def choose_tiles(case: QuantizedCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order."""
    rows = min(-(-case.num_rows // 8) * 8, MAX_ROWS)
    depth = 256 if case.w_dtype == "int4" else 128
    columns = 2 * TILE if case.out_dim % (2 * TILE) == 0 else TILE
    programs = case.out_dim // columns * -(-case.num_rows // rows)
    most = max(1, case.in_dim // (4 * depth))
    num_parts = 1 if programs > NUM_PROCESSORS else min(most, 2 * NUM_PROCESSORS // programs, 8)
    tiles = Tiles(columns, depth, 2, num_parts, rows)
    # A third of a processor's shared memory: three blocks of threads on each, so that one converts while others wait.
    share = SHARED_BYTES // 3 - 1024
    fitting = [n for n in range(2, 9) if shared_bytes(case, dataclasses.replace(tiles, num_buffers=n)) <= share]
    return dataclasses.replace(tiles, num_buffers=max(fitting, default=2))


def shared_bytes(case: QuantizedCase, tiles: Tiles) -> int:
    """Shared memory of one block of threads."""
    bits = 4 if case.w_dtype == "int4" else 8
    buffer = tiles.columns * tiles.depth * bits // 8 + 2 * tiles.rows * tiles.depth
    if case.w_block[0] != case.in_dim:
        buffer += 4 * (1 + case.zero_points) * tiles.columns * (tiles.depth // case.w_block[0])
    # Mosaic takes 2 KiB for reductions and a few bytes for barriers.
    buffers = tiles.num_warpgroups * tiles.num_buffers
    return buffers * buffer + 4 * tiles.num_warpgroups * tiles.rows * tiles.columns + 2048 + 8 * (buffers + 1)


def unsupported(case: QuantizedCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if target.platform != "gpu" or target.compute_capability != (9, 0):
        return f"the kernel is written for NVIDIA GPUs of compute capability 9.0, and the target is {target}"
    if JAX_VERSION < (0, 11):
        return f"the kernel needs JAX 0.11 (Python 3.12), and this is JAX {'.'.join(map(str, JAX_VERSION))}"
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
    if case.out_dtype not in ("bfloat16", "float16", "float32"):
        return f"the kernel writes bfloat16, float16 or float32, not {case.out_dtype}"
    return None
