"""Hugging Face folders in and out: what is read, what is refused by name, and how much of it is in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface, stream
from checkpoint.huggingface import SafetensorsFolder, load_huggingface, read_config, save_huggingface
from checkpoint.pretrained import open_pretrained
from model.config import RopeConfig, RopeScaling
from model.families.huggingface import computed_fields, parse_config, render_config
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules
from tests.checkpoint.host_memory import peak_while
from tests.model.tiny import dense, moe, random_params
from tests.parity.families import FAMILIES, WHOLE_FAMILIES, config_of, load, one_device, tensors_of, write_folder
from training.state import named_shardings


def load_from(folder: Path, *, scan: bool = False, dtype: str = "float32"):
    definition = Definition(read_config(folder), scan=scan, param_dtype=dtype)
    return load_huggingface(folder, definition, one_device(definition))


def assert_equal(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def body_of(name: str, **changes) -> dict:
    return {**config_of(load(name)), **changes}


# config.json


OLDER = {
    "llama3": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_biases": {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "qwen2": {
        "rope_theta": 1000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"rope_theta": 100, "rope_scaling": None, "use_sliding_window": False, "sliding_window": 4096},
    "gemma2": {"rope_theta": 100.0},
    "gemma3": {
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": None,
    },
    "glm4_moe": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", OLDER)
def test_keys_of_older_files(name):
    body = body_of(name, **OLDER[name])
    body = {key: value for key, value in body.items() if key not in ("rope_parameters", "layer_types")}
    body = {key: value for key, value in body.items() if value is not None or key == "rope_scaling"}
    assert parse_config(body) == FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            {"window_pattern": (None, 7)},
        ),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}, {"window_pattern": (7,)}),
        ("mixtral", {"sliding_window": None}, {"window_pattern": (None,)}),
        ("llama2", {"head_dim": None, "num_key_value_heads": None}, {"head_dim": 8, "num_kv_heads": 4}),
        ("qwen3_moe", {"num_experts": 6}, {"moe": dataclasses.replace(FAMILIES["qwen3_moe"].moe, num_experts=6)}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_soft_cap": None}),
        ("gemma2", {"hidden_activation": None, "hidden_act": "gelu"}, {"activation": "gelu_tanh"}),
    ],
)
def test_values_of_keys(name, changes, fields):
    body = body_of(name, **changes)
    if "layer_types" not in changes and "max_window_layers" in changes:
        del body["layer_types"]
    assert parse_config(body) == dataclasses.replace(FAMILIES[name], **fields)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama2",
            {"model_type": "mamba"},
            r"model_type='mamba' is not supported; supported: llama, .*ernie4_5_moe, gemma3",
        ),
        ("llama2", {"model_type": None}, r"model_type=None"),
        ("llama2", {"hidden_act": "relu2"}, r"hidden_act='relu2' is not supported; supported: silu, gelu"),
        ("llama2", {"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported"),
        ("llama2", {"hidden_size": "32"}, r"hidden_size='32', and a number is required"),
        ("llama2", {"hidden_size": None}, r"hidden_size=None, and a number is required"),
        ("llama2", {"num_hidden_layers": 2.5}, r"num_hidden_layers=2.5, and a whole number"),
        ("llama2", {"attention_bias": "yes"}, r"attention_bias='yes', and true or false"),
        (
            "llama2",
            {"rope_parameters": {"rope_type": "longrope"}},
            r"rope_type='longrope' is not supported; supported: ",
        ),
        ("llama2", {"rope_parameters": {"rope_type": "linear"}}, r"rope_type='linear' needs a factor"),
        ("llama2", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
        ("llama2", {"num_key_value_heads": 3}, r"num_heads=4 is not divisible by model.num_kv_heads=3"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}},
            r"rope mscale=1 is not supported",
        ),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported, only the leading layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported for qwen3_moe, only 1"),
        ("glm4_moe", {"n_group": 2}, r"n_group=2 is not supported"),
        ("exaone4", {"sliding_window": 8}, r"sliding_window=8 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 5}, r"layer_types has 5 entries .*chunked_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, r"layer_types has 1 entries for 5 layers"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(name, changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(body_of(name, **changes)))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"{", "is unreadable"), (b"\xff", "is unreadable"), (b"[]", "a list")],
)
def test_a_damaged_config_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gemma3", "glm4_moe", "qwen3_moe"])
def test_any_value_of_any_key_is_read_or_refused(name):
    """Never another error than ValueError, whatever stands there, a level down too."""
    body = body_of(name)
    places = [(key,) for key in body]
    places += [(key, inner) for key, value in body.items() if isinstance(value, dict) for inner in value]
    for *outer, last in places:
        for value in (None, "x", -1, 0, 1.5, [], {}, True, [[1]], {"a": 1}, math.nan, math.inf, 10**30):
            changed = json.loads(json.dumps(body))
            (changed[outer[0]] if outer else changed)[last] = value
            with contextlib.suppress(ValueError):
                parse_config(changed)


# Tensors


def write_shards(folder: Path, fixture: dict[str, np.ndarray], count: int = 3) -> dict[str, str]:
    """Tensors dealt out to `count` files, and the index."""
    write_folder(folder, fixture)
    (folder / "model.safetensors").unlink()
    tensors, places = tensors_of(fixture), {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_several_files_with_an_index(tmp_path):
    fixture = load("mixtral")
    write_shards(tmp_path / "several", fixture)
    assert_equal(load_from(tmp_path / "several"), load_from(write_folder(tmp_path / "one", fixture)))


def test_errors_of_the_index(tmp_path):
    places = write_shards(tmp_path, load("llama2"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**places, "x": "model-9.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json lists the file 'model-9\.safetensors', which is not"):
        load_from(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists the file '\.\./model\.safetensors'"):
        load_from(tmp_path)
    index.write_text(json.dumps({"weight_map": ["x"]}))
    with pytest.raises(ValueError, match=r"weight_map must give the file"):
        load_from(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    save_file({"model.norm.weight": np.ones(32, np.float32)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in .*model-0000\d-of-00003\.safetensors too"):
        load_from(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_from(tmp_path)


EXPERT = "model.layers.2.mlp.experts.7.down_proj.weight"


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (EXPERT, None, rf"missing tensors:\n  {EXPERT} or model\.layers\.2\.block_sparse"),
        (
            "model.layers.1.mlp.gate.e_score_correction_bias",
            None,
            r"missing tensors:\n  model\.layers\.1\.mlp\.gate\.e_",
        ),
        ("lm_head.weight", None, r"missing tensors:\n  lm_head\.weight$"),
        (
            "model.layers.0.self_attn.o_proj.bias",
            np.zeros(32, np.float32),
            r"tensors without a place:\n  .*model\.safetensors: model\.layers\.0\.self_attn\.o_proj\.bias",
        ),
        (EXPERT.replace("7", "8"), np.zeros((32, 12), np.float32), r"without a place:\n.*experts\.8\.down_proj"),
        (EXPERT.replace("down_proj", "w2"), np.zeros((32, 12), np.float32), r"without a place:\n.*experts\.7\.w2"),
        (
            EXPERT,
            np.zeros((12, 32), np.float32),
            r"safetensors: .*7\.down_proj\.weight has shape \[12, 32\], \[32, 12\]",
        ),
        (EXPERT, np.zeros((32, 12), np.int32), r"safetensors: .*7\.down_proj\.weight: type I32 is not supported"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, value, message, scan, tmp_path):
    write_folder(tmp_path, load("glm4_moe"), **{name: value})
    with pytest.raises(ValueError, match=message):
        load_from(tmp_path, scan=scan)


def test_nothing_is_read_before_all_is_checked(tmp_path, monkeypatch):
    write_folder(tmp_path, load("llama2"), **{"model.norm.weight": None})
    monkeypatch.setattr(SafetensorsFolder, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="missing tensors"):
        load_from(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_named(size, tmp_path):
    path = write_folder(tmp_path, load("llama2")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_from(tmp_path)


def test_a_corrupt_header_is_named(tmp_path):
    path = write_folder(tmp_path, load("llama2")) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_from(tmp_path)


def test_a_head_besides_tied_embeddings(tmp_path):
    fixture = load("llama3")
    table = tensors_of(fixture)["model.embed_tokens.weight"]
    expected = load_from(write_folder(tmp_path / "tied", fixture))
    both = write_folder(tmp_path / "both", fixture, **{"lm_head.weight": table})
    assert_equal(load_from(both), expected)
    other = write_folder(tmp_path / "other", fixture, **{"lm_head.weight": table + np.eye(64, 32, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens.*tie_word_embeddings"):
        load_from(other)


def test_buffers_of_old_files_are_passed_over(tmp_path):
    fixture, buffer = load("llama2"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = write_folder(tmp_path / "old", fixture, **{buffer: np.ones(4, np.float32)})
    assert_equal(load_from(old), load_from(write_folder(tmp_path / "new", fixture)))


@pytest.mark.parametrize(
    ("root", "others"), [("language_model.model.", ""), ("model.language_model.", "model.")], ids=["hub", "saved"]
)
def test_the_text_part_of_a_larger_gemma(root, others, tmp_path, caplog):
    fixture = load("gemma3")
    expected = load_from(write_folder(tmp_path / "text", fixture))
    tensors = {name.replace("model.", root, 1): x for name, x in tensors_of(fixture).items()}
    tensors[f"{others}vision_tower.vision_model.encoder.weight"] = np.zeros(3, np.float32)
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors")
    body = {"model_type": "gemma3", "text_config": config_of(fixture), "vision_config": {}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(body))
    assert read_config(tmp_path / "whole") == FAMILIES["gemma3"]
    assert_equal(load_from(tmp_path / "whole"), expected)
    assert "1 tensors for other things than text are left out" in caplog.text
    write_folder(tmp_path / "text", fixture, **{"vision_tower.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"without a place:\n.*vision_tower\.weight"):
        load_from(tmp_path / "text")


def test_a_sparse_text_config():
    """What the hub's gemma-3-4b has in its text_config."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = parse_config({"model_type": "gemma3", "text_config": text})
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert config.window_pattern == (1024,) * 5 + (None,)
    assert config.rope == RopeConfig(1e6, scaling=RopeScaling("linear", 8.0), local_theta=1e4)
    with pytest.raises(ValueError, match=r"text_config=None, and an object is required"):
        parse_config({"model_type": "gemma3"})


def test_dtypes(tmp_path):
    """bfloat16 and float16 files; a value that float16 cannot hold is an error and not an infinity."""
    fixture = load("llama2")
    exact = load_from(write_folder(tmp_path / "f32", fixture))
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors_of(fixture).items()}
    # The fixtures have bfloat16's few bits.
    assert_equal(load_from(write_folder(tmp_path / "bf16", fixture, **half)), exact)
    got, _ = load_from(tmp_path / "f32", dtype="bfloat16")
    assert got["lm_head"].dtype == ml_dtypes.bfloat16
    assert_equal(jax.tree.map(lambda x: x.astype(np.float32), got), exact[0])
    write_folder(tmp_path / "big", fixture, **{"model.norm.weight": np.full(32, 1e5, np.float32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values beyond float16's range"):
        load_from(tmp_path / "big", dtype="float16")


# Shards


class Counting(SafetensorsFolder):
    """Counts the elements read."""

    elements = 0

    def read(self, name, index):
        part = super().read(name, index)
        Counting.elements += part.size
        return part


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["llama2", "qwen3_moe", "ernie4_5_moe"])
def test_each_shard_reads_its_part(name, scan, tmp_path, monkeypatch):
    folder = write_folder(tmp_path, load(name))
    expected = load_from(folder, scan=scan)
    monkeypatch.setattr(huggingface, "SafetensorsFolder", Counting)
    Counting.elements = 0
    definition = Definition(read_config(folder), scan=scan)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices())
    shardings = tuple(named_shardings(tree, Placement(mesh)) for tree in definition.logical)
    got = load_huggingface(folder, definition, shardings)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings
    assert_equal(got, expected)
    # Every device holds a part of all but the norms and routers, and no element is read twice: replicas are copied.
    # Ernie's rotation takes pairs from all over a head, which no rule splits.
    assert Counting.elements == sum(x.size for x in tensors_of(load(name)).values())


def test_a_split_head_reads_whole_heads(tmp_path):
    """No rule splits heads by default; where one does, pairs of the rotation still find each other."""
    folder = write_folder(tmp_path, load("ernie4_5_moe"))
    definition = Definition(read_config(folder), scan=False)
    placement = Placement(
        make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()),
        ShardingRules(heads=None, kv_heads=None, head_dim="tensor"),
    )
    shardings = tuple(named_shardings(tree, placement) for tree in definition.logical)
    assert_equal(load_huggingface(folder, definition, shardings), load_from(folder))


def test_memory_stays_far_below_the_model(tmp_path, monkeypatch):
    """48 layers of 0.6 MB and 4 experts: 29 MB. Buffers are those of the few leaves being read."""
    config = moe(num_layers=48, embed_dim=128, mlp_dim=64, num_experts=4, vocab_size=32, head_dim=16)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, mlp_dim=64))
    definition = Definition(config, scan=False)
    params, biases = random_params(definition)
    save_huggingface(tmp_path, config, params, biases, dtype="float32")
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    assert total > 20e6
    shardings = one_device(definition)
    del params
    peak, (got, _) = peak_while(lambda: load_huggingface(tmp_path, definition, shardings), monkeypatch)
    # Per reader a leaf's buffer and its copy, an expert's slice of the file, and some 2 MB of names.
    assert peak < stream.READERS * 3 * largest + 3e6 < total / 3, f"{peak / 1e6:.1f} of {total / 1e6:.1f} MB"
    assert sum(x.nbytes for x in jax.tree.leaves(got)) == total


def test_blocks_bound_what_is_read_at_once(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, load("qwen3"))
    expected = load_from(folder)
    sizes = []
    read = SafetensorsFolder.read
    monkeypatch.setattr(SafetensorsFolder, "read", lambda *a: sizes.append((part := read(*a)).nbytes) or part)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1024)
    assert_equal(load_from(folder), expected)
    # A head is read whole (16 rows of 32 columns of 4 bytes), whatever the limit says.
    assert max(sizes) == 2048


# Out


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", WHOLE_FAMILIES)
def test_what_is_written_is_what_transformers_wrote(name, scan, tmp_path):
    """Names, shapes and values; transformers' own logits from these folders were compared once, for all families."""
    fixture = load(name)
    folder = write_folder(tmp_path / "in", fixture)
    params, biases = load_from(folder, scan=scan)
    save_huggingface(tmp_path / "out", FAMILIES[name], params, biases, dtype="float32")
    assert read_config(tmp_path / "out") == FAMILIES[name]
    body, theirs = json.loads((tmp_path / "out" / "config.json").read_text()), config_of(fixture)
    assert (body["model_type"], body["architectures"]) == (theirs["model_type"], theirs["architectures"])
    assert {key for key in theirs if key.startswith("hidden_act")} <= body.keys()
    # Where no layer slides, max_window_layers says nothing; a null stands for false.
    differing = {key for key, value in body.items() if (theirs.get(key, value) or False) != (value or False)}
    assert differing <= {"max_window_layers"}
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors_of(fixture))


def test_several_files_are_written(tmp_path):
    folder = write_folder(tmp_path / "in", load("ernie4_5_moe"))
    params, biases = load_from(folder)
    save_huggingface(tmp_path / "out", read_config(folder), params, biases, max_shard_bytes=8_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 8_000 + 8_192 for path in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    got = load_from(tmp_path / "out")
    assert_equal(got, (params, biases))
    stored = load_file(files[0])
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    assert sum(x.nbytes for path in files for x in load_file(path).values()) == index["metadata"]["total_size"]


def test_a_folder_with_a_model_is_not_written_over(tmp_path):
    folder = write_folder(tmp_path, load("llama2"))
    params, biases = load_from(folder)
    with pytest.raises(ValueError, match=r"already holds config\.json, model\.safetensors; name another folder"):
        save_huggingface(folder, read_config(folder), params, biases)


def test_parameters_of_another_model_are_not_written(tmp_path):
    config = FAMILIES["llama2"]
    params, biases = load_from(write_folder(tmp_path / "in", load("llama2")))
    with pytest.raises(ValueError, match=r"params and biases are not those of this config"):
        save_huggingface(tmp_path / "out", dataclasses.replace(config, num_layers=3), params, biases)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dense(window_pattern=(4, None)), r"nearest is llama, but for window_pattern=\(4, None\) \(it has \(None,\)\)"),
        (dense(attention_sinks=True), r"attention_sinks=True"),
        (dense(attention_scale=0.25), r"nearest is llama, but for attention_scale=0\.25 \(it has 0\.5\)"),
        (dense(activation="gelu", gated_mlp=False, qk_norm=True), r"no model_type holds this architecture"),
        (moe(shared_mlp_dim=24, router_bias=True, scoring="sigmoid", qk_norm=True), r"moe.shared_mlp_dim=24"),
    ],
)
def test_an_architecture_that_no_family_holds(config, message):
    with pytest.raises(ValueError, match=message):
        render_config(config)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("llama3_8b", "llama"), ("llama3_70b", "llama"), ("mixtral_8x7b", "mixtral"), ("qwen3_30b_a3b", "qwen3_moe")],
)
def test_the_known_models_have_a_family(name, model_type):
    config = importlib.import_module(f"configs.{name}").MODEL
    family, body = render_config(config)
    assert family.model_type == model_type
    assert computed_fields(parse_config(body)) == computed_fields(config)


def test_scaled_rotations_survive(tmp_path):
    for scaling in (
        RopeScaling("linear", 2.5),
        RopeScaling("llama3", 8.0, 32, 1.5, 5.0),
        RopeScaling("yarn", 4.0, 32, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3),
    ):
        config = dense(rope=RopeConfig(500.0, scaling=scaling))
        assert parse_config(render_config(config)[1]).rope == config.rope


def test_loading_into_another_model_is_refused(tmp_path):
    model = open_pretrained(write_folder(tmp_path, load("llama2")))
    other = Definition(dataclasses.replace(model.config, norm_zero_centered=True), scan=False)
    with pytest.raises(ValueError, match=r"holds another model than the one with norm_zero_centered=True"):
        model.load(other, one_device(other))
    longer = Definition(dataclasses.replace(model.config, max_positions=64, init_stddev=0.1), scan=False)
    model.load(longer, one_device(longer))
