"""Attention over pages on Hopper: every live page is read once, from where it lies.

One block of threads (a warpgroup of 128) serves one kv head of one part of one row: it walks the row's blocks of keys
with an online softmax, while the copies of the next blocks are under way. The queries that share the kv head are few,
so they are the columns of both products and the keys their rows: scores [keys, queries] = K · qᵀ, and out [H, queries]
= Vᵀ · weights. A row's keys are cut into parts where the rows alone would not fill the chip; `combine` adds those up.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.paged_attention.combine import combine_parts
from kernels.paged_attention.tiles import Tiles

_LOG2_E = math.log2(math.e)
_MATRIX = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Below any score, and finite: the difference of two of them is 0, not NaN.
_LOWEST = -1e30
# Without the barriers that Pallas would put around every load, store and copy (they cost 1.5 us of 10.6 for one row of
# 512 tokens on an H100). What they guard is guarded here already: warps meet in the reductions over keys and in
# `commit_smem`, so between a warp's write to `p_smem` or to a buffer and another's last read of it lies at least one.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced. `rows` is `num_tokens` · `group` queries, padded to `columns`."""

    num_tokens: int
    group: int
    columns: int
    head_dim: int
    page_size: int
    table_width: int
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


# A jit of its own, so that a model's layers are built once: 16 calls compile in 2.6 s with it and in 20 s without.
@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "tiles", "interpret"))
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
    tiles: Tiles,
    interpret=None,
) -> jax.Array:
    """out_BTNH in q's dtype; arguments as in `kernels.paged_attention.paged_attention`, with the tiles chosen.

    `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    group = N // K
    columns = -(-T * group // 8) * 8
    statics = _Statics(T, group, columns, H, S, page_table_BM.shape[1], scale, window, soft_cap, tiles)
    # The queries of one kv head side by side, in whole tiles of eight: a plain reshape and a pad where T is 1.
    q_BKRH = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * group, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, columns - T * group), (0, 0)))
    operands = (q_BKRH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
    in_parts = tiles.num_parts > 1 or sinks is not None
    out, lse = _call(statics, operands, in_parts, interpret)
    if in_parts:
        sinks_R = None if sinks is None else jnp.tile(sinks.reshape(K, group), (1, T))
        out = combine_parts(out, lse[..., : statics.rows], sinks_R).astype(q_BTNH.dtype)
    return out.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _call(statics: _Statics, operands, in_parts: bool, interpret):
    """(out [B, K, R, H] in q's dtype, None), or in parts (float32 [X, B, K, R, H], base-2 lse [X, B, K, columns])."""
    B, K, columns, H = operands[0].shape
    X, dtype = statics.tiles.num_parts, operands[0].dtype
    if in_parts:
        out_dtype = jnp.dtype(jnp.float32)
        outs = [
            jax.ShapeDtypeStruct((X, B, K, statics.rows, H), out_dtype),
            jax.ShapeDtypeStruct((X, B, K, columns), jnp.float32),
        ]
    else:
        out_dtype, outs = dtype, [jax.ShapeDtypeStruct((B, K, statics.rows, H), dtype)]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    buffers = statics.tiles.num_buffers
    run = plgpu.kernel(
        functools.partial(_body, statics, in_parts),
        out_type=outs,
        scratch_types=[
            plgpu.SMEM((columns, H), dtype, transforms=tiled),
            plgpu.SMEM((buffers, statics.block, H), dtype, transforms=tiled),
            plgpu.SMEM((buffers, statics.block, H), dtype, transforms=tiled),
            plgpu.SMEM((columns, statics.block), dtype, transforms=tiled),
            plgpu.SMEM((columns, H), out_dtype),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=statics.tiles.pages_per_block, num_barriers=buffers),
            plgpu.Barrier(num_arrivals=statics.tiles.pages_per_block, num_barriers=buffers),
        ],
        # The last axis runs fastest: the heads of a row, whose keys lie side by side in a page, are read together.
        grid=(X, B, K),
        grid_names=("part", "row", "head"),
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    out, *rest = run(*operands)
    return out, rest[0] if rest else None


def _body(statics: _Statics, in_parts: bool, q_ref, k_ref, v_ref, table_ref, lengths_ref, starts_ref, *refs):
    out_refs, (q_smem, k_smem, v_smem, p_smem, out_smem, q_barrier, k_barriers, v_barriers) = refs[:-8], refs[-8:]
    part, row, head = (lax.axis_index(name) for name in ("part", "row", "head"))
    plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem, q_barrier)
    length, start = lengths_ref[row], starts_ref[row]
    first, end = _blocks_of(statics, part, length, start)

    def pages_of(block):
        """Page numbers of a block; past the table's width, its last entry, for positions that are masked."""
        base = block * statics.tiles.pages_per_block
        entries = [jnp.minimum(base + i, statics.table_width - 1) for i in range(statics.tiles.pages_per_block)]
        return [table_ref[row, entry] for entry in entries]

    def fetch(block, pages):
        buffer = _buffer(statics, block - first)
        for i, page in enumerate(pages):
            positions = pl.ds(i * statics.page_size, statics.page_size)
            for pages_ref, smem, barriers in ((k_ref, k_smem, k_barriers), (v_ref, v_smem, v_barriers)):
                plgpu.copy_gmem_to_smem(pages_ref.at[page, :, head, :], smem.at[buffer, positions], barriers.at[buffer])

    ahead = statics.tiles.num_buffers - 1
    early = [pages_of(first + i) for i in range(ahead)]
    for i, pages in enumerate(early):
        pl.when(first + i < end)(functools.partial(fetch, first + i, pages))
    plgpu.barrier_wait(q_barrier)

    def step(block, carry):
        highest, total, out = carry
        buffer = _buffer(statics, block - first)
        # Read now, needed after the softmax: the page table's latency stays hidden.
        pages = pages_of(block + ahead)
        plgpu.barrier_wait(k_barriers.at[buffer])
        scores = _product((statics.block, statics.columns), k_smem.at[buffer], q_smem.T)
        scores = _masked(statics, scores, block * statics.block, length, start)
        new_highest = jnp.maximum(highest, scores.max(axis=0))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores - _along_columns(new_highest, scores.shape))
        # Sums stay apart for each key row until the end: adding over rows takes shared memory and a barrier.
        total = total * _along_columns(shrink, total.shape) + weights
        p_smem.T[...] = plgpu.layout_cast(weights.astype(q_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        # All four warps passed the barrier just above, so none still reads the buffer of the block before.
        pl.when(block + ahead < end)(functools.partial(fetch, block + ahead, pages))
        plgpu.barrier_wait(v_barriers.at[buffer])
        _clear_past(v_smem.at[buffer], length - block * statics.block)
        update = _product((statics.head_dim, statics.columns), v_smem.at[buffer].T, p_smem.T)
        return new_highest, total, out * _along_columns(shrink, out.shape) + update

    highest = plgpu.layout_cast(jnp.full((statics.columns,), _LOWEST, jnp.float32), _COLUMNS)
    total = plgpu.layout_cast(jnp.zeros((statics.block, statics.columns), jnp.float32), _MATRIX)
    out = plgpu.layout_cast(jnp.zeros((statics.head_dim, statics.columns), jnp.float32), _MATRIX)
    highest, total, out = lax.fori_loop(first, end, step, (highest, total, out))
    total = total.sum(axis=0)
    seen = total > 0
    out = out * _along_columns(jnp.where(seen, 1 / total, 0.0), out.shape)
    out_smem.T[...] = plgpu.layout_cast(out.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    place = (part, row, head) if in_parts else (row, head)
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, statics.rows)], out_refs[0].at[place])
    if in_parts:
        out_refs[1][part, row, head] = jnp.where(seen, highest + jnp.log(total) * _LOG2_E, -jnp.inf)
    plgpu.wait_smem_to_gmem(0)


def _blocks_of(statics: _Statics, part, length, start):
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


def _buffer(statics: _Statics, step):
    return lax.rem(step, jnp.int32(statics.tiles.num_buffers))


def _product(shape: tuple[int, int], a_smem, b_smem) -> jax.Array:
    def product(acc):
        plgpu.wgmma(acc, a_smem, b_smem)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _along_columns(x_R: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(x_R, shape, [1])


def _masked(statics: _Statics, scores, base, length, start) -> jax.Array:
    """Scores [keys, queries] in base 2, -inf where a query does not see a key. The first key is at position `base`."""
    if statics.soft_cap is None:
        scores = scores * (statics.scale * _LOG2_E)
    else:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), by the exponential that the hardware has.
        grown = jnp.exp2(scores * (2 * statics.scale / statics.soft_cap * _LOG2_E))
        scores = (1 - 2 / (1 + grown)) * (statics.soft_cap * _LOG2_E)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=_MATRIX)
    if statics.num_tokens == 1:
        seen = key < jnp.minimum(length, start + 1) - base
        if statics.window is not None:
            seen = seen & (key > start - statics.window - base)
    else:
        query = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_MATRIX)
        behind = lax.div(query, jnp.full_like(query, statics.group)) + (start - base) - key
        seen = (behind >= 0) & (key < length - base)
        if statics.window is not None:
            seen = seen & (behind < statics.window)
    return jnp.where(seen, scores, -jnp.inf)


def _clear_past(v_smem, count) -> None:
    """Values of keys from `count` on become 0: their weight is 0, and 0 times what an earlier owner left may be NaN."""

    @pl.when(count < v_smem.shape[0])
    def _():
        values = plgpu.layout_cast(v_smem[...], _MATRIX)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_MATRIX)
        v_smem[...] = jnp.where(key < count, values, jnp.zeros_like(values))
        plgpu.commit_smem()
