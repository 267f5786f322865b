"""What the TPU kernel over pages takes, how it cuts a call into tiles, and what a tile needs of a core's memories."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.paged_attention import PagedAttentionCase

_MIB = 2**20
# Vector memory that the kernel may take, which the compiler is told: half of the least that a core of v5e, v5p, v6e or
# tpu7x has. Untold, the compiler stops at 16 MiB on v5e.
VMEM_BYTES = 32 * _MIB
# Scalar memory for the page table, the lengths and the starts; a core has 1 MiB.
SMEM_BYTES = 512 * 2**10
LANES = 128
# Of one block of keys: little enough that the last block of a row, which is multiplied whole, wastes little. By the
# compiler's schedule v5e takes 6.2 cycles a position of 8 heads in blocks of 512, 7.5 in blocks of 256, and its memory
# 7.5 to give it.
_BLOCK_BYTES = 2**20
_LONGEST_BLOCK = 512
# Rows of scores that have their softmax together. One of few rows is waited for as long as one of many: in decode a
# block of 256 positions takes 1,930 cycles of v5e with all 8 kv heads together and 3,008 one by one, and 1,067 and
# 3,924 of tpu7x, by the compiler's schedule (JAX 0.11.2); of prompts one head of 512 rows is as good as two.
_TOGETHER = 512
_MOST_ROWS = 512
_ITEMSIZE = {"bfloat16": 2, "float32": 4, "int8": 1, "float8_e4m3fn": 1}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one step: rows of queries of each kv head, a multiple of 8, and pages of one block of keys, of which there are
    a multiple of 128 positions."""

    rows: int
    pages: int


def query_rows(case: PagedAttentionCase) -> int:
    """Queries of a row that share a kv head."""
    return case.num_tokens * case.num_heads // case.num_kv_heads


def heads_together(case: PagedAttentionCase, tiles: Tiles) -> int:
    """Kv heads whose scores are one matrix."""
    return min(case.num_kv_heads, max(1, _TOGETHER // tiles.rows))


def laid_by_heads(num_kv_heads: int, itemsize: int) -> bool:
    """Whether XLA lays an array [P, S, K, H] in memory as [P, K, S, H].

    It does where tiles of [K, H] would have to be filled up, which have 8 rows, or 4, 2 or 1, and a row of at least 4
    bytes of each column. The kernel takes pages as they lie: else all of them would be copied at each call.
    """
    return num_kv_heads % 8 != 0 and not (num_kv_heads in (1, 2, 4) and num_kv_heads * itemsize >= 4)


def choose_tiles(case: PagedAttentionCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order. ValueError where none fits."""
    rows, unit = -(-query_rows(case) // 8) * 8, _pages_of_lanes(case)
    keys = _BLOCK_BYTES // (case.num_kv_heads * case.head_dim * _ITEMSIZE[case.kv_dtype or case.dtype])
    keys = min(keys, _LONGEST_BLOCK, -(-case.width // LANES) * LANES)
    pages = max(1, keys // (unit * case.page_size)) * unit
    parts = -(-rows // _MOST_ROWS)
    while True:
        tiles = Tiles(-(-rows // (8 * parts)) * 8, pages)
        if needed_bytes(case, tiles) <= VMEM_BYTES:
            check(case, tiles)
            return tiles
        if tiles.rows > LANES:
            parts += 1
        elif pages > unit:
            pages = pages // 2 // unit * unit or unit
        elif tiles.rows > 8:
            parts += 1
        else:
            raise ValueError(
                f"no tile of attention over pages of {case.page_size} positions, {case.num_kv_heads} kv heads of "
                f"{case.head_dim}, fits into {VMEM_BYTES / _MIB:.0f} MiB of vector memory; use smaller pages"
            )


def _pages_of_lanes(case: PagedAttentionCase) -> int:
    """The least pages that have a multiple of 128 positions."""
    return LANES // math.gcd(LANES, case.page_size)


def check(case: PagedAttentionCase, tiles: Tiles) -> None:
    """ValueError, naming the tile, for one that the shapes or a core's memories rule out."""
    if tiles.rows < 8 or tiles.rows % 8:
        raise ValueError(f"paged_attention {tiles}: rows must be a multiple of 8")
    if tiles.pages < 1 or tiles.pages * case.page_size % LANES:
        raise ValueError(
            f"paged_attention {tiles}: pages of {case.page_size} must come to a multiple of {LANES} positions; make "
            f"pages a multiple of {_pages_of_lanes(case)}"
        )
    if (needed := needed_bytes(case, tiles)) > VMEM_BYTES:
        raise ValueError(
            f"paged_attention {tiles} of {case.num_kv_heads} kv heads of {case.head_dim} needs {needed / _MIB:.1f} MiB "
            f"of vector memory, and may take {VMEM_BYTES / _MIB:.0f} MiB; give it fewer rows or pages"
        )
    if (needed := table_bytes(case)) > SMEM_BYTES:
        raise ValueError(
            f"paged_attention of {case.batch} rows of {case.width // case.page_size} pages needs {needed / 2**10:.0f} "
            f"KiB of scalar memory for their page table, and may take {SMEM_BYTES / 2**10:.0f} KiB; use larger pages, "
            "or split the batch"
        )


def table_bytes(case: PagedAttentionCase) -> int:
    return 4 * case.batch * (case.width // case.page_size + 2)


def needed_bytes(case: PagedAttentionCase, tiles: Tiles) -> int:
    """Queries, outputs and pages are twice there, one in use and one being copied."""
    K, S, H, keys = case.num_kv_heads, case.page_size, case.head_dim, tiles.pages * case.page_size
    size, page_size = _ITEMSIZE[case.dtype], _ITEMSIZE[case.kv_dtype or case.dtype]
    queries = K * (2 * _matrix(tiles.rows, H, size) + _matrix(tiles.rows, 1, 4))
    page = K * _matrix(S, H, page_size) if laid_by_heads(K, page_size) else S * _matrix(K, H, page_size)
    state = K * (_matrix(tiles.rows, H, 4) + 2 * _matrix(tiles.rows, LANES, 4))
    # All heads of a block of keys and of values, as they are multiplied, and one head's in float32 on its way.
    live = 2 * K * (_matrix(keys, H, page_size) + _matrix(keys, H, size)) + 2 * _matrix(keys, H, 4)
    # Scores and weights, and others of the same size on their way.
    live += 4 * heads_together(case, tiles) * _matrix(tiles.rows, keys, 4)
    if case.dtype == "float32":
        # Operands are multiplied as sums of parts in bfloat16.
        live += 3 * 2 * (_matrix(keys, H, 2) + _matrix(tiles.rows, keys, 2))
    scales = 0
    if case.kv_dtype is not None:
        scales = 2 * tiles.pages * _matrix(K, S, 4)
        live += 2 * _matrix(K, keys, 4)
    return 2 * queries + 2 * (2 * tiles.pages * page + scales) + state + live


def _matrix(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a matrix in vector memory: padded to 128 columns, and to 8 rows (or 4, 2, 1) and 4 bytes of a column."""
    packed = 4 // itemsize
    tile = next((n for n in (1, 2, 4) if rows <= n and n >= packed), 8)
    return -(-rows // tile) * tile * -(-columns // LANES) * LANES * itemsize


def unsupported(case: PagedAttentionCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if target.platform != "tpu":
        return f"the kernel is written for TPU, and the target is {target}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"the TPU kernel takes bfloat16 and float32, not {case.dtype}"
    if case.head_dim not in (128, 256):
        return (
            f"the TPU kernel takes a head width of 128 or 256, not {case.head_dim}: XLA would lay such pages out anew, "
            "all of them at each call"
        )
    if case.page_size % 8:
        return f"the TPU kernel takes pages of a multiple of 8 positions, not {case.page_size}"
    if 0 in (case.batch, case.num_tokens, case.width):
        return f"the TPU kernel needs rows, tokens and pages, not {case}"
    if case.kv_dtype is not None and (reason := _unsupported_scales(case)) is not None:
        return reason
    try:
        choose_tiles(case)
    except ValueError as error:
        return str(error)
    return None


def _unsupported_scales(case: PagedAttentionCase) -> str | None:
    """XLA lays scales in memory as [P, K, S] only where tiles of [K, S] are full."""
    if case.page_size % LANES:
        return (
            f"the TPU kernel takes pages of {case.kv_dtype} of a multiple of {LANES} positions, not {case.page_size}: "
            "XLA would lay their scales out anew, all of them at each call"
        )
    if laid_by_heads(case.num_kv_heads, 4):
        return (
            f"the TPU kernel takes pages of {case.kv_dtype} with 1, 2, 4 or a multiple of 8 kv heads on a device, not "
            f"{case.num_kv_heads}: XLA would lay their scales out anew, all of them at each call"
        )
    return None
