"""Gradients of the TPU kernels: one kernel for queries, one for keys and values; nothing added in an order that varies.

Weights and their gradients are computed again, in both, from the log-sum-exp: seven products for each pair where one
kernel would do with five. That one would keep the sums of all of a head's queries in vector memory, or add to device
memory from many blocks of keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kernels.attention import tpu_steps
from kernels.attention.tpu_scores import (
    Specs,
    Statics,
    laid_out_marks,
    laid_out_queries,
    laid_out_rows,
    padded,
    place_by_queries,
    product,
    scores_of,
    seen_by,
)
from kernels.attention.tpu_steps import Marks, Steps, code_of, is_first, is_last, steps_of
from kernels.attention.tpu_tiles import VMEM_BYTES, Tiles

# Of a query that sees nothing: its weights are powers of (score - this), 0.
_NOTHING_SEEN = 1e30


class _Refs(NamedTuple):
    """Blocks in vector memory, or None. `lse` (times `Statics.unit`) and `delta` are rows of the queries; `k_across`,
    `dq` and `dq_sum` of the kernel for queries, `dk`, `dv` and their sums of the other. Sums are in float32."""

    q: Any
    d_out: Any
    lse: Any
    delta: Any
    k: Any
    k_across: Any
    v: Any
    q_segments: Any
    kv_segments: Any
    q_positions: Any
    kv_positions: Any
    dq: Any
    dk: Any
    dv: Any
    dq_sum: Any
    dk_sum: Any
    dv_sum: Any

    @property
    def marks(self) -> Marks:
        return Marks(self.q_segments, self.kv_segments, self.q_positions, self.kv_positions)


@functools.partial(jax.jit, static_argnums=0)
def backward(statics: Statics, q_BTNH, k_BSKH, v_BSKH, sinks, marks: Marks, out_BTNH, lse_BTN, d_out, d_lse):
    """(dq, dk, dv, dsinks) in the dtypes of q, k, v and sinks; dsinks None without sinks."""
    wide = jnp.float32
    # A score's gradient is weight · (d_out·v - d_out·out + d_lse).
    delta_BTN = jnp.sum(d_out.astype(wide) * out_BTNH.astype(wide), axis=-1) - d_lse
    scaled_BTN = jnp.where(lse_BTN == -jnp.inf, _NOTHING_SEEN, lse_BTN * statics.unit)
    arrays = (q_BTNH, k_BSKH, v_BSKH, d_out, scaled_BTN, delta_BTN, marks)
    dq = _d_queries(statics, *arrays)
    dk, dv = _d_keys(statics, *arrays)
    d_sinks = None
    if sinks is not None:
        # lse is finite wherever there is a sink.
        weight = jnp.exp(sinks.astype(wide) - lse_BTN)
        d_sinks = -jnp.sum(weight * delta_BTN, axis=(0, 1)).astype(sinks.dtype)
    return dq, dk, dv, d_sinks


def _query_inputs(tiles: Tiles, q_BTNH, d_out, scaled_BTN, delta_BTN) -> dict[str, jax.Array]:
    """Filled up to whole tiles with queries whose output has no gradient, so that they add zeros."""
    return {
        "q": laid_out_queries(q_BTNH, tiles),
        "d_out": laid_out_queries(d_out, tiles),
        "lse": laid_out_rows(padded(scaled_BTN, 1, tiles.queries), tiles),
        "delta": laid_out_rows(padded(delta_BTN, 1, tiles.queries), tiles),
    }


def _d_queries(statics: Statics, q_BTNH, k_BSKH, v_BSKH, d_out, scaled_BTN, delta_BTN, marks: Marks):
    """dq_BTNH in q's dtype."""
    tiles, (B, T, N, H) = statics.tiles.d_queries, q_BTNH.shape
    steps = steps_of(statics.masks, tiles.queries, tiles.keys, "queries", marks)
    k, v = (padded(array, 1, tiles.keys) for array in (k_BSKH, v_BSKH))
    inputs = _query_inputs(tiles, q_BTNH, d_out, scaled_BTN, delta_BTN)
    programs, heads, filled = inputs["q"].shape[1:4]
    inputs |= {"k": k.transpose(0, 2, 1, 3), "k_across": k.transpose(0, 2, 3, 1), "v": v.transpose(0, 2, 1, 3)}
    inputs |= laid_out_marks(marks, tiles)._asdict()
    specs = Specs(tiles, place_by_queries(statics, tiles, steps.number))
    (dq,) = _call(
        "attention_d_queries",
        _d_queries_body,
        statics,
        steps,
        specs,
        inputs,
        grid=(B, programs, steps.number),
        results={"dq": ((B, programs, heads, H, filled), q_BTNH.dtype, specs.queries_across(H))},
        sums={"dq_sum": (heads, H, tiles.queries)},
    )
    return dq.reshape(B, N, H, -1)[..., :T].transpose(0, 3, 1, 2)


def _d_keys(statics: Statics, q_BTNH, k_BSKH, v_BSKH, d_out, scaled_BTN, delta_BTN, marks: Marks):
    """(dk_BSKH, dv_BSKH) in the dtypes of k and v."""
    tiles, (B, S, K, H), V = statics.tiles.d_keys, k_BSKH.shape, statics.value_dim
    steps = steps_of(statics.masks, tiles.queries, tiles.keys, "keys", marks)
    parts = statics.share // tiles.heads
    k, v = (padded(array, 1, tiles.keys).transpose(0, 2, 1, 3) for array in (k_BSKH, v_BSKH))
    inputs = _query_inputs(tiles, q_BTNH, d_out, scaled_BTN, delta_BTN) | {"k": k, "v": v}
    inputs |= laid_out_marks(marks, tiles)._asdict()

    def place(b, head, step, part, outer, codes):
        return head * parts + part, head, tpu_steps.inner(code_of(steps.number, codes, b, step)), outer[step]

    specs = Specs(tiles, place)
    dk, dv = _call(
        "attention_d_keys",
        _d_keys_body,
        statics,
        steps,
        specs,
        inputs,
        grid=(B, K, steps.number, parts),
        results={"dk": (k.shape, k.dtype, specs.keys(H)), "dv": (v.shape, v.dtype, specs.keys(V))},
        sums={"dk_sum": (tiles.keys, H), "dv_sum": (tiles.keys, V)},
    )
    return dk[:, :, :S].transpose(0, 2, 1, 3), dv[:, :, :S].transpose(0, 2, 1, 3)


def _call(name: str, body_fn, statics: Statics, steps: Steps, specs: Specs, inputs, *, grid, results, sums):
    """`results`: shape, dtype and spec by name; `sums`: shapes of float32 scratch by name."""
    H, V = statics.key_dim, statics.value_dim
    in_specs = {"q": specs.queries(H), "d_out": specs.queries(V)}
    in_specs |= {"lse": specs.queries_across(1), "delta": specs.queries_across(1)}
    in_specs |= {"k": specs.keys(H), "k_across": specs.keys_across(H), "v": specs.keys(V)}
    in_specs |= specs.marks(Marks(*(inputs[field] for field in Marks._fields)))._asdict()
    given = [field for field, array in inputs.items() if array is not None]
    arrays = [inputs[field] for field in given]

    def body(outer, codes, *refs):
        named = dict(zip((*given, *results, *sums), refs, strict=True))
        body_fn(statics, steps.number, outer, codes, _Refs(**dict.fromkeys(_Refs._fields) | named))

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[in_specs[field] for field in given],
            out_specs=[spec for _, _, spec in results.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums.values()],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *["arbitrary"] * (len(grid) - 2)), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=statics.interpret,
        name=name,
    )(*steps, *arrays)


def _d_queries_body(statics: Statics, number: int, outer, codes, refs: _Refs):
    row, step = pl.program_id(0), pl.program_id(2)
    tiles, code = statics.tiles.d_queries, code_of(number, codes, row, step)
    tile, block = outer[step], tpu_steps.inner(code)

    @pl.when(is_first(code))
    def _():
        refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)

    def add(seen):
        k_across = refs.k_across[...]
        for head in range(tiles.heads):
            _, d_scores = _weights(statics, refs, head, seen)
            refs.dq_sum[head] += product(k_across, d_scores.astype(k_across.dtype), over=(1, 0))

    _by_kind(statics, tiles, code, tile, block, refs, add)

    @pl.when(is_last(code))
    def _():
        refs.dq[...] = (refs.dq_sum[...] * statics.scale).astype(refs.dq.dtype)


def _d_keys_body(statics: Statics, number: int, outer, codes, refs: _Refs):
    row, step, part = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    tiles, code = statics.tiles.d_keys, code_of(number, codes, row, step)
    tile, block = tpu_steps.inner(code), outer[step]

    @pl.when(is_first(code) & (part == 0))
    def _():
        refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)
        refs.dv_sum[...] = jnp.zeros_like(refs.dv_sum)

    def add(seen):
        for head in range(tiles.heads):
            q, d_out = refs.q[head], refs.d_out[head]
            weights, d_scores = _weights(statics, refs, head, seen)
            refs.dv_sum[...] += product(weights.astype(d_out.dtype), d_out, over=(1, 0))
            refs.dk_sum[...] += product(d_scores.astype(q.dtype), q, over=(1, 0))

    _by_kind(statics, tiles, code, tile, block, refs, add)

    @pl.when(is_last(code) & (part == statics.share // tiles.heads - 1))
    def _():
        refs.dk[...] = (refs.dk_sum[...] * statics.scale).astype(refs.dk.dtype)
        refs.dv[...] = refs.dv_sum[...].astype(refs.dv.dtype)


def _by_kind(statics: Statics, tiles: Tiles, code, tile, block, refs: _Refs, add):
    @pl.when(tpu_steps.kind(code) == tpu_steps.FULL)
    def _():
        add(None)

    if not statics.masks.hide(tiles.keys):
        return

    @pl.when(tpu_steps.kind(code) == tpu_steps.MASKED)
    def _():
        add(seen_by(statics.masks, tiles, tile, block, refs.marks))


def _weights(statics: Statics, refs: _Refs, head: int, seen):
    """(weights, gradient of the scores without its factor `scale`), float32 [keys, queries]."""
    scores = scores_of(statics, refs.q[head], refs.k[...], seen)
    weights = statics.power(scores.exponent - refs.lse[head])
    d_scores = weights * (product(refs.v[...], refs.d_out[head], over=(1, 1)) - refs.delta[head])
    return weights, d_scores if scores.slope is None else d_scores * scores.slope
