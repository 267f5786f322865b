"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context extensions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, RopeConfig, RopeScaling

Rotation = tuple[jax.Array, jax.Array]


def rotations(config: ModelConfig, positions_BT: jax.Array) -> dict[bool, Rotation]:
    """cos and sin, float32 [B, T, R/2], for full layers (False) and sliding-window layers (True).

    float32 because an angle is a position times a frequency: at position 100,000 bfloat16 is off by whole turns.
    """
    rope = config.rope
    full = _rotation(rope, config.head_dim, positions_BT)
    if rope.local_theta is None:
        return {False: full, True: full}
    local = RopeConfig(theta=rope.local_theta, fraction=rope.fraction)
    return {False: full, True: _rotation(local, config.head_dim, positions_BT)}


def _rotation(rope: RopeConfig, head_dim: int, positions_BT: jax.Array) -> Rotation:
    frequencies, magnitude = rope_frequencies(rope, head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, float32 [R/2], and the factor on cos and sin (1 except for YaRN)."""
    rotated = int(head_dim * rope.fraction)
    frequencies = 1.0 / rope.theta ** (np.arange(0, rotated, 2, dtype=np.float64) / max(rotated, 1))
    scaling = rope.scaling
    magnitude = 1.0
    if scaling is not None:
        if scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        else:
            frequencies = _yarn(frequencies, scaling, rope.theta, rotated)
            default = 0.1 * math.log(scaling.factor) + 1.0
            magnitude = default if scaling.attention_factor is None else scaling.attention_factor
    return frequencies.astype(np.float32), magnitude


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, theta: float, rotated: int) -> np.ndarray:
    def dimension(turns: float) -> float:
        """Index of the pair that makes this many turns over the original context (arXiv 2309.00071, section 3.2)."""
        return rotated * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), rotated - 1)
    interpolate = np.clip((np.arange(rotated // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return interpolate * frequencies / scaling.factor + (1 - interpolate) * frequencies


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of the first R elements of each head; the rest passes through. Same dtype out."""
    cos, sin = (r[:, :, None, None, :] for r in rotation)
    half = cos.shape[-1]
    pairs = x_BTNH[..., : 2 * half].astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, half)
    # The halves swapped by a reversal: a concatenation of the two products would be a kernel of its own on a GPU.
    sign = jnp.array([-1.0, 1.0], jnp.float32)[:, None]
    turned = pairs * cos + pairs[..., ::-1, :] * (sign * sin)
    turned = turned.reshape(*x_BTNH.shape[:-1], 2 * half).astype(x_BTNH.dtype)
    return turned if 2 * half == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., 2 * half :]], axis=-1)
