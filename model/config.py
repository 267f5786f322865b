"""Architecture of a decoder-only transformer, as data.

Fields alone express a family (Llama, Qwen, Mixtral, Gemma, DeepSeek-style MoE): nothing reads a model's name.
How and where the model runs (mesh, precision, kernels, remat) is not here.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormPlacement = Literal["pre", "post", "both"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Context extension of rotary embeddings.

    `linear`: positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    `llama3`: wavelengths longer than the original context divided by `factor`, with a smooth band between
    `low_frequency_factor` and `high_frequency_factor` (Llama 3.1 model card).
    `yarn`: the ramp between `beta_fast` and `beta_slow` rotations, and attention scaled by `attention_factor`,
    by default 0.1·ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    """Rule, as above."""
    factor: float
    """Length of the extended context over the original one."""
    original_max_positions: int = 8192
    """llama3 and yarn: positions of the original context."""
    low_frequency_factor: float = 1.0
    """llama3: fewer turns than this over the original context are divided by `factor`."""
    high_frequency_factor: float = 4.0
    """llama3: more turns than this are kept."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None for 0.1·ln(factor) + 1."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `fraction` of each head is rotated, the rest passes through.

    Layers with a sliding window use `local_theta` without scaling where it is set (Gemma 3).
    """

    theta: float = 10_000.0
    """Base of the frequencies: pair i of R / 2 turns by theta^(-2i / R) a position."""
    fraction: float = 1.0
    """Share of each head's width that is rotated."""
    scaling: RopeScaling | None = None
    """Context extension; None for none."""
    local_theta: float | None = None
    """Base for layers with a sliding window; None for `theta`, with its scaling."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-Experts feed-forward, in every layer but the first `num_dense_layers`.

    Routing: `scoring` of the router's logits, top `experts_per_token` chosen on score + balancing bias, weights
    are the scores of the chosen (divided by their sum if `normalize_weights`) times `weight_scale`.
    """

    num_experts: int
    """Routed experts in each MoE layer."""
    experts_per_token: int
    """Routed experts that each token takes."""
    mlp_dim: int
    """Width of a routed expert."""
    shared_mlp_dim: int = 0
    """Width of the always-active shared expert (all shared experts together); 0 for none."""
    num_dense_layers: int = 0
    """Leading layers with a dense feed-forward of `model.mlp_dim`."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """Router's logits to scores."""
    normalize_weights: bool = True
    """Divide the chosen experts' scores by their sum."""
    weight_scale: float = 1.0
    """Factor on the weights of routed experts."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """dropless: every assignment is computed. capacity: each expert takes a fixed number from each sequence."""
    capacity_factor: float = 1.25
    """Capacity dispatch: slots per expert and sequence, over the balanced share; assignments beyond it are dropped."""
    load_balance_coef: float = 0.0
    """Weight of the auxiliary loss E·sum_e(f_e·P_e) (Switch, arXiv 2101.03961 eq. 4, over top-k assignments)."""
    router_z_coef: float = 0.0
    """Weight of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906 eq. 5)."""
    router_bias: bool = False
    """Each expert has a bias that joins its score in the choice of experts, and not in their weights."""
    bias_update_rate: float = 0.0
    """Step of the router's bias after each update, by the sign of the load error (arXiv 2408.15664); 0 keeps it."""
    force_balance: bool = False
    """To measure speed: tokens take experts in turn, whatever the router scores, so that all have equally many."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    Widths are in elements, `window_pattern` in tokens: entry i % len of it is layer i's sliding window, None for full
    causal attention. A window of W lets a token see itself and the W - 1 tokens before it.
    """

    vocab_size: int
    """Tokens that the embedding and the LM head know."""
    embed_dim: int
    """Width of the residual stream."""
    mlp_dim: int
    """Width of the dense feed-forward."""
    num_layers: int
    """Layers, each of attention and feed-forward."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of a head."""
    max_positions: int = 8192
    """Longest sequence."""
    activation: Activation = "silu"
    """Nonlinearity of the feed-forward."""
    gated_mlp: bool = True
    """Multiply by a second projection (SwiGLU, GeGLU)."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    norm_placement: NormPlacement = "pre"
    """RMSNorm before each block, after it (before the residual addition), or both."""
    norm_zero_centered: bool = False
    """RMSNorm multiplies by 1 + scale (Gemma) instead of by scale."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before rotation."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases on the dense feed-forward's projections."""
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    """Rotary position embedding."""
    attention_scale: float | None = None
    """Factor on q·k; None for 1/sqrt(head_dim)."""
    window_pattern: tuple[int | None, ...] = (None,)
    """Sliding window of each layer in turn, in tokens; None for full causal attention."""
    attention_soft_cap: float | None = None
    """Scores become cap·tanh(score / cap); None for no cap."""
    final_soft_cap: float | None = None
    """Logits become cap·tanh(logit / cap); None for no cap."""
    attention_sinks: bool = False
    """One learnt logit per query head that joins each softmax and carries no value (gpt-oss)."""
    tie_embeddings: bool = False
    """The embedding table is also the LM head."""
    embedding_scale: float | None = None
    """Factor on embedded tokens; Gemma uses sqrt(embed_dim)."""
    moe: MoEConfig | None = None
    """Mixture of Experts; None for dense layers."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights; projections to the residual stream get 1/sqrt(2·num_layers) of it."""

    def __post_init__(self) -> None:
        check_model(self)

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, None for full causal attention."""
        return self.window_pattern[layer % len(self.window_pattern)]

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.num_dense_layers

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


def check_model(config: ModelConfig) -> None:
    """Raises ValueError for a field that no transformer can have, naming it."""
    counts = (
        "vocab_size",
        "embed_dim",
        "mlp_dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_positions",
    )
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}={getattr(config, name)} must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.num_heads={config.num_heads} is not divisible by model.num_kv_heads={config.num_kv_heads}; "
            "each kv head serves the same number of query heads"
        )
    if not config.window_pattern or any(w is not None and w < 1 for w in config.window_pattern):
        raise ValueError(
            f"model.window_pattern={config.window_pattern} needs at least one entry, each None or at least 1"
        )
    rotated = config.head_dim * config.rope.fraction
    if not 0 <= config.rope.fraction <= 1 or rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(
            f"model.rope.fraction={config.rope.fraction} of head_dim={config.head_dim} is {rotated} elements; "
            "rotation needs an even whole number between 0 and head_dim"
        )
    if config.moe is not None:
        _check_moe(config.moe, config.num_layers)


def _check_moe(moe: MoEConfig, num_layers: int) -> None:
    if moe.num_experts < 1 or moe.mlp_dim < 1:
        raise ValueError(
            f"model.moe.num_experts={moe.num_experts} and model.moe.mlp_dim={moe.mlp_dim} must be at least 1"
        )
    if not 1 <= moe.experts_per_token <= moe.num_experts:
        raise ValueError(
            f"model.moe.experts_per_token={moe.experts_per_token} must be between 1 and num_experts={moe.num_experts}"
        )
    if not 0 <= moe.num_dense_layers <= num_layers:
        raise ValueError(
            f"model.moe.num_dense_layers={moe.num_dense_layers} must be between 0 and num_layers={num_layers}"
        )
    if moe.bias_update_rate and not moe.router_bias:
        raise ValueError(
            f"model.moe.bias_update_rate={moe.bias_update_rate} moves a bias that the router does not have; "
            "set model.moe.router_bias"
        )
    if moe.dispatch == "capacity" and moe.capacity_factor <= 0:
        raise ValueError(f"model.moe.capacity_factor={moe.capacity_factor} must be above 0")
