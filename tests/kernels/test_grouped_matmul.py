"""Every grouped product against a loop over groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from kernels.grouped_matmul import GroupedCase, batched, choose, grouped_matmul, loop, supports
from kernels.target import Target

FAST = ["ragged_dot", "loop", "batched"]
IMPLEMENTATIONS = ["reference", *FAST]


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 8 rows, so that small arrays have several and ragged last ones."""
    monkeypatch.setattr(loop, "_BLOCK", 8)
    monkeypatch.setattr(batched, "_BLOCK", 8)


def draw(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def explicit(x, w, sizes, dy):
    """(y, dx, dw) in float64, one group after another."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def computed(impl, x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, w)
    return y, *pullback(dy)


SIZES = {
    "even": (10, 10, 10, 10),
    "uneven": (1, 23, 9, 7),
    "empty first and last": (0, 17, 23, 0),
    "empty middle": (8, 0, 0, 32),
    "all in one": (0, 0, 40, 0),
    "rows of no group": (5, 0, 12, 3),
    "nothing": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_product_and_gradients(short_blocks, impl, name):
    x, w, dy = draw((40, 6), 0), draw((4, 6, 5), 1), draw((40, 5), 2)
    sizes = np.array(SIZES[name], np.int32)
    actual = jax.jit(computed, static_argnums=0)(impl, x, w, sizes, dy)
    for a, b in zip(actual, explicit(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for ungrouped in (actual[0], actual[1]):
        assert (np.asarray(ungrouped)[sizes.sum() :] == 0).all()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 19), min_size=1, max_size=5),
    spare=st.integers(0, 9),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@example([3], 0, (1, 1))  # fewer rows than a block
@example([1], 0, (2, 1))
@example([0, 0], 0, (2, 3))  # no rows at all
def test_any_groups(short_blocks, sizes, spare, widths):
    M, (K, N) = sum(sizes) + spare, widths
    x, w, dy = draw((M, K), 0, np.float64), draw((len(sizes), K, N), 1, np.float64), draw((M, N), 2, np.float64)
    expected = explicit(x, w, sizes, dy)
    with jax.enable_x64(True):
        for impl in IMPLEMENTATIONS:
            actual = jax.jit(computed, static_argnums=0)(impl, x, w, np.array(sizes, np.int32), dy)
            for a, b in zip(actual, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("impl", FAST)
def test_real_block_length(impl):
    x, w, dy = draw((1500, 4), 0), draw((3, 4, 8), 1), draw((1500, 8), 2)
    sizes = np.array([513, 0, 900], np.int32)
    actual = jax.jit(computed, static_argnums=0)(impl, x, w, sizes, dy)
    for a, b in zip(actual, explicit(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["loop", "batched", "ragged_dot"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_of_no_group_may_hold_anything(short_blocks, impl, poison):
    x, w, dy = draw((40, 6), 0), draw((3, 6, 5), 1), draw((40, 5), 2)
    sizes = np.array([9, 4, 13], np.int32)
    expected = explicit(x, w, sizes, dy)
    x[26:], dy[26:] = poison, poison
    for a, b in zip(jax.jit(computed, static_argnums=0)(impl, x, w, sizes, dy), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_rows_of_no_group_are_zeros_whatever_the_weights(short_blocks, impl):
    w = np.full((3, 6, 5), np.nan, np.float32)
    y = grouped_matmul(draw((40, 6), 0), w, np.array([9, 4, 13], np.int32), impl=impl)
    assert np.isnan(y[:26]).all() and (np.asarray(y[26:]) == 0).all()


@pytest.mark.parametrize("impl", FAST)
def test_products_accumulate_in_float32(impl):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 32), (3, 32, 16), (64, 16))]
    sizes = np.array([40, 1, 20], np.int32)
    jaxpr = jax.make_jaxpr(lambda x, w, dy: computed(impl, x, w, sizes, dy))(*shapes)
    assert product_dtypes(jaxpr.jaxpr) == ["float32"] * 3


def product_dtypes(jaxpr) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            found.append(equation.outvars[0].aval.dtype.name)
        for inner in jaxprs_in_params(equation.params):
            found += product_dtypes(inner)
    return found


@pytest.mark.parametrize("impl", FAST)
def test_bfloat16_rounds_once(short_blocks, impl):
    """Error against float64 of the same rounded inputs: one rounding of the result, whatever the length of the sum."""
    x, w, dy = (
        jnp.asarray(draw(shape, seed), jnp.bfloat16) for seed, shape in enumerate([(64, 32), (3, 32, 16), (64, 16)])
    )
    sizes = np.array([40, 1, 20], np.int32)
    actual = jax.jit(computed, static_argnums=0)(impl, x, w, sizes, dy)
    for a, b in zip(actual, explicit(x, w, sizes, dy), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float64) - b).max() <= np.abs(b).max() * 2**-8


@pytest.mark.parametrize("impl", FAST)
def test_under_remat_scan_and_shard_map(short_blocks, impl):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    x, w = draw((80, 6), 0), draw((3, 6, 6), 1) / 3
    sizes = np.array([[9, 4, 7], [0, 20, 0], [1, 2, 3], [20, 0, 0]], np.int32)

    def local(x, w, sizes):
        body = jax.checkpoint(lambda x, _: (jnp.tanh(grouped_matmul(x, w, sizes[0], impl=impl)), None))
        return jax.lax.scan(body, x, None, length=2)[0]

    def sharded(x, w):
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(split, whole, split), out_specs=split, check_vma=False)
        return jnp.sum(mapped(x, w, sizes) ** 2)

    def plainly(x, w):
        parts = x.reshape(4, 20, 6)
        for _ in range(2):
            parts = [
                jnp.tanh(grouped_matmul(part, w, size, impl="reference"))
                for part, size in zip(parts, sizes, strict=True)
            ]
        return sum(jnp.sum(part**2) for part in parts)

    for a, b in zip(*(jax.jit(jax.grad(f, argnums=(0, 1)))(x, w) for f in (sharded, plainly)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def case():
    return GroupedCase("bfloat16", 32768, 8, 1024, 3584)


@pytest.mark.parametrize(
    ("target", "impl"), [(Target("cpu"), "loop"), (Target("tpu"), "ragged_dot"), (Target("gpu", (8, 0)), "batched")]
)
def test_auto(target, impl):
    assert choose("auto", case(), target)[0] == impl
    assert choose("reference", case(), target)[0] == "reference"
    assert supports(impl, case(), target) is None


def test_auto_runs_on_this_machine():
    x, w, sizes = draw((20, 4), 0), draw((2, 4, 3), 1), np.array([12, 8], np.int32)
    np.testing.assert_array_equal(grouped_matmul(x, w, sizes), grouped_matmul(x, w, sizes, impl="loop"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": draw((40, 7), 0)}, r"needs x \[M,K\]"),
        ({"x": draw((40, 6), 0, np.float16)}, "one dtype"),
        ({"x": np.zeros((40, 6), np.int32), "w": np.zeros((4, 6, 5), np.int32)}, "int32: use bfloat16"),
        ({"sizes": np.zeros(3, np.int32)}, r"group_sizes \[3\]"),
        ({"sizes": np.zeros(4, np.float32)}, "need int32"),
        ({"impl": "megablox"}, "'megablox' is unknown"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    arguments = {
        "x": draw((40, 6), 0),
        "w": draw((4, 6, 5), 1),
        "sizes": np.full(4, 10, np.int32),
        "impl": "loop",
        **changes,
    }
    x, w, sizes = (arguments.pop(name) for name in ("x", "w", "sizes"))
    with pytest.raises(ValueError, match=words):
        grouped_matmul(x, w, sizes, **arguments)
