"""Attention of many queries of a row over its pages on Hopper: prefill, and verification of long drafts.

An item is 128 query rows of one head: two warpgroups multiply, 64 rows each, and a third copies the queries and, page
by page into a ring of buffers, the blocks of keys and values. Scores [queries, keys] = q · Kᵀ, an online softmax in
registers, and out [queries, H] += weights · V, with the weights still in registers. The two warpgroups take turns, so
that one multiplies while the other has its softmax (FlashAttention-3, arXiv 2407.08608, section 3.1). Each processor of
the chip takes item after item, and copies for the next one before it has finished one. Where the items would not fill
the chip a row's keys are cut into parts, and `combine` adds those up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.hopper_chip import NUM_PROCESSORS
from kernels.paged_attention.combine import combine_parts
from kernels.paged_attention.tiles import QUERY_ROWS, PrefillTiles

# Rows of one matrix product of a warpgroup.
_WARPGROUP_ROWS = QUERY_ROWS // 2
_COPIER = 2
# Registers of a thread: three warpgroups start with 168 each, and share them out anew.
_REGISTERS, _COPIER_REGISTERS = 240, 24
# Without the barriers that Pallas would put around every load and store: all threads of a warpgroup arrive at the
# barriers below, and warpgroups write to shared memory in `_clear_past` alone, each thread what it read.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced. `share` heads of the queries' array read one kv head, and
    `rows_per_token` of its rows have one position."""

    num_tokens: int
    rows_per_token: int
    share: int
    head_dim: int
    page_size: int
    table_width: int
    scale: float
    window: int | None
    soft_cap: float | None
    tiles: PrefillTiles
    # (rows, chunks of 128 query rows, parts, heads): what is computed one by one.
    items: tuple[int, int, int, int]

    @property
    def num_programs(self) -> int:
        return min(math.prod(self.items), NUM_PROCESSORS)

    @property
    def block(self) -> int:
        return self.tiles.block

    @property
    def masks_all(self) -> bool:
        """With wide heads, keeping apart the blocks that need no mask would spill two to ten registers."""
        return self.head_dim > 128

    @property
    def copied(self) -> int:
        """Positions of one copy: a page, or a block's part of it."""
        return min(self.page_size, self.block)


class _Shared(NamedTuple):
    """Shared memory of a block of threads: queries of each warpgroup, the ring of buffers, and the barriers.

    `arrived`: the copy is there. `free`: both warpgroups are done with it. `turn`: the matrix unit is left to a
    warpgroup. `cleared`: both warpgroups have cleared their share of the values.
    """

    q: Any
    k: Any
    v: Any
    q_arrived: Any
    k_arrived: Any
    v_arrived: Any
    q_free: Any
    k_free: Any
    v_free: Any
    turn: Any
    cleared: Any


class _Work(NamedTuple):
    """One item: rows base.. of `head` of a row, over blocks [first, end) of its keys. Block b is the (b + `offset`)th
    that the program copies."""

    part: jax.Array
    row: jax.Array
    head: jax.Array
    base: jax.Array
    length: jax.Array
    start: jax.Array
    first: jax.Array
    end: jax.Array
    offset: jax.Array


class _Softmax(NamedTuple):
    """Base-2 maximum and sum of each row's weights, and their sum of values, so far."""

    highest: jax.Array
    total: jax.Array
    out: jax.Array
    weights: jax.Array


# A jit of its own, so that a model's layers are built once.
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
    tiles: PrefillTiles,
    interpret=None,
) -> jax.Array:
    """out_BTNH in q's dtype; arguments as in `kernels.paged_attention.paged_attention`, with the tiles chosen.

    `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    # The tokens of one head fill whole blocks, or the queries of a kv head lie side by side and fill fewer.
    rows_per_token = 1 if T % QUERY_ROWS == 0 else N // K
    share = N // K // rows_per_token
    items = (B, -(-T * rows_per_token // QUERY_ROWS), tiles.num_parts, N // rows_per_token)
    statics = _Statics(T, rows_per_token, share, H, S, page_table_BM.shape[1], scale, window, soft_cap, tiles, items)
    q_BRGH = q_BTNH
    if rows_per_token > 1:
        q_BRGH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 1, 3, 2, 4).reshape(B, -1, K, H)
    rows = q_BRGH.shape[1]
    q_BRGH = jnp.pad(q_BRGH, ((0, 0), (0, -rows % QUERY_ROWS), (0, 0), (0, 0)))
    pages = [pages.reshape(-1, statics.copied, K, H) for pages in (k_pages_PSKH, v_pages_PSKH)]
    operands = [q_BRGH, *pages, page_table_BM, lengths_B, starts_B]
    if sinks is not None:
        operands.append(_sinks_of_rows(statics, sinks, q_BRGH.shape[1]))
    out = _call(statics, operands, interpret)
    if tiles.num_parts > 1:
        out = combine_parts(*out, None).astype(q_BTNH.dtype)
    out = out[:, :rows]
    if rows_per_token > 1:
        out = out.reshape(B, T, -1, K, H).transpose(0, 1, 3, 2, 4)
    return out.reshape(B, T, N, H)


def _sinks_of_rows(statics: _Statics, sinks_N, rows: int) -> jax.Array:
    """float32 [G, rows], base 2: the sink of each row of the queries' array."""
    sinks_GR = (sinks_N.astype(jnp.float32) * hopper.LOG2_E).reshape(-1, 1, statics.rows_per_token)
    repeated = jnp.broadcast_to(sinks_GR, (sinks_GR.shape[0], rows, statics.rows_per_token))
    return repeated.reshape(sinks_GR.shape[0], -1)[:, :rows]


def _call(statics: _Statics, operands, interpret):
    """out [B, R, G, H] in q's dtype; in parts (float32 [X, B, R, G, H], base-2 lse [X, B, R, G])."""
    (B, R, G, H), dtype, tiles = operands[0].shape, operands[0].dtype, statics.tiles
    outs = jax.ShapeDtypeStruct((B, R, G, H), dtype)
    if tiles.num_parts > 1:
        outs = [
            jax.ShapeDtypeStruct((tiles.num_parts, B, R, G, H), jnp.float32),
            jax.ShapeDtypeStruct((tiles.num_parts, B, R, G), jnp.float32),
        ]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = plgpu.SMEM((tiles.num_buffers, tiles.block, H), dtype, transforms=tiled)
    arrived = plgpu.Barrier(num_arrivals=tiles.block // statics.copied, num_barriers=tiles.num_buffers)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=tiles.num_buffers)
    shared = _Shared(
        q=plgpu.SMEM((tiles.num_queries, 2, _WARPGROUP_ROWS, H), dtype, transforms=tiled),
        k=ring,
        v=ring,
        q_arrived=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.num_queries),
        k_arrived=arrived,
        v_arrived=arrived,
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.num_queries),
        k_free=free,
        v_free=free,
        turn=plgpu.Barrier(num_barriers=2),
        cleared=plgpu.Barrier(num_arrivals=2, num_barriers=1),
    )
    run = plgpu.kernel(
        functools.partial(_body, statics, len(operands)),
        out_type=outs,
        kernel_name="paged_prefill",
        scratch_types=list(shared),
        # Every program takes item after item, so that the copies of the next one begin before this one ends.
        grid=(statics.num_programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    return run(*operands)


def _body(statics: _Statics, num_operands: int, *refs):
    q_ref, k_ref, v_ref, table_ref, lengths_ref, starts_ref, *sinks_ref = refs[:num_operands]
    num_shared = len(_Shared._fields)
    out_refs, shared = refs[num_operands:-num_shared], _Shared(*refs[-num_shared:])
    warpgroup = lax.axis_index("warpgroup")
    num_items, num_programs = math.prod(statics.items), statics.num_programs
    rounds = -(-num_items // num_programs)
    rounds = rounds - (_item(statics, rounds - 1) >= num_items).astype(jnp.int32)

    def scalars(number):
        row, *_ = _coordinates(statics, _item(statics, number))
        return lengths_ref[row], starts_ref[row]

    @pl.when(warpgroup == _COPIER)
    def _():
        plgpu.set_max_registers(_COPIER_REGISTERS, action="decrease")

        def copy(number, count):
            work = _work_of(statics, number, count, *scalars(number))
            _copy_queries(statics, work, number, q_ref, shared)
            _copy_blocks(statics, work, k_ref, v_ref, table_ref, shared)
            return work.end + work.offset

        _await_all(statics, rounds, lax.fori_loop(0, rounds, copy, jnp.int32(0)), shared)

    @pl.when(warpgroup < _COPIER)
    def _():
        plgpu.set_max_registers(_REGISTERS, action="increase")

        def attend(number, count):
            work = _work_of(statics, number, count, *scalars(number))
            mine = work._replace(base=work.base + warpgroup * _WARPGROUP_ROWS)
            sinks = None
            if sinks_ref:
                rows = pl.ds(mine.base, _WARPGROUP_ROWS)
                sinks = plgpu.load(sinks_ref[0].at[work.head, rows], layout=hopper.ROWS, optimized=False)
            place = hopper.remainder(number, statics.tiles.num_queries)
            plgpu.barrier_wait(shared.q_arrived.at[place])
            q_smem = shared.q.at[place, warpgroup]
            softmax = _attend(statics, mine, warpgroup, q_smem, sinks, shared)
            _store(statics, mine, softmax, out_refs, q_smem)
            plgpu.barrier_arrive(shared.q_free.at[place])
            return work.end + work.offset

        # The first turn is the first warpgroup's.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))
        lax.fori_loop(0, rounds, attend, jnp.int32(0))
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))


def _item(statics: _Statics, number):
    """Index of a program's item: every other round backwards, since later items are shorter."""
    program = lax.axis_index("program")
    backwards = lax.rem(jnp.int32(number), jnp.int32(2)) == 1
    return number * statics.num_programs + jnp.where(backwards, statics.num_programs - 1 - program, program)


def _coordinates(statics: _Statics, item):
    """(row, chunk, part, head) of an item. The last runs fastest: heads that read the same keys run together."""
    coordinates = []
    for size in statics.items[:0:-1]:
        coordinates.append(lax.rem(item, jnp.int32(size)) if size > 1 else jnp.int32(0))
        item = hopper.floor(item, size)
    # Tiles of one sequence come in order, so that the last rows have the longest contexts: those are first.
    return statics.items[0] - 1 - item, *coordinates[::-1]


def _work_of(statics: _Statics, number, count, length, start) -> _Work:
    row, chunk, part, head = _coordinates(statics, _item(statics, number))
    base = chunk * QUERY_ROWS
    first, end = _blocks_of(statics, part, base, length, start)
    return _Work(part, row, head, base, length, start, first, end, count - first)


def _blocks_of(statics: _Statics, part, base, length, start):
    """First block of keys of a part, and the one past its last: an even share of what 128 rows from `base` can see."""
    last = jnp.minimum(_token(statics, base + (QUERY_ROWS - 1)), statics.num_tokens - 1)
    top = jnp.clip(jnp.minimum(length, start + last + 1), 0, statics.table_width * statics.page_size)
    bottom = jnp.int32(0)
    if statics.window is not None:
        bottom = jnp.clip(start + _token(statics, base) - (statics.window - 1), 0, top)
    first = hopper.floor(bottom, statics.block)
    end = hopper.floor(top + (statics.block - 1), statics.block)
    if statics.tiles.num_parts == 1:
        return first, end
    share = hopper.floor(end - first + (statics.tiles.num_parts - 1), statics.tiles.num_parts)
    first = jnp.minimum(first + part * share, end)
    return first, jnp.minimum(first + share, end)


def _copy_queries(statics: _Statics, work: _Work, number, q_ref, shared: _Shared) -> None:
    place = hopper.remainder(number, statics.tiles.num_queries)
    pl.when(number >= statics.tiles.num_queries)(lambda: plgpu.barrier_wait(shared.q_free.at[place]))
    for i in range(2):
        rows = pl.ds(work.base + i * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[work.row, rows, work.head], shared.q.at[place, i], shared.q_arrived.at[place])


def _copy_blocks(statics: _Statics, work: _Work, k_ref, v_ref, table_ref, shared: _Shared) -> None:
    """Every block of keys and of values to its buffer, as soon as that is free."""
    size = statics.copied

    def place_of(position):
        """Index in the pages, cut to `size`; past the table's width that of its last page, masked or not used."""
        entry = jnp.minimum(hopper.floor(position, statics.page_size), statics.table_width - 1)
        page = table_ref[work.row, entry]
        if size == statics.page_size:
            return page
        return page * (statics.page_size // size) + hopper.remainder(
            hopper.floor(position, size), statics.page_size // size
        )

    @pl.loop(work.first, work.end)
    def _(block):
        kv_head, buffer = hopper.floor(work.head, statics.share), _buffer(statics, work, block)
        sides = ((k_ref, shared.k, shared.k_arrived, shared.k_free), (v_ref, shared.v, shared.v_arrived, shared.v_free))
        for pages_ref, smem, arrived, free in sides:

            @pl.when(block + work.offset >= statics.tiles.num_buffers)
            def _(free=free):
                plgpu.barrier_wait(free.at[buffer])

            @pl.loop(0, statics.block // size)
            def _(i, pages_ref=pages_ref, smem=smem, arrived=arrived):
                source = pages_ref.at[place_of(block * statics.block + i * size), :, kv_head, :]
                plgpu.copy_gmem_to_smem(source, smem.at[buffer, pl.ds(i * size, size)], arrived.at[buffer])


def _await_all(statics: _Statics, rounds, count, shared: _Shared) -> None:
    """Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it)."""
    for buffer in range(statics.tiles.num_buffers):

        @pl.when(buffer < count)
        def _(buffer=buffer):
            plgpu.barrier_wait(shared.k_free.at[buffer])
            plgpu.barrier_wait(shared.v_free.at[buffer])

    for place in range(statics.tiles.num_queries):
        pl.when(place < rounds)(functools.partial(plgpu.barrier_wait, shared.q_free.at[place]))


def _attend(statics: _Statics, work: _Work, warpgroup, q_smem, sinks, shared: _Shared) -> _Softmax:
    """The softmax of a warpgroup's 64 rows over the work's blocks of keys."""
    highest, total = (
        jnp.full((_WARPGROUP_ROWS,), hopper.LOWEST, jnp.float32),
        jnp.zeros((_WARPGROUP_ROWS,), jnp.float32),
    )
    highest, total = plgpu.layout_cast(highest, hopper.ROWS), plgpu.layout_cast(total, hopper.ROWS)
    if sinks is not None:
        # A key of its own that carries no value, in the first part alone.
        counts = jnp.full_like(total, (work.part == 0).astype(jnp.float32))
        highest, total = jnp.where(counts > 0, sinks, highest), total + counts
    out = plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS, statics.head_dim), jnp.float32), hopper.MATRIX)
    weights = plgpu.layout_cast(jnp.zeros((_WARPGROUP_ROWS, statics.block), shared.q.dtype), hopper.MATRIX)
    softmax = _Softmax(highest, total, out, weights)
    step = functools.partial(_step, statics, work, warpgroup, q_smem, shared)
    second = jnp.minimum(work.first + 1, work.end)
    full_first, full_end = _full_blocks(statics, work, second)

    softmax = lax.fori_loop(work.first, second, functools.partial(_first, statics, work, q_smem, shared), softmax)
    if statics.window is not None:
        softmax = lax.fori_loop(second, full_first, functools.partial(step, masked=True), softmax)
    if not statics.masks_all:
        softmax = lax.fori_loop(full_first, full_end, step, softmax)
        softmax = lax.fori_loop(full_end, work.end, functools.partial(step, masked=True), softmax)
    last = functools.partial(_last, statics, work, warpgroup, shared)
    softmax = lax.fori_loop(jnp.maximum(work.end - 1, work.first), work.end, last, softmax)
    return softmax


def _full_blocks(statics: _Statics, work: _Work, second):
    """Of the work's blocks from its `second` on, the first one whose keys all rows of the warpgroup see, and the one
    past the last."""
    if statics.masks_all:
        return work.end, work.end
    lowest = work.start + jnp.minimum(_token(statics, work.base), statics.num_tokens - 1)
    end = jnp.clip(hopper.floor(jnp.minimum(lowest + 1, work.length), statics.block), second, work.end)
    if statics.window is None:
        return second, end
    top = work.start + _token(statics, work.base + (_WARPGROUP_ROWS - 1))
    first = hopper.floor(jnp.maximum(top - statics.window + statics.block, 0), statics.block)
    return jnp.clip(first, second, end), end


def _first(statics, work, q_smem, shared, block, softmax: _Softmax) -> _Softmax:
    """The softmax of the first block of keys, its weights not yet multiplied."""
    buffer = _buffer(statics, work, block)
    plgpu.barrier_wait(shared.k_arrived.at[buffer])
    scores = hopper.product(q_smem, shared.k.at[buffer].T)
    plgpu.barrier_arrive(shared.k_free.at[buffer])
    highest, total, _, weights = _soften(statics, work, scores, block, True, softmax.highest, softmax.total)
    return _Softmax(highest, total, softmax.out, weights.astype(softmax.weights.dtype))


def _step(statics, work, warpgroup, q_smem, shared, block, softmax: _Softmax, masked=False) -> _Softmax:
    """`softmax` with one block of keys more, the weights of the block before multiplied meanwhile."""
    buffer, before = _buffer(statics, work, block), _buffer(statics, work, block - 1)
    plgpu.barrier_wait(shared.k_arrived.at[buffer])
    plgpu.barrier_wait(shared.v_arrived.at[before])

    plgpu.barrier_wait(shared.turn.at[warpgroup])
    out, scores = hopper.weigh_and_score(
        softmax.out,
        softmax.weights,
        shared.v.at[before],
        q_smem,
        shared.k.at[buffer],
        lambda: plgpu.barrier_arrive(shared.turn.at[1 - warpgroup]),
    )
    plgpu.barrier_arrive(shared.k_free.at[buffer])
    plgpu.barrier_arrive(shared.v_free.at[before])
    highest, total, shrink, weights = _soften(statics, work, scores, block, masked, softmax.highest, softmax.total)
    return _Softmax(highest, total, out * hopper.along(shrink, out.shape, 0), weights.astype(softmax.weights.dtype))


def _last(statics, work, warpgroup, shared, block, softmax: _Softmax) -> _Softmax:
    buffer = _buffer(statics, work, block)
    plgpu.barrier_wait(shared.v_arrived.at[buffer])
    _clear_past(shared, shared.v.at[buffer], warpgroup, work.length - block * statics.block)
    out = hopper.weigh(softmax.out, softmax.weights, shared.v.at[buffer])
    plgpu.barrier_arrive(shared.v_free.at[buffer])
    return softmax._replace(out=out)


def _soften(statics, work, scores, block, masked, highest, total):
    """(highest, total, shrink, weights) with one block's scores more."""
    scores, factor = _capped(statics, scores)
    if masked:
        scores = _masked(statics, work, scores, block * statics.block)
    new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
    shrink = jnp.exp2(highest - new_highest)
    weights = jnp.exp2(scores * factor - hopper.along(new_highest, scores.shape, 0))
    return new_highest, total * shrink + weights.sum(axis=1), shrink, weights


def _capped(statics: _Statics, scores) -> tuple[jax.Array, float]:
    """(scores, positive factor): their product is the logits in base 2. The factor is left for a later fused step."""
    if statics.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), by the exponential that the hardware has.
        grown = jnp.exp2(scores * (2 * statics.scale / statics.soft_cap * hopper.LOG2_E))
        return 1 - 2 / (1 + grown), statics.soft_cap * hopper.LOG2_E
    if statics.scale < 0:
        scores = -scores
    return scores, abs(statics.scale) * hopper.LOG2_E


def _masked(statics: _Statics, work: _Work, scores, base) -> jax.Array:
    """Scores, -inf where a query does not see a key. The first key is at position `base`."""
    row = plgpu.broadcasted_iota(jnp.int32, (scores.shape[0],), 0, layout=hopper.ROWS) + work.base
    if statics.rows_per_token > 1:
        row = lax.div(row, jnp.full_like(row, statics.rows_per_token))
    own = row + (work.start - base)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=hopper.MATRIX)
    seen = key <= hopper.along(jnp.minimum(own, work.length - base - 1), scores.shape, 0)
    if statics.window is not None:
        seen = seen & (key > hopper.along(own - statics.window, scores.shape, 0))
    return jnp.where(seen, scores, -jnp.inf)


def _clear_past(shared: _Shared, v_smem, warpgroup, count) -> None:
    """Values of keys from `count` on become 0: their weight is 0, and 0 times what an earlier owner left may be NaN.

    The warpgroups share the rows, and each waits for the other: both multiply by all of them.
    """
    # Of 64 columns, so that few registers are taken beside the outputs.
    rows, columns = (range(0, size, 64) for size in v_smem.shape)
    pieces = [(pl.ds(row, 64), pl.ds(column, 64)) for row in rows for column in columns]

    def clear(piece):
        values = plgpu.layout_cast(v_smem[piece], hopper.MATRIX)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=hopper.MATRIX)
        v_smem[piece] = jnp.where(key < count - piece[0].start, values, jnp.zeros_like(values))

    @pl.when(count < v_smem.shape[0])
    def _():
        for i, piece in enumerate(pieces):
            pl.when(warpgroup == i % 2)(functools.partial(clear, piece))
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.cleared)
        plgpu.barrier_wait(shared.cleared)


def _store(statics: _Statics, work: _Work, softmax: _Softmax, out_refs, out_smem) -> None:
    """Normalised outputs, by way of `out_smem` or straight from registers; of a part in float32, with the
    log-sum-exp."""
    highest, total, out, _ = softmax
    seen = total > 0
    out = out * hopper.along(jnp.where(seen, 1 / total, 0.0), out.shape, 0)
    rows = pl.ds(work.base, _WARPGROUP_ROWS)
    if statics.tiles.num_parts > 1:
        out_refs[0][work.part, work.row, rows, work.head] = out
        lse = jnp.where(seen, highest + jnp.log(total) * hopper.LOG2_E, -jnp.inf)
        out_refs[1][work.part, work.row, rows, work.head] = lse
    elif statics.window is not None:
        # What the other way takes would spill two to ten registers.
        out_refs[0][work.row, rows, work.head] = out.astype(out_smem.dtype)
    else:
        # 73 us instead of 79 for 16 tiles of 128 in 2048 tokens on an H100.
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_refs[0].at[work.row, rows, work.head])
        # The queries of a later item come to this place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _token(statics: _Statics, row):
    """Token of a row of the queries' array."""
    return row if statics.rows_per_token == 1 else hopper.floor(row, statics.rows_per_token)


def _buffer(statics: _Statics, work: _Work, block):
    return hopper.remainder(block + work.offset, statics.tiles.num_buffers)
