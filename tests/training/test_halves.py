"""Matrices in halves: the same training as with float32 matrices and copies, in the state and in its checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from checkpoint import CheckpointConfig, CheckpointStore
from kernels import adamw
from kernels.adamw import Hyperparameters
from kernels.target import Target
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from tests.model.tiny import assert_close, dense, execution, moe
from tests.training.runs import DENSE, run_of
from tests.training.stepping import EXACT, Training, assert_same, batch_of, steps
from training.config import LossConfig
from training.diagnose import find_non_finite
from training.halves import NO_HALVES, Halves, clip_factor
from training.optimizer import MuonConfig, OptimizerConfig, adamw_moments, adamw_settings, make_optimizer
from training.resolve import resolve
from training.schedule import ScheduleConfig
from training.state import abstract_state, init_state, place_copies, state_shardings
from training.step import StepSpec, make_train_step

H100 = Target("gpu", (9, 0))
MODELS = {"dense": dense(num_layers=1, qkv_bias=True), "moe": moe(num_layers=1)}


@dataclasses.dataclass(frozen=True)
class Case:
    """How a model is trained. `clip_norm`: far below the gradient's, or far above it."""

    model: str = "dense"
    mesh: MeshConfig | None = None
    optimizer: str = "adamw"
    moments: str = "float32"
    clip_norm: float = 1e-2
    accumulation: int = 1


PLAIN = Case()
SHARDED = Case(mesh=MeshConfig(fsdp=2, tensor=2), clip_norm=1e4, accumulation=2)
CASES = [
    pytest.param(PLAIN, id="clipped"),
    pytest.param(SHARDED, id="sharded"),
    pytest.param(Case("moe", moments="bfloat16"), id="moe, moments in bfloat16", marks=pytest.mark.slow),
    pytest.param(Case(optimizer="muon"), id="muon", marks=pytest.mark.slow),
]


@functools.cache
def training(case: Case, impl: str | None = "xla", only: str | None = None) -> Training:
    """In halves, by an implementation of their update; or with copies. `only`: the one parameter that is in halves."""
    config = MODELS[case.model]
    definition = Definition(config, False, copy_dtype="bfloat16")
    devices = jax.devices()[: 1 if case.mesh is None else 4]
    placement = Placement(make_mesh(case.mesh or MeshConfig(), devices))
    alone = None if case.mesh is None else placement
    run = execution(config, "bfloat16", placement=alone, grouped_matmul="ragged_dot", quantized_matmul="xla")
    # The size of eps: see tests/training/test_copies.py.
    settings = OptimizerConfig(
        case.optimizer,
        ScheduleConfig(kind="constant", peak_lr=0.01, warmup_steps=0),
        eps=1e-3,
        clip_norm=case.clip_norm,
        moment_dtype=case.moments,
        muon=MuonConfig(ns_steps=2),
    )
    halves = NO_HALVES if impl is None else halves_of(definition, settings, impl, only)
    spec = StepSpec(definition, run, LossConfig(chunk_tokens=64), case.accumulation, halves=halves)
    optimizer = make_optimizer(settings, 10, definition.logical[0])
    shardings = state_shardings(definition, optimizer, placement)
    step = jax.jit(
        make_train_step(spec, optimizer, lambda step: 0.01),
        out_shardings=(shardings, placement.sharding()),
        compiler_options=EXACT,
    )
    state = init_state(definition, optimizer, 0, placement, halves.paths)
    return Training(definition, spec, optimizer, placement, step, state)


def halves_of(definition, settings, impl, only) -> Halves:
    logical = traverse_util.flatten_dict(definition.logical[0])
    found = []
    for path in traverse_util.flatten_dict(definition.copies[0]):
        how = adamw_settings(settings, logical[path])
        if how is not None and only in (None, path[-1]):
            found.append((path, how))
    return Halves(tuple(found), settings.clip_norm, impl)


def assert_halves(run: Training, state) -> None:
    """The state is as its description says; and what products read is the first half of what is saved."""
    placed = state_shardings(run.definition, run.optimizer, run.placement)
    described = abstract_state(run.definition, run.optimizer, placed, run.spec.halves.paths)
    assert jax.tree.structure(described) == jax.tree.structure(state)
    for wanted, got in zip(jax.tree.leaves(described), jax.tree.leaves(state), strict=True):
        assert (got.shape, got.dtype, got.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    flat = {name: traverse_util.flatten_dict(tree) for name, tree in (("params", state.params), ("w", state.weights))}
    saved = traverse_util.flatten_dict(state.saved.params)
    assert all(leaf.dtype == jnp.float32 for leaf in saved.values())
    assert run.spec.halves.paths
    for path in run.spec.halves.paths:
        rounded, rest = adamw.split(saved[path])
        np.testing.assert_array_equal(flat["w"][path], rounded, str(path))
        np.testing.assert_array_equal(flat["params"][path], rest, str(path))
        assert flat["params"][path].dtype == jnp.int16 and np.any(rest)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_with_copies(case):
    run, plain = training(case), training(case, None)
    assert_halves(run, run.state)
    assert_same(run.state.saved, plain.state.saved)
    got, metrics = steps(run, 3)
    want, expected = steps(plain, 3)
    assert_halves(run, got)
    for found, wanted in zip(metrics, expected, strict=True):
        assert_close(found, wanted, 1e-4)
    assert_close(got.saved, want.saved, 2e-5 if case.moments == "float32" else 1e-2)
    muon = {"lm_head"} if case.optimizer == "muon" else {"lm_head", "up", "query"}
    assert muon <= {path[-1] for path in run.spec.halves.paths}
    assert ("up" in {path[-1] for path in run.spec.halves.paths}) == (case.optimizer == "adamw")


def test_a_step_has_all_of_a_parameter_from_one_update(monkeypatch):
    """Both halves and both moments, and none of it as Optax would have it: that may be rounded otherwise."""

    def marked(gradient, *state, impl, target):
        *arrays, _, _ = state
        return tuple(jnp.full_like(one, number) for number, one in enumerate(arrays, 1))

    monkeypatch.setattr(adamw, "adamw", marked)
    run = training.__wrapped__(PLAIN, only="up")
    after, _ = steps(run, 1)
    moments, (path,) = adamw_moments(after.opt_state), run.spec.halves.paths
    copies, params = traverse_util.flatten_dict(after.copies), traverse_util.flatten_dict(after.params)
    for number, leaf in enumerate((copies[path], params[path], moments["mu", path], moments["nu", path]), 1):
        np.testing.assert_array_equal(leaf, np.full_like(leaf, number))
    assert all(leaf.dtype == jnp.float32 for other, leaf in params.items() if other != path)


def test_a_step_by_the_kernel(execution_of_kernels):
    """Of the LM head alone, a parameter of 1024 numbers times a few."""
    run, plain = training(PLAIN, "pallas", only="lm_head"), training(PLAIN, None)
    got, _ = steps(run, 2)
    want, _ = steps(plain, 2)
    assert_halves(run, got)
    assert_close(got.saved, want.saved, 2e-5)


@pytest.fixture
def execution_of_kernels(monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} can't interpret the kernels; 0.11 can")
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from kernels.adamw import gpu

    monkeypatch.setattr(gpu, "adamw", functools.partial(gpu.adamw, interpret=plgpu.InterpretGPUParams()))
    monkeypatch.setattr(adamw, "default_target", lambda: H100)


def test_a_step_that_is_not_finite_leaves_them():
    run = training(PLAIN)
    good, _ = steps(run, 1)
    batch = batch_of(run)
    after, _ = run.step(good, batch | {"weights": batch["weights"] * np.nan})
    assert int(after.bad_step) == 1
    assert_same(dataclasses.replace(after, bad_step=good.bad_step), good)


def test_a_parameter_that_is_not_finite_is_found():
    run = training(PLAIN)
    copies = traverse_util.flatten_dict(run.state.copies)
    (path,) = [path for path in run.spec.halves.paths if path[-1] == "lm_head"]
    broken = traverse_util.unflatten_dict(copies | {path: copies[path].at[0].set(jnp.inf)})
    where = find_non_finite(run.spec, dataclasses.replace(run.state, copies=broken), batch_of(run))
    assert where == "parameter lm_head is not finite before the step"


@pytest.mark.parametrize(("before", "after"), [("xla", None), (None, "xla"), ("xla", "xla")])
def test_a_checkpoint_is_of_either(tmp_path, before, after):
    """A run in halves writes what one with copies restores, and the other way round."""
    old, new = training(SHARDED, before), training(SHARDED, after)
    middle, _ = steps(old, 2)
    with CheckpointStore(tmp_path, CheckpointConfig(every=1), architecture={}, run_config={}, on_note=print) as store:
        store.save(2, middle.saved, data_state={})
        store.wait()
        shardings = state_shardings(new.definition, new.optimizer, new.placement)
        restored, _ = store.restore(abstract_state(new.definition, new.optimizer, shardings).saved)
    restored = place_copies(new.definition, restored, shardings, new.spec.halves.paths)
    assert_same(restored.saved, middle.saved)
    if after == before:
        assert_same(restored, middle)
        assert_same(steps(new, 1, restored)[0], steps(old, 1, middle)[0])
    else:
        assert_close(steps(new, 1, restored)[0].saved, steps(old, 1, middle)[0].saved, 2e-5)


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (4.0, 0.5)])
def test_clipping(norm, factor):
    assert float(clip_factor(Halves(clip_norm=2.0), jnp.float32(norm))) == factor
    assert float(clip_factor(NO_HALVES, jnp.float32(norm))) == 1


def asked(monkeypatch, changes, devices=1):
    """The cases that an implementation was chosen for, and the log's line, of a run that may have the kernel."""
    cases = []
    monkeypatch.setattr(adamw, "choose", lambda impl, case, target: cases.append(case) or ("pallas", "here"))
    settings = {**DENSE, "data.paths": ("*.txt",), "precision.compute": "bfloat16"} | changes
    resolved = resolve(run_of(settings), jax.devices()[:devices])
    (line,) = [line for line in resolved.choices if line.startswith("adamw: ")]
    has_copies = any(line.startswith("weights: the optimizer keeps a copy") for line in resolved.choices)
    assert has_copies == (not cases and resolved.spec.definition.copy_dtype is not None)
    return cases, line, resolved.spec.halves


def test_what_is_held_in_halves(monkeypatch):
    cases, line, halves = asked(monkeypatch, {"optimizer.moment_dtype": "bfloat16", "optimizer.clip_norm": 0.5})
    assert {path[-1] for path in halves.paths} >= {"query", "up", "down"}
    assert "embedding" not in {path[-1] for path in halves.paths}
    assert {(case.gradient, case.mean) for case in cases} == {("bfloat16", "bfloat16")}
    assert halves.clip_norm == 0.5 and halves.impl == "pallas"
    assert line == f"adamw: pallas, here; {len(cases)} of {len(cases)} copies are halves of what they are copies of"
    whole = sum(case.num_elements for case in cases)
    cases, _, _ = asked(monkeypatch, {"accumulation": 2, "mesh.fsdp": 4}, devices=4)
    assert {(case.gradient, case.mean) for case in cases} == {("float32", "float32")}
    assert sum(case.num_elements for case in cases) == whole // 4


def test_what_is_not(monkeypatch):
    for changes in ({"kernels.adamw": "xla"}, {"precision.compute": "float32"}, {"precision.compute": "float16"}):
        cases, line, halves = asked(monkeypatch, changes)
        assert cases == [] and halves == NO_HALVES and line.startswith("adamw: xla, ")
    with pytest.raises(ValueError, match=r"kernels\.adamw='pallas' can't run: .*precision\.compute=float32"):
        asked(monkeypatch, {"precision.compute": "float32", "kernels.adamw": "pallas"})


def test_a_named_kernel_is_refused_where_it_cannot_run():
    settings = {**DENSE, "data.paths": ("*.txt",), "precision.compute": "bfloat16", "kernels.adamw": "pallas"}
    with pytest.raises(ValueError, match=r"^adamw impl='pallas' can't run: .*compute capability 9\.0.*kernels\.adamw"):
        resolve(run_of(settings), jax.devices()[:1])


def test_settings_of_parameters():
    settings = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3)
    assert adamw_settings(settings, ("embed", "mlp")) == Hyperparameters(0.8, 0.9, 1e-6, 0.3)
    assert adamw_settings(settings, ("norm",)) == Hyperparameters(0.8, 0.9, 1e-6, 0.0)
    assert adamw_settings(dataclasses.replace(settings, kind="muon"), ("embed", "mlp")) is None
