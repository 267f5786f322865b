"""Attention of training and prefill on Hopper: no [T, S] array leaves the registers.

An item is a tile of query rows of one head. Two or three warpgroups multiply, 64 rows each, and one more copies the
queries and, into a ring of buffers, the blocks of keys and values that the tile needs, from the last to the first: the
diagonal comes at once, and what follows it needs no mask. Scores [queries, keys] = q · Kᵀ, an online softmax in
registers, and out [queries, V] += weights · values, with the weights still in registers. The warpgroups take turns, so
that one multiplies while another has its softmax (FlashAttention-3, arXiv 2407.08608, section 3.1), and some also have
the softmax of a block while they multiply the values of the block before (section 3.2). Each processor of
the chip takes item after item, and copies for the next one before it has finished one. Rows and keys past the last are
zeros that the copies make, and are not written.

With float8 operands the weights are rounded to float8 too. The matrix unit then wants the second operand of weights ·
values with neighbouring keys side by side: values come transposed, [B, K, V, S], as `float8.columns` makes them.
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
from jax.ad_checkpoint import checkpoint_name

from kernels import hopper
from kernels.attention import float8, gpu_backward
from kernels.attention.blocks import Extent, extent_by_index, extents_by_data
from kernels.attention.masks import Marks, Masks
from kernels.attention.tiles import WARPGROUP_ROWS, Tiles, swizzle
from kernels.hopper_chip import NUM_PROCESSORS

# Segment 0 sees nothing, itself neither: among the queries it becomes a number that no segment of keys has.
_NO_SEGMENT = -(2**31)
_LEAST_UNIT = 1e-30
# Base-2 logarithm of the largest weight without a maximum subtracted: sums over 2**20 keys, and values of 2**16, stay
# within float32.
_BOUND = 90
# Without the barriers that Pallas would put around every load and store: all threads of a warpgroup arrive at the
# barriers below, and what a warpgroup writes to shared memory, its outputs, lies between two `commit_smem`.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced; `share` query heads read one kv head."""

    masks: Masks
    num_heads: int
    share: int
    key_dim: int
    value_dim: int
    float8: bool
    scale: float
    soft_cap: float | None
    # The soft cap keeps every weight within what numbers can be: no maximum is looked for, and subtracted. With every
    # mask at T 8192 an H100 gave 384, 498 and 568 TFLOP/s with heads of 64, 128 and 256, and 278, 453 and 467 with it.
    bounded: bool
    tiles: Tiles
    # (sections, tiles of queries, heads of a section): what is computed one by one. A section has heads of several
    # rows, so that equal tiles of all of them come before shorter ones, and programs end at about one time. Row by row,
    # the slowest of 132 programs would have 1.33, 1.38 and 1.20 times the average work of 16 rows of 512, 16 of 1024
    # and 8 of 2048; so it is 1.03.
    items: tuple[int, int, int]

    @property
    def num_programs(self) -> int:
        return min(math.prod(self.items), NUM_PROCESSORS)

    @property
    def block(self) -> int:
        return self.tiles.block

    @property
    def overlaps(self) -> bool:
        """Whether a warpgroup has the softmax of a block beside its product of the values before. TFLOP/s on an H100
        (jax 0.11.2, 2026-11-23) at T 8192, so and one after the other, in two runs: heads of 128 with a soft cap that
        bounds the weights, and every mask, 505 to 529, 510 and 501, 498. It did not gain with those masks and heads of
        256 (562 and 568) and of 64 (354 and 384), nor without them: heads of 64 (436, 458 and 460, 478), of 96 (424 and
        426), of 128 (570, 519 and 593, 603), whose load alone makes the clock fall to 1,630 MHz, of 192 (490 and 504)
        and of 256 (505, 534 and 641, 599), causal; float8 (809, 789 and 890, 895).
        """
        return self.bounded and self.key_dim == self.value_dim == 128

    @property
    def headroom(self) -> int:
        """Base-2 logarithm of the largest weight: 256 in float8, whose numbers end at 448 and get sparse below 2**-6.
        The sum of the weights has the same factor."""
        return 8 if self.float8 else 0

    @property
    def narrows(self) -> bool:
        """Whether outputs are narrower than the queries whose place they take."""
        return self.value_dim < self.key_dim and not self.float8

    @property
    def num_marks(self) -> int:
        """Blocks of segments and positions in shared memory. One more than of keys, whose buffer is free when they are
        multiplied: marks are read after that, but before the keys of the next block are multiplied."""
        return self.tiles.num_buffers + 1


class _Shared(NamedTuple):
    """Shared memory of a block of threads: queries of each warpgroup and, in their place when they are multiplied, its
    outputs (which have a place of their own where queries are float8); the ring of buffers; 0, 1, .. to the block's
    last key; and the barriers. `arrived`: the copy is there. `free`: all warpgroups are done with it. `turn`: the
    matrix unit is left to a warpgroup.
    """

    q: Any
    out: Any
    columns: Any
    k: Any
    v: Any
    segments: Any
    positions: Any
    columns_arrived: Any
    q_arrived: Any
    k_arrived: Any
    v_arrived: Any
    q_free: Any
    k_free: Any
    v_free: Any
    turn: Any


class _Inputs(NamedTuple):
    """Arrays in device memory, or None: `units` [B, N] of float8 operands, what their scores are to be multiplied by,
    and `v_scales` [B, N]; `columns` [block] that counts from 0, `extents` [B, tiles, 4] where data masks, segments and
    positions; all from the columns on int32."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    units: Any
    v_scales: Any
    columns: Any
    extents: Any
    q_segments: Any
    kv_segments: Any
    q_positions: Any
    kv_positions: Any


class _Work(NamedTuple):
    """One item, or one warpgroup's rows of it: rows base.. of `head` of a row, over `count` blocks of keys from `last`
    down. The i-th of them is the (`start` + i)-th that the program copies; those from `full` to `left` need no mask."""

    row: jax.Array
    head: jax.Array
    base: jax.Array
    last: jax.Array
    count: jax.Array
    start: jax.Array
    full: jax.Array
    left: jax.Array


class _Softmax(NamedTuple):
    """Base-2 maximum and sum of each row's weights, and their sum of values, so far, but for those of the last block of
    keys, which has `weights`. Bounded, the maximum is 0 instead."""

    highest: jax.Array
    total: jax.Array
    out: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a call and its gradient share; `interpret`: parameters of Pallas's interpreter."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    tiles: Tiles
    interpret: Any

    def features(self) -> dict[str, Any]:
        names = ("scale", "causal", "window", "soft_cap", "interpret")
        return {name: value for name, value in vars(self).items() if name in names}


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    q_segments,
    kv_segments,
    q_positions,
    kv_positions,
    soft_cap: float | None,
    sinks,
    tiles: Tiles,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in q's dtype, lse_BTN in float32); arguments as in `kernels.attention.attention`, with its tiles.

    Differentiable, by `gpu_backward`. A remat policy may save the named values "attention_out" and "attention_lse" to
    skip the forward pass's repeat.
    `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    call = _Call(scale, causal, window, soft_cap, tiles, interpret)
    marks = Marks(q_segments, kv_segments, q_positions, kv_positions)
    return _attention(call, q_BTNH, k_BSKH, v_BSKH, sinks, marks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, sinks, marks: Marks):
    return forward(q, k, v, **call.features(), **marks._asdict(), sinks=sinks, tiles=call.tiles)


def _attention_fwd(call: _Call, q, k, v, sinks, marks: Marks):
    out, lse = _attention(call, q, k, v, sinks, marks)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, sinks, marks, out, lse)


def _attention_bwd(call: _Call, saved, gradients):
    q, k, v, sinks, marks, out, lse = saved
    d_inputs = gpu_backward.attention_gradients(
        q, k, v, out, lse, *gradients, **call.features(), **marks._asdict(), sinks=sinks
    )
    return *d_inputs, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("scale", "causal", "window", "soft_cap", "tiles", "interpret"))
def forward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    q_segments,
    kv_segments,
    q_positions,
    kv_positions,
    soft_cap: float | None,
    sinks,
    tiles: Tiles,
    scales=None,
    interpret=None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in q's dtype, lse_BTN in float32); arguments as in `kernels.attention.attention`, with its tiles.

    `scales`: of float8_e4m3fn q, k and v, float32 [B, N], [B, K] and [B, K]; out is then bfloat16.
    `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    B, T, N, H = q_BTNH.shape
    S, K, V = v_BSKH.shape[1:]
    if not causal and window is None:
        q_positions = kv_positions = None
    masks = Masks(T, S, causal, window, q_segments is not None, q_positions is not None)
    divisors = [n for n in range(1, B * K + 1) if B * K % n == 0]
    together = min(divisors, key=lambda n: max(n / tiles.num_heads, tiles.num_heads / n))
    items = (B * K // together, -(-T // tiles.rows), together * (N // K))
    # Float16 and float8 would lose the least weights.
    bounded = soft_cap is not None and q_BTNH.dtype == jnp.bfloat16 and soft_cap * hopper.LOG2_E <= _BOUND
    statics = _Statics(masks, N, N // K, H, V, scales is not None, scale, soft_cap, bounded, tiles, items)
    extents = None
    if masks.by_data:
        extents = extents_by_data(masks, tiles.rows, tiles.block, q_segments, kv_segments, q_positions, kv_positions)
    if q_segments is not None:
        q_segments = jnp.where(q_segments == 0, _NO_SEGMENT, q_segments)
    # Whole tiles, since rows of these arrays are read straight into registers or copied in units of 16 bytes.
    q_segments, q_positions = _padded(q_segments, tiles.rows), _padded(q_positions, tiles.rows)
    kv_segments, kv_positions = _padded(kv_segments, tiles.block), _padded(kv_positions, tiles.block)
    marks = (q_segments, kv_segments, q_positions, kv_positions)
    columns = jnp.arange(tiles.block, dtype=jnp.int32)
    # Copies fill shared memory by eight rows.
    q, k = _padded(q_BTNH, 8), _padded(k_BSKH, 8)
    v, units, v_scales = _padded(v_BSKH, 8), None, None
    if scales is not None:
        v, units, v_scales = float8.columns(v_BSKH), *_units(statics, *scales)
    out, lse_BNT = _call(statics, _Inputs(q, k, v, sinks, units, v_scales, columns, extents, *marks), interpret)
    return out[:, :T], lse_BNT[:, :, :T].transpose(0, 2, 1)


def _units(statics: _Statics, q_scale_BN, k_scale_BK, v_scale_BK):
    """(units, v_scales) as in `_Inputs`."""
    k_scale_BN, v_scale_BN = (jnp.repeat(scale, statics.share, axis=1) for scale in (k_scale_BK, v_scale_BK))
    return jnp.maximum(abs(statics.scale) * q_scale_BN * k_scale_BN, _LEAST_UNIT), v_scale_BN


def _padded(array, size: int):
    """`array`, its second axis filled up to a multiple of `size`."""
    if array is None or array.shape[1] % size == 0:
        return array
    return jnp.pad(array, [(0, -array.shape[1] % size if axis == 1 else 0) for axis in range(array.ndim)])


def _call(statics: _Statics, inputs: _Inputs, interpret):
    """[out [B, T, N, V], lse [B, N, T in whole tiles] in float32]."""
    (B, T, N, _), dtype, tiles = inputs.q.shape, inputs.q.dtype, statics.tiles
    rows, out_dtype = statics.items[1] * tiles.rows, jnp.bfloat16 if statics.float8 else dtype
    outs = [
        jax.ShapeDtypeStruct((B, T, N, statics.value_dim), out_dtype),
        jax.ShapeDtypeStruct((B, N, rows), jnp.float32),
    ]
    given = [name for name, array in inputs._asdict().items() if array is not None]
    shared = {name: scratch for name, scratch in _scratch(statics, dtype)._asdict().items() if scratch is not None}

    def body(*refs):
        arrays, results, memory = refs[: len(given)], refs[len(given) : len(given) + 2], refs[len(given) + 2 :]
        arrays = dict.fromkeys(_Inputs._fields) | dict(zip(given, arrays, strict=True))
        memory = dict.fromkeys(_Shared._fields) | dict(zip(shared, memory, strict=True))
        if not statics.float8:
            memory["q"], memory["out"] = memory["q"] if statics.narrows else (memory["q"], memory["q"])
        _body(statics, _Inputs(**arrays), *results, _Shared(**memory))

    run = plgpu.kernel(
        body,
        out_type=outs,
        kernel_name="attention_forward",
        scratch_types=list(shared.values()),
        # Every program takes item after item, so that the copies of the next one begin before this one ends.
        grid=(statics.num_programs,),
        grid_names=("program",),
        num_threads=tiles.num_warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    return run(*(array for array in inputs if array is not None))


def _scratch(statics: _Statics, dtype) -> _Shared:
    tiles, masks = statics.tiles, statics.masks

    def tiled(*shape, dtype=dtype):
        size = swizzle(shape[-1] * dtype.itemsize)
        transforms = (plgpu.TilingTransform((8, size // dtype.itemsize)), plgpu.SwizzleTransform(size))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def barriers(arrivals, number):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    # Narrower outputs get more rows, so that each warpgroup's lie in the place of its own queries.
    places, rows = (tiles.num_queries, tiles.num_warpgroups), WARPGROUP_ROWS * statics.key_dim // statics.value_dim
    queries, outs = tiled(*places, WARPGROUP_ROWS, statics.key_dim), tiled(*places, rows, statics.value_dim)
    own_outs, values = None, (tiles.block, statics.value_dim)
    if statics.float8:
        # Twice as wide as queries. One place does, since outputs are copied away before the next are there.
        own_outs = tiled(1, places[1], WARPGROUP_ROWS, statics.value_dim, dtype=jnp.dtype(jnp.bfloat16))
        values = values[::-1]
    marks = plgpu.SMEM((statics.num_marks, tiles.block), jnp.int32)
    return _Shared(
        q=plgpu.RefUnion(queries, outs) if statics.narrows else queries,
        out=own_outs,
        columns=plgpu.SMEM((tiles.block,), jnp.int32),
        k=tiled(tiles.num_buffers, tiles.block, statics.key_dim),
        v=tiled(tiles.num_buffers, *values),
        segments=marks if masks.segments else None,
        positions=marks if masks.positions else None,
        columns_arrived=barriers(1, 1),
        q_arrived=barriers(tiles.num_warpgroups, tiles.num_queries),
        k_arrived=barriers(1 + masks.segments + masks.positions, tiles.num_buffers),
        v_arrived=barriers(1, tiles.num_buffers),
        q_free=barriers(tiles.num_warpgroups, tiles.num_queries),
        k_free=barriers(tiles.num_warpgroups, tiles.num_buffers),
        v_free=barriers(tiles.num_warpgroups, tiles.num_buffers),
        turn=barriers(1, tiles.num_warpgroups),
    )


def _body(statics: _Statics, inputs: _Inputs, out_ref, lse_ref, shared: _Shared):
    warpgroup, tiles = lax.axis_index("warpgroup"), statics.tiles
    for_products, for_copies = tiles.registers
    num_items = math.prod(statics.items)
    rounds = -(-num_items // statics.num_programs)
    rounds = rounds - (_item(statics, rounds - 1) >= num_items).astype(jnp.int32)

    @pl.when(warpgroup == tiles.num_warpgroups)
    def _():
        plgpu.set_max_registers(for_copies, action="decrease")
        _copy_all(statics, rounds, inputs, shared)

    @pl.when(warpgroup < tiles.num_warpgroups)
    def _():
        plgpu.set_max_registers(for_products, action="increase")
        _attend_all(statics, rounds, warpgroup, inputs, out_ref, lse_ref, shared)


def _copy_all(statics: _Statics, rounds, inputs: _Inputs, shared: _Shared) -> None:
    """The copies of all items of the program."""
    plgpu.copy_gmem_to_smem(inputs.columns, shared.columns, shared.columns_arrived.at[0])

    def copy(number, start):
        work = _work_of(statics, inputs, number, start)
        _copy_queries(statics, work, number, inputs, shared)
        _copy_blocks(statics, work, inputs, shared)
        return start + work.count

    _await_all(statics, rounds, lax.fori_loop(0, rounds, copy, jnp.int32(0)), shared)


def _attend_all(statics: _Statics, rounds, warpgroup, inputs: _Inputs, out_ref, lse_ref, shared: _Shared) -> None:
    """One warpgroup's rows of all items of the program."""
    places = statics.tiles.num_queries

    def release(number):
        """Leaves the place of an item's queries to others, when its outputs have been copied from there."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(shared.q_free.at[hopper.remainder(number, places)])

    def attend(number, start):
        work, place = _work_of(statics, inputs, number, start, warpgroup), hopper.remainder(number, places)
        plgpu.barrier_wait(shared.q_arrived.at[place])

        def under_way():
            # Only now, so that nothing waits for the copies of the item before.
            if places > 1:
                pl.when(number > 0)(functools.partial(release, number - 1))

        softmax = _attend(statics, work, warpgroup, shared.q.at[place, warpgroup], inputs, shared, under_way)
        out_smem = shared.out.at[0 if statics.float8 else place, warpgroup, pl.ds(0, WARPGROUP_ROWS)]
        _store(statics, work, softmax, inputs, out_smem, out_ref, lse_ref)
        if places == 1:
            release(number)
        return start + work.count

    plgpu.barrier_wait(shared.columns_arrived.at[0])
    # The first turn is the first warpgroup's.
    last = statics.tiles.num_warpgroups - 1
    pl.when(warpgroup == last)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))
    lax.fori_loop(0, rounds, attend, jnp.int32(0))
    if places > 1:
        release(rounds - 1)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))


def _item(statics: _Statics, number):
    """Index of a program's item: every other round backwards, since later items are shorter."""
    program = lax.axis_index("program")
    backwards = lax.rem(jnp.int32(number), jnp.int32(2)) == 1
    return number * statics.num_programs + jnp.where(backwards, statics.num_programs - 1 - program, program)


def _work_of(statics: _Statics, inputs: _Inputs, number, start, warpgroup=None) -> _Work:
    """A program's item; with `warpgroup`, that one's part of it."""
    _, num_tiles, num_heads = statics.items
    item = _item(statics, number)
    # Heads run fastest: those that read the same keys run together.
    section = hopper.floor(item, num_tiles * num_heads)
    head = section * num_heads + hopper.remainder(item, num_heads)
    row, head = hopper.floor(head, statics.num_heads), hopper.remainder(head, statics.num_heads)
    # The last tile has the most keys before it: the longest items are first.
    tile = num_tiles - 1 - hopper.remainder(hopper.floor(item, num_heads), num_tiles)
    base, rows = tile * statics.tiles.rows, statics.tiles.rows
    whole = _extent(statics, inputs, row, tile, base, rows)
    own = whole
    if warpgroup is not None:
        base, rows = base + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS
        if not statics.masks.by_data:
            own = extent_by_index(statics.masks, statics.block, base, base + (rows - 1))
    last, count = whole.end - 1, whole.end - whole.first
    # The first block is masked wherever anything is.
    full = jnp.clip(whole.end - own.full_end, 1, jnp.maximum(count, 1))
    left = jnp.clip(whole.end - own.full_first, full, jnp.maximum(count, 1))
    return _Work(row, head, base, last, count, start, full, left)


def _extent(statics: _Statics, inputs: _Inputs, row, tile, base, rows) -> Extent:
    if inputs.extents is None:
        return extent_by_index(statics.masks, statics.block, base, base + (rows - 1))
    return Extent(*(inputs.extents[row, tile, i] for i in range(4)))


def _copy_queries(statics: _Statics, work: _Work, number, inputs: _Inputs, shared: _Shared) -> None:
    place = hopper.remainder(number, statics.tiles.num_queries)
    pl.when(number >= statics.tiles.num_queries)(lambda: plgpu.barrier_wait(shared.q_free.at[place]))
    for i in range(statics.tiles.num_warpgroups):
        source = inputs.q.at[work.row, pl.ds(work.base + i * WARPGROUP_ROWS, WARPGROUP_ROWS), work.head]
        plgpu.copy_gmem_to_smem(source, shared.q.at[place, i], shared.q_arrived.at[place])


def _copy_blocks(statics: _Statics, work: _Work, inputs: _Inputs, shared: _Shared) -> None:
    """Every block of keys and of values to its buffer, as soon as that is free."""
    kv_head = hopper.floor(work.head, statics.share)

    @pl.loop(0, work.count)
    def _(i):
        buffer, mark = _buffer(statics, work, i), hopper.remainder(work.start + i, statics.num_marks)
        keys = pl.ds((work.last - i) * statics.block, statics.block)

        def await_free(free):
            pl.when(work.start + i >= statics.tiles.num_buffers)(lambda: plgpu.barrier_wait(free.at[buffer]))

        await_free(shared.k_free)
        arrived = shared.k_arrived.at[buffer]
        plgpu.copy_gmem_to_smem(inputs.k.at[work.row, keys, kv_head], shared.k.at[buffer], arrived)
        if shared.segments is not None:
            plgpu.copy_gmem_to_smem(inputs.kv_segments.at[work.row, keys], shared.segments.at[mark], arrived)
        if shared.positions is not None:
            plgpu.copy_gmem_to_smem(inputs.kv_positions.at[work.row, keys], shared.positions.at[mark], arrived)
        await_free(shared.v_free)
        values = inputs.v.at[work.row, kv_head, :, keys] if statics.float8 else inputs.v.at[work.row, keys, kv_head]
        plgpu.copy_gmem_to_smem(values, shared.v.at[buffer], shared.v_arrived.at[buffer])


def _await_all(statics: _Statics, rounds, count, shared: _Shared) -> None:
    """Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it)."""
    for buffer in range(statics.tiles.num_buffers):

        @pl.when(buffer < count)
        def _(buffer=buffer):
            plgpu.barrier_wait(shared.k_free.at[buffer])
            plgpu.barrier_wait(shared.v_free.at[buffer])

    for place in range(statics.tiles.num_queries):
        pl.when(place < rounds)(functools.partial(plgpu.barrier_wait, shared.q_free.at[place]))


def _attend(statics: _Statics, work: _Work, warpgroup, q_smem, inputs: _Inputs, shared: _Shared, under_way) -> _Softmax:
    """The softmax of a warpgroup's 64 rows over the work's blocks of keys; `under_way` is called after the first."""
    rows = _load_rows(work, inputs)
    unit = abs(statics.scale) if inputs.units is None else inputs.units[work.row, work.head]
    soften = functools.partial(_soften, statics, work, rows, unit, shared)
    softmax = _nothing_yet(statics, inputs)
    first = functools.partial(_first, statics, work, q_smem, shared, soften)
    softmax = lax.fori_loop(0, jnp.minimum(work.count, 1), first, softmax)
    under_way()
    step = functools.partial(_step, statics, work, warpgroup, q_smem, shared, soften)
    softmax = lax.fori_loop(1, work.count, step, softmax)
    last = functools.partial(_last, statics, work, shared)
    return lax.fori_loop(jnp.maximum(work.count - 1, 0), work.count, last, softmax)


def _load_rows(work: _Work, inputs: _Inputs) -> tuple[Any, Any]:
    """(segments, positions) of the warpgroup's queries, or None."""
    rows = pl.ds(work.base, WARPGROUP_ROWS)

    def load(ref):
        return None if ref is None else plgpu.load(ref.at[work.row, rows], layout=hopper.ROWS, optimized=False)

    return load(inputs.q_segments), load(inputs.q_positions)


def _nothing_yet(statics: _Statics, inputs: _Inputs) -> _Softmax:
    """The softmax before any key."""
    highest, total = jnp.float32(0 if statics.bounded else hopper.LOWEST), jnp.float32(0)
    highest, total = (
        plgpu.layout_cast(lax.broadcast_in_dim(x, (WARPGROUP_ROWS,), ()), hopper.ROWS) for x in (highest, total)
    )
    out = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, statics.value_dim), jnp.float32), hopper.MATRIX)
    dtype, layout = (jnp.float8_e4m3fn, hopper.FLOAT8) if statics.float8 else (inputs.v.dtype, hopper.MATRIX)
    weights = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, statics.block), dtype), layout)
    return _Softmax(highest, total, out, weights)


def _rounded(statics: _Statics, weights, dtype) -> jax.Array:
    """Weights as an operand of the next product."""
    return hopper.float8_operand(weights) if statics.float8 else weights.astype(dtype)


def _values(statics: _Statics, shared: _Shared, buffer):
    """[keys, V] of a block."""
    values = shared.v.at[buffer]
    return values.T if statics.float8 else values


def _first(statics, work, q_smem, shared, soften, i, softmax: _Softmax) -> _Softmax:
    """The softmax of the first block of keys, its weights not yet multiplied."""
    buffer = _buffer(statics, work, i)
    plgpu.barrier_wait(shared.k_arrived.at[buffer])
    scores = hopper.product(q_smem, shared.k.at[buffer].T)
    plgpu.barrier_arrive(shared.k_free.at[buffer])
    weights, total, highest, _ = soften(i, softmax, scores)
    return _Softmax(highest, total, softmax.out, _rounded(statics, weights, softmax.weights.dtype))


def _step(statics, work, warpgroup, q_smem, shared, soften, i, softmax: _Softmax) -> _Softmax:
    """`softmax` with one block of keys more, the weights of the block before multiplied meanwhile."""
    buffer, before = _buffer(statics, work, i), _buffer(statics, work, i - 1)
    plgpu.barrier_wait(shared.k_arrived.at[buffer])
    plgpu.barrier_wait(shared.v_arrived.at[before])

    def scored(scores):
        plgpu.barrier_arrive(shared.k_free.at[buffer])
        return soften(i, softmax, scores)

    def issued():
        after = hopper.remainder(warpgroup + 1, statics.tiles.num_warpgroups)
        plgpu.barrier_arrive(shared.turn.at[after])

    keys, values = shared.k.at[buffer], _values(statics, shared, before)
    plgpu.barrier_wait(shared.turn.at[warpgroup])
    if statics.overlaps:
        products = (q_smem, keys, softmax.out, softmax.weights, values)
        (weights, total, highest, shrink), out = hopper.score_and_weigh(*products, issued, scored, num_rows=3)
        plgpu.barrier_arrive(shared.v_free.at[before])
    else:
        out, scores = hopper.weigh_and_score(softmax.out, softmax.weights, values, q_smem, keys, issued)
        plgpu.barrier_arrive(shared.v_free.at[before])
        weights, total, highest, shrink = scored(scores)
    if not statics.bounded:
        out = out * hopper.along(shrink, out.shape, 0)
    return _Softmax(highest, total, out, _rounded(statics, weights, softmax.weights.dtype))


def _last(statics, work, shared, i, softmax: _Softmax) -> _Softmax:
    buffer = _buffer(statics, work, i)
    plgpu.barrier_wait(shared.v_arrived.at[buffer])
    out = hopper.weigh(softmax.out, softmax.weights, _values(statics, shared, buffer))
    plgpu.barrier_arrive(shared.v_free.at[buffer])
    return softmax._replace(out=out)


def _soften(statics, work, rows, unit, shared, i, softmax: _Softmax, scores):
    """(weights, total, highest, shrink) with one block's scores more; `shrink`: what the sum of values is to be
    multiplied by."""
    masked = functools.partial(_masked, statics, work, rows, shared, i)
    hides, hidden = statics.masks.hide(statics.block), (i < work.full) | (i >= work.left)
    if statics.bounded:
        weigh = functools.partial(_bounded_weights, statics, unit)
        weigh_masked = functools.partial(weigh, mask=masked)
        weights, sums = lax.cond(hidden, weigh_masked, weigh, scores) if hides else weigh(scores)
        return weights, softmax.total + sums, softmax.highest, softmax.highest
    scores, factor = _capped(statics, unit, scores)
    if hides:
        scores = lax.cond(hidden, masked, lambda scores: scores, scores)
    highest = jnp.maximum(softmax.highest, scores.max(axis=1) * factor)
    shrink = jnp.exp2(softmax.highest - highest)
    weights = jnp.exp2(scores * factor - hopper.along(highest - statics.headroom, scores.shape, 0))
    return weights, softmax.total * shrink + weights.sum(axis=1), highest, shrink


def _bounded_weights(statics: _Statics, unit, scores, mask=None):
    """(weights, their sums) where the soft cap is what holds them back."""
    scores, factor = _capped(statics, unit, scores)
    weights = jnp.exp2((scores if mask is None else mask(scores)) * factor)
    return weights, weights.sum(axis=1)


def _capped(statics: _Statics, unit, scores) -> tuple[jax.Array, Any]:
    """(scores, positive factor): their product is the logits in base 2. The factor is left for a later fused step."""
    if statics.scale < 0:
        scores = -scores
    if statics.soft_cap is not None:
        # One instruction of the hardware, off by up to 2**-11 of its result, as in FlashAttention-3. By an exponential
        # and a reciprocal it took two of the unit that makes the weights as well, which held the kernel back.
        return jnp.tanh(scores * (unit / statics.soft_cap)), statics.soft_cap * hopper.LOG2_E
    # Not 0, which would make NaN of what a mask hides.
    return scores, (unit if statics.float8 else max(unit, _LEAST_UNIT)) * hopper.LOG2_E


def _masked(statics: _Statics, work: _Work, rows, shared: _Shared, i, scores) -> jax.Array:
    """Scores, -inf where a query does not see a key."""
    masks, shape = statics.masks, scores.shape
    base, mark = (work.last - i) * statics.block, hopper.remainder(work.start + i, statics.num_marks)
    segments, positions = rows

    def load_columns(ref):
        # From shared memory, also what could be counted: that would be hoisted out of the loop, and registers with it.
        return hopper.along(plgpu.load(ref, layout=hopper.COLUMNS, optimized=False), shape, 1)

    own = positions
    if masks.positions:
        key = load_columns(shared.positions.at[mark])
    elif masks.causal or masks.window is not None:
        key = load_columns(shared.columns)
        own = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=hopper.ROWS) + (work.base - base)
    conditions = []
    if masks.segments:
        # Past the last key, 0.
        conditions.append(load_columns(shared.segments.at[mark]) == hopper.along(segments, shape, 0))
    elif masks.num_keys % statics.block:
        conditions.append(load_columns(shared.columns) < masks.num_keys - base)
    if masks.causal:
        conditions.append(key <= hopper.along(own, shape, 0))
    elif masks.window is not None:
        conditions.append(key < hopper.along(own + masks.window, shape, 0))
    if masks.window is not None:
        conditions.append(key > hopper.along(own - masks.window, shape, 0))
    return jnp.where(functools.reduce(jnp.logical_and, conditions), scores, -jnp.inf)


def _store(statics: _Statics, work: _Work, softmax: _Softmax, inputs: _Inputs, out_smem, out_ref, lse_ref) -> None:
    """Starts the copy of the normalised outputs from their place, and writes the log-sum-exp."""
    if inputs.sinks is not None:
        softmax = _with_sink(statics, inputs.sinks[work.head] * hopper.LOG2_E, softmax)
    highest, total, out, _ = softmax
    seen, one = total > 0, 1 if inputs.v_scales is None else inputs.v_scales[work.row, work.head]
    out = out * hopper.along(jnp.where(seen, one / total, 0.0), out.shape, 0)
    rows = pl.ds(work.base, WARPGROUP_ROWS)
    # Every warp has multiplied its queries.
    plgpu.commit_smem()
    out_smem[...] = out.astype(out_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[work.row, rows, work.head])
    lse = (highest - statics.headroom) / hopper.LOG2_E + jnp.log(total)
    lse_ref[work.row, work.head, rows] = jnp.where(seen, lse, -jnp.inf)


def _with_sink(statics: _Statics, sink, softmax: _Softmax) -> _Softmax:
    """`softmax` with a key more that carries no value; `sink`: its logit in base 2, which no soft cap bounds."""
    highest = jnp.where(softmax.total > 0, softmax.highest, hopper.LOWEST)
    raised = jnp.maximum(highest, sink)
    shrink = jnp.exp2(highest - raised)
    total = softmax.total * shrink + jnp.exp2(sink - raised + statics.headroom)
    return softmax._replace(highest=raised, total=total, out=softmax.out * hopper.along(shrink, softmax.out.shape, 0))


def _buffer(statics: _Statics, work: _Work, i):
    return hopper.remainder(work.start + i, statics.tiles.num_buffers)
