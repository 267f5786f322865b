"""Models whose matrices are held in few bits, against the same model with the dequantised ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint import CheckpointConfig, CheckpointStore
from kernels.grouped_matmul.quantized import quantized_grouped_matmul
from kernels.target import Target
from model import attention as attention_module
from model import layers, transformer
from model import moe as moe_module
from model import products as products_module
from model.assembly import assemble, converter
from model.products import Storage, element_bits, stored_bytes
from model.rounded import Rounded, made_by
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules
from quantization.qarray import QArray, quantize
from quantization.rules import ProductRules
from serving.utilization import weight_bytes
from tests.model.tiny import COMPILE_FAST, VOCAB, assert_close, dense, execution, moe, plain_batch, random_params

SIZES = {"embed_dim": 64, "mlp_dim": 128, "head_dim": 8}

_EXPERTS = moe(**SIZES, num_layers=1)

MODELS = {
    "dense": dense(**SIZES, num_layers=1, qkv_bias=True, attention_output_bias=True, mlp_bias=True),
    "plain feed-forward, tied": dense(**SIZES, num_layers=1, gated_mlp=False, tie_embeddings=True),
    "experts": dataclasses.replace(
        _EXPERTS, moe=dataclasses.replace(_EXPERTS.moe, mlp_dim=64, shared_mlp_dim=64, num_experts=4)
    ),
}
# Every format, and the head with one of them.
RULES = {
    "w8": ProductRules("w8", head="w8"),
    "w4": ProductRules("w4"),
    "fp8": ProductRules("fp8"),
    "int8": ProductRules("int8"),
}

ONE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def rules_for(name: str, products: str) -> ProductRules:
    rules = RULES[products]
    return dataclasses.replace(rules, head="compute") if MODELS[name].tie_embeddings else rules


def described(config, rules: ProductRules, joined: bool = False, target: Target = Target("cpu")) -> Definition:  # noqa: B008
    return dataclasses.replace(Definition(config, False, "float32", joined, rules), stored_for=Storage(target))


def converted(definition: Definition, params, place=lambda names: ONE):
    """As a server does it."""
    convert = converter(definition, place)

    def one(path, array):
        return convert(tuple(key.key for key in path), jnp.asarray(array))

    tree = jax.tree_util.tree_map_with_path(one, params)
    return assemble(definition, tree, place)


def dequantized(tree, like):
    """Each quantised matrix as the parameter of `like` that it was made of."""
    wide = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QArray) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, QArray),
    )
    return jax.tree.map(lambda leaf, shape: leaf.reshape(shape.shape), wide, like)


def logits(definition, params, biases, run):
    batch = plain_batch(np.random.default_rng(2).integers(VOCAB, size=(2, 7)))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILE_FAST)
    def compute(definition, params, biases, tokens, positions):
        model = definition.bind(params, biases)
        return model.logits(model(tokens, positions, None, run).hidden_BTD, run)

    return compute(definition, params, biases, batch["tokens"], batch["positions"])


def multiply_wide(x, kernel, bias, execution, out_dtype=None):
    """The product of what both operands are rounded to, in float32."""
    format, w = kernel.get_metadata("format"), kernel.get_value().dequantize()
    if isinstance(x, Rounded):
        x = x.quantized.dequantize()
    elif format.activation is not None:
        flat = x.reshape(-1, x.shape[-1])
        x = quantize(flat, format.activation, (1, None)).dequantize().reshape(x.shape)
    y = jnp.einsum("btk,kn->btn", x, w, precision="highest")
    return y if bias is None else y + bias.reshape(-1)


@pytest.mark.parametrize(
    ("name", "products"),
    [*(("dense", products) for products in RULES), ("plain feed-forward, tied", "int8")],
)
def test_logits_are_those_of_the_rounded_operands(name, products, monkeypatch):
    joined = products != "w8"
    definition = described(MODELS[name], rules_for(name, products), joined)
    params, biases = random_params(definition.plain)
    held, run = converted(definition, params), execution(MODELS[name])
    got = logits(definition, held, biases, run)
    if products in ("w8", "w4"):
        wide = dataclasses.replace(definition.plain, joined=joined)
        want = logits(wide, dequantized(held, wide.abstract[0]), biases, run)
    else:
        for module in (layers, transformer):
            monkeypatch.setattr(module, "multiply", multiply_wide)
        want = logits(definition, held, biases, run)
    # A rounding that falls on the other side moves an activation by one of its 127 or 16 steps.
    assert_close(got, want, 1e-5 if products in ("w8", "w4") else 5e-3)
    exact = logits(definition.plain, params, biases, run)
    assert not np.allclose(got, exact, atol=1e-4), "nothing was quantised"
    assert_close(got, exact, 0.6 if products == "w4" else 0.2)


def counted(monkeypatch) -> list[str]:
    """Where rows are rounded as they are made, as the model is traced."""
    made = []

    def count(maker, fn, *args, **settings):
        made.append(maker)
        return fn(*args, **settings)

    monkeypatch.setattr(layers, "norm_rounded", functools.partial(count, "norm", layers.norm_rounded))
    monkeypatch.setattr(layers, "gate_rounded", functools.partial(count, "gate", layers.gate_rounded))
    return made


@pytest.mark.parametrize(
    ("name", "products", "devices", "makers"),
    [
        ("dense", "fp8", 1, {"qkv": "norm", "gate_up": "norm", "down": "gate"}),
        ("dense", "int8", 2, {"qkv": "norm", "gate_up": "norm", "down": "gate"}),
        ("experts", "int8", 1, {"qkv": "norm", "down": "gate"}),
        ("plain feed-forward, tied", "fp8", 2, {"qkv": "norm", "gate_up": "norm"}),
        ("dense", "w8", 1, {}),
    ],
)
def test_rows_are_rounded_as_they_are_made(name, products, devices, makers, monkeypatch):
    """By the norm and by the gate, to what the product would round them to."""
    model, placement = MODELS[name], None
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=devices), jax.devices()[:devices])
    definition = Definition(model, False, "float32", devices == 1, rules_for(name, products))
    definition = definition.stored_on(jax.devices()[0], placement=Placement(mesh))
    params, biases = random_params(definition.plain)
    run = execution(model)
    held = converted(definition, params)
    if devices > 1:
        placement = Placement(mesh)
        held = converted(definition, params, lambda names: placement.sharding(*names))
        biases = jax.device_put(biases, placement.sharding())
        run = dataclasses.replace(run, placement=placement)
    made = counted(monkeypatch)
    got = logits(definition, held, biases, run)
    assert made == [*makers.values()]
    rounded = [matrix.name for matrix in definition.matrices if matrix.format.activation and not matrix.is_of_experts]
    said = {name.rsplit("/", 1)[-1]: made_by(name, model, Placement(mesh)) for name in rounded}
    assert {kind: maker for kind, maker in said.items() if maker} == makers, "the log says otherwise"
    for module in (layers, attention_module):
        monkeypatch.setattr(module, "rows_format", lambda kernel: None)
    want = logits(definition, held, biases, run)
    assert made == [*makers.values()], "rows were not left to the products"
    # Split, XLA fuses a norm otherwise, whose last bit differs.
    assert_close(got, want, 0 if devices == 1 else 1e-5)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_norm_is_rounded_to_its_dtype_first(zero_centered):
    model = dense(**SIZES, num_layers=1, norm_zero_centered=zero_centered)
    norm = Definition(model, False, "bfloat16").bind(*random_params(Definition(model, False, "bfloat16"))).final_norm
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.bfloat16)
    got = norm.into(x, "int8", execution(model, "bfloat16"))
    want = quantize(norm(x), "int8", (1, 1, None))
    assert got.dtype == jnp.bfloat16 and got.shape == (2, 3, 64)
    jax.tree.map(np.testing.assert_array_equal, got.quantized, want)
    assert isinstance(norm.into(x, None, execution(model, "bfloat16")), jax.Array)
    rules = ShardingRules(act_embed="tensor", act_mlp=None, act_heads=None, act_vocab=None)
    split = Placement(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2]), rules)
    alone = norm.into(x, "int8", dataclasses.replace(execution(model, "bfloat16"), placement=split))
    np.testing.assert_array_equal(alone, norm(x))


def test_the_implementation_of_rounding_is_the_one_that_is_named():
    definition = described(MODELS["dense"], RULES["int8"])
    params, biases = random_params(definition.plain)
    run = dataclasses.replace(execution(MODELS["dense"]), quantized_activations="pallas")
    with pytest.raises(ValueError, match="quantized_activations impl='pallas' can't run"):
        logits(definition, converted(definition, params), biases, run)


@pytest.mark.parametrize(("name", "products"), [("experts", "w4"), ("dense", "w8"), ("dense", "int8")])
def test_split_over_devices_gives_the_same(name, products):
    placement = Placement(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2]))
    alone = Definition(MODELS[name], False, "float32", False, RULES[products])
    definition = alone.stored_on(jax.devices()[0], placement=placement)
    params, biases = random_params(definition.plain)
    run = execution(MODELS[name])
    # Groups within a device's rows of a matrix: 64 of the 128.
    one = converted(definition, params)
    want = logits(definition, one, biases, run)
    exact = logits(definition.plain, dequantized(one, definition.plain.abstract[0]), biases, run)
    assert_close(want, exact, 0.1 if products == "int8" else 1e-5)
    held = converted(definition, params, lambda names: placement.sharding(*names))
    mlp = held["prefix"][0]["mlp"]
    down = mlp["shared"]["down"] if name == "experts" else mlp["down"]
    assert down.values.sharding.shard_shape(down.values.shape) == (down.shape[0] // 2, 64)
    groups = down.scales.shape[0] if products != "w4" else down.shape[0] // 32 // 2
    assert down.scales.sharding.shard_shape(down.scales.shape) == (groups, 64)
    biases = jax.device_put(biases, placement.sharding())
    got = logits(definition, held, biases, dataclasses.replace(run, placement=placement))
    # Each device rounds its part of a split row by scales of its own.
    assert_close(got, want, 3e-2 if products == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("target", "rounded", "wide"),
    [(Target("cpu"), "rows", "rows"), (Target("gpu", (9, 0)), "columns", "fragments"), (Target("tpu"), "rows", "rows")],
)
@pytest.mark.parametrize("products", RULES)
def test_what_is_described_is_what_is_made(monkeypatch, products, target, rounded, wide):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    rules = dataclasses.replace(RULES[products], keep=("layers/1/mlp/*", "layers/*/output"))
    model = dataclasses.replace(MODELS["experts"], num_layers=2)
    definition = described(model, rules, joined=True, target=target)
    params, _ = random_params(definition.plain)
    held, abstract, logical = converted(definition, params), definition.abstract[0], definition.logical[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    ranks = jax.tree.map(len, logical, is_leaf=is_axes)
    assert ranks == jax.tree.map(lambda x: len(x.shape), abstract)
    # A pattern keeps what it names; the shared expert is a feed-forward of that layer, and so are the routed ones.
    second = held["prefix"][1]
    assert not isinstance(held["prefix"][0]["attention"]["output"], QArray)
    assert not any(isinstance(leaf, QArray) for leaf in jax.tree.leaves(second["mlp"], is_leaf=is_quantized))
    qkv = second["attention"]["qkv"].check()
    assert qkv.layout == (rounded if products in ("fp8", "int8") else wide)
    assert isinstance(held["lm_head"], QArray) == (products == "w8")


def is_quantized(node) -> bool:
    return isinstance(node, QArray)


@pytest.mark.parametrize(
    ("products", "layout", "rounded"),
    [("int8", "columns", "int8"), ("w8", "fragments", None), ("w4", "fragments", None)],
)
def test_experts_may_be_multiplied_in_few_bits(products, layout, rounded, monkeypatch):
    """By kernels that are Hopper's alone: the specification stands for them."""
    placement, calls, made = Placement(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])), [], []
    # Each device has whole tiles of 64.
    model = dataclasses.replace(MODELS["experts"], moe=dataclasses.replace(MODELS["experts"].moe, mlp_dim=128))

    def product(rows, kernel, group_sizes, *, activation, out_dtype, impl, target):
        calls.append((kernel.layout, rows.dtype.name if isinstance(rows, QArray) else activation, impl))
        made.append(isinstance(rows, QArray))
        settings = {"activation": activation, "out_dtype": out_dtype, "impl": "reference"}
        return quantized_grouped_matmul(rows, kernel, group_sizes, **settings)

    monkeypatch.setattr(products_module, "choose_grouped", lambda impl, case, target: ("pallas", "a test"))
    monkeypatch.setattr(moe_module, "quantized_grouped_matmul", product)
    definition = Definition(model, False, "float32", False, RULES[products])
    definition = definition.stored_on(jax.devices()[0], placement=placement)
    params, biases = random_params(definition.plain)
    run = dataclasses.replace(execution(model), placement=placement)
    held = converted(definition, params, lambda names: placement.sharding(*names))
    got = logits(definition, held, jax.device_put(biases, placement.sharding()), run)
    assert calls == [(layout, rounded, "auto" if rounded is None else "pallas")] * 3
    # What the gate makes is rounded by it, with a scale for each device's part of a row, and the product does no more.
    assert made == [False, False, rounded is not None]
    down = next(matrix for matrix in definition.matrices if matrix.is_of_experts and matrix.name.endswith("down"))
    assert made_by(down.name, model, placement) == "gate" and down.row_parts(placement) == 2
    one = converted(definition, params)
    exact = logits(definition.plain, dequantized(one, definition.plain.abstract[0]), biases, execution(model))
    assert_close(got, exact, 0.1 if rounded else 1e-5)
    assert rounded is None or not np.allclose(got, exact, atol=1e-4), "rows were not rounded"
    assert not any(matrix.is_dequantized for matrix in definition.matrices)
    capacity = dataclasses.replace(model, moe=dataclasses.replace(model.moe, dispatch="capacity"))
    experts = [matrix for matrix in dataclasses.replace(definition, config=capacity).matrices if matrix.is_of_experts]
    assert experts and all(matrix.format.activation is None and matrix.is_dequantized for matrix in experts)


def test_experts_by_a_kernel_that_cannot_run_are_refused():
    definition = Definition(MODELS["experts"], False, "float32", False, RULES["w8"])
    with pytest.raises(ValueError, match="quantized_grouped_matmul impl='pallas' can't run"):
        definition.stored_on(jax.devices()[0], "pallas").matrices  # noqa: B018


def test_joined_matrices_lie_side_by_side():
    apart, joined = (described(MODELS["dense"], RULES["w4"], joined) for joined in (False, True))
    params, _ = random_params(apart.plain)
    parts, whole = (converted(definition, params)["prefix"][0] for definition in (apart, joined))
    for name, names in (("qkv", ("query", "key", "value")), ("gate_up", ("gate", "up"))):
        block = "attention" if name == "qkv" else "mlp"
        want = jnp.concatenate([parts[block][part].dequantize() for part in names], axis=1)
        np.testing.assert_array_equal(whole[block][name].dequantize(), want)


def test_bytes_are_those_of_four_bits():
    definition = described(dense(**SIZES, num_layers=1), RULES["w4"])
    shapes = [((64, 64), 1), ((64, 32), 2), ((64, 64), 1), ((64, 128), 2), ((128, 64), 1)]
    values = sum(k * n * count for (k, n), count in shapes)
    scales = sum(k // (128 if k == 128 else 64) * n * count for (k, n), count in shapes)
    params = definition.abstract[0]
    assert stored_bytes(params["prefix"]) == values // 2 + 4 * scales + 4 * 2 * 64
    held = weight_bytes(definition)
    assert held.dense == stored_bytes(params) - 4 * 64 * VOCAB and held.expert == 0
    assert element_bits(jnp.int4) == 4 and element_bits(jnp.bfloat16) == 16


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_wide_weights_are_those_of_the_formula(name):
    from perf.traffic import Traffic

    config = MODELS[name]
    own = Traffic(config, weight_bytes=4, cache_bytes=4)
    given = Traffic(config, weight_bytes=4, cache_bytes=4, stored=weight_bytes(Definition(config, False, "float32")))
    for experts in (None,) if config.moe is None else (0, 1, 4):
        assert given.weights(experts) == own.weights(experts)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match=r"precision.head=w8 needs a head of its own"):
        described(MODELS["plain feed-forward, tied"], RULES["w8"]).abstract  # noqa: B018
    with pytest.raises(ValueError, match="groups of 128, 64, 32 inputs, and layers/0/attention/output has 16"):
        described(dense(**SIZES | {"head_dim": 2}), RULES["w4"]).abstract  # noqa: B018
    with pytest.raises(ValueError, match=r"precision.keep=\*/router matches no matrix"):
        described(MODELS["experts"], ProductRules("w8", keep=("*/router",))).abstract  # noqa: B018


def test_a_quantised_tree_is_saved_and_restored(tmp_path):
    placement = Placement(make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2]))
    alone = Definition(MODELS["experts"], False, "float32", False, RULES["w4"])
    definition = alone.stored_on(jax.devices()[0], placement=placement)
    params, _ = random_params(definition.plain)
    held = converted(definition, params)
    config = CheckpointConfig(every=1)
    with CheckpointStore(tmp_path, config, architecture={}, run_config={}, on_note=print) as store:
        store.save(1, {"params": held}, data_state={})
        store.wait()
    wanted = jax.tree.map(
        lambda x, names: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.sharding(*names)),
        *(tree[0] for tree in (definition.abstract, definition.logical)),
    )
    with CheckpointStore(tmp_path, config, architecture={}, run_config={}, on_note=print) as store:
        restored, _ = store.restore({"params": wanted})
    assert jax.tree.structure(restored) == jax.tree.structure({"params": held})
    jax.tree.map(np.testing.assert_array_equal, restored["params"], held)
