"""AdamW's update of parameters in halves: against Optax, and the Hopper kernel (interpreted, or on a GPU)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kernels.adamw import AdamWCase, Hyperparameters, adamw, choose, join, split, step_factors, supports
from kernels.adamw.tiles import MANY, NUMBERS, Tiles
from kernels.target import Target

H100 = Target("gpu", (9, 0))
HOW = Hyperparameters(b1=0.9, b2=0.95, eps=1e-8, decay=0.1)
LEARNING_RATE, CLIP = 1e-3, 0.37


def bits(x):
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def patterns():
    """Float32s: each upper half of 16 bits, with lower halves about where rounding turns; zeros, subnormals, infinities
    and NaNs are among them."""
    lower = np.array([0, 1, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return (upper[:, None] | lower).reshape(-1).view(np.float32)


def test_halves_are_the_float32_again():
    x = patterns()
    rounded, rest = jax.jit(split)(x)
    assert (rounded.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    again, numbers = np.asarray(jax.jit(join)(rounded, rest)), ~np.isnan(x)
    np.testing.assert_array_equal(bits(again)[numbers], bits(x)[numbers])
    # Products see a NaN where there is one, and none where there is none.
    np.testing.assert_array_equal(np.isnan(np.asarray(rounded, np.float32)), np.isnan(x))
    assert (bits(again)[~numbers] == 0x7FC00000).all()


def test_the_first_half_is_the_nearest():
    x = patterns()
    x = x[~np.isnan(x)]
    rounded = split(x)[0]
    nearest = jnp.asarray(x).astype(jnp.bfloat16)
    tie = bits(x) & 0xFFFF == 0x8000
    np.testing.assert_array_equal(bits(rounded)[~tie], bits(nearest)[~tie])
    # Between two: away from zero.
    np.testing.assert_array_equal(bits(rounded)[tie], (bits(x)[tie] >> 16) + 1)
    assert (bits(rounded)[tie] != bits(nearest)[tie]).mean() == 0.5


def draw(shape, gradient="bfloat16", mean="float32"):
    rng = np.random.default_rng(0)
    p, g, m, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    # Nothing has moved where the gradient and the moments are zero.
    g.flat[0] = m.flat[0] = v.flat[0] = 0
    return (jnp.asarray(g, gradient), *split(jnp.asarray(p * 0.02)), jnp.asarray(m * 0.1, mean), jnp.asarray(v * v))


def factors(apply=True, count=5, how=HOW):
    return step_factors(jnp.bool_(apply), jnp.float32(CLIP), LEARNING_RATE, jnp.int32(count), how)


def by_optax(gradient, rounded, rest, mean, square, count=5, how=HOW):
    """(parameter, mean, mean of squares), float32, in Optax's own steps."""
    param = join(rounded, rest)
    moments = optax.scale_by_adam(how.b1, how.b2, how.eps)
    state = optax.ScaleByAdamState(jnp.int32(count - 1), mean.astype(jnp.float32), square)
    update, state = moments.update(gradient.astype(jnp.float32) * CLIP, state)
    update = update + how.decay * param
    return param - LEARNING_RATE * update, state.mu, state.nu


def assert_updated(results, given, how=HOW):
    rounded, rest, mean, square = results
    param, true_mean, true_square = by_optax(*given, how=how)
    for result, one in zip(results, given[1:], strict=True):
        assert (result.shape, result.dtype) == (one.shape, one.dtype)
    # Steps are of the size of the learning rate, and parameters of 0.02 have 2e-9 between them.
    np.testing.assert_allclose(join(rounded, rest), param, rtol=2e-7, atol=1e-8)
    np.testing.assert_array_equal(bits(rounded), bits(split(join(rounded, rest))[0]))
    bound = 1e-6 if mean.dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(mean.astype(jnp.float32), true_mean, rtol=bound, atol=1e-7)
    np.testing.assert_allclose(square, true_square, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", [HOW, Hyperparameters(0.8, 0.99, 1e-3, 0.0)], ids=["decayed", "undecayed"])
def test_specification(how):
    given = draw((2, 3, 5), mean="bfloat16")
    assert_updated(adamw(*given, factors(how=how), how, impl="xla"), given, how)


def test_specification_keeps_what_is_not_to_be_applied():
    given = draw((7,))
    for kept, one in zip(adamw(*given, factors(apply=False), HOW, impl="xla"), given[1:], strict=True):
        np.testing.assert_array_equal(bits(kept), bits(one))


@pytest.fixture
def pallas(monkeypatch, execution):
    """`run` of the op with the kernel that is interpreted, with races looked for, or compiled."""
    from kernels.adamw import gpu

    monkeypatch.setattr(gpu, "adamw", functools.partial(gpu.adamw, interpret=execution.interpret()))
    yield functools.partial(execution.run, adamw, impl="pallas", target=H100)
    execution.assert_no_races()


@pytest.mark.parametrize(
    ("shape", "gradient", "mean", "how"),
    [
        ((3, 2, NUMBERS // 2), "bfloat16", "float32", HOW),
        ((2 * NUMBERS,), "float32", "bfloat16", Hyperparameters(0.8, 0.99, 1e-3, 0.0)),
    ],
)
def test_kernel(pallas, shape, gradient, mean, how):
    given = draw(shape, gradient, mean)
    assert_updated(pallas(*given, factors(how=how), how), given, how)


def test_kernel_keeps_what_is_not_to_be_applied(pallas):
    gradient, *given = draw((NUMBERS,))
    for kept, one in zip(pallas(gradient * jnp.nan, *given, factors(apply=False), HOW), given, strict=True):
        np.testing.assert_array_equal(bits(kept), bits(one))


def test_kernel_in_other_tiles(execution):
    from kernels.adamw import gpu

    given = draw((2, 2048))
    for tiles in (Tiles(4, 4), Tiles(16, 8)):
        results = execution.kernel(gpu.adamw, *given, factors(), HOW, tiles=tiles)
        assert_updated(results, given)


def test_what_the_kernel_takes():
    fine = AdamWCase("bfloat16", "float32", 4 * NUMBERS)
    assert "compute capability" in supports("pallas", fine, Target("gpu", (10, 0)))
    assert supports("xla", fine, Target("cpu")) is None
    for other in (Target("cpu"), Target("tpu"), Target("gpu", (8, 0))):
        assert choose("auto", fine, other)[0] == "xla"
    with pytest.raises(ValueError, match="impl='cudnn' is unknown"):
        supports("cudnn", fine, H100)
    with pytest.raises(ValueError, match=r"^adamw impl='pallas' can't run: .*kernels\.adamw\) to 'auto' or 'xla'"):
        choose("pallas", fine, Target("cpu"))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (AdamWCase("float16", "float32", NUMBERS), "float32 and bfloat16 gradients, not float16"),
        (AdamWCase("float32", "float16", NUMBERS), "float32 and bfloat16 first moments, not float16"),
        (AdamWCase("float32", "float32", NUMBERS + 128), f"a multiple of {NUMBERS} numbers, not of {NUMBERS + 128}"),
        (AdamWCase("float32", "float32", 0), "not of 0"),
    ],
)
def test_what_the_kernel_refuses(case, reason):
    assert reason in supports("pallas", case, H100)
    assert choose("auto", case, H100)[0] == "xla"
    for mean in ("float32", "bfloat16"):
        fine = AdamWCase("bfloat16", mean, MANY)
        assert supports("pallas", fine, H100) is None and choose("auto", fine, H100)[0] == "pallas"
    # Not measured.
    for other in (AdamWCase("float32", "float32", MANY), AdamWCase("bfloat16", "float32", MANY - NUMBERS)):
        assert supports("pallas", other, H100) is None and choose("auto", other, H100)[0] == "xla"


def test_what_disagrees_is_refused():
    gradient, rounded, rest, mean, square = draw((4, 6))
    with pytest.raises(ValueError, match="they need one shape"):
        adamw(gradient[:3], rounded, rest, mean, square, factors(), HOW, impl="xla")
    with pytest.raises(ValueError, match="rest int16"):
        adamw(gradient, rounded, rounded, mean, square, factors(), HOW, impl="xla")
    with pytest.raises(ValueError, match=r"factors float32\[4\]"):
        adamw(gradient, rounded, rest, mean, square, factors()[1:], HOW, impl="xla")
