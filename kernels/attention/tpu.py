"""Attention of training and prefill on TPU: no [T, S] array leaves a core's vector memory, in either pass.

A step multiplies a block of keys with a tile of queries of a few heads that share them: scores [keys, queries], an
online softmax down the keys, and out [V, queries] += values [V, keys] · weights (FlashAttention-2, arXiv 2307.08691,
in the orientation that `tpu_scores` gives the reason for). The heads of a step do not depend on each other, so that the
compiler multiplies for one while another has its softmax. `tpu_steps` decides which pairs are visited.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention import tpu_backward, tpu_steps
from kernels.attention.masks import Marks, Masks
from kernels.attention.tpu_scores import (
    LEAST,
    Specs,
    Statics,
    laid_out_marks,
    laid_out_queries,
    padded,
    place_by_queries,
    product,
    scores_of,
    seen_by,
)
from kernels.attention.tpu_steps import Steps, code_of, is_first, is_last, steps_of
from kernels.attention.tpu_tiles import (
    VMEM_BYTES,
    AllTiles,
    Shape,
    check,
    choose_tiles,
    d_keys_bytes,
    d_queries_bytes,
    forward_bytes,
)


class _Refs(NamedTuple):
    """Blocks in vector memory; `sinks` in scalar memory. `highest`, `total` and `sums` are of the keys so far."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    q_segments: Any
    kv_segments: Any
    q_positions: Any
    kv_positions: Any
    out: Any
    lse: Any
    highest: Any
    total: Any
    sums: Any

    @property
    def marks(self) -> Marks:
        return Marks(self.q_segments, self.kv_segments, self.q_positions, self.kv_positions)


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
    tiles: AllTiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in q's dtype, lse_BTN in float32); arguments as in `kernels.attention.attention`.

    `tiles`: None for those that `choose_tiles` gives. `interpret`: on any device, by Pallas's interpreter, for tests.
    A remat policy may save the named values "attention_out" and "attention_lse" to skip the forward pass's repeat.

    Raises ValueError for tiles that a core's memories have no room for.
    """
    (B, T, N, H), (S, K, V) = q_BTNH.shape, v_BSKH.shape[1:]
    if not causal and window is None:
        q_positions = kv_positions = None
    masks = Masks(T, S, causal, window, q_segments is not None, q_positions is not None)
    shape = Shape(masks, B, N // K, H, V, q_BTNH.dtype.itemsize)
    if tiles is None:
        tiles = choose_tiles(shape)
    for tile, need in (
        (tiles.forward, forward_bytes),
        (tiles.d_queries, d_queries_bytes),
        (tiles.d_keys, d_keys_bytes),
    ):
        check(shape, tile, need)
    statics = Statics(masks, N // K, H, V, scale, soft_cap, tiles, interpret, q_BTNH.dtype == jnp.float32)
    marks = Marks(q_segments, kv_segments, q_positions, kv_positions)
    return _attention(statics, q_BTNH, k_BSKH, v_BSKH, sinks, marks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(statics: Statics, q, k, v, sinks, marks: Marks):
    return forward(statics, q, k, v, sinks, marks)


def _attention_fwd(statics: Statics, q, k, v, sinks, marks: Marks):
    out, lse = forward(statics, q, k, v, sinks, marks)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, sinks, marks, out, lse)


def _attention_bwd(statics: Statics, saved, gradients):
    return (*tpu_backward.backward(statics, *saved, *gradients), None)


_attention.defvjp(_attention_fwd, _attention_bwd)


# A jit of its own, so that a model's layers are traced once.
@functools.partial(jax.jit, static_argnums=0)
def forward(statics: Statics, q_BTNH, k_BSKH, v_BSKH, sinks, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    (B, T, N, _), V, tiles = q_BTNH.shape, statics.value_dim, statics.tiles.forward
    steps = steps_of(statics.masks, tiles.queries, tiles.keys, "queries", marks)
    q = laid_out_queries(q_BTNH, tiles)
    k = padded(k_BSKH, 1, tiles.keys).transpose(0, 2, 1, 3)
    v = padded(v_BSKH, 1, tiles.keys).transpose(0, 2, 3, 1)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
    out, lse = _call(statics, steps, q, k, v, sinks, laid_out_marks(marks, tiles))
    out = out.reshape(B, N, V, -1)[..., :T].transpose(0, 3, 1, 2)
    return out, lse.reshape(B, N, -1)[..., :T].transpose(0, 2, 1)


def _call(statics: Statics, steps: Steps, q, k, v, sinks, marks: Marks):
    """[out [B, programs, heads, V, T], lse [B, programs, heads, 1, T] in float32]."""
    tiles, H, V = statics.tiles.forward, statics.key_dim, statics.value_dim
    B, programs, heads, T, _ = q.shape
    specs = Specs(tiles, place_by_queries(statics, tiles, steps.number))
    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks, **marks._asdict()}
    in_specs = {"q": specs.queries(H), "k": specs.keys(H), "v": specs.keys_across(V), "sinks": whole}
    in_specs |= specs.marks(marks)._asdict()
    given = [name for name, array in inputs.items() if array is not None]

    def body(outer, codes, *refs):
        names = (*given, "out", "lse", "highest", "total", "sums")
        _body(
            statics,
            steps.number,
            outer,
            codes,
            _Refs(**dict.fromkeys(_Refs._fields) | dict(zip(names, refs, strict=True))),
        )

    rows = pltpu.VMEM((heads, 1, tiles.queries), jnp.float32)
    arrays = [inputs[name] for name in given]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, programs, steps.number),
            in_specs=[in_specs[name] for name in given],
            out_specs=[specs.queries_across(V), specs.queries_across(1)],
            scratch_shapes=[rows, rows, pltpu.VMEM((heads, V, tiles.queries), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, programs, heads, V, T), q.dtype),
            jax.ShapeDtypeStruct((B, programs, heads, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=statics.interpret,
        name="attention_forward",
    )(*steps, *arrays)


def _body(statics: Statics, number: int, outer, codes, refs: _Refs):
    row, program, step = (pl.program_id(axis) for axis in range(3))
    tiles, code = statics.tiles.forward, code_of(number, codes, row, step)
    tile, block = outer[step], tpu_steps.inner(code)

    @pl.when(is_first(code))
    def _():
        _begin(statics, program, refs)

    @pl.when(tpu_steps.kind(code) == tpu_steps.FULL)
    def _():
        _add(statics, refs, None)

    if statics.masks.hide(tiles.keys):

        @pl.when(tpu_steps.kind(code) == tpu_steps.MASKED)
        def _():
            _add(statics, refs, seen_by(statics.masks, tiles, tile, block, refs.marks))

    @pl.when(is_last(code))
    def _():
        _end(statics, refs)


def _begin(statics: Statics, program, refs: _Refs):
    """A sink is a key with a weight and a value of zero."""
    refs.sums[...] = jnp.zeros_like(refs.sums)
    shape, heads = refs.highest.shape[1:], statics.tiles.forward.heads
    for head in range(heads):
        if refs.sinks is None:
            highest, total = jnp.full(shape, LEAST, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            sink = jnp.full(shape, refs.sinks[program * heads + head] * statics.unit, jnp.float32)
            highest = jnp.maximum(sink, LEAST)
            total = statics.power(sink - highest)
        refs.highest[head], refs.total[head] = highest, total


def _add(statics: Statics, refs: _Refs, seen):
    k, v = refs.k[...], refs.v[...]
    for head in range(statics.tiles.forward.heads):
        scores = scores_of(statics, refs.q[head], k, seen).exponent
        before = refs.highest[head]
        highest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights, shrink = statics.power(scores - highest), statics.power(before - highest)
        refs.highest[head] = highest
        refs.total[head] = refs.total[head] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        refs.sums[head] = refs.sums[head] * shrink + product(v, weights.astype(v.dtype), over=(1, 0))


def _end(statics: Statics, refs: _Refs):
    for head in range(statics.tiles.forward.heads):
        total = refs.total[head]
        nothing = total == 0
        divisor = jnp.where(nothing, 1, total)
        refs.out[head] = (refs.sums[head] / divisor).astype(refs.out.dtype)
        refs.lse[head] = jnp.where(nothing, -jnp.inf, refs.highest[head] / statics.unit + jnp.log(divisor))
