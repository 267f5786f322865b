"""Jaxpr count: hand-made programs with known counts, and the ledger against a hand-written transformer."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from model.config import ModelConfig, MoEConfig
from perf import flops
from perf.jaxpr import count_matmul_flops

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8  # x @ w


def total(program, *args, **kwargs):
    return count_matmul_flops(program, *args, **kwargs)["total"]


def test_dot_general_batch_and_contraction():
    a, b = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((3, 5, 6), jnp.float32)
    assert total(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 4 * 5 * 6
    assert total(lambda a, b: jnp.einsum("bij,bjk->ik", a, b), a, b) == 2 * 3 * 4 * 5 * 6
    v = jax.ShapeDtypeStruct((5,), jnp.float32)
    assert total(lambda v: jnp.dot(v, v), v) == 2 * 5
    assert total(jnp.outer, v, v) == 0
    assert total(lambda v: jnp.einsum("i,j->ij", v, v), v) == 0


def test_vector_products_are_told_apart():
    v = jax.ShapeDtypeStruct((4,), jnp.float32)
    count = count_matmul_flops(lambda v, x, w: (jnp.einsum("i,ij->j", v, x), x @ w), v, X, W)
    assert count["vector_products"] == 2 * 4 * 8 and count["total"] == ONE + 2 * 4 * 8
    # An axis of size one is an axis: a single token is still a row of a matrix.
    row = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    assert count_matmul_flops(jnp.matmul, row, W)["vector_products"] == 0


def test_a_closed_jaxpr_counts_like_its_function():
    def program(x, w):
        return jax.nn.relu(x @ w) @ w

    assert total(jax.make_jaxpr(program)(X, W)) == total(program, X, W) == 2 * ONE


def test_scan_multiplies_by_its_length():
    def program(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert total(program, X, W) == 7 * ONE
    nested = jax.make_jaxpr(lambda x, w: jax.lax.scan(lambda x, _: (program(x, w), None), x, length=3)[0])(X, W)
    assert total(nested) == 21 * ONE
    assert total(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), X, W) == 5 * ONE


def test_while_needs_its_trip_count():
    def program(x, w, n):
        with jax.named_scope("refine"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)

    with pytest.raises(ValueError, match=r"test_perf_jaxpr.*scope 'refine'.*trip_counts=\{'refine': n\}"):
        count_matmul_flops(program, X, W, 3)
    assert total(program, X, W, 3, trip_counts={"refine": 6}) == 6 * ONE
    # A loop without matmuls needs none.
    assert total(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x + 1, x), X, 3) == 0


def test_cond_counts_the_dearest_branch():
    def program(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w)

    assert total(program, X, W) == 2 * ONE
    assert total(lambda i, x, w: jax.lax.switch(i, [lambda: x, lambda: x @ w, lambda: x * 2]), 0, X, W) == ONE


def test_calls_custom_rules_and_remat():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def backward(residual, g):
        x, w = residual
        return g @ w.T, x.T @ g + x.T @ g * 0

    product.defvjp(lambda x, w: (x @ w, (x, w)), backward)

    @jax.custom_jvp
    def other(x, w):
        return x @ w

    other.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))
    assert total(jax.jit(product), X, W) == ONE
    assert total(other, X, W) == ONE
    # The written backward has three products.
    assert total(jax.value_and_grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, W) == 4 * ONE
    assert total(jax.checkpoint(lambda x, w: x @ w), X, W) == ONE


def test_remat_counts_recompute():
    def block(x, w):
        return jnp.sin(x @ w) @ w

    def gradient(block):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(block(x, w))), argnums=(0, 1))

    assert total(gradient(block), X, W) == 6 * ONE
    # sin(block) reads the block's output, which is saved; the first product runs again, the second does not.
    assert total(gradient(jax.checkpoint(block)), X, W) == 7 * ONE


def test_dead_products_are_not_counted():
    assert total(lambda x, w: ((x @ w) @ w, x)[1], X, W) == 0


def test_ragged_dot_forward_and_backward():
    lhs, rhs = jax.ShapeDtypeStruct((16, 4), jnp.float32), jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert total(jax.lax.ragged_dot, lhs, rhs, sizes) == 2 * 16 * 4 * 5
    gradient = jax.grad(lambda lhs, rhs, sizes: jnp.sum(jax.lax.ragged_dot(lhs, rhs, sizes) ** 2), argnums=(0, 1))
    count = count_matmul_flops(gradient, lhs, rhs, sizes)
    assert count["total"] == 3 * 2 * 16 * 4 * 5
    assert count["by_primitive"] == {"ragged_dot_general": count["total"]}


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("a")
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def product(axis_names):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names=axis_names
        )

    assert total(product({"a"}), x, W) == 2 * 8 * 8 * 8
    # Manual over "b" too: its two devices repeat the work, as they do when it runs.
    assert total(product({"a", "b"}), x, W) == 2 * (2 * 8 * 8 * 8)


def test_kernels_need_a_count():
    def body(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def kernel(x, w, cost=None):
        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((4, 8), jnp.float32), cost_estimate=cost)(x, w)

    with pytest.raises(ValueError, match=r"'pallas_call' at .* give the kernel a cost_estimate"):
        count_matmul_flops(kernel, X, W)
    estimate = pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0)
    assert total(functools.partial(kernel, cost=estimate), X, W) == 123
    assert total(kernel, X, W, kernel_flops={"pallas_call": lambda eqn: 7}) == 7
    image, filters = jax.ShapeDtypeStruct((1, 3, 8), jnp.float32), jax.ShapeDtypeStruct((2, 3, 3), jnp.float32)
    with pytest.raises(ValueError, match="conv_general_dilated"):
        count_matmul_flops(lambda i, f: jax.lax.conv(i, f, (1,), "SAME"), image, filters)


def test_scopes_are_named():
    def program(x, w):
        with jax.named_scope("outer"):
            return jax.lax.scan(lambda x, _: (jax.named_scope("inner")(jnp.dot)(x, w), None), x, length=2)[0] @ w

    count = count_matmul_flops(program, X, W)
    assert count["by_scope"] == {"outer/inner": 2 * ONE, "outer": ONE}


DENSE = ModelConfig(
    vocab_size=40, embed_dim=16, mlp_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=32
)
MOE = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=12, shared_mlp_dim=8),
)
BATCH, TIME = 2, 16


def weights(config):
    embed, heads, kv_heads = config.embed_dim, config.num_heads, config.num_kv_heads
    head = config.head_dim
    shapes = {
        "query": (embed, heads, head),
        "key": (embed, kv_heads, head),
        "value": (embed, kv_heads, head),
        "output": (heads, head, embed),
    }
    if config.moe is None:
        shapes |= {"gate": (embed, config.mlp_dim), "up": (embed, config.mlp_dim), "down": (config.mlp_dim, embed)}
    else:
        experts, width, shared = config.moe.num_experts, config.moe.mlp_dim, config.moe.shared_mlp_dim
        shapes |= {
            "router": (embed, experts),
            "expert_gate": (experts, embed, width),
            "expert_up": (experts, embed, width),
            "expert_down": (experts, width, embed),
            "shared_gate": (embed, shared),
            "shared_up": (embed, shared),
            "shared_down": (shared, embed),
        }
    layers = {name: jax.ShapeDtypeStruct((config.num_layers, *shape), jnp.float32) for name, shape in shapes.items()}
    table = jax.ShapeDtypeStruct((config.vocab_size, embed), jnp.float32)
    return {"layers": layers, "embedding": table, "head": jax.ShapeDtypeStruct(table.shape[::-1], jnp.float32)}


def experts(config, layer, x_MD):
    scores, chosen = jax.lax.top_k(jax.nn.softmax(x_MD @ layer["router"]), config.moe.experts_per_token)
    order = jnp.argsort(chosen.reshape(-1))
    rows = jnp.repeat(x_MD, config.moe.experts_per_token, axis=0)[order]
    sizes = jnp.bincount(chosen.reshape(-1), length=config.moe.num_experts)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, layer["expert_gate"], sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, layer["expert_up"], sizes)
    out = jax.lax.ragged_dot(hidden, layer["expert_down"], sizes)[jnp.argsort(order)]
    routed = (out.reshape(*scores.shape, -1) * scores[..., None]).sum(1)
    shared = (jax.nn.silu(x_MD @ layer["shared_gate"]) * (x_MD @ layer["shared_up"])) @ layer["shared_down"]
    return routed + shared


def transformer(config, remat, params, tokens):
    """Cross-entropy of a transformer with dense masked attention, layers scanned."""

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)

    def block(x_BTD, layer):
        y = norm(x_BTD)
        q, k, v = (jnp.einsum("btd,dnh->btnh", y, layer[name]) for name in ("query", "key", "value"))
        k, v = (jnp.repeat(a, config.num_heads // config.num_kv_heads, axis=2) for a in (k, v))
        mask = jnp.tril(jnp.ones((TIME, TIME), bool))
        probs = jax.nn.softmax(jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k), -1e9))
        attended = jnp.einsum("bnts,bsnh->btnh", probs, v)
        x_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", attended, layer["output"])
        y = norm(x_BTD)
        if config.moe is not None:
            return x_BTD + experts(config, layer, y.reshape(-1, config.embed_dim)).reshape(x_BTD.shape), None
        return x_BTD + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"], None

    policies = {
        "none": lambda f: f,
        "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
        "full": jax.checkpoint,
    }
    x, _ = jax.lax.scan(policies[remat](block), params["embedding"][tokens], params["layers"])
    logits = norm(x) @ params["head"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1).mean()


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_ledger_equals_the_jaxpr_forward_and_training(config):
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)
    book = flops.ledger(config, sequence_length=TIME, batch_size=BATCH, attention="full")
    loss = functools.partial(transformer, config, "none")
    assert total(loss, weights(config), tokens) == book.executed_forward
    assert total(jax.value_and_grad(loss), weights(config), tokens) == book.hardware_flops == 3 * book.executed_forward


@pytest.mark.parametrize(
    ("config", "remat"),
    [(DENSE, "dots"), (DENSE, "full"), (MOE, "dots"), (MOE, "full")],
    ids=["dense-dots", "dense-full", "moe-dots", "moe-full"],
)
def test_ledger_recompute_equals_the_jaxpr(config, remat):
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)
    book = flops.ledger(config, sequence_length=TIME, batch_size=BATCH, attention="full", remat=remat)
    loss = functools.partial(transformer, config, remat)
    assert total(jax.value_and_grad(loss), weights(config), tokens) == book.hardware_flops
