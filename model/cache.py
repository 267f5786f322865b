"""Layout of the cache of keys and values: for each layer, pages that rows of a batch own through a page table."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from parallel.sharding import Placement

LayerPages = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each [P, S, K, H]: pages, positions of a page, kv heads, head width."""

PAGE_AXES = (None, None, "act_heads", None)
"""Logical axes of the pages of a layer."""


class PagedRows(NamedTuple):
    """Where the tokens of a batch [B, T] belong: row b's first counts[b] are at positions starts[b] and on, and
    position p is at offset p % S of page page_table[b, p // S]. A row with a count of 0 takes no part."""

    page_table_BM: jax.Array
    starts_B: jax.Array
    counts_B: jax.Array

    def positions(self, length: int) -> jax.Array:
        """int32 [B, T]."""
        return self.starts_B[:, None] + jnp.arange(length, dtype=jnp.int32)

    def valid(self, length: int) -> jax.Array:
        """bool [B, T]: not padding."""
        return jnp.arange(length, dtype=jnp.int32) < self.counts_B[:, None]


def abstract_cache(
    config: ModelConfig, *, num_pages: int, page_size: int, dtype: str, placement: Placement | None, device: jax.Device
) -> list[LayerPages]:
    """Shapes, dtypes and shardings of the cache: kv heads are split as attention's heads are."""
    shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    if placement is None:
        sharding = jax.sharding.SingleDeviceSharding(device)
    else:
        sharding = placement.sharding(*PAGE_AXES)
    pages = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    return [(pages, pages) for _ in range(config.num_layers)]


def token_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
