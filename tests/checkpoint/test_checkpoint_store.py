"""What is saved comes back exactly, on any mesh, and the right checkpoints stay."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import CheckpointConfig, CheckpointReader, CheckpointStore, read_manifest
from checkpoint.manifest import digest
from checkpoint.tree import named_leaves
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement

ARCHITECTURE = {"num_layers": 2, "embed_dim": 8, "rope": {"theta": 10_000.0}, "window_pattern": (None, 4)}


class Notes(list):
    def __call__(self, line: str) -> None:
        self.append(line)


def open_store(directory: Path, notes: Notes | None = None, architecture: Any = None, **config: Any) -> CheckpointStore:
    return CheckpointStore(
        directory,
        CheckpointConfig(**config),
        architecture=ARCHITECTURE if architecture is None else architecture,
        run_config={"name": "tiny"},
        on_note=Notes() if notes is None else notes,
    )


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        # Bytes, not values: NaN payloads and signed zeros count.
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small_state(value: float) -> dict[str, Any]:
    return {"params": {"w": jnp.full((4, 8), value)}, "step": jnp.int32(value)}


def place(placement: Placement, x: jax.Array, *logical: str | None) -> jax.Array:
    return jax.device_put(x, placement.sharding(*logical))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int32", "uint8", "uint32", "float16", "bfloat16", "float32", "float8_e4m3fn", "int4"]
)
def test_round_trip_is_exact(tmp_path: Path, dtype: str) -> None:
    bits = jax.random.randint(jax.random.key(0), (5, 3), -8, 8)
    state = {"x": bits.astype(dtype), "scalar": jnp.ones((), dtype), "empty": jnp.zeros((0, 3), dtype)}
    with open_store(tmp_path) as store:
        store.save(1, state, data_state={})
        store.wait()
        restored, manifest = store.restore(abstract(state))
    assert_same(restored, state)
    assert manifest.tree["x"].dtype == dtype


def test_special_values_survive(tmp_path: Path) -> None:
    state = {"x": jnp.array([math.nan, -math.inf, -0.0, 1e-42], jnp.float32), "zero": jnp.zeros((3, 3))}
    with open_store(tmp_path) as store:
        store.save(1, state, data_state={})
        store.wait()
        assert_same(store.restore(abstract(state))[0], state)


class Tiny(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])


class TrainState(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    router_bias: Any
    key: jax.Array


def test_training_state_comes_back_in_its_own_classes(tmp_path: Path) -> None:
    params = nnx.state(Tiny(nnx.Rngs(0)), nnx.Param)
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    key = jax.random.key_data(jax.random.key(7))
    state = TrainState(jnp.int32(3), params, opt_state, {}, key)
    with open_store(tmp_path) as store:
        store.save(3, state, data_state={})
        store.wait()
        restored, manifest = store.restore(abstract(state))
    assert_same(restored, state)
    assert isinstance(restored.params, nnx.State)
    # Names know neither flax's nor optax's classes.
    assert "params/blocks/0/kernel" in manifest.tree
    assert any(name.endswith("mu/blocks/1/bias") for name in manifest.tree)


def test_restore_onto_another_mesh(tmp_path: Path) -> None:
    devices = jax.devices()
    before = Placement(make_mesh(MeshConfig(fsdp=4, tensor=2), devices))
    after = Placement(make_mesh(MeshConfig(fsdp=1, expert=2, tensor=2), devices[:4]))
    values = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.arange(8.0), "step": jnp.int32(5)}
    logical = {"w": ("embed", "mlp"), "b": ("mlp",), "step": ()}
    state = {name: place(before, x, *logical[name]) for name, x in values.items()}
    with open_store(tmp_path) as store:
        store.save(5, state, data_state={})
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=after.sharding(*logical[name]))
        for name, x in values.items()
    }
    restored, manifest = open_reader(tmp_path).restore(target)
    assert_same(restored, values)
    for name, x in restored.items():
        assert x.sharding == target[name].sharding
    assert manifest.devices["num_devices"] == 8
    assert manifest.devices["mesh"] == dict(before.mesh.shape)


def open_reader(directory: Path, notes: Notes | None = None, architecture: Any = None) -> CheckpointReader:
    return CheckpointReader(directory, architecture=architecture, on_note=Notes() if notes is None else notes)


def test_indivisible_target_is_named(tmp_path: Path) -> None:
    placement = Placement(make_mesh(MeshConfig(fsdp=8), jax.devices()))
    with open_store(tmp_path) as store:
        store.save(1, {"w": jnp.ones((4, 2))}, data_state={})
        store.wait()
        target = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=placement.sharding("embed", None))}
        with pytest.raises(ValueError, match=r"w of shape \(4, 2\)"):
            store.restore(target)


def test_state_may_be_donated_while_the_save_is_written(tmp_path: Path) -> None:
    placement = Placement(make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()))
    values = {name: np.full((512, 512), i, np.float32) for i, name in enumerate("abc")}
    logical = {"a": ("embed", "mlp"), "b": (None, None), "c": ("embed", None)}
    state = {name: place(placement, x, *logical[name]) for name, x in values.items()}
    target = abstract(state)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 9, tree), donate_argnums=0)
    with open_store(tmp_path) as store:
        store.save(1, state, data_state={})
        jax.block_until_ready(update(update(state)))
        store.wait()
        assert_same(store.restore(target)[0], values)


def test_manifest_returns_what_the_caller_recorded(tmp_path: Path) -> None:
    data_state = {"sample": 12_345, "shuffle": [1, 2], "hash": "ab"}
    with open_store(tmp_path) as store:
        store.save(7, small_state(7), data_state=data_state, metrics={"eval_loss": jnp.float32(1.5), "bad": math.nan})
        store.wait()
        latest = store.latest()
        _, manifest = store.restore(abstract(small_state(7)))
    assert manifest == latest.manifest == read_manifest(latest.path)
    assert (latest.step, manifest.step, manifest.data_state) == (7, 7, data_state)
    assert manifest.metrics == {"eval_loss": 1.5, "bad": None}
    assert manifest.run_config == {"name": "tiny"}
    assert manifest.architecture["window_pattern"] == [None, 4]
    assert manifest.code["versions"]["jax"] == jax.__version__
    assert (manifest.code["commit"] is None) == ("commit_reason" in manifest.code)
    assert manifest.tree["params/w"].shape == (4, 8)
    on_disk = sum(path.stat().st_size for path in latest.path.rglob("d/*"))
    assert 0 < on_disk <= sum(file.size for file in manifest.files.values())


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    with open_store(tmp_path / "new") as store:
        assert store.latest() is None
        assert store.best() is None
        assert store.list_steps() == []
        with pytest.raises(RuntimeError, match="no complete checkpoint"):
            store.restore(abstract(small_state(0)))
    assert open_reader(tmp_path / "absent").latest() is None


def test_subtree_alone_and_in_another_dtype(tmp_path: Path) -> None:
    params = nnx.state(Tiny(nnx.Rngs(0)), nnx.Param)
    with open_store(tmp_path) as store:
        store.save(1, {"params": params, "opt_state": {"mu": params}}, data_state={})
    reader = open_reader(tmp_path)
    restored, _ = reader.restore_subtree("params", abstract(params))
    assert_same(restored, params)
    # A plain dictionary of arrays names the same leaves as a state of Params.
    half = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in named_leaves(params)[0].items()}
    with pytest.raises(ValueError, match=r"float32\[4, 4\] in the checkpoint, bfloat16\[4, 4\]"):
        reader.restore_subtree("params", half)
    cast, _ = reader.restore_subtree("params", half, cast=True)
    want = {name: x.astype(jnp.bfloat16) for name, x in named_leaves(params)[0].items()}
    assert_same(cast, want)
    bias, _ = reader.restore_subtree("params/blocks/0/bias", jax.ShapeDtypeStruct((4,), jnp.float32))
    assert_same(bias, params["blocks"][0]["bias"][...])


def test_another_architecture_lists_the_fields(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save(1, small_state(1), data_state={})
    other = {**ARCHITECTURE, "num_layers": 3, "rope": {"theta": 5e5}}
    with pytest.raises(ValueError) as raised:
        open_reader(tmp_path, architecture=other).restore(abstract(small_state(1)))
    message = str(raised.value)
    assert "num_layers: 2 in the checkpoint, 3 in this run" in message
    assert "rope.theta: 10000.0 in the checkpoint, 500000.0 in this run" in message
    assert "embed_dim" not in message


def test_other_leaves_are_listed_by_name(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save(1, {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)}, data_state={})
        store.wait()
        wanted = {"b": jnp.ones(5), "c": jnp.ones(4, jnp.int32), "d": jnp.ones(1)}
        with pytest.raises(ValueError) as raised:
            store.restore(abstract(wanted))
    message = str(raised.value)
    assert "missing from the checkpoint:\n  d\n" in message
    assert "has besides:\n  a\n" in message
    assert "b: float32[3] in the checkpoint, float32[5] in this run" in message
    assert "c: float32[4] in the checkpoint, int32[4] in this run" in message


@pytest.mark.parametrize("leaf", [np.ones(2), 3, jax.random.key(0)])
def test_unsavable_leaves_are_named(tmp_path: Path, leaf: Any) -> None:
    with open_store(tmp_path) as store, pytest.raises(ValueError, match="state leaf outer/inner"):
        store.save(1, {"outer": {"inner": leaf}}, data_state={})


def test_unsavable_data_state_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, pytest.raises(ValueError, match="data_state"):
        store.save(1, small_state(1), data_state={"iterator": object()})


def test_newest_and_best_stay(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: math.nan, 6: 2.5}
    with open_store(tmp_path, keep=2, keep_best=2) as store:
        for step, loss in losses.items():
            metrics = None if loss is None else {"eval_loss": loss}
            store.save(step, small_state(step), data_state={}, metrics=metrics)
        store.wait()
        assert store.list_steps() == [2, 3, 5, 6]
        assert store.best().step == 2
        assert_same(store.restore(abstract(small_state(0)), step=3)[0], small_state(3))
        with pytest.raises(RuntimeError, match=r"step 1 .* complete steps: \[2, 3, 5, 6\]"):
            store.restore(abstract(small_state(0)), step=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{s:010d}" for s in (2, 3, 5, 6)]


def test_the_same_step_is_saved_once(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.save(4, small_state(4), data_state={})
        assert not store.save(4, small_state(9), data_state={})
        store.wait()
        assert_same(store.restore(abstract(small_state(4)))[0], small_state(4))
    with open_store(tmp_path) as again, pytest.raises(ValueError, match="already holds a complete checkpoint"):
        again.save(4, small_state(9), data_state={})


def test_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save(1, small_state(1), data_state={})
    partial = tmp_path / "step_0000000002.orbax-checkpoint-tmp"
    partial.mkdir()
    hold = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB);"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = str(tmp_path / ".writer.lock")
    with subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another process is writing .* checkpoint\.directory"):
            open_store(tmp_path)
        assert partial.exists()
        assert open_reader(tmp_path).latest().step == 1
        other.communicate()
    open_store(tmp_path).close()
    assert not partial.exists()


def test_closing_gives_the_lock_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    store.close()
    attempt = "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", attempt, str(tmp_path / ".writer.lock")], check=True)


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("keep", 0), ("keep_best", -1)])
def test_config_names_the_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.{field}={value}"):
        CheckpointConfig(**{field: value})


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save(1, small_state(1), data_state={})
        store.wait()
        path = store.latest().path
    body = json.loads((path / "manifest.json").read_text())
    del body["manifest_hash"]
    body["format_version"] = 99
    (path / "manifest.json").write_text(json.dumps({**body, "manifest_hash": digest(body)}))
    with pytest.raises(ValueError, match="format version 99"):
        read_manifest(path)


names = st.text("abc01", min_size=1, max_size=3)
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=8
)


@settings(deadline=None, max_examples=40)
@given(trees)
def test_names_follow_the_treedef_and_are_unique(tree: Any) -> None:
    leaves, treedef = named_leaves(tree)
    assert jax.tree.unflatten(treedef, list(leaves.values())) == tree
    assert len(leaves) == len(jax.tree.leaves(tree))


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(ValueError, match="both named 'a/b'"):
        named_leaves({"a": {"b": 1}, "a/b": 2})
