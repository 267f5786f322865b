"""Every product of few-bit numbers against the dequantised float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.quantized_matmul import QuantizedCase, choose, quantized_matmul, supports
from kernels.target import Target
from quantization.qarray import QArray, quantize

IMPLEMENTATIONS = ["reference", "xla"]
FORMATS = ["int8", "float8_e4m3fn", "float8_e5m2"]


def draw(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(array):
    """Float64 of what it stands for, computed in float64."""
    if not isinstance(array, QArray):
        return np.asarray(array, np.float64)
    values = np.asarray(array.values.astype(jnp.float32), np.float64)
    values = values if array.layout == "rows" else values.swapaxes(-1, -2)
    scales, zeros = (None if a is None else np.asarray(a, np.float64) for a in (array.scales, array.zero_points))
    for axis, length in enumerate(array.block):
        scales = scales.repeat(length, axis)
        zeros = None if zeros is None else zeros.repeat(length, axis)
    return (values if zeros is None else values - zeros) * scales


def assert_close(y, x, w, bias=None, roundings=()):
    """Within one rounding of the result and of the float32 sums, and of `roundings` (unit roundoffs) of operands."""
    x, w = wide(x), wide(w)
    true, size = x @ w, np.abs(x) @ np.abs(w)
    true = true if bias is None else true + wide(bias)
    bound = size * (sum(roundings) + (x.shape[1] + 4) * 2**-24) + np.abs(true) * jnp.finfo(y.dtype).eps
    assert (np.abs(wide(y) - true) <= bound + 1e-30).all(), np.max(np.abs(wide(y) - true) / (bound + 1e-30))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scales_outside_of_the_sums(impl, dtype, out_dtype, layout):
    x, w, bias = draw((5, 48), 0), draw((48, 24), 1), draw(24, 2, jnp.bfloat16)
    for x_block, w_block in [((1, None), (None, 1)), ((None, None), (None, None)), ((1, None), (None, 8))]:
        xq, wq = quantize(x, dtype, x_block), quantize(w, dtype, w_block, layout=layout)
        y = quantized_matmul(xq, wq, bias=bias, out_dtype=out_dtype, impl=impl)
        assert y.dtype == out_dtype
        assert_close(y, xq, wq, bias)
