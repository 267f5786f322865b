"""Names and layouts of our parameters in Hugging Face's files and in GGUF files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from model.config import ModelConfig
from model.transformer import Definition

Path = tuple[str, ...]


class Spelling(NamedTuple):
    """One name that a tensor may have. The file's array has leading axes `lead`, of which element `index` is ours."""

    name: str
    lead: tuple[int, ...] = ()
    index: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a file holds one of our arrays, of one layer and one expert.

    Each axis of the file's array is the product of these axes of ours, major first. `interleaved`: the file rotates
    the pairs (2i, 2i + 1) of a head, the last axis; ours are (i, i + H/2). `offset` is added to what is read.
    """

    spellings: tuple[Spelling, ...]
    axes: tuple[tuple[int, ...], ...]
    interleaved: bool = False
    offset: float = 0.0

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file, without `lead`, of an array of our shape."""
        return tuple(int(np.prod([ours[axis] for axis in group])) for group in self.axes)

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the order of the file's."""
        return tuple(axis for group in self.axes for axis in group)


class Names(Protocol):
    """Where a file holds a parameter: `path` within the model (layer None) or within a layer."""

    def __call__(self, path: Path, layer: int | None, expert: int | None) -> Stored: ...


class Piece(NamedTuple):
    """Element `prefix` of one of our leaves: a layer of stacked ones, an expert, or the whole (the empty prefix)."""

    prefix: tuple[int, ...]
    stored: Stored


def pieces(definition: Definition, path: tuple[str | int, ...], names: Names) -> Iterator[Piece]:
    """The parts of the leaf at `path` of the params or biases, each in a tensor (or a slice of one) of its own."""
    if path[0] not in ("prefix", "blocks", "suffix"):
        yield Piece((), names(path, None, None))
        return
    for block, layer in enumerate(definition.layers_at(path)):
        prefix = (block,) if path[0] == "blocks" else ()
        if "experts" not in path:
            yield Piece(prefix, names(path[2:], layer, None))
            continue
        for expert in range(definition.config.moe.num_experts):
            yield Piece((*prefix, expert), names(path[2:], layer, expert))


# Ours are [in, out] with heads apart, a file's are [out, in] with heads joined.
_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "query": ((1, 2), (0,)),
    "key": ((1, 2), (0,)),
    "value": ((1, 2), (0,)),
    "output": ((2,), (0, 1)),
    "query_bias": ((0, 1),),
    "key_bias": ((0, 1),),
    "value_bias": ((0, 1),),
    "table": ((0,), (1,)),
    "lm_head": ((1,), (0,)),
    "gate": ((1,), (0,)),
    "up": ((1,), (0,)),
    "down": ((1,), (0,)),
    "kernel": ((1,), (0,)),
}
_VECTOR = ((0,),)
_ROTATED = ("query", "key", "query_bias", "key_bias")

_HUGGINGFACE: dict[Path, tuple[str, ...]] = {
    ("embedding", "table"): ("embed_tokens.weight",),
    ("final_norm", "scale"): ("norm.weight",),
    ("lm_head",): ("lm_head.weight",),
    ("attention", "query"): ("self_attn.q_proj.weight",),
    ("attention", "key"): ("self_attn.k_proj.weight",),
    ("attention", "value"): ("self_attn.v_proj.weight",),
    ("attention", "output"): ("self_attn.o_proj.weight",),
    ("attention", "query_bias"): ("self_attn.q_proj.bias",),
    ("attention", "key_bias"): ("self_attn.k_proj.bias",),
    ("attention", "value_bias"): ("self_attn.v_proj.bias",),
    ("attention", "output_bias"): ("self_attn.o_proj.bias",),
    ("attention", "query_norm", "scale"): ("self_attn.q_norm.weight",),
    ("attention", "key_norm", "scale"): ("self_attn.k_norm.weight",),
    ("attention", "sinks"): ("self_attn.sinks",),
    ("mlp", "gate"): ("mlp.gate_proj.weight",),
    ("mlp", "up"): ("mlp.up_proj.weight",),
    ("mlp", "down"): ("mlp.down_proj.weight",),
    ("mlp", "gate_bias"): ("mlp.gate_proj.bias",),
    ("mlp", "up_bias"): ("mlp.up_proj.bias",),
    ("mlp", "down_bias"): ("mlp.down_proj.bias",),
    ("mlp", "shared", "gate"): ("mlp.shared_experts.gate_proj.weight",),
    ("mlp", "shared", "up"): ("mlp.shared_experts.up_proj.weight",),
    ("mlp", "shared", "down"): ("mlp.shared_experts.down_proj.weight",),
    ("mlp", "shared", "gate_bias"): ("mlp.shared_experts.gate_proj.bias",),
    ("mlp", "shared", "up_bias"): ("mlp.shared_experts.up_proj.bias",),
    ("mlp", "shared", "down_bias"): ("mlp.shared_experts.down_proj.bias",),
    ("mlp", "experts", "gate"): ("mlp.experts.{}.gate_proj.weight", "block_sparse_moe.experts.{}.w1.weight"),
    ("mlp", "experts", "up"): ("mlp.experts.{}.up_proj.weight", "block_sparse_moe.experts.{}.w3.weight"),
    ("mlp", "experts", "down"): ("mlp.experts.{}.down_proj.weight", "block_sparse_moe.experts.{}.w2.weight"),
    ("mlp", "router", "kernel"): ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
    ("mlp", "router", "bias"): ("mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
}
# "post_attention" stands before the MLP in pre-norm models, after attention in the others.
_HUGGINGFACE_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}

_GGUF: dict[Path, str] = {
    ("embedding", "table"): "token_embd.weight",
    ("final_norm", "scale"): "output_norm.weight",
    ("lm_head",): "output.weight",
    ("attention", "query"): "attn_q.weight",
    ("attention", "key"): "attn_k.weight",
    ("attention", "value"): "attn_v.weight",
    ("attention", "output"): "attn_output.weight",
    ("attention", "query_bias"): "attn_q.bias",
    ("attention", "key_bias"): "attn_k.bias",
    ("attention", "value_bias"): "attn_v.bias",
    ("attention", "output_bias"): "attn_output.bias",
    ("attention", "query_norm", "scale"): "attn_q_norm.weight",
    ("attention", "key_norm", "scale"): "attn_k_norm.weight",
    ("norms", "attention_norm", "scale"): "attn_norm.weight",
    ("norms", "attention_post_norm", "scale"): "post_attention_norm.weight",
    ("norms", "mlp_norm", "scale"): "ffn_norm.weight",
    ("norms", "mlp_post_norm", "scale"): "post_ffw_norm.weight",
    ("mlp", "gate"): "ffn_gate.weight",
    ("mlp", "up"): "ffn_up.weight",
    ("mlp", "down"): "ffn_down.weight",
    ("mlp", "gate_bias"): "ffn_gate.bias",
    ("mlp", "up_bias"): "ffn_up.bias",
    ("mlp", "down_bias"): "ffn_down.bias",
    ("mlp", "experts", "gate"): "ffn_gate_exps.weight",
    ("mlp", "experts", "up"): "ffn_up_exps.weight",
    ("mlp", "experts", "down"): "ffn_down_exps.weight",
    ("mlp", "router", "kernel"): "ffn_gate_inp.weight",
}


def huggingface_names(config: ModelConfig, *, interleaved: bool = False, roots: tuple[str, ...] = ("model.",)) -> Names:
    """Names in safetensors files of `transformers`; `interleaved` says that the model rotates neighbours, `roots` what
    names of the decoder may begin with."""
    return functools.partial(_huggingface, config, interleaved, roots)


def gguf_names(config: ModelConfig, *, interleaved: bool) -> Names:
    """Names in GGUF files, where one array holds all experts, and Gemma's norms are stored with their 1 added."""
    return functools.partial(_gguf, config, interleaved)


def _huggingface(
    config: ModelConfig, interleaved: bool, roots: tuple[str, ...], path: Path, layer: int | None, expert: int | None
) -> Stored:
    if path[0] == "norms":
        templates = (f"{_HUGGINGFACE_NORMS[config.norm_placement][path[1]]}.weight",)
    else:
        templates = _HUGGINGFACE[path]
    if path != ("lm_head",):
        start = "" if layer is None else f"layers.{layer}."
        templates = tuple(f"{root}{start}{template}" for root in roots for template in templates)
    spellings = tuple(_one_row(Spelling(template.format(expert))) for template in templates)
    return Stored(spellings, _AXES.get(path[-1], _VECTOR), interleaved and path[-1] in _ROTATED)


def _one_row(spelling: Spelling) -> Spelling:
    # Ernie keeps its correction bias as a matrix of one row.
    return spelling._replace(lead=(1,), index=(0,)) if ".moe_statics." in spelling.name else spelling


def _gguf(config: ModelConfig, interleaved: bool, path: Path, layer: int | None, expert: int | None) -> Stored:
    name = _GGUF[path] if layer is None else f"blk.{layer}.{_GGUF[path]}"
    spelling = Spelling(name) if expert is None else Spelling(name, (config.moe.num_experts,), (expert,))
    offset = -1.0 if path[-1] == "scale" and config.norm_zero_centered else 0.0
    return Stored((spelling,), _AXES.get(path[-1], _VECTOR), interleaved and path[-1] in _ROTATED, offset)
