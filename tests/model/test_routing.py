"""What a router takes over a few experts, against JAX's own functions and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import routing

COUNTS = [1, 3, 8, 16]


def draw(num_experts, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, num_experts)) * 3, jnp.float32)


def assert_same(ours, jaxs, x, relative=2e-6):
    """Values, and gradients of a sum with random factors."""
    factors = jnp.asarray(np.random.default_rng(9).normal(size=jaxs(x).shape), jnp.float32)
    for f in (lambda f: f, lambda f: jax.grad(lambda x: jnp.sum(f(x) * factors))):
        want = f(jaxs)(x)
        np.testing.assert_allclose(f(ours)(x), want, rtol=relative, atol=relative * (1 + float(jnp.abs(want).max())))


@pytest.mark.parametrize("num_experts", COUNTS)
def test_sums_are_those_of_jax(num_experts):
    x = draw(num_experts)
    assert_same(routing.softmax, lambda x: jax.nn.softmax(x, axis=-1), x)
    assert_same(routing.log_sum, lambda x: jax.nn.logsumexp(x, axis=-1), x)
    assert_same(routing.shares, lambda x: x / (x.sum(axis=-1, keepdims=True) + 1e-20), jnp.abs(x) + 0.1)


def test_far_scores_do_not_overflow():
    x = jnp.asarray([[[300.0, -300.0, 299.0]]])
    assert_same(routing.softmax, lambda x: jax.nn.softmax(x, axis=-1), x)
    assert_same(routing.log_sum, lambda x: jax.nn.logsumexp(x, axis=-1), x)
    assert (routing.shares(jnp.zeros((1, 1, 3))) == 0).all()


@pytest.mark.parametrize("num_experts", COUNTS)
def test_the_best_are_those_of_top_k(num_experts):
    # Few values: many are equal, and the first of them is taken first.
    x = jnp.asarray(np.random.default_rng(1).integers(0, 3, (4, 9, num_experts)), jnp.float32)
    for count in {1, min(2, num_experts), num_experts}:
        index = routing.top(x, count)
        assert index.dtype == jnp.int32
        np.testing.assert_array_equal(index, jax.lax.top_k(x, count)[1])
        assert_same(lambda x, i=index: routing.pick(x, i), lambda x, i=index: jnp.take_along_axis(x, i, axis=-1), x)


def test_of_many_experts_nothing_is_written_out():
    def launches(num_experts):
        x = draw(num_experts)
        return str(jax.make_jaxpr(lambda x: routing.pick(routing.softmax(x), routing.top(x, 2)))(x))

    assert "top_k" in launches(17) and "reduce_sum" in launches(17) and "gather" in launches(17)
    assert not any(name in launches(16) for name in ("top_k", "reduce_sum", "gather"))


def test_what_is_not_finite_stays_so():
    x = draw(4).at[0, 0, 1].set(jnp.nan)
    scores = routing.softmax(x)
    index = routing.top(scores, 2)
    assert jnp.isnan(routing.pick(scores, index)[0, 0]).all() and ((index >= 0) & (index < 4)).all()
    assert jnp.isfinite(routing.pick(scores, index)[1:]).all() and jnp.isnan(routing.log_sum(x)[0, 0])
