"""Norms and gates with quantised results: XLA's and the Hopper kernel (interpreted, or on a GPU) against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul.activations import ActivationCase, choose, rms_norm_quantized, supports, swiglu_quantized
from kernels.target import Target
from quantization.qarray import LARGEST
from tests.kernels.test_quantized_matmul import draw, wide

H100 = Target("gpu", (9, 0))
FORMATS = ["int8", "float8_e4m3fn", "float8_e5m2"]
EPSILON = 1e-5
# Half of the distance between neighbours: relative to a normal number, and in units of the scale.
HALF_STEPS = {"int8": (0, 0.5), "float8_e4m3fn": (2**-4, 2**-10), "float8_e5m2": (2**-3, 2**-17)}


@pytest.fixture
def pallas(monkeypatch, execution):
    """`run` of an op whose kernel is interpreted, with its races looked for, or compiled."""
    from kernels.quantized_matmul import activations_gpu

    quantized_rows = functools.partial(activations_gpu.quantized_rows, interpret=execution.interpret())
    monkeypatch.setattr(activations_gpu, "quantized_rows", quantized_rows)
    yield functools.partial(execution.run, impl="pallas", target=H100)
    execution.assert_no_races()


def exact(x, gain):
    x = wide(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * np.asarray(gain, np.float64)


def exact_gate(gate, up):
    gate, up = wide(gate), wide(up)
    return gate / (1 + np.exp(-gate)) * up


def assert_rounded(q, true, x_dtype):
    """Each row's scale by its largest, and each element the nearest, but for one rounding to x's dtype before."""
    # The norm itself takes a few float32 roundings.
    eps = float(jnp.finfo(x_dtype).eps) + 1e-6
    largest = np.abs(true).max(1, keepdims=True)
    np.testing.assert_allclose(q.scales, largest / LARGEST[q.dtype.name], rtol=eps)
    relative, absolute = HALF_STEPS[q.dtype.name]
    bound = np.maximum(np.abs(true) * relative, largest / LARGEST[q.dtype.name] * absolute) + np.abs(true) * 2 * eps
    assert (np.abs(wide(q) - true) <= bound * (1 + 2 * eps) + 1e-12).all()


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_xla(dtype, x_dtype):
    x, gain = draw((2, 3, 96), 0, x_dtype), draw((96,), 1)
    q = rms_norm_quantized(x, gain, epsilon=EPSILON, dtype=dtype, impl="xla")
    assert q.check().shape == (6, 96) and q.block == (1, 96) and q.dtype == dtype
    assert_rounded(q, exact(x, gain).reshape(6, 96), x_dtype)
    q = swiglu_quantized(x, x[::-1], dtype=dtype)
    assert_rounded(q, exact_gate(x, x[::-1]).reshape(6, 96), x_dtype)
    side_by_side = jnp.concatenate([x, x[::-1]], axis=-1)
    jax.tree.map(np.testing.assert_array_equal, swiglu_quantized(side_by_side, dtype=dtype), q)


@pytest.mark.parametrize(("dtype", "width"), [("int8", 1024), ("float8_e4m3fn", 512), ("float8_e5m2", 1536)])
def test_kernel(pallas, dtype, width):
    # A gain as a model holds it, and as its distance from 1.
    offset = 1.0 if dtype == "int8" else 0.0
    x, gain = draw((3, width), 0, "bfloat16"), draw((width,), 1, "bfloat16" if offset else "float32")
    gated = dtype == "float8_e4m3fn"
    if gated:
        q = pallas(swiglu_quantized, x, x[::-1], dtype=dtype)
    else:
        q = pallas(rms_norm_quantized, x, gain, epsilon=EPSILON, offset=offset, dtype=dtype)
    assert_rounded(q.check(), exact_gate(x, x[::-1]) if gated else exact(x, wide(gain) + offset), "bfloat16")
    # The row's largest was rounded to bfloat16 before.
    largest = np.asarray(q.scales) * np.float32(LARGEST[dtype])
    np.testing.assert_allclose(largest, largest.astype(jnp.bfloat16).astype(np.float32), rtol=1e-6)


def test_kernel_of_operands_side_by_side(pallas):
    gate, up = draw((3, 512), 0, "bfloat16"), draw((3, 512), 1, "bfloat16")
    joined = pallas(swiglu_quantized, jnp.concatenate([gate, up], axis=-1), dtype="int8")
    assert_rounded(joined.check(), exact_gate(gate, up), "bfloat16")
    apart = pallas(swiglu_quantized, gate, up, dtype="int8")
    jax.tree.map(np.testing.assert_array_equal, joined, apart)


def test_rows_of_zeros_and_of_what_is_not_finite(pallas):
    x = draw((4, 512), 0, "bfloat16").at[0].set(0).at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    q = pallas(swiglu_quantized, x, jnp.ones_like(x), dtype="int8")
    assert float(q.scales[0, 0]) == 1 and (wide(q)[0] == 0).all()
    assert np.isnan(wide(q)[1:3]).all() and np.isfinite(wide(q)[3]).all()


def test_no_rows():
    q = rms_norm_quantized(jnp.zeros((0, 512)), jnp.ones(512), epsilon=EPSILON, dtype="int8")
    assert q.shape == (0, 512)


CASE = ActivationCase("bfloat16", "int8", 4096, 4096, False)


def test_what_is_chosen(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert supports("pallas", CASE, H100) is None
    for changes, impl in (
        ({}, "xla"),
        ({"num_rows": 8192}, "pallas"),
        ({"num_rows": 16, "gated": True}, "pallas"),
        ({"num_rows": 8192, "width": 4097}, "xla"),
    ):
        assert choose("auto", ActivationCase(**{**vars(CASE), **changes}), H100)[0] == impl
    for changes, words in (({"width": 4097}, "multiple of 512"), ({"x_dtype": "float32"}, "not float32")):
        assert words in supports("pallas", ActivationCase(**{**vars(CASE), **changes}), H100)
    assert "compute capability" in supports("pallas", CASE, Target("cpu"))
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert "needs JAX 0.11" in supports("pallas", CASE, H100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rms_norm_quantized(jnp.ones((2, 8)), jnp.ones(7), epsilon=1.0, dtype="int8"), r"\[\.\.\., D\] and"),
        (lambda: swiglu_quantized(jnp.ones((2, 8)), jnp.ones((2, 7)), dtype="int8"), "one shape"),
        (lambda: swiglu_quantized(jnp.ones((2, 7)), dtype="int8"), "side by side"),
        (lambda: swiglu_quantized(*[jnp.ones((2, 8))] * 2, dtype="int5"), "choose one of int4, int8"),
        (lambda: swiglu_quantized(*[jnp.ones((2, 8))] * 2, dtype="int8", impl="cuda"), "impl='cuda' is unknown"),
        (lambda: swiglu_quantized(*[jnp.ones((2, 8))] * 2, dtype="int8", impl="pallas"), "can't run: .*'auto' or"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
