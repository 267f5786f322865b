"""LLM.int8(): outlier columns in 16 bits beside the int8 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul import outliers
from tests.kernels.test_quantized_matmul import assert_close, draw, quantize, wide

OUTLIERS = (3, 17, 40)
int8_matmul_with_outliers = jax.jit(
    outliers.int8_matmul_with_outliers, static_argnames=("num_outliers", "threshold", "out_dtype", "impl")
)


def activations(dtype=np.float32):
    x = np.array(draw((2, 5, 48), 0))
    x[..., OUTLIERS] *= 40
    return jnp.asarray(x, dtype)


def explicit(x, w, columns):
    """Float64: outlier columns as they are, the others rounded to int8 by their rows' largest."""
    x = x.reshape(-1, x.shape[-1])
    rest = x.at[:, list(columns)].set(0)
    return wide(quantize(rest, "int8", (1, None))) @ wide(w) + wide(x - rest) @ wide(w)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("num_outliers", [3, 8, 48])
def test_outlier_columns_are_exact(layout, num_outliers):
    x, w = activations(), quantize(draw((48, 8), 1), "int8", (None, 1), layout=layout)
    y = int8_matmul_with_outliers(x, w, num_outliers=num_outliers, threshold=20.0)
    assert y.shape == (2, 5, 8)
    np.testing.assert_allclose(y.reshape(10, 8), explicit(x, w, OUTLIERS), rtol=1e-5, atol=1e-3)


def test_the_largest_where_more_reach_the_threshold():
    x, w = activations(), quantize(draw((48, 8), 1), "int8", (None, 1))
    largest = np.argsort(-np.abs(x).max((0, 1)))[:2]
    y = int8_matmul_with_outliers(x, w, num_outliers=2, threshold=0.0).reshape(10, 8)
    np.testing.assert_allclose(y, explicit(x, w, largest), rtol=1e-5, atol=1e-3)


def test_no_outliers_is_the_int8_product():
    x, w = draw((5, 48), 0), quantize(draw((48, 8), 1), "int8", (None, 1))
    y = int8_matmul_with_outliers(x, w, num_outliers=4, threshold=1e9)
    assert_close(y, quantize(x, "int8", (1, None)), w)


def test_bias_dtype_and_groups_with_zero_points():
    w = quantize(draw((48, 8), 1), "int8", (16, 1), asymmetric=True)
    x, bias = activations(jnp.bfloat16), draw((8,), 2)
    y = int8_matmul_with_outliers(x, w, num_outliers=3, threshold=20.0, bias=bias)
    assert y.dtype == jnp.bfloat16
    true = explicit(x, w, OUTLIERS) + wide(bias)
    np.testing.assert_allclose(
        np.asarray(y, np.float64).reshape(10, 8), true, rtol=2**-7, atol=2**-7 * np.abs(true).max()
    )


def test_it_is_closer_than_int8_alone():
    x, w = activations(), quantize(draw((48, 8), 1), "int8", (None, 1))
    true = wide(x.reshape(10, 48)) @ wide(w)
    alone = wide(quantize(x.reshape(10, 48), "int8", (1, None))) @ wide(w)
    y = int8_matmul_with_outliers(x, w, num_outliers=3).reshape(10, 8)
    assert np.linalg.norm(y - true) < 0.1 * np.linalg.norm(alone - true)


def test_bad_arguments_are_named():
    x, w = activations(), quantize(draw((48, 8), 1), "int8", (None, 1))
    with pytest.raises(ValueError, match="num_outliers=0 of K=48"):
        int8_matmul_with_outliers(x, w, num_outliers=0)
    with pytest.raises(ValueError, match="needs to be an int8 QArray"):
        int8_matmul_with_outliers(x, w.dequantize(), num_outliers=1)
