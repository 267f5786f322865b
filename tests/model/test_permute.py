"""The order of tokens by expert, against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import permute
from model.permute import Order, sort_by_expert


def assert_sorted(order, experts_NA, num_experts):
    experts_M = np.asarray(experts_NA).reshape(-1)
    sorted_M = np.argsort(experts_M, stable=True)
    np.testing.assert_array_equal(order.sorted_M, sorted_M)
    np.testing.assert_array_equal(order.place_M, np.argsort(sorted_M))
    np.testing.assert_array_equal(order.group_sizes, np.bincount(experts_M, minlength=num_experts))
    assert all(array.dtype == jnp.int32 for array in order)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_as_a_stable_sort(data):
    # Few shapes, since each is compiled: about a block, several, and a part of one.
    num_tokens, per_token, num_experts = data.draw(
        st.sampled_from([(1, 1, 1), (64, 2, 8), (65, 2, 3), (43, 3, 256), (500, 2, 5), (700, 2, 200)])
    )
    seed, skew = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.01, 1.0, 100.0]))
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_experts, skew))
    experts_NA = jnp.asarray(rng.choice(num_experts, (num_tokens, per_token), p=shares), jnp.int32)
    assert_sorted(jax.jit(sort_by_expert, static_argnums=1)(experts_NA, num_experts), experts_NA, num_experts)


@pytest.mark.parametrize("num_experts", [1, 256])
def test_one_expert_has_all(num_experts):
    experts_NA = jnp.full((300, 1), num_experts - 1, jnp.int32)
    assert_sorted(sort_by_expert(experts_NA, num_experts), experts_NA, num_experts)


def test_too_many_to_compare_are_sorted(monkeypatch):
    experts_NA = jnp.asarray(np.random.default_rng(0).integers(0, 7, (90, 2)), jnp.int32)
    monkeypatch.setattr(permute, "_MOST_COMPARED", 90 * 2 * 7)
    assert " sort[" not in str(jax.make_jaxpr(lambda experts: sort_by_expert(experts, 7)[:3])(experts_NA))
    monkeypatch.setattr(permute, "_MOST_COMPARED", 90 * 2 * 7 - 1)
    assert " sort[" in str(jax.make_jaxpr(lambda experts: sort_by_expert(experts, 7)[:3])(experts_NA))
    assert_sorted(sort_by_expert(experts_NA, 7), experts_NA, 7)


def test_no_assignments():
    order = sort_by_expert(jnp.zeros((0, 2), jnp.int32), 4)
    assert order.sorted_M.shape == order.place_M.shape == (0,) and order.group_sizes.tolist() == [0] * 4


def test_several_at_once():
    experts_XNA = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 150, 2)), jnp.int32)
    orders = jax.vmap(lambda experts_NA: sort_by_expert(experts_NA, 5)[:3])(experts_XNA)
    for x, experts_NA in enumerate(experts_XNA):
        assert_sorted(Order(*(array[x] for array in orders)), experts_NA, 5)
