"""The transformer again, in NumPy and float64, token by token and head by head: slow, plain, independent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from model.config import ModelConfig, RopeConfig, RopeScaling

Array = np.ndarray


def forward(config: ModelConfig, params: Any, biases: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
    """(final hidden states [B, T, D], logits [B, T, V]) from parameters of an unrolled model."""
    params, biases = _wide(params), _wide(biases)
    layers = [params["prefix"][i] for i in range(config.num_layers)]
    tokens, positions = batch["tokens"], batch["positions"]
    segments = batch.get("segments", np.ones_like(tokens))
    table = params["embedding"]["table"]
    out = []
    for row in range(tokens.shape[0]):
        x = table[tokens[row]] * (1.0 if config.embedding_scale is None else config.embedding_scale)
        for index, layer in enumerate(layers):
            bias = None
            if config.is_moe(index) and config.moe.router_bias:
                bias = biases["prefix"][index]["mlp"]["router"]["bias"]
            x = _layer(config, index, layer, bias, x, positions[row], segments[row])
        out.append(_norm(config, params["final_norm"], x))
    hidden = np.stack(out)
    logits = hidden @ (table.T if config.tie_embeddings else params["lm_head"])
    if config.final_soft_cap is not None:
        logits = config.final_soft_cap * np.tanh(logits / config.final_soft_cap)
    return hidden, logits


def _wide(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _wide(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def _layer(config, index, layer, bias, x, positions, segments):
    norms = layer.get("norms", {})

    def norm(name, value):
        return _norm(config, norms[name], value) if name in norms else value

    attended = _attention(config, index, layer["attention"], norm("attention_norm", x), positions, segments)
    x = x + norm("attention_post_norm", attended)
    inner = norm("mlp_norm", x)
    fed = _moe(config, layer["mlp"], bias, inner) if config.is_moe(index) else _mlp(config, layer["mlp"], inner)
    return x + norm("mlp_post_norm", fed)


def _norm(config, params, x):
    scale = params["scale"] + (1.0 if config.norm_zero_centered else 0.0)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale


def _attention(config, index, params, x, positions, segments):
    window = config.window_pattern[index % len(config.window_pattern)]
    rope = config.rope
    if window is not None and rope.local_theta is not None:
        rope = RopeConfig(theta=rope.local_theta, fraction=rope.fraction)
    q, k, v = (np.einsum("td,dnh->tnh", x, params[name]) for name in ("query", "key", "value"))
    if config.qkv_bias:
        q, k, v = q + params["query_bias"], k + params["key_bias"], v + params["value_bias"]
    if config.qk_norm:
        q, k = _norm(config, params["query_norm"], q), _norm(config, params["key_norm"], k)
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    scale = 1 / math.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale
    y = np.zeros((len(x), config.num_heads, config.head_dim))
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        for t in range(len(x)):
            seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0 and (window is None or t - s < window)]
            if not seen:
                continue
            scores = k[seen, kv_head] @ q[t, head] * scale
            if config.attention_soft_cap is not None:
                scores = config.attention_soft_cap * np.tanh(scores / config.attention_soft_cap)
            exponentials = np.exp(scores)
            total = exponentials.sum() + (np.exp(params["sinks"][head]) if config.attention_sinks else 0.0)
            y[t, head] = exponentials @ v[seen, kv_head] / total
    y = np.einsum("tnh,nhd->td", y, params["output"])
    return y + params["output_bias"] if config.attention_output_bias else y


def _activate(config, x):
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    if config.activation == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mlp(config, params, x):
    def linear(name, value):
        y = value @ params[name]
        return y + params[f"{name}_bias"] if f"{name}_bias" in params else y

    hidden = linear("up", x)
    hidden = _activate(config, linear("gate", x)) * hidden if config.gated_mlp else _activate(config, hidden)
    return linear("down", hidden)


def _moe(config, params, bias, x):
    moe, y = config.moe, np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ params["router"]["kernel"]
        if moe.scoring == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores if bias is None else scores + bias))[: moe.experts_per_token]
        weights = scores[chosen]
        if moe.normalize_weights:
            weights = weights / weights.sum()
        for expert, weight in zip(chosen, weights * moe.weight_scale, strict=True):
            kernels = {name: kernel[expert] for name, kernel in params["experts"].items()}
            y[t] += weight * _mlp(config, kernels, token)
    return y + _mlp(config, params["shared"], x) if moe.shared_mlp_dim else y


def rotate(x: Array, positions: Array, rope: RopeConfig) -> Array:
    """x [T, N, H] with each pair (i, i + R/2) turned by its angle, as complex numbers."""
    rotated = round(x.shape[-1] * rope.fraction)
    half = rotated // 2
    frequencies, magnitude = frequencies_of(rope, rotated)
    turn = magnitude * np.exp(1j * positions[:, None] * frequencies)[:, None, :]
    pairs = (x[..., :half] + 1j * x[..., half:rotated]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., rotated:]], axis=-1)


def frequencies_of(rope: RopeConfig, rotated: int) -> tuple[Array, float]:
    plain = [rope.theta ** (-2 * i / rotated) for i in range(rotated // 2)]
    scaling = rope.scaling
    if scaling is None:
        return np.array(plain), 1.0
    if scaling.kind == "linear":
        return np.array(plain) / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return np.array([_llama3(frequency, scaling) for frequency in plain]), 1.0
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1
    return np.array([_yarn(i, f, rope.theta, rotated, scaling) for i, f in enumerate(plain)]), magnitude


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """By wavelength, as the model card's code decides it: short ones kept, long ones stretched, a blend between."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_positions / scaling.high_frequency_factor:
        return frequency
    if wavelength > scaling.original_max_positions / scaling.low_frequency_factor:
        return frequency / scaling.factor
    blend = scaling.original_max_positions / wavelength - scaling.low_frequency_factor
    blend /= scaling.high_frequency_factor - scaling.low_frequency_factor
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(i: int, frequency: float, theta: float, rotated: int, scaling: RopeScaling) -> float:
    """Pairs up to the one of `beta_fast` turns are kept, from the one of `beta_slow` turns on stretched."""

    def pair_of(turns: float) -> float:
        # turns = original / (2π) · theta^(-2·pair/rotated), solved for pair.
        return rotated / 2 * math.log(scaling.original_max_positions / (2 * math.pi * turns), theta)

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), rotated - 1)
    if i <= low:
        return frequency
    if i >= high:
        return frequency / scaling.factor
    part = (i - low) / (high - low)
    return (1 - part) * frequency + part * frequency / scaling.factor
