"""Products with weights of few bits on Hopper: the kernel interpreted or on a GPU, its layout, what it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hopper_chip import SHARED_BYTES
from kernels.quantized_matmul import QuantizedCase, choose, quantized_matmul, reference, supports, weight_only_tiles
from kernels.quantized_matmul.weight_only_tiles import Tiles, choose_tiles
from kernels.target import Target
from quantization.qarray import QArray, quantize, to_fragments
from tests.kernels.interpreter import plain_fragments

H100 = Target("gpu", (9, 0))
CASE = QuantizedCase("bfloat16", "int4", 1, 8192, 28672, None, (128, 1), "fragments")


def weight(K, N, dtype, group, asymmetric=False, seed=0):
    """A QArray of random values in rows."""
    w = np.random.default_rng(seed).normal(size=(K, N)).astype(np.float32)
    return quantize(jnp.asarray(w), dtype, (group, 1), asymmetric=asymmetric)


@pytest.mark.parametrize("dtype", ["int4", "int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_fragments_hold_the_same_array(dtype, layout):
    x = jax.random.normal(jax.random.key(0), (2, 128, 192))
    w = quantize(x, dtype, (1, 64, 1), layout=layout, asymmetric=dtype == "int4")
    packed = to_fragments(w)
    assert packed.shape == w.shape and packed.dtype == w.dtype == dtype and packed.block == w.block
    assert packed.values.nbytes == x.size * (4 if dtype == "int4" else 8) // 8
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())
    one = jax.tree.map(lambda leaf: leaf[1], packed)
    np.testing.assert_array_equal(one.dequantize(), w.dequantize()[1])


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_fragments_are_where_the_registers_want_them(dtype):
    w = weight(128, 128, dtype, 64)
    packed, values = np.asarray(to_fragments(w).values), np.asarray(w.values.astype(jnp.int8))
    rng = np.random.default_rng(1)
    for _ in range(100):
        # Rows of A are columns of w. PTX ISA, "wgmma.mma_async, matrix fragments for m64nNk16".
        warp, lane, step, register, low = (int(n) for n in rng.integers(0, [4, 32, 4, 4, 2]))
        column = 16 * warp + lane // 4 + 8 * (register % 2)
        row = 16 * step + 2 * (lane % 4) + 8 * (register // 2) + low
        j, i, thread = *(int(n) for n in rng.integers(0, [2, 2])), 32 * warp + lane
        if dtype == "int4":
            actual = (int(packed[j, i, 4 * thread + step]) >> (16 * low + 4 * register) & 15) - 8
        else:
            actual = packed[j, i, step // 2 * 2048 + 16 * thread + step % 2 * 8 + 2 * register + low]
        assert actual == values[64 * i + row, 64 * j + column]


def test_scales_become_one_for_each_column():
    w = quantize(jax.random.normal(jax.random.key(0), (128, 128)), "int8", (64, 64))
    packed = to_fragments(w)
    assert packed.scales.shape == (2, 128)
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())


def test_bad_fragments_are_refused():
    w = weight(128, 128, "int8", 128)
    with pytest.raises(ValueError, match="in fragments already"):
        to_fragments(to_fragments(w))
    with pytest.raises(ValueError, match=r"\[96, 128\].*multiples of 64"):
        to_fragments(weight(96, 128, "int8", 96))
    with pytest.raises(ValueError, match=r"they must be \[..., N/64, K/64, 512\]"):
        QArray(jnp.zeros((2, 2, 256), jnp.uint32), w.scales, layout="fragments").check()


@pytest.fixture
def weight_only(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it."""
    plain_fragments(monkeypatch, execution)
    from kernels.quantized_matmul import weight_only

    return weight_only


def computed(execution, weight_only, x, w, bias, out_dtype, tiles):
    """The kernel's product."""
    y = execution.kernel(weight_only.product, x, w, bias, out_dtype=jnp.dtype(out_dtype), tiles=tiles)
    assert y.dtype == out_dtype
    return y


# One case for each way through the kernel: M, K, N, weight, group, zero points, bias, dtypes, tiles.
CASES = {
    "int4, one row, groups": (1, 512, 128, "int4", 128, False, False, "bfloat16", Tiles(128, 256, 2, 1, 8)),
    "int4, groups of 32, zero points, bias": (9, 256, 64, "int4", 32, True, True, "float16", Tiles(64, 128, 2, 1, 16)),
    "int4, parts of groups, zero points": (8, 576, 64, "int4", 64, True, True, "bfloat16", Tiles(64, 64, 3, 3, 8)),
    "int8, columns, bias, more rows than a block": (
        20,
        320,
        128,
        "int8",
        None,
        False,
        True,
        "bfloat16",
        Tiles(64, 128, 3, 1, 8),
    ),
    "int8, parts of columns, bias": (3, 448, 128, "int8", None, False, True, "float16", Tiles(128, 64, 2, 2, 8)),
    "int4, warpgroups": (2, 640, 128, "int4", 128, False, True, "bfloat16", Tiles(128, 128, 2, 1, 8, 2)),
    "fp8, groups": (8, 256, 64, "float8_e4m3fn", 128, False, False, "bfloat16", Tiles(64, 128, 2, 1, 8)),
    "fp8, columns": (16, 256, 64, "float8_e5m2", None, False, False, "bfloat16", Tiles(64, 256, 2, 1, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_rounding(execution, weight_only, name):
    M, K, N, w_dtype, group, asymmetric, has_bias, dtype, tiles = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(M, K)), dtype)
    w = weight(K, N, w_dtype, group, asymmetric)
    bias = jnp.asarray(rng.normal(size=N), dtype) if has_bias else None
    out_dtype = "float32" if "parts" in name else dtype
    y = computed(execution, weight_only, x, to_fragments(w), bias, out_dtype, tiles)
    with jax.enable_x64(True):
        exact = np.asarray(reference.quantized_matmul(x, w, bias, jnp.float64))
        magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w.dequantize(jnp.float64)))
    # One rounding of the result, and float32's of K products and their groups.
    bound = np.abs(exact) * jnp.finfo(out_dtype).eps / 2 + 2e-6 * (magnitude + 1)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= bound).all()


def test_only_what_meets_a_nan_becomes_one(execution, weight_only):
    """A row of x, and a column of the weight by its scale and by an element; zeros beside them stay zeros."""
    x = jnp.zeros((3, 128), jnp.bfloat16).at[1].set(1).at[2, 5].set(jnp.nan)
    w = weight(128, 64, "float8_e4m3fn", 128)
    w = dataclasses.replace(
        w, values=w.values.at[7, 3].set(jnp.nan), scales=w.scales.at[0, 40].set(jnp.nan).at[0, 41].set(1e30)
    )
    tiles = Tiles(64, 128, 2, 1, 8)
    y = np.asarray(computed(execution, weight_only, x, to_fragments(w), None, "float32", tiles))
    columns = np.isin(np.arange(64), (3, 40))
    assert np.isnan(y[2]).all() and (np.isnan(y[:2]) == columns).all()
    assert (y[0, ~columns] == 0).all() and np.isfinite(y[1, ~columns]).all() and abs(y[1, 41]) > 1e28


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("w_dtype, group", [("int4", 32), ("int8", None)])
def test_other_implementations_take_fragments(impl, w_dtype, group):
    w, x = weight(128, 64, w_dtype, group), jax.random.normal(jax.random.key(0), (2, 3, 128), jnp.float32)
    actual, expected = (quantized_matmul(x, one, impl=impl) for one in (to_fragments(w), w))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_is_supported():
    def reason(**changes):
        return supports("pallas", dataclasses.replace(CASE, **changes), H100)

    if jax.__version_info__ < (0, 11):
        assert "needs JAX 0.11" in reason()
        return
    assert reason() is None
    assert reason(w_dtype="int8", w_block=(8192, 1)) is None
    assert "compute capability 9.0" in weight_only_tiles.unsupported(CASE, Target("gpu", (10, 0)))
    assert "bfloat16 or float16, not float32" in reason(x_dtype="float32")
    assert "to_fragments" in reason(w_layout="columns")
    assert "32, 64, 128 or all rows" in reason(w_block=(256, 1))
    assert "zero points for 32, 64 or 128 rows" in reason(w_block=(8192, 1), zero_points=True)
    assert "not float64" in reason(out_dtype="float64")
    takes = {"int4": [(512, "pallas"), (513, "pallas")], "int8": [(256, "pallas"), (257, "xla"), (1024, "pallas")]}
    takes["float8_e4m3fn"] = [(256, "pallas"), (257, "xla"), (4096, "xla")]
    for dtype, limits in takes.items():
        block = 128 if dtype == "int4" else 8192
        for num_rows, impl in ((1, "pallas"), *limits):
            fields = {"w_dtype": dtype, "w_block": (block, 1), "num_rows": num_rows}
            assert choose("auto", dataclasses.replace(CASE, **fields), H100)[0] == impl


@pytest.mark.parametrize("w_dtype", ["int4", "int8"])
@pytest.mark.parametrize("num_rows", [1, 16, 100])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (64, 64), (4096, 128256), (8192, 28672)])
def test_chosen_tiles_fit(w_dtype, num_rows, shape):
    for group in (32, 128, shape[0]):
        if shape[0] % group:
            continue
        case = dataclasses.replace(
            CASE, w_dtype=w_dtype, num_rows=num_rows, in_dim=shape[0], out_dim=shape[1], w_block=(group, 1)
        )
        tiles = choose_tiles(case)
        assert weight_only_tiles.shared_bytes(case, tiles) <= SHARED_BYTES
        assert case.out_dim % tiles.columns == 0 and tiles.rows % 8 == 0
        assert group == case.in_dim or tiles.depth % group == 0
        steps = -(-case.in_dim // tiles.depth)
        share = -(-steps // tiles.num_parts)
        assert share * (tiles.num_parts - 1) * tiles.depth < case.in_dim
