"""The transformer against its definition in NumPy, what may influence what, and scanned against unrolled layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, RopeConfig, RopeScaling
from model.layers import RMSNorm
from model.parameter import Creator
from model.transformer import Definition, plan_layers
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from perf.flops import count_params
from perf.jaxpr import count_matmul_flops
from tests.model import oracle
from tests.model.tiny import (
    COMPILE_FAST,
    assert_close,
    dense,
    execution,
    hidden,
    moe,
    packed_batch,
    plain_batch,
    random_params,
)

YARN = RopeScaling("yarn", 4.0, original_max_positions=16, beta_fast=2.0, beta_slow=0.5)
LLAMA3 = RopeScaling("llama3", 8.0, original_max_positions=16)

# The families that fields must express, each with the fields that it takes beside the sizes.
FAMILIES: dict[str, ModelConfig] = {
    "llama 3": dense(rope=RopeConfig(theta=100.0, scaling=LLAMA3)),
    "qwen 2.5": dense(qkv_bias=True, tie_embeddings=True),
    "qwen 3": dense(qk_norm=True, num_kv_heads=8),
    "gemma 2": dense(
        norm_placement="both",
        norm_zero_centered=True,
        tie_embeddings=True,
        embedding_scale=4.0,
        activation="gelu_tanh",
        attention_scale=0.3,
        attention_soft_cap=2.0,
        final_soft_cap=3.0,
        window_pattern=(3, None),
    ),
    "gemma 3": dense(
        norm_placement="both",
        norm_zero_centered=True,
        qk_norm=True,
        num_kv_heads=1,
        num_layers=3,
        window_pattern=(3, 3, None),
        rope=RopeConfig(theta=1000.0, local_theta=10.0, scaling=RopeScaling("linear", 8.0)),
    ),
    "post-norm, plain MLP, half-rotated": dense(
        norm_placement="post",
        gated_mlp=False,
        mlp_bias=True,
        attention_output_bias=True,
        activation="gelu",
        rope=RopeConfig(theta=10.0, fraction=0.5),
    ),
    "mixtral": moe(window_pattern=(4,)),
    "qwen3-moe": moe(qk_norm=True, experts_per_token=3, normalize_weights=False),
    "deepseek-style": moe(
        num_layers=3,
        num_dense_layers=1,
        shared_mlp_dim=8,
        scoring="sigmoid",
        weight_scale=2.5,
        router_bias=True,
        bias_update_rate=0.01,
    ),
    "gpt-oss": moe(
        attention_sinks=True,
        qkv_bias=True,
        attention_output_bias=True,
        window_pattern=(3, None),
        rope=RopeConfig(theta=50.0, scaling=YARN),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_definition(family):
    config = FAMILIES[family]
    definition = Definition(config, scan=False)
    params, biases = random_params(definition)
    batch = packed_batch(rows=3, length=12)
    run = execution(config)

    @jax.jit
    def forward(params, biases, tokens, positions, segments):
        model = definition.bind(params, biases)
        hidden_BTD = model(tokens, positions, segments, run).hidden_BTD
        return hidden_BTD, model.logits(hidden_BTD, run)

    got = forward(params, biases, batch["tokens"], batch["positions"], batch["segments"])
    want = oracle.forward(config, params, biases, batch)
    assert_close(got, want, 3e-5)
    if config.final_soft_cap is not None:
        assert float(jnp.abs(got[1]).max()) < config.final_soft_cap


def test_grouped_heads_are_repeated_heads():
    grouped, full = dense(num_kv_heads=2), dense(num_kv_heads=8)
    params, biases = random_params(Definition(grouped, scan=False))
    repeated = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.repeat(leaf, 4, axis=-2) if path[-1].key in ("key", "value") else leaf, params
    )
    batch = packed_batch(rows=2)
    want = hidden(Definition(grouped, scan=False), params, biases, batch)
    assert_close(hidden(Definition(full, scan=False), repeated, biases, batch), want, 1e-5)


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(5, 8)), rng.normal(size=8)
    for zero_centered in (False, True):
        norm = RMSNorm(
            8, dense(norm_zero_centered=zero_centered, norm_epsilon=0.1), Creator(jax.random.key(0), "float32")
        )
        np.testing.assert_array_equal(norm.scale[...], 0.0 if zero_centered else 1.0)
        norm.scale[...] = jnp.asarray(scale, jnp.float32)
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * (scale + zero_centered)
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), want, rtol=1e-5, atol=1e-6)
        assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def changed(out, reference) -> np.ndarray:
    """Tokens whose hidden state is not that of the reference row: bool [B, T]."""
    return np.asarray(jnp.abs(out - reference).max(axis=-1) > 1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_each_layer_has_its_window(scan):
    """Windows of 2, 4, 2 and 4 tokens carry a token 1 + 3 + 1 + 3 places on, and no further."""
    definition = Definition(dense(num_layers=4, window_pattern=(2, 4)), scan=scan)
    tokens = np.random.default_rng(0).integers(64, size=(1, 20)).repeat(3, axis=0)
    tokens[1, 0] += 1
    tokens[2, 7] += 1
    out = hidden(definition, *random_params(definition), plain_batch(tokens % 64))
    np.testing.assert_array_equal(changed(out[1], out[0]), np.arange(20) <= 8)
    index = np.arange(20)
    np.testing.assert_array_equal(changed(out[2], out[0]), (index >= 7) & (index <= 15))


@pytest.mark.parametrize("config", [dense(window_pattern=(4, None)), moe()], ids=["dense", "moe"])
def test_the_future_and_other_documents_change_nothing(config):
    """Row 0 of four documents and padding; in row r document r is another one."""
    definition = Definition(config, scan=True)
    rng = np.random.default_rng(0)
    segments = np.repeat([1, 2, 3, 4, 0], [3, 5, 1, 4, 3])[None].repeat(6, axis=0)
    positions = np.concatenate([np.arange(n) for n in (3, 5, 1, 4, 3)])[None].repeat(6, axis=0)
    tokens = rng.integers(64, size=(1, 16)).repeat(6, axis=0)
    for row in range(1, 5):
        tokens[row] = np.where(segments[row] == row, (tokens[row] + 1) % 64, tokens[row])
    # The last row: from the third token of the second document on, everything is another.
    tokens[5, 5:] = (tokens[5, 5:] + 1) % 64
    batch = {"tokens": tokens, "positions": positions, "segments": segments}
    out = hidden(definition, *random_params(definition), batch)
    for row in range(1, 5):
        np.testing.assert_array_equal(changed(out[row], out[0]), segments[row] == row)
    np.testing.assert_array_equal(changed(out[5], out[0]), np.arange(16) >= 5)


def test_segments_equal_rows_of_their_own():
    """A packed document gives what it gives alone."""
    config = dense(window_pattern=(4, None))
    definition = Definition(config, scan=True)
    params = random_params(definition)
    tokens = np.random.default_rng(0).integers(64, size=(1, 12))
    packed = {
        "tokens": tokens,
        "segments": np.repeat([1, 2], [5, 7])[None],
        "positions": np.concatenate([np.arange(5), np.arange(7)])[None],
    }
    together = hidden(definition, *params, packed)
    alone = hidden(definition, *params, plain_batch(tokens[:, 5:]))
    np.testing.assert_allclose(together[:, 5:], alone, rtol=1e-4, atol=1e-5)


# Layers 0 | (1 2) (3 4) | 5: a dense prefix, two scanned blocks of two layers, and a remainder.
MIXED = moe(num_layers=6, num_dense_layers=1, window_pattern=(4, None), rope=RopeConfig(local_theta=10.0))


def unrolled(config, tree):
    """A tree of the scanned model as the unrolled model has it."""
    if not tree:
        return {}
    plan = plan_layers(config, scan=True)
    layers = dict(zip(plan.prefix, (tree.get("prefix", {}).get(i) for i in range(len(plan.prefix))), strict=True))
    for offset in range(plan.period if plan.num_blocks else 0):
        for block in range(plan.num_blocks):
            layer = len(plan.prefix) + block * plan.period + offset
            layers[layer] = jax.tree.map(lambda leaf, block=block: leaf[block], tree["blocks"][offset])
    layers |= {layer: tree["suffix"][i] for i, layer in enumerate(plan.suffix)}
    own = {key: value for key, value in tree.items() if key not in ("prefix", "blocks", "suffix")}
    return own | {"prefix": {layer: value for layer, value in layers.items() if value is not None}}


def test_plan_of_a_prefix_blocks_and_a_remainder():
    assert plan_layers(MIXED, scan=True) == (range(1), 2, 2, range(5, 6))
    assert plan_layers(MIXED, scan=False) == (range(6), 1, 0, range(6, 6))
    assert plan_layers(dense(num_layers=2, window_pattern=(4, 4, None)), scan=True) == (range(0), 3, 0, range(2))


def loss_and_gradient(definition, run):
    def loss(params, biases, tokens, positions, segments, cotangent):
        out = definition.bind(params, biases)(tokens, positions, segments, run)
        return jnp.sum(out.hidden_BTD * cotangent), out

    return jax.value_and_grad(loss, has_aux=True)


def compiled(definition, run):
    return jax.jit(loss_and_gradient(definition, run), compiler_options=COMPILE_FAST)


def arguments(config):
    batch = packed_batch(rows=2)
    cotangent = np.random.default_rng(1).normal(size=(2, 16, config.embed_dim)).astype(np.float32)
    return batch["tokens"], batch["positions"], batch["segments"], cotangent


def test_scanned_equals_unrolled():
    scanned, plain = Definition(MIXED, scan=True), Definition(MIXED, scan=False)
    params, biases = random_params(scanned)
    run = execution(MIXED, check_finite=True, grouped_matmul="ragged_dot")
    (loss, out), gradient = jax.jit(loss_and_gradient(scanned, run), compiler_options=COMPILE_FAST)(
        params, biases, *arguments(MIXED)
    )
    flat = unrolled(MIXED, params), unrolled(MIXED, biases)
    (want, want_out), want_gradient = jax.jit(loss_and_gradient(plain, run), compiler_options=COMPILE_FAST)(
        *flat, *arguments(MIXED)
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert_close(out, want_out, 1e-5)
    assert out.moe.load_E.shape == (5, 8) and out.finite_L.shape == (6,) and bool(out.finite_L.all())
    assert_close(unrolled(MIXED, gradient), want_gradient, 1e-4)


def test_the_same_key_gives_the_same_parameters_scanned_or_not():
    config = moe(num_layers=3, num_dense_layers=1, router_bias=True, bias_update_rate=0.1)
    key = jax.random.key(3)
    params, biases = jax.jit(Definition(config, scan=True).init, compiler_options=COMPILE_FAST)(key)
    want = jax.jit(Definition(config, scan=False).init, compiler_options=COMPILE_FAST)(key)
    got = unrolled(config, params), unrolled(config, biases)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)
    layers = [want[0]["prefix"][i]["attention"]["query"] for i in range(3)]
    assert not any(np.allclose(layers[0], layer) for layer in layers[1:]), "layers start equal"


def test_remat_changes_the_work_and_not_the_values():
    config = moe(num_layers=2, window_pattern=(4,))
    definition = Definition(config, scan=True)
    params, biases = random_params(definition)
    outcomes, flops = {}, {}
    for remat in ("none", "dots", "full"):
        run = loss_and_gradient(definition, execution(config, remat=remat, grouped_matmul="ragged_dot"))
        outcomes[remat] = jax.jit(run, compiler_options=COMPILE_FAST)(params, biases, *arguments(config))
        flops[remat] = count_matmul_flops(run, params, biases, *arguments(config))["total"]
    for remat in ("dots", "full"):
        assert_close(outcomes[remat], outcomes["none"], 1e-5)
    assert flops["none"] < flops["dots"] < flops["full"]


ALL = FAMILIES | {"mixed": MIXED, "capacity": moe(dispatch="capacity", mlp_bias=True, shared_mlp_dim=4)}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", ALL)
def test_parameters_are_counted_and_placed(name, scan):
    definition = Definition(ALL[name], scan=scan)
    placement = Placement(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()))
    params, biases = definition.abstract
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_params(definition.config).total
    for shapes, logical in zip((params, biases), definition.logical, strict=True):
        names = jax.tree.leaves(logical, is_leaf=lambda node: isinstance(node, tuple))
        for leaf, axes in zip(jax.tree.leaves(shapes), names, strict=True):
            assert len(axes) == leaf.ndim
            placement.sharding(*axes)
    stacked = [axes for axes in names if axes[0] == "layers"]
    assert bool(stacked) == (scan and bool(names) and bool(plan_layers(definition.config, True).num_blocks))


def equations(jaxpr, outer=""):
    """(scope, equation) of a jaxpr and of all inside it; inner scopes are relative to the equation around them."""
    for equation in jaxpr.eqns:
        scope = f"{outer}/{equation.source_info.name_stack}"
        yield scope, equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, scope)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_float32_where_it_matters(scoring):
    """Under bfloat16 compute: the router's product, every norm's and every softmax's arithmetic."""
    config = moe(scoring=scoring, qk_norm=True, num_dense_layers=1, attention_soft_cap=5.0)
    definition = Definition(config, scan=False)
    params, biases = definition.abstract
    run = execution(config, "bfloat16", grouped_matmul="ragged_dot")
    integers = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def forward(params, biases, tokens, positions, segments):
        model = definition.bind(params, biases)
        out = model(tokens, positions, segments, run).hidden_BTD
        return out, model.logits(out, run)

    closed = jax.make_jaxpr(forward)(params, biases, integers, integers, integers)
    assert [aval.dtype for aval in closed.out_avals] == [jnp.bfloat16, jnp.float32]
    seen = {"router": 0, "norm": 0, "softmax": 0, "product": 0}
    for scope, equation in equations(closed.jaxpr):
        inputs = [v.aval.dtype for v in equation.invars]
        match equation.primitive.name:
            case "dot_general" if "router" in scope:
                seen["router"] += config.moe.num_experts in equation.outvars[0].aval.shape
                assert set(inputs) == {jnp.dtype("float32")}, scope
            case "rsqrt":
                seen["norm"] += 1
                assert inputs == [jnp.float32], scope
            case "exp" | "exp2" | "logistic" | "tanh" if "attention" in scope or "router" in scope:
                seen["softmax"] += 1
                assert inputs == [jnp.float32], scope
            case "dot_general" | "ragged_dot_general" if "attention" in scope or "mlp" in scope or "grouped" in scope:
                seen["product"] += inputs[:2] == [jnp.bfloat16, jnp.bfloat16]
    assert seen["router"] >= 1 and seen["norm"] == 4 + 4 + 1 and seen["softmax"] >= 3
    assert seen["product"] >= 2 * 4 + 3 + 3, seen
