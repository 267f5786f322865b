"""Attention of few queries over pages of 8 bits on Hopper: `gpu` with keys and values that pass through registers.

The walk over a row's blocks, the parts and the shapes of the products are those of `gpu`. A block's codes become
bfloat16 on their way into the registers of a product (`narrow`), where a new key and value are put too, so that nothing
in shared memory is written again. A key's scale multiplies its scores, a value's the weights, after their sum is taken.
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
from kernels.paged_attention import narrow
from kernels.paged_attention.combine import combine_parts
from kernels.paged_attention.few import Statics, blocks_of, buffer_of, masked, stage_queries
from kernels.paged_attention.quantize import quantize_heads, scale_of
from kernels.paged_attention.tiles import Tiles

# As in `gpu`: between a warp's write to `weights` or its read of a buffer and the next use of either by another lies a
# reduction over keys or a `commit_smem`, where all four meet.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


class _Memory(NamedTuple):
    """Shared memory of a block of threads, and the barriers at which copies into it arrive; scales come with keys.

    `new`: codes of a row's own key and value in bfloat16, with the even elements first and then as they are. `codes`:
    the same as they go to their page.
    """

    staged: Any
    queries: Any
    keys: Any
    values: Any
    k_scale: Any
    v_scale: Any
    weights: Any
    out: Any
    new: Any
    codes: Any
    early: Any
    keys_in: Any
    values_in: Any


class _Refs(NamedTuple):
    """Operands in device memory. `largest` [B, 2·K]: magnitudes in the rows' new keys, then values; None without."""

    heads: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    table: Any
    lengths: Any
    starts: Any
    largest: Any = None


@functools.partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "tiles", "interpret"))
def paged_attention(
    q_BTNH,
    k_pages_PSKH,
    v_pages_PSKH,
    page_table_BM,
    lengths_B,
    starts_B,
    *,
    k_scale,
    v_scale,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks,
    tiles: Tiles,
    new: tuple[jax.Array, jax.Array] | None = None,
    interpret=None,
):
    """As `gpu.paged_attention`, over codes with float32 scales [P, K, S]; `new`, which is quantised here, makes the
    result (out, k_pages, v_pages, k_scale, v_scale)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    assert new is None or T == 1, f"{T} tokens of a row: one can be written"
    group = N // K
    columns = -(-T * group // 8) * 8
    statics = Statics(T, group, columns, H, S, page_table_BM.shape[1], new is not None, scale, window, soft_cap, tiles)
    heads_BJH = narrow.split(q_BTNH.reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B, K * T * group, H))
    in_parts = tiles.num_parts > 1 or sinks is not None
    pages, integers = (k_pages_PSKH, v_pages_PSKH, k_scale, v_scale), (page_table_BM, lengths_B, starts_B)
    run = _kernel(statics, (B, K, H), (q_BTNH.dtype, k_pages_PSKH.dtype), in_parts, interpret)
    if new is None:
        out, *lse = run(heads_BJH, *pages, *integers)
    else:
        new_BJH = jnp.concatenate(new, axis=2)[:, 0]
        codes_BJH = quantize_heads(new_BJH, k_pages_PSKH.dtype)[0].astype(heads_BJH.dtype)
        # One operand, which XLA writes in one launch; so the kernel makes the scales again, and the codes of a byte.
        heads_BJH = jnp.concatenate([heads_BJH, narrow.split(codes_BJH), codes_BJH], axis=1)
        refs = [jax.new_ref(one) for one in pages]
        out, *lse = run(heads_BJH, *refs, *integers, jnp.max(jnp.abs(new_BJH.astype(jnp.float32)), axis=-1))
        pages = [jax.freeze(ref) for ref in refs]
    out = narrow.join(out)
    if in_parts:
        sinks_R = None if sinks is None else jnp.tile(sinks.reshape(K, group), (1, T))
        out = combine_parts(out, lse[0][..., : statics.rows], sinks_R).astype(q_BTNH.dtype)
    out = out.reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out if new is None else (out, *pages)


def _kernel(statics: Statics, shape: tuple[int, int, int], dtypes, in_parts: bool, interpret):
    """A call gives what that of `gpu` does, with the even elements of a head before the odd."""
    (B, K, H), X, (dtype, code) = shape, statics.tiles.num_parts, dtypes
    rows, columns = statics.rows, statics.columns
    outs = [jax.ShapeDtypeStruct((B, K, rows, H), dtype)]
    if in_parts:
        outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((X, B, K, rows, H), (X, B, K, columns))]
    tiled, halved = (
        (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)) for width in (64, min(64, H // 2))
    )
    buffers, pages = statics.tiles.num_buffers, statics.tiles.pages_per_block
    ring = plgpu.SMEM((buffers, statics.block, H), code, transforms=narrow.transforms(H))
    scales = plgpu.SMEM((buffers, statics.block), jnp.float32)
    scratch = _Memory(
        staged=plgpu.SMEM((columns, H), dtype),
        queries=plgpu.SMEM((columns, H), dtype, transforms=halved),
        keys=ring,
        values=ring,
        k_scale=scales,
        v_scale=scales,
        weights=plgpu.SMEM((columns, statics.block), dtype, transforms=tiled),
        out=plgpu.SMEM((columns, H), outs[0].dtype),
        new=plgpu.SMEM((4, H), dtype),
        # Copies begin at multiples of 128 bytes.
        codes=plgpu.SMEM((2, max(H, 128)), code),
        early=plgpu.Barrier(num_arrivals=5 if statics.writes else 1),
        keys_in=plgpu.Barrier(num_arrivals=3 * pages, num_barriers=buffers),
        values_in=plgpu.Barrier(num_arrivals=pages, num_barriers=buffers),
    )

    def body(*refs):
        num_operands = 9 if statics.writes else 8
        operands, outs = _Refs(*refs[:num_operands]), refs[num_operands:]
        pl.run_scoped(lambda **memory: _body(statics, in_parts, _Memory(**memory), operands, outs), **scratch._asdict())

    # The last axis runs fastest: the heads of a row, whose keys lie side by side in a page, are read together.
    mesh = plgpu.Mesh(grid=(X, B, K), grid_names=("part", "row", "head"))
    name = "paged_attention_quantized"
    return pl.kernel(body, outs, mesh=mesh, compiler_params=_COMPILER, interpret=interpret, name=name)


def _body(statics: Statics, in_parts: bool, memory: _Memory, refs: _Refs, outs):
    part, row, head = (lax.axis_index(name) for name in ("part", "row", "head"))
    _fetch_heads(statics, memory, refs, row, head)
    length, start = refs.lengths[row], refs.starts[row]
    first, end = blocks_of(statics, part, length, start)
    # Position of the row's new key and value, below 0 where it has none, and its page: read now, needed at the end.
    new = jnp.where((start < length) & (start < statics.table_width * statics.page_size), start, -1)
    new_page, new_scales = None, None
    if statics.writes:
        new_page = refs.table[row, lax.div(jnp.maximum(new, 0), jnp.int32(statics.page_size))]
        new_scales = [scale_of(refs.largest[row, head + i * refs.k.shape[2]], memory.codes.dtype) for i in range(2)]

    def pages_of(block):
        """Page numbers of a block; past the table's width, its last entry, for positions that are masked."""
        base = block * statics.tiles.pages_per_block
        entries = [jnp.minimum(base + i, statics.table_width - 1) for i in range(statics.tiles.pages_per_block)]
        return [refs.table[row, entry] for entry in entries]

    def fetch(block, pages):
        buffer = buffer_of(statics, block - first)
        keys_in, values_in = memory.keys_in.at[buffer], memory.values_in.at[buffer]
        for i, page in enumerate(pages):
            to = pl.ds(i * statics.page_size, statics.page_size)
            plgpu.copy_gmem_to_smem(refs.k.at[page, :, head, :], memory.keys.at[buffer, to], keys_in)
            plgpu.copy_gmem_to_smem(refs.k_scale.at[page, head], memory.k_scale.at[buffer, to], keys_in)
            plgpu.copy_gmem_to_smem(refs.v_scale.at[page, head], memory.v_scale.at[buffer, to], keys_in)
            plgpu.copy_gmem_to_smem(refs.v.at[page, :, head, :], memory.values.at[buffer, to], values_in)

    ahead = statics.tiles.num_buffers - 1
    early = [pages_of(first + i) for i in range(ahead)]
    for i, pages in enumerate(early):
        pl.when(first + i < end)(functools.partial(fetch, first + i, pages))
    stage_queries(memory)

    def step(block, carry, put=False):
        highest, total, *out = carry
        buffer, base = buffer_of(statics, block - first), block * statics.block
        # Read now, needed after the softmax: the page table's latency stays hidden.
        pages = pages_of(block + ahead)
        plgpu.barrier_wait(memory.keys_in.at[buffer])
        keys = narrow.load(memory.keys.at[buffer])
        k_scale, v_scale = (
            plgpu.load(smem.at[buffer], layout=hopper.ROWS, optimized=False)
            for smem in (memory.k_scale, memory.v_scale)
        )
        key = plgpu.broadcasted_iota(jnp.int32, k_scale.shape, 0, layout=hopper.ROWS)
        if put:
            keys = _put(keys, memory.new.at[0], new - base, 0)
            k_scale, v_scale = (
                jnp.where(key == new - base, own, old) for own, old in zip(new_scales, (k_scale, v_scale), strict=True)
            )
        scores = narrow.scores_of(*keys, memory.queries.T)
        scores = scores * hopper.along(k_scale, scores.shape, 0)
        scores = masked(statics, scores, base, length, start)
        new_highest = jnp.maximum(highest, scores.max(axis=0))
        shrink = jnp.exp2(highest - new_highest)
        weights = jnp.exp2(scores - hopper.along(new_highest, scores.shape, 1))
        # Sums stay apart for each key row until the end: adding over rows takes shared memory and a barrier.
        total = total * hopper.along(shrink, total.shape, 1) + weights
        # A scale that an earlier owner left may be NaN, and its weight is 0.
        weights = weights * hopper.along(jnp.where(key < length - base, v_scale, 0.0), weights.shape, 0)
        memory.weights.T[...] = plgpu.layout_cast(weights.astype(memory.weights.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        # All four warps passed the barrier just above, so none still reads the buffer of the block before.
        pl.when(block + ahead < end)(functools.partial(fetch, block + ahead, pages))
        plgpu.barrier_wait(memory.values_in.at[buffer])
        values = narrow.load_transposed(memory.values.at[buffer])
        if put:
            values = _put(values, memory.new.at[1], new - base, 1)
        update = narrow.products(values, memory.weights.T)
        return new_highest, total, *(o * hopper.along(shrink, o.shape, 1) + u for o, u in zip(out, update, strict=True))

    carry = _nothing(statics)
    if statics.writes:
        last = jnp.where(
            new >= 0, jnp.clip(lax.div(new, jnp.int32(statics.block)), first, jnp.maximum(first, end)), end
        )
        carry = lax.fori_loop(first, last, step, carry)
        carry = lax.fori_loop(last, end, functools.partial(step, put=True), carry)
    else:
        carry = lax.fori_loop(first, end, step, carry)
    _store(statics, in_parts, memory, carry, outs, (part, row, head))
    if statics.writes:
        block = lax.div(new, jnp.int32(statics.block))

        # Every copy of this page has arrived in this block of threads, and no other reads this head of it.
        @pl.when((new >= 0) & (first <= block) & (block < end))
        def _():
            _write_new(memory, refs, (new_page, lax.rem(new, jnp.int32(statics.page_size)), head), new_scales)

    plgpu.wait_smem_to_gmem(0)


def _fetch_heads(statics: Statics, memory: _Memory, refs: _Refs, row, head) -> None:
    """Starts the copies of the queries of a kv head, which lie side by side, and of its new key and value after all."""
    num_kv_heads = refs.k.shape[2]
    queries = refs.heads.at[row, pl.ds(head * statics.rows, statics.rows)]
    plgpu.copy_gmem_to_smem(queries, memory.staged.at[pl.ds(0, statics.rows)], memory.early)
    if statics.writes:
        for i in range(4):
            own = num_kv_heads * (statics.rows + i) + head
            plgpu.copy_gmem_to_smem(refs.heads.at[row, own], memory.new.at[i], memory.early)


def _write_new(memory: _Memory, refs: _Refs, place, new_scales) -> None:
    """Starts the copies of a row's own key and value to (page, offset, head), and writes their scales."""
    page, offset, head = place
    whole = pl.ds(0, memory.new.shape[1])
    memory.codes[:, whole] = memory.new[pl.ds(2, 2)].astype(jnp.float32).astype(memory.codes.dtype)
    plgpu.commit_smem()
    for i, (pages, scales) in enumerate(((refs.k, refs.k_scale), (refs.v, refs.v_scale))):
        plgpu.copy_smem_to_gmem(memory.codes.at[i, whole], pages.at[place])
        scales[page, head, offset] = new_scales[i]


def _nothing(statics: Statics) -> tuple[jax.Array, ...]:
    """(highest, total, and out by the rows of `narrow.load_transposed`) before any block."""
    highest = plgpu.layout_cast(jnp.full((statics.columns,), hopper.LOWEST, jnp.float32), hopper.COLUMNS)
    total = plgpu.layout_cast(jnp.zeros((statics.block, statics.columns), jnp.float32), hopper.MATRIX)
    rows = max(statics.head_dim // 2, 64)
    out = plgpu.layout_cast(jnp.zeros((rows, statics.columns), jnp.float32), hopper.MATRIX)
    return highest, total, *[out] * (statics.head_dim // rows)


def _put(parts, new_smem, index, axis: int) -> list[jax.Array]:
    """`parts` of a block with those of `new_smem` at `index` of `axis`."""
    results, layout = [], hopper.COLUMNS if axis == 0 else hopper.ROWS
    for i, part in enumerate(parts):
        width = part.shape[1 - axis]
        own = plgpu.load(new_smem.at[pl.ds(i * width, width)], layout=layout, optimized=False)
        place = plgpu.broadcasted_iota(jnp.int32, part.shape, axis, layout=hopper.MATRIX)
        results.append(jnp.where(place == index, hopper.along(own, part.shape, 1 - axis), part))
    return results


def _store(statics: Statics, in_parts: bool, memory: _Memory, carry, outs, coordinates) -> None:
    """Starts the copy of the normalised outputs, the even rows first."""
    highest, total, *out = carry
    total = total.sum(axis=0)
    seen = total > 0
    for i, half in enumerate(out):
        half = half * hopper.along(jnp.where(seen, 1 / total, 0.0), half.shape, 1)
        half = plgpu.layout_cast(half.astype(memory.out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        memory.out.at[:, pl.ds(i * half.shape[0], half.shape[0])].T[...] = half
    plgpu.commit_smem()
    place = coordinates if in_parts else coordinates[1:]
    plgpu.copy_smem_to_gmem(memory.out.at[pl.ds(0, statics.rows)], outs[0].at[place])
    if in_parts:
        outs[1][coordinates] = jnp.where(seen, highest + jnp.log(total) * hopper.LOG2_E, -jnp.inf)
