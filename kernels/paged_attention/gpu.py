"""Attention over pages on Hopper: every live page is read once, from where it lies.

One block of threads (a warpgroup of 128) serves one kv head of one part of one row: it walks the row's blocks of keys
with an online softmax, while the copies of the next blocks are under way. The queries that share the kv head are few,
so they are the columns of both products and the keys their rows: scores [keys, queries] = K · qᵀ, and out [H, queries]
= Vᵀ · weights. A row's keys are cut into parts where the rows alone would not fill the chip; `combine` adds those up.
A token's own key and value can come beside the pages: they are put where they belong in shared memory and, from the
block of threads that has read that page, in the page, which saves two launches of a microsecond each.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.paged_attention.combine import combine_parts
from kernels.paged_attention.few import Statics, blocks_of, buffer_of, masked, stage_queries
from kernels.paged_attention.tiles import Tiles

# Without the barriers that Pallas would put around every load, store and copy (they cost 1.5 us of 10.6 for one row of
# 512 tokens on an H100). What they guard is guarded here already: warps meet in the reductions over keys and in
# `commit_smem`, so between a warp's write to `weights` or to a buffer and another's last read of it lies at least one.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


class _Memory(NamedTuple):
    """Shared memory of a block of threads, and the barriers at which copies into it arrive."""

    staged: Any
    queries: Any
    keys: Any
    values: Any
    weights: Any
    out: Any
    new: Any
    early: Any
    keys_in: Any
    values_in: Any


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
    new: tuple[jax.Array, jax.Array] | None = None,
    interpret=None,
):
    """out_BTNH in q's dtype; arguments as in `kernels.paged_attention.paged_attention`, with the tiles chosen.

    `new`: keys and values [B, 1, K, H] of one token of each row, in the pages' dtype, that the pages do not hold yet:
    they go to position starts[b] where that is below lengths[b] and in the table, and the result is (out, k_pages,
    v_pages), in place where the pages given are not used again. `interpret`: parameters of Pallas's interpreter.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    assert new is None or T == 1, f"{T} tokens of a row: one can be written"
    group = N // K
    columns = -(-T * group // 8) * 8
    statics = Statics(T, group, columns, H, S, page_table_BM.shape[1], new is not None, scale, window, soft_cap, tiles)
    # The queries of one kv head side by side: a plain reshape where T is 1.
    heads_BJH = q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K * T * group, H)
    in_parts = tiles.num_parts > 1 or sinks is not None
    pages, integers = (k_pages_PSKH, v_pages_PSKH), (page_table_BM, lengths_B, starts_B)
    run = _kernel(statics, (B, K, H), q_BTNH.dtype, in_parts, interpret)
    if new is None:
        out, *lse = run(heads_BJH, *pages, *integers)
    else:
        # One operand, which XLA writes in one launch where the three were one product; three would take three.
        heads_BJH = jnp.concatenate([heads_BJH, *(one.reshape(B, K, H) for one in new)], axis=1)
        refs = [jax.new_ref(one) for one in pages]
        out, *lse = run(heads_BJH, *refs, *integers)
        pages = [jax.freeze(ref) for ref in refs]
    if in_parts:
        sinks_R = None if sinks is None else jnp.tile(sinks.reshape(K, group), (1, T))
        out = combine_parts(out, lse[0][..., : statics.rows], sinks_R).astype(q_BTNH.dtype)
    out = out.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out if new is None else (out, *pages)


def _kernel(statics: Statics, shape: tuple[int, int, int], dtype, in_parts: bool, interpret):
    """A call gives [out [B, K, R, H] in q's dtype], or in parts [float32 [X, B, K, R, H], base-2 lse [X, B, K, C]]."""
    (B, K, H), X = shape, statics.tiles.num_parts
    rows, columns = statics.rows, statics.columns
    outs = [jax.ShapeDtypeStruct((B, K, rows, H), dtype)]
    if in_parts:
        outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((X, B, K, rows, H), (X, B, K, columns))]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    buffers, arrivals = statics.tiles.num_buffers, statics.tiles.pages_per_block
    scratch = _Memory(
        staged=plgpu.SMEM((columns, H), dtype),
        queries=plgpu.SMEM((columns, H), dtype, transforms=tiled),
        keys=plgpu.SMEM((buffers, statics.block, H), dtype, transforms=tiled),
        values=plgpu.SMEM((buffers, statics.block, H), dtype, transforms=tiled),
        weights=plgpu.SMEM((columns, statics.block), dtype, transforms=tiled),
        out=plgpu.SMEM((columns, H), outs[0].dtype),
        new=plgpu.SMEM((2, H), dtype),
        early=plgpu.Barrier(num_arrivals=3 if statics.writes else 1),
        keys_in=plgpu.Barrier(num_arrivals=arrivals, num_barriers=buffers),
        values_in=plgpu.Barrier(num_arrivals=arrivals, num_barriers=buffers),
    )

    def body(*refs):
        pl.run_scoped(lambda **memory: _body(statics, in_parts, _Memory(**memory), *refs), **scratch._asdict())

    # The last axis runs fastest: the heads of a row, whose keys lie side by side in a page, are read together.
    mesh = plgpu.Mesh(grid=(X, B, K), grid_names=("part", "row", "head"))
    return pl.kernel(body, outs, mesh=mesh, compiler_params=_COMPILER, interpret=interpret, name="paged_attention")


def _body(
    statics: Statics,
    in_parts: bool,
    memory: _Memory,
    heads_ref,
    k_ref,
    v_ref,
    table_ref,
    lengths_ref,
    starts_ref,
    *outs,
):
    part, row, head = (lax.axis_index(name) for name in ("part", "row", "head"))
    _fetch_heads(statics, memory, heads_ref, row, head, k_ref.shape[2])
    length, start = lengths_ref[row], starts_ref[row]
    first, end = blocks_of(statics, part, length, start)
    # Position of the row's new key and value, below 0 where it has none, and its page: read now, needed at the end.
    new = jnp.where((start < length) & (start < statics.table_width * statics.page_size), start, -1)
    new_page = table_ref[row, lax.div(jnp.maximum(new, 0), jnp.int32(statics.page_size))] if statics.writes else None

    def pages_of(block):
        """Page numbers of a block; past the table's width, its last entry, for positions that are masked."""
        base = block * statics.tiles.pages_per_block
        entries = [jnp.minimum(base + i, statics.table_width - 1) for i in range(statics.tiles.pages_per_block)]
        return [table_ref[row, entry] for entry in entries]

    def fetch(block, pages):
        buffer = buffer_of(statics, block - first)
        for i, page in enumerate(pages):
            positions = pl.ds(i * statics.page_size, statics.page_size)
            for ref, smem, barriers in ((k_ref, memory.keys, memory.keys_in), (v_ref, memory.values, memory.values_in)):
                plgpu.copy_gmem_to_smem(ref.at[page, :, head, :], smem.at[buffer, positions], barriers.at[buffer])

    ahead = statics.tiles.num_buffers - 1
    early = [pages_of(first + i) for i in range(ahead)]
    for i, pages in enumerate(early):
        pl.when(first + i < end)(functools.partial(fetch, first + i, pages))
    stage_queries(memory)

    def step(block, carry):
        highest, total, out = carry
        buffer, base = buffer_of(statics, block - first), block * statics.block
        # Read now, needed after the softmax: the page table's latency stays hidden.
        pages = pages_of(block + ahead)
        plgpu.barrier_wait(memory.keys_in.at[buffer])
        if statics.writes:
            _put_and_clear_past(memory.keys.at[buffer], length - base, new - base, memory.new.at[0])
        scores = hopper.product(memory.keys.at[buffer], memory.queries.T)
        scores = masked(statics, scores, base, length, start)
        new_highest = jnp.maximum(highest, scores.max(axis=0))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores - hopper.along(new_highest, scores.shape, 1))
        # Sums stay apart for each key row until the end: adding over rows takes shared memory and a barrier.
        total = total * hopper.along(shrink, total.shape, 1) + weights
        memory.weights.T[...] = plgpu.layout_cast(weights.astype(memory.weights.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        # All four warps passed the barrier just above, so none still reads the buffer of the block before.
        pl.when(block + ahead < end)(functools.partial(fetch, block + ahead, pages))
        plgpu.barrier_wait(memory.values_in.at[buffer])
        if statics.writes:
            _put_and_clear_past(memory.values.at[buffer], length - base, new - base, memory.new.at[1])
        else:
            _clear_past(memory.values.at[buffer], length - base)
        update = hopper.product(memory.values.at[buffer].T, memory.weights.T)
        return new_highest, total, out * hopper.along(shrink, out.shape, 1) + update

    highest = plgpu.layout_cast(jnp.full((statics.columns,), hopper.LOWEST, jnp.float32), hopper.COLUMNS)
    total = plgpu.layout_cast(jnp.zeros((statics.block, statics.columns), jnp.float32), hopper.MATRIX)
    out = plgpu.layout_cast(jnp.zeros((statics.head_dim, statics.columns), jnp.float32), hopper.MATRIX)
    highest, total, out = lax.fori_loop(first, end, step, (highest, total, out))
    total = total.sum(axis=0)
    seen = total > 0
    out = out * hopper.along(jnp.where(seen, 1 / total, 0.0), out.shape, 1)
    memory.out.T[...] = plgpu.layout_cast(out.astype(memory.out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    place = (part, row, head) if in_parts else (row, head)
    plgpu.copy_smem_to_gmem(memory.out.at[pl.ds(0, statics.rows)], outs[0].at[place])
    if in_parts:
        outs[1][part, row, head] = jnp.where(seen, highest + jnp.log(total) * hopper.LOG2_E, -jnp.inf)
    if statics.writes:
        block = lax.div(new, jnp.int32(statics.block))

        # Every copy of this page has arrived in this block of threads, and no other reads this head of it.
        @pl.when((new >= 0) & (first <= block) & (block < end))
        def _():
            place = (new_page, lax.rem(new, jnp.int32(statics.page_size)), head)
            for i, pages_ref in enumerate((k_ref, v_ref)):
                plgpu.copy_smem_to_gmem(memory.new.at[i], pages_ref.at[place])

    plgpu.wait_smem_to_gmem(0)


def _fetch_heads(statics: Statics, memory: _Memory, heads_ref, row, head, num_kv_heads: int) -> None:
    """Starts the copies of the queries of a kv head, which lie side by side, and of its new key and value after all."""
    queries = heads_ref.at[row, pl.ds(head * statics.rows, statics.rows)]
    plgpu.copy_gmem_to_smem(queries, memory.staged.at[pl.ds(0, statics.rows)], memory.early)
    if statics.writes:
        for i in range(2):
            own = heads_ref.at[row, num_kv_heads * (statics.rows + i) + head]
            plgpu.copy_gmem_to_smem(own, memory.new.at[i], memory.early)


def _clear_past(v_smem, count) -> None:
    """Values of keys from `count` on become 0: their weight is 0, and 0 times what an earlier owner left may be NaN."""

    @pl.when(count < v_smem.shape[0])
    def _():
        values = plgpu.layout_cast(v_smem[...], hopper.MATRIX)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=hopper.MATRIX)
        v_smem[...] = jnp.where(key < count, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _put_and_clear_past(smem, count, new, new_smem) -> None:
    """Key or value number `new` of a block that ends with it becomes `new_smem`; those from `count` on become 0."""

    @pl.when(count <= smem.shape[0])
    def _():
        values = plgpu.layout_cast(smem[...], hopper.MATRIX)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=hopper.MATRIX)
        values = jnp.where(key < count, values, jnp.zeros_like(values))
        put = plgpu.load(new_smem, layout=hopper.COLUMNS, optimized=False)
        smem[...] = jnp.where(key == new, hopper.along(put, values.shape, 1), values)
        plgpu.commit_smem()
