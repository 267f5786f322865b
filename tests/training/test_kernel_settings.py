"""The settings of training's kernels reach what runs: a named one that can't run here says so."""

import dataclasses
import math

import jax
import pytest

import configs
from kernels import cross_entropy, dispatch
from parallel.mesh import MeshConfig
from tests.model.tiny import packed_batch
from training.config import KernelConfig
from training.resolve import resolve
from training.state import abstract_state, state_shardings
from training.step import make_train_step

RUN = dataclasses.replace(configs.load("quickstart").train(), mesh=MeshConfig(fsdp=1))


def named(**kernels):
    return dataclasses.replace(RUN, kernels=KernelConfig(**kernels))


@pytest.mark.parametrize("kernel", ["cross_entropy", "norm", "dispatch"])
def test_a_named_kernel_is_refused_where_it_cannot_run(kernel):
    with pytest.raises(
        ValueError, match=f"^{kernel} impl='pallas' can't run: .*compute capability 9.0.*kernels.{kernel}"
    ):
        resolve(named(**{kernel: "pallas"}), jax.devices()[:1])


def test_settings_are_the_programs_own():
    resolved = resolve(named(norm="xla", cross_entropy="xla", dispatch="xla"), jax.devices()[:1])
    execution = resolved.spec.execution
    assert (execution.norm, execution.dispatch, resolved.spec.cross_entropy) == ("xla", "xla", "xla")
    assert "dispatch to experts: xla, asked for by name" in resolved.choices
    assert "cross-entropy: xla, asked for by name" in resolved.choices
    assert "residual sums and their norms: xla, asked for by name" in resolved.choices


def test_dispatch_is_refused_to_a_model_without_experts():
    run = named(dispatch="pallas")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=None))
    with pytest.raises(ValueError, match=r"kernels\.dispatch='pallas' can't run: .*model\.moe\.dispatch='dropless'"):
        resolve(run, jax.devices()[:1])


@pytest.mark.parametrize(("mesh", "split"), [({"fsdp": 2}, False), ({"expert": 2}, True), ({"tensor": 2}, True)])
def test_dispatch_is_chosen_for_each_way(monkeypatch, mesh, split):
    asked = []
    monkeypatch.setattr(dispatch, "choose", lambda impl, case, target: asked.append(case.rounded) or ("xla", "here"))
    resolved = resolve(dataclasses.replace(RUN, mesh=MeshConfig(**mesh)), jax.devices()[:2])
    assert asked == ([True, False] if split else [True])
    assert "dispatch to experts: xla, here" in resolved.choices
    assert ("gradients of what comes back: xla, here" in resolved.choices) == split


@pytest.mark.parametrize("mesh", [{"fsdp": 1}, {"expert": 2}])
def test_a_steps_dispatch_is_the_named_one(mesh):
    run = dataclasses.replace(RUN, mesh=MeshConfig(**mesh))
    resolved = resolve(run, jax.devices()[: math.prod(mesh.values())])
    spec, optimizer = resolved.spec, resolved.optimizer
    spec = dataclasses.replace(spec, execution=dataclasses.replace(spec.execution, dispatch="pallas"))
    state = abstract_state(spec.definition, optimizer, state_shardings(spec.definition, optimizer, resolved.placement))
    with pytest.raises(ValueError, match=r"^dispatch impl='pallas' can't run: .*kernels\.dispatch"):
        jax.eval_shape(make_train_step(spec, optimizer, resolved.schedule), state, packed_batch())


@pytest.mark.parametrize("kernel", ["cross_entropy", "norm"])
def test_a_step_is_traced_with_them(kernel):
    resolved = resolve(RUN, jax.devices()[:1])
    spec, optimizer = resolved.spec, resolved.optimizer
    if kernel == "norm":
        spec = dataclasses.replace(spec, execution=dataclasses.replace(spec.execution, norm="pallas"))
    else:
        spec = dataclasses.replace(spec, cross_entropy="pallas")
    state = abstract_state(spec.definition, optimizer, state_shardings(spec.definition, optimizer, resolved.placement))
    with pytest.raises(ValueError, match=f"^{kernel} impl='pallas' can't run: .*kernels.{kernel}"):
        jax.eval_shape(make_train_step(spec, optimizer, resolved.schedule), state, packed_batch())


@pytest.mark.parametrize(
    ("mesh", "length", "sharded"), [({"fsdp": 8}, 512, False), ({"tensor": 2, "fsdp": 4}, 256, True)]
)
def test_the_loss_is_chosen_for_a_devices_part_of_the_vocabulary(monkeypatch, mesh, length, sharded):
    cases = []
    monkeypatch.setattr(cross_entropy, "choose", lambda impl, case, target: cases.append(case) or ("pallas", "here"))
    model = dataclasses.replace(RUN.model, vocab_size=512)
    resolved = resolve(dataclasses.replace(RUN, mesh=MeshConfig(**mesh), model=model), jax.devices())
    assert resolved.spec.cross_entropy == "pallas"
    assert cases == [cross_entropy.CrossEntropyCase("float32", length, sharded=sharded)]
