"""Tokens that travel to their experts, in as many rounds as it takes, against every expert computed for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import grouped_matmul
from model.exchange import exchange_experts
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, map_shards
from tests.model.tiny import assert_close

N, A, E, D, F = 48, 2, 8, 4, 6
MESHES = {
    "expert 4 × fsdp 2": MeshConfig(expert=4, fsdp=2),
    "expert 2 × tensor 2 × data 2": MeshConfig(expert=2, tensor=2, data=2, fsdp=1),
    "expert 8": MeshConfig(expert=8, fsdp=1),
}


def feed_forward(rows_MD, group_sizes, up, gate, down):
    hidden_MF = jax.nn.silu(grouped_matmul(rows_MD, gate, group_sizes, impl="reference"))
    hidden_MF *= grouped_matmul(rows_MD, up, group_sizes, impl="reference")
    return grouped_matmul(hidden_MF, down, group_sizes, impl="reference")


@jax.jit
def local(x_ND, experts_NA, weights_NA, kernels, cotangent_ND):
    """The same sum with no dispatch at all."""

    def run(x_ND, weights_NA, kernels):
        up, gate, down = kernels
        hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x_ND, gate)) * jnp.einsum("nd,edf->nef", x_ND, up)
        y_NED = jnp.einsum("nef,efd->ned", hidden, down)
        return jnp.einsum("nad,na->nd", jnp.take_along_axis(y_NED, experts_NA[..., None], axis=1), weights_NA)

    y_ND, vjp = jax.vjp(run, x_ND, weights_NA, kernels)
    return y_ND, vjp(cotangent_ND)


@functools.cache
def exchanged(mesh: str, round_factor: float):
    """Jitted once per mesh: the routing is an argument."""
    placement = Placement(make_mesh(MESHES[mesh], jax.devices()))
    axes = placement.axes("experts")

    def shard(x_ND, experts_NA, weights_NA, up, gate, down):
        kernels = (up, gate, down)
        y_ND = exchange_experts(x_ND, experts_NA, weights_NA, kernels, feed_forward, E, axes, placement, round_factor)
        return jax.lax.psum(y_ND, placement.axes("expert_mlp"))

    tokens = ("batch", None)
    wide, narrow = ("experts", None, "expert_mlp"), ("experts", "expert_mlp", None)
    mapped = map_shards(shard, placement, (tokens, tokens, tokens, wide, wide, narrow), tokens)

    @jax.jit
    def run(x_ND, experts_NA, weights_NA, kernels, cotangent_ND):
        call = lambda x_ND, weights_NA, kernels: mapped(x_ND, experts_NA, weights_NA, *kernels)  # noqa: E731
        y_ND, vjp = jax.vjp(call, x_ND, weights_NA, kernels)
        return y_ND, vjp(cotangent_ND)

    return run


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    kernels = (draw(E, D, F), draw(E, D, F), draw(E, F, D))
    return draw(N, D), rng.uniform(0.1, 1, size=(N, A)).astype(np.float32), kernels, draw(N, D)


def check(mesh: str, experts_NA: np.ndarray, round_factor: float):
    x, weights, kernels, cotangent = inputs()
    experts = experts_NA.astype(np.int32)
    got = exchanged(mesh, round_factor)(x, experts, weights, kernels, cotangent)
    assert_close(got, local(x, experts, weights, kernels, cotangent), 2e-5)


ROUTINGS = {
    "all tokens to one expert": np.full((N, A), 5),
    "all to two experts of one device": np.tile([6, 7], (N, 1)),
    "one device's tokens to the last expert": np.where(np.arange(N)[:, None] < 6, 7, np.arange(A)),
    "balanced": (np.arange(N)[:, None] * A + np.arange(A)) % E,
    "empty experts": np.random.default_rng(0).choice([0, 3], size=(N, A)),
}


# A quarter of the balanced share per round: even a balanced routing takes four rounds, the worst one 4 · devices.
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_rounds_lose_no_token(mesh, name):
    check(mesh, ROUTINGS[name], 0.25)


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_usual_round(name):
    check("expert 4 × fsdp 2", ROUTINGS[name], 1.5)


@st.composite
def routings(draw) -> np.ndarray:
    """Experts of every token, from a few popular ones to all."""
    popular = draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=E))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return rng.choice(popular, size=(N, A))


@settings(max_examples=25, deadline=None)
@given(routings())
@example(ROUTINGS["all tokens to one expert"])
def test_any_routing(experts_NA):
    check("expert 4 × fsdp 2", experts_NA, 0.25)
