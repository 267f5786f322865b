"""The train step: accumulation, balancing, what a non-finite step leaves behind, and who is blamed for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import RopeConfig
from model.transformer import Definition
from tests.model.tiny import COMPILE_FAST, assert_close, dense, execution, moe, packed_batch, random_params, to_device
from training.config import LossConfig
from training.diagnose import find_non_finite
from training.optimizer import OptimizerConfig, make_optimizer
from training.schedule import ScheduleConfig
from training.state import TrainState
from training.step import StepSpec, balance_biases, make_eval_step, make_train_step

ROUTED = moe(num_dense_layers=1, scoring="sigmoid", router_bias=True, bias_update_rate=0.05)


def prepare(config, accumulation=1, learning_rate=0.01, scan=True):
    """(spec, jitted step, state) with random parameters."""
    definition = Definition(config, scan=scan)
    spec = StepSpec(definition, execution(config, grouped_matmul="ragged_dot"), LossConfig(), accumulation)
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    params, biases = random_params(definition)
    state = to_device(TrainState(np.int32(0), np.int32(-1), params, biases, optimizer.init(params)))
    step = make_train_step(spec, optimizer, lambda step: 0.01 * (step + 1))
    return spec, jax.jit(step, compiler_options=COMPILE_FAST), state


@pytest.mark.parametrize("config", [dense(num_layers=1), ROUTED], ids=["dense", "moe"])
def test_microbatches_change_nothing(config):
    batch = packed_batch()
    # Rows of very different weight: a mean of microbatch means would be another loss.
    batch["weights"] *= np.array([1, 0, 0.2, 1, 0, 3, 0.5, 0], np.float32)[:, None]
    outcomes = []
    for accumulation in (1, 2, 4):
        _, step, state = prepare(config, accumulation)
        outcomes.append(step(state, batch))
    # Each microbatch has its own balance of experts: these two are means over microbatches.
    averaged = [[metrics.pop(name, 1.0) for name in ("load_balance", "router_z")] for _, metrics in outcomes]
    np.testing.assert_allclose(averaged, [averaged[0]] * 3, rtol=0.05)
    for got in outcomes[1:]:
        assert_close(got[1], outcomes[0][1], 1e-5)
        assert_close(got[0].params, outcomes[0][0].params, 1e-5)
        assert_close(got[0].biases, outcomes[0][0].biases, 1e-6)


def test_metrics_and_state_after_a_step():
    _, step, state = prepare(ROUTED)
    batch = packed_batch()
    after, metrics = step(state, batch)
    assert set(metrics) == {
        *("loss", "accuracy", "gradient_norm", "learning_rate", "target_tokens", "bad_step"),
        *("expert_load_max", "expert_load_min", "expert_load_LE", "load_balance", "router_z", "dropped"),
    }
    assert metrics["expert_load_LE"].shape == (1, 8)
    np.testing.assert_array_equal(metrics["expert_load_LE"].sum(axis=1), 2 * (batch["segments"] > 0).sum())
    load = np.asarray(metrics["expert_load_LE"])
    load = load / load.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics["expert_load_max"], load.max(), rtol=1e-6)
    np.testing.assert_allclose(metrics["expert_load_min"], load.min(), rtol=1e-6)
    assert float(metrics["target_tokens"]) == batch["weights"].sum()
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)
    assert (int(after.step), int(after.bad_step)) == (1, -1)
    assert float(step(after, batch)[1]["learning_rate"]) == pytest.approx(0.02)


def test_a_dense_model_has_no_expert_metrics():
    _, step, state = prepare(dense(num_layers=1))
    _, metrics = step(state, packed_batch())
    names = {"loss", "accuracy", "gradient_norm", "learning_rate", "target_tokens", "bad_step"}
    assert set(metrics) == names


def test_evaluation_gives_the_training_loss():
    spec, step, state = prepare(dense(num_layers=1))
    batch = packed_batch()
    nats, weight = jax.jit(make_eval_step(spec))(state.params, state.biases, batch)
    assert float(weight) == batch["weights"].sum()
    np.testing.assert_allclose(nats / weight, step(state, batch)[1]["loss"], rtol=1e-6)


def test_the_matrices_of_a_model_decay_and_nothing_else():
    config = moe(num_dense_layers=1, shared_mlp_dim=8, qkv_bias=True, mlp_bias=True, qk_norm=True, attention_sinks=True)
    definition = Definition(config, scan=True)
    settings = OptimizerConfig(schedule=ScheduleConfig(kind="constant", peak_lr=0.1, warmup_steps=0), weight_decay=0.5)
    optimizer = make_optimizer(settings, 10, definition.logical[0])
    params, _ = random_params(definition)

    @jax.jit
    def decay(params):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return jax.tree.map(lambda update: jnp.abs(update).max() > 0, updates)

    matrices = {"query", "key", "value", "output", "up", "gate", "down", "kernel", "lm_head"}
    for path, decays in jax.tree_util.tree_leaves_with_path(decay(params)):
        assert bool(decays) == (path[-1].key in matrices), jax.tree_util.keystr(path)


def test_training_learns_one_batch():
    _, step, state = prepare(dense(num_layers=1))
    losses = []
    for _ in range(60):
        state, metrics = step(state, packed_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_each_bias_follows_the_load_of_its_own_layer(scan):
    """Layers 1 to 5 of six have experts; scanned, they are two blocks of two and a remainder."""
    config = moe(num_layers=6, num_dense_layers=1, window_pattern=(4, None), router_bias=True, bias_update_rate=0.1)
    definition = Definition(config, scan=scan)
    load_LE = np.random.default_rng(0).integers(100, size=(5, 8)).astype(np.float32)
    load_LE[0, 0] = load_LE[0, 1:].mean()
    _, biases = random_params(definition)
    moved = balance_biases(definition, biases, jnp.asarray(load_LE))
    want = 0.1 * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
    seen = []
    for (path, after), before in zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(biases), strict=True):
        layers = definition.layers_at(tuple(entry.key for entry in path))
        step = np.asarray(after - before).reshape(-1, 8)
        np.testing.assert_allclose(step, want[[layer - 1 for layer in layers]], atol=1e-6)
        seen += layers
    assert sorted(seen) == [1, 2, 3, 4, 5]


def test_biases_balance_a_skewed_router():
    config = moe(num_layers=1, scoring="sigmoid", router_bias=True, bias_update_rate=0.004)
    # No learning: the biases alone move.
    _, step, state = prepare(config, learning_rate=0.0)
    # Scores that differ little between tokens, and biases that begin at random: some experts get nothing.
    router = state.params["blocks"][0]["mlp"]["router"]
    router["kernel"] = 0.3 * router["kernel"]
    worst = []
    for _ in range(150):
        state, metrics = step(state, packed_batch())
        worst.append(float(metrics["expert_load_max"]))
    assert worst[0] > 2
    assert np.mean(worst[-10:]) < 1.25


@pytest.mark.parametrize("poison", ["weights", "params"])
def test_a_non_finite_step_changes_nothing_and_stops_the_rest(poison):
    _, step, state = prepare(ROUTED)
    good, bad = packed_batch(), packed_batch()
    state, _ = step(state, good)
    if poison == "weights":
        bad["weights"][0, 0] = np.inf
    else:
        # Finite, but its product overflows.
        state.params["lm_head"] = state.params["lm_head"] * 1e38
    after, metrics = step(state, bad)
    assert not np.isfinite(float(metrics["loss"])) or not np.isfinite(float(metrics["gradient_norm"]))
    assert int(metrics["bad_step"]) == int(after.bad_step) == 1
    later, metrics = step(after, good)
    assert int(metrics["bad_step"]) == 1
    for got in (after, later):
        assert int(got.step) == 1
        same = jax.tree.map(
            lambda x, y: bool((x == y).all()),
            (got.params, got.biases, got.opt_state),
            (state.params, state.biases, state.opt_state),
        )
        assert all(jax.tree.leaves(same))


# Layers 0 | (1 2) (3 4) | 5, so that a layer may be in the prefix, in a block or in the remainder.
PARTS = moe(num_layers=6, num_dense_layers=1, window_pattern=(4, None))
PLACES = {0: ("prefix", 0, None), 1: ("blocks", 0, 0), 4: ("blocks", 1, 1), 5: ("suffix", 0, None)}


@pytest.fixture(scope="module")
def parts():
    spec, _, state = prepare(PARTS)
    return spec, state


def planted(state: TrainState, *path, value: float, at=...) -> TrainState:
    """`state` with `value` in the parameter at `path`."""
    params = jax.tree.map(lambda leaf: leaf, state.params)
    *parents, name = path
    node = params
    for key in parents:
        node = node[key]
    node[name] = node[name].at[at].set(value)
    return TrainState(state.step, state.bad_step, params, state.biases, state.opt_state)


@pytest.mark.parametrize("layer", PLACES)
def test_an_overflow_is_blamed_on_its_layer(parts, layer):
    spec, state = parts
    group, position, block = PLACES[layer]
    at = ... if block is None else block
    state = planted(state, group, position, "attention", "output", value=1e38, at=at)
    where = find_non_finite(spec, state, packed_batch())
    assert where == f"the output of layer {layer} is the first that is not finite"


def test_a_broken_parameter_is_named(parts):
    spec, state = parts
    state = planted(state, "blocks", 1, "mlp", "experts", "up", value=np.nan, at=(1, 0, 0, 0))
    where = find_non_finite(spec, state, packed_batch())
    assert where == "parameter blocks/1/mlp/experts/up is not finite before the step"


def test_logits_that_overflow_are_blamed_on_the_head(parts):
    spec, state = parts
    where = find_non_finite(spec, planted(state, "lm_head", value=3e38), packed_batch())
    assert "every layer's output is finite" in where and "logits overflow" in where


def test_a_finite_step_is_called_finite(parts):
    spec, state = parts
    assert find_non_finite(spec, state, packed_batch()).startswith("the step is finite when repeated")


def test_a_gradient_that_overflows_is_named():
    """A token embedded as zeros: the first norm gives zeros, and its slope, 1 / sqrt(epsilon) cubed, overflows."""
    config = dense(num_layers=1, norm_epsilon=1e-30, rope=RopeConfig(theta=10.0))
    spec, step, state = prepare(config)
    batch = packed_batch()
    tokens, counts = np.unique(batch["tokens"], return_counts=True)
    # Not the first of its document: attention to other tokens makes what the later norms see nonzero.
    later = batch["tokens"][(batch["positions"] > 0) & (batch["segments"] > 0)]
    token = int(np.intersect1d(tokens[counts == 1], later)[0])
    state = planted(state, "embedding", "table", value=0.0, at=token)
    _, metrics = step(state, batch)
    assert np.isfinite(float(metrics["loss"])) and int(metrics["bad_step"]) == 0
    where = find_non_finite(spec, state, batch)
    assert where == "the forward pass is finite; nearest to the loss, the gradient of embedding/table is not"
