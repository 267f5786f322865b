"""Products of few-bit numbers on Hopper: the kernel interpreted or on a GPU, and what it is chosen for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hopper_chip import SHARED_BYTES
from kernels.quantized_matmul import QuantizedCase, choose, supports
from kernels.quantized_matmul.tiles import Tiles, choose_tiles, shared_bytes
from kernels.quantized_matmul.training import fp8_matmul
from kernels.target import Target
from tests.kernels.test_quantized_matmul import assert_close, draw, quantize

H100 = Target("gpu", (9, 0))
ROW, BLOCK, TENSOR = ((1, None), (None, 1)), ((1, 128), (128, 128)), ((None, None), (None, None))
F8, F5 = "float8_e4m3fn", "float8_e5m2"


@pytest.fixture
def gpu(execution):
    """The kernel's module. `execution`, that it needs, skips where JAX can't run it."""
    from kernels.quantized_matmul import gpu

    return gpu


# One case for each way through the kernel; an interpreted one takes seconds.
CASES = {
    "int8, ragged, bias, clusters, more tiles than processors": dict(
        shape=(300, 200, 200), dtype="int8", blocks=ROW, tiles=Tiles(2, 128, 2, 2, 2), out="float32", bias=True, some=4
    ),
    "fp8, odd widths, one tile, fewer steps than buffers": dict(
        shape=(37, 100, 77), dtype=F8, blocks=TENSOR, tiles=Tiles(2, 128, 3, 1, 8, 2), out="bfloat16"
    ),
    "both fp8 types, scales of blocks": dict(
        shape=(136, 384, 256), dtype=F5, w_dtype=F8, blocks=BLOCK, tiles=Tiles(2, 128, 2, 1, 8, 1), out="float32"
    ),
    "three warpgroups, tiles across blocks of columns, clusters": dict(
        shape=(200, 256, 384), dtype=F8, blocks=BLOCK, tiles=Tiles(3, 192, 3, 2, 8), out="float16", bias=True, some=2
    ),
    "int8, clusters, the first warpgroup ahead, several tiles of few steps": dict(
        shape=(300, 130, 200), dtype="int8", blocks=ROW, tiles=Tiles(2, 128, 3, 2, 2, 2), out="bfloat16", some=4
    ),
    "three warpgroups, one block of columns": dict(
        shape=(250, 640, 128), dtype=F8, blocks=BLOCK, tiles=Tiles(3, 128, 4, 1, 8), out="bfloat16"
    ),
    "int8, scales of rows and of blocks of a whole width": dict(
        shape=(16, 256, 96),
        dtype="int8",
        blocks=((1, None), (128, None)),
        tiles=Tiles(2, 128, 2, 1, 8),
        out="float32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_bounded(execution, gpu, monkeypatch, name):
    given = {"bias": False, "some": 132, "w_dtype": CASES[name]["dtype"], **CASES[name]}
    monkeypatch.setattr(gpu, "NUM_PROCESSORS", given["some"])
    M, K, N = given["shape"]
    x = quantize(draw((M, K), 0), given["dtype"], given["blocks"][0])
    w = quantize(draw((K, N), 1), given["w_dtype"], given["blocks"][1], layout="columns")
    bias = draw((N,), 2) if given["bias"] else None
    y = execution.kernel(gpu.product, x, w, bias, jnp.dtype(given["out"]), given["tiles"])
    assert y.dtype == given["out"]
    assert_close(y, x, w, bias, roundings=() if given["dtype"] == "int8" else (execution.float8_error,))


def test_training_takes_it_for_all_three_products(execution, gpu, monkeypatch):
    products, product = [], gpu.product

    def counted_product(x, w, *arguments):
        products.append((x.values.dtype, w.values.dtype, (*x.shape, w.shape[1])))
        return product(x, w, *arguments, interpret=execution.interpret(races=False))

    monkeypatch.setattr(gpu, "product", counted_product)
    x, w, dy = draw((2, 4, 24), 0), draw((24, 16), 1), draw((2, 4, 16), 2)

    def gradients(x, w, dy, **options):
        y, pull = jax.vjp(functools.partial(fp8_matmul, **options), x, w)
        return y, *pull(dy)

    expected = gradients(x, w, dy, impl="xla")
    actual = execution.run(gradients, x, w, dy, impl="pallas", target=H100)
    for mine, theirs in zip(actual, expected, strict=True):
        # Sums of at most 24 products, with a mean magnitude below 2.
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 + 24 * 2 * execution.float8_error)
    assert products == [(F8, F8, (8, 24, 16)), (F5, F8, (8, 16, 24)), (F8, F5, (24, 8, 16))]


def test_no_rows(gpu):
    x, w = quantize(jnp.zeros((0, 128)), "int8", (1, None)), quantize(draw((128, 64), 0), "int8", (None, 1))
    assert gpu.product(x, w, None, jnp.dtype("float32"), Tiles(2, 128, 2, 1, 8)).shape == (0, 64)


def test_nan_stays_in_its_row(execution, gpu):
    x = np.array(draw((70, 128), 0))
    x[1, 3] = np.nan
    x, w = quantize(x, F8, (1, 128)), quantize(draw((128, 72), 1), F8, (128, None), layout="columns")
    y = execution.kernel(gpu.product, x, w, None, jnp.dtype("float32"), Tiles(2, 128, 2, 1, 8))
    nan = np.isnan(y)
    assert nan[1].all() and nan.sum() == 72


# Widths that the copies don't take as they are.
WHOLE = {"in_dim": 100, "out_dim": 7, "x_block": (1, 100), "w_block": (100, 1)}


def case(**changes) -> QuantizedCase:
    fields = dict(x_dtype=F8, w_dtype=F8, num_rows=4096, in_dim=4096, out_dim=14336, w_layout="columns")
    return QuantizedCase(**{**fields, "x_block": (1, 4096), "w_block": (4096, 1), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_layout": "rows"}, "layout='columns'"),
        ({"zero_points": True}, "no zero points"),
        ({"w_dtype": "int4", "x_dtype": "int8"}, "not int8 and int4"),
        ({"out_dtype": "float64"}, "not float64"),
        ({"in_dim": 0, "x_block": (1, 0), "w_block": (0, 1)}, "K=0"),
        ({"w_block": (64, 128)}, "a multiple of 128 along K"),
        ({"w_block": (128, 64)}, "a multiple of 128 columns"),
    ],
)
def test_what_it_does_not_take(monkeypatch, changes, words):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert words in supports("pallas", case(**changes), H100)
    with pytest.raises(ValueError, match=r"kernels\.quantized_matmul\) to 'auto'"):
        choose("pallas", case(**changes), H100)


@pytest.mark.parametrize(
    ("changes", "impl"),
    [
        ({}, "pallas"),
        ({"num_rows": 32}, "xla"),
        ({"num_rows": 33}, "pallas"),
        ({"num_rows": 32, "x_block": (1, 128), "w_block": (128, 128)}, "pallas"),
        ({"w_layout": "rows"}, "xla"),
    ],
)
def test_auto_takes_the_fastest_measured(monkeypatch, changes, impl):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert choose("auto", case(**changes), H100)[0] == impl
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert choose("auto", case(**changes), H100)[0] == "xla"


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    for changes in ({}, {"x_block": (1, 128), "w_block": (128, 128)}, {"x_dtype": F5}, WHOLE):
        assert supports("pallas", case(**changes), H100) is None
    assert "compute capability" in supports("pallas", case(), Target("gpu", (8, 0)))
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert "needs JAX 0.11" in supports("pallas", case(), H100)


@pytest.mark.parametrize("block", [(1, 4096), (1, 128)])
@pytest.mark.parametrize("num_rows", [1, 128, 512, 8192])
def test_tiles_fit(num_rows, block):
    one = case(num_rows=num_rows, x_block=block, w_block=(block[1], 128 if block[1] == 128 else 1))
    assert shared_bytes(choose_tiles(one), one.scales_outside) <= SHARED_BYTES
