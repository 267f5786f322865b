"""The grouped product of few-bit weights: against a loop over groups in float64, and the Hopper kernel by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import scaled_tiles
from kernels.grouped_matmul.quantized import QuantizedGroupedCase, choose, quantized_grouped_matmul, supports
from kernels.grouped_matmul.scaled_tiles import ScaledTiles, choose_scaled_tiles
from kernels.target import Target
from quantization.qarray import QArray, quantize

HOPPER = Target("gpu", (9, 0))
CPU = Target("cpu")
CASE = QuantizedGroupedCase(
    "float8_e4m3fn", "float8_e4m3fn", 64, 256, 128, (1, 128), (128, 128), "columns", num_groups=4
)
BF16_STEP = 2.0**-8


def arrays(M, K, N, num_groups, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((M, K), (num_groups, K, N)))


def by_loop(x, w, sizes) -> np.ndarray:
    """float64 [M, N] of the arrays that these stand for."""
    x, w = (np.asarray(a.dequantize() if isinstance(a, QArray) else a, np.float64) for a in (x, w))
    y, start = np.zeros((x.shape[0], w.shape[2])), 0
    for group, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[group]
        start += size
    return y


def assert_rounded_once(y, exact, of_sums=0.0) -> None:
    """Within the rounding of the result to bfloat16, and of float32 sums; `of_sums`: what more they are off by."""
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert (error <= np.abs(exact) * BF16_STEP + 1e-6 * np.abs(exact).max() + of_sums).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.sampled_from(["int8", "int4", "float8_e4m3fn"]),
    st.sampled_from(["rows", "columns"]),
)
def test_weights_alone_against_a_loop_over_groups(sizes, dtype, layout):
    x, w = arrays(27, 32, 16, 3)
    w = quantize(w, dtype, (1, 16, 1), layout=layout)
    exact = by_loop(x.astype(jnp.float32), w, sizes)
    y = quantized_grouped_matmul(x.astype(jnp.float32), w, jnp.asarray(sizes, jnp.int32), target=CPU)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(y[sum(sizes) :], 0)


@pytest.mark.parametrize("impl", ["reference", "widened"])
@pytest.mark.parametrize(("activation", "block"), [("int8", (1, None)), ("float8_e4m3fn", (1, 16))])
def test_rows_quantised_on_the_way(impl, activation, block):
    x, w = arrays(27, 32, 16, 3)
    w = quantize(w, activation, (1, 32, 1))
    sizes = (9, 0, 11)
    exact = by_loop(quantize(x, activation, block), w, sizes)
    options = {"activation": activation, "activation_block": block, "impl": impl, "target": CPU}
    y = quantized_grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), **options)
    # Widened rows and weights are rounded to bfloat16 each, before they are multiplied.
    atol = np.abs(exact).max() * BF16_STEP * (1 if impl == "reference" else 3)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "blocks", "sizes", "columns", "tiles"),
    [
        ("float8_e4m3fn", ((1, 128), (1, 128, 128)), (37, 0, 90), 128, ScaledTiles(128, 128, 2, 1)),
        # A tile's columns are of two blocks, and the last one's are not all there.
        ("float8_e4m3fn", ((1, 128), (1, 128, 128)), (8, 131, 0), 256, ScaledTiles(128, 192, 3, 2)),
        ("int8", ((1, None), (1, None, 1)), (130, 1, 0), 128, ScaledTiles(128, 128, 2, 1)),
    ],
)
def test_the_hopper_kernel(execution, dtype, blocks, sizes, columns, tiles, monkeypatch):
    from kernels.grouped_matmul import gpu_scaled, persistent

    monkeypatch.setattr(persistent, "NUM_PROCESSORS", 2)
    # The interpreter takes two warpgroups' parts of what shares memory for one.
    execution.put_plainly(monkeypatch, persistent, in_one_place=lambda *arrays: arrays)
    x, w = arrays(139, 384, columns, 3)
    # Rows of no group may hold anything.
    x = x.at[sum(sizes) :].set(jnp.nan)
    x, w = quantize(x, dtype, blocks[0]), quantize(w, dtype, blocks[1], layout="columns")
    y = execution.kernel(gpu_scaled.product, x, w, jnp.asarray(sizes, jnp.int32), tiles=tiles)
    magnitudes = by_loop(*(np.abs(np.asarray(a.dequantize(), np.float64)) for a in (x, w)), sizes)
    assert_rounded_once(y, by_loop(x, w, sizes), 0 if dtype == "int8" else execution.float8_error * magnitudes)


def test_tiles_fit_shared_memory():
    for outside, out_dim in ((True, 64), (False, 64), (False, 14336)):
        assert scaled_tiles.shared_bytes(choose_scaled_tiles(outside, out_dim), outside) <= 227 * 1024


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x_dtype": "bfloat16", "x_block": None}, "in fragments"),
        ({"x_dtype": "int8"}, "can't be multiplied together"),
        ({"w_layout": "rows"}, "layout='columns'"),
        ({"zero_points": True}, "zero points"),
        ({"in_dim": 192, "x_block": (1, 192), "w_block": (192, 1)}, "K 192"),
        ({"out_dim": 100}, "N 100"),
        ({"num_groups": 300}, "300"),
        ({"x_block": (1, 64)}, "blocks of a multiple of 128"),
        ({"w_block": (128, 64)}, "128 columns"),
        ({"out_dtype": "float32"}, "float32"),
    ],
)
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11, and says that first")
def test_what_the_hopper_kernel_refuses_by_name(change, reason):
    case = dataclasses.replace(CASE, **change)
    assert reason in supports("pallas", case, HOPPER)
    with pytest.raises(
        ValueError, match=r"set impl to 'auto' or 'widened' .*kernels\.quantized_matmul to 'auto' or 'xla'"
    ):
        choose("pallas", case, HOPPER)


def test_what_it_takes_and_where():
    assert "compute capability 9.0" in supports("pallas", CASE, CPU)
    if jax.__version_info__ >= (0, 11):
        assert supports("pallas", CASE, HOPPER) is None
    with pytest.raises(ValueError, match="unknown"):
        supports("cudnn", CASE, HOPPER)


def test_errors_name_the_argument():
    x, w = arrays(8, 32, 16, 3)
    q, sizes = quantize(w, "int8", (1, 32, 1)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="needs a QArray"):
        quantized_grouped_matmul(x, w, sizes)
    with pytest.raises(ValueError, match=r"group_sizes \[E\]"):
        quantized_grouped_matmul(x, q, sizes[:2])
    with pytest.raises(ValueError, match="int32"):
        quantized_grouped_matmul(x, q, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="own scales"):
        quantized_grouped_matmul(x, quantize(w, "int8", (None, 32, 1)), sizes)
    with pytest.raises(ValueError, match="activation='int3'"):
        quantized_grouped_matmul(x, q, sizes, activation="int3")
    with pytest.raises(ValueError, match="activation None"):
        quantized_grouped_matmul(quantize(x, "int8", (1, None)), q, sizes, activation="int8")
