"""Every attention implementation against the reference, and the reference against a loop over rows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from kernels.attention import AttentionCase, attention, choose, cudnn, supports, xla
from kernels.target import Target, default_target

CPU = Target("cpu")
H100 = Target("gpu", (9, 0))


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 16 queries, so that small arrays have several and a ragged last one."""
    monkeypatch.setattr(xla, "block_length", lambda num_queries: 16)


def draw(shape, seed, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def inputs(T=40, S=None, N=4, K=2, H=8, V=None, B=2, dtype=np.float64):
    S, V = S or T, V or H
    return draw((B, T, N, H), 0, dtype), draw((B, S, K, H), 1, dtype), draw((B, S, K, V), 2, dtype)


def explicit(q, k, v, *, scale, causal=True, window=None, segments=None, soft_cap=None, sinks=None, positions=None):
    """Row by row in float64 numpy: (out, lse)."""
    B, T, N, _ = q.shape
    S, group = k.shape[1], N // k.shape[2]
    q_positions, kv_positions = positions if positions is not None else ([range(T)] * B, [range(S)] * B)
    out, lse = np.zeros((B, T, N, v.shape[3])), np.full((B, T, N), -np.inf)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        seen = []
        for s in range(S):
            distance = int(q_positions[b][t]) - int(kv_positions[b][s])
            hidden = (causal and distance < 0) or (window is not None and abs(distance) >= window)
            if segments is not None:
                hidden |= segments[0][b, t] == 0 or segments[0][b, t] != segments[1][b, s]
            if not hidden:
                seen.append(s)
        scores = scale * k[b, seen, n // group] @ q[b, t, n]
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        terms = np.exp(scores)
        total = terms.sum() + (0 if sinks is None else math.exp(sinks[n]))
        if total:
            out[b, t, n], lse[b, t, n] = terms @ v[b, seen, n // group] / total, math.log(total)
    return out, lse


FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "window, full": {"window": 7, "causal": False},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0])},
    "segments": {"segments": True},
    "everything": {"segments": True, "window": 9, "soft_cap": 2.0, "sinks": np.array([0.5, -1.0, 2.0, 0.0])},
}
SEGMENTS = np.array([[1] * 7 + [2] * 20 + [3] * 9 + [0] * 4, [0] * 3 + [5] * 37], np.int32)


def as_arguments(features):
    """Keyword arguments of `attention` for an entry of FEATURES."""
    arguments = {**features}
    if arguments.pop("segments", False):
        arguments["q_segments"] = jnp.asarray(SEGMENTS)
    if "sinks" in arguments:
        arguments["sinks"] = jnp.asarray(arguments["sinks"])
    return arguments


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("name", FEATURES)
def test_equals_explicit_rows(short_blocks, impl, name):
    q, k, v = inputs(V=6)
    features = {**FEATURES[name]}
    expected = explicit(
        q, k, v, scale=0.4, **{**features, **({"segments": (SEGMENTS,) * 2} if "segments" in features else {})}
    )
    with jax.enable_x64(True):
        actual = attention(q, k, v, scale=0.4, impl=impl, return_lse=True, **as_arguments(features))
        np.testing.assert_allclose(actual[0], expected[0], atol=1e-12)
        np.testing.assert_allclose(actual[1], expected[1], atol=1e-12)


def gradients(impl, q, k, v, arguments, seed=3):
    """(out, lse, dq, dk, dv, dsinks) for a random cotangent of out and of every finite lse."""
    arguments = {"scale": 0.4, **arguments}
    sinks = arguments.pop("sinks", None)
    N = q.shape[2]

    def loss(q, k, v, sinks):
        out, lse = attention(q, k, v, impl=impl, return_lse=True, sinks=sinks, **arguments)
        weight, lse_weight = draw(out.shape, seed, lse.dtype), draw(lse.shape, seed + 1, lse.dtype)
        finite = lse > -jnp.inf
        return jnp.sum(out.astype(weight.dtype) * weight) + jnp.sum(jnp.where(finite, lse, 0) * lse_weight), (out, lse)

    used = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    grads, (out, lse) = jax.jit(jax.grad(loss, argnums=used, has_aux=True))(q, k, v, sinks)
    assert len(grads) == 3 or grads[3].shape == (N,)
    return out, lse, *grads


def assert_same(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and not np.isnan(a).any()
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_equal_reference(short_blocks, name):
    q, k, v = inputs(V=6)
    with jax.enable_x64(True):
        both = [gradients(impl, q, k, v, as_arguments(FEATURES[name])) for impl in ("xla", "reference")]
        assert_same(*both, atol=1e-11)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 40),
    S=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (2, 2)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 50),
    soft_cap=st.none() | st.just(3.0),
    sinks=st.booleans(),
    segments=st.booleans(),
    positions=st.booleans(),
    seed=st.integers(0, 9),
)
@example(40, 5, (4, 1), True, 3, None, False, False, False, 0)  # later blocks see no key at all
@example(33, 33, (2, 2), True, None, None, True, True, True, 1)
def test_any_mask(short_blocks, T, S, heads, causal, window, soft_cap, sinks, segments, positions, seed):
    rng = np.random.default_rng(seed)
    q, k, v = inputs(T=T, S=S, N=heads[0], K=heads[1], H=4, V=3)
    arguments = {"causal": causal, "window": window, "soft_cap": soft_cap}
    if sinks:
        arguments["sinks"] = draw((heads[0],), 7)
    if segments:
        arguments |= {
            name: rng.integers(0, 3, (2, n)).astype(np.int32) for name, n in (("q_segments", T), ("kv_segments", S))
        }
    if positions:
        arguments |= {
            name: rng.integers(0, 60, (2, n)).astype(np.int32) for name, n in (("q_positions", T), ("kv_positions", S))
        }
    with jax.enable_x64(True):
        assert_same(*[gradients(impl, q, k, v, arguments) for impl in ("xla", "reference")], atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("sinks", [None, np.zeros(4, np.float32)])
def test_blind_queries_give_zeros_and_no_gradient(short_blocks, impl, sinks):
    q, k, v = inputs(dtype=np.float32)
    blind = SEGMENTS == 0

    def loss(q, k, v):
        out, lse = attention(
            q, k, v, scale=1, impl=impl, return_lse=True, q_segments=jnp.asarray(SEGMENTS), sinks=sinks
        )
        return jnp.sum(jnp.sin(out + 1)), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert (np.asarray(out)[blind] == 0).all()
    assert (np.asarray(lse)[blind] == (-np.inf if sinks is None else 0)).all()
    for gradient in grads:  # here a padding token is neither a query nor a key that counts
        assert (np.asarray(gradient)[blind] == 0).all()
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_packed_documents_equal_documents_alone(short_blocks):
    q, k, v = inputs(B=1, dtype=np.float32)
    plain = jax.jit(lambda q, k, v, segments=None: attention(q, k, v, scale=1, impl="xla", q_segments=segments))
    packed = plain(q, k, v, SEGMENTS[:1])
    for number in (2, 3):
        (rows,) = np.nonzero(SEGMENTS[0] == number)
        np.testing.assert_allclose(packed[:, rows], plain(q[:, rows], k[:, rows], v[:, rows]), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_error_is_bounded(short_blocks, dtype):
    """Error against float64 of the same rounded inputs: a few roundings of the output's own size."""
    q, k, v = (jnp.asarray(array, dtype) for array in inputs(T=64, dtype=np.float32))
    arguments = {"window": 50, "sinks": jnp.zeros(4, jnp.float32)}
    low = gradients("xla", q, k, v, arguments)
    assert low[0].dtype == low[2].dtype == dtype and low[1].dtype == low[5].dtype == jnp.float32
    low = [np.asarray(array, np.float64) for array in low]
    with jax.enable_x64(True):
        high = gradients("reference", *(np.asarray(array, np.float64) for array in (q, k, v)), arguments)
        for a, b in zip(low, high, strict=True):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert error < 1.5 * float(jnp.finfo(dtype).eps), f"{error} of {b.shape}"


def test_products_accumulate_in_float32(short_blocks):
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in inputs(T=16))
    both = jax.make_jaxpr(jax.grad(lambda *a: attention(*a, scale=1, impl="xla").astype(jnp.float32).sum()))(q, k, v)
    # Forward scores and output; backward scores, gradients of weights, v, q and k, and d_out·out.
    assert len(dots(both.jaxpr, dtype="float32")) == len(dots(both.jaxpr)) == 8


def dots(jaxpr, dtype=None) -> list[int]:
    """Multiply-adds of every matrix product in a jaxpr, of those with a result of `dtype` if given."""
    counts = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and dtype in (None, equation.outvars[0].aval.dtype.name):
            ((contract, _), _) = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            counts.append(math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contract))
        for inner in jaxprs_in_params(equation.params):
            counts += dots(inner, dtype)
    return counts


@pytest.mark.parametrize(("window", "share"), [(None, (1 + 2 + 3 + 4) / 16), (16, (1 + 2 + 2 + 2) / 16 - 3 / 256)])
def test_future_and_forgotten_keys_are_not_multiplied(short_blocks, window, share):
    q, k, v = inputs(T=64, dtype=np.float32)
    full = 2 * 4 * 64 * 64 * 8  # B·N·T·S·H
    arguments = {"scale": 1, "impl": "xla", "window": window}
    forward = jax.make_jaxpr(lambda *a: attention(*a, **arguments))(q, k, v)
    assert sum(dots(forward.jaxpr)) == 2 * full * share
    both = jax.make_jaxpr(jax.grad(lambda *a: attention(*a, **arguments).sum()))(q, k, v)
    # Two products forward; backward the scores again and four gradients, beside a sum of T·H terms.
    assert sum(dots(both.jaxpr)) == 7 * full * share + 2 * 4 * 64 * 8


def test_later_blocks_wait_for_earlier_ones(short_blocks):
    """What keeps one block's scores alive at a time; how much that leaves is measured where it is written down."""
    q, k, v = inputs(T=64, dtype=np.float32)
    backward = jax.grad(lambda *a: attention(*a, scale=1, impl="xla").sum(), argnums=(0, 1, 2))
    assert str(jax.make_jaxpr(backward)(q, k, v)).count("optimization_barrier") == 3 + 3


def test_under_jit_remat_scan_and_vmap(short_blocks):
    q, k, v = inputs(dtype=np.float32)
    arguments = {"scale": 0.4, "impl": "xla", "q_segments": jnp.asarray(SEGMENTS)}

    def layers(q, k, v):
        body = jax.checkpoint(lambda x, _: (attention(x, k, v, **arguments), None))
        return jax.lax.scan(body, q, None, length=2)[0]

    def plainly(q, k, v):
        for _ in range(2):
            q = attention(q, k, v, **{**arguments, "impl": "reference"})
        return q

    grads = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(q, k, v) for f in (layers, plainly)
    ]
    assert_same(*grads, atol=1e-5)
    stacked = jnp.stack([q, 2 * q])
    each = jax.jit(jax.vmap(lambda q: attention(q, k, v, **arguments)))(stacked)
    np.testing.assert_allclose(each[1], jax.jit(lambda q: attention(q, k, v, **arguments))(2 * q), atol=1e-6)


def test_sharded_over_batch_and_heads(short_blocks):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("rows", None, "columns", None)
    q, k, v = (jnp.asarray(array) for array in inputs(dtype=np.float32))
    local = jax.shard_map(
        lambda q, k, v: attention(q, k, v, scale=1, impl="xla"),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    grads = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(q, k, v)
        for f in (local, lambda q, k, v: attention(q, k, v, scale=1, impl="reference"))
    ]
    assert_same(*grads, atol=1e-4)


def case(**changes):
    fields = {"dtype": "bfloat16", "query_length": 2048, "kv_length": 2048, "num_heads": 32, "num_kv_heads": 8}
    return AttentionCase(**{**fields, "key_dim": 128, "value_dim": 128, **changes})


WIDE = {"key_dim": 256, "value_dim": 256}


@pytest.mark.parametrize(
    ("changes", "newer", "older"),
    [
        ({}, "pallas", "cudnn"),
        ({"gradient": True}, "pallas", "cudnn"),
        ({"causal": False}, "cudnn", "cudnn"),
        ({"causal": False, "gradient": True}, "pallas", "cudnn"),
        ({"causal": False, "gradient": True, "key_dim": 64, "value_dim": 64}, "cudnn", "cudnn"),
        ({"window": 1024}, "pallas", "cudnn"),
        ({"window": 1024, "gradient": True}, "cudnn", "cudnn"),
        ({"window": 1024, "sinks": True, "gradient": True}, "pallas", "xla"),
        ({"window": 2048, "gradient": True}, "pallas", "cudnn"),
        ({"segments": True, "sinks": True, "gradient": True}, "pallas", "xla"),
        ({"key_dim": 192}, "pallas", "xla"),
        ({"key_dim": 192, "gradient": True}, "pallas", "xla"),
        ({"key_dim": 96, "value_dim": 96}, "pallas", "cudnn"),
        ({"key_dim": 96, "value_dim": 96, "gradient": True}, "cudnn", "cudnn"),
        (WIDE, "cudnn", "cudnn"),
        (WIDE | {"segments": True}, "pallas", "xla"),
        (WIDE | {"segments": True, "gradient": True}, "pallas", "xla"),
        ({"dtype": "float8_e4m3fn"}, "pallas", "xla"),
        ({"dtype": "float32"}, "xla", "xla"),
    ],
)
def test_auto_takes_the_fastest_measured_on_hopper(monkeypatch, changes, newer, older):
    for version, impl in (((0, 11, 2), newer), ((0, 10, 2), older)):
        monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", version)
        assert choose("auto", case(**changes), H100)[0] == impl


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({}, CPU, "NVIDIA GPU"),
        ({}, Target("tpu"), "NVIDIA GPU"),
        ({}, Target("gpu"), "NVIDIA GPU"),
        ({}, Target("gpu", (7, 5)), "8.0"),
        ({"key_dim": 256, "value_dim": 256}, Target("gpu", (8, 0)), "at most 128"),
        ({"dtype": "float32"}, H100, "float32"),
        ({"key_dim": 84, "value_dim": 84}, H100, "multiple of 8"),
        ({"value_dim": 64}, H100, "128 and 64"),
        ({"query_length": 1}, H100, "1 and 2048"),
        ({"causal": False, "window": 8}, H100, "needs causal"),
        ({"segments": True, "soft_cap": True}, H100, "segments or a soft cap"),
        ({"positions": True}, H100, "positions"),
        ({"sinks": True}, H100, "sinks"),
        ({"return_lse": True}, H100, "log-sum-exp"),
    ],
)
def test_cudnn_refuses_what_it_cannot_do(monkeypatch, changes, target, words):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert words in supports("cudnn", case(**changes), target)
    with pytest.raises(ValueError, match="'cudnn' can't run"):
        choose("cudnn", case(**changes), target)
    assert choose("auto", case(**changes), target)[0] == "xla"


def test_cudnn_call_means_the_same(monkeypatch):
    """The arguments that cuDNN is given, computed by JAX's own plain implementation."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **{**k, "implementation": "xla"}))
    q, k, v = inputs(dtype=np.float32)
    for arguments in (
        {"causal": True, "window": None},
        {"causal": True, "window": 5},
        {"causal": False, "window": None},
    ):
        actual = cudnn.attention(q, k, v, scale=0.3, **arguments)
        np.testing.assert_allclose(actual, attention(q, k, v, scale=0.3, impl="reference", **arguments), atol=1e-5)


def test_default_target_is_this_machine():
    assert default_target() == CPU
    q, k, v = inputs(T=8, dtype=np.float32)
    with pytest.raises(ValueError, match="NVIDIA GPU, and the target is cpu"):
        attention(q, k, v, scale=1, impl="cudnn")
    assert attention(q, k, v, scale=1).shape == q.shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": np.zeros((2, 40, 3, 8), np.float32)}, "3 query heads and 2 kv heads"),
        ({"q": np.zeros((2, 40, 4, 9), np.float32)}, r"needs q \[B,T,N,H\]"),
        ({"v": np.zeros((2, 39, 2, 8), np.float32)}, r"needs q \[B,T,N,H\]"),
        ({"q": np.zeros((2, 40, 32), np.float32)}, "four axes"),
        ({"q": np.zeros((2, 40, 4, 8), np.float16)}, "one dtype"),
        ({"window": 0}, "window=0"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be positive"),
        ({"sinks": np.zeros(2)}, "one logit per query head"),
        ({"kv_segments": SEGMENTS}, "without q_segments"),
        ({"q_segments": SEGMENTS, "kv_segments": SEGMENTS[:, 1:]}, "they need"),
        ({"q": np.zeros((2, 9, 4, 8), np.float32), "q_positions": SEGMENTS[:, :9]}, "give kv_positions"),
        ({"impl": "flash"}, "impl='flash' is unknown"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    q, k, v = inputs(dtype=np.float32)
    arguments = {"q": q, "k": k, "v": v, "scale": 1, **changes}
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **arguments)
