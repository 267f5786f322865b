"""Published checkpoints' tensor names mapped to our parameter trees, for the families of the fixtures."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from model.config import ModelConfig
from model.transformer import Definition, Tree

Path = tuple[str, ...]

_MODEL = {
    "model.embed_tokens.weight": ("embedding", "table"),
    "model.norm.weight": ("final_norm", "scale"),
    "lm_head.weight": ("lm_head",),
}
_ATTENTION = {
    "q_proj.weight": ("query",),
    "k_proj.weight": ("key",),
    "v_proj.weight": ("value",),
    "o_proj.weight": ("output",),
    "q_proj.bias": ("query_bias",),
    "k_proj.bias": ("key_bias",),
    "v_proj.bias": ("value_bias",),
    "o_proj.bias": ("output_bias",),
    "q_norm.weight": ("query_norm", "scale"),
    "k_norm.weight": ("key_norm", "scale"),
    "sinks": ("sinks",),
}
_MLP = {
    "gate_proj.weight": "gate",
    "up_proj.weight": "up",
    "down_proj.weight": "down",
    "gate_proj.bias": "gate_bias",
    "up_proj.bias": "up_bias",
    "down_proj.bias": "down_bias",
    "w1.weight": "gate",
    "w3.weight": "up",
    "w2.weight": "down",
}
_ROUTER = {
    "gate.weight": "kernel",
    "gate.e_score_correction_bias": "bias",
    "moe_statics.e_score_correction_bias": "bias",
}
_NORM = {
    # "post_attention" stands before the MLP in pre-norm models, after attention in the others.
    "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "post": {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"},
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}


def map_tensors(
    definition: Definition, tensors: Mapping[str, np.ndarray], *, interleaved_rotation: bool = False
) -> tuple[Tree, Tree]:
    """(params, biases) of `definition` from a checkpoint's tensors, float32.

    `interleaved_rotation`: the checkpoint rotates pairs (2i, 2i + 1) of a head, ours are (i, i + R/2).
    ValueError for a tensor without a place, a place without a tensor, and one filled twice.
    """
    sources: dict[tuple[Path, int | None, int | None], np.ndarray] = {}
    for name, value in tensors.items():
        place = _place(name, definition.config)
        if place in sources:
            raise ValueError(f"{name}: {place} is filled already")
        sources[place] = value

    def gather(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        if path[0] not in ("prefix", "blocks", "suffix"):
            return fetch(path, None, shape)
        layers, stacked = definition.layers_at(path), path[0] == "blocks"
        values = [layer_value(path[2:], layer, shape[1:] if stacked else shape) for layer in layers]
        return np.stack(values) if stacked else values[0]

    def layer_value(path: Path, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        if "experts" in path:
            return np.stack([fetch(path, layer, shape[1:], expert) for expert in range(shape[0])])
        return fetch(path, layer, shape)

    def fetch(path: Path, layer: int | None, shape: tuple[int, ...], expert: int | None = None) -> np.ndarray:
        place = (path, layer, expert)
        if place not in sources:
            raise ValueError(f"no tensor for {'.'.join(map(str, path))} of layer {layer}, expert {expert}")
        value = sources.pop(place)
        # Linear weights are [out, in] there and [in, out] here; heads are split where they were joined.
        value = (value if path[0] == "embedding" else value.T).reshape(shape)
        if interleaved_rotation and path[-1] in ("query", "key"):
            value = np.concatenate([value[..., 0::2], value[..., 1::2]], axis=-1)
        return value

    trees = []
    for abstract in definition.abstract:
        flat = traverse_util.flatten_dict(abstract)
        trees.append(traverse_util.unflatten_dict({path: gather(path, leaf.shape) for path, leaf in flat.items()}))
    if sources:
        raise ValueError(f"tensors without a place: {sorted(map(str, sources))}")
    return trees[0], trees[1]


def _place(name: str, config: ModelConfig) -> tuple[Path, int | None, int | None]:
    """(path within the model or the layer, layer, expert) of a tensor."""
    if name in _MODEL:
        return _MODEL[name], None, None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if match is None:
        raise ValueError(f"unknown tensor {name}")
    layer, block, rest = int(match[1]), match[2], match[3]
    if block == "self_attn" and rest in _ATTENTION:
        return ("attention", *_ATTENTION[rest]), layer, None
    if block in _NORM[config.norm_placement] and rest == "weight":
        return ("norms", _NORM[config.norm_placement][block], "scale"), layer, None
    if block in ("mlp", "block_sparse_moe"):
        expert = re.fullmatch(r"experts\.(\d+)\.(.+)", rest)
        if expert is not None and expert[2] in _MLP:
            return ("mlp", "experts", _MLP[expert[2]]), layer, int(expert[1])
        if rest in _ROUTER:
            return ("mlp", "router", _ROUTER[rest]), layer, None
        if rest.removeprefix("shared_experts.") in _MLP:
            shared = ("shared",) if rest.startswith("shared_experts.") else ()
            return ("mlp", *shared, _MLP[rest.removeprefix("shared_experts.")]), layer, None
    raise ValueError(f"unknown tensor {name}")
