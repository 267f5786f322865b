"""The quantised array: its rounding, block by block, its invariants, and its way through JAX's transformations."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint import CheckpointConfig, CheckpointStore
from quantization.qarray import LARGEST, QArray, quantize, round_to

# Half of the distance between neighbours: relative to a normal number, and for those below, in units of the scale.
HALF_STEPS = {"int4": (0, 0.5), "int8": (0, 0.5), "float8_e4m3fn": (2**-4, 2**-10), "float8_e5m2": (2**-3, 2**-17)}
INTEGERS = ("int4", "int8")


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def repeated(scales, block):
    """Float64, one for each element."""
    scales = np.asarray(scales, np.float64)
    for axis, length in enumerate(block):
        scales = scales.repeat(length, axis)
    return scales


_quantize = jax.jit(quantize, static_argnames=("dtype", "block", "layout", "asymmetric"))


def explicit(array: QArray):
    """Float64 of what it stands for, from its fields."""
    values = np.asarray(array.values.astype(jnp.float32), np.float64)
    values = values if array.layout == "rows" else values.swapaxes(-1, -2)
    zeros = 0 if array.zero_points is None else repeated(array.zero_points, array.block)
    return (values - zeros) * repeated(array.scales, array.block)


@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from(list(LARGEST)),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    counts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    magnitude=st.sampled_from([1e-30, 1.0, 1e37]),
    offset=st.sampled_from([0.0, 0.5, -3.0]),
    asymmetric=st.booleans(),
    layout=st.sampled_from(["rows", "columns"]),
    seed=st.integers(0, 99),
)
@example("int8", (2, 2), (1, 1), 1.0, 1e4, True, "rows", 0)  # a block far from zero
@example("int4", (1, 1), (2, 2), 1.0, 0.0, True, "rows", 0)  # blocks of one element
@example("float8_e4m3fn", (3, 3), (1, 1), 0.0, 0.0, False, "rows", 0)  # zeros
def test_rounds_to_nearest_in_every_block(dtype, blocks, counts, magnitude, offset, asymmetric, layout, seed):
    shape = tuple(length * count for length, count in zip(blocks, counts, strict=True))
    x = (draw(shape, seed) + np.float32(offset)) * np.float32(magnitude)
    q = _quantize(x, dtype, blocks, layout=layout, asymmetric=asymmetric and dtype in INTEGERS)
    assert q.shape == shape and q.block == blocks and q.dtype == dtype and q.scales.shape == counts
    relative, absolute = HALF_STEPS[dtype]
    scales = repeated(q.scales, q.block)
    # A zero point is rounded too, which moves one end of the range by half a step.
    absolute += 0.5 if q.zero_points is not None else 0
    bound = np.maximum(np.abs(x) * relative, scales * absolute) * (1 + 1e-4)
    assert (np.abs(explicit(q) - x) <= bound).all()
    assert (np.asarray(q.scales) > 0).all()
    np.testing.assert_allclose(q.dequantize(), explicit(q), rtol=1e-6)
    largest = np.abs(np.asarray(q.values.astype(jnp.float32)))
    assert largest.max() <= LARGEST[dtype]
    if q.zero_points is None and np.any(x):
        assert largest.max() == LARGEST[dtype]


@pytest.mark.parametrize("dtype", LARGEST)
def test_rounds_ties_to_even_and_saturates(dtype):
    """Every value of the format, every midpoint of two, and their neighbours in float32."""
    if dtype in INTEGERS:
        values = np.arange(-LARGEST[dtype], LARGEST[dtype] + 1)
    else:
        values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float64)
        values = np.unique(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middles]).astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf)), [1e6, -np.inf]])
    x = x.astype(np.float32)
    actual = np.asarray(jax.jit(lambda x: round_to(x, dtype).astype(jnp.float32))(x), np.float64)
    distances = np.abs(np.clip(x, values[0], values[-1]).astype(np.float64)[:, None] - values)
    nearest = values[distances.argmin(1)]
    ties = np.isclose(np.sort(distances)[:, 0], np.sort(distances)[:, 1], rtol=0, atol=0)
    np.testing.assert_array_equal(actual[~ties], nearest[~ties])
    kept = np.isin(np.abs(actual), np.abs(values))
    assert kept.all() and (np.abs(actual[ties] - x[ties]) == distances.min(1)[ties]).all()
    even = np.searchsorted(values, actual[ties]) - np.searchsorted(values, 0)
    assert (even % 2 == 0).all()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_nan_of_its_block_only(dtype, bad):
    x = draw((4, 6))
    x[1, 4] = bad
    q = quantize(x, dtype, (2, 3))
    expected = np.zeros((4, 6), bool)
    expected[:2, 3:] = True
    np.testing.assert_array_equal(np.isnan(q.dequantize()), expected)
    np.testing.assert_array_equal(np.isnan(q.scales), [[False, True], [False, False]])


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_nan_shows_in_a_large_array_too(place, asymmetric):
    """Beyond some thousand elements XLA's maximum on a CPU leaves NaNs out."""
    x = draw((64, 64)).astype(np.float32)
    x[5, place] = np.nan
    q = jax.jit(lambda x: quantize(x, "int8", (1, None), asymmetric=asymmetric))(x)
    assert np.isnan(q.scales[5, 0]) and np.isfinite(np.delete(q.scales, 5)).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_least_normal_numbers(dtype):
    """Their scale would be subnormal, and those are zeros to many a device: it is the least normal one."""
    x = np.float32([[1e-37, -9e-38, 5e-38, 1.5e-38]])
    q = quantize(x, dtype, (1, None))
    assert float(q.scales[0, 0]) == max(np.float32(1e-37) / LARGEST[dtype], jnp.finfo(jnp.float32).tiny)
    assert (np.abs(explicit(q) - x) <= np.maximum(np.asarray(q.scales) / 2, 2**-3 * np.abs(x))).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_zeros_and_subnormals(dtype):
    x = np.zeros((2, 4), np.float32)
    x[1] = [1e-44, -1e-44, 0, 1e-43]
    q = quantize(x, dtype, (1, None))
    assert float(q.scales[0, 0]) == 1 and (np.asarray(q.dequantize())[0] == 0).all()
    assert np.isfinite(q.dequantize()).all() and np.isfinite(1 / np.asarray(q.scales)).all()
    assert (np.abs(np.asarray(q.dequantize()) - x) <= jnp.finfo(jnp.float32).tiny * LARGEST[dtype]).all()


@pytest.mark.parametrize("value", [5.3, -5.3, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_constant_is_exact_with_a_zero_point(dtype, value):
    q = quantize(np.full((4, 2), value, np.float32), dtype, (None, 1), asymmetric=True)
    np.testing.assert_allclose(q.dequantize(), value, rtol=1e-6)
    assert (np.abs(q.zero_points) <= LARGEST[dtype]).all()


def test_zeros_stay_zeros_with_zero_points():
    x = np.maximum(draw((8, 4)), 0)
    dequantized = np.asarray(quantize(x, "int4", (None, 1), asymmetric=True).dequantize())
    assert (dequantized[x == 0] == 0).all() and (x == 0).any()


def test_no_elements():
    q = quantize(jnp.zeros((0, 6)), "int8", (1, None))
    assert q.shape == (0, 6) and q.block == (1, 6) and q.dequantize().shape == (0, 6)


@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
def test_dequantises_in_float32_and_rounds_once(out):
    q = quantize(draw((16, 32)), "int8", (1, 8))
    np.testing.assert_array_equal(q.dequantize(out), explicit(q).astype(np.float32).astype(jnp.dtype(out)))


def test_of_halves_and_bfloat16():
    for dtype in ("float16", "bfloat16"):
        x = jnp.asarray(draw((4, 8)), dtype)
        q, wide = quantize(x, "int8", (1, None)), quantize(x.astype(jnp.float32), "int8", (1, None))
        np.testing.assert_array_equal(q.values, wide.values)
        np.testing.assert_array_equal(q.scales, wide.scales)


def test_through_jit_and_eval_shape():
    x = draw((4, 6))
    for asymmetric in (False, True):
        make = lambda x, asymmetric=asymmetric: quantize(x, "int4", (2, None), layout="columns", asymmetric=asymmetric)  # noqa: E731
        abstract, q, eager = jax.eval_shape(make, x), jax.jit(make)(x), make(x)
        assert abstract.check().shape == q.shape == (4, 6) and abstract.block == (2, 6)
        assert jax.tree.structure(abstract) == jax.tree.structure(q) == jax.tree.structure(eager)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
    traces = []
    dequantize = jax.jit(lambda q: traces.append(q.layout) or q.dequantize())
    dequantize(q), dequantize(q), dequantize(quantize(x, "int4", (2, None), asymmetric=True))
    assert traces == ["columns", "rows"]


def test_a_slice_of_layers_is_the_quantised_slice():
    w = draw((3, 8, 6))
    q = quantize(w, "int8", (1, 4, 1), layout="columns", asymmetric=True)
    seen = jax.lax.map(lambda layer: layer.check().dequantize(), q)
    np.testing.assert_allclose(seen, explicit(q), rtol=1e-6)
    for i in range(3):
        one = quantize(w[i], "int8", (4, 1), layout="columns", asymmetric=True)
        np.testing.assert_array_equal(jax.tree.map(lambda leaf, i=i: leaf[i], q).values, one.values)


def test_sharded_without_moving_elements():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    put = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    q = jax.device_put(quantize(draw((8, 6)), "int8", (1, None)), put)
    assert q.values.sharding == q.scales.sharding == put
    compiled = jax.jit(QArray.dequantize).lower(q).compile()
    np.testing.assert_allclose(compiled(q), explicit(q), rtol=1e-6)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("dtype", LARGEST)
def test_through_a_checkpoint(tmp_path, dtype):
    state = {"layer": {"w": quantize(draw((8, 6)), dtype, (4, 1), layout="columns", asymmetric=dtype in INTEGERS)}}
    config = {"architecture": {"num_layers": 1}, "run_config": {"name": "tiny"}, "on_note": lambda line: None}
    with CheckpointStore(tmp_path, CheckpointConfig(), **config) as store:
        store.save(1, state, data_state={}, metrics={})
        store.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored, _ = store.restore(abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


VALUES, SCALES = jnp.zeros((4, 6), jnp.int8), jnp.ones((2, 6))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (QArray(VALUES, SCALES, None, "diagonal"), "layout='diagonal' is unknown; choose one of rows, columns"),
        (QArray(VALUES.astype(jnp.int16), SCALES), "of int16 values: they can be int4, int8"),
        (QArray(VALUES, jnp.ones((3, 6))), r"shape \[4, 6\] with scales \[3, 6\]"),
        (QArray(VALUES, jnp.ones((2, 6)), None, "columns"), r"shape \[6, 4\] with scales \[2, 6\]"),
        (QArray(VALUES, jnp.ones(6)), r"scales \[6\]"),
        (QArray(VALUES, jnp.ones((0, 6))), r"scales \[0, 6\]"),
        (QArray(VALUES, SCALES.astype(jnp.bfloat16)), "bfloat16 scales"),
        (QArray(VALUES, SCALES, jnp.ones((1, 6))), r"zero points float32\[1, 6\]"),
        (QArray(VALUES, SCALES, jnp.ones((2, 6), jnp.int8)), r"zero points int8\[2, 6\]"),
    ],
)
def test_fields_that_disagree_are_named(array, words):
    with pytest.raises(ValueError, match=words):
        array.check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("int5", (1, 1)), "choose one of int4, int8"),
        (("int8", (1,)), "one length for each axis"),
        (("int8", (3, 1)), "each must divide"),
        (("int8", (0, 1)), "each must divide"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        quantize(draw((4, 6)), *arguments)
    with pytest.raises(ValueError, match="only int4 and int8"):
        quantize(draw((4, 6)), "float8_e5m2", (1, 1), asymmetric=True)
