"""The definition, in plain operations: what runs wherever no kernel does, and where devices share the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Of each token's logits, over the whole vocabulary, in their dtype [C]: logsumexp, the target's logit (0 where no
    device has it), and the largest."""

    lse_C: jax.Array
    target_logit_C: jax.Array
    max_C: jax.Array


def statistics(logits_CV: jax.Array, targets_C: jax.Array, axes: tuple[str, ...] = ()) -> Rows:
    """`axes`: mesh axes over which the vocabulary is cut, of which V is this device's part."""
    local_C = _local(targets_C, logits_CV.shape[1], axes)
    is_here_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
    max_C = jax.lax.pmax(jnp.max(logits_CV, axis=1), axes) if axes else jnp.max(logits_CV, axis=1)
    sum_C = jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=1)
    picked_C = jnp.take_along_axis(logits_CV, jnp.clip(local_C, 0, logits_CV.shape[1] - 1)[:, None], axis=1)[:, 0]
    sum_C, target_logit_C = jax.lax.psum((sum_C, jnp.where(is_here_C, picked_C, 0)), axes)
    return Rows(max_C + jnp.log(sum_C), target_logit_C, max_C)


def gradient(
    logits_CV: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    rows: Rows,
    *,
    z_loss_coef: float,
    soft_cap: float | None,
    axes: tuple[str, ...] = (),
) -> jax.Array:
    """weight · d(loss + z_loss_coef · z_loss) / d logit, and through cap · tanh(x / cap) where there is one."""
    is_target_CV = _local(targets_C, logits_CV.shape[1], axes)[:, None] == jnp.arange(logits_CV.shape[1])
    softmax_CV = jnp.exp(logits_CV - rows.lse_C[:, None])
    dlogits_CV = softmax_CV * (1 + 2 * z_loss_coef * rows.lse_C)[:, None] - is_target_CV
    if soft_cap is not None:
        dlogits_CV *= 1 - jnp.square(logits_CV / soft_cap)
    return weights_C[:, None] * dlogits_CV


def _local(targets_C: jax.Array, length: int, axes: tuple[str, ...]) -> jax.Array:
    return targets_C - length * jax.lax.axis_index(axes) if axes else targets_C
