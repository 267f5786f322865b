"""`config.json` of Hugging Face models: to ModelConfig and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from model.config import ModelConfig, MoEConfig, RopeConfig, RopeScaling

Body = Mapping[str, Any]

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class ExpertKeys:
    """Keys of a Mixture of Experts; None for a key that the family does not have."""

    num_experts: tuple[str, ...]
    """Spellings; the first one is written."""
    experts_per_token: str
    mlp_dim: str
    num_shared: str | None = None
    """Shared experts, each as wide as a routed one."""
    num_dense: str | None = None
    """Leading dense layers."""
    dense_list: str | None = None
    """The dense layers, listed."""
    normalize: str | None = None
    """None: the weights are always normalised."""
    weight_scale: str | None = None
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means beyond the keys that all of them share."""

    model_type: str
    architecture: str
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that all its models have."""
    switches: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Boolean keys, and the fields that they set."""
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of which we compute one value alone; a file may leave them out."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of keys that files leave out."""
    windows: Literal["none", "all", "layers", "switch", "switched_layers"] = "none"
    """Which layers slide: all, those of `layer_types`, and either only if `use_sliding_window`."""
    fraction: float | None = None
    """Share of a head that is rotated where a file does not say; None: always all of it."""
    gemma: bool = False
    """Embeddings scaled by sqrt(width), soft caps, a scale of q·k of its own, `hidden_activation`."""
    local_rope: bool = False
    """Sliding layers have a rotation of their own."""
    experts: ExpertKeys | None = None
    interleaved: bool = False
    """Rotates the pairs (2i, 2i + 1) of a head."""
    spelling: str = ""
    """Part of the tensor names that are its own, among several spellings."""


_ATTENTION_BIAS = ("qkv_bias", "attention_output_bias")
_GEMMA = {"norm_placement": "both", "norm_zero_centered": True}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
_SIGMOID_EXPERTS = ExpertKeys(
    num_experts=("n_routed_experts",),
    experts_per_token="num_experts_per_tok",
    mlp_dim="moe_intermediate_size",
    num_shared="n_shared_experts",
    num_dense="first_k_dense_replace",
    normalize="norm_topk_prob",
    weight_scale="routed_scaling_factor",
    scoring="sigmoid",
    router_bias=True,
)

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        switches={"attention_bias": _ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
        only={"rope_interleaved": False},
    ),
    Family("qwen2", "Qwen2ForCausalLM", implied={"qkv_bias": True}, windows="switched_layers"),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        implied={"qk_norm": True},
        switches={"attention_bias": _ATTENTION_BIAS},
        windows="switched_layers",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        implied={"qk_norm": True},
        switches={"attention_bias": _ATTENTION_BIAS},
        only={"decoder_sparse_step": 1},
        defaults={"norm_topk_prob": False, "mlp_only_layers": []},
        windows="switch",
        experts=ExpertKeys(
            num_experts=("num_experts", "num_local_experts"),
            experts_per_token="num_experts_per_tok",
            mlp_dim="moe_intermediate_size",
            dense_list="mlp_only_layers",
            normalize="norm_topk_prob",
        ),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        windows="all",
        experts=ExpertKeys(("num_local_experts",), "num_experts_per_tok", "intermediate_size"),
        spelling=".block_sparse_moe.",
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        implied=_GEMMA,
        switches={"attention_bias": _ATTENTION_BIAS},
        only={"use_bidirectional_attention": False},
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="layers",
        gemma=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        implied={**_GEMMA, "qk_norm": True},
        switches={"attention_bias": _ATTENTION_BIAS},
        only={"use_bidirectional_attention": False},
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "max_position_embeddings": 131_072,
            # The text part of a larger model's config.json holds little else than what differs from these.
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
        },
        windows="layers",
        gemma=True,
        local_rope=True,
    ),
    Family(
        "arcee",
        "ArceeForCausalLM",
        implied={"gated_mlp": False},
        switches={"attention_bias": _ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
    ),
    # With windows it would leave its full layers without rotation.
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        implied={"norm_placement": "post", "qk_norm": True},
        only={"sliding_window": None},
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        switches={"attention_bias": ("qkv_bias",), "use_qk_norm": ("qk_norm",)},
        only={"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
        fraction=0.5,
        experts=_SIGMOID_EXPERTS,
    ),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        implied={"qk_norm": True},
        switches={"attention_bias": _ATTENTION_BIAS},
        only={"n_group": 1, "topk_group": 1},
        windows="layers",
        experts=_SIGMOID_EXPERTS,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        switches={"use_bias": (*_ATTENTION_BIAS, "mlp_bias")},
        only={"moe_layer_interval": 1},
        defaults={"tie_word_embeddings": True, "moe_layer_start_index": 1},
        experts=ExpertKeys(
            num_experts=("moe_num_experts",),
            experts_per_token="moe_k",
            mlp_dim="moe_intermediate_size",
            num_shared="moe_num_shared_experts",
            num_dense="moe_layer_start_index",
            router_bias=True,
        ),
        interleaved=True,
        spelling=".moe_statics.",
    ),
)


# Models around a decoder of ours: the key of its config, and its names' and the other parts' beginnings.
_WRAPPED = {"gemma3": "gemma3_text"}
WRAPPED_ROOTS = ("language_model.model.", "model.language_model.")
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def is_wrapped(body: Body) -> bool:
    """Whether a config.json is that of a model of more than text, whose text part alone we compute."""
    return body.get("model_type") in tuple(_WRAPPED)


def _text(body: Body) -> Body:
    if not is_wrapped(body):
        return body
    text = body.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json: text_config={text!r}, and an object is required")
    return {**text, "model_type": _WRAPPED[body["model_type"]]}


class _Keys:
    """The keys of one config.json: errors name the key, and absent ones take the family's default."""

    def __init__(self, body: Body, family: Family):
        self.body, self.family = body, family

    def get(self, key: str, default: Any = None) -> Any:
        value = self.body.get(key)
        return self.family.defaults.get(key, default) if key not in self.body else value

    def number(self, key: str, default: Any = None) -> Any:
        """A number, or what `default` says where the key is absent or null."""
        value = self.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"config.json: {key}={value!r}, and a number is required")
        if not math.isfinite(value):
            raise ValueError(f"config.json: {key}={value!r} must be finite")
        return value

    def whole(self, key: str, default: Any = None, *, least: int = 1, most: int = 2**31) -> int:
        value = self.number(key, default)
        if value != int(value) or not least <= value <= most:
            raise ValueError(f"config.json: {key}={value!r}, and a whole number from {least} to {most} is required")
        return int(value)

    def positive(self, key: str, default: Any = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise ValueError(f"config.json: {key}={value!r} must be above 0")
        return value

    def items(self, key: str) -> list[Any] | None:
        """A list of whole numbers or strings, or None where the key is absent or null."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(x, str | int) for x in value)):
            raise ValueError(f"config.json: {key}={value!r}, and a list is required")
        return value

    def object(self, key: str) -> Body:
        """An object; empty where the key is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json: {key}={value!r}, and an object is required")
        return value or {}

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key}={value!r}, and true or false is required")
        return value


def family_of(body: Body) -> Family:
    """The family that config.json names. Raises ValueError for one that we do not compute."""
    model_type = _text(body).get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join([*(family.model_type for family in FAMILIES), *_WRAPPED])
    raise ValueError(f"config.json: model_type={model_type!r} is not supported; supported: {known}")


def parse_config(body: Body) -> ModelConfig:
    """Architecture of a config.json. Raises ValueError that names the key of what we do not compute."""
    family, body = family_of(body), _text(body)
    keys = _Keys(body, family)
    # Of PreTrainedConfig, for every family: weights of another format than floating point.
    for key, value in {**family.only, "quantization_config": None}.items():
        given = body.get(key, value)
        if given != value and not (given is None and not value):
            raise ValueError(f"config.json: {key}={given!r} is not supported for {family.model_type}, only {value!r}")
    num_layers, num_heads = keys.whole("num_hidden_layers", most=10_000), keys.whole("num_attention_heads")
    embed_dim = keys.whole("hidden_size")
    fields = dict(family.implied)
    for key, names in family.switches.items():
        fields |= dict.fromkeys(names, keys.flag(key))
    if family.gemma:
        fields |= _gemma_fields(keys, embed_dim)
    return ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        embed_dim=embed_dim,
        mlp_dim=keys.whole("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.whole("num_key_value_heads", num_heads),
        head_dim=keys.whole("head_dim", embed_dim // num_heads),
        max_positions=keys.whole("max_position_embeddings", 2048),
        activation=_activation(keys),
        norm_epsilon=keys.positive("rms_norm_eps", 1e-6),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        init_stddev=keys.number("initializer_range", 0.02),
        rope=_rope(keys),
        window_pattern=shortest_period(_windows(keys, num_layers)),
        moe=None if family.experts is None else _experts(keys, family.experts),
        **fields,
    )


def _activation(keys: _Keys) -> str:
    key = "hidden_activation" if keys.family.gemma else "hidden_act"
    name = keys.get(key, "silu")
    # Gemma's files may hold a null for their own default.
    name = keys.family.defaults.get(key) if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {key}={name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _gemma_fields(keys: _Keys, embed_dim: int) -> dict[str, Any]:
    caps = {"attention_soft_cap": "attn_logit_softcapping", "final_soft_cap": "final_logit_softcapping"}
    return {
        "embedding_scale": math.sqrt(embed_dim),
        "attention_scale": keys.positive("query_pre_attn_scalar") ** -0.5,
        **{name: None if keys.get(key) is None else keys.positive(key) for name, key in caps.items()},
    }


def _experts(keys: _Keys, names: ExpertKeys) -> MoEConfig:
    count = next((name for name in names.num_experts if name in keys.body), names.num_experts[0])
    mlp_dim = keys.whole(names.mlp_dim)
    num_dense = keys.whole(names.num_dense, 0, least=0) if names.num_dense else 0
    if names.dense_list:
        dense = keys.items(names.dense_list) or []
        num_dense = len(dense)
        if set(dense) != set(range(num_dense)):
            raise ValueError(f"config.json: {names.dense_list}={dense} is not supported, only the leading layers")
    return MoEConfig(
        num_experts=keys.whole(count),
        experts_per_token=keys.whole(names.experts_per_token),
        mlp_dim=mlp_dim,
        shared_mlp_dim=mlp_dim * keys.whole(names.num_shared, 0, least=0) if names.num_shared else 0,
        num_dense_layers=num_dense,
        scoring=names.scoring,
        normalize_weights=keys.flag(names.normalize, True) if names.normalize else True,
        weight_scale=keys.positive(names.weight_scale, 1.0) if names.weight_scale else 1.0,
        router_bias=names.router_bias,
    )


def _windows(keys: _Keys, num_layers: int) -> list[int | None]:
    """Sliding window of each layer."""
    kind = keys.family.windows
    off = kind.startswith("switch") and not keys.flag("use_sliding_window")
    if kind == "none" or off or keys.get("sliding_window") is None:
        return [None] * num_layers
    window = keys.whole("sliding_window")
    if kind in ("all", "switch"):
        return [window] * num_layers
    types = keys.items("layer_types")
    if types is None:
        types = _older_layer_types(keys, num_layers)
    unknown = sorted(set(map(str, types)) - {_SLIDING, _FULL})
    if unknown or len(types) != num_layers:
        raise ValueError(
            f"config.json: layer_types has {len(types)} entries for {num_layers} layers, "
            f"{unknown or 'none'} of them other than {_SLIDING} and {_FULL}"
        )
    return [window if kind == _SLIDING else None for kind in types]


def _older_layer_types(keys: _Keys, num_layers: int) -> list[str]:
    """Before there was `layer_types`: Qwen slides from layer `max_window_layers` on, of each period of Gemma's layers
    all but the last."""
    if keys.family.windows == "switched_layers":
        first = keys.whole("max_window_layers", least=0)
        return [_SLIDING if layer >= first else _FULL for layer in range(num_layers)]
    period = keys.whole("_sliding_window_pattern", keys.number("sliding_window_pattern", 1))
    return [_SLIDING if (layer + 1) % period else _FULL for layer in range(num_layers)]


def shortest_period(windows: Sequence[int | None]) -> tuple[int | None, ...]:
    """The shortest pattern that gives these windows when repeated."""
    for period in range(1, len(windows) + 1):
        if all(window == windows[layer % period] for layer, window in enumerate(windows)):
            return tuple(windows[:period])
    return (None,)


def _rope(keys: _Keys) -> RopeConfig:
    """From `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of the versions before."""
    given = keys.object("rope_parameters") or keys.object("rope_scaling")
    nested = _FULL in given or _SLIDING in given
    parts = _Keys(given, keys.family)
    main, local = (parts.object(_FULL), parts.object(_SLIDING)) if nested else (given, {})
    local_theta = None
    if keys.family.local_rope:
        if _kind(local) != "default":
            raise ValueError(
                f"config.json: rope_parameters.{_SLIDING}={local} is not supported, only rope_type=default"
            )
        local_theta = _theta(local, keys.positive("rope_local_base_freq"))
    elif nested and local not in ({}, main):
        raise ValueError(f"config.json: rope_parameters={given}: layers of one rotation are required")
    fraction = main.get("partial_rotary_factor", keys.get("partial_rotary_factor", keys.family.fraction))
    fraction = 1.0 if fraction is None else fraction
    if not _is_number(fraction) or (keys.family.fraction is None and fraction != 1.0):
        raise ValueError(
            f"config.json: partial_rotary_factor={fraction!r} is not supported for this model_type, only 1"
        )
    return RopeConfig(
        theta=_theta(main, keys.positive("rope_theta", 1e4)),
        fraction=float(fraction),
        scaling=_scaling(main, keys.whole("max_position_embeddings", 2048)),
        local_theta=local_theta,
    )


def _theta(parameters: Body, default: float) -> float:
    theta = parameters.get("rope_theta", default)
    if not _is_number(theta) or theta <= 0:
        raise ValueError(f"config.json: rope_theta={theta!r}, and a number above 0 is required")
    return float(theta)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(parameters: Body) -> str:
    return parameters.get("rope_type", parameters.get("type", "default"))


# Keys of a scaled rotation, and our fields; they must be numbers.
_SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def _scaling(parameters: Body, max_positions: int) -> RopeScaling | None:
    kind = _kind(parameters)
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _SCALING_KEYS:
        raise ValueError(
            f"config.json: rope_type={kind!r} is not supported; supported: default, {', '.join(_SCALING_KEYS)}"
        )
    for key, value in {"truncate": True, "mscale": None, "mscale_all_dim": None}.items():
        if kind == "yarn" and parameters.get(key, value) != value:
            raise ValueError(f"config.json: rope {key}={parameters[key]} is not supported, only {value}")
    given = {key: parameters.get(key) for key in _SCALING_KEYS[kind]}
    if "original_max_position_embeddings" in given and given["original_max_position_embeddings"] is None:
        given["original_max_position_embeddings"] = max_positions
    fields = {_SCALING_KEYS[kind][key]: value for key, value in given.items() if value is not None}
    if "factor" not in fields or not all(_is_number(value) and value > 0 for value in fields.values()):
        raise ValueError(
            f"config.json: rope_type={kind!r} needs a factor, and numbers above 0 for {list(given)}: {dict(parameters)}"
        )
    return RopeScaling(kind, **fields)


def render_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that can hold this architecture, and its config.json in the keys that transformers 4 and 5 read.

    A family can hold it if reading back what was written gives it again. Raises ValueError with the fields that
    the nearest family cannot hold.
    """
    closest: tuple[Family, list[str]] | None = None
    for family in FAMILIES:
        if (family.experts is None) != (config.moe is None):
            continue
        body = _render(config, family)
        lost = _differences(config, parse_config(body))
        if not lost:
            return family, body
        if closest is None or len(lost) < len(closest[1]):
            closest = family, lost
    assert closest is not None
    raise ValueError(
        f"no model_type holds this architecture; nearest is {closest[0].model_type}, but for {'; '.join(closest[1])}"
    )


def _render(config: ModelConfig, family: Family) -> dict[str, Any]:
    window = next((window for window in config.window_pattern if window is not None), None)
    windows = [config.window(layer) for layer in range(config.num_layers)]
    body: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_stddev,
        "hidden_activation" if family.gemma else "hidden_act": {v: k for k, v in _ACTIVATIONS.items()}[
            config.activation
        ],
        **{key: getattr(config, names[0]) for key, names in family.switches.items()},
        **{key: value for key, value in family.only.items() if value is not None},
        **_render_rope(config, family),
    }
    if family.windows != "none":
        body["sliding_window"] = window
    if family.windows.startswith("switch"):
        body["use_sliding_window"] = window is not None
    if family.windows.endswith("layers"):
        body["layer_types"] = [_FULL if each is None else _SLIDING for each in windows]
    if family.windows == "switched_layers":
        # Read where a version does not know layer_types.
        body["max_window_layers"] = next((layer for layer, each in enumerate(windows) if each), config.num_layers)
    if family.gemma:
        body["query_pre_attn_scalar"] = _whole(config.scale**-2)
        body["attn_logit_softcapping"] = config.attention_soft_cap
        body["final_logit_softcapping"] = config.final_soft_cap
    if config.moe is not None:
        body |= _render_experts(config, config.moe, family.experts)
    return body


def _render_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    rope, body = config.rope, {"rope_theta": config.rope.theta}
    if rope.scaling is not None:
        names = _SCALING_KEYS[rope.scaling.kind]
        values = {key: getattr(rope.scaling, name) for key, name in names.items()}
        kept = {key: value for key, value in values.items() if value is not None}
        body["rope_scaling"] = {"rope_type": rope.scaling.kind, **kept}
    if family.fraction is not None:
        body["partial_rotary_factor"] = rope.fraction
    if family.local_rope:
        body["rope_local_base_freq"] = rope.theta if rope.local_theta is None else rope.local_theta
    return body


def _render_experts(config: ModelConfig, moe: MoEConfig, names: ExpertKeys) -> dict[str, Any]:
    body = {
        names.num_experts[0]: moe.num_experts,
        names.experts_per_token: moe.experts_per_token,
        names.mlp_dim: moe.mlp_dim,
    }
    optional = {
        names.num_shared: moe.shared_mlp_dim // moe.mlp_dim,
        names.num_dense: moe.num_dense_layers,
        names.dense_list: list(range(moe.num_dense_layers)),
        names.normalize: moe.normalize_weights,
        names.weight_scale: moe.weight_scale,
    }
    return body | {key: value for key, value in optional.items() if key is not None}


def _whole(value: float) -> int | float:
    """Without the error of a root squared."""
    value = round(value, 9)
    return int(value) if value == int(value) else value


def _differences(config: ModelConfig, read: ModelConfig) -> list[str]:
    """Fields of a model's function that were lost on the way through a config.json."""
    ours, theirs = computed_fields(config), computed_fields(read)
    return [f"{name}={value} (it has {theirs[name]})" for name, value in ours.items() if not _same(value, theirs[name])]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return left == right


def computed_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that a trained model's function depends on, by dotted name; equal functions have equal fields."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    rope, moe, scaling = fields.pop("rope"), fields.pop("moe"), config.rope.scaling
    fields["window_pattern"] = shortest_period([config.window(layer) for layer in range(config.num_layers)])
    fields["attention_scale"] = config.scale
    fields["rope.theta"], fields["rope.fraction"] = rope.theta, rope.fraction
    unscaled = rope.theta if scaling is None else None
    fields["rope.local_theta"] = unscaled if rope.local_theta is None else rope.local_theta
    names = ["kind", *_SCALING_KEYS[scaling.kind].values()] if scaling else []
    fields["rope.scaling"] = {name: getattr(scaling, name) for name in names}
    for name in ("num_experts", "experts_per_token", "mlp_dim", "shared_mlp_dim", "num_dense_layers"):
        fields[f"moe.{name}"] = moe and getattr(moe, name)
    for name in ("scoring", "normalize_weights", "weight_scale", "router_bias"):
        fields[f"moe.{name}"] = moe and getattr(moe, name)
    if moe is not None and moe.num_dense_layers == 0:
        fields["mlp_dim"] = moe.mlp_dim
    del fields["init_stddev"]
    return fields
