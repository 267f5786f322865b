"""Fixtures of published families: tiny random models of `transformers` with their logits.

Each fixture comes from transformers 5.23.0 on torch 2.13.0 (CPU, float32, eager attention and experts). Its `config`
is the JSON of the configuration that the model was made from; every tensor was drawn anew (norms around their neutral
value, biases, sinks and correction biases away from zero, values with bfloat16's few bits so that the file compresses)
and stored under the name that `save_pretrained` gives it, below `tensors/`. `tokens` [2, 20] were drawn until no
router had two experts closer than 5e-4 at the edge of its top-k. `gpt_oss_attention` is gpt-oss with a plain SwiGLU in
place of its experts, whose clamped activation we do not have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from model.config import ModelConfig, MoEConfig, RopeConfig, RopeScaling
from model.execution import Execution
from model.precision import Precision
from model.transformer import Definition, Tree

FIXTURES = Path(__file__).parent / "family_fixtures"

TINY = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    mlp_dim=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
    norm_epsilon=1e-6,
    rope=RopeConfig(theta=100.0),
)
YARN = RopeScaling("yarn", factor=4.0, original_max_positions=32)


def family(**fields) -> ModelConfig:
    return dataclasses.replace(TINY, **fields)


FAMILIES = {
    "llama2": family(num_kv_heads=4, norm_epsilon=1e-3),
    "llama3": family(
        head_dim=16,
        norm_epsilon=1e-5,
        tie_embeddings=True,
        rope=RopeConfig(500.0, scaling=RopeScaling("llama3", factor=8.0, original_max_positions=32)),
    ),
    "llama_biases": family(
        num_kv_heads=1,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rope=RopeConfig(100.0, scaling=RopeScaling("linear", factor=2.5)),
    ),
    "arcee": family(
        head_dim=16,
        activation="gelu",
        gated_mlp=False,
        mlp_bias=True,
        norm_epsilon=1e-5,
        rope=RopeConfig(1000.0, scaling=dataclasses.replace(YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3)),
    ),
    "exaone4": family(norm_placement="post", qk_norm=True, norm_epsilon=1e-5),
    "qwen2": family(qkv_bias=True, rope=RopeConfig(1000.0, scaling=YARN)),
    "qwen3": family(head_dim=16, qk_norm=True),
    "mixtral": family(
        mlp_dim=24,
        norm_epsilon=1e-5,
        window_pattern=(6,),
        moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24),
    ),
    "qwen3_moe": family(qk_norm=True, moe=MoEConfig(num_experts=8, experts_per_token=3, mlp_dim=12)),
    "qwen3_moe_unnormalized": family(
        num_layers=3,
        qk_norm=True,
        moe=MoEConfig(num_experts=8, experts_per_token=3, mlp_dim=12, num_dense_layers=1, normalize_weights=False),
    ),
    "glm4_moe": family(
        num_layers=3,
        head_dim=16,
        norm_epsilon=1e-5,
        qkv_bias=True,
        qk_norm=True,
        rope=RopeConfig(100.0, fraction=0.5),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=3,
            mlp_dim=12,
            shared_mlp_dim=12,
            num_dense_layers=1,
            scoring="sigmoid",
            weight_scale=2.5,
            router_bias=True,
        ),
    ),
    "dots1": family(
        num_layers=5,
        qk_norm=True,
        window_pattern=(5, None),
        moe=MoEConfig(
            num_experts=6,
            experts_per_token=2,
            mlp_dim=8,
            shared_mlp_dim=16,
            num_dense_layers=1,
            scoring="sigmoid",
            normalize_weights=False,
            weight_scale=1.5,
            router_bias=True,
        ),
    ),
    "ernie4_5_moe": family(
        num_layers=3,
        norm_epsilon=1e-5,
        tie_embeddings=True,
        moe=MoEConfig(
            num_experts=6,
            experts_per_token=2,
            mlp_dim=8,
            shared_mlp_dim=16,
            num_dense_layers=1,
            router_bias=True,
        ),
    ),
    "gemma2": family(
        num_layers=5,
        activation="gelu_tanh",
        norm_placement="both",
        norm_zero_centered=True,
        attention_scale=24**-0.5,
        window_pattern=(6, None),
        attention_soft_cap=2.0,
        final_soft_cap=3.0,
        tie_embeddings=True,
        embedding_scale=math.sqrt(32),
    ),
    "gemma3": family(
        num_layers=7,
        activation="gelu_tanh",
        norm_placement="both",
        norm_zero_centered=True,
        qk_norm=True,
        attention_scale=24**-0.5,
        window_pattern=(6, 6, 6, 6, 6, None),
        rope=RopeConfig(1000.0, scaling=RopeScaling("linear", factor=4.0), local_theta=50.0),
        tie_embeddings=True,
        embedding_scale=math.sqrt(32),
    ),
    "gpt_oss_attention": family(
        num_layers=3,
        head_dim=16,
        norm_epsilon=1e-5,
        qkv_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        window_pattern=(6, None),
        rope=RopeConfig(1000.0, scaling=YARN),
    ),
}


# What a config.json can say; of gpt-oss we have the attention alone.
WHOLE_FAMILIES = [name for name in FAMILIES if name != "gpt_oss_attention"]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def config_of(fixture: dict[str, np.ndarray]) -> dict:
    return json.loads(str(fixture["config"]))


def tensors_of(fixture: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("tensors/"): v for name, v in fixture.items() if name.startswith("tensors/")}


def write_folder(folder: Path, fixture: dict[str, np.ndarray], **changes: np.ndarray | None) -> Path:
    """A Hugging Face folder of a fixture; `changes` replaces tensors, None leaves one out."""
    folder.mkdir(exist_ok=True)
    tensors = {name: value for name, value in (tensors_of(fixture) | changes).items() if value is not None}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(fixture)))
    return folder


def one_device(definition: Definition) -> tuple[Tree, Tree]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: sharding, definition.abstract)


def logits(definition: Definition, params: Tree, biases: Tree, tokens_BT: np.ndarray) -> np.ndarray:
    execution = Execution(
        precision=Precision(compute="float32"), attention=("xla",) * len(definition.config.window_pattern)
    )

    @jax.jit
    def forward(params, biases, tokens_BT):
        model = definition.bind(params, biases)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.logits(model(tokens_BT, positions_BT, None, execution).hidden_BTD, execution)

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, biases, tokens_BT))


def assert_logits(got_BTV: np.ndarray, expected_BTV: np.ndarray) -> None:
    # Measured on a CPU: ours differ by at most 1.5e-6 of the largest logit, as much as transformers' own float32 and
    # float64 runs of the dense models do. The mildest change of a field, exact for approximate GELU, is 2e-4.
    np.testing.assert_allclose(got_BTV, expected_BTV, rtol=0, atol=2e-5 * np.abs(expected_BTV).max())
