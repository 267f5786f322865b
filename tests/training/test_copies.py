"""The copy of the matrices that the optimizer keeps in the compute dtype: the same training with it and without."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from checkpoint import CheckpointConfig, CheckpointStore
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from quantization.rules import ProductRules
from tests.model.tiny import VOCAB, assert_close, dense, execution, moe, packed_batch
from tests.training.runs import DENSE, losses_of, prepare, records_of, run_dir, run_of, train_here
from tests.training.stepping import EXACT, Training, assert_same, batch_of, steps
from training.config import LossConfig
from training.diagnose import find_non_finite
from training.optimizer import MuonConfig, OptimizerConfig, make_optimizer
from training.resolve import resolve
from training.schedule import ScheduleConfig
from training.state import TrainState, abstract_state, abstract_weights, init_state, place_copies, state_shardings
from training.step import StepSpec, make_eval_step, make_train_step

ROUTED = {"shared_mlp_dim": 16, "load_balance_coef": 0.02, "router_bias": True, "bias_update_rate": 0.01}
MODELS = {
    "dense": dense(num_layers=1, qkv_bias=True, mlp_bias=True, qk_norm=True),
    "tied": dense(num_layers=1, tie_embeddings=True),
    "moe": moe(num_layers=1, load_balance_coef=0.02),
    "mixed": moe(num_layers=3, num_dense_layers=1, **ROUTED),
}
SCHEDULE = ScheduleConfig(kind="constant", peak_lr=0.01, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """How a model is trained."""

    model: str
    mesh: MeshConfig | None = None
    optimizer: str = "adamw"
    accumulation: int = 1
    scan: bool = True
    remat: str = "none"
    fp8: str | None = None
    """Scaling of FP8 products, where there are any."""


UNROLLED = Case("tied", scan=False)
PARTS = Case("moe", accumulation=2, remat="full")
SHARDED = Case("dense", MeshConfig(fsdp=2, tensor=2))
SLOW = {
    "tied, unrolled": UNROLLED,
    "scanned moe, muon": Case("mixed", optimizer="muon", remat="dots", accumulation=2),
    "experts over devices": Case("mixed", MeshConfig(fsdp=2, expert=2)),
    "fp8": Case("dense", fp8="delayed"),
}
CASES = [
    pytest.param(PARTS, id="moe in parts"),
    pytest.param(SHARDED, id="sharded"),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


@functools.cache
def training(case: Case, copy_dtype: str | None) -> Training:
    config = MODELS[case.model]
    rules = ProductRules("compute" if case.fp8 is None else "fp8")
    definition = Definition(config, case.scan, rules=rules, delayed=case.fp8 == "delayed", copy_dtype=copy_dtype)
    devices = jax.devices()[: 1 if case.mesh is None else 4]
    placement = Placement(make_mesh(case.mesh or MeshConfig(), devices))
    changes = {"quantized_matmul": "xla", "grouped_matmul": "ragged_dot", "remat": case.remat}
    run = execution(config, "bfloat16", placement=None if case.mesh is None else placement, **changes)
    spec = StepSpec(definition, run, LossConfig(chunk_tokens=64), case.accumulation)
    # eps near the gradients' size: with a tiny one a rounding of a first moment near 0 becomes one of the update.
    settings = OptimizerConfig(case.optimizer, SCHEDULE, eps=1e-3, muon=MuonConfig(ns_steps=2))
    optimizer = make_optimizer(settings, 10, definition.logical[0])
    shardings = state_shardings(definition, optimizer, placement)
    step = jax.jit(
        make_train_step(spec, optimizer, lambda step: 0.01),
        out_shardings=(shardings, placement.sharding()),
        compiler_options=EXACT,
    )
    return Training(definition, spec, optimizer, placement, step, init_state(definition, optimizer, 0, placement))


def assert_copied(run: Training, state: TrainState) -> None:
    """The copies are the parameters, cast."""
    params, copies = traverse_util.flatten_dict(state.params), traverse_util.flatten_dict(state.copies)
    assert copies.keys() == traverse_util.flatten_dict(run.definition.copies[0]).keys()
    for path, copy in copies.items():
        assert copy.dtype == jnp.bfloat16 and copy.sharding == params[path].sharding, path
        np.testing.assert_array_equal(copy, params[path].astype(jnp.bfloat16), str(path))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_with_copies_and_without(case):
    run, plain = training(case, "bfloat16"), training(case, None)
    assert_copied(run, run.state)
    assert plain.state.copies == {}
    got, metrics = steps(run, 3)
    want, expected = steps(plain, 3)
    assert_same(metrics[0], expected[0])
    # A compiler may round a product before it is added to a sum in one program's update and not in the other's: seen in
    # a tied table, on a CPU with JAX 0.10.2.
    for found, wanted in zip(metrics, expected, strict=True):
        assert_close(found, wanted, 1e-5)
    assert_close(got.saved, want, 1e-6)
    assert metrics[-1]["loss"] != metrics[0]["loss"]
    assert_copied(run, got)


def test_which_parameters_are_copied():
    """Operands of products in the compute dtype, and those alone."""
    copied = {
        name: {
            path[-1] for path in traverse_util.flatten_dict(Definition(model, True, copy_dtype="bfloat16").copies[0])
        }
        for name, model in MODELS.items()
    }
    layer = {"query", "key", "value", "output", "up", "gate", "down"}
    with_head = {*layer, "lm_head"}
    assert copied == {"dense": with_head, "tied": layer, "moe": with_head, "mixed": with_head}
    rounded = Definition(MODELS["dense"], True, rules=ProductRules("fp8"), copy_dtype="bfloat16")
    assert set(rounded.copies[0]) == {"lm_head"}
    assert Definition(MODELS["dense"], True).copies == ({}, {})


def test_a_step_casts_no_matrix():
    """The float32 matrices are read by the update alone, which makes the copies of what it gives."""
    run = training(UNROLLED, "bfloat16")
    closed = jax.make_jaxpr(make_train_step(run.spec, run.optimizer, lambda step: 0.01))(run.state, packed_batch())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.state)]
    copied = {path.replace(".copies", ".params") for path in paths if path.startswith(".copies")}
    assert len(copied) == 7 * MODELS["tied"].num_layers
    matrices = {id(var) for path, var in zip(paths, closed.jaxpr.invars, strict=False) if path in copied}
    casts = [eqn for eqn in closed.eqns if eqn.primitive.name == "convert_element_type"]
    assert not [eqn for eqn in casts if id(eqn.invars[0]) in matrices and eqn.params["new_dtype"] == jnp.bfloat16]
    assert sum(
        eqn.outvars[0].aval.dtype == jnp.bfloat16 and eqn.outvars[0] in closed.jaxpr.outvars for eqn in casts
    ) == len(copied)


def test_a_step_that_is_not_finite_leaves_the_copies():
    run = training(PARTS, "bfloat16")
    good, _ = steps(run, 1)
    batch = batch_of(run)
    after, _ = run.step(good, batch | {"weights": batch["weights"] * np.nan})
    assert int(after.bad_step) == 1
    assert_same(after.copies, good.copies)
    assert_copied(run, after)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_diagnosed_by_the_copies():
    run = training(UNROLLED, "bfloat16")
    state = dataclasses.replace(run.state, copies=jax.tree.map(lambda x: x.at[0].set(jnp.inf), run.state.copies))
    where = find_non_finite(run.spec, state, batch_of(run))
    assert where == "the output of layer 0 is the first that is not finite"


@pytest.mark.parametrize("before", [None, "bfloat16"], ids=["saved without", "saved with"])
def test_a_restored_state_goes_on_to_the_bit(tmp_path, before):
    """The checkpoint is the same whether the run that wrote it had copies."""
    case = SHARDED
    old, new = training(case, before), training(case, "bfloat16")
    middle, _ = steps(old, 2)
    config = CheckpointConfig(every=1)
    with CheckpointStore(tmp_path, config, architecture={}, run_config={}, on_note=print) as store:
        store.save(2, middle.saved, data_state={})
        store.wait()
        assert not any(name.startswith("copies") for name in store.latest().manifest.tree)
        shardings = state_shardings(new.definition, new.optimizer, new.placement)
        abstract = abstract_state(new.definition, new.optimizer, shardings)
        restored, _ = store.restore(abstract.saved)
    restored = place_copies(new.definition, restored, shardings)
    assert_copied(new, restored)
    got, metrics = steps(new, 2, restored)
    want, expected = steps(old, 2, middle)
    assert_same(metrics[0], expected[0])
    assert_close(metrics[1], expected[1], 1e-5)
    assert_close(got.saved, want.saved, 1e-6)


def test_evaluation_takes_the_copies():
    run = training(PARTS, "bfloat16")
    abstract = abstract_weights(run.definition, run.placement)
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.sharding))
    assert describe((run.state.weights, run.state.biases)) == describe(abstract)
    evaluate = jax.jit(make_eval_step(run.spec), compiler_options=EXACT)
    loss_sum, weight = evaluate(run.state.weights, run.state.biases, batch_of(run))
    _, (metrics,) = steps(training(PARTS, None), 1)
    assert float(loss_sum / weight) == pytest.approx(metrics["loss"], rel=1e-5)
    zero = jax.tree.map(jnp.zeros_like, run.state.copies)
    nothing, _ = evaluate(dataclasses.replace(run.state, copies=zero).weights, run.state.biases, batch_of(run))
    assert float(nothing / weight) == pytest.approx(np.log(VOCAB), rel=1e-5)


def test_when_there_are_copies():
    settings = {**DENSE, "data.paths": ("*.txt",), "precision.compute": "bfloat16"}
    kept, wide, narrow = (
        resolve(run_of(settings | changes), jax.devices()[:1])
        for changes in (
            {},
            {"precision.compute": "float32"},
            {"precision.param": "bfloat16", "precision.gradient": "bfloat16"},
        )
    )
    assert kept.spec.definition.copy_dtype == "bfloat16"
    assert any(line.startswith("weights: the optimizer keeps a copy in bfloat16") for line in kept.choices)
    for other in (wide, narrow):
        assert other.spec.definition.copies == ({}, {})
        assert not any(line.startswith("weights: ") for line in other.choices)


def test_a_resumed_run_trains_evaluates_and_samples_with_copies(tmp_path):
    settings = prepare(tmp_path, DENSE | {"precision.compute": "bfloat16", "steps": 4, "checkpoint.every": 2})
    settings |= {"sample.tokens": 2}
    whole, losses = train_here(settings), losses_of(settings)
    shutil.rmtree(run_dir(settings) / "checkpoints" / "step_0000000004")
    resumed = train_here(settings)
    assert [record["step"] for record in records_of(settings)] == [1, 2, 3, 4, 3, 4]
    assert losses_of(settings) == losses
    assert resumed["eval_loss"] == whole["eval_loss"]
