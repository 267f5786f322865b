"""What the Hopper kernel can take, and how it cuts a call into blocks of keys and parts of a row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.paged_attention import PagedAttentionCase

# Keys are the rows of a warpgroup's matrix product (wgmma), which come in 64s.
KEY_ROWS = 64
# Scores and outputs lie in registers with a column for each query: past 64 columns they would spill.
MAX_QUERIES = 64
SHARED_BYTES = 227 * 1024
NUM_PROCESSORS = 132
MAX_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """pages_per_block: pages of one block of keys; num_buffers: blocks in shared memory; num_parts: parts of a row."""

    pages_per_block: int
    num_buffers: int
    num_parts: int


def choose_tiles(case: PagedAttentionCase) -> Tiles:
    """Static in the shapes, so that equal calls add in equal order."""
    pages_per_block = max(1, KEY_ROWS // case.page_size)
    block_bytes = 2 * 2 * pages_per_block * case.page_size * case.head_dim
    # Half of a processor's shared memory: two blocks of threads on each, so that one computes while the other waits.
    num_buffers = max(2, min(4, (SHARED_BYTES // 2 - 12 * 1024) // block_bytes))
    return Tiles(pages_per_block, num_buffers, _num_parts(case.batch * case.num_kv_heads, case.width))


def _num_parts(programs: int, width: int) -> int:
    """Parts of a row, where `programs` blocks of threads (row and kv head) would be too few.

    The sum over parts costs two launches and grows with them. Measured on an H100 (8 kv heads of 128): one row of 512
    takes 9.1 us in 1 part, 7.0 in 2, 6.6 in 4, 9.2 in 8; one row of 8192 takes 18.7 in 8, 19.9 in 16, 21.2 in 32; eight
    rows of 1024 take 17.8 in 1, 17.9 in 2, 19.4 in 4. So half a chip is filled with short parts, the rest with long.
    """
    short = min(NUM_PROCESSORS // 2 // programs, width // 128, 8)
    long = min(2 * NUM_PROCESSORS // programs, width // 1024, MAX_PARTS)
    return max(1, short, long)


def unsupported(case: PagedAttentionCase, target: Target) -> str | None:
    """Why the kernel can't compute this; None where it can."""
    if target.platform != "gpu" or target.compute_capability != (9, 0):
        return f"the kernel is written for NVIDIA GPUs of compute capability 9.0, and the target is {target}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"the kernel takes bfloat16 and float16, not {case.dtype}"
    if case.head_dim not in (64, 128, 256):
        return f"the kernel takes a head width of 64, 128 or 256, not {case.head_dim}"
    if case.page_size not in (16, 32, 64, 128):
        return f"the kernel takes pages of 16, 32, 64 or 128 positions, not {case.page_size}"
    queries = case.num_tokens * case.num_heads // case.num_kv_heads
    if queries > MAX_QUERIES:
        return (
            f"the kernel takes up to {MAX_QUERIES} queries of a row for each kv head, "
            f"not {queries} ({case.num_tokens} tokens of {case.num_heads // case.num_kv_heads} heads)"
        )
    return None
