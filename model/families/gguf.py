"""Metadata of GGUF files to ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from model.config import ModelConfig, MoEConfig, RopeConfig, RopeScaling
from model.families.huggingface import shortest_period

# Fields that every file of an architecture has. The others of `llama` follow from the tensors.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"qk_norm": True},
    "qwen3moe": {"qk_norm": True},
    "gemma2": {"norm_placement": "both", "norm_zero_centered": True, "activation": "gelu_tanh"},
    "gemma3": {"norm_placement": "both", "norm_zero_centered": True, "activation": "gelu_tanh", "qk_norm": True},
}
# Layers that slide out of each period of Gemma's, where the file does not say: all but the last.
_PERIODS = {"gemma2": 2, "gemma3": 6}
# Gemma's largest models scale q·k by their width per head; the format has no key for it, and llama.cpp goes by depth.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
ROPE_FACTORS = "rope_freqs.weight"


class _Metadata:
    """Metadata of one architecture: keys without its prefix."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.values, self.prefix = metadata, f"{architecture}."

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(self.prefix + key, default)

    def number(self, key: str, default: Any = None) -> Any:
        """A number; a list of one per layer must repeat it."""
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.prefix}{key}={value!r}, and a number, the same for all layers, is required")
        if not math.isfinite(value):
            raise ValueError(f"{self.prefix}{key}={value!r} must be finite")
        return value

    def whole(self, key: str, default: Any = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise ValueError(f"{self.prefix}{key}={value!r}, and a whole number of at least 1 is required")
        return int(value)


def interleaved_rotation(architecture: str) -> bool:
    """Whether the files of an architecture have the rows of query and key in the order of neighbouring pairs."""
    return architecture == "llama"


def parse_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> ModelConfig:
    """Architecture of a GGUF file, from its metadata and the shapes of its tensors (in NumPy's order).

    `read` gives a tensor's values: Llama 3's rotation is described by a tensor alone. Raises ValueError that names
    the key of what is missing or not supported.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    meta = _Metadata(metadata, architecture)
    if "token_embd.weight" not in shapes:
        raise ValueError("tensor token_embd.weight is missing")
    num_heads, embed_dim = meta.whole("attention.head_count"), meta.whole("embedding_length")
    head_dim = meta.whole("attention.key_length", embed_dim // num_heads)
    if meta.whole("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{architecture}.attention.value_length must equal the key length, {head_dim}")
    num_layers = meta.whole("block_count")
    held = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if held != num_layers:
        raise ValueError(f"{architecture}.block_count={num_layers}, and there are tensors of {held} layers")
    moe = _experts(meta, architecture)
    fields = dict(ARCHITECTURES[architecture])
    if architecture in _PERIODS:
        fields |= _gemma_fields(meta, architecture, embed_dim, num_heads)
    return ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        embed_dim=embed_dim,
        mlp_dim=meta.whole("feed_forward_length", moe.mlp_dim if moe else None),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=meta.whole("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_positions=meta.whole("context_length"),
        norm_epsilon=_decimal(meta.number("attention.layer_norm_rms_epsilon")),
        qkv_bias="blk.0.attn_q.bias" in shapes,
        attention_output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        tie_embeddings="output.weight" not in shapes,
        rope=_rope(meta, architecture, head_dim, read(ROPE_FACTORS) if ROPE_FACTORS in shapes else None),
        window_pattern=shortest_period(_windows(meta, architecture)),
        moe=moe,
        **fields,
    )


def _decimal(value: float) -> float:
    """The short decimal that a float32 was rounded from: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _gemma_fields(meta: _Metadata, architecture: str, embed_dim: int, num_heads: int) -> dict[str, Any]:
    scale = None
    if meta.whole("block_count") == _SCALED_BY_WIDTH[architecture]:
        scale = (embed_dim / num_heads) ** -0.5
    fields = {"embedding_scale": math.sqrt(embed_dim), "attention_scale": scale}
    defaults = {"attention_soft_cap": 50.0, "final_soft_cap": 30.0} if architecture == "gemma2" else {}
    keys = {"attention_soft_cap": "attn_logit_softcapping", "final_soft_cap": "final_logit_softcapping"}
    for name, key in keys.items():
        given = meta.get(key) is not None or name in defaults
        fields[name] = float(meta.number(key, defaults.get(name))) if given else None
    return fields


def _experts(meta: _Metadata, architecture: str) -> MoEConfig | None:
    if not meta.number("expert_count", 0):
        return None
    if architecture not in ("llama", "qwen3moe"):
        raise ValueError(f"{architecture}.expert_count={meta.get('expert_count')} is not supported")
    return MoEConfig(
        num_experts=meta.whole("expert_count"),
        experts_per_token=meta.whole("expert_used_count"),
        mlp_dim=meta.whole("expert_feed_forward_length", meta.get("feed_forward_length")),
    )


def _windows(meta: _Metadata, architecture: str) -> list[int | None]:
    num_layers, window = meta.whole("block_count"), meta.number("attention.sliding_window", 0)
    if not window:
        return [None] * num_layers
    pattern = meta.get("attention.sliding_window_pattern", _PERIODS.get(architecture))
    if pattern is None:
        raise ValueError(f"{architecture}.attention.sliding_window={window} is not supported for this architecture")
    if isinstance(pattern, list):
        slides = [bool(each) for each in pattern]
    else:
        slides = [bool((layer + 1) % pattern) for layer in range(num_layers)]
    if len(slides) != num_layers:
        raise ValueError(f"{architecture}.attention.sliding_window_pattern needs {num_layers} entries: {pattern}")
    return [window if each else None for each in slides]


def _rope(meta: _Metadata, architecture: str, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    theta = float(meta.number("rope.freq_base", 10_000.0))
    rotated = meta.whole("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"{architecture}.rope.dimension_count={rotated} is not supported, only the head's {head_dim}")
    kind, scaling = meta.get("rope.scaling.type", "none"), None
    if meta.number("rope.scale_linear", 1.0) != 1.0:
        # An older key, from before there were kinds.
        scaling = RopeScaling("linear", float(meta.number("rope.scale_linear")))
    elif kind == "linear":
        scaling = RopeScaling("linear", float(meta.number("rope.scaling.factor")))
    elif kind == "yarn":
        scaling = _yarn(meta, float(meta.number("rope.scaling.factor")))
    elif kind != "none":
        raise ValueError(f"{architecture}.rope.scaling.type={kind!r} is not supported; supported: none, linear, yarn")
    if factors is not None:
        if scaling is not None:
            raise ValueError(f"{ROPE_FACTORS} and {architecture}.rope.scaling.type={kind!r} cannot both be")
        scaling = llama3_scaling(factors, theta, head_dim)
    local = meta.number("rope.freq_base_swa", 10_000.0) if architecture == "gemma3" else None
    return RopeConfig(theta=theta, scaling=scaling, local_theta=local)


def _yarn(meta: _Metadata, factor: float) -> RopeScaling:
    attention = meta.number("rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=meta.whole("rope.scaling.original_context_length"),
        beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=None if attention == 1.0 else attention * (0.1 * math.log(factor) + 1.0),
    )


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> RopeScaling | None:
    """The rule behind the divisors of the frequencies, float32 [H/2], that a file holds in its place.

    Within the smooth band 1/divisor is linear in the frequency, which gives the rule back up to a common factor of
    the three lengths; the low one is taken as 1. Raises ValueError for divisors that follow no such rule.
    """
    divisors = np.asarray(factors, np.float64)
    if divisors.shape != (head_dim // 2,) or not np.all(divisors >= 1):
        raise ValueError(f"{ROPE_FACTORS} must have {head_dim // 2} values of at least 1")
    factor = float(divisors.max())
    if factor == 1.0:
        return None
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    band = (keep > 1e-4) & (keep < 1 - 1e-4)
    scaling = RopeScaling("llama3", factor)
    if band.sum() >= 2:
        slope, start = np.polyfit(frequencies[band], keep[band], 1)
        high = 1 - 1 / start
        positions = slope * 2 * np.pi * (high - 1)
        scaling = RopeScaling("llama3", factor, round(float(positions)), 1.0, round(float(high), 3))
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    expected = np.clip((turns - scaling.low_frequency_factor) / span, 0, 1)
    if np.abs(expected - keep).max() > 1e-3:
        raise ValueError(f"{ROPE_FACTORS} follows no rule that we know: {np.round(divisors, 3).tolist()}")
    return scaling
