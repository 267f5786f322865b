"""Cross-entropy of next-token prediction, in chunks of tokens: logits of all tokens never exist at once.

The gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are there (Liger kernels,
arXiv 2410.10989 section 3.2): three matrix products in all, none of them repeated. The backward pass multiplies them
by the cotangent.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.cross_entropy import Impl, cross_entropy_rows, statistics
from kernels.target import Target
from parallel.sharding import Placement


class LossSums(NamedTuple):
    """Sums over all tokens of all devices, scalars of the accumulation dtype.

    Differentiable as `loss_sum` + `z_loss_coef`·`z_loss_sum`, times anything: the forward pass knows the gradient of
    that sum alone. Any other combination of the two gets NaN for its gradient, and the counts get none.
    """

    loss_sum: jax.Array
    """Sum of weight·(negative log-likelihood), in nats."""
    z_loss_sum: jax.Array
    """Sum of weight·logsumexp(logits)²."""
    correct_sum: jax.Array
    """Sum of weight where no logit is above the target's (a tie counts)."""
    weight_sum: jax.Array


class _Sums(NamedTuple):
    loss: jax.Array
    z_loss: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What stays static; see `cross_entropy`."""

    placement: Placement | None
    soft_cap: float | None
    z_loss_coef: float
    chunk_tokens: int
    accumulate_dtype: jnp.dtype
    hidden_dtype: jnp.dtype
    head_dtype: jnp.dtype
    impl: Impl
    target: Target | None

    @property
    def sharded(self) -> bool:
        return self.placement is not None and self.placement.mesh.size > 1

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return self.placement.axes("batch") if self.sharded else ()

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        return self.placement.axes("act_vocab") if self.sharded else ()


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    placement: Placement | None,
    soft_cap: float | None,
    chunk_tokens: int,
    z_loss_coef: float = 0.0,
    accumulate_dtype: jax.typing.DTypeLike = jnp.float32,
    impl: Impl = "xla",
    target: Target | None = None,
) -> LossSums:
    """Weighted sums of -log softmax(logits)[target], where logits = hidden @ head, soft-capped if `soft_cap` is set.

    targets: int, in [0, V) wherever the weight is not 0. weights: float; no gradient flows to them.
    chunk_tokens: most tokens per device whose logits exist at once. z_loss_coef: weight of logsumexp(logits)² (PaLM,
    arXiv 2204.02311 section 5). Products take operands of hidden's dtype and accumulate in `accumulate_dtype`; the
    gradient of `head` is rounded to its dtype only at the end, so a float32 head keeps a float32 gradient.
    With a placement, each device handles its rows of the batch and its part of the vocabulary, and the head's gradient
    is summed over devices once, after the last chunk. B and V must divide over their mesh axes; T is not sharded.
    impl, target: of the logits' gradient, as `kernels.cross_entropy` describes them; evaluation has none.
    """
    assert chunk_tokens > 0, chunk_tokens
    settings = _Settings(
        placement,
        soft_cap,
        z_loss_coef,
        chunk_tokens,
        jnp.dtype(accumulate_dtype),
        hidden_BTD.dtype,
        head_DV.dtype,
        impl,
        target,
    )
    if settings.sharded:
        assert not placement.axes("sequence"), "the sequence axis is sharded"
    weights_BT = jax.lax.stop_gradient(weights_BT.astype(accumulate_dtype))
    sums = _sums(settings, hidden_BTD, head_DV, targets_BT, weights_BT)
    return LossSums(sums.loss, sums.z_loss, jax.lax.stop_gradient(sums.correct), jnp.sum(weights_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    settings: _Settings, hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> _Sums:
    sums, _ = _over_devices(settings, False, hidden_BTD, head_DV, targets_BT, weights_BT)
    return sums


def _sums_forward(settings, hidden_BTD, head_DV, targets_BT, weights_BT):
    return _over_devices(settings, True, hidden_BTD, head_DV, targets_BT, weights_BT)


def _sums_backward(settings, gradients, cotangents):
    dhidden_BTD, dhead_DV = gradients
    expected = settings.z_loss_coef * cotangents.loss
    is_known = jnp.abs(cotangents.z_loss - expected) <= 1e-3 * jnp.abs(expected)
    scale = jnp.where(is_known, cotangents.loss, jnp.nan)
    return (
        (scale * dhidden_BTD).astype(settings.hidden_dtype),
        (scale * dhead_DV).astype(settings.head_dtype),
        None,
        None,
    )


_sums.defvjp(_sums_forward, _sums_backward)


def _over_devices(settings, with_gradients, hidden_BTD, head_DV, targets_BT, weights_BT):
    """Sums, and (or None) the gradients of loss + z_loss_coef·z_loss: hidden's in its dtype, head's in the accumulation
    dtype."""
    # Cast before the gather: half the bytes.
    head_DV = head_DV.astype(hidden_BTD.dtype)
    run = functools.partial(_on_device, settings, with_gradients)
    if not settings.sharded:
        return run(hidden_BTD, head_DV, targets_BT, weights_BT)
    spec = settings.placement.rules.spec
    spec("batch", None, "act_vocab")  # A mesh axis in both would split the sums wrongly: ValueError.
    batch, head = spec("batch", None), spec(None, "act_vocab")
    gradients = (spec("batch", None, None), PartitionSpec(_scatter_axes(settings, head_DV) or None, *head[1:]))
    return jax.shard_map(
        run,
        mesh=settings.placement.mesh,
        in_specs=(spec("batch", None, None), head, batch, batch),
        out_specs=(PartitionSpec(), gradients if with_gradients else None),
        check_vma=False,
    )(hidden_BTD, head_DV, targets_BT, weights_BT)


def _scatter_axes(settings: _Settings, head_DV: jax.Array) -> tuple[str, ...]:
    """Mesh axes over which the head's gradient is summed straight into shards of its embed axis."""
    mesh = settings.placement.mesh
    axes = tuple(axis for axis in settings.placement.axes("embed") if axis in settings.batch_axes)
    return () if head_DV.shape[0] % math.prod(mesh.shape[axis] for axis in axes) else axes


def _on_device(settings, with_gradients, hidden_BTD, head_DV, targets_BT, weights_BT):
    """One device's rows and part of the vocabulary (or everything, unsharded); sums are of all devices."""
    B, T, D = hidden_BTD.shape
    # Inside `shard_map` rows and tokens are local, so merging them is free and any run of tokens may be a chunk.
    tokens = [x.reshape(B * T, *x.shape[2:]) for x in (hidden_BTD, targets_BT, weights_BT)]
    num_chunks = _num_chunks(B * T, settings.chunk_tokens)
    chunk = functools.partial(_chunk, settings, with_gradients, head_DV)
    dhead_DV = jnp.zeros(head_DV.shape, settings.accumulate_dtype) if with_gradients else None
    zero = jnp.zeros((), settings.accumulate_dtype)
    carry = (_Sums(zero, zero, zero), dhead_DV)
    if num_chunks == 1:
        carry, dhidden = chunk(carry, tokens)
    else:
        # Weight-0 tokens fill the last chunk.
        padding = -(B * T) % num_chunks
        tokens = [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in tokens]
        carry, dhidden = jax.lax.scan(chunk, carry, [x.reshape(num_chunks, -1, *x.shape[1:]) for x in tokens])
    sums, dhead_DV = carry
    sums = jax.lax.psum(sums, settings.batch_axes)
    if not with_gradients:
        return sums, None
    dhidden_BTD = dhidden.reshape(-1, D)[: B * T].reshape(B, T, D)
    dhead_DV = _sum_over_batch(settings, dhead_DV)
    if settings.sharded:
        # The head's gradient is summed before the layers' backward pass starts, which needs only hidden's: left free,
        # XLA holds the whole float32 [D, V] until the end of the step, 2 GiB on every device for Llama 3 8B.
        dhidden_BTD, dhead_DV = jax.lax.optimization_barrier((dhidden_BTD, dhead_DV))
    return sums, (dhidden_BTD, dhead_DV)


def _num_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Fewest chunks of at most `chunk_tokens`; up to twice as many if they then need no padding."""
    least = -(-num_tokens // chunk_tokens)
    return next((n for n in range(least, 2 * least + 1) if num_tokens % n == 0), least)


def _sum_over_batch(settings: _Settings, dhead_DV: jax.Array) -> jax.Array:
    scatter = _scatter_axes(settings, dhead_DV) if settings.sharded else ()
    if scatter:
        dhead_DV = jax.lax.psum_scatter(dhead_DV, scatter, scatter_dimension=0, tiled=True)
    return jax.lax.psum(dhead_DV, tuple(axis for axis in settings.batch_axes if axis not in scatter))


def _chunk(settings, with_gradients, head_DV, carry, tokens):
    """Adds C tokens to the sums and to the head's gradient; returns their own gradient [C, D] too."""
    hidden_CD, targets_C, weights_C = tokens
    sums, dhead_DV = carry
    logits_CV = _logits(settings, hidden_CD, head_DV)
    if with_gradients:
        rows, dlogits_CV = cross_entropy_rows(
            logits_CV,
            targets_C,
            weights_C,
            z_loss_coef=settings.z_loss_coef,
            soft_cap=settings.soft_cap,
            axes=settings.vocab_axes,
            dtype=hidden_CD.dtype,
            impl=settings.impl,
            target=settings.target,
        )
    else:
        rows = statistics(logits_CV, targets_C, settings.vocab_axes)
    sums = _Sums(
        sums.loss + jnp.sum(weights_C * (rows.lse_C - rows.target_logit_C)),
        sums.z_loss + jnp.sum(weights_C * jnp.square(rows.lse_C)),
        sums.correct + jnp.sum(weights_C * (rows.target_logit_C >= rows.max_C)),
    )
    if not with_gradients:
        return (sums, None), None
    product = functools.partial(jnp.einsum, preferred_element_type=settings.accumulate_dtype)
    dhidden_CD = jax.lax.psum(product("cv,dv->cd", dlogits_CV, head_DV), settings.vocab_axes)
    dhead_DV += product("cd,cv->dv", hidden_CD, dlogits_CV)
    return (sums, dhead_DV), dhidden_CD.astype(hidden_CD.dtype)


def _logits(settings: _Settings, hidden_CD: jax.Array, head_DV: jax.Array) -> jax.Array:
    logits_CV = jnp.einsum("cd,dv->cv", hidden_CD, head_DV, preferred_element_type=settings.accumulate_dtype)
    if settings.soft_cap is None:
        return logits_CV
    return settings.soft_cap * jnp.tanh(logits_CV / settings.soft_cap)
