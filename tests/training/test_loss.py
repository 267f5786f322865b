"""Chunked cross-entropy against plain logits and autodiff, on one device and on meshes of eight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules
from training.loss import LossSums, cross_entropy

B, T, D, V = 8, 6, 16, 24

MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 4 × data 2": MeshConfig(tensor=4, data=2, fsdp=1),
    "expert 2 × tensor 2 × fsdp 2": MeshConfig(expert=2, tensor=2, fsdp=2),
}


def example(b=B, t=T, d=D, v=V, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(b, t, d)), dtype)
    head = jnp.asarray(rng.normal(size=(d, v)) / math.sqrt(d), dtype)
    targets = jnp.asarray(rng.integers(v, size=(b, t)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], size=(b, t)), jnp.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights, soft_cap, z_loss_coef):
    """The same sums from logits of all tokens."""
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss, z_loss = jnp.sum(weights * (lse - target)), jnp.sum(weights * lse**2)
    correct = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))
    return loss + z_loss_coef * z_loss, LossSums(loss, z_loss, correct, jnp.sum(weights))


def chunked(hidden, head, targets, weights, soft_cap, z_loss_coef, *, placement=None, chunk_tokens=16):
    sums = cross_entropy(
        hidden,
        head,
        targets,
        weights,
        placement=placement,
        soft_cap=soft_cap,
        z_loss_coef=z_loss_coef,
        chunk_tokens=chunk_tokens,
    )
    return sums.loss_sum + z_loss_coef * sums.z_loss_sum, sums


def differentiate(fn, *arguments):
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True), static_argnums=(4, 5))(*arguments)


def check(arguments, soft_cap=None, z_loss_coef=0.0, **options):
    (_, expected), expected_gradients = differentiate(plain, *arguments, soft_cap, z_loss_coef)
    fn = functools.partial(chunked, **options)
    (_, sums), gradients = differentiate(fn, *arguments, soft_cap, z_loss_coef)
    _, evaluated = jax.jit(fn, static_argnums=(4, 5))(*arguments, soft_cap, z_loss_coef)
    for got in (sums, evaluated):
        for name, x, y in zip(LossSums._fields, got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, err_msg=name)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("soft_cap", "z_loss_coef", "chunk_tokens"),
    [(None, 0.0, 1), (None, 0.0, 48), (None, 0.1, 16), (1.5, 0.0, 16), (1.5, 0.1, 7), (1.5, 0.1, 48)],
)
def test_equals_plain_logits_on_one_device(soft_cap, z_loss_coef, chunk_tokens):
    check(example(), soft_cap, z_loss_coef, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("soft_cap", "z_loss_coef", "chunk_tokens"), [(None, 0.0, 4), (1.5, 0.1, 1000)])
def test_equals_plain_logits_on_a_mesh(mesh, soft_cap, z_loss_coef, chunk_tokens):
    placement = Placement(make_mesh(MESHES[mesh], jax.devices()))
    check(example(), soft_cap, z_loss_coef, placement=placement, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("mesh", [None, "fsdp 8"])
def test_ragged_last_chunk(mesh):
    placement = None if mesh is None else Placement(make_mesh(MESHES[mesh], jax.devices()))
    # 23 tokens per device, a prime: no number of chunks divides them, so the last one is padded.
    rows = 1 if mesh is None else 8
    check(example(b=rows, t=23), 1.5, 0.1, placement=placement, chunk_tokens=7)


def test_embed_axis_that_does_not_divide_is_summed_whole():
    placement = Placement(make_mesh(MeshConfig(fsdp=8), jax.devices()))
    check(example(d=12), placement=placement, chunk_tokens=4)


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 11),
    st.integers(1, 5),
    st.integers(2, 9),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_any_shape_and_chunk(b, t, d, v, chunk_tokens, seed):
    check(example(b, t, d, v, seed), 2.0, 0.05, chunk_tokens=chunk_tokens)


def test_tokens_of_weight_zero_change_nothing():
    hidden, head, targets, weights = example()
    dropped = weights == 0
    assert dropped.any()
    changed = (jnp.where(dropped[..., None], 100.0, hidden), head, jnp.where(dropped, V + 5, targets), weights)
    (_, sums), (dhidden, dhead) = differentiate(chunked, hidden, head, targets, weights, None, 0.1)
    (_, other_sums), (other_dhidden, other_dhead) = differentiate(chunked, *changed, None, 0.1)
    np.testing.assert_allclose(other_sums, sums, rtol=1e-6)
    np.testing.assert_allclose(other_dhead, dhead, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other_dhidden[dropped], 0)
    np.testing.assert_array_equal(dhidden[dropped], 0)


def test_all_weights_zero_gives_zero():
    hidden, head, targets, weights = example()
    (_, sums), gradients = differentiate(chunked, hidden, head, targets, 0 * weights, None, 0.0)
    assert all(float(x) == 0 for x in sums)
    assert all(not g.any() for g in gradients)


def test_logits_far_apart_stay_finite():
    hidden, head, targets, weights = example()
    check((100 * hidden, 10 * head, targets, weights), chunk_tokens=16)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_bfloat16_operands(mesh):
    placement = None if mesh is None else Placement(make_mesh(MESHES[mesh], jax.devices()))
    arguments = example(dtype=jnp.bfloat16)
    (expected, _), expected_gradients = differentiate(plain, *arguments, None, 0.0)
    fn = functools.partial(chunked, placement=placement, chunk_tokens=3)
    (objective, _), gradients = differentiate(fn, *arguments, None, 0.0)
    assert objective.dtype == jnp.float32
    np.testing.assert_allclose(objective, expected, rtol=1e-4)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=0.05, atol=0.02)


def test_float32_head_keeps_a_float32_gradient():
    hidden, head, targets, weights = example(b=16, t=64, dtype=jnp.bfloat16)
    _, (_, exact) = differentiate(plain, hidden, head.astype(jnp.float32), targets, weights, None, 0.0)
    fn = functools.partial(chunked, chunk_tokens=8)
    _, (_, rounded) = differentiate(fn, hidden, head, targets, weights, None, 0.0)
    _, (_, kept) = differentiate(fn, hidden, head.astype(jnp.float32), targets, weights, None, 0.0)
    assert kept.dtype == jnp.float32
    assert jnp.abs(kept - exact).mean() < 0.8 * jnp.abs(rounded.astype(jnp.float32) - exact).mean()


@pytest.mark.parametrize("mesh", [None, "expert 2 × tensor 2 × fsdp 2"])
def test_under_remat_and_scale(mesh):
    placement = None if mesh is None else Placement(make_mesh(MESHES[mesh], jax.devices()))
    hidden, head, targets, weights = example()

    def mean(fn, hidden, head):
        objective, sums = fn(jnp.tanh(hidden), head, targets, weights, None, 0.1)
        return 3 * objective / sums.weight_sum

    fn = functools.partial(chunked, placement=placement, chunk_tokens=4)
    expected = jax.grad(functools.partial(mean, plain), argnums=(0, 1))(hidden, head)
    got = jax.jit(jax.grad(jax.checkpoint(functools.partial(mean, fn)), argnums=(0, 1)))(hidden, head)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_gradient_of_another_combination_is_nan():
    hidden, head, targets, weights = example()

    def loss_alone(hidden):
        return chunked(hidden, head, targets, weights, None, 0.1)[1].loss_sum

    assert jnp.isnan(jax.grad(loss_alone)(hidden)).all()


def test_dhead_leaves_in_shards_of_the_embed_axis():
    placement = Placement(make_mesh(MESHES["expert 2 × tensor 2 × fsdp 2"], jax.devices()))
    fn = functools.partial(chunked, placement=placement, chunk_tokens=4)
    _, (_, dhead) = differentiate(fn, *example(), None, 0.0)
    assert dhead.sharding.is_equivalent_to(placement.sharding("embed", "vocab"), 2)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_logits_of_all_tokens_never_exist(mesh):
    placement = None if mesh is None else Placement(make_mesh(MESHES[mesh], jax.devices()))
    arguments = example(b=16, t=32, d=8, v=128, dtype=jnp.bfloat16)
    shards = 1 if placement is None else placement.size("batch") * placement.size("act_vocab")
    all_logits = 16 * 32 * 128 // shards

    def largest(fn):
        jaxpr = jax.make_jaxpr(fn, static_argnums=(4, 5))(*arguments, 2.0, 0.1).jaxpr
        return max(math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars)

    gradient = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    chunk = functools.partial(chunked, placement=placement, chunk_tokens=16)
    assert largest(chunk) < all_logits
    assert largest(gradient(chunk)) < all_logits
    # The search does see logits where they exist.
    assert largest(plain) == largest(gradient(plain)) == 16 * 32 * 128


@pytest.mark.parametrize("chunk_tokens", [16, 1000])
def test_three_products_with_gradients_and_one_without(chunk_tokens):
    fn = functools.partial(chunked, chunk_tokens=chunk_tokens)

    def products(fn):
        jaxpr = jax.make_jaxpr(fn, static_argnums=(4, 5))(*example(), None, 0.0).jaxpr
        return sum(e.primitive.name == "dot_general" for e in equations(jaxpr))

    assert products(jax.grad(fn, argnums=(0, 1), has_aux=True)) == 3
    # A custom_vjp keeps its primal alone until it is differentiated.
    assert products(fn) == 1


def test_sharded_sequence_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    with pytest.raises(AssertionError, match="sequence"):
        chunked(*example(), None, 0.0, placement=Placement(mesh, ShardingRules(batch=None, sequence="fsdp")))


def test_batch_and_vocab_on_one_mesh_axis_is_an_error():
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    with pytest.raises(ValueError, match="'fsdp' is used by both 'batch' and 'act_vocab'"):
        chunked(*example(), None, 0.0, placement=Placement(mesh, ShardingRules(act_vocab="fsdp")))
