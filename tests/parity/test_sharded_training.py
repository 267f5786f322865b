"""Training steps on meshes of eight devices give the losses, gradients and parameters of a single device."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import RopeConfig
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from tests.model.tiny import COMPILE_FAST, assert_close, dense, execution, moe, packed_batch, random_params
from training.config import LossConfig
from training.optimizer import MuonConfig, OptimizerConfig, make_optimizer
from training.schedule import ScheduleConfig
from training.state import TrainState, state_shardings
from training.step import StepSpec, make_train_step

MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "data 8": MeshConfig(data=8, fsdp=1),
    "tensor 4 × data 2": MeshConfig(tensor=4, data=2, fsdp=1),
    "expert 4 × fsdp 2": MeshConfig(expert=4, fsdp=2),
    "expert 2 × tensor 2 × data 2": MeshConfig(expert=2, tensor=2, data=2, fsdp=1),
    "slice 2 × tensor 2 × fsdp 2": MeshConfig(slice=2, tensor=2, fsdp=2),
    "expert 8": MeshConfig(expert=8, fsdp=1),
}

_ROUTED = {"num_layers": 2, "num_dense_layers": 1, "load_balance_coef": 0.02, "router_z_coef": 0.01}
MODELS = {
    "dense": dense(
        window_pattern=(4, None),
        qk_norm=True,
        qkv_bias=True,
        mlp_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        attention_soft_cap=5.0,
        final_soft_cap=5.0,
        norm_placement="both",
        norm_zero_centered=True,
        tie_embeddings=True,
        embedding_scale=2.0,
        rope=RopeConfig(theta=100.0, local_theta=10.0),
    ),
    "softmax": moe(**_ROUTED, shared_mlp_dim=16),
    "sigmoid": moe(
        **_ROUTED,
        shared_mlp_dim=16,
        scoring="sigmoid",
        normalize_weights=True,
        weight_scale=2.0,
        router_bias=True,
        bias_update_rate=0.01,
    ),
    # One slot for each balanced share: a skewed router drops assignments.
    "capacity": moe(**_ROUTED, dispatch="capacity", capacity_factor=1.0),
}

# eps is near the gradients' size: with a tiny one AdamW's first update is their sign, which rounding can flip.
ADAMW = OptimizerConfig(schedule=ScheduleConfig(kind="constant", peak_lr=0.01, warmup_steps=0), eps=1e-3)
MUON = dataclasses.replace(ADAMW, kind="muon", muon=MuonConfig(ns_dtype="float32"))
OPTIMIZERS = {"adamw": ADAMW, "muon": MUON}

CASES = [
    ("dense", "fsdp 8", "muon"),
    ("dense", "data 8", "adamw"),
    ("dense", "tensor 4 × data 2", "adamw"),
    ("dense", "expert 4 × fsdp 2", "adamw"),
    ("dense", "expert 2 × tensor 2 × data 2", "muon"),
    ("dense", "slice 2 × tensor 2 × fsdp 2", "adamw"),
    ("dense", "expert 8", "adamw"),
    ("softmax", "fsdp 8", "adamw"),
    ("softmax", "tensor 4 × data 2", "adamw"),
    ("softmax", "expert 4 × fsdp 2", "adamw"),
    ("softmax", "expert 2 × tensor 2 × data 2", "adamw"),
    ("sigmoid", "data 8", "adamw"),
    ("sigmoid", "slice 2 × tensor 2 × fsdp 2", "adamw"),
    ("sigmoid", "expert 8", "adamw"),
    ("sigmoid", "expert 2 × tensor 2 × data 2", "adamw"),
    ("capacity", "expert 4 × fsdp 2", "adamw"),
    ("capacity", "expert 2 × tensor 2 × data 2", "adamw"),
    ("capacity", "slice 2 × tensor 2 × fsdp 2", "adamw"),
]
GROUPED = {"tensor 4 × data 2": "ragged_dot", "expert 4 × fsdp 2": "batched", "expert 8": "ragged_dot"}


class Recorded(NamedTuple):
    gradient: Any
    inner: Any


def recording(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which also keeps the gradient that it was given: one compiled step shows loss, gradient, update."""

    def update(gradient, state, params):
        updates, inner = optimizer.update(gradient, state.inner, params)
        return updates, Recorded(gradient, inner)

    def init(params):
        return Recorded(jax.tree.map(jnp.zeros_like, params), optimizer.init(params))

    return optax.GradientTransformation(init, update)


class Outcome(NamedTuple):
    metrics: Any
    gradient: Any
    last: TrainState


def two_steps(model: str, optimizer: str, mesh: str | None, grouped: str, compute: str = "float32") -> Outcome:
    """Metrics and gradient of the first step, and the state after the second."""
    config = MODELS[model]
    definition = Definition(config, scan=True)
    placement = Placement(make_mesh(MESHES[mesh], jax.devices())) if mesh else None
    run = execution(config, compute, placement=placement, grouped_matmul=grouped)
    transformation = recording(make_optimizer(OPTIMIZERS[optimizer], 10, definition.logical[0]))
    # 32 tokens per device or all 128 at once: the loss is cut differently on a mesh, and must not change.
    spec = StepSpec(definition, run, LossConfig(chunk_tokens=16, z_loss_coef=1e-3))
    step = make_train_step(spec, transformation, lambda step: 0.01)
    params, biases = random_params(definition)
    state = TrainState(np.int32(0), np.int32(-1), params, biases, transformation.init(params))
    batch = packed_batch()
    if placement is None:
        state, batch = jax.device_put((state, batch), jax.devices()[0])
        jitted = jax.jit(step, compiler_options=COMPILE_FAST)
    else:
        shardings = state_shardings(definition, transformation, placement)
        state = jax.device_put(state, shardings)
        batch = jax.device_put(batch, placement.sharding("batch", "sequence"))
        jitted = jax.jit(step, out_shardings=(shardings, placement.sharding()), compiler_options=COMPILE_FAST)
    first, metrics = jitted(state, batch)
    last, _ = jitted(first, batch)
    assert jitted._cache_size() == 1, "the second step was compiled again"
    return Outcome(*jax.device_get((metrics, first.opt_state.gradient, last)))


@functools.cache
def single(model: str, optimizer: str) -> Outcome:
    return two_steps(model, optimizer, None, "reference")


@pytest.mark.parametrize(("model", "mesh", "optimizer"), CASES)
def test_a_mesh_changes_nothing(model, mesh, optimizer):
    want = single(model, optimizer)
    got = two_steps(model, optimizer, mesh, GROUPED.get(mesh, "loop"))
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-5)
    assert_close(got.metrics, want.metrics, 2e-5)
    assert_close(got.gradient, want.gradient, 2e-5)
    assert_close(got.last.biases, want.last.biases, 1e-6)
    # Two updates of about 0.01 on parameters of about 1: this is 1% of an update.
    assert_close(got.last.params, want.last.params, 1e-4)
    if model == "capacity":
        assert 0.05 < want.metrics["dropped"] < 0.9


def test_bfloat16_on_a_mesh():
    want = single("softmax", "adamw")
    got = two_steps("softmax", "adamw", "expert 2 × tensor 2 × data 2", "loop", "bfloat16")
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=0.02)
    for actual, expected in zip(jax.tree.leaves(got.gradient), jax.tree.leaves(want.gradient), strict=True):
        cosine = np.vdot(actual, expected) / (np.linalg.norm(actual) * np.linalg.norm(expected))
        assert actual.dtype == np.float32
        assert cosine > 0.95


def test_every_mesh_has_a_dense_and_a_routed_case():
    for routed in (False, True):
        assert {mesh for model, mesh, _ in CASES if (model != "dense") == routed} == set(MESHES)
