"""Real train steps compiled for TPU slices by TPU's own compiler: they fit, and talk as the mesh means them to.

Each compiles in a process of its own: libtpu reads its settings once, and JAX's compilation cache, which all tests
share, can't read back a program for devices that are not there.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import configs
from benchmarks.tpu_memory import CASES
from parallel.mesh import MeshConfig, make_mesh
from parallel.topology import tpu_devices
from perf.flops import count_params
from perf.operations import product_parameters

ROOT = Path(__file__).resolve().parents[2]
RECORDED = {
    f"{record['config']}@{record['topology']}": record
    for record in json.loads((ROOT / "benchmarks" / "results" / "tpu_memory.json").read_text())["cases"]
}
REMATERIALIZATION = "Involuntary full rematerialization"

# One to two minutes of a core each, but for this one, which shows every kind of collective; the others are run by name.
QUICK = "quickstart@v5e:4x4"
NAMES = [pytest.param(c.name, marks=() if c.name == QUICK else pytest.mark.slow) for c in CASES]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    # libtpu writes its warnings to files unless told otherwise.
    log = {"TPU_STDERR_LOG_LEVEL": "1", "TPU_LOG_DIR": "disabled"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | log, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_train_step_compiles_and_fits(name):
    done = run_python("-m", "benchmarks.tpu_memory", "--only", name)
    (record,) = json.loads(done.stdout)["cases"]
    assert "error" not in record, record["error"]
    print(json.dumps({key: value for key, value in record.items() if key != "collective_list"}))
    assert record["peak_gib"] < record["usable_gib"]
    check_memory(record)
    assert REMATERIALIZATION not in done.stderr, done.stderr[-4000:]
    found = [SimpleNamespace(**fields) for fields in record["collective_list"]]
    check_activations(record, found)
    check_parameters(record, found)
    if "expert" in record["mesh"]:
        check_experts(record, found)
    assert record["peak_gib"] == pytest.approx(RECORDED[name]["peak_gib"], rel=0.1), "the published table is old"


def check_memory(record):
    """Parameters and two moments, float32 each, are all split over the shards, and the matrices' copy in bfloat16."""
    mesh, run = record["mesh"], configs.load(record["config"]).train()
    shards = mesh.get("fsdp", 1) * mesh.get("expert", 1)
    copies = 2 * product_parameters(run.model) if run.precision.compute == "bfloat16" else 0
    state = 12 * count_params(run.model).total + copies
    assert record["state_gib"] == pytest.approx(state / shards / 2**30, rel=0.01)
    assert record["peak_gib"] > record["state_gib"]


def check_activations(record, found):
    """No collective makes an activation of the whole batch on a device."""
    model = configs.load(record["config"]).train().model
    whole = record["batch_size"] * record["sequence_length"] * model.embed_dim
    assert max(math.prod(dims) for c in found for _, dims in c.shapes) < whole


def check_parameters(record, found):
    """Parameters are gathered over the axes that they are split over, their gradients summed into shards or whole."""
    mesh = record["mesh"]
    shards = mesh.get("fsdp", 1) * mesh.get("expert", 1)
    assert any(c.kind == "all-gather" and c.group_size == shards for c in found)
    assert all(c.group_size <= shards for c in found if c.kind == "all-gather")
    if "data" in mesh:
        # Over a whole slice the compiler prefers an all-reduce.
        assert any(c.kind == "reduce-scatter" and c.group_size == shards for c in found)


def check_experts(record, found):
    """Tokens travel to the experts: kernels are gathered over the other axes only, one device's experts at a time."""
    mesh, model = record["mesh"], configs.load(record["config"]).train().model
    assert sum(c.kind == "all-to-all" and c.group_size == mesh["expert"] for c in found) >= 4
    kernel = {model.embed_dim, model.moe.mlp_dim}
    gathers = [c for c in found if c.kind == "all-gather" and any(kernel <= set(dims) for _, dims in c.shapes)]
    assert gathers
    local = model.moe.num_experts // mesh["expert"] * model.embed_dim * model.moe.mlp_dim
    compute = {"bfloat16": "bf16", "float32": "f32"}[configs.load(record["config"]).train().precision.compute]
    for gather in gathers:
        assert gather.group_size == mesh["fsdp"]
        assert {dtype for dtype, dims in gather.shapes if kernel <= set(dims)} == {compute}
        assert all(math.prod(dims) == local for _, dims in gather.shapes if kernel <= set(dims))


def test_a_full_rematerialization_would_be_seen():
    program = """
import jax
jax.config.update("jax_platforms", "cpu")
from parallel.mesh import MeshConfig, make_mesh
from parallel.topology import tpu_devices
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=4), tpu_devices("v5e:4x4"))
x = jax.ShapeDtypeStruct((32, 64, 128), "float32", sharding=NamedSharding(mesh, P(("data", "tensor", "fsdp"))))
jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P("data", None, "tensor"))).lower(x).compile()
"""
    assert REMATERIALIZATION in run_python("-c", program).stderr


@pytest.mark.parametrize(
    ("topology", "count", "kind"),
    [
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5e:4x4", 16, "TPU v5 lite"),
        ("v5p:4x4x4", 64, "TPU v5"),
        ("v6e:16x16", 256, "TPU v6 lite"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
    ],
)
def test_slices_become_meshes(topology, count, kind):
    devices = tpu_devices(topology)
    assert len(devices) == count and {d.device_kind for d in devices} == {kind}
    mesh = make_mesh(MeshConfig(tensor=min(count, 2)), devices)
    assert mesh.size == count and set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", r"unknown TPU topology 'v5e'; known forms: .*v5e:XxY, v5p:XxYxZ"),
        ("v7x:2x2x1", "unknown TPU topology .*tpu7x:XxYxZ"),
        ("v5e:4x4x4", "unknown TPU topology"),
        ("v5p:4x4", "unknown TPU topology"),
        ("v5e:0x4", "unknown TPU topology"),
        ("v5e:3x3", "refused by libtpu: .*not divisible.*known forms"),
    ],
)
def test_unknown_slices_are_refused(topology, message):
    with pytest.raises(ValueError, match=message):
        tpu_devices(topology)


def test_slices_are_not_joined_in_silence():
    devices = tpu_devices("v5e:2x2", num_slices=2)
    assert len(devices) == 8 and {d.slice_index for d in devices} == {0, 1}
    with pytest.raises(ValueError, match=r"mesh\.slice=1, and the 8 devices are of 2 TPU slices; set mesh\.slice to 2"):
        make_mesh(MeshConfig(), devices)
    with pytest.raises(ValueError, match=r"mesh\.slice=2, and the 4 devices are of 1 TPU slices; set mesh\.slice to 1"):
        make_mesh(MeshConfig(slice=2), tpu_devices("v5e:2x2"))
    mesh = make_mesh(MeshConfig(slice=2, tensor=2), devices)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"slice": 2, "fsdp": 2, "tensor": 2}
    # Every axis but the first stays within a slice.
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="num_slices=0 must be at least 1"):
        tpu_devices("v5e:2x2", num_slices=0)


def test_missing_libtpu_says_how_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"v5e:4x4 needs libtpu, which is not installed; use `uv run --group tpu"):
        tpu_devices("v5e:4x4")
