"""Training in FP8 with scales by the magnitudes of the steps before: beside current scaling, saved, and split."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from checkpoint import CheckpointConfig, CheckpointStore
from kernels.quantized_matmul.training import HISTORY
from model.execution import Execution
from model.precision import Precision
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from quantization.rules import ProductRules
from tests.model.tiny import COMPILE_FAST, assert_close, dense, packed_batch, random_params
from tests.training.runs import DENSE, run_of
from tests.training.stepping import Training
from training.config import LossConfig
from training.loop import architecture
from training.resolve import resolve
from training.state import TrainState, abstract_state, init_state, state_shardings
from training.step import StepSpec, make_eval_step, make_train_step

SIZES = {"embed_dim": 32, "mlp_dim": 64, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
MODEL = dense(**SIZES)
BASE = {**DENSE, "data.paths": ("*.txt",)}
MESH = MeshConfig(fsdp=2, tensor=2)


@functools.cache
def training(scaling="delayed", mesh=None, accumulation=1, remat="none") -> Training:
    definition = Definition(MODEL, True, rules=ProductRules("fp8"), delayed=scaling == "delayed")
    devices = jax.devices()[: 1 if mesh is None else 4]
    placement = Placement(make_mesh(MeshConfig() if mesh is None else mesh, devices))
    precision = Precision(compute="float32", products="fp8", scaling=scaling)
    run = Execution(precision, None if mesh is None else placement, quantized_matmul="xla", remat=remat)
    spec = StepSpec(definition, run, LossConfig(chunk_tokens=64), accumulation)
    optimizer = optax.adamw(0.01)
    shardings = state_shardings(definition, optimizer, placement)
    step = make_train_step(spec, optimizer, lambda step: 0.01)
    jitted = jax.jit(step, out_shardings=(shardings, placement.sharding()), compiler_options=COMPILE_FAST)
    fresh = init_state(definition, optimizer, 0, placement)
    params = jax.device_put(random_params(definition)[0], shardings.params)
    return Training(definition, spec, optimizer, placement, jitted, dataclasses.replace(fresh, params=params))


def batch_of(training: Training):
    batch = packed_batch(rows=4, length=16)
    return {name: jax.device_put(x, training.placement.sharding("batch", None)) for name, x in batch.items()}


def steps(training: Training, number: int, state: TrainState | None = None):
    """The last state, and the losses."""
    state, losses, batch = training.state if state is None else state, [], batch_of(training)
    for _ in range(number):
        state, metrics = training.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert training.step._cache_size() == 1
    return state, losses


def test_the_loss_is_that_of_current_scaling():
    _, delayed = steps(training(), 40)
    state, current = steps(training("current"), 40)
    assert state.magnitudes == {}
    assert delayed != current
    # One batch is learnt by heart.
    assert current[-1] < 0.3 * current[0]
    np.testing.assert_allclose(delayed, current, rtol=0.05)


def test_magnitudes_are_those_of_the_last_steps():
    run = training()
    weights, states = [], [run.state]
    for _ in range(HISTORY + 1):
        weights.append(np.abs(states[-1].params["blocks"][0]["mlp"]["down"]).max(axis=(1, 2)))
        states.append(steps(run, 1, states[-1])[0])
    first, last = (state.magnitudes["blocks"][0]["mlp"]["magnitudes"]["down"] for state in (states[1], states[-1]))
    assert last.shape == (MODEL.num_layers, 3, HISTORY)
    np.testing.assert_array_equal(first[:, 1, 0], weights[0])
    np.testing.assert_array_equal(first[:, :, 1:], 0)
    np.testing.assert_array_equal(last[:, 1], np.stack(weights[:0:-1], axis=1))
    assert all((leaf[..., 0] > 0).all() for leaf in jax.tree.leaves(states[-1].magnitudes))


@pytest.mark.parametrize("change", [{"accumulation": 2, "remat": "full"}, {"mesh": MESH}], ids=["parts", "mesh"])
def test_how_a_step_is_computed_changes_nothing(change):
    """A scale that is known before is the same for every part of an array."""
    want, losses = steps(training(), 3)
    run = training(**change)
    got, same = steps(run, 3)
    np.testing.assert_allclose(same, losses, rtol=1e-3)
    # A sum in another order may round to another neighbour of 8 bits.
    assert_close(got.magnitudes, want.magnitudes, 0.02)
    if "mesh" in change:
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got.magnitudes))


def test_a_restored_state_goes_on_to_the_bit(tmp_path):
    run = training(mesh=MESH)
    middle, _ = steps(run, 3)
    whole, losses = steps(run, 3, middle)
    config = CheckpointConfig(every=1)
    with CheckpointStore(tmp_path, config, architecture={}, run_config={}, on_note=print) as store:
        store.save(3, middle, data_state={})
        store.wait()
    shardings = state_shardings(run.definition, run.optimizer, run.placement)
    with CheckpointStore(tmp_path, config, architecture={}, run_config={}, on_note=print) as store:
        restored, _ = store.restore(abstract_state(run.definition, run.optimizer, shardings))
    again, same = steps(run, 3, restored)
    assert same == losses
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_step_that_is_not_finite_leaves_the_magnitudes():
    run = training()
    good, _ = steps(run, 1)
    batch = batch_of(run)
    after, _ = run.step(good, batch | {"weights": batch["weights"] * np.nan})
    assert int(after.bad_step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.magnitudes, good.magnitudes)


def test_evaluation_needs_no_magnitudes():
    run = training()
    loss_sum, weight = jax.jit(make_eval_step(run.spec))(run.state.params, run.state.biases, batch_of(run))
    _, losses = steps(training("current"), 1)
    assert float(loss_sum / weight) == pytest.approx(losses[0], rel=1e-5)


def test_the_setting():
    with pytest.raises(ValueError, match=r"precision.scaling=delayed is of products in few bits"):
        Precision(scaling="delayed")
    delayed, current = (
        run_of({**BASE, "precision.products": "fp8", "precision.scaling": scaling})
        for scaling in ("delayed", "current")
    )
    lines = "\n".join(resolve(delayed, jax.devices()[:1]).choices)
    assert f"by its largest element in the last {HISTORY} steps" in lines
    assert resolve(delayed, jax.devices()[:1]).spec.definition.delayed
    # A checkpoint of the one has not what the other needs.
    assert architecture(delayed) != architecture(current) == architecture(run_of(BASE))
