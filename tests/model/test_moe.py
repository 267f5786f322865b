"""Router, balance losses, dispatch with a capacity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.moe import MoE, Router, Routing
from model.parameter import Creator
from tests.model.tiny import execution, moe

B, T, E = 2, 12, 8


def router(config, kernel=None, bias=None) -> Router:
    made = Router(config, Creator(jax.random.key(0), "float32"))
    shape = (config.embed_dim, E)
    kernel = np.random.default_rng(1).normal(size=shape) if kernel is None else kernel
    made.kernel[...] = jnp.asarray(kernel, jnp.float32)
    if bias is not None:
        made.bias[...] = jnp.asarray(bias, jnp.float32)
    return made


def hidden(config, seed: int = 0, rows: int = B) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, T, config.embed_dim)), jnp.float32)


VALID = jnp.ones((B, T), jnp.float32)


def scores_of(config, x, kernel) -> tuple[np.ndarray, np.ndarray]:
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    if config.moe.scoring == "sigmoid":
        return logits, 1 / (1 + np.exp(-logits))
    return logits, np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("normalize", "scale"), [(True, 1.0), (True, 2.5), (False, 1.0), (False, 3.0)])
def test_weights_are_the_scores_of_the_chosen(scoring, normalize, scale):
    config = moe(scoring=scoring, normalize_weights=normalize, weight_scale=scale, experts_per_token=3)
    made, x = router(config), hidden(config)
    routing, _ = made(x, VALID)
    _, scores = scores_of(config, x, made.kernel[...])
    chosen = np.argsort(-scores, axis=-1)[..., :3]
    np.testing.assert_array_equal(routing.experts_BTA, chosen)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(routing.weights_BTA.sum(axis=-1), scale, rtol=1e-5)
    np.testing.assert_allclose(routing.weights_BTA, weights * scale, rtol=1e-4)


def test_forced_balance_takes_experts_in_turn():
    config = moe(force_balance=True, normalize_weights=False, experts_per_token=2)
    made, x = router(config), hidden(config)
    routing, metrics = made(x, VALID)
    np.testing.assert_array_equal(metrics.load_E, B * T * 2 / E)
    assert (routing.experts_BTA[..., 0] != routing.experts_BTA[..., 1]).all()
    _, scores = scores_of(config, x, made.kernel[...])
    np.testing.assert_allclose(routing.weights_BTA, np.take_along_axis(scores, routing.experts_BTA, -1), rtol=1e-4)


def test_the_balancing_bias_chooses_and_does_not_weigh():
    config = moe(scoring="sigmoid", router_bias=True, bias_update_rate=0.1, normalize_weights=False)
    bias = np.array([0, 0, 0, 5.0, 0, 0, 0, -5.0])
    made, x = router(config, bias=bias), hidden(config)
    routing, _ = made(x, VALID)
    experts = np.asarray(routing.experts_BTA)
    assert (experts[..., 0] == 3).all() and not (experts == 7).any()
    _, scores = scores_of(config, x, made.kernel[...])
    np.testing.assert_allclose(routing.weights_BTA, np.take_along_axis(scores, experts, axis=-1), rtol=1e-4)


def test_no_gradient_reaches_the_bias_and_one_reaches_the_kernel():
    config = moe(scoring="sigmoid", router_bias=True, bias_update_rate=0.1)
    x = hidden(config)

    def loss(kernel, bias):
        routing, metrics = router(config, kernel, bias)(x, VALID)
        return jnp.sum(routing.weights_BTA[..., 0]) + metrics.load_balance

    kernel = np.random.default_rng(1).normal(size=(config.embed_dim, E)).astype(np.float32)
    d_kernel, d_bias = jax.grad(loss, argnums=(0, 1))(kernel, np.zeros(E, np.float32))
    assert float(jnp.abs(d_kernel).max()) > 1e-3
    np.testing.assert_array_equal(d_bias, 0)


def test_loads_and_losses_ignore_padding():
    config = moe()
    made, x = router(config), hidden(config)
    valid = jnp.asarray(np.arange(T) < [[7], [0]], jnp.float32)
    _, got = made(x, valid)
    _, want = made(x[:1, :7], jnp.ones((1, 7), jnp.float32))
    np.testing.assert_array_equal(got.load_E, want.load_E)
    assert float(got.load_E.sum()) == 7 * 2
    np.testing.assert_allclose(got.load_balance, want.load_balance, rtol=1e-5)
    np.testing.assert_allclose(got.router_z, want.router_z, rtol=1e-5)
    # A batch of padding alone is not a division by zero.
    _, empty = made(x, jnp.zeros_like(valid))
    assert float(empty.load_E.sum()) == float(empty.load_balance) == float(empty.router_z) == 0


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_losses_of_a_uniform_router(scoring):
    config = moe(scoring=scoring)
    _, metrics = router(config, np.zeros((config.embed_dim, E)))(hidden(config), VALID)
    # Logits that are given are not computed.
    _, given = router(config)(hidden(config), VALID, jnp.zeros((B, T, E)))
    for each in (metrics, given):
        assert float(each.load_balance) == pytest.approx(1.0, rel=1e-5)
        assert float(each.router_z) == pytest.approx(np.log(E) ** 2, rel=1e-5)


def test_losses_of_a_collapsed_router():
    """All probability on one expert of eight: E·f·P is 8, at one expert per token."""
    config = moe(experts_per_token=1)
    kernel = np.zeros((config.embed_dim, E))
    kernel[0, 2] = 100.0
    x = jnp.abs(hidden(config)) + 1
    _, metrics = router(config, kernel)(x, VALID)
    assert float(metrics.load_balance) == pytest.approx(E, rel=1e-4)
    np.testing.assert_array_equal(metrics.load_E, np.where(np.arange(E) == 2, B * T, 0))


def test_losses_by_their_formulas():
    config = moe(experts_per_token=3)
    made, x = router(config), hidden(config)
    _, metrics = made(x, VALID)
    logits, scores = scores_of(config, x, made.kernel[...])
    chosen = np.argsort(-scores, axis=-1)[..., :3]
    share = np.bincount(chosen.ravel(), minlength=E) / chosen.size
    balance = E * np.sum(share * scores.mean(axis=(0, 1)))
    assert float(metrics.load_balance) == pytest.approx(balance, rel=1e-5)
    assert float(metrics.router_z) == pytest.approx(np.mean(np.log(np.exp(logits).sum(-1)) ** 2), rel=1e-5)


def kept_by_hand(experts_BTA: np.ndarray, slots: int) -> np.ndarray:
    """The first `slots` assignments of each expert in each row, in order of tokens and then of choices."""
    kept = np.zeros(experts_BTA.shape, bool)
    for row in range(experts_BTA.shape[0]):
        taken = np.zeros(E, int)
        for place in np.ndindex(experts_BTA.shape[1:]):
            expert = experts_BTA[(row, *place)]
            kept[(row, *place)] = taken[expert] < slots
            taken[expert] += 1
    return kept


def layer(**changes) -> MoE:
    return MoE(moe(dispatch="capacity", init_stddev=0.5, **changes), Creator(jax.random.key(0), "float32"))


@functools.cache
def dispatches():
    """(capacity, dropless) of one layer's experts, jitted once for all routings."""
    experts = layer().experts
    run = execution(experts.config, grouped_matmul="reference")
    return (
        jax.jit(lambda x, chosen, weights: experts.capacity(x, Routing(chosen, weights), run)),
        jax.jit(lambda x, chosen, weights: experts.dropless(x, Routing(chosen, weights), run)),
    )


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, E - 1), min_size=2, max_size=E, unique=True), st.integers(0, 99))
def test_capacity_drops_what_is_beyond_it_and_nothing_else(popular, seed):
    capacity, dropless = dispatches()
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(popular)[:2] for _ in range(B * T)]).reshape(B, T, 2).astype(np.int32)
    weights = rng.uniform(0.1, 1, size=experts.shape).astype(np.float32)
    # Ceiling of 1.25 · 12 tokens · 2 choices / 8 experts.
    want_kept = kept_by_hand(experts, slots=4)
    x = hidden(moe())
    got, kept = capacity(x, experts, weights)
    np.testing.assert_array_equal(kept, want_kept)
    want = dropless(x, experts, weights * want_kept)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_drop_rate_is_measured_over_tokens_that_are_not_padding():
    made = layer(capacity_factor=0.5)
    config = made.experts.config
    x, valid = hidden(config), jnp.asarray(np.arange(T) < [[12], [5]], jnp.float32)
    _, metrics = made(x, valid, execution(config))
    routing, _ = made.router(x, valid)
    kept = kept_by_hand(np.asarray(routing.experts_BTA), slots=2)
    dropped = 1 - kept[np.asarray(valid, bool)].mean()
    assert 0 < dropped < 1
    assert float(metrics.dropped) == pytest.approx(dropped, abs=1e-6)


def test_enough_capacity_is_dropless():
    made = layer(capacity_factor=float(E))
    config = made.experts.config
    x = hidden(config)
    got, metrics = made(x, VALID, execution(config))
    routing, _ = made.router(x, VALID)
    want = made.experts.dropless(x, routing, execution(config, grouped_matmul="reference"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert float(metrics.dropped) == pytest.approx(0.0, abs=1e-6)
