"""Attention over pages on TPU: decode, verification of drafts and chunks of prompts, one kernel for all.

Pages stay in device memory. A core walks over the rows and their tiles of queries, and for each over blocks of a few
pages that hold something for it: while one block is multiplied the next is copied, page by page, the first one of the
next tile or row too. Scores [queries, keys] of one kv head after another, an online softmax in float32, and out
[queries, H] += weights · V (FlashAttention-2, arXiv 2307.08691). Codes of quantised pages become the queries' dtype as
they are, which holds them exactly; a key's scale multiplies its scores, a value's its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from kernels.attention.tpu_scores import LEAST, product
from kernels.paged_attention import PagedAttentionCase, case_of
from kernels.paged_attention.tpu_tiles import (
    LANES,
    VMEM_BYTES,
    Tiles,
    check,
    choose_tiles,
    heads_together,
    laid_by_heads,
)

# Of a hidden key: its weight is 0 whatever the maximum, which is never below LEAST.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced. `grid`: (parts of the batch, rows of a part, tiles of a row)."""

    case: PagedAttentionCase
    tiles: Tiles
    grid: tuple[int, int, int]
    num_pages: int
    by_heads: bool
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def block(self) -> int:
        """Positions."""
        return self.tiles.pages * self.case.page_size

    @property
    def share(self) -> int:
        return self.case.num_heads // self.case.num_kv_heads

    @property
    def groups(self) -> list[range]:
        """Kv heads whose scores are one matrix."""
        number, most = self.case.num_kv_heads, heads_together(self.case, self.tiles)
        return [range(first, min(first + most, number)) for first in range(0, number, most)]

    def rows_of(self, heads) -> Any:
        return pl.ds(heads[0] * self.tiles.rows, len(heads) * self.tiles.rows)

    @property
    def exact(self) -> bool:
        """Exponents to the base e: to the base 2 the rounding of log2(e) would show in float32, and nowhere else."""
        return self.case.dtype == "float32"

    @property
    def unit(self) -> float:
        """Scores and their maximum are kept times this."""
        return 1.0 if self.exact else math.log2(math.e)

    def power(self, exponent):
        return jnp.exp(exponent) if self.exact else jnp.exp2(exponent)


class _Refs(NamedTuple):
    """`table`, `lengths` and `starts` in scalar memory; pages and scales in device memory. `buffers` hold two blocks of
    each, and `copied` counts the blocks that all steps so far have copied."""

    table: Any
    lengths: Any
    starts: Any
    q: Any
    sinks: Any
    pages: tuple[Any, ...]
    out: Any
    buffers: tuple[Any, ...]
    arrived: Any
    copied: Any
    highest: Any
    total: Any
    sums: Any


class _Walk(NamedTuple):
    """A step's pages [first, last) of its row, and the position that none of its queries sees or any beyond."""

    row: jax.Array
    start: jax.Array
    first: jax.Array
    last: jax.Array
    end: jax.Array
    blocks: jax.Array


# A jit of its own, so that a model's layers are traced once.
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
    tiles: Tiles | None = None,
    interpret=False,
) -> jax.Array:
    """out_BTNH in q's dtype; arguments as in `kernels.paged_attention.paged_attention`.

    `tiles`: None for those that `choose_tiles` gives. `interpret`: on any device, by Pallas's interpreter, for tests.

    Raises ValueError for tiles that a core's memories have no room for, and for values of another width than keys.
    """
    if k_pages_PSKH.shape != v_pages_PSKH.shape:
        raise ValueError(
            f"paged_attention: the TPU kernel takes k_pages and v_pages of one shape, not {list(k_pages_PSKH.shape)} "
            f"and {list(v_pages_PSKH.shape)}; set the paged_attention impl to 'xla'"
        )
    case = case_of(q_BTNH, k_pages_PSKH, page_table_BM)
    tiles = choose_tiles(case) if tiles is None else tiles
    check(case, tiles)
    B, T, N, H = q_BTNH.shape
    K, share = case.num_kv_heads, N // case.num_kv_heads
    rows = T * share
    by_heads = laid_by_heads(K, k_pages_PSKH.dtype.itemsize)
    # A core of v5p's two takes a part of the batch; elsewhere one copy more than needed is waited for.
    parts = 2 if B % 2 == 0 else 1
    grid = (parts, B // parts, -(-rows // tiles.rows))
    statics = _Statics(case, tiles, grid, len(k_pages_PSKH), by_heads, scale, window, soft_cap)
    q_BKRH = q_BTNH.reshape(B, T, K, share, H).transpose(0, 2, 1, 3, 4).reshape(B, K, rows, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, grid[2] * tiles.rows - rows), (0, 0)))
    pages = [jnp.swapaxes(x, 1, 2) if by_heads else x for x in (k_pages_PSKH, v_pages_PSKH)]
    if k_scale is not None:
        pages += [k_scale, v_scale]
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(K, share), (1, T))
        sinks = jnp.pad(sinks, ((0, 0), (0, q_BKRH.shape[2] - rows)))[..., None]
    integers = (page_table_BM.reshape(-1), lengths_B, starts_B)
    out = _call(statics, [x.astype(jnp.int32) for x in integers], q_BKRH, sinks, pages, interpret)
    return out[:, :, :rows].reshape(B, K, T, share, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _call(statics: _Statics, integers, q_BKRH, sinks_KR1, pages, interpret) -> jax.Array:
    (_, K, _, H), tiles, per_part = q_BKRH.shape, statics.tiles, statics.grid[1]
    queries = pl.BlockSpec((None, K, tiles.rows, H), lambda p, b, tile, *_: (p * per_part + b, 0, tile, 0))
    sinks = [] if sinks_KR1 is None else [sinks_KR1]
    sinks_spec = pl.BlockSpec((K, tiles.rows, 1), lambda p, b, tile, *_: (0, tile, 0))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    if not interpret:
        # Else XLA moves arrays that fit into vector memory there, dead pages and all.
        pages = [pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in pages]
    buffers = [pltpu.VMEM((2, tiles.pages, *array.shape[1:]), array.dtype) for array in pages]

    def body(*refs):
        refs = list(refs)
        taken = [refs.pop(0) for _ in range(4)]
        taken.append(refs.pop(0) if sinks else None)
        taken.append(tuple(refs.pop(0) for _ in pages))
        taken.append(refs.pop(0))
        taken.append(tuple(refs.pop(0) for _ in pages))
        _body(statics, _Refs(*taken, *refs))

    state = pltpu.VMEM((K * tiles.rows, LANES), jnp.float32)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(integers),
            grid=statics.grid,
            in_specs=[queries, *[sinks_spec] * len(sinks), *[in_place] * len(pages)],
            out_specs=queries,
            scratch_shapes=[
                *buffers,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                state,
                state,
                pltpu.VMEM((K * tiles.rows, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="paged_attention",
    )(*integers, q_BKRH, *sinks, *pages)


def _body(statics: _Statics, refs: _Refs):
    part, row, tile = (pl.program_id(axis) for axis in range(3))
    _, per_part, tiles = statics.grid
    here = _walk(statics, refs, part * per_part + row, tile)
    is_last_tile = tile + 1 == tiles
    follows = ~is_last_tile | (row + 1 < per_part)
    # Of the last step itself, whose pages are there, to read nothing past the arrays.
    next_row = jnp.where(is_last_tile & follows, row + 1, row)
    after = _walk(statics, refs, part * per_part + next_row, jnp.where(is_last_tile, 0, tile + 1))

    @pl.when((row == 0) & (tile == 0))
    def _():
        refs.copied[0] = 0
        _copy(statics, refs, here, 0, 0, "start")

    copied = refs.copied[0]
    _begin(statics, refs)

    def visit(index, _):
        slot, other = lax.rem(copied + index, 2), lax.rem(copied + index + 1, 2)
        more = index + 1 < here.blocks
        pl.when(more)(functools.partial(_copy, statics, refs, here, index + 1, other, "start"))
        pl.when(~more & follows)(functools.partial(_copy, statics, refs, after, 0, other, "start"))
        _copy(statics, refs, here, index, slot, "wait")
        _add(statics, refs, here, index, slot, tile)
        return 0

    lax.fori_loop(0, here.blocks, visit, 0)
    start_of_next = functools.partial(_copy, statics, refs, after, 0, lax.rem(copied, 2), "start")
    pl.when((here.blocks == 0) & follows)(start_of_next)
    refs.copied[0] = copied + here.blocks
    _end(statics, refs)


def _walk(statics: _Statics, refs: _Refs, row, tile) -> _Walk:
    """What the queries of a tile, of which some lie past the row's last one, can see."""
    case, rows = statics.case, statics.tiles.rows
    start = refs.starts[row]
    last_token = jnp.minimum(((tile + 1) * rows - 1) // statics.share, case.num_tokens - 1)
    end = jnp.minimum(jnp.minimum(refs.lengths[row], case.width), start + last_token + 1)
    begin = 0
    if statics.window is not None:
        begin = jnp.maximum(start + tile * rows // statics.share - statics.window + 1, 0)
    first, last = lax.div(begin, case.page_size), lax.div(jnp.maximum(end, 0) + case.page_size - 1, case.page_size)
    blocks = jnp.where(end > begin, lax.div(last - first + statics.tiles.pages - 1, statics.tiles.pages), 0)
    return _Walk(row, start, first, last, end, blocks)


def _copy(statics: _Statics, refs: _Refs, walk: _Walk, index, slot, what: str):
    """Starts, or waits for, the copies of a step's block into a slot of the buffers: of the live pages alone. Nothing
    where the step has no such block."""
    pages = statics.tiles.pages
    first = walk.first + index * pages
    number = jnp.where(index < walk.blocks, jnp.minimum(walk.last - first, pages), 0)

    def one(i, _):
        page = refs.table[walk.row * (statics.case.width // statics.case.page_size) + first + i]
        page = jnp.clip(page, 0, statics.num_pages - 1)
        for array, buffer in zip(refs.pages, refs.buffers, strict=True):
            copy = pltpu.make_async_copy(array.at[page], buffer.at[slot, i], refs.arrived.at[slot])
            getattr(copy, what)()
        return 0

    lax.fori_loop(0, number, one, 0)


def _begin(statics: _Statics, refs: _Refs):
    """A sink is a key with a weight and a value of zero."""
    refs.sums[...] = jnp.zeros_like(refs.sums)
    if refs.sinks is None:
        refs.highest[...] = jnp.full(refs.highest.shape, LEAST, jnp.float32)
        refs.total[...] = jnp.zeros_like(refs.total)
        return
    for head in range(statics.case.num_kv_heads):
        sink = jnp.broadcast_to(refs.sinks[head] * statics.unit, (statics.tiles.rows, LANES))
        highest, rows = jnp.maximum(sink, LEAST), statics.rows_of([head])
        refs.highest[rows], refs.total[rows] = highest, statics.power(sink - highest)


def _add(statics: _Statics, refs: _Refs, walk: _Walk, index, slot, tile):
    base = (walk.first + index * statics.tiles.pages) * statics.case.page_size
    if jnp.issubdtype(refs.buffers[1].dtype, jnp.floating):
        pl.when(base + statics.block > walk.end)(functools.partial(_clear, statics, refs, walk.end - base, slot))
    keys, values = (_heads(statics, buffer, slot, refs.q.dtype) for buffer in refs.buffers[:2])
    scales = [_positions_end_to_end(statics, buffer, slot) for buffer in refs.buffers[2:]]
    position = base + lax.broadcasted_iota(jnp.int32, (1, statics.block), 1)
    if scales:
        # What an earlier owner left may be NaN, and its weight is 0.
        scales[1] = jnp.where(position < walk.end, scales[1], 0)
    seen = _seen(statics, walk, position, tile)
    for heads in statics.groups:
        own = [[scale[head : head + 1] for head in heads] for scale in scales] or [[None] * len(heads)] * 2
        parts = [_scores(statics, refs.q[head], keys[head], k, seen) for head, k in zip(heads, own[0], strict=True)]
        scores, rows = jnp.concatenate(parts), statics.rows_of(heads)
        before = refs.highest[rows]
        highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = statics.power(scores - _across(highest, scores)), statics.power(before - highest)
        refs.highest[rows] = highest
        refs.total[rows] = refs.total[rows] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        parts = [
            _weighed(weights[i * statics.tiles.rows : (i + 1) * statics.tiles.rows], values[head], own[1][i])
            for i, head in enumerate(heads)
        ]
        refs.sums[rows] = refs.sums[rows] * _across(shrink, refs.sums[rows]) + jnp.concatenate(parts)


def _weighed(weights, values, scales) -> jax.Array:
    """float32 [queries, H]: the sums of one head's values."""
    weights = weights if scales is None else weights * scales
    return product(weights.astype(values.dtype), values, over=(1, 0))


def _clear(statics: _Statics, refs: _Refs, live, slot):
    """Values past the first `live` positions of a block become 0: their weight is, and 0 · NaN is NaN. Keys may stay,
    whose scores are replaced."""
    page_size, values = statics.case.page_size, refs.buffers[1]

    def one(i, _):
        position = lax.broadcasted_iota(jnp.int32, values.shape[2:], 1 if statics.by_heads else 0)
        kept = jnp.where(position < live - i * page_size, values[slot, i].astype(jnp.float32), 0)
        values[slot, i] = kept.astype(values.dtype)
        return 0

    lax.fori_loop(lax.div(live, page_size), statics.tiles.pages, one, 0)


def _heads(statics: _Statics, buffer, slot, dtype) -> jax.Array:
    """[K, keys, H] of a block in `dtype`, which holds codes exactly. They are widened first: their heads are further
    apart then, and 512 positions take 2,047 cycles of tpu7x and not 2,773, by the compiler's schedule."""
    pages, H = buffer[slot].astype(dtype), statics.case.head_dim
    if statics.by_heads:
        return jnp.swapaxes(pages, 0, 1).reshape(-1, statics.block, H)
    return jnp.swapaxes(pages.reshape(statics.block, -1, H), 0, 1)


def _positions_end_to_end(statics: _Statics, buffer, slot) -> jax.Array:
    """[K, keys] of a block's scales."""
    return jnp.concatenate([buffer[slot, i] for i in range(statics.tiles.pages)], axis=1)


def _seen(statics: _Statics, walk: _Walk, position, tile) -> jax.Array:
    """bool [queries, keys]."""
    rows = statics.tiles.rows
    index = tile * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    query = walk.start + lax.div(index, jnp.full_like(index, statics.share))
    seen = (position <= query) & (position < walk.end)
    return seen if statics.window is None else seen & (position > query - statics.window)


def _scores(statics: _Statics, q, keys, scales, seen) -> jax.Array:
    """float32 [queries, keys], times `unit`."""
    raw = product(q, keys, over=(1, 1))
    raw = raw if scales is None else raw * scales
    if statics.soft_cap is None:
        raw = raw * (statics.scale * statics.unit)
    else:
        raw = jnp.tanh(raw * (statics.scale / statics.soft_cap)) * (statics.soft_cap * statics.unit)
    return jnp.where(seen, raw, _HIDDEN)


def _across(x, like) -> jax.Array:
    """A number for each row, which is there in all lanes of `x`, over the columns of `like`."""
    width = like.shape[1]
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _end(statics: _Statics, refs: _Refs):
    for head in range(statics.case.num_kv_heads):
        rows = statics.rows_of([head])
        total, sums = refs.total[rows], refs.sums[rows]
        divisor = jnp.where(total == 0, 1, total)
        refs.out[head] = (sums / _across(divisor, sums)).astype(refs.out.dtype)
