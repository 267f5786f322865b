"""Every file in configs/: it loads, fits sensible meshes, explains itself, and is the model that it says."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

import configs
import serve
import serving.resolve
import train
from model.transformer import Definition
from parallel.mesh import MESH_AXES, MeshConfig
from parallel.sharding import Placement
from perf.flops import count_params
from training.config import TrainRun
from training.resolve import check_placement, resolve
from training.schedule import make_schedule

NAMES = [name for name in configs.names() if hasattr(configs.load(name), "train")]
SERVED = ("llama3-8b", "quickstart", "smollm2")

# Billions of parameters, total and active, to the last digit: as in the models' cards (arXiv 2401.04088, 2505.09388),
# but that Qwen's 3.35 is cut to 3.3 there. quickstart is nobody's but ours.
PUBLISHED = {
    "dense-1b": ("1.35", "1.35"),
    "llama3-70b": ("70.6", "70.6"),
    "llama3-8b": ("8.03", "8.03"),
    "mixtral-8x7b": ("46.7", "12.9"),
    "moe-1b": ("1.16", "0.37"),
    "qwen3-30b-a3b": ("30.5", "3.35"),
}

# Meshes that each model is meant for, besides all devices on one axis.
MESHES = {
    "llama3-70b": (64, MeshConfig(tensor=8)),
    "llama3-8b": (16, MeshConfig(tensor=4)),
    "mixtral-8x7b": (64, MeshConfig(expert=8)),
    "moe-1b": (8, MeshConfig(expert=4)),
    "qwen3-30b-a3b": (128, MeshConfig(expert=32)),
}


def run_named(name: str) -> TrainRun:
    return configs.load(name).train()


def test_the_names_are_those_of_the_files() -> None:
    assert {*PUBLISHED, "quickstart"} == {*NAMES}
    assert {*NAMES, *SERVED} == {*configs.names()}
    for name in NAMES:
        assert run_named(name).name == name
    for name in SERVED:
        assert configs.load(name).serve().name == name


@pytest.mark.parametrize("devices", [1, 8])
def test_serves_here(devices: int) -> None:
    resolved = serving.resolve.resolve(configs.load("llama3-8b").serve(), jax.devices()[:devices])
    assert (resolved.placement is None) == (devices == 1)
    # Whatever the batch and the context, some program holds it.
    assert {cell.width for cell in resolved.cells} >= {512, 8192}
    assert max(cell.rows for cell in resolved.cells) == resolved.run.engine.max_sequences
    assert resolved.page_bytes * devices == 64 * 32 * 2 * 8 * 128 * 4


def test_the_model_in_the_package_is_found() -> None:
    resolved = serving.resolve.resolve(configs.load("smollm2").serve(), jax.devices()[:1])
    assert f"{count_params(resolved.model).total / 1e6:.0f}" == "135"
    assert resolved.max_context == 2048


def test_serve_lists_what_can_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*SERVED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    params = count_params(run_named(name).model)
    for count, published in zip(params, PUBLISHED[name], strict=True):
        digits = len(published.partition(".")[2])
        assert f"{count / 1e9:.{digits}f}" == published


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_counts_what_the_model_holds(name: str) -> None:
    run = run_named(name)
    leaves = jax.tree.leaves(Definition(run.model, run.layers.scan, run.precision.param).abstract[0])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count_params(run.model).total


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_resolves_here(name: str, devices: int) -> None:
    run = run_named(name)
    resolved = resolve(run, jax.devices()[:devices])
    assert resolved.num_devices == devices
    assert resolved.selection.attention and resolved.choices


@pytest.mark.parametrize("name", MESHES)
def test_fits_the_mesh_it_is_meant_for(name: str) -> None:
    run = run_named(name)
    devices, mesh = MESHES[name]
    for config in (mesh, MeshConfig()):
        shape = config.shape(devices)
        abstract = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
        check_placement(run, Placement(abstract, run.rules))


@pytest.mark.parametrize("name", NAMES)
def test_schedule_fits_the_steps(name: str) -> None:
    run = run_named(name)
    schedule = make_schedule(run.optimizer.schedule, run.steps)
    rates = [float(schedule(step)) for step in range(0, run.steps, max(1, run.steps // 50))]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(run.optimizer.schedule.peak_lr, rel=0.05)
    assert rates[-1] < 0.5 * max(rates)


def test_list_names_every_config_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for name, line in zip(NAMES, lines, strict=True):
        assert line.removeprefix(name).strip() == configs.load(name).__doc__.splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_help_of(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"train.py {name}" in text
    for option in ("--steps INT", "--optimizer.schedule.peak-lr FLOAT", "--mesh.fsdp INT", "--model.num-layers INT"):
        assert option in text


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    assert "--list" in capsys.readouterr().out
    assert train.main([]) == 2
