"""AdamW and Muon by logical axes: parity with hand-written updates, groups, shapes, shardings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from training.optimizer import MuonConfig, OptimizerConfig, make_optimizer, optimizer_state_shardings, orthogonalize
from training.schedule import ScheduleConfig

CONSTANT = ScheduleConfig(kind="constant", peak_lr=0.01, warmup_steps=0)
PLAIN = OptimizerConfig(schedule=CONSTANT, weight_decay=0.1, clip_norm=None)
# float32 products: parity tests compare layouts, and bfloat16 would hide small differences.
MUON = dataclasses.replace(PLAIN, kind="muon", muon=MuonConfig(ns_dtype="float32"))

# name: (shape, logical axes, decays under AdamW, layout under Muon)
PARAMETERS = {
    "table": ((12, 8), ("vocab", "embed"), False, None),
    "head": ((8, 12), ("embed", "vocab"), True, None),
    "norm": ((8,), ("norm",), False, None),
    "norms": ((3, 8), ("layers", "norm"), False, None),
    "router": ((8, 4), ("router", None), True, None),
    "routers": ((3, 8, 4), ("layers", "router", None), True, None),
    "query": ((8, 2, 4), ("embed", "heads", "head_dim"), True, (8, 8)),
    "output": ((3, 2, 4, 8), ("layers", "heads", "head_dim", "embed"), True, (8, 8)),
    "query_bias": ((3, 2, 4), ("layers", "heads", "head_dim"), False, None),
    "up_bias": ((16,), ("mlp",), False, None),
    "expert_bias": ((3, 4, 16), ("layers", "experts", "expert_mlp"), False, None),
    "sinks": ((2,), ("heads",), False, None),
    "up": ((8, 16), ("embed", "mlp"), True, (8, 16)),
    "down": ((3, 16, 8), ("layers", "mlp", "embed"), True, (16, 8)),
    "expert_up": ((4, 8, 16), ("experts", "expert_embed", "expert_mlp"), True, (8, 16)),
    "expert_down": ((3, 4, 16, 8), ("layers", "experts", "expert_mlp", "expert_embed"), True, (16, 8)),
}
LOGICAL = {name: logical for name, (_, logical, _, _) in PARAMETERS.items()}


@functools.cache
def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, (shape, *_) in PARAMETERS.items()}


def run(config, logical, params, gradients):
    """Parameters after one update per gradient."""
    optimizer = make_optimizer(config, 100, logical)
    state = optimizer.init(params)

    @jax.jit
    def step(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params


def test_adamw_equals_the_update_by_hand():
    config = dataclasses.replace(PLAIN, b1=0.8, b2=0.9, eps=1e-3)
    gradients = [tree(seed) for seed in (1, 2, 3)]
    got = run(config, LOGICAL, tree(0), gradients)
    for name, (_, _, decays, _) in PARAMETERS.items():
        p, m, v = np.float64(tree(0)[name]), 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = np.float64(gradient[name])
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            adam = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            p = p - 0.01 * (adam + 0.1 * decays * p)
        np.testing.assert_allclose(got[name], p, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_alone_shrinks_matrices_only(kind):
    config = dataclasses.replace(MUON, kind=kind)
    zero = jax.tree.map(jnp.zeros_like, tree(0))
    got = run(config, LOGICAL, tree(0), [zero])
    for name, (_, _, decays, _) in PARAMETERS.items():
        factor = 1 - 0.01 * 0.1 if decays else 1.0
        np.testing.assert_allclose(got[name], factor * tree(0)[name], rtol=1e-6, err_msg=name)


def test_embedding_decays_if_asked():
    config = dataclasses.replace(PLAIN, decay_embeddings=True)
    got = run(config, LOGICAL, tree(0), [jax.tree.map(jnp.zeros_like, tree(0))])
    np.testing.assert_allclose(got["table"], 0.999 * tree(0)["table"], rtol=1e-6)
    np.testing.assert_array_equal(got["norm"], tree(0)["norm"])


def test_clipping_scales_the_global_norm():
    # AdamW is blind to the gradient's size, except where eps outweighs it.
    base = dataclasses.replace(PLAIN, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0)
    gradient = tree(1)
    norm = float(jax.jit(optax.tree.norm)(gradient))

    def update(clip_norm):
        optimizer = make_optimizer(dataclasses.replace(base, clip_norm=clip_norm), 100, LOGICAL)
        return jax.jit(lambda params: optimizer.update(gradient, optimizer.init(params), params)[0])(tree(0))

    whole = update(None)
    for clipped, factor in ((update(norm / 4), 0.25), (update(norm * 2), 1.0)):
        jax.tree.map(lambda x, y, f=factor: np.testing.assert_allclose(x, f * y, rtol=1e-3), clipped, whole)


@pytest.mark.parametrize("scaling", ["rms", "spectral"])
def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw(scaling):
    muon = MuonConfig(ns_dtype="float32", scaling=scaling, lr_scale=2.0)
    config = dataclasses.replace(MUON, muon=muon, weight_decay=0.0)
    got = run(config, LOGICAL, tree(0), [tree(1)])
    adamw = run(dataclasses.replace(config, kind="adamw"), LOGICAL, tree(0), [tree(1)])
    for name, (_, _, _, layout) in PARAMETERS.items():
        if layout is None:
            np.testing.assert_array_equal(got[name], adamw[name], err_msg=name)
            continue
        rows, columns = layout
        scale = 0.2 * max(rows, columns) ** 0.5 if scaling == "rms" else max(1, columns / rows) ** 0.5
        moved = ((tree(0)[name] - got[name]) / (0.02 * scale)).reshape(-1, rows, columns)
        singular = np.linalg.svd(moved, compute_uv=False)
        assert singular.min() > 0.3, name
        assert singular.max() < 1.3, name
        assert abs(singular.mean() - 1) < 0.15, name
        # Descent: against the gradient in every matrix.
        assert (np.einsum("bij,bij->b", moved, tree(1)[name].reshape(moved.shape)) > 0).all(), name


def test_muon_momentum_is_nesterov():
    config = dataclasses.replace(MUON, weight_decay=0.0)
    first, second = (jax.random.normal(jax.random.key(seed), (8, 16)) for seed in (1, 2))
    params = {"up": jnp.zeros((8, 16))}
    one, two = (
        run(config, {"up": LOGICAL["up"]}, params, [{"up": g} for g in gs]) for gs in ([first], [first, second])
    )
    trace = second + 0.95 * first
    expected = 0.2 * 4 * orthogonalize(second + 0.95 * trace, 5, "float32")
    np.testing.assert_allclose((one["up"] - two["up"]) / 0.01, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "whole, part",
    [
        ("down", ("mlp", "embed")),
        ("expert_up", ("expert_embed", "expert_mlp")),
        ("output", ("heads", "head_dim", "embed")),
    ],
)
def test_muon_on_stacked_weights_equals_one_by_one(whole, part):
    params, gradient = tree(0)[whole], tree(1)[whole]
    stacked = run(MUON, {"w": LOGICAL[whole]}, {"w": params}, [{"w": gradient}])["w"]
    for index in range(params.shape[0]):
        single = run(MUON, {"w": part}, {"w": params[index]}, [{"w": gradient[index]}])["w"]
        np.testing.assert_allclose(stacked[index], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, logical", [("query", ("embed", "mlp")), ("output", ("layers", "mlp", "embed"))])
def test_muon_on_attention_kernels_equals_their_matrices(name, logical):
    shape, flat = (8, 2, 4), (8, 8)
    if name == "output":
        shape, flat = (3, 2, 4, 8), (3, 8, 8)
    params, gradient = tree(0)[name], tree(1)[name]
    heads = run(MUON, {"w": LOGICAL[name]}, {"w": params}, [{"w": gradient}])["w"]
    matrix = run(MUON, {"w": logical}, {"w": params.reshape(flat)}, [{"w": gradient.reshape(flat)}])["w"]
    np.testing.assert_allclose(heads, matrix.reshape(shape), rtol=1e-5, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e4]))
def test_orthogonalize_keeps_the_singular_vectors(rows, columns, seed, scale):
    u, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, rows)))
    v, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(columns, columns)))
    rank = min(rows, columns)
    x = scale * (u[:, :rank] * np.linspace(1, 2, rank)) @ v[:, :rank].T
    got = np.asarray(jax.jit(orthogonalize, static_argnums=(1, 2))(jnp.asarray(x, jnp.float32), 5, jnp.float32))
    inner = u[:, :rank].T @ got @ v[:, :rank]
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-3)
    assert (np.abs(np.diag(inner) - 1) < 0.4).all()


def test_orthogonalize_of_zero_is_zero():
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((2, 3, 4)), 5, jnp.bfloat16), 0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_first_moment_dtype_is_stored_and_kept(kind):
    config = dataclasses.replace(MUON, kind=kind, moment_dtype="bfloat16")
    optimizer = make_optimizer(config, 100, LOGICAL)
    # bf16 parameters must not give a bf16 second moment, nor a state whose dtypes change at the first update.
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, (shape, *_) in PARAMETERS.items()}
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    dtypes = {
        path[-2].name: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim
    }  # name of the moment: dtype
    assert dtypes == {"mu": jnp.bfloat16, "nu": jnp.float32} | ({"trace": jnp.bfloat16} if kind == "muon" else {})
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))


def test_learning_rate_follows_the_schedule():
    schedule = ScheduleConfig(kind="wsd", peak_lr=1.0, warmup_steps=1, decay_fraction=0.5, final_lr_fraction=0.0)
    config = OptimizerConfig(schedule=schedule, b1=0.0, b2=0.0, weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(config, 4, {"w": ("norm",)})
    params = {"w": jnp.zeros(1)}
    state, steps = optimizer.init(params), []
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        steps.append(-float(updates["w"][0]))
    np.testing.assert_allclose(steps, [0.5, 1.0, 1.0, 0.5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_sharded_like_the_parameters_and_gives_the_same_update(kind):
    placement = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2), jax.devices()))
    config = dataclasses.replace(MUON, kind=kind)
    optimizer = make_optimizer(config, 100, LOGICAL)
    params, gradient = tree(0), tree(1)
    shardings = {name: placement.sharding(*logical) for name, logical in LOGICAL.items()}
    abstract = jax.eval_shape(optimizer.init, params)
    placed = optimizer_state_shardings(abstract, params, shardings, placement.sharding())
    seen = set()
    for path, sharding in jax.tree_util.tree_leaves_with_path(placed):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        seen.add(name)
        assert sharding == (placement.sharding() if name is None else shardings[name])
    assert seen == {None, *PARAMETERS}

    state = jax.jit(optimizer.init, out_shardings=placed)(jax.device_put(params, shardings))
    step = jax.jit(optimizer.update, out_shardings=(shardings, placed))
    updates, state = step(jax.device_put(gradient, shardings), state, jax.device_put(params, shardings))
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    alone, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), updates, alone)


def test_state_shardings_tell_equal_suffixes_apart():
    placement = Placement(make_mesh(MeshConfig(fsdp=8), jax.devices()))
    params = {"w": jnp.zeros((8, 8)), "inner": {"w": jnp.zeros((8, 8))}}
    shardings = {"w": placement.sharding("embed", None), "inner": {"w": placement.sharding(None, "embed")}}
    state = optax.trace(0.9).init(params)
    placed = optimizer_state_shardings(state, params, shardings, placement.sharding())
    assert placed.trace == shardings


def test_state_of_no_parameter_is_refused():
    with pytest.raises(AssertionError, match="belongs to no parameter"):
        optimizer_state_shardings({"extra": jnp.zeros(3)}, {}, {}, None)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nnx_state_gives_the_same_update(kind):
    config = dataclasses.replace(MUON, kind=kind)

    def as_state(values):
        return nnx.State({name: nnx.Param(value, logical=LOGICAL[name]) for name, value in values.items()})

    plain = run(config, LOGICAL, tree(0), [tree(1)])
    variables = run(config, LOGICAL, as_state(tree(0)), [as_state(tree(1))])
    for x, y in zip(jax.tree.leaves(variables), jax.tree.leaves(dict(sorted(plain.items()))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_parameters_of_another_tree_are_refused():
    optimizer = make_optimizer(PLAIN, 100, {"w": ("embed", "mlp")})
    with pytest.raises(AssertionError, match="not those of `logical`"):
        optimizer.init({"w": jnp.zeros(3)})


@pytest.mark.parametrize(
    "make, setting",
    [
        (lambda: OptimizerConfig(b1=1.0), "optimizer.b1=1.0"),
        (lambda: OptimizerConfig(b2=-0.1), "optimizer.b2=-0.1"),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps=0.0"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "optimizer.weight_decay=-1.0"),
        (lambda: OptimizerConfig(clip_norm=0.0), "optimizer.clip_norm=0.0"),
        (lambda: MuonConfig(momentum=1.0), "optimizer.muon.momentum=1.0"),
        (lambda: MuonConfig(ns_steps=0), "optimizer.muon.ns_steps=0"),
        (lambda: MuonConfig(lr_scale=0.0), "optimizer.muon.lr_scale=0.0"),
    ],
)
def test_impossible_settings_are_named(make, setting):
    with pytest.raises(ValueError, match=setting.replace(".", r"\.")):
        make()
