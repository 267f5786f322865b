"""The loss's softmax and its gradient: XLA's and the Hopper kernel (interpreted, or on a GPU) against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import CrossEntropyCase, choose, cross_entropy_rows, supports
from kernels.target import Target
from training.loss import cross_entropy

H100 = Target("gpu", (9, 0))
Z_LOSS = 1e-2
# Of the hardware's exp2 and log2 on numbers of a few tens, and of the sum of a row.
BOUND = 4e-6


@pytest.fixture
def pallas(monkeypatch, execution):
    """`run` of an op whose kernel is interpreted, with its races looked for, or compiled; in chunks of four lines."""
    from kernels.cross_entropy import gpu

    rows_and_gradient = functools.partial(gpu.rows_and_gradient, lines=4, interpret=execution.interpret())
    monkeypatch.setattr(gpu, "rows_and_gradient", rows_and_gradient)
    yield functools.partial(execution.run, impl="pallas", target=H100)
    execution.assert_no_races()


def draw(num_rows, length, spread=6.0):
    rng = np.random.default_rng(length)
    logits = rng.normal(size=(num_rows, length)).astype(np.float32) * spread
    targets = rng.integers(length, size=num_rows).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], size=num_rows).astype(np.float32)
    # The ends of a row, of a chunk, and of what is there: the last has no weight.
    targets[:4], weights[:4] = (0, length - 1, min(511, length - 1), -1), (1, 0.5, 1, 0)
    return jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights)


def exact(logits, targets, weights):
    x, targets, weights = (np.asarray(a, np.float64) for a in (logits, targets, weights))
    largest = x.max(1)
    lse = largest + np.log(np.exp(x - largest[:, None]).sum(1))
    is_target = np.arange(x.shape[1]) == targets[:, None]
    gradient = np.exp(x - lse[:, None]) * (1 + 2 * Z_LOSS * lse)[:, None] - is_target
    return lse, (x * is_target).sum(1), largest, weights[:, None] * gradient


def assert_close(found, arrays, dtype):
    (lse, target_logit, largest), gradient = found
    true = exact(*arrays)
    np.testing.assert_allclose(lse, true[0], rtol=BOUND)
    np.testing.assert_array_equal(target_logit, true[1].astype(np.float32))
    np.testing.assert_array_equal(largest, true[2].astype(np.float32))
    assert gradient.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps) / 2
    # A softmax's relative error is its logit's absolute one; the target's is of a difference of 1.
    bound = (rounding + 20 * BOUND) * np.abs(true[3]) + BOUND * (np.arange(true[3].shape[1]) == arrays[1][:, None])
    smallest = max(float(jnp.finfo(dtype).smallest_subnormal), 1e-30)
    assert (np.abs(np.asarray(gradient, np.float64) - true[3]) <= bound + smallest).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla(dtype):
    arrays = draw(6, 300)
    assert_close(cross_entropy_rows(*arrays, z_loss_coef=Z_LOSS, dtype=dtype, impl="xla"), arrays, dtype)


# Whole chunks; one and a rest that is read in fours, in twos and singly; less than one.
@pytest.mark.parametrize(
    ("length", "dtype"), [(1024, "bfloat16"), (1408, "float32"), (768, "float16"), (128, "float32")]
)
def test_kernel(pallas, length, dtype):
    arrays = draw(5, length)
    assert_close(pallas(cross_entropy_rows, *arrays, z_loss_coef=Z_LOSS, dtype=dtype), arrays, dtype)


def test_more_rows_than_programs(pallas):
    arrays = draw(140, 640)
    assert_close(pallas(cross_entropy_rows, *arrays, z_loss_coef=Z_LOSS, dtype="bfloat16"), arrays, "bfloat16")


def test_far_logits_do_not_overflow_and_bad_ones_show(pallas):
    logits, targets, weights = draw(4, 640)
    logits = logits.at[0].add(-2e4).at[1, 600].set(3e4).at[2, 5].set(jnp.inf).at[3, 639].set(jnp.nan)
    (lse, *_), gradient = pallas(cross_entropy_rows, logits, targets, weights, z_loss_coef=Z_LOSS, dtype="float32")
    np.testing.assert_allclose(lse[:2], exact(logits[:2], targets[:2], weights[:2])[0], rtol=BOUND)
    assert jnp.isfinite(gradient[:2]).all() and not jnp.isfinite(lse[2:]).any()


def test_the_loss_takes_it(pallas):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for shape in ((2, 6, 16), (16, 256)))
    targets, weights = jnp.asarray(rng.integers(256, size=(2, 6))), jnp.asarray(rng.choice([0.0, 1.0], size=(2, 6)))

    def value(hidden, head, impl, target):
        arguments = {"placement": None, "soft_cap": None, "chunk_tokens": 4, "impl": impl, "target": target}
        # A GPU's products of float32 have ten bits of mantissa unless told otherwise.
        with jax.default_matmul_precision("highest"):
            return cross_entropy(hidden, head, targets, weights.astype(jnp.float32), **arguments).loss_sum

    gradients = jax.value_and_grad(value, argnums=(0, 1))
    found, expected = pallas(gradients, hidden, head), gradients(hidden, head, impl="xla", target=None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_what_runs_where():
    case = CrossEntropyCase("float32", 32_000)
    assert choose("auto", case, Target("tpu"))[0] == choose("xla", case, H100)[0] == "xla"
    for bad, reason in (
        (CrossEntropyCase("float32", 50_257), "multiples of 128, not 50257"),
        (CrossEntropyCase("bfloat16", 32_000), "float32 logits, not bfloat16"),
        (CrossEntropyCase("float32", 32_000, sharded=True), "share the vocabulary"),
        (CrossEntropyCase("float32", 32_000, soft_cap=True), "without a cap"),
    ):
        if supports("pallas", case, H100) is None:
            assert reason in supports("pallas", bad, H100)
            assert choose("auto", case, H100)[0] == "pallas"
        with pytest.raises(ValueError, match=r"^cross_entropy impl='pallas' can't run"):
            choose("pallas", bad, H100)
        assert choose("auto", bad, H100)[0] == "xla"
    with pytest.raises(ValueError, match="'fast' is unknown"):
        choose("fast", case, H100)


def test_shapes_are_checked():
    logits, targets, weights = draw(4, 128)
    with pytest.raises(ValueError, match=r"logits \[4, 128\], targets \[4\] and weights \[3\]: needs"):
        cross_entropy_rows(logits, targets, weights[:3], dtype="float32")
