"""Grouped products with weights of few bits on Hopper: the kernel interpreted or on a GPU, and what it takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul.quantized import QuantizedGroupedCase, case_of, choose, quantized_grouped_matmul, supports
from kernels.grouped_matmul.weight_only_tiles import ManyTiles, choose_tiles, max_visits, shared_bytes
from kernels.hopper_chip import SHARED_BYTES
from kernels.quantized_matmul.weight_only_tiles import Tiles
from kernels.target import Target
from quantization.qarray import QArray, quantize, to_fragments
from tests.kernels.interpreter import plain_fragments

H100 = Target("gpu", (9, 0))
# mixtral's experts, two rows each.
CASE = QuantizedGroupedCase("bfloat16", "int4", 16, 4096, 14336, None, (128, 1), "fragments", num_groups=8)


def weight(shape, dtype, group, asymmetric=False, seed=0) -> QArray:
    """Random values in rows."""
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return quantize(jnp.asarray(w), dtype, (1, group, 1), asymmetric=asymmetric)


@pytest.fixture
def kernel(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it."""
    plain_fragments(monkeypatch, execution)
    from kernels.grouped_matmul import gpu_weight_only, persistent

    # So that each takes several tiles.
    monkeypatch.setattr(persistent, "NUM_PROCESSORS", 2)
    return gpu_weight_only


def computed(execution, kernel, x, w, sizes, out_dtype, tiles):
    """The kernel's product."""
    settings = {"out_dtype": jnp.dtype(out_dtype), "tiles": tiles}
    y = execution.kernel(kernel.tiled_product, x, w, jnp.asarray(sizes, jnp.int32), **settings)
    assert y.dtype == out_dtype
    return y


def by_loop(x, w, sizes) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, N] of what these stand for, and the sums of the magnitudes."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    y, magnitude, start = np.zeros((x.shape[0], w.shape[2])), np.zeros((x.shape[0], w.shape[2])), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], magnitude[rows] = x[rows] @ w[group], np.abs(x[rows]) @ np.abs(w[group])
        start += size
    return y, magnitude


# Ways through the kernel, with groups that begin and end anywhere: sizes, M, K, N, weight, group, zero points, dtype,
# tiles.
CASES = {
    "int4, a row or two, empty groups": (
        (2, 0, 1, 0, 3),
        6,
        256,
        128,
        "int4",
        128,
        False,
        "bfloat16",
        Tiles(128, 128, 2, 1, 8),
    ),
    "int4, groups of 32, zero points": ((7, 4), 13, 128, 64, "int4", 32, True, "float16", Tiles(64, 128, 2, 1, 16)),
    "int8, more rows than a tile": (
        (29, 0, 12),
        41,
        192,
        128,
        "int8",
        None,
        False,
        "float16",
        Tiles(64, 128, 2, 1, 16),
    ),
    "int8, warpgroups": ((0, 5, 6), 24, 448, 64, "int8", None, False, "bfloat16", Tiles(64, 64, 2, 1, 8, 2)),
    "fp8, all rows in one group": (
        (0, 0, 17, 0),
        17,
        128,
        64,
        "float8_e4m3fn",
        None,
        False,
        "bfloat16",
        Tiles(64, 128, 2, 1, 8),
    ),
    "int8, many rows": ((30, 0, 45), 75, 192, 256, "int8", None, False, "bfloat16", ManyTiles(24, 128, 2, 2)),
    "int4, many rows, rows of none": (
        (3, 21),
        40,
        256,
        256,
        "int4",
        64,
        False,
        "float16",
        ManyTiles(16, 256, 3, 1),
    ),
    "int4, many rows of one group, zero points": (
        (26,),
        26,
        128,
        128,
        "int4",
        32,
        True,
        "bfloat16",
        ManyTiles(16, 128, 2),
    ),
    "int8, no rows": ((0, 0), 9, 64, 64, "int8", None, False, "bfloat16", Tiles(64, 64, 2, 1, 8, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_within_rounding(execution, kernel, name):
    sizes, M, K, N, w_dtype, group, asymmetric, dtype, tiles = CASES[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(M, K)), dtype)
    w = weight((len(sizes), K, N), w_dtype, group, asymmetric)
    # Rows of no group may hold anything.
    y = computed(execution, kernel, x.at[sum(sizes) :].set(jnp.nan), to_fragments(w), sizes, dtype, tiles)
    with jax.enable_x64(True):
        exact, magnitude = by_loop(x, w.dequantize(jnp.float64), sizes)
    # One rounding of the result, and float32's of K products and their groups.
    bound = np.abs(exact) * jnp.finfo(dtype).eps / 2 + 2e-6 * (magnitude + 1)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= bound).all()
    np.testing.assert_array_equal(np.asarray(y[sum(sizes) :], np.float32), 0)


def test_only_what_meets_a_nan_becomes_one(execution, kernel):
    """A row of x beside other groups' rows in a stretch, and a group's column by its scale and by an element."""
    sizes = (3, 4, 2)
    x = jnp.zeros((9, 64), jnp.bfloat16).at[1].set(1).at[2, 5].set(jnp.nan)
    w = weight((3, 64, 64), "float8_e4m3fn", 64)
    w = dataclasses.replace(w, values=w.values.at[1, 7, 3].set(jnp.nan), scales=w.scales.at[1, 0, 40].set(jnp.nan))
    y = computed(execution, kernel, x, to_fragments(w), sizes, "bfloat16", Tiles(64, 64, 2, 1, 8))
    y = np.asarray(y, np.float32)
    columns = np.isin(np.arange(64), (3, 40))
    assert np.isnan(y[2]).all() and np.isfinite(y[[0, 1, 7, 8]]).all()
    assert (np.isnan(y[3:7]) == columns).all() and (y[3:7, ~columns] == 0).all() and (y[[0, 7, 8]] == 0).all()


@pytest.mark.parametrize("num_groups, length", [(3, 8), (16, 24), (37, 64)])
def test_each_row_is_visited_once(kernel, num_groups, length):
    """Whatever the sizes, by its own group, from a row on that copies may begin at; the last ones by none."""
    rng, numbers = np.random.default_rng(0), jnp.arange(max_visits(129, num_groups, length))
    find = jax.jit(
        jax.vmap(lambda i, sizes, num_rows: kernel._visit(i, sizes, num_groups, num_rows, length), (0, None, None))
    )
    for num_rows in (1, 2, 7, 8, 9, 20, 64, 129):
        for _ in range(20):
            sizes = np.diff(np.sort(rng.integers(0, num_rows + 1, num_groups)), prepend=0)
            owners = np.repeat(np.arange(num_groups + 1), [*sizes, num_rows - sizes.sum()])
            times = np.zeros(num_rows, int)
            for i, visit in enumerate(np.stack(find(numbers, sizes, num_rows), axis=1)):
                group, row, begin, end = visit
                rows = np.arange(max(begin, row), min(end, row + length))
                assert row % 8 == 0 and (owners[rows] == group).all()
                assert rows.size == 0 or i < max_visits(num_rows, num_groups, length)
                times[rows] += 1
            assert (times == 1).all()


@pytest.mark.parametrize("w_dtype, group", [("int4", 32), ("int4", 128), ("int8", None), ("float8_e4m3fn", None)])
@pytest.mark.parametrize("num_rows", [1, 16, 128, 4096])
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (1024, 3584), (64 * 3, 64 * 5)])
def test_chosen_tiles_fit(w_dtype, group, num_rows, shape):
    in_dim, out_dim = shape
    group = in_dim if group is None or in_dim % group else group
    case = dataclasses.replace(
        CASE, w_dtype=w_dtype, num_rows=num_rows, in_dim=in_dim, out_dim=out_dim, w_block=(group, 1)
    )
    tiles = choose_tiles(case)
    assert shared_bytes(case, tiles) <= SHARED_BYTES
    assert out_dim % tiles.columns == 0 and tiles.rows % 8 == 0
    assert isinstance(tiles, ManyTiles) or tiles.num_parts == 1
    # From 16 rows of each of the 8 groups on, where blocks of threads have 128 columns or 256.
    assert isinstance(tiles, ManyTiles) == (num_rows >= 128 and out_dim > 320)
    assert group == in_dim or tiles.depth % group == 0


def test_what_is_supported():
    def reason(**changes):
        return supports("pallas", dataclasses.replace(CASE, **changes), H100)

    if jax.__version_info__ < (0, 11):
        assert "needs JAX 0.11" in reason()
        return
    assert reason() is None and reason(w_dtype="int8", w_block=(4096, 1)) is None and reason(zero_points=True) is None
    assert "compute capability 9.0" in supports("pallas", CASE, Target("gpu", (10, 0)))
    assert "bfloat16 or float16, not float32" in reason(x_dtype="float32")
    assert "to_fragments" in reason(w_layout="rows")
    assert "1 to 256 groups, not 300" in reason(num_groups=300)
    assert "multiples of 64, not K 4096 and N 100" in reason(out_dim=100)
    with pytest.raises(ValueError, match=r"fragments.*set impl to 'auto' or 'widened'"):
        choose("pallas", dataclasses.replace(CASE, w_layout="rows"), H100)
    assert choose("auto", CASE, H100)[0] == "pallas"
    assert choose("auto", dataclasses.replace(CASE, w_layout="rows"), H100)[0] == "widened"
    assert choose("auto", CASE, Target("tpu"))[0] == "widened"


@pytest.mark.parametrize("w_dtype", ["int4", "int8", "float8_e4m3fn"])
def test_a_case_has_the_elements_of_its_fragments(w_dtype):
    """Not the words that four bits are packed in."""
    w = jax.eval_shape(to_fragments, weight((2, 128, 64), w_dtype, 64))
    case = case_of(jax.ShapeDtypeStruct((5, 128), jnp.bfloat16), w, "bfloat16")
    assert case == dataclasses.replace(
        CASE, w_dtype=w_dtype, num_rows=5, in_dim=128, out_dim=64, w_block=(64, 1), num_groups=2
    )


@pytest.mark.parametrize("impl", ["reference", "widened"])
def test_other_implementations_take_fragments(impl):
    w, x = weight((3, 128, 64), "int4", 32), jax.random.normal(jax.random.key(0), (20, 128), jnp.float32)
    sizes = jnp.asarray((9, 0, 6), jnp.int32)
    actual, expected = (
        quantized_grouped_matmul(x, one, sizes, impl=impl, target=Target("cpu")) for one in (to_fragments(w), w)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11, and says that first")
def test_a_gradient_is_refused():
    w, sizes = to_fragments(weight((2, 64, 64), "int8", None)), jnp.asarray((2, 2), jnp.int32)

    def total(x):
        return quantized_grouped_matmul(x, w, sizes, impl="pallas", target=H100).sum()

    with pytest.raises(ValueError, match="has no gradient; set the impl to 'widened'"):
        jax.make_jaxpr(jax.grad(total))(jnp.ones((4, 64), jnp.bfloat16))
