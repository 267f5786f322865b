"""What the Hopper kernels for few queries share: their static facts, the blocks of a part, masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.paged_attention.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Statics:
    """What is fixed when the kernel is traced. `rows` is `num_tokens` · `group` queries, padded to `columns`."""

    num_tokens: int
    group: int
    columns: int
    head_dim: int
    page_size: int
    table_width: int
    writes: bool
    scale: float
    window: int | None
    soft_cap: float | None
    tiles: Tiles

    @property
    def rows(self) -> int:
        return self.num_tokens * self.group

    @property
    def block(self) -> int:
        return self.tiles.pages_per_block * self.page_size


def stage_queries(memory: Any) -> None:
    """Queries in the layout of a product, whose tiles have eight rows: a copy cannot write fewer of them.

    Columns past the queries hold what lay there: none of them reaches another, and none is written.
    """
    plgpu.barrier_wait(memory.early)
    memory.queries.T[...] = plgpu.load(memory.staged.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    plgpu.commit_smem()


def blocks_of(statics: Statics, part, length, start):
    """First block of keys of a part, and the one past its last: an even share of what the row's queries can see."""
    top = jnp.minimum(length, start + statics.num_tokens)
    top = jnp.clip(top, 0, statics.table_width * statics.page_size)
    bottom = jnp.int32(0)
    if statics.window is not None:
        bottom = jnp.clip(start - (statics.window - 1), 0, top)
    first = lax.div(bottom, jnp.int32(statics.block))
    end = lax.div(top + (statics.block - 1), jnp.int32(statics.block))
    if statics.tiles.num_parts == 1:
        return first, end
    share = lax.div(end - first + (statics.tiles.num_parts - 1), jnp.int32(statics.tiles.num_parts))
    first = first + part * share
    return first, jnp.minimum(first + share, end)


def buffer_of(statics: Statics, step):
    return lax.rem(step, jnp.int32(statics.tiles.num_buffers))


def masked(statics: Statics, scores, base, length, start) -> jax.Array:
    """Scores [keys, queries] in base 2, -inf where a query does not see a key. The first key is at position `base`."""
    if statics.soft_cap is None:
        scores = scores * (statics.scale * hopper.LOG2_E)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), by the exponential that the hardware has.
        grown = jnp.exp2(scores * (2 * statics.scale / statics.soft_cap * hopper.LOG2_E))
        scores = (1 - 2 / (1 + grown)) * (statics.soft_cap * hopper.LOG2_E)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=hopper.MATRIX)
    if statics.num_tokens == 1:
        seen = key < jnp.minimum(length, start + 1) - base
        if statics.window is not None:
            seen = seen & (key > start - statics.window - base)
    else:
        query = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=hopper.MATRIX)
        behind = lax.div(query, jnp.full_like(query, statics.group)) + (start - base) - key
        seen = (behind >= 0) & (key < length - base)
        if statics.window is not None:
            seen = seen & (behind < statics.window)
    return jnp.where(seen, scores, -jnp.inf)
