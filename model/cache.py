"""Layout of the cache of keys and values: for each layer, pages that rows of a batch own through a page table."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.paged_attention.quantize import scale_bytes
from model.config import ModelConfig
from parallel.sharding import Placement

LayerPages = tuple[jax.Array, ...]
"""Keys and values of one layer, each [P, S, K, H]: pages, positions of a page, kv heads, head width; where those are
quantised, the scales of both after them, float32 [P, K, S]."""

PAGE_AXES, SCALE_AXES = (None, None, "act_heads", None), (None, "act_heads", None)
"""Logical axes of the pages of a layer, and of their scales."""


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

    def describe(shape: tuple[int, ...], dtype: str, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.SingleDeviceSharding(device) if placement is None else placement.sharding(*axes)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    pages = describe((num_pages, page_size, config.num_kv_heads, config.head_dim), dtype, PAGE_AXES)
    layer = (pages, pages)
    if scale_bytes(dtype):
        scales = describe((num_pages, config.num_kv_heads, page_size), "float32", SCALE_AXES)
        layer += (scales, scales)
    return [layer for _ in range(config.num_layers)]


def token_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the keys and values of one token in all layers, with their scales where `dtype` has any."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + scale_bytes(dtype)
    return 2 * config.num_layers * config.num_kv_heads * head
