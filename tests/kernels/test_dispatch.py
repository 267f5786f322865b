"""Dispatch of tokens to sorted rows and their weighted sums: XLA's and the Hopper kernels (interpreted, or on a GPU)
against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dispatch import DispatchCase, choose, combine, expand, supports, tiles
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES
from kernels.row_tiles import Tiles
from kernels.target import Target

H100 = Target("gpu", (9, 0))


def draw(shape, seed, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def permutation(count, seed=0):
    """(sorted, place) of so many assignments."""
    order = np.random.default_rng(seed).permutation(count).astype(np.int32)
    return jnp.asarray(order), jnp.asarray(np.argsort(order).astype(np.int32))


def wide(x):
    return np.asarray(x, np.float64)


def assert_rounded_once(y, true):
    bound = float(jnp.finfo(y.dtype).eps) / 2 * np.abs(true) + 1e-5 * np.abs(true).max()
    assert (np.abs(wide(y) - true) <= bound).all()


@pytest.fixture
def pallas(monkeypatch, execution):
    """`run` of the ops with kernels that are interpreted, with races looked for, or compiled."""
    from kernels.dispatch import gpu

    for name in ("expand", "combine_gradients"):
        monkeypatch.setattr(gpu, name, functools.partial(getattr(gpu, name), interpret=execution.interpret()))
    yield execution.run
    execution.assert_no_races()


def there_and_back(x, y, weights, dy, d_rows, sorted_M, place_M, **named):
    """Both ops' results and gradients."""
    rows, pull = jax.vjp(lambda x: expand(x, sorted_M, place_M, **named), x)
    sums, pull_sums = jax.vjp(
        lambda y, weights: combine(y, weights, sorted_M, place_M, out_dtype=dy.dtype, **named), y, weights
    )
    return rows, pull(d_rows), sums, pull_sums(dy)


@pytest.mark.parametrize(
    ("impl", "num_tokens", "per_token", "width", "dtype"),
    [
        ("xla", 5, 3, 24, "float32"),
        ("xla", 4, 2, 32, "bfloat16"),
        ("pallas", 7, 2, 1024, "bfloat16"),
        ("pallas", 3, 3, 512, "float16"),
        ("pallas", 2, 1, 2560, "bfloat16"),
    ],
)
def test_there_and_back(request, impl, num_tokens, per_token, width, dtype):
    M = num_tokens * per_token
    sorted_M, place_M = permutation(M)
    x, y, d_rows = (draw((n, width), seed, dtype) for seed, n in enumerate((num_tokens, M, M)))
    weights, dy = draw((num_tokens, per_token), 3, "float32"), draw((num_tokens, width), 4, dtype)
    run = request.getfixturevalue("pallas") if impl == "pallas" else lambda f, *given, **named: f(*given, **named)
    results = run(there_and_back, x, y, weights, dy, d_rows, sorted_M, place_M, impl=impl, target=H100)
    rows, (dx,), sums, (dy_rows, d_weights) = results
    np.testing.assert_array_equal(rows, x[sorted_M // per_token])
    shape = (num_tokens, per_token, width)
    assert_rounded_once(dx, wide(d_rows)[place_M].reshape(shape).sum(1))
    of_tokens = wide(y)[place_M].reshape(shape)
    assert_rounded_once(sums, (of_tokens * wide(weights)[..., None]).sum(1))
    assert_rounded_once(dy_rows, (wide(dy)[:, None] * wide(weights)[..., None]).reshape(M, width)[sorted_M])
    np.testing.assert_allclose(d_weights, (wide(dy)[:, None] * of_tokens).sum(-1), rtol=1e-5, atol=1e-4)
    assert dx.dtype == sums.dtype == dy_rows.dtype == dtype and d_weights.dtype == "float32"


@pytest.mark.parametrize("chosen", [Tiles(3, 2, 512, True), Tiles(2, 3, 512, False)])
def test_tokens_are_shared_out(execution, chosen):
    """More tokens than buffers, and a number that the blocks don't divide; a GPU gives equal bits twice."""
    from kernels.dispatch import gpu

    sorted_M, place_M = permutation(22)
    x, y, weights = draw((11, 1024), 0), draw((22, 1024), 1), draw((11, 2), 2, "float32")
    rows = execution.kernel(functools.partial(gpu.expand, tiles=chosen), x, place_M)
    np.testing.assert_array_equal(rows, x[sorted_M // 2])
    gradients = functools.partial(gpu.combine_gradients, tiles=chosen)
    dy_rows, d_weights = execution.kernel(gradients, x, y, weights, place_M)
    assert_rounded_once(dy_rows, (wide(x)[:, None] * wide(weights)[..., None]).reshape(22, -1)[sorted_M])
    true = (wide(x)[:, None] * wide(y)[place_M].reshape(11, 2, -1)).sum(-1)
    np.testing.assert_allclose(d_weights, true, rtol=1e-5, atol=1e-4)


def test_sums_in_float32_have_gradients_of_xla():
    """As where several devices' parts of them are added up."""
    sorted_M, place_M = permutation(6)
    y, weights, dy = draw((6, 512), 0), draw((3, 2), 1, "float32"), draw((3, 512), 2, "float32")
    assert combine(y, weights, sorted_M, place_M, impl="xla").dtype == "float32"
    rows = y.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"of sums in the rows' dtype|needs JAX"):
        combine(rows, weights, sorted_M, place_M, impl="pallas", target=H100)
    _, pull = jax.vjp(lambda y: combine(y, weights, sorted_M, place_M, impl="xla"), y)
    assert_rounded_once(pull(dy)[0], (wide(dy)[:, None] * wide(weights)[..., None]).reshape(6, -1)[sorted_M])


def test_no_tokens():
    none = jnp.zeros(0, jnp.int32)
    assert expand(jnp.zeros((0, 8)), none, none).shape == (0, 8)
    assert combine(jnp.zeros((0, 8)), jnp.zeros((0, 2)), none, none, impl="xla").shape == (0, 8)


@pytest.mark.parametrize("num_inputs", [1, 2, 3, 5])
def test_tiles_fit_a_processor(num_inputs):
    for width in range(512, tiles.MAX_WIDTH + 1, 512):
        chosen = tiles.choose_tiles(10**6, width, num_inputs)
        blocks, rest = divmod(chosen.num_programs, NUM_PROCESSORS)
        assert rest == 0 and blocks and chosen.num_buffers >= 2 and width % chosen.piece == 0
        # What the system keeps of each block's.
        used = tiles.shared_bytes(chosen, width, num_inputs) + 1024
        assert blocks * used <= SHARED_BYTES + 1024, (width, chosen)


CASE = DispatchCase("bfloat16", 16384, 1024, 2)


def test_what_is_chosen(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert supports("pallas", CASE, H100) is None and choose("pallas", CASE, H100)[0] == "pallas"
    assert choose("auto", CASE, Target("cpu"))[0] == "xla" and choose("auto", CASE, H100)[0] == "pallas"
    assert choose("auto", DispatchCase("bfloat16", 8192, 1024, 2), H100)[0] == "xla"
    assert choose("auto", DispatchCase("bfloat16", 16384, 1024, 1), H100)[0] == "xla"
    for case, words in (
        (DispatchCase("float32", 16384, 1024, 2), "not float32"),
        (DispatchCase("bfloat16", 16384, 1024, 2, rounded=False), "in the rows' dtype bfloat16"),
        (DispatchCase("bfloat16", 16384, 1000, 2), "multiple of 512"),
        (DispatchCase("bfloat16", 16384, 8192, 8), "8 rows of 8192"),
    ):
        assert words in supports("pallas", case, H100) and choose("auto", case, H100)[0] == "xla"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, p: expand(x, p, p[:5], impl="xla"), r"\[6\] sorted assignments and \[5\] places"),
        (lambda x, p: expand(x[:, :, None], p, p, impl="xla"), r"needs \[N, D\]"),
        (lambda x, p: combine(x, x[:, :2], p, p, impl="xla"), r"needs y \[A · N, D\] and weights \[N, A\]"),
        (lambda x, p: expand(x, p, p, impl="cuda"), "impl='cuda' is unk"),
        (lambda x, p: expand(x, p, p, impl="pallas", target=Target("cpu")), "can't run: .*'auto' or"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones((3, 8)), jnp.arange(6))
