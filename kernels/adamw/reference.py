"""AdamW's update of a parameter in halves: the specification."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels.adamw.halves import join, split


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """`decay` is the decoupled weight decay, which the learning rate multiplies."""

    b1: float
    b2: float
    eps: float
    decay: float


def step_factors(apply, clip, learning_rate, count, how: Hyperparameters) -> jax.Array:
    """float32 [5]: what the updates of all parameters share in a step, in one array.

    Args:
      apply: bool scalar; where it is false all stays as it is, bit for bit.
      clip: what gradients are multiplied by. learning_rate: float. Scalars both.
      count: int scalar, the number of this update, from 1; for corrections of moments that began at zero.
    """
    corrections = [1 / (1 - jnp.float32(decay) ** count) for decay in (how.b1, how.b2)]
    return jnp.stack([jnp.asarray(one, jnp.float32) for one in (apply, clip, learning_rate, *corrections)])


def moved(gradient, param, mean, square, factors, how: Hyperparameters):
    """(parameter, mean, mean of squares) after the update, float32; `gradient` and the first moment of any dtype.

    `factors`: those of `step_factors` after the first, scalars. In Optax's order, but for these in the place of its
    divisions by the norm and by the corrections.
    """
    clip, learning_rate, mean_correction, square_correction = factors
    gradient = gradient.astype(jnp.float32) * clip
    mean = (1 - how.b1) * gradient + how.b1 * mean.astype(jnp.float32)
    square = (1 - how.b2) * (gradient * gradient) + how.b2 * square
    direction = mean * mean_correction / (jnp.sqrt(square * square_correction) + how.eps)
    if how.decay:
        direction = direction + how.decay * param
    return param - learning_rate * direction, mean, square


def adamw(gradient, rounded, rest, mean, square, factors, how: Hyperparameters):
    """(rounded, rest, mean, square), each as given in shape and dtype."""
    param, new_mean, new_square = moved(gradient, join(rounded, rest), mean, square, factors[1:], how)
    new = (*split(param), new_mean.astype(mean.dtype), new_square)
    return tuple(jnp.where(factors[0] != 0, n, o) for n, o in zip(new, (rounded, rest, mean, square), strict=True))
