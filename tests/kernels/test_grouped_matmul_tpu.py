"""The grouped product on TPU: in Pallas's interpreter, the table of visits, tiles, and TPU's own compiler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import (
    GroupedCase,
    choose,
    grouped_matmul,
    quantized,
    ragged_dot,
    supports,
    tpu,
    tpu_scaled,
    tpu_scaled_tiles,
)
from kernels.grouped_matmul.tpu_tiles import (
    SMEM_BYTES,
    VMEM_BYTES,
    Shape,
    Tiles,
    check,
    choose_tiles,
    needed_bytes,
    num_visits,
    shape_of,
    table_bytes,
)
from kernels.grouped_matmul.tpu_visits import visits_of
from kernels.target import Target
from quantization.qarray import QArray, quantize
from tests.kernels.absent_tpu import SLICES, compiled_for, needs_libtpu

TPU = Target("tpu")
PASSES = ("product", "transposed", "weight_gradient")


def draw(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def operands(sizes, M, K, N, dtype=jnp.float32):
    return (
        draw((M, K), 0, dtype),
        draw((len(sizes), K, N), 1, dtype),
        jnp.asarray(sizes, jnp.int32),
        draw((M, N), 2, dtype),
    )


def explicit(x, w, sizes, dy):
    """(y, dx, dw) in float64, one group after another."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def kernels(x, w, sizes, dy, rows=None, depth=None, columns=None):
    """(y, dx, dw) in the interpreter. `depth` and `columns` of both widths, K and N."""
    (M, K), N = x.shape, w.shape[2]
    tiles = [Tiles(rows or M, depth or K, columns or N), Tiles(rows or M, depth or N, columns or K)]
    y = tpu.product(x, w, sizes, tiles=tiles[0], interpret=True)
    dx = tpu.product(dy, w, sizes, transpose=True, tiles=tiles[1], interpret=True)
    return y, dx, tpu.weight_gradient(x, dy, sizes, tiles=tiles[0], interpret=True)


SIZES = {
    "even": (128, 128, 64, 64),
    "uneven": (1, 200, 96, 3),
    "empty first and last": (0, 260, 124, 0),
    "empty middle": (130, 0, 0, 170),
    "all in one": (0, 0, 384, 0),
    "rows of no group": (5, 0, 120, 3),
    "whole tiles of no group": (0, 7, 0, 0),
    "nothing": (0, 0, 0, 0),
    "three in a tile": (130, 10, 10, 200),
}
_by_rows_of_128 = jax.jit(functools.partial(kernels, rows=128))
_by_several_steps = jax.jit(functools.partial(kernels, rows=128, depth=256, columns=128))


@pytest.mark.parametrize("name", SIZES)
def test_product_and_gradients(name):
    given = operands(SIZES[name], 384, 24, 40)
    actual = _by_rows_of_128(*given)
    for a, b in zip(actual, explicit(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for ungrouped in actual[:2]:
        assert (np.asarray(ungrouped)[sum(SIZES[name]) :] == 0).all()


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(shares=st.lists(st.integers(0, 9), min_size=5, max_size=5), spare=st.integers(0, 9))
@example([0, 0, 0, 0, 0], 1)
@example([0, 0, 0, 1, 0], 0)
@example([1, 9, 1, 1, 1], 0)
def test_any_groups(shares, spare):
    """Several steps over depth and columns; a last tile that reaches over the edge."""
    sizes = [300 * share // max(1, sum(shares) + spare) for share in shares]
    given = operands(sizes, 300, 256, 512)
    actual = _by_several_steps(*given)
    for a, b in zip(actual, explicit(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_rows_of_other_groups_may_hold_anything():
    x, w, sizes, dy = operands((100, 0, 90, 0), 384, 24, 40)
    foreign = jnp.arange(384)[:, None] >= 190
    x, dy = (jnp.where(foreign, jnp.nan, array) for array in (x, dy))
    # A group's row of infinities stays the group's.
    x = x.at[3].set(jnp.inf)
    y, dx, dw = _by_rows_of_128(x, w, sizes, dy)
    assert (np.asarray(y)[190:] == 0).all() and (np.asarray(dx)[190:] == 0).all()
    assert np.isfinite(y[100:]).all() and np.isfinite(dx).all() and np.isfinite(dw[1:]).all()
    assert (np.asarray(dw[1]) == 0).all()


def test_error_in_bfloat16_is_at_most_half_above_that_of_xla():
    given = operands((70, 0, 130), 200, 256, 128, jnp.bfloat16)
    x, w, sizes, dy = given
    theirs = (
        ragged_dot.product(x, w, sizes),
        ragged_dot.product(dy, w, sizes, transpose=True),
        ragged_dot.weight_gradient(x, dy, sizes),
    )
    for ours, other, exact in zip(kernels(*given, depth=128), theirs, explicit(*given), strict=True):
        assert ours.dtype == jnp.bfloat16
        norm = [np.linalg.norm(np.asarray(a, np.float64) - exact) for a in (ours, other)]
        assert norm[0] <= 1.5 * norm[1]


_visits = jax.jit(visits_of, static_argnums=(1, 2, 3), static_argnames="every")
FEW_BITS = {
    "int8": ("int8", "int8", "rows"),
    "int8 by int4": ("int8", "int4", "rows"),
    "fp8 in columns": ("float8_e4m3fn", "float8_e5m2", "columns"),
    "w8": ("bfloat16", "int8", "columns"),
    "w4": ("bfloat16", "int4", "rows"),
}


@functools.partial(jax.jit, static_argnums=0)
def few_bits(name, x, w):
    x_dtype, w_dtype, layout = FEW_BITS[name]
    x = x.astype(x_dtype) if x_dtype == "bfloat16" else quantize(x, x_dtype, (1, None))
    return x, quantize(w, w_dtype, (1, None, 1), layout=layout)


@pytest.mark.parametrize("name", FEW_BITS)
def test_few_bits(name):
    """Two steps over depth, three groups and rows of none; scales differ between experts."""
    x, w, sizes, dy = operands((130, 0, 10, 200), 384, 256, 200)
    x, w = few_bits(name, x, w * jnp.asarray([1e-3, 1, 10, 100])[:, None, None])
    tiles = Tiles(128, 128, 128)
    y = tpu_scaled.product(x, w, sizes, jnp.float32, tiles=tiles, interpret=True)
    wide = [a.dequantize() if isinstance(a, QArray) else a for a in (x, w)]
    exact, size = explicit(*wide, sizes, dy)[0], explicit(*map(jnp.abs, wide), sizes, dy)[0]
    assert (np.abs(np.asarray(y, np.float64) - exact) <= 2.0**-18 * size).all()


def test_few_bits_on_tpu():
    case = quantized.QuantizedGroupedCase("int8", "int8", 4096, 4096, 14336, (1, 4096), (4096, 1), num_groups=8)
    assert quantized.choose("pallas", case, TPU)[0] == "pallas" and quantized.choose("auto", case, TPU)[0] == "widened"
    for changes, words in [
        ({"x_dtype": "int4"}, "not int4"),
        ({"w_dtype": "float8_e4m3fn"}, "can't be multiplied together"),
        ({"in_dim": 2**18, "x_block": (1, 2**18), "w_block": (2**18, 1)}, "int32"),
    ]:
        assert words in quantized.supports("pallas", dataclasses.replace(case, **changes), TPU)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(lambda sizes: sum(sizes) <= 61),
    tile=st.sampled_from([4, 16]),
    every=st.sampled_from(["tile", "group"]),
)
@example([0, 0, 0, 0, 0, 0], 4, "tile")
@example([0, 0, 0, 0, 0, 0], 16, "group")
@example([0, 0, 61, 0, 0, 0], 16, "group")
def test_visits_cover_each_row_once(sizes, tile, every):
    M = 61
    number = num_visits(Shape(M, len(sizes), 1, 1, 2), Tiles(tile, 1, 1))
    visits = _visits(jnp.asarray(sizes, jnp.int32), M, tile, number, every=every)
    group, place, start, stop = (np.asarray(field) for field in visits)
    owner = np.full(-(-M // tile) * tile, -1)
    for g, t, low, high in zip(group, place, start, stop, strict=True):
        assert 0 <= low <= high <= tile and 0 <= g < len(sizes) and 0 <= t < -(-M // tile)
        assert (owner[t * tile + low : t * tile + high] == -1).all()
        owner[t * tile + low : t * tile + high] = g
    np.testing.assert_array_equal(owner[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
    assert (owner[sum(sizes) :] == -1).all()
    # Results leave vector memory when their index changes, so each index must have all its visits in a row.
    follows, count = (place, -(-M // tile)) if every == "tile" else (group, len(sizes))
    assert (np.diff(follows) >= 0).all() and set(follows) == set(range(count))


MIXTRAL = GroupedCase("bfloat16", 16384, 8, 4096, 14336)


def test_named_on_tpu_and_never_chosen():
    assert choose("pallas", MIXTRAL, TPU)[0] == "pallas"
    impl, reason = choose("auto", MIXTRAL, TPU)
    assert impl == "ragged_dot" and "not measured" in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "not float16"),
        ({"num_rows": 0}, "needs rows"),
        ({"in_dim": 127 * 1024 + 8}, "no small divisor"),
        ({"num_groups": 40000}, "scalar memory"),
    ],
)
def test_refuses_what_it_cannot_do(changes, words):
    case = GroupedCase(**{**vars(MIXTRAL), **changes})
    assert words in supports("pallas", case, TPU)
    with pytest.raises(ValueError, match="'pallas' can't run"):
        choose("pallas", case, TPU)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tiles(2048, 4096, 2048), r"Tiles\(rows=2048, .* needs .* MiB of vector memory"),
        (Tiles(100, 128, 128), "rows must be a multiple of 128"),
        (Tiles(128, 128, 100), "columns must be a multiple of 128"),
    ],
)
def test_tiles_without_room_are_named(which, tile, words):
    with pytest.raises(ValueError, match=words):
        check(Shape(8192, 8, 4096, 4096, 2), tile, which)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chosen_tiles_fit(which, dtype):
    # Mixtral, moe-1b, DeepSeek's, decode of few rows, widths with awkward divisors.
    for M, E, K, N in [
        (16384, 8, 4096, 14336),
        (32768, 8, 1024, 3584),
        (131072, 128, 7168, 2048),
        (64, 64, 2048, 1408),
    ]:
        shape = shape_of(GroupedCase(dtype, M, E, K, N), which)
        tiles = choose_tiles(shape, which)
        check(shape, tiles, which)
        assert needed_bytes(shape, tiles, which) <= VMEM_BYTES and table_bytes(shape, tiles) <= SMEM_BYTES


def compiled(chip, function, *shapes):
    """A function of arrays, given as (shape, dtype)."""
    return compiled_for(chip, function, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))


@needs_libtpu
@pytest.mark.parametrize("chip", SLICES)
def test_compiles_for_tpu(chip):
    """By the public op: forward and both gradients, with widths that fill no register and a depth in two steps."""

    def both(x, w, sizes):
        def loss(x, w):
            return jnp.sum(grouped_matmul(x, w, sizes, impl="pallas", target=TPU).astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(x, w)

    def scaled(x, w, sizes):
        w = QArray(w, jnp.ones((3, 1, 200)))
        x = QArray(x, jnp.ones((300, 1)))
        return quantized.quantized_grouped_matmul(x, w, sizes, impl="pallas", target=TPU)

    sizes = ((3,), jnp.int32)
    compiled(chip, scaled, ((300, 72), jnp.int8), ((3, 72, 200), jnp.int8), sizes)
    program = compiled(chip, both, ((300, 72), jnp.bfloat16), ((3, 72, 200), jnp.bfloat16), sizes)
    assert program.as_text().count("tpu_custom_call") >= 3


@needs_libtpu
@pytest.mark.parametrize("which", PASSES)
def test_vector_memory_is_not_underestimated(monkeypatch, which):
    """The compiler, held to our own count for the tile, has enough."""
    M, K, N, tile = 1024, 1024, 1024, Tiles(256, 512, 512)
    monkeypatch.setattr(tpu, "VMEM_BYTES", needed_bytes(Shape(M, 2, K, N, 2), tile, which))
    x, w, sizes = ((M, K), jnp.bfloat16), ((2, K, N), jnp.bfloat16), ((2,), jnp.int32)
    if which == "weight_gradient":
        compiled("v5e", functools.partial(tpu.weight_gradient, tiles=tile), x, x, sizes)
    else:
        compiled("v5e", functools.partial(tpu.product, transpose=which == "transposed", tiles=tile), x, w, sizes)


@needs_libtpu
@pytest.mark.parametrize("x_dtype", ["bfloat16", "int8"])
def test_vector_memory_of_few_bits_is_not_underestimated(monkeypatch, x_dtype):
    M, K, N, tile = 1024, 1024, 1024, Tiles(256, 512, 512)
    case = quantized.QuantizedGroupedCase(
        x_dtype, "int8", M, K, N, (1, K) if x_dtype == "int8" else None, (K, 1), num_groups=2
    )
    monkeypatch.setattr(tpu_scaled, "VMEM_BYTES", tpu_scaled_tiles.needed_bytes(case, tile))

    def scaled(x, w, sizes):
        x = QArray(x, jnp.ones((M, 1))) if x_dtype == "int8" else x
        return tpu_scaled.product(x, QArray(w, jnp.ones((2, 1, N))), sizes, jnp.bfloat16, tiles=tile)

    compiled("v5e", scaled, ((M, K), jnp.dtype(x_dtype)), ((2, K, N), jnp.int8), ((2,), jnp.int32))


@needs_libtpu
def test_compiles_in_float32():
    compiled("v6e", tpu.product, ((256, 256), jnp.float32), ((2, 256, 128), jnp.float32), ((2,), jnp.int32))
