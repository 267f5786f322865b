"""Weights of few bits that a Hopper kernel widens in device memory: bit by bit what they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul import QuantizedCase
from quantization.qarray import quantize, to_fragments
from tests.kernels.interpreter import plain_fragments


@pytest.fixture
def widening(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it, on a chip of one processor. It has room for two blocks of
    threads or one: each has more steps than buffers."""
    from kernels.quantized_matmul import widening

    plain_fragments(monkeypatch, execution, widening)
    monkeypatch.setattr(widening, "NUM_PROCESSORS", 1)
    monkeypatch.setattr(widening, "SHARED_BYTES", 100 * 1024)
    return widening


# (K, N), group, zero points, dtype: one for each way through the kernel, with ragged ends and more steps than programs.
CASES = {
    "one step": ("int4", (64, 64), 64, False, "bfloat16"),
    "groups of 32, zero points": ("int4", (320, 192), 32, True, "bfloat16"),
    "one scale for a column": ("int8", (192, 128), 192, False, "float16"),
    "float8, groups": ("float8_e4m3fn", (1152, 64), 128, False, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit(execution, widening, name):
    w_dtype, shape, group, zero_points, dtype = CASES[name]
    w = quantize(jax.random.normal(jax.random.key(0), shape), w_dtype, (group, 1), asymmetric=zero_points)
    wide = execution.kernel(widening.widened, to_fragments(w), jnp.dtype(dtype))
    assert wide.dtype == dtype
    np.testing.assert_array_equal(wide.astype(np.float32), w.dequantize(dtype).T.astype(np.float32))


@pytest.mark.parametrize("with_bias", [True, False])
def test_many_rows_are_multiplied_by_what_was_widened(execution, widening, monkeypatch, with_bias):
    from kernels.quantized_matmul import weight_only, weight_only_tiles

    monkeypatch.setitem(weight_only_tiles.MOST_ROWS_NARROW, "int4", 8)
    product = functools.partial(widening.product, interpret=execution.interpret(races=False))
    monkeypatch.setattr(widening, "product", product)
    monkeypatch.setattr(weight_only, "product", None)
    w = quantize(jax.random.normal(jax.random.key(0), (128, 64)), "int4", (64, 1))
    x, bias = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in ((1, (9, 128)), (2, (64,))))
    bias = bias if with_bias else None
    y = execution.run(weight_only.quantized_matmul, x, to_fragments(w), bias, jnp.dtype("bfloat16"))
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.bfloat16), np.float64)
    exact += 0 if bias is None else np.asarray(bias, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_what_a_block_of_threads_has_fits(widening):
    from kernels.hopper_chip import SHARED_BYTES

    for dtype in ("int4", "int8"):
        case = QuantizedCase("bfloat16", dtype, 2048, 8192, 28672, None, (128, 1), "fragments")
        assert widening.shared_bytes(case) + 1024 <= SHARED_BYTES // 3
