"""The grouped product as one batched product over blocks of rows, each with a copy of its group's matrix: for GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.grouped_matmul.blocks import Blocks, split

# Rows per block: a block copies one matrix (K·N elements) and each group wastes half a block on average.
_BLOCK = 512


def product(x, w, group_sizes, transpose: bool = False) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; with `transpose`, [M, K] of x [M, N] and the same w."""
    blocks = split(group_sizes, x.shape[0], _BLOCK)
    subscripts = "bmn,bkn->bmk" if transpose else "bmk,bkn->bmn"
    y = jnp.einsum(subscripts, _gather(x, blocks), w[blocks.group], preferred_element_type=_wide(x)).astype(x.dtype)
    # Back to rows: a row's block is the last one that starts at or before it, and rows of no group read past the end.
    row = jnp.arange(x.shape[0], dtype=blocks.start.dtype)
    block = jnp.searchsorted(_used_starts(blocks, x.shape[0]), row, side="right") - 1
    place = jnp.where(row < jnp.sum(group_sizes), block * _BLOCK + row - blocks.start[block], y.shape[0] * _BLOCK)
    return y.reshape(-1, y.shape[2]).at[place].get(mode="fill", fill_value=0)


def weight_gradient(x, dy, group_sizes) -> jax.Array:
    """[E, K, N]: x^T dy over each group's rows, of x [M, K] and dy [M, N]."""
    blocks = split(group_sizes, x.shape[0], _BLOCK)
    outer = jnp.einsum("bmk,bmn->bkn", _gather(x, blocks), _gather(dy, blocks), preferred_element_type=_wide(x))
    dw = jnp.zeros((group_sizes.shape[0], *outer.shape[1:]), outer.dtype)
    return dw.at[blocks.group].add(outer, indices_are_sorted=True).astype(x.dtype)


def _used_starts(blocks: Blocks, num_rows: int) -> jax.Array:
    """First row per block, blocks in use only; the others lie past every row."""
    return jnp.where(jnp.arange(blocks.start.shape[0]) < blocks.count, blocks.start, num_rows)


def _gather(x, blocks: Blocks) -> jax.Array:
    """[blocks, block, width]: each block's own rows, then zeros."""
    row = blocks.start[:, None] + jnp.arange(_BLOCK, dtype=blocks.start.dtype)
    own = (row < blocks.stop[:, None]) & (jnp.arange(blocks.start.shape[0]) < blocks.count)[:, None]
    return jnp.take(x, jnp.where(own, row, x.shape[0]), axis=0, mode="fill", fill_value=0)


def _wide(array: jax.Array):
    return jnp.promote_types(array.dtype, jnp.float32)
