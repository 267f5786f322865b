"""What the Hopper kernel can take, and how it cuts a call into blocks of keys and parts of a row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels import hopper_chip
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.target import Target

if TYPE_CHECKING:
    from kernels.paged_attention import PagedAttentionCase

# Keys are the rows of a warpgroup's matrix product (wgmma), which come in 64s.
KEY_ROWS = 64
# Scores and outputs lie in registers with a column for each query. Above these the compiler's report
# (`python -m kernels.aot`) shows some of them spilled to memory, at them none.
MAX_QUERIES, MAX_QUERIES_OF_LARGE = 64, 32
# Codes on their way through registers take the place of more queries.
MAX_QUERIES_QUANTIZED, MAX_QUERIES_QUANTIZED_OF_LARGE, MAX_CODES = 32, 8, 128 * 128
MAX_PARTS = 16


# Rows of queries of one block of threads of the kernel for many queries: two warpgroups of 64.
QUERY_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """pages_per_block: pages of one block of keys; num_buffers: blocks in shared memory; num_parts: parts of a row."""

    pages_per_block: int
    num_buffers: int
    num_parts: int


@dataclasses.dataclass(frozen=True)
class PrefillTiles:
    """block: positions of one block of keys; num_buffers: blocks in shared memory; num_queries: blocks of query rows
    there; num_parts: parts of a row."""

    block: int
    num_buffers: int
    num_queries: int
    num_parts: int


def choose_tiles(case: PagedAttentionCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order."""
    # Half of a processor's shared memory: two blocks of threads on each, so that one computes while the other waits. Of
    # quantised pages a third: half as many bytes come in the time that the steps of a block take (128 rows of 1024 in
    # int8 take 118 to 122 us with 2, 3 or 4 buffers on an H100).
    share = SHARED_BYTES // (2 if case.kv_dtype is None else 3) - 1024
    num_buffers = max(n for n in (2, 3, 4) if n == 2 or shared_bytes(case, n) <= share)
    programs = case.batch * case.num_kv_heads
    parts = _num_parts if case.kv_dtype is None else _num_quantized_parts
    return Tiles(_block(case) // case.page_size, num_buffers, parts(programs, case.width))


def _block(case: PagedAttentionCase) -> int:
    """Positions of one block of keys: whole pages."""
    return max(KEY_ROWS, case.page_size)


def _columns(case: PagedAttentionCase) -> int:
    """Queries of one kv head, in whole tiles of eight."""
    return -(-case.num_tokens * case.num_heads // case.num_kv_heads // 8) * 8


def shared_bytes(case: PagedAttentionCase, num_buffers: int) -> int:
    """Shared memory of one block of threads: queries as they come and as they are multiplied, weights, outputs (float32
    at most), a new key and value, and the buffers."""
    if case.kv_dtype is not None:
        return _quantized_shared_bytes(case, num_buffers)
    head = _columns(case) * (2 * 2 * case.head_dim + 2 * _block(case) + 4 * case.head_dim) + 2 * 2 * case.head_dim
    # Mosaic takes 2 KiB for reductions and a few bytes for barriers.
    return head + 2048 + 64 + num_buffers * 2 * 2 * _block(case) * case.head_dim


def _quantized_shared_bytes(case: PagedAttentionCase, num_buffers: int) -> int:
    """The same where keys and values have a byte for each element, and each position a float32 scale of both; a new key
    and value are there in three forms."""
    head = _columns(case) * (2 * 2 * case.head_dim + 2 * _block(case) + 4 * case.head_dim)
    head += 2 * (2 * 2 * case.head_dim + max(case.head_dim, 128))
    return head + 2048 + 64 + num_buffers * 2 * _block(case) * (case.head_dim + 4)


def _num_parts(programs: int, width: int) -> int:
    """Parts of a row, where `programs` blocks of threads (row and kv head) would be too few.

    The sum over parts costs a launch and grows with them. Measured on an H100, when it cost two (8 kv heads of 128):
    one row of 512 takes 9.1 us in 1 part, 7.0 in 2, 6.6 in 4, 9.2 in 8; one row of 8192 takes 18.7 in 8, 19.9 in 16,
    21.2 in 32; eight rows of 1024 take 17.8 in 1, 17.9 in 2, 19.4 in 4. So half a chip is filled with short parts, the
    rest with long.
    """
    short = min(NUM_PROCESSORS // 2 // programs, width // 128, 8)
    long = min(2 * NUM_PROCESSORS // programs, width // 1024, MAX_PARTS)
    return max(1, short, long)


def _num_quantized_parts(programs: int, width: int) -> int:
    """The same of int8 and float8 pages, whose half as many bytes leave the steps of a block to be hidden: two blocks
    of threads for each processor.

    Measured on an H100 (jax 0.11.2, 8 kv heads of 128, int8): one row of 1024 takes 14.0 us in 4 parts, 19.3 in 8; one
    row of 8192 22.0 in 8, 17.4 in 16, 16.5 in 33; one row of 131072 232 in 8, 125 in 16, 110 in 33, 135 in 50; eight
    rows of 1024 21.6 in 1, 16.8 in 2, 15.5 in 4; eight rows of 8192 122 in 1, 65 in 2, 60 in 4, 62 in 6; 32 rows of
    1024 35 in 1, 43 in 2.
    """
    return max(1, min(2 * NUM_PROCESSORS // programs, width // 256))


def few_queries(case: PagedAttentionCase) -> bool:
    """Whether the queries of a row that share a kv head fit the registers of the kernel for few (`gpu`); `prefill` has
    the rest."""
    large = case.head_dim > 128 or _block(case) > KEY_ROWS
    most = MAX_QUERIES_OF_LARGE if large else MAX_QUERIES
    if case.kv_dtype is not None:
        most = MAX_QUERIES_QUANTIZED_OF_LARGE if large else MAX_QUERIES_QUANTIZED
        # A block's codes are in registers, all of them at once.
        most = most if _block(case) * case.head_dim <= MAX_CODES else 0
    return _columns(case) <= most and shared_bytes(case, 2) <= SHARED_BYTES


def choose_prefill_tiles(case: PagedAttentionCase) -> PrefillTiles:
    """Static in the shapes, so that equal calls add in equal order."""
    heads, rows = query_rows(case)
    num_parts = _num_prefill_parts(case.batch * heads * -(-rows // QUERY_ROWS), case.width)
    # Wide heads take the registers that scores would, and the shared memory that the next item's queries would.
    # 16 tiles of 128 tokens at 6144 to 8192, 32 heads of 128, take 390 to 396 us with blocks of 128 on an H100 (610
    # TFLOP/s of what the mask leaves); with one item for each program 404 to 409, and then with blocks of 64 510.
    tiles = PrefillTiles(64, 2, 1, num_parts) if case.head_dim > 128 else PrefillTiles(128, 2, 2, num_parts)
    more = dataclasses.replace(tiles, num_buffers=4)
    return more if prefill_shared_bytes(case, more) <= SHARED_BYTES else tiles


def query_rows(case: PagedAttentionCase) -> tuple[int, int]:
    """(heads, rows of each) of the queries' array in `prefill`: the tokens of one head where they fill whole blocks of
    rows, else all queries of a kv head, which fill fewer blocks."""
    if case.num_tokens % QUERY_ROWS == 0:
        return case.num_heads, case.num_tokens
    return case.num_kv_heads, case.num_tokens * case.num_heads // case.num_kv_heads


def prefill_shared_bytes(case: PagedAttentionCase, chosen: PrefillTiles) -> int:
    """Shared memory of one block of threads: queries, the buffers, and what Mosaic takes."""
    return 2 * case.head_dim * (chosen.num_queries * QUERY_ROWS + 2 * chosen.num_buffers * chosen.block) + 2048 + 256


def _num_prefill_parts(programs: int, width: int) -> int:
    """Parts of a row, where `programs` items would leave processors without one.

    Measured on an H100 with JAX 0.11.2 (32 query and 8 kv heads of 128): one tile of 128 tokens (32 items) at the end
    of 8192 takes 114 us in 1 part, 51 in 4, 66 in 8; of 2048, 33 in 1 and 22 in 2. Four tiles (128 items) at the end
    of 8192 take 120 in 1 and 134 in 2; of 2048, 37 in 1 and 54 in 2.
    """
    return max(1, min(NUM_PROCESSORS // programs, width // 1024, MAX_PARTS))


def unsupported(case: PagedAttentionCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if (reason := hopper_chip.unsupported(target)) is not None:
        return reason
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.head_dim not in (64, 128, 256):
        return f"the kernel takes a head width of 64, 128 or 256, not {case.head_dim}"
    if case.page_size not in (16, 32, 64, 128):
        return f"the kernel takes pages of 16, 32, 64 or 128 positions, not {case.page_size}"
    if case.kv_dtype is not None:
        return _unsupported_quantized(case)
    return None


def _unsupported_quantized(case: PagedAttentionCase) -> str | None:
    # Weights times scales would leave float16's range.
    if case.dtype != "bfloat16":
        return f"the kernel takes pages of {case.kv_dtype} with queries of bfloat16, not {case.dtype}"
    # Copies go to multiples of 128 bytes, and each has the scales of a page.
    if case.page_size < 32:
        return f"the kernel takes pages of {case.kv_dtype} with 32, 64 or 128 positions, not {case.page_size}"
    return None
