"""Rotary embeddings against complex numbers in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import RopeConfig, RopeScaling
from model.rope import rope_frequencies, rotate, rotations
from tests.model import oracle
from tests.model.tiny import dense

HEAD = 64
ROPES = {
    "plain": RopeConfig(),
    "partial": RopeConfig(fraction=0.25),
    "none": RopeConfig(fraction=0.0),
    "linear": RopeConfig(scaling=RopeScaling("linear", 8.0)),
    "llama 3.1": RopeConfig(theta=500_000.0, scaling=RopeScaling("llama3", 8.0)),
    "llama 3.2": RopeConfig(theta=500_000.0, scaling=RopeScaling("llama3", 32.0)),
    "yarn": RopeConfig(theta=150_000.0, scaling=RopeScaling("yarn", 32.0, original_max_positions=4096)),
    "yarn, partial": RopeConfig(
        fraction=0.5,
        scaling=RopeScaling("yarn", 4.0, original_max_positions=512, beta_fast=8.0, attention_factor=1.5),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_a_complex_product(name):
    rope = ROPES[name]
    rng = np.random.default_rng(0)
    # Positions up to 4000: there a float32 angle is exact to about 2e-4 of a turn.
    positions, x = rng.integers(4000, size=(2, 9)), rng.normal(size=(2, 9, 3, HEAD))
    config = dense(head_dim=HEAD, rope=rope)
    got = rotate(jnp.asarray(x, jnp.float32), rotations(config, jnp.asarray(positions))[False])
    want = np.stack([oracle.rotate(x[row], positions[row], rope) for row in range(2)])
    np.testing.assert_allclose(got, want, atol=3e-3)
    assert rotate(jnp.asarray(x, jnp.bfloat16), rotations(config, jnp.asarray(positions))[False]).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [name for name in ROPES if name != "none"])
def test_frequencies(name):
    rope = ROPES[name]
    rotated = round(HEAD * rope.fraction)
    frequencies, magnitude = rope_frequencies(rope, HEAD)
    want, want_magnitude = oracle.frequencies_of(rope, rotated)
    assert frequencies.shape == (rotated // 2,)
    np.testing.assert_allclose(frequencies, want, rtol=1e-6)
    assert magnitude == pytest.approx(want_magnitude)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    plain, _ = rope_frequencies(RopeConfig(theta=500_000.0), 128)
    scaled, _ = rope_frequencies(RopeConfig(theta=500_000.0, scaling=RopeScaling("llama3", 8.0)), 128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose((plain / scaled)[wavelength < 2048], 1.0, rtol=1e-6)
    np.testing.assert_allclose((plain / scaled)[wavelength > 8192], 8.0, rtol=1e-6)
    between = (plain / scaled)[(wavelength > 2048) & (wavelength < 8192)]
    assert between.size > 2 and (np.diff(between) > 0).all() and between[0] > 1 and between[-1] < 8


def test_yarn_magnitude():
    assert rope_frequencies(ROPES["yarn"], HEAD)[1] == pytest.approx(0.1 * np.log(32) + 1)
    assert rope_frequencies(ROPES["yarn, partial"], HEAD)[1] == 1.5


def test_only_differences_of_positions_matter():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    config = dense(head_dim=16, rope=RopeConfig(theta=100.0))

    def product(query_position, key_position):
        at = lambda position: rotations(config, jnp.full((1, 1), position))[False]  # noqa: E731
        return float(jnp.vdot(rotate(q, at(query_position)), rotate(k, at(key_position))))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)


def test_windowed_layers_may_have_a_theta_of_their_own():
    positions = jnp.arange(8)[None]
    scaling = RopeScaling("linear", 8.0)
    shared = rotations(dense(rope=RopeConfig(theta=100.0, scaling=scaling)), positions)
    np.testing.assert_array_equal(shared[True], shared[False])
    own = rotations(dense(rope=RopeConfig(theta=100.0, scaling=scaling, local_theta=10.0)), positions)
    np.testing.assert_array_equal(own[False], shared[False])
    np.testing.assert_array_equal(own[True], rotations(dense(rope=RopeConfig(theta=10.0)), positions)[False])
    assert own[True][0].dtype == jnp.float32
