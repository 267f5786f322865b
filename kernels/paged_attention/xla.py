"""Attention over pages by XLA: the pages of each row are copied end to end, then read by its attention.

The copy is what a kernel saves: keys and values are read and written once more than needed, over the whole width of
the page table.
"""

from __future__ import annotations

import jax

from kernels.attention import xla as attention
from kernels.paged_attention.gather import gather_pages


def paged_attention(
    q_BTNH,
    k_pages_PSKH,
    v_pages_PSKH,
    page_table_BM,
    lengths_B,
    starts_B,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks,
) -> jax.Array:
    """out_BTNH in q's dtype; arguments as in `kernels.paged_attention.paged_attention`."""
    keys = gather_pages(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
    out, _ = attention.attention(
        q_BTNH, **keys, scale=scale, causal=True, window=window, soft_cap=soft_cap, sinks=sinks
    )
    return out
