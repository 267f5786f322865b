"""A residual sum and its norm: XLA's and the Hopper kernels (interpreted, or on a GPU) against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.norm import NormCase, add_rms_norm, choose, supports, tiles
from kernels.norm.tiles import Tiles, choose_tiles
from kernels.target import Target

H100 = Target("gpu", (9, 0))
EPSILON = 1e-5


def draw(shape, seed, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def exact(total, scale, offset, d_total, d_normed):
    """(normed, dx, dscale) of the sum, float64."""
    total, factors, dy = wide(total), wide(scale) + offset, sum(map(wide, d_normed))
    rstd = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON)
    hat, g = total * rstd, dy * factors
    dx = rstd * (g - hat * (g * hat).mean(-1, keepdims=True)) + wide(d_total)
    return hat * factors, dx, (dy * hat).reshape(-1, hat.shape[-1]).sum(0)


def assert_rounded_once(y, true, spread=0.0):
    """Nearest in y's dtype but for float32 arithmetic, whose errors are relative to terms of the size `spread`."""
    bound = float(jnp.finfo(y.dtype).eps) / 2 * np.abs(true) + 1e-5 * (np.abs(true) + spread)
    assert (np.abs(wide(y) - true) <= bound + 1e-9).all()


@pytest.fixture
def sums(monkeypatch, execution):
    """Plain sums where the interpreter has none: of what a thread has."""
    from kernels.norm import gpu

    def column_sums(row, columns, layout):
        # A warp has a quarter of a row, one part after another, and gives the sums of all columns four times over.
        parts = jnp.stack([(row * column).reshape(4, -1).sum(axis=1) for column in columns], axis=1)
        return jnp.tile(jnp.pad(parts, ((0, 0), (0, 8 - len(columns)))), (1, 4)).reshape(128)

    execution.put_plainly(monkeypatch, gpu, column_sums=column_sums)


@pytest.fixture
def pallas(monkeypatch, execution, sums):
    """`run` of the op with kernels that are interpreted, with races looked for, or compiled."""
    from kernels.norm import gpu

    for name in ("forward", "backward"):
        kernel = functools.partial(getattr(gpu, name), interpret=execution.interpret())
        monkeypatch.setattr(gpu, name, kernel)
    yield functools.partial(execution.run, impl="pallas", target=H100)
    execution.assert_no_races()


def both_ways(x, residual, scale, d_total, d_normed, **named):
    """Results and their gradients by (x, residual, scale)."""
    op = functools.partial(add_rms_norm, epsilon=EPSILON, uses=len(d_normed), **named)
    results, pull = jax.vjp(op, x, residual, scale)
    return results, pull((d_total, *d_normed))


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla(dtype, added):
    x, residual, scale = draw((2, 3, 96), 0, dtype), draw((2, 3, 96), 1, dtype), draw((96,), 2, "float32")
    residual = residual if added else None
    d_total, d_normed = draw(x.shape, 3, dtype), [draw(x.shape, 4, dtype)]
    (total, normed), (dx, d_residual, d_scale) = both_ways(x, residual, scale, d_total, d_normed, offset=1.0)
    np.testing.assert_array_equal(total, x + residual if added else x)
    true, true_dx, true_d_scale = exact(total, scale, 1.0, d_total, d_normed)
    assert_rounded_once(normed, true)
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(wide(dx), true_dx, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(wide(d_scale), true_d_scale, rtol=1e-4, atol=1e-4)
    assert d_residual is None if not added else (d_residual == dx).all()


def test_readers_get_what_one_would():
    x, scale = draw((4, 32), 0), draw((32,), 1, "float32")
    total, *normed = add_rms_norm(x, x, scale, epsilon=EPSILON, uses=3)
    assert len(normed) == 3 and all((one == normed[0]).all() for one in normed)
    np.testing.assert_array_equal(total, 2 * x)


@pytest.mark.parametrize(
    ("rows", "width", "added", "uses", "dtype", "scale_dtype", "offset"),
    [
        ((5,), 1024, True, 1, "bfloat16", "float32", 0.0),
        ((3, 2), 512, False, 3, "float16", "bfloat16", 1.0),
        ((2,), 2560, True, 2, "bfloat16", "float32", 1.0),
    ],
)
def test_kernel(pallas, rows, width, added, uses, dtype, scale_dtype, offset):
    x, residual = draw((*rows, width), 0, dtype), draw((*rows, width), 1, dtype) if added else None
    scale, d_total = draw((width,), 2, scale_dtype), draw(x.shape, 3, dtype)
    d_normed = [draw(x.shape, 4 + i, dtype) for i in range(uses)]
    results, gradients = pallas(both_ways, x, residual, scale, d_total, d_normed, offset=offset)
    total, *normed = results
    np.testing.assert_array_equal(total, x + residual if added else x)
    true, true_dx, true_d_scale = exact(total, scale, offset, d_total, d_normed)
    assert len(normed) == uses
    for one in normed:
        assert one.dtype == dtype and one.shape == x.shape
        assert_rounded_once(one, true)
    dx, d_residual, d_scale = gradients
    assert dx.dtype == dtype and d_scale.dtype == scale_dtype
    assert_rounded_once(dx, true_dx, spread=np.abs(true_dx).max())
    assert d_residual is None if not added else (d_residual == dx).all()
    bound = 1e-5 + (float(jnp.finfo(scale_dtype).eps) / 2 if scale_dtype != "float32" else 0)
    np.testing.assert_allclose(wide(d_scale), true_d_scale, rtol=bound, atol=1e-5 * np.abs(true_d_scale).max())


def multiplied(x, residual, scale, narrow, given, **named):
    """Results and their gradients by (x, residual, scale, narrow) with a narrow matrix; `given`: of the results."""
    op = functools.partial(add_rms_norm, epsilon=EPSILON, uses=len(given) - 2, **named)
    results, pull = jax.vjp(op, x, residual, scale, narrow)
    return results, pull(tuple(given))


def exact_product(total, scale, offset, narrow, given):
    """(normed, dx, dscale, products, dnarrow), float64; the products of normed rows that are rounded once."""
    d_total, *d_normed, d_products = map(wide, given)
    of_products = d_products @ wide(narrow).T
    normed, dx, d_scale = exact(total, scale, offset, d_total, [*d_normed, of_products])
    columns = normed.reshape(-1, normed.shape[-1]).T @ d_products.reshape(-1, d_products.shape[-1])
    return normed, dx, d_scale, wide(jnp.asarray(normed, total.dtype)) @ wide(narrow), columns


def assert_products(results, gradients, scale, offset, narrow, given):
    (total, *normed, products), (dx, _, d_scale, d_narrow) = results, gradients
    true, true_dx, true_d_scale, true_products, true_d_narrow = exact_product(total, scale, offset, narrow, given)
    assert products.dtype == d_narrow.dtype == jnp.float32
    for one in normed:
        assert_rounded_once(one, true)
    # A normed value may be rounded to the other side: one term of a sum is off by a unit in its last place then.
    of_terms = np.abs(true).max() * np.abs(wide(narrow)).max()
    np.testing.assert_allclose(products, true_products, atol=1e-5 * of_terms + 0.004 * of_terms * (len(true) > 500))
    assert_rounded_once(dx, true_dx, spread=np.abs(true_dx).max())
    np.testing.assert_allclose(d_scale, true_d_scale, rtol=1e-4, atol=1e-5 * np.abs(true_d_scale).max())
    assert d_narrow.shape == narrow.shape
    np.testing.assert_allclose(d_narrow, true_d_narrow, rtol=1e-4, atol=1e-5 * np.abs(true_d_narrow).max())


def draw_products(rows, width, num_columns, uses, dtype="bfloat16"):
    """x, residual, scale, narrow and the gradients of the results."""
    x, residual = draw((*rows, width), 0, dtype), draw((*rows, width), 1, dtype)
    scale, narrow = draw((width,), 2, "float32"), draw((width, num_columns), 7, "float32")
    given = [draw(x.shape, 3 + i, dtype) for i in range(1 + uses)] + [draw((*rows, num_columns), 8, "float32")]
    return x, residual, scale, narrow, given


@pytest.mark.parametrize(("num_columns", "added", "dtype"), [(16, True, "bfloat16"), (3, False, "float32")])
def test_product_of_xla(num_columns, added, dtype):
    x, residual, scale, narrow, given = draw_products((2, 5), 96, num_columns, 2, dtype)
    results, _ = multiplied(x, residual if added else None, scale, narrow, given, offset=1.0)
    np.testing.assert_allclose(results[-1], wide(results[1]) @ wide(narrow), rtol=1e-5, atol=1e-4)
    assert len(results) == 4 and (results[1] == results[2]).all()


@pytest.mark.parametrize(
    ("rows", "width", "num_columns", "uses", "dtype", "offset"),
    [((7,), 1024, 8, 1, "bfloat16", 0.0), ((2, 2), 512, 3, 2, "float16", 1.0), ((3,), 1024, 1, 1, "bfloat16", 1.0)],
)
def test_product(pallas, rows, width, num_columns, uses, dtype, offset):
    x, residual, scale, narrow, given = draw_products(rows, width, num_columns, uses, dtype)
    results, gradients = pallas(multiplied, x, residual, scale, narrow, given, offset=offset)
    np.testing.assert_array_equal(results[0], x + residual)
    assert len(results) == 2 + uses and (gradients[0] == gradients[1]).all()
    assert_products(results, gradients, scale, offset, narrow, given)


def test_products_of_rows_that_are_shared_out(execution, sums):
    """More rows than buffers, and than places for sums; a GPU gives equal bits twice."""
    from kernels.norm import gpu

    x, residual, scale, narrow, given = draw_products((11,), 512, 8, 1)
    chosen = Tiles(num_programs=2, num_buffers=2, piece=512, in_registers=True)
    forward = functools.partial(gpu.forward, epsilon=EPSILON, offset=0.0, tiles=chosen)
    total, normed, rstd, products = execution.kernel(forward, x, residual, scale, narrow)
    backward = functools.partial(gpu.backward, offset=0.0, tiles=chosen)
    dx, *gradients = execution.kernel(backward, total, rstd, scale, (given[1],), given[0], narrow, given[2])
    assert_products((total, normed, products), (dx, dx, *gradients), scale, 0.0, narrow, given)


@pytest.mark.parametrize(
    ("num_rows", "chosen"),
    [
        (11, Tiles(num_programs=3, num_buffers=2, piece=512, in_registers=False)),
        (11, Tiles(num_programs=2, num_buffers=3, piece=1024, in_registers=True)),
        (2, Tiles(num_programs=4, num_buffers=4, piece=512, in_registers=True)),
    ],
)
def test_rows_are_shared_out(execution, num_rows, chosen):
    """More rows than buffers, a number that the programs don't divide, and programs without a row."""
    from kernels.norm import gpu

    x, residual, scale = draw((num_rows, 1024), 0), draw((num_rows, 1024), 1), draw((1024,), 2, "float32")
    forward = functools.partial(gpu.forward, epsilon=EPSILON, offset=0.0, tiles=chosen)
    total, normed, rstd, products = execution.kernel(forward, x, residual, scale)
    assert products is None
    d_total, d_normed = draw(x.shape, 3), (draw(x.shape, 4),)
    backward = functools.partial(gpu.backward, offset=0.0, tiles=chosen)
    dx, d_scale, _ = execution.kernel(backward, total, rstd, scale, d_normed, d_total)
    true, true_dx, true_d_scale = exact(total, scale, 0.0, d_total, d_normed)
    np.testing.assert_array_equal(total, x + residual)
    assert_rounded_once(normed, true)
    assert_rounded_once(dx, true_dx, spread=np.abs(true_dx).max())
    np.testing.assert_allclose(d_scale, true_d_scale, rtol=1e-4, atol=1e-5 * np.abs(true_d_scale).max())
    np.testing.assert_allclose(rstd, 1 / np.sqrt((wide(total) ** 2).mean(-1) + EPSILON), rtol=1e-6)


def test_what_is_not_finite_stays_in_its_row(pallas):
    x = draw((4, 512), 0).at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    x = x.at[3].set(0)
    total, normed = pallas(add_rms_norm, x, jnp.zeros_like(x), jnp.ones(512), epsilon=EPSILON)
    finite = np.isfinite(wide(normed)).all(1)
    assert finite.tolist() == [True, False, False, True] and (wide(normed)[3] == 0).all()
    np.testing.assert_array_equal(wide(total), wide(x))


def test_no_rows():
    total, normed = add_rms_norm(jnp.zeros((0, 8)), None, jnp.ones(8), epsilon=EPSILON)
    assert total.shape == normed.shape == (0, 8)


@pytest.mark.parametrize(
    ("num_inputs", "num_columns"), [(1, 0), (2, 0), (3, 0), (5, 0), (6, 0), (2, 8), (3, 8), (6, 1)]
)
def test_tiles_fit_a_processor(num_inputs, num_columns):
    for width in range(512, (tiles.MAX_WIDTH_NARROW if num_columns else tiles.MAX_WIDTH) + 1, 512):
        chosen = choose_tiles(10**6, width, num_inputs, 2, num_columns)
        blocks, rest = divmod(chosen.num_programs, NUM_PROCESSORS)
        assert rest == 0 and blocks and chosen.num_buffers >= 2 and width % chosen.piece == 0
        # What the system keeps of each block's.
        used = tiles.shared_bytes(chosen, width, num_inputs, 2, num_columns) + 1024
        assert blocks * used <= SHARED_BYTES + 1024, (width, chosen)
    assert choose_tiles(3, 1024, num_inputs, 2).num_programs == 3


CASE = NormCase("bfloat16", 16384, 1024, True)


def test_what_is_chosen(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert supports("pallas", CASE, H100) is None and supports("xla", CASE, Target("cpu")) is None
    assert choose("auto", CASE, Target("tpu"))[0] == choose("auto", CASE, Target("cpu"))[0] == "xla"
    assert choose("pallas", CASE, H100)[0] == "pallas"
    assert supports("pallas", dataclasses.replace(CASE, width=8192, uses=4), H100) is None
    for changes, impl in (
        ({}, "pallas"),
        ({"num_rows": 8192, "width": 4096, "added": False}, "pallas"),
        ({"num_rows": 8191}, "xla"),
        ({"num_columns": 8}, "pallas"),
        ({"num_columns": 8, "num_rows": 16383}, "xla"),
        ({"num_columns": 8, "width": 512}, "xla"),
        ({"width": 512}, "xla"),
        ({"width": 8192}, "xla"),
    ):
        assert choose("auto", dataclasses.replace(CASE, **changes), H100)[0] == impl
    for changes, words in (
        ({"width": 1000}, "multiple of 512"),
        ({"width": 8704}, "up to 8192"),
        ({"dtype": "float32"}, "not float32"),
        ({"width": 8192, "uses": 6}, "uses=6 readers"),
        ({"num_columns": 9}, r"not [1024, 9]"),
        ({"num_columns": 8, "width": 2048}, r"rows up to 1024, not [2048, 8]"),
        ({"num_columns": 8, "added": False}, "where it adds a residual"),
    ):
        case = dataclasses.replace(CASE, **changes)
        assert words in supports("pallas", case, H100) and choose("auto", case, H100)[0] == "xla"
    assert "compute capability" in supports("pallas", CASE, Target("gpu", (8, 0)))
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert "needs JAX 0.11" in supports("pallas", CASE, H100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: add_rms_norm(jnp.ones((2, 8)), None, jnp.ones(7), epsilon=1.0), r"\[\.\.\., D\] and scale \[D\]"),
        (lambda: add_rms_norm(jnp.ones((2, 8)), jnp.ones((1, 8)), jnp.ones(8), epsilon=1.0), "one shape and one"),
        (lambda: add_rms_norm(jnp.ones((2, 8)), None, jnp.ones(8), epsilon=1.0, uses=0), "uses=0"),
        (
            lambda: add_rms_norm(jnp.ones((2, 8)), None, jnp.ones(8), jnp.ones((7, 2)), epsilon=1.0),
            r"narrow float32\[7, 2\] needs to be float32 \[D, C\]",
        ),
        (lambda: add_rms_norm(jnp.ones((2, 8)), None, jnp.ones(8), epsilon=1.0, impl="cuda"), "impl='cuda' is unk"),
        (
            lambda: add_rms_norm(jnp.ones((2, 8)), None, jnp.ones(8), epsilon=1.0, impl="pallas", target=Target("cpu")),
            "can't run: .*'auto' or",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
