"""A linear layer in FP8: three products against float64 of what they round to, and the two kinds of scaling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul.training import ScalingState, fp8_matmul
from quantization.qarray import LARGEST
from tests.kernels.test_quantized_matmul import draw, equations, quantize, wide

E4, E5 = "float8_e4m3fn", "float8_e5m2"


def rounded(x, dtype):
    """Float64 of x with one scale by its largest magnitude."""
    return wide(quantize(x.reshape(-1, x.shape[-1]), dtype, (None, None)))


@functools.partial(jax.jit, static_argnames=("gradient_dtype", "impl"))
def gradients(x, w, dy, *state, **options):
    y, pullback = jax.vjp(lambda *inputs: fp8_matmul(*inputs, **options), x, w, *state)
    return y, *pullback(dy)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("gradient_dtype", [E4, E5])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_current_scaling(impl, gradient_dtype, x_dtype, w_dtype):
    x, w, dy = draw((3, 8, 24), 0, x_dtype), draw((24, 16), 1, w_dtype), draw((3, 8, 16), 2, x_dtype)
    y, dx, dw = gradients(x, w, dy, impl=impl, gradient_dtype=gradient_dtype)
    x_8, w_8, dy_8 = rounded(x, E4), rounded(w, E4), rounded(dy, gradient_dtype)
    for actual, true, like in ((y, x_8 @ w_8, dy), (dx, dy_8 @ w_8.T, x), (dw, x_8.T @ dy_8, w)):
        assert actual.dtype == like.dtype and actual.shape == like.shape
        error = np.abs(np.asarray(actual, np.float64).reshape(true.shape) - true)
        assert (error <= jnp.finfo(like.dtype).eps * np.abs(true) + 1e-5 * np.abs(true).max()).all()


def test_all_three_products_have_fp8_operands():
    x, w, dy = draw((8, 24), 0), draw((24, 16), 1), draw((8, 16), 2)
    jaxpr = jax.make_jaxpr(lambda *inputs: gradients(*inputs, impl="xla"))(x, w, dy)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert [{v.aval.dtype.name for v in e.invars} for e in products] == [{E4}, {E4, E5}, {E4, E5}]


def test_what_is_kept_has_eight_bits():
    x, w = draw((64, 24), 0), draw((24, 16), 1)
    _, pullback = jax.vjp(lambda x: fp8_matmul(x, w), x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) >= x.size]
    assert kept and all(leaf.dtype == E4 for leaf in kept)


def test_delayed_scaling_uses_the_history_and_gives_the_next():
    x, w, dy = draw((8, 24), 0), draw((24, 16), 1), draw((8, 16), 2)
    state = ScalingState(*(jnp.array(values, jnp.float32) for values in ([1, 9, 0], [0, 0, 0], [2, np.nan, np.inf])))
    y, dx, _, following = gradients(x, w, dy, state)

    def scaled(x, dtype, magnitude):
        scale = magnitude / LARGEST[dtype]
        clipped = jnp.clip(x / np.float32(scale), -LARGEST[dtype], LARGEST[dtype])
        return np.asarray(clipped.astype(dtype).astype(jnp.float32), np.float64) * scale

    # No step yet for w: scale 1. What was not finite counts as none, and what is larger than the history saturates.
    x_8, w_8, dy_8 = scaled(x, E4, 9.0), scaled(w, E4, LARGEST[E4]), scaled(dy, E5, 2.0)
    assert np.abs(dy).max() > 2
    np.testing.assert_allclose(y, x_8 @ w_8, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, dy_8 @ w_8.T, rtol=1e-4, atol=1e-5)
    for name, array, before in (("x", x, [1, 9]), ("w", w, [0, 0]), ("gradient", dy, [2, np.nan])):
        np.testing.assert_array_equal(getattr(following, name), [np.abs(array).max(), *before])


def test_delayed_scaling_of_steady_magnitudes_is_current_scaling():
    x, w, dy = draw((8, 24), 0), draw((24, 16), 1), draw((8, 16), 2)
    state = ScalingState.initial(4)
    for _ in range(2):
        *delayed, state = gradients(x, w, dy, state)
    for a, b in zip(delayed, gradients(x, w, dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_states_of_layers_through_scan_and_remat():
    layers, x = draw((3, 16, 16), 0) / 4, draw((8, 16), 1)
    states = jax.tree.map(lambda leaf: jnp.tile(leaf, (3, 1)), ScalingState.initial(2))

    def loss(layers, states):
        body = jax.checkpoint(lambda x, layer: (jnp.tanh(fp8_matmul(x, *layer)), None))
        return jnp.sum(jax.lax.scan(body, x, (layers, states))[0] ** 2)

    d_layers, states = jax.jit(jax.grad(loss, argnums=(0, 1)))(layers, states)
    assert (
        states.x.shape == (3, 2) and (np.asarray(states.x)[:, 0] > 0).all() and (np.asarray(states.x)[:, 1] == 0).all()
    )
    np.testing.assert_array_equal(states.w[:, 0], np.abs(layers).max((1, 2)))
    assert np.isfinite(d_layers).all() and (np.abs(d_layers).max((1, 2)) > 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_one_bad_element_makes_nan_of_all(poison):
    x = draw((8, 24), 0).at[3, 4].set(poison)
    assert np.isnan(fp8_matmul(x, draw((24, 16), 1))).all()


def test_zeros():
    y, dx, dw = gradients(jnp.zeros((8, 24)), draw((24, 16), 1), jnp.zeros((8, 16)))
    assert all((np.asarray(array) == 0).all() for array in (y, dx, dw))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fp8_matmul(jnp.ones((4, 8)), jnp.ones((7, 3))), r"needs \[\.\.\., K\] and \[K, N\]"),
        (lambda: fp8_matmul(jnp.ones((4, 8), int), jnp.ones((8, 3))), "floating-point"),
        (lambda: fp8_matmul(jnp.ones((4, 8)), jnp.ones((8, 3)), gradient_dtype="int8"), "gradient_dtype='int8'"),
        (lambda: ScalingState.initial(0), "at least 1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
