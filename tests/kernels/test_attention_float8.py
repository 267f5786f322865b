"""Attention with float8 operands: the Hopper kernel interpreted or on a GPU, the op, and how operands are made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention as op
from kernels.attention import AttentionCase, choose, float8, reference, supports, tiles
from kernels.attention.tiles import Tiles, choose_tiles
from kernels.target import Target
from tests.kernels.interpreter import plain_products

H100 = Target("gpu", (9, 0))
PLAIN = AttentionCase("float8_e4m3fn", 2048, 2048, 32, 8, 128, 128)
MARKS = ("q_segments", "kv_segments", "q_positions", "kv_positions")


def operands(B, T, S, N, K, H, spread=1.0, seed=0):
    """(q, k, v) and their scales; heads differ in size."""
    rng = np.random.default_rng(seed)
    arrays = [
        rng.normal(size=(B, *size, H)) * np.exp(rng.normal(size=(B, 1, size[1], 1)) * spread)
        for size in ((T, N), (S, K), (S, K))
    ]
    quantized = [float8.quantize_heads(jnp.asarray(x, jnp.float32)) for x in arrays]
    return [x for x, _ in quantized], [scale for _, scale in quantized]


def exact(arrays, scales, **arguments):
    """float64 attention of what the operands stand for."""
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(np.asarray(x, np.float64) * np.asarray(scale, np.float64)[:, None, :, None])
            for x, scale in zip(arrays, scales, strict=True)
        ]
        return [np.asarray(x) for x in reference.attention(*wide, **arguments)]


def rounded(arrays, scales, *, scale, soft_cap, sinks, **masks):
    """(out, lse) by the whole array of weights, which are rounded to float8 as the kernel does: 256 is the largest."""
    q, k, v = (np.asarray(x, np.float64) * np.asarray(s)[:, None, :, None] for x, s in zip(arrays, scales, strict=True))
    B, T, N, _ = q.shape
    k, v = (np.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    marks = [masks[name] for name in MARKS]
    seen = np.asarray(reference.visible(B, T, k.shape[1], masks["causal"], masks["window"], *marks))[:, None]
    scores = np.where(seen, scores, -np.inf)
    sink = np.full((1, N, 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[None, :, None, None]
    largest = np.maximum(np.maximum(scores.max(-1, keepdims=True), sink), -1e30)
    weights = 256 * np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True) + 256 * np.exp(sink - largest)
    weights = np.asarray(jnp.asarray(weights, jnp.float32).astype(jnp.float8_e4m3fn), np.float64)
    out = np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        return out, (largest + np.log(total / 256))[..., 0].transpose(0, 2, 1)


def magnitude(arrays, scales, scale):
    """The largest sum of magnitudes of all scores."""
    operands = zip(arrays[:2], scales[:2], strict=True)
    q, k = (abs(np.asarray(x, np.float64)) * np.asarray(s)[:, None, :, None] for x, s in operands)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return abs(scale) * np.einsum("btnh,bsnh->bnts", q, k).max()


def norm_error(actual, true):
    seen = true > -np.inf
    actual = np.asarray(actual, np.float64)
    assert ((actual > -np.inf) == seen).all()
    return np.linalg.norm(actual[seen] - true[seen])


# So large that the weights of keys would be lost in float8, were they not multiplied by 256.
SINKS = np.array([6.0, 5.0], np.float32)
PACKED = np.repeat([1, 2, 3, 0], [50, 100, 30, 20])[None].astype(np.int32)
CASES = {
    "causal, whole blocks, more items than processors": dict(B=2, T=256, processors=2),
    "full, ragged, fewer queries than keys": dict(T=130, S=301, causal=False),
    "packed documents, window, soft cap, sinks, heads of 64": dict(
        T=200, H=64, segments=PACKED, window=60, soft_cap=2.0, sinks=SINKS, chosen=Tiles(3, 128, 2, 1, 2)
    ),
    "negative scale, group of heads, blocks of 192": dict(
        T=140, S=400, N=4, K=2, causal=False, scale=-0.3, chosen=Tiles(2, 192, 2, 2, 2)
    ),
    "wide heads": dict(T=70, H=256),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "blocks of 192" in name else name for name in CASES]
)
def test_kernel_error_is_that_of_rounding_the_weights(execution, monkeypatch, name):
    plain_products(monkeypatch, execution)
    from kernels.attention import gpu

    fields = {"B": 1, "N": 2, "K": 1, "H": 128, **CASES[name]}
    monkeypatch.setattr(gpu, "NUM_PROCESSORS", fields.pop("processors", 132))
    T, segments = fields["T"], fields.pop("segments", None)
    sizes = {key: fields.pop(key) for key in ("B", "T", "N", "K", "H")}
    arrays, scales = operands(**sizes, S=fields.pop("S", T))
    chosen = fields.pop("chosen", None) or choose_tiles(case_of(arrays))
    arguments = {"scale": 0.1, "causal": True, "window": None, "soft_cap": None, "sinks": None}
    arguments |= dict.fromkeys(MARKS) | dict.fromkeys(MARKS[:2], segments) | fields
    out, lse = execution.kernel(gpu.forward, *arrays, **arguments, tiles=chosen, scales=scales)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    true_out, true_lse = exact(arrays, scales, **arguments)
    plain_out, _ = rounded(arrays, scales, **arguments)
    low = norm_error(jnp.asarray(plain_out, jnp.bfloat16), true_out)
    # About 2% where many keys count; of one key, the weight is 256 and has no error.
    assert norm_error(out, true_out) <= 1.5 * low + 1e-6 and low < 0.05 * np.linalg.norm(true_out)
    seen = true_lse[true_lse > -np.inf]
    score = execution.float8_error * magnitude(arrays, scales, arguments["scale"])
    assert norm_error(lse, true_lse) <= 1e-5 * np.linalg.norm(seen) + score * seen.size**0.5


def case_of(arrays, **changes):
    q, k, v = arrays
    case = AttentionCase("float8_e4m3fn", q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("impl", ["reference", "xla", "auto"])
def test_the_op_takes_scales(impl):
    arrays, scales = operands(B=2, T=40, S=40, N=4, K=2, H=16)
    names = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
    out, lse = op.attention(*arrays, scale=0.3, impl=impl, **names, return_lse=True, target=Target("cpu"))
    arguments = dict.fromkeys((*MARKS, "window", "soft_cap", "sinks"))
    true_out, true_lse = exact(arrays, scales, scale=0.3, causal=True, **arguments)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), true_out, atol=0.02 * abs(true_out).max())
    # XLA gets operands that are rounded to bfloat16 once more.
    np.testing.assert_allclose(lse, true_lse, atol=1e-4 if impl == "reference" else 0.1)


def test_the_op_runs_the_kernel(monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} has another interface of Mosaic GPU")
    from kernels.attention import gpu

    arrays, scales = operands(B=1, T=8, S=8, N=4, K=2, H=64)
    calls = []

    def forward(q, k, v, **arguments):
        calls.append(arguments)
        return q.astype(jnp.bfloat16), jnp.zeros(q.shape[:3])

    monkeypatch.setattr(gpu, "forward", forward)
    q_scale, k_scale, v_scale = scales
    names = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    segments = jnp.ones((1, 8), jnp.int32)
    out = op.attention(*arrays, scale=0.3, q_segments=segments, impl="pallas", target=H100, **names)
    np.testing.assert_array_equal(out, arrays[0].astype(jnp.bfloat16))
    (arguments,) = calls
    assert arguments["tiles"] == choose_tiles(case_of(arrays, segments=True))
    assert all(given is scale for given, scale in zip(arguments["scales"], scales, strict=True))
    np.testing.assert_array_equal(arguments["kv_segments"], segments)


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_has_no_gradient(impl):
    arrays, scales = operands(B=1, T=8, S=8, N=2, K=2, H=16)

    def loss(v_scale):
        names = {"q_scale": scales[0], "k_scale": scales[1], "v_scale": v_scale}
        return op.attention(*arrays, scale=0.3, impl=impl, **names).astype(jnp.float32).sum()

    with pytest.raises(ValueError, match="float8_e4m3fn has no gradient: train with bfloat16"):
        jax.grad(loss)(scales[2])
    with pytest.raises(ValueError, match="has no gradient"):
        dataclasses.replace(PLAIN, gradient=True)


def test_refuses_what_it_cannot_do():
    arrays, scales = operands(B=1, T=8, S=8, N=4, K=2, H=16)
    names = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
    attend = functools.partial(op.attention, scale=0.3, impl="xla")
    with pytest.raises(ValueError, match=r"given no k_scale; it needs q_scale, k_scale, v_scale"):
        attend(*arrays, **{**names, "k_scale": None})
    with pytest.raises(ValueError, match=r"v_scale is float32\[1, 4\]; .*\[1, 2\]"):
        attend(*arrays, **{**names, "v_scale": scales[0]})
    with pytest.raises(ValueError, match=r"q_scale is bfloat16\[1, 4\]; .*float32"):
        attend(*arrays, **{**names, "q_scale": scales[0].astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="v_scale was given with float32 operands"):
        attend(*(x.astype(jnp.float32) for x in arrays), v_scale=scales[2])
    with pytest.raises(ValueError, match="float8_e5m2: use"):
        attend(*(x.astype(jnp.float8_e5m2) for x in arrays), **names)
    for changes, words in (({"key_dim": 80, "value_dim": 80}, "float8_e4m3fn key/value widths of .*not 80/80"),):
        with pytest.raises(ValueError, match=f"'pallas' can't run: .*{words}"):
            choose("pallas", dataclasses.replace(PLAIN, **changes), H100)
    assert "not float8_e4m3fn" in supports("cudnn", PLAIN, H100)
    assert "not float8_e4m3fn" in supports("pallas", PLAIN, Target("tpu"))


@pytest.fixture(autouse=True)
def newer_jax(monkeypatch):
    """What is chosen does not depend on the JAX that the tests run with."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))


@pytest.mark.parametrize("widths", tiles.FLOAT8_WIDTHS)
def test_tiles_fit_the_chip(widths):
    for length, marks in ((1, False), (2048, True), (131072, False)):
        case = AttentionCase("float8_e4m3fn", length, length, 32, 8, *widths, True, None, marks, marks)
        assert supports("pallas", case, H100) is None
        chosen = choose_tiles(case)
        keys = chosen.num_buffers * chosen.block * sum(widths)
        rows = chosen.rows * (chosen.num_queries * widths[0] + 2 * widths[1])
        assert keys + rows + 2048 < 232448
        # Sixteen keys have their place in a word of four, and a row of a block is a whole number of swizzled units.
        assert chosen.block % 32 == 0 and chosen.num_buffers >= 2
        # Accumulators of scores and outputs, and the weights, of one thread.
        assert chosen.block // 2 + chosen.block // 8 + widths[1] // 2 < chosen.registers[0] - 24


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(0, 5))
def test_columns_hold_every_key_once(S, seed):
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(2, S, 3, 8)).astype(np.float32)
    columns = np.asarray(float8.columns(jnp.asarray(v)))
    assert columns.shape == (2, 3, 8, -(-S // 128) * 128)
    place = np.argsort([8 * half + 2 * thread + one for thread in range(4) for half in range(2) for one in range(2)])
    keys = np.arange(S)
    found = columns[..., keys // 16 * 16 + place[keys % 16]]
    np.testing.assert_array_equal(found, v.transpose(0, 2, 3, 1))
    assert (np.delete(columns, keys // 16 * 16 + place[keys % 16], axis=-1) == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.floats(-60, 60), st.integers(0, 5))
def test_quantized_heads_are_within_a_rounding(exponent, seed):
    x = np.random.default_rng(seed).normal(size=(2, 5, 3, 4)).astype(np.float32) * np.float32(10.0 ** (exponent / 2))
    x[0, :, 0], x[1, 0, 1] = 0, 0
    values, scale = float8.quantize_heads(jnp.asarray(x))
    assert values.dtype == jnp.float8_e4m3fn and scale.shape == (2, 3) and (np.asarray(scale) > 0).all()
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None, :, None]
    largest = abs(x).max((1, 3), keepdims=True)
    # Half of an eighth, and below 2**-6 of the numbers half of 2**-9.
    assert (abs(back - x) <= np.maximum(abs(x) / 16, largest / 448 * 2.0**-10) * (1 + 1e-5)).all()
