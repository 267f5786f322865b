"""Every product of few-bit numbers against the dequantised float64 product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from kernels import quantized_matmul as op
from quantization import qarray
from quantization.qarray import QArray

IMPLEMENTATIONS = ["reference", "xla"]
FORMATS = ["int8", "float8_e4m3fn", "float8_e5m2"]
# One program each, where op by op there would be twenty.
quantize = jax.jit(qarray.quantize, static_argnames=("dtype", "block", "layout", "asymmetric"))
_STATIC = ("activation", "activation_block", "out_dtype", "impl")
quantized_matmul = jax.jit(op.quantized_matmul, static_argnames=_STATIC)


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
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scales_outside_of_the_sums(impl, dtype, layout):
    x, w, bias = draw((5, 48), 0), draw((48, 24), 1), draw(24, 2, jnp.bfloat16)
    for x_block, w_block, out_dtype in [
        ((1, None), (None, 1), "bfloat16"),
        ((None, None), (None, None), "float32"),
        ((1, None), (None, 8), "float16"),
    ]:
        xq, wq = quantize(x, dtype, x_block), quantize(w, dtype, w_block, layout=layout)
        y = quantized_matmul(xq, wq, bias=bias, out_dtype=out_dtype, impl=impl)
        assert y.dtype == out_dtype
        assert_close(y, xq, wq, bias)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_along_k(impl, dtype):
    x, w = draw((6, 64), 0), draw((64, 32), 1)
    for x_block, w_block in [((1, 16), (16, 8)), ((1, None), (16, 1)), ((2, 32), (None, 1))]:
        xq, wq = quantize(x, dtype, x_block), quantize(w, dtype, w_block, layout="columns")
        assert_close(quantized_matmul(xq, wq, out_dtype="float32", impl=impl), xq, wq)
    # Dequantised operands of a 16-bit product are rounded to 16 bits.
    assert_close(quantized_matmul(xq, wq, impl=impl), xq, wq, roundings=(2**-8, 2**-8))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["int4", *FORMATS])
def test_weight_only(impl, x_dtype, dtype):
    x, w = draw((2, 3, 64), 0, x_dtype), draw((64, 24), 1)
    eps = jnp.finfo(x_dtype).eps
    for w_block, asymmetric in [((None, 1), False), ((32, 1), dtype.startswith("int"))]:
        wq = quantize(w, dtype, w_block, asymmetric=asymmetric)
        y = quantized_matmul(x, wq, impl=impl)
        assert y.shape == (2, 3, 24) and y.dtype == x.dtype
        assert_close(y.reshape(6, 24), x.reshape(6, 64), wq, roundings=(eps,))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", FORMATS)
@pytest.mark.parametrize("block", [(1, None), (None, None), (1, 16)])
def test_activations_are_quantised_on_the_way(impl, activation, block):
    x, w = draw((3, 48), 0, jnp.bfloat16), quantize(draw((48, 8), 1), activation, (None, 1), layout="columns")
    y = quantized_matmul(x, w, activation=activation, activation_block=block, impl=impl)
    expected = quantized_matmul(quantize(x, activation, block), w, out_dtype="bfloat16", impl=impl)
    np.testing.assert_array_equal(y, expected)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 20)),
    dtype=st.sampled_from(FORMATS),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e25]),
    layout=st.sampled_from(["rows", "columns"]),
)
@example((0, 3, 5), "int8", 1.0, "rows")
@example((1, 1, 1), "float8_e5m2", 1e-30, "columns")
def test_any_shape_and_scale(sizes, dtype, magnitude, layout):
    M, K, N = sizes
    x = quantize(draw((M, K), 0) * magnitude if M else jnp.zeros((0, K)), dtype, (1, None))
    w = quantize(draw((K, N), 1), dtype, (None, 1), layout=layout)
    for impl in IMPLEMENTATIONS:
        assert_close(quantized_matmul(x, w, out_dtype="float32", impl=impl), x, w)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_both_fp8_types_together(impl):
    x, w = quantize(draw((4, 32), 0), "float8_e5m2", (None, None)), quantize(draw((32, 8), 1), FORMATS[1], (None, None))
    assert_close(quantized_matmul(x, w, out_dtype="float32", impl=impl), x, w)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FORMATS[1:])
def test_every_fp8_number(impl, dtype):
    """Subnormal and largest ones too, and NaN and infinities as themselves."""
    numbers = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
    finite = np.isfinite(np.asarray(numbers.astype(jnp.float32)))
    x = QArray(numbers[:, None] * jnp.ones((1, 2), dtype), jnp.full((256, 1), 0.5))
    w = QArray(jnp.ones((2, 3), dtype), jnp.full((1, 3), 2.0))
    y = np.asarray(quantized_matmul(x, w, out_dtype="float32", impl=impl))
    np.testing.assert_array_equal(y[:, 0], 2 * np.asarray(numbers.astype(jnp.float32)))
    assert (np.isfinite(y).all(1) == finite).all() and finite.sum() in (254, 248)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_stays_in_its_row_and_column(impl, dtype):
    x, w = np.array(draw((4, 16), 0)), np.array(draw((16, 8), 1))
    x[1, 3], w[2, 5] = np.nan, np.inf
    y = quantized_matmul(
        quantize(x, dtype, (1, None)), quantize(w, dtype, (None, 1), layout="columns"), out_dtype="float32", impl=impl
    )
    expected = np.zeros((4, 8), bool)
    expected[1], expected[:, 5] = True, True
    np.testing.assert_array_equal(np.isnan(y), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sums_of_integers_are_exact(impl):
    """Past 2**24, where float32 sums would not be."""
    x = QArray(jnp.full((1, 2048), 127, jnp.int8).at[0, 0].set(126), jnp.ones((1, 1)))
    w = QArray(jnp.full((2048, 1), 127, jnp.int8), jnp.full((1, 1), 2.0**-24))
    total = 2047 * 127**2 + 126 * 127
    if impl == "xla":
        assert float(quantized_matmul(x, w, out_dtype="float32", impl=impl)[0, 0]) == np.float32(total) * 2.0**-24


def test_what_xla_multiplies_has_few_bits():
    for dtype, wide in (("int8", "int32"), ("float8_e4m3fn", "float32")):
        x, w = quantize(draw((4, 32), 0), dtype, (1, None)), quantize(draw((32, 8), 1), dtype, (None, 1))
        jaxpr = jax.make_jaxpr(lambda x, w: op.quantized_matmul(x, w, impl="xla"))(x, w)
        (product,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        assert [v.aval.dtype.name for v in (*product.invars, *product.outvars)] == [dtype, dtype, wide]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_under_sharding_and_gradient_of_weight_only():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    put = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    x, w = draw((8, 32), 0), quantize(draw((32, 16), 1), "int8", (None, 1), layout="columns")
    y = quantized_matmul(jax.device_put(x, put), w)
    np.testing.assert_allclose(y, quantized_matmul(x, w), rtol=1e-5, atol=1e-5)
    dx = jax.grad(lambda x: quantized_matmul(x, w).sum())(x)
    np.testing.assert_allclose(dx, np.tile(w.dequantize().sum(1), (8, 1)), rtol=1e-5)


ROWS = quantize(draw((4, 32), 0), "int8", (1, None))
WEIGHT = quantize(draw((32, 8), 1), "int8", (None, 1))
FP8_WEIGHT = quantize(draw((32, 8), 1), "float8_e4m3fn", (None, 1))


@pytest.mark.parametrize(
    ("x", "w", "options", "words"),
    [
        (ROWS, draw((32, 8), 1), {}, "needs a QArray"),
        (draw((4, 31), 0), WEIGHT, {}, r"needs \[M, K\] and \[K, N\]"),
        (ROWS, FP8_WEIGHT, {}, "int8 and float8_e4m3fn"),
        (ROWS, WEIGHT, {"activation": "int8"}, "leave it out"),
        (draw((4, 32), 0), WEIGHT, {"activation": "int5"}, "activation='int5'"),
        (draw((4, 32), 0), WEIGHT, {"activation": "int8", "activation_block": (1, 5)}, "must divide its axis"),
        (ROWS, WEIGHT, {"bias": draw((4,), 0)}, r"bias \[4\]"),
        (ROWS, WEIGHT, {"out_dtype": jnp.int8}, "out_dtype"),
        (ROWS, WEIGHT, {"impl": "cutlass"}, "'cutlass' is unknown"),
        (ROWS, WEIGHT, {"impl": "pallas"}, r"can't run: .*kernels\.quantized_matmul\) to 'auto'"),
        (jnp.ones((4, 32), jnp.int32), WEIGHT, {}, "x int32"),
        (quantize(draw((4, 32), 0), "int8", (1, None), layout="columns"), WEIGHT, {}, r"\[M, K\] in rows"),
        (ROWS, QArray(WEIGHT.values, jnp.ones((1, 7))), {}, "must divide its own"),
    ],
)
def test_bad_arguments_are_named(x, w, options, words):
    with pytest.raises(ValueError, match=words):
        op.quantized_matmul(x, w, **options)
