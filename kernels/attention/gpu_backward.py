"""Gradients of attention on Hopper: dq, dk and dv in one kernel, five matrix products for each pair of blocks.

A block of threads has 128 keys of a kv head, and walks over the blocks of queries that see any of them, of all query
heads of the group: dk and dv stay in registers until the end. Two warpgroups multiply, 64 keys each, with the scores as
[keys, queries], so that the weights and their gradients are multiplied from registers (dv += Pᵀ · dO, dk += dSᵀ · Q).
dS also goes through shared memory to the fifth product, dq = dS · K over the keys of both. A third warpgroup copies
queries and output gradients into a ring of buffers. The warps of a fourth add dq, float32, to global memory, of even
steps and of odd ones: while one asks for its turn, the other's additions are on their way.

Keys wider than 128 have sums that the registers of one warpgroup do not hold. Then a block of threads has 64 keys, and
one warpgroup adds up dk, the other dv. Both compute the same scores, six products where five are counted: the first
multiplies S, dP and dk and gives dS to the second, which multiplies S, dv and dq. Widths between 64 and 128 are filled
up with zeros.

Why one kernel: apart, dq and dk with dv need seven products, S and dP twice. At 600 TFLOP/s of products that is 428 of
the five that are counted (the target is 520).

The sum in dq is in a fixed order, so that equal calls give equal bits: a counter for each block of queries says whose
turn it is, from the first block of keys to the last. Blocks of threads start in that order, so that what one waits for
has always started. They walk from the last queries to the first, side by side: what one of them reads, the others find
in the chip's cache. With a causal mask the first keys have the most queries, so the longest walks start first and the
short ones fill the chip at the end. (The other way around, each from its own queries on, an H100 had 328 TFLOP/s where
the full mask had 493, for 8,192 tokens.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.attention.backward_walks import padded, padded_masks, walks
from kernels.attention.masks import Marks
from kernels.attention.tiles import WIDTHS, swizzle

# The log-sum-exp that a query which sees nothing is given: every exp(score - this) is 0, and it is finite.
_NOTHING = 1e30
# Of a matrix [keys, queries]: a value for each key, and one for each query.
_KEYS, _QUERIES = hopper.ROWS, hopper.COLUMNS
_COPIER, _ADDER = 2, 3
# Tokens times pairs of row and kv head whose blocks run together: with many at once the walks of a head drift apart,
# and with few the last ones leave the chip empty. Simulated, 2 heads of 8,192 tokens keep 96% of 132 multiprocessors
# busy, 16 no more, and 1 head 86%.
_TOKENS_TOGETHER = 32_768
# Registers of a thread: four warpgroups start with 128 each, and share them out anew.
_REGISTERS, _FEW_REGISTERS = 232, 24
# All threads of a warpgroup arrive at the barriers below, so that Pallas's own around loads and stores are not needed.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """block_queries: of one step; block_keys: of a block of threads; num_buffers, num_outs: blocks of queries and of
    output gradients in shared memory; num_pieces: of dq, `piece` columns each, that a warpgroup has there, whether of
    one step or of two; wide: one warpgroup has dk and the other dv and dq, of the same keys."""

    block_queries: int
    block_keys: int
    num_buffers: int
    num_outs: int
    piece: int
    num_pieces: int
    wide: bool


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is fixed when the kernel is traced. `group` query heads share a kv head."""

    batch: int
    num_queries: int
    num_keys: int
    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    segments: bool
    positions: bool
    tiles: BackwardTiles

    @property
    def query_blocks(self) -> int:
        return -(-self.num_queries // self.tiles.block_queries)

    @property
    def key_blocks(self) -> int:
        return -(-self.num_keys // self.tiles.block_keys)

    @property
    def dq_columns(self) -> int:
        """Of one product of a warpgroup for a step's dq: half of all, or all 64 of half of the queries. Wide, one
        warpgroup has both halves, one after the other."""
        return max(64, self.key_dim // 2)

    @property
    def num_parts(self) -> int:
        """Warpgroups that have dq."""
        return 1 if self.tiles.wide else 2

    @property
    def num_dq_pieces(self) -> int:
        """Of a warpgroup's dq of a step, that go out one after the other."""
        return (self.key_dim if self.tiles.wide else self.dq_columns) // self.tiles.piece

    @property
    def used_masks(self) -> tuple[bool, bool, bool, bool]:
        """Of `Marks`, what the kernel reads."""
        bounded = self.causal or self.window is not None
        return self.segments, self.segments, bounded, bounded

    @property
    def query_padding(self) -> int:
        return -self.num_queries % self.tiles.block_queries

    @property
    def key_padding(self) -> int:
        return -self.num_keys % self.tiles.block_keys


class _Inputs(NamedTuple):
    """Arrays in global memory: operands, what is added to scores (the log-sum-exp) and to their gradients (minus
    delta) [B, N, T], and the walk of each block of keys: which blocks of queries [B, J, I], the turn of each addition
    [B, J, I], and [B, J, 3] how many there are, after from and until where no mask is needed."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    shift: Any
    delta: Any
    runs: Any
    walk: Any
    turns: Any
    masks: Marks


class _Shared(NamedTuple):
    """Shared memory of a block of threads and its barriers. `arrived`: the copy is there. `free`: both warpgroups are
    done with it. `ds_ready`: both have written their share. Two buffers of `ds` need no `free`: who writes
    the next but one has seen the other's next, which came after its product of this one. Wide, one warpgroup writes dS
    and the other frees it, and output gradients, of which there may be one buffer, are waited for apart. `dq_ready`: of
    each piece of a step's dq, even steps and odd ones apart, as other warps wait for them; `dq_free`: of each place."""

    k: Any
    v: Any
    q: Any
    d_out: Any
    shift: Any
    delta: Any
    ds: Any
    dq: Any
    masks: Marks
    keys_arrived: Any
    arrived: Any
    outs_arrived: Any
    free: Any
    outs_free: Any
    ds_ready: Any
    ds_free: Any
    dq_ready: Any
    dq_free: Any


class _Work(NamedTuple):
    """What a block of threads has: row of the batch, kv head, block of keys, and its number of steps (pairs of a block
    of queries and a query head); those in [begin, end) need no mask."""

    row: jax.Array
    kv_head: jax.Array
    key_block: jax.Array
    begin: jax.Array
    end: jax.Array
    steps: jax.Array


def attention_gradients(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    out_BTNH,
    lse_BTN,
    d_out_BTNH,
    d_lse_BTN,
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
    tiles: BackwardTiles | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(dq, dk, dv, dsinks): gradients of `kernels.attention.attention`, whose arguments the others are.

    q, k, v, out, d_out are all bfloat16 or all float16, and dq, dk, dv like them; sums are in float32.
    `lse_BTN`: natural logarithm, float32, -inf for a query that sees nothing; `d_lse_BTN`: its gradient, or None.
    dsinks is float32 [N], None without sinks. `tiles`: None for the choice of `choose_backward_tiles`.
    `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    B, T, N, H = q_BTNH.shape
    S, K, V = v_BSKH.shape[1:]
    if (H, V) not in WIDTHS:
        widths = ", ".join(f"{key}/{value}" for key, value in WIDTHS)
        raise ValueError(
            f"the kernel takes key/value widths of {widths}, not {H}/{V}; set the attention impl to 'auto' or 'xla'"
        )
    if 64 < H < 128:
        given, added = (q_BTNH, k_BSKH, v_BSKH, d_out_BTNH), ((0, 0), (0, 0), (0, 0), (0, 128 - H))
        q_BTNH, k_BSKH, v_BSKH, d_out_filled = (jnp.pad(array, added) for array in given)
    else:
        d_out_filled = d_out_BTNH
    if scale == 0:
        raise ValueError("scale=0 gives every key the same score; it must be another number for impl 'pallas'")
    widths = (q_BTNH.shape[-1], v_BSKH.shape[-1])
    tiles = choose_backward_tiles(*widths) if tiles is None else tiles
    features = (q_segments is not None, q_positions is not None)
    statics = _Statics(B, T, S, K, N // K, *widths, scale, causal, window, soft_cap, *features, tiles)
    delta_BTN = jnp.sum(d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    if d_lse_BTN is not None:
        delta_BTN = delta_BTN - d_lse_BTN
    d_sinks = None
    if sinks is not None:
        # lse is finite wherever there is a sink.
        d_sinks = -jnp.sum(jnp.exp(sinks.astype(jnp.float32) - lse_BTN) * delta_BTN, axis=(0, 1)).astype(sinks.dtype)
    shift_BTN = -_unit(statics) * jnp.where(lse_BTN == -jnp.inf, _NOTHING, lse_BTN)
    arrays = (q_BTNH, k_BSKH, v_BSKH, d_out_filled, shift_BTN, -delta_BTN)
    masks = Marks(q_segments, kv_segments, q_positions, kv_positions)
    dq, dk, dv = _gradients(statics, arrays, masks, interpret)
    return dq[..., :H], dk[..., :H], dv[..., :V], d_sinks


def _unit(statics: _Statics) -> float:
    """Of what is added to a score: its own, or base 2 after the soft cap."""
    return 1 / statics.scale if statics.soft_cap is None else hopper.LOG2_E


def choose_backward_tiles(key_dim: int, value_dim: int) -> BackwardTiles:
    """By the compiler's report of registers: `python -m kernels.aot`."""
    if key_dim > 128:
        # Two blocks of 256 columns of queries and output gradients leave no room for dq.
        return BackwardTiles(64, 64, 2, 1 if value_dim > 128 else 2, key_dim // 2, 1, True)
    if key_dim == 64:
        # In halves of 32 columns an H100 was slower (462 and 395 TFLOP/s, causal, T 8192, where it had 473 and 432).
        return BackwardTiles(128, 128, 2, 2, 64, 1, False)
    return BackwardTiles(64, 128, 2, 2, 32, 3, False)


def shared_bytes(key_dim: int, value_dim: int) -> int:
    """Shared memory of a block of threads: keys and values, the ring of queries and output gradients with two numbers
    and two marks of each query, dS twice, dq, the marks of the keys, and the barriers."""
    if 64 < key_dim < 128:
        key_dim = value_dim = 128
    tiles = choose_backward_tiles(key_dim, value_dim)
    queries, keys = tiles.block_queries, tiles.block_keys
    ring = queries * (2 * tiles.num_buffers * key_dim + 2 * tiles.num_outs * value_dim + 4 * 4 * tiles.num_buffers)
    dq = 4 * 64 * (1 if tiles.wide else 2) * tiles.num_pieces * tiles.piece
    return 2 * keys * (key_dim + value_dim) + ring + 2 * 2 * keys * queries + dq + 2 * 4 * keys + 256


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("statics", "interpret"))
def _gradients(statics: _Statics, arrays, masks: Marks, interpret):
    q, k, v, d_out, shift, delta = arrays
    masks = padded_masks(statics, masks)
    visited, runs, walk, turns = walks(statics, masks)
    q, d_out = (padded(array, statics.query_padding) for array in (q, d_out))
    k, v = (padded(array, statics.key_padding) for array in (k, v))
    # Queries that are padding are like those that see nothing.
    shift = padded(shift, statics.query_padding, -_unit(statics) * _NOTHING).transpose(0, 2, 1)
    delta = padded(delta, statics.query_padding).transpose(0, 2, 1)
    dq, dk, dv = _call(statics, _Inputs(q, k, v, d_out, shift, delta, runs, walk, turns, masks), interpret)
    # Nobody has written the queries that see no key.
    visited = jnp.repeat(visited, statics.tiles.block_queries, axis=1)[..., None, None]
    dq = jnp.where(visited, dq * statics.scale, 0).astype(q.dtype)
    return dq[:, : statics.num_queries], dk[:, : statics.num_keys], dv[:, : statics.num_keys]


def _call(statics: _Statics, inputs: _Inputs, interpret):
    """(dq [B, T, N, H] in float32 without the scale, dk [B, S, K, H], dv [B, S, K, V])."""
    dtype = inputs.q.dtype
    masks = [mask for mask, used in zip(inputs.masks, statics.used_masks, strict=True) if used]
    outs = [
        jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32),
        jax.ShapeDtypeStruct(inputs.k.shape, dtype),
        jax.ShapeDtypeStruct(inputs.v.shape, dtype),
    ]
    run = plgpu.kernel(
        functools.partial(_body, statics),
        out_type=outs,
        kernel_name="attention_backward",
        scratch_types=[scratch for scratch in _scratch(statics, dtype) if scratch is not None],
        grid=(statics.batch * statics.num_kv_heads * statics.key_blocks,),
        grid_names=("item",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    return run(*inputs[:-1], *masks)


def _scratch(statics: _Statics, dtype) -> _Shared:
    def tiled(*shape, part=64):
        """`part`: columns that a product takes at a time."""
        size = swizzle(2 * part)
        return plgpu.SMEM(
            shape, dtype, transforms=(plgpu.TilingTransform((8, size // 2)), plgpu.SwizzleTransform(size))
        )

    columns = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    queries, keys, buffers, outs, piece, pieces, wide = dataclasses.astuple(statics.tiles)
    part = statics.dq_columns
    used, shapes = statics.used_masks, ((buffers, queries), (keys,)) * 2
    both = plgpu.Barrier(num_arrivals=2, num_barriers=1)
    return _Shared(
        k=tiled(1, keys, statics.key_dim, part=part),
        v=tiled(1, keys, statics.value_dim),
        q=tiled(buffers, queries, statics.key_dim, part=part),
        d_out=tiled(outs, queries, statics.value_dim),
        shift=plgpu.SMEM((buffers, queries), jnp.float32),
        delta=plgpu.SMEM((buffers, queries), jnp.float32),
        ds=tiled(2, keys, queries, part=part),
        dq=plgpu.SMEM((pieces, statics.num_parts, 64, piece), jnp.float32, transforms=columns),
        masks=Marks(
            *(None if not used else plgpu.SMEM(shape, jnp.int32) for used, shape in zip(used, shapes, strict=True))
        ),
        keys_arrived=plgpu.Barrier(num_arrivals=2 + sum(used) // 2, num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=4 - wide + sum(used) // 2, num_barriers=buffers),
        outs_arrived=plgpu.Barrier(num_arrivals=1, num_barriers=outs) if wide else None,
        free=plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
        outs_free=plgpu.Barrier(num_arrivals=2, num_barriers=outs) if wide else None,
        ds_ready=plgpu.Barrier(num_barriers=2) if wide else both,
        ds_free=plgpu.Barrier(num_barriers=2) if wide else None,
        dq_ready=plgpu.Barrier(num_barriers=2 * statics.num_parts * statics.num_dq_pieces),
        dq_free=plgpu.Barrier(num_barriers=statics.num_parts * pieces),
    )


def _body(statics: _Statics, *refs):
    num_masks = sum(statics.used_masks)
    num_inputs = len(_Inputs._fields) - 1
    masks = iter(refs[num_inputs : num_inputs + num_masks])
    inputs = _Inputs(*refs[:num_inputs], Marks(*(next(masks) if used else None for used in statics.used_masks)))
    dq_ref, dk_ref, dv_ref, *given = refs[num_inputs + num_masks :]
    given = iter(given)
    shared = _scratch(statics, inputs.q.dtype)
    shared = _Shared(*(None if scratch is None else next(given) for scratch in shared))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COPIER)
    def _():
        plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
        _copy(statics, _work(statics, inputs), inputs, shared)

    @pl.when(warpgroup == _ADDER)
    def _():
        plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
        _add_all(statics, _work(statics, inputs), inputs, dq_ref, shared)

    @pl.when(warpgroup < _COPIER)
    def _():
        plgpu.set_max_registers(_REGISTERS, action="increase")
        work = _work(statics, inputs)
        if statics.tiles.wide:
            pl.when(warpgroup == 0)(functools.partial(_wide_dk, statics, work, shared, dk_ref))
            pl.when(warpgroup == 1)(functools.partial(_wide_dv, statics, work, shared, dv_ref))
            return
        dk, dv = _multiply_all(statics, work, warpgroup, shared)
        place = _place(statics, work, warpgroup)
        dk_ref[place] = (dk * statics.scale).astype(dk_ref.dtype)
        dv_ref[place] = dv.astype(dv_ref.dtype)


def _place(statics: _Statics, work: _Work, warpgroup):
    """Of a warpgroup's keys in dk and dv. Computed again, so that nothing is kept in registers for it."""
    row, kv_head, key_block = _coordinates(statics, lax.axis_index("item") + _origin(work.steps))
    return row, pl.ds(key_block * statics.tiles.block_keys + _first_key(statics, warpgroup), 64), kv_head


def _first_key(statics: _Statics, warpgroup):
    """Of the 64 of a warpgroup, within the block."""
    return 0 if statics.tiles.wide else warpgroup * 64


def _work(statics: _Statics, inputs: _Inputs) -> _Work:
    row, kv_head, key_block = _coordinates(statics, lax.axis_index("item"))
    runs = [inputs.runs[_table_row(inputs.runs, row), key_block, i] * statics.group for i in range(3)]
    return _Work(row, kv_head, key_block, *runs)


def _coordinates(statics: _Statics, item):
    """(row, kv head, block of keys) of a block of threads: some heads at a time, and of those the first keys first, as
    the turns go."""
    together = _heads_together(statics)
    heads, rest = (
        hopper.floor(item, together * statics.key_blocks),
        hopper.remainder(item, together * statics.key_blocks),
    )
    head = heads * together + hopper.remainder(rest, together)
    key_block = hopper.floor(rest, together)
    return hopper.floor(head, statics.num_kv_heads), hopper.remainder(head, statics.num_kv_heads), key_block


def _heads_together(statics: _Statics) -> int:
    """Of the pairs of row and kv head, a divisor."""
    pairs = statics.batch * statics.num_kv_heads
    enough = -(-_TOKENS_TOGETHER // statics.num_keys)
    return next((count for count in range(enough, pairs) if pairs % count == 0), pairs)


def _table_row(table, row):
    """Row of a table, which may be the same for all."""
    return row if table.shape[0] > 1 else 0


def _query_block(statics: _Statics, work: _Work, inputs: _Inputs, step):
    return inputs.walk[_table_row(inputs.walk, work.row), work.key_block, hopper.floor(step, statics.group)]


def _head(statics: _Statics, work: _Work, step):
    """Query head of a step: all heads of the group for a block of queries, then the next block."""
    return work.kv_head * statics.group + hopper.remainder(step, statics.group)


def _copy(statics: _Statics, work: _Work, inputs: _Inputs, shared: _Shared) -> None:
    """Keys and values once, queries and what belongs to them step by step."""
    queries, keys, buffers, outs, *_, wide = dataclasses.astuple(statics.tiles)

    def copy_masks(sides, rows, buffer, arrived):
        for source, target in zip(inputs.masks[sides::2], shared.masks[sides::2], strict=True):
            if target is not None:
                target = target if buffer is None else target.at[buffer]
                plgpu.copy_gmem_to_smem(source.at[_table_row(source, work.row), rows], target, arrived)

    @pl.when(work.steps > 0)
    def _():
        rows, arrived = pl.ds(work.key_block * keys, keys), shared.keys_arrived.at[0]
        plgpu.copy_gmem_to_smem(inputs.k.at[work.row, rows, work.kv_head], shared.k.at[0], arrived)
        plgpu.copy_gmem_to_smem(inputs.v.at[work.row, rows, work.kv_head], shared.v.at[0], arrived)
        copy_masks(1, rows, None, arrived)

    @pl.loop(0, work.steps)
    def _(step):
        query_block = _query_block(statics, work, inputs, step)
        head, buffer = _head(statics, work, step), hopper.remainder(step, buffers)
        rows = pl.ds(query_block * queries, queries)
        arrived = shared.arrived.at[buffer]
        pl.when(step >= buffers)(functools.partial(plgpu.barrier_wait, shared.free.at[buffer]))
        plgpu.copy_gmem_to_smem(inputs.q.at[work.row, rows, head], shared.q.at[buffer], arrived)
        for vector, smem in ((inputs.shift, shared.shift), (inputs.delta, shared.delta)):
            plgpu.copy_gmem_to_smem(vector.at[work.row, head, rows], smem.at[buffer], arrived)
        copy_masks(0, rows, buffer, arrived)
        if wide:
            buffer = hopper.remainder(step, outs)
            arrived = shared.outs_arrived.at[buffer]
            pl.when(step >= outs)(functools.partial(plgpu.barrier_wait, shared.outs_free.at[buffer]))
        plgpu.copy_gmem_to_smem(inputs.d_out.at[work.row, rows, head], shared.d_out.at[buffer], arrived)

    # Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it).
    for free, count in ((shared.free, buffers), (shared.outs_free, outs)):
        for buffer in range(0 if free is None else count):
            pl.when(buffer < work.steps)(functools.partial(plgpu.barrier_wait, free.at[buffer]))


def _add_all(statics: _Statics, work: _Work, inputs: _Inputs, dq_ref, shared: _Shared) -> None:
    """Each step's dq, as soon as it is there and its turn has come. A warp has what one warpgroup computes of every
    second step, since an addition, from its turn to its signal, takes about as long as a step. An H100 (jax 0.11.2,
    2026-11-23, T 8192, heads of 128) had 519 and 524 TFLOP/s causal where all four warps together had 510 and 490, 560
    and 504 with the full mask, and at heads of 256 355 and 315."""

    # Asked for here, which a warp cannot (JAX 0.11.2).
    turns = _turns(statics)

    @pl.when(work.steps > 0)
    def _():
        # Free at first.
        for place in range(statics.num_parts * statics.tiles.num_pieces):
            plgpu.barrier_arrive(shared.dq_free.at[place])

    def add_steps(warp):
        odd, part = hopper.remainder(warp, 2), hopper.floor(warp, 2)
        count = jnp.where(part < statics.num_parts, hopper.floor(work.steps + 1 - odd, 2), 0)
        add = functools.partial(_add_step, statics, work, inputs, dq_ref, turns, shared, part)
        pl.loop(0, count)(lambda i: add(2 * i + odd))

    plgpu.warp_map(add_steps)


def _add_step(statics: _Statics, work: _Work, inputs: _Inputs, dq_ref, turns, shared: _Shared, part, step) -> None:
    """A warpgroup's part of a step's dq."""
    query_block, head = _query_block(statics, work, inputs, step), _head(statics, work, step)
    turn = inputs.turns[_table_row(inputs.walk, work.row), work.key_block, hopper.floor(step, statics.group)]
    own = (work.row, head, query_block, part)
    if statics.tiles.wide:
        # Before the sums are there: an H100 had 355 TFLOP/s so at heads of 256, 306 and 336 the other way. At heads of
        # 128 it had 498 and 517, and 519 and 524 the other way (jax 0.11.2, 2026-11-23, T 8192, causal).
        _await_turn(turns, own, turn)
    begun = []
    for piece in range(statics.num_dq_pieces):
        slot, place = _piece_place(statics, step, piece, part)
        if len(begun) == statics.tiles.num_pieces:
            # Where the next piece goes.
            _free_oldest(shared, begun)
        plgpu.barrier_wait(shared.dq_ready.at[_ready(statics, step, piece, part)])
        if piece == 0 and not statics.tiles.wide:
            _await_turn(turns, own, turn)
        source = shared.dq.at[slot, part]
        target = _dq_place(statics, work, dq_ref, query_block, head, part, piece)
        pl.when(turn == 0)(functools.partial(_put, source, target))
        pl.when(turn > 0)(functools.partial(_add, source, target))
        begun.append(place)
    while begun:
        _free_oldest(shared, begun)
    plgpu.wait_smem_to_gmem(0)
    _end_turn(turns, own)


def _free_oldest(shared: _Shared, begun: list) -> None:
    """Of the places whose copies have begun: as soon as it is read."""
    plgpu.wait_smem_to_gmem(len(begun) - 1, wait_read_only=True)
    plgpu.barrier_arrive(shared.dq_free.at[begun.pop(0)])


def _ready(statics: _Statics, step, piece: int, part):
    """Barrier of a piece of a step's dq."""
    return (hopper.remainder(step, 2) * statics.num_parts + part) * statics.num_dq_pieces + piece


def _piece_place(statics: _Statics, step, piece: int, part):
    """(slot, barrier) of a piece of a step's dq, one slot after the other. With a step and a half in shared memory,
    what waits for its turn holds up the products less: an H100 (jax 0.11.2, 2026-11-23, T 8192) had 492 and 489
    TFLOP/s, and 480 and 474 with one step, causal, and 530 and 484 with the full mask."""
    slots, pieces = statics.tiles.num_pieces, statics.num_dq_pieces
    if slots == 1:
        slot = _origin(step)
    elif slots == pieces:
        slot = piece
    elif slots == 3 and pieces == 2:
        # 0 1, 2 0, 1 2, and again: from one division for both pieces.
        turn = hopper.remainder(step, 3)
        slot = jnp.where(turn == 2, 2, 1 - turn) if piece else jnp.where(turn == 0, 0, 3 - turn)
    else:
        slot = hopper.remainder(hopper.remainder(step, slots) * pieces + piece, slots)
    return slot, slot * statics.num_parts + part


def _dq_place(statics: _Statics, work: _Work, dq_ref, query_block, head, part, piece: int):
    """Where a piece of dq goes: of 64 queries, some of the columns of all, or of a warpgroup's half; with 128 queries a
    warpgroup has 64 of them."""
    base, columns = query_block * statics.tiles.block_queries, statics.tiles.piece
    first = piece * columns
    if statics.tiles.block_queries == 128:
        base = base + part * 64
    else:
        first += part * statics.dq_columns
    return dq_ref.at[work.row, pl.ds(base, 64), head, pl.ds(first, columns)]


def _turns(statics: _Statics):
    """Counters in global memory, 0 at the start of a launch: additions made to each part of each block of queries of a
    head."""
    shape = (statics.batch, statics.num_kv_heads * statics.group, statics.query_blocks, statics.num_parts)
    return pl.get_global(plgpu.SemaphoreType.REGULAR(shape))


def _await_turn(turns, place, turn) -> None:
    plgpu.semaphore_wait(turns.at[place], turn, decrement=False, memory_scope="gpu")


def _end_turn(turns, place) -> None:
    """After the addition is complete in global memory: the signal releases it."""
    plgpu.semaphore_signal(turns.at[place], 1, memory_scope="gpu")


def _put(smem, place) -> None:
    plgpu.copy_smem_to_gmem(smem, place)


def _add(smem, place) -> None:
    """Pallas's interpreter has no reduction; tests put plain writes in the place of this function and the one above."""
    plgpu.copy_smem_to_gmem(smem, place, reduction_op="add")


def _multiply_all(statics: _Statics, work: _Work, warpgroup, shared: _Shared):
    """(dk [64, H], dv [64, V]) of a warpgroup's keys, without the scale."""
    dk, dv = _zeros(64, statics.key_dim), _zeros(64, statics.value_dim)
    pl.when(work.steps > 0)(functools.partial(plgpu.barrier_wait, shared.keys_arrived.at[0]))
    step = functools.partial(_step, statics, work, shared)
    second = jnp.minimum(work.steps, 1)
    sums = lax.fori_loop(0, second, functools.partial(step, first=True), (dk, dv))
    sums = _runs_of_steps(statics, work, second, step, sums)

    @pl.when(work.steps > 0)
    def _():
        last = work.steps - 1
        plgpu.barrier_wait(shared.ds_ready.at[0])
        dq = _product(_zeros(64, 64), *_dq_operands(statics, warpgroup, shared, last))
        _store_pieces(statics, shared, warpgroup, last, dq)
        for slot in range(statics.tiles.num_pieces):
            plgpu.barrier_wait(shared.dq_free.at[2 * slot + warpgroup])

    return sums


def _zeros(rows: int, columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), hopper.MATRIX)


def _runs_of_steps(statics: _Statics, work: _Work, second, step, sums):
    """`sums` after the steps from `second` on, masked where they must be."""
    if _can_mask(statics) and statics.tiles.wide:
        # All of them: with more than one loop, the sums would be in the way of each other.
        return lax.fori_loop(second, work.steps, step, sums)
    if _can_mask(statics):
        begin, end = jnp.maximum(work.begin, second), jnp.maximum(work.end, second)

        def run(i, sums):
            """Steps with a mask and then without; the second time those that are left, with one. A third loop in a row
            would have the compiler move the sums to other registers, of which there are none."""
            low, middle = jnp.where(i == 0, second, end), jnp.where(i == 0, begin, work.steps)
            sums = lax.fori_loop(low, middle, step, sums)
            return lax.fori_loop(middle, end, functools.partial(step, masked=False), sums)

        return lax.fori_loop(0, 2, run, sums)
    return lax.fori_loop(second, work.steps, functools.partial(step, masked=False), sums)


def _step(statics: _Statics, work: _Work, shared: _Shared, step, sums, first=False, masked=True):
    """(dk, dv) with one step more. dq of the step before is multiplied here, beside this step's scores: by then the
    other warpgroup has its half of dS ready."""
    # Asked for anew at each step: kept from the start, it would be the one value too many for the registers.
    warpgroup = lax.axis_index("warpgroup")
    buffer, mine = hopper.remainder(step, statics.tiles.num_buffers), pl.ds(_first_key(statics, warpgroup), 64)
    q_smem, d_out_smem = shared.q.at[buffer], shared.d_out.at[buffer]
    origin = _origin(step)
    plgpu.barrier_wait(shared.arrived.at[buffer])

    # The sums of products start at what is to be subtracted from them: fewer registers, and fewer instructions.
    start = _start(statics, shared, buffer)
    scores_operands, before = (shared.k.at[origin, mine], q_smem.T), step - 1
    if first:
        scores = _product(start, *scores_operands)
    else:
        plgpu.barrier_wait(shared.ds_ready.at[0])
        dq_operands = _dq_operands(statics, warpgroup, shared, before)
        scores = _two_products(
            dq_operands, functools.partial(_store_pieces, statics, shared, warpgroup, before), start, scores_operands
        )
    d_weights_operands = (shared.v.at[origin, mine], d_out_smem.T)
    weights, d_weights = _weights_and_gradient(
        statics, work, warpgroup, shared, buffer, masked, scores, d_weights_operands
    )
    # Before the product with the weights begins, though it could go on meanwhile: the registers would not suffice.
    d_scores = (d_weights * _sloped(statics, shared, buffer, weights)).astype(shared.ds.dtype)
    weights = weights.astype(shared.ds.dtype)

    def publish():
        shared.ds[hopper.remainder(step, 2), mine] = d_scores
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ds_ready.at[0])

    sums = _accumulate(*sums, d_scores, q_smem, weights, d_out_smem, publish)
    plgpu.barrier_arrive(shared.free.at[buffer])
    return sums


def _weights_and_gradient(statics, work, warpgroup, shared, buffer, masked, scores, d_weights_operands):
    """(weights, their gradients less delta) of a step."""
    weigh = functools.partial(_weights, statics, shared, buffer)
    masked = masked and _can_mask(statics)
    if masked or statics.soft_cap is not None:
        # One after the other, since a mask and the soft cap take registers.
        mask = functools.partial(_masked, statics, work, warpgroup, shared, buffer) if masked else None
        weights = weigh(scores, mask)
        return weights, _product(_of_queries(statics, shared.delta.at[buffer]), *d_weights_operands)
    delta = _of_queries(statics, shared.delta.at[buffer])
    return _product_beside(delta, *d_weights_operands, scores, functools.partial(weigh, mask=None))[::-1]


def _wide_dk(statics: _Statics, work: _Work, shared: _Shared, dk_ref) -> None:
    """dk, of all columns, and dS for the other warpgroup."""
    pl.when(work.steps > 0)(functools.partial(plgpu.barrier_wait, shared.keys_arrived.at[0]))
    step = functools.partial(_wide_dk_step, statics, work, shared)
    sums = _runs_of_steps(statics, work, _origin(work.steps), step, _wide_zeros(statics.key_dim))
    _store_wide(statics, work, [dk * statics.scale for dk in sums], dk_ref)
    # Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it).
    for place in range(2):
        pl.when(work.steps > 0)(functools.partial(plgpu.barrier_wait, shared.ds_free.at[place]))


def _wide_dk_step(statics: _Statics, work: _Work, shared: _Shared, step, sums, masked=True):
    buffer, outs_buffer = (hopper.remainder(step, n) for n in (statics.tiles.num_buffers, statics.tiles.num_outs))
    place, origin, q_smem = hopper.remainder(step, 2), _origin(step), shared.q.at[buffer]
    plgpu.barrier_wait(shared.arrived.at[buffer])
    scores = _product(_start(statics, shared, buffer), shared.k.at[origin], q_smem.T)
    plgpu.barrier_wait(shared.outs_arrived.at[outs_buffer])
    d_weights_operands = (shared.v.at[origin], shared.d_out.at[outs_buffer].T)
    weights, d_weights = _weights_and_gradient(statics, work, 0, shared, buffer, masked, scores, d_weights_operands)
    plgpu.barrier_arrive(shared.outs_free.at[outs_buffer])
    d_scores = (d_weights * _sloped(statics, shared, buffer, weights)).astype(shared.ds.dtype)
    plgpu.barrier_wait(shared.ds_free.at[place])
    shared.ds[place] = d_scores
    plgpu.commit_smem()
    plgpu.barrier_arrive(shared.ds_ready.at[place])
    sums = _accumulate_wide(sums, d_scores, q_smem)
    plgpu.barrier_arrive(shared.free.at[buffer])
    return sums


def _wide_dv(statics: _Statics, work: _Work, shared: _Shared, dv_ref) -> None:
    """dv, of all columns, and dq."""

    @pl.when(work.steps > 0)
    def _():
        plgpu.barrier_wait(shared.keys_arrived.at[0])
        # Free at first.
        for place in range(2):
            plgpu.barrier_arrive(shared.ds_free.at[place])

    step = functools.partial(_wide_dv_step, statics, work, shared)
    second = jnp.minimum(work.steps, 1)
    sums = lax.fori_loop(0, second, functools.partial(step, first=True), _wide_zeros(statics.value_dim))
    sums = _runs_of_steps(statics, work, second, step, sums)
    _store_wide(statics, work, sums, dv_ref)

    @pl.when(work.steps > 0)
    def _():
        _wide_dq(statics, shared, work.steps - 1)
        for place in range(statics.tiles.num_pieces):
            plgpu.barrier_wait(shared.dq_free.at[place])


def _wide_dv_step(statics: _Statics, work: _Work, shared: _Shared, step, sums, first=False, masked=True):
    """dq of the step before is multiplied after this step's scores: by then the other warpgroup has its dS ready."""
    buffer, outs_buffer = (hopper.remainder(step, n) for n in (statics.tiles.num_buffers, statics.tiles.num_outs))
    plgpu.barrier_wait(shared.arrived.at[buffer])
    scores = _product(_start(statics, shared, buffer), shared.k.at[_origin(step)], shared.q.at[buffer].T)
    mask = functools.partial(_masked, statics, work, 0, shared, buffer) if masked and _can_mask(statics) else None
    weights = _weights(statics, shared, buffer, scores, mask).astype(shared.ds.dtype)
    plgpu.barrier_arrive(shared.free.at[buffer])
    plgpu.barrier_wait(shared.outs_arrived.at[outs_buffer])
    sums = _accumulate_wide(sums, weights, shared.d_out.at[outs_buffer])
    plgpu.barrier_arrive(shared.outs_free.at[outs_buffer])
    if not first:
        _wide_dq(statics, shared, step - 1)
    return sums


def _wide_zeros(columns: int) -> tuple[jax.Array, ...]:
    """Sums of `columns`, in two: one product's must fit the registers that a thread starts with, which the compiler
    counts with for a single instruction."""
    return _zeros(64, columns // 2), _zeros(64, columns // 2)


def _store_wide(statics: _Statics, work: _Work, sums, ref) -> None:
    place, count = _place(statics, work, 0), sums[0].shape[1]
    for half, array in enumerate(sums):
        ref[*place, half * count : (half + 1) * count] = array.astype(ref.dtype)


def _wide_dq(statics: _Statics, shared: _Shared, step) -> None:
    """dq of a step, half of its columns at a time."""
    ds_place = hopper.remainder(step, 2)
    plgpu.barrier_wait(shared.ds_ready.at[ds_place])
    for half in range(2):
        columns = pl.ds(half * statics.dq_columns, statics.dq_columns)
        operands = (shared.ds.at[ds_place].T, shared.k.at[_origin(step), :, columns])
        dq = _product(_zeros(64, statics.dq_columns), *operands)
        if half:
            plgpu.barrier_arrive(shared.ds_free.at[ds_place])
        num_pieces, width = statics.num_dq_pieces // 2, statics.tiles.piece
        for i in range(num_pieces):
            piece = half * num_pieces + i
            slot, place = _piece_place(statics, step, piece, 0)
            plgpu.barrier_wait(shared.dq_free.at[place])
            shared.dq[slot, 0] = dq[:, i * width : (i + 1) * width]
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.dq_ready.at[_ready(statics, step, piece, 0)])


def _dq_operands(statics: _Statics, warpgroup, shared: _Shared, step):
    """dS [64 queries, keys] and K [keys, 64 columns]: a warpgroup has half of the columns, or half of the queries."""
    ds_smem, k_smem = shared.ds.at[hopper.remainder(step, 2)], shared.k.at[_origin(step)]
    mine = pl.ds(warpgroup * 64, 64)
    if statics.tiles.block_queries == 128:
        return ds_smem.at[:, mine].T, k_smem
    return ds_smem.T, k_smem.at[:, mine]


def _origin(step):
    """0. But the compiler does not know it, which would keep the addresses of keys and values in 48 registers."""
    return jnp.minimum(step, 0)


def _store_pieces(statics: _Statics, shared: _Shared, warpgroup, step, dq) -> None:
    """A warpgroup's dq of a step to shared memory, in pieces."""
    columns = statics.tiles.piece
    for piece in range(statics.num_dq_pieces):
        slot, place = _piece_place(statics, step, piece, warpgroup)
        plgpu.barrier_wait(shared.dq_free.at[place])
        shared.dq[slot, warpgroup] = dq[:, piece * columns : (piece + 1) * columns]
    plgpu.commit_smem()
    for piece in range(statics.num_dq_pieces):
        plgpu.barrier_arrive(shared.dq_ready.at[_ready(statics, step, piece, warpgroup)])


def _start(statics: _Statics, shared: _Shared, buffer):
    """What a step's scores start from: the log-sum-exp, in units of scores, unless the soft cap comes before it."""
    if statics.soft_cap is not None:
        return _zeros(64, statics.tiles.block_queries)
    return _of_queries(statics, shared.shift.at[buffer])


def _weights(statics: _Statics, shared: _Shared, buffer, scores, mask) -> jax.Array:
    """Softmax weights [keys, queries]."""
    mask = (lambda exponent: exponent) if mask is None else mask
    if statics.soft_cap is None:
        return jnp.exp2(mask(scores * (statics.scale * hopper.LOG2_E)))
    # One instruction of the hardware, as in the forward pass.
    capped = mask(jnp.tanh(scores * (statics.scale / statics.soft_cap)))
    return jnp.exp2(capped * (statics.soft_cap * hopper.LOG2_E) + _of_queries(statics, shared.shift.at[buffer]))


def _sloped(statics: _Statics, shared: _Shared, buffer, weights) -> jax.Array:
    """Weights times the derivative of the soft cap, 1 - tanh². From the weights, for want of registers to keep the
    tanh in; where a weight is 0, any finite derivative does."""
    if statics.soft_cap is None:
        return weights
    tanh = jnp.log(weights) * (1 / statics.soft_cap) - _of_queries(
        statics, shared.shift.at[buffer], 1 / statics.soft_cap / hopper.LOG2_E
    )
    tanh = jnp.maximum(tanh, -1)
    return weights * (1 - tanh * tanh)


def _of_queries(statics: _Statics, smem, factor: float = 1) -> jax.Array:
    """A number of each query, for all keys."""
    numbers = plgpu.load(smem, layout=_QUERIES)
    return hopper.along(numbers if factor == 1 else numbers * factor, (64, statics.tiles.block_queries), 1)


def _can_mask(statics: _Statics) -> bool:
    bounded = statics.causal or statics.window is not None
    return bounded or statics.segments or statics.key_padding > 0


def _masked(statics: _Statics, work: _Work, warpgroup, shared: _Shared, buffer, exponent):
    """`exponent` [keys, queries], -inf where a query does not see a key."""
    shape, mine = exponent.shape, pl.ds(_first_key(statics, warpgroup), 64)
    q_segments, kv_segments, q_positions, kv_positions = shared.masks
    conditions = []
    if statics.key_padding:
        count = statics.num_keys - work.key_block * statics.tiles.block_keys - _first_key(statics, warpgroup)
        conditions.append(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=hopper.MATRIX) < count)
    if q_positions is not None:
        # Loaded even where they are the indices: from an iota, the compiler keeps a register for each score.
        query = hopper.along(plgpu.load(q_positions.at[buffer], layout=_QUERIES), shape, 1)
        key = plgpu.load(kv_positions.at[mine], layout=_KEYS)
        if statics.causal:
            conditions.append(query >= hopper.along(key, shape, 0))
        if statics.window is not None:
            conditions.append(query < hopper.along(key + statics.window, shape, 0))
            if not statics.causal:
                conditions.append(query > hopper.along(key - statics.window, shape, 0))
    if q_segments is not None:
        segment = hopper.along(plgpu.load(q_segments.at[buffer], layout=_QUERIES), shape, 1)
        # Padding is 0 on both sides, and neither sees nor is seen.
        key_segment = plgpu.load(kv_segments.at[mine], layout=_KEYS)
        key_segment = jnp.where(key_segment == 0, -1, key_segment)
        conditions.append(segment == hopper.along(key_segment, shape, 0))
    return jnp.where(functools.reduce(jnp.logical_and, conditions), exponent, -jnp.inf)


def _product(start, a, b) -> jax.Array:
    """start + a · b. Pallas's interpreter doesn't know `run_state`: tests that use it put plain products in place of
    this function and the four that follow."""

    def product(acc):
        plgpu.wgmma(acc, a, b)

    return pl.run_state(product)(plgpu.ACC.init(start))


def _two_products(first, with_first, start, second) -> jax.Array:
    """start + the second product; `with_first` takes the first one while the second goes on."""

    def products(refs):
        first_acc, second_acc = refs
        plgpu.wgmma(first_acc, *first)
        plgpu.wgmma(second_acc, *second)
        with_first(plgpu.wgmma_accumulator_load(first_acc, wait_n=1))

    zeros = plgpu.layout_cast(jnp.zeros((first[0].shape[0], first[1].shape[1]), jnp.float32), hopper.MATRIX)
    return pl.run_state(products)((plgpu.ACC.init(zeros), plgpu.ACC.init(start)))[1]


def _product_beside(start, a, b, x, meanwhile) -> tuple[jax.Array, jax.Array]:
    """(start + a · b, meanwhile(x), of the shape of x)."""

    def product(refs):
        acc, value = refs
        plgpu.wgmma(acc, a, b)
        value[...] = meanwhile(value[...])

    return pl.run_state(product)((plgpu.ACC.init(start), x))


def _accumulate(dk, dv, d_scores, q_smem, weights, d_out_smem, meanwhile) -> tuple[jax.Array, jax.Array]:
    """(dk + dS · Q, dv + weights · dO)."""

    def products(refs):
        dk_acc, dv_acc = refs
        plgpu.wgmma(dv_acc, weights, d_out_smem)
        meanwhile()
        plgpu.wgmma(dk_acc, d_scores, q_smem)

    return pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))


def _accumulate_wide(sums, a, b_smem) -> tuple[jax.Array, ...]:
    """Of each the sum of it and its columns of a · b."""

    def products(refs):
        for half, acc in enumerate(refs):
            plgpu.wgmma(acc, a, b_smem.at[:, half * acc.shape[1] : (half + 1) * acc.shape[1]])

    return pl.run_state(products)(tuple(plgpu.ACC.init(array) for array in sums))
