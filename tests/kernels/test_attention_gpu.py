"""Attention on Hopper: the forward kernel interpreted or on a GPU, the blocks it computes, what it is chosen for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels import attention as op
from kernels.attention import AttentionCase, blocks, choose, reference, supports, tiles, xla
from kernels.attention.masks import Masks
from kernels.attention.tiles import Tiles, choose_tiles
from kernels.target import Target
from tests.kernels.interpreter import plain_products

H100 = Target("gpu", (9, 0))
PLAIN = AttentionCase("bfloat16", 2048, 2048, 32, 8, 128, 128)
MARKS = ("q_segments", "kv_segments", "q_positions", "kv_positions")


@pytest.fixture
def gpu(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it."""
    plain_products(monkeypatch, execution)
    from kernels.attention import gpu

    return gpu


def computed(execution, gpu, q, k, v, chosen=None, races=True, **arguments):
    """(out, lse) of the kernel."""
    case = op._case(
        q, k, v, *(arguments[name] for name in ("causal", "window", *MARKS[::2], "soft_cap", "sinks")), True
    )
    chosen = choose_tiles(case) if chosen is None else chosen
    out, lse = execution.kernel(gpu.attention, q, k, v, **arguments, tiles=chosen, races=races)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32 and not np.isnan(out).any() and not np.isnan(lse).any()
    return out, lse


_low = jax.jit(xla.attention, static_argnames=("scale", "causal", "window", "soft_cap"))


def assert_error_is_bounded(actual, q, k, v, **arguments):
    """Of out and of lse, each at most 1.5 times that of the XLA route in the same precision, from float64."""
    low = _low(q, k, v, **arguments)
    with jax.enable_x64(True):
        exact = reference.attention(*(jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)), **arguments)
    for mine, theirs, true in zip(actual, low, (np.asarray(x) for x in exact), strict=True):
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        seen = true > -np.inf
        assert ((mine > -np.inf) == seen).all()
        errors = [np.linalg.norm(x[seen] - true[seen]) for x in (mine, theirs)]
        # A sum in another order is off by one float32 rounding, where theirs happens to be exact.
        assert errors[0] <= 1.5 * errors[1] + 1e-6 * np.linalg.norm(true[seen]), errors


def documents(lengths, total):
    """int32 [1, total]: 1, 2, ... for as many tokens each, and then padding."""
    numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return np.pad(numbers, (0, total - len(numbers)))[None].astype(np.int32)


SINKS = np.array([1.5, -3.0, 6.0], np.float32)
FAR_SINKS = np.array([200.0, -200.0, 3.0], np.float32)
PACKED = np.concatenate([documents([50, 100, 47], 200), documents([170, 20], 200)])
# One case for each way through the kernel; an interpreted one takes seconds.
CASES = {
    "causal, whole blocks, wide, more items than processors": dict(B=2, T=256, H=128, processors=2),
    "full, ragged, fewer queries than keys": dict(T=130, S=300, causal=False),
    "packed documents, window, soft cap, sinks": dict(
        B=2, T=200, segments=(PACKED, PACKED), window=60, soft_cap=2.0, sinks=SINKS[:2], processors=2
    ),
    "positions, group of heads, float16 with a soft cap": dict(
        T=130,
        S=270,
        N=4,
        K=2,
        positions=(2, 1),
        window=90,
        dtype="float16",
        soft_cap=20.0,
        scale=20.0,
        chosen=Tiles(2, 64, 3, 1, 2),
    ),
    "queries past the window of all keys": dict(T=300, S=100, window=50, processors=2),
    "window both ways, negative scale, high soft cap": dict(
        T=140, window=20, causal=False, scale=-20.0, soft_cap=100.0, chosen=Tiles(2, 64, 2, 2, 2)
    ),
    "negative scale, sinks beyond the soft cap, queries that see nothing but them": dict(
        T=80, N=3, H=128, segments=(documents([60], 80),) * 2, scale=-0.3, soft_cap=2.0, sinks=FAR_SINKS
    ),
    "narrower values": dict(T=200, H=192, V=128, N=1, processors=1, races=False),
    "wide heads, no two queries": dict(T=1, S=65, H=256, N=1, causal=False, sinks=SINKS[:1]),
    "heads of 80": dict(T=20, H=80, N=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_error_is_bounded(execution, gpu, monkeypatch, name):
    fields = {"B": 1, "N": 2, "K": 1, "H": 64, "dtype": "bfloat16", "segments": None, "positions": None, **CASES[name]}
    monkeypatch.setattr(gpu, "NUM_PROCESSORS", fields.pop("processors", 132))
    B, T, N, K, H, dtype = (fields.pop(key) for key in ("B", "T", "N", "K", "H", "dtype"))
    S, V = fields.pop("S", T), fields.pop("V", H)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=size), dtype) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, V)))
    segments, strides = fields.pop("segments"), fields.pop("positions")
    positions = strides and [np.tile(np.arange(n) * x, (B, 1)) for n, x in zip((T, S), strides, strict=True)]
    marks = [
        x if x is None else jnp.asarray(x, jnp.int32) for x in (*(segments or (None,) * 2), *(positions or (None,) * 2))
    ]
    arguments = {"scale": 0.3, "causal": True, "window": None, "soft_cap": None, "sinks": None}
    arguments |= dict(zip(MARKS, marks, strict=True))
    arguments |= {key: fields.pop(key) for key in tuple(fields) if key in arguments}
    chosen, races = fields.pop("chosen", None), fields.pop("races", True)
    actual = computed(execution, gpu, q, k, v, chosen, races, **arguments)
    assert not fields
    assert_error_is_bounded(actual, q, k, v, **arguments)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, 150), min_size=2, max_size=4),
    numbers=st.lists(st.integers(-2, 2), min_size=3, max_size=5),
    shift=st.integers(-200, 200),
    shuffled=st.booleans(),
)
@example(cuts=[0, 150], numbers=[0, 0, 0], shift=0, shuffled=False)  # nobody sees anything
@example(cuts=[64, 128], numbers=[1, 2, 1], shift=-150, shuffled=False)  # blocks between that hold nothing
def test_any_segments_and_positions(execution, gpu, cuts, numbers, shift, shuffled):
    rng = np.random.default_rng(len(cuts))
    T = 150
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, heads, 64)), jnp.bfloat16) for heads in (2, 1, 1))
    segments = np.array(numbers, np.int32)[np.searchsorted(sorted(cuts), np.arange(T)) % len(numbers)][None]
    positions = np.arange(T, dtype=np.int32)[None]
    if shuffled:
        positions = rng.permutation(positions, axis=1)
    marks = (segments, segments[:, ::-1], positions + shift, positions)
    arguments = {"scale": 0.3, "causal": True, "window": 100, "soft_cap": None, "sinks": None}
    arguments |= {name: jnp.asarray(array) for name, array in zip(MARKS, marks, strict=True)}
    # One compilation for all examples.
    actual = computed(execution, gpu, q, k, v, Tiles(2, 64, 2, 2, 2), races=False, **arguments)
    assert_error_is_bounded(actual, q, k, v, **arguments)


def seen_blocks(masks, rows, block, marks):
    """([tiles, blocks] whether a pair of the tile and the block is seen, and whether all are) by every pair."""
    q_segments, kv_segments, q_positions, kv_positions = marks
    T, S = masks.num_queries, masks.num_keys
    own, key = (np.arange(T), np.arange(S)) if q_positions is None else (q_positions[0], kv_positions[0])
    distance, seen = own[:, None] - key, np.ones((T, S), bool)
    if masks.causal:
        seen &= distance >= 0
    if masks.window is not None:
        seen &= abs(distance) < masks.window
    if masks.segments:
        seen &= (q_segments[0][:, None] == kv_segments[0]) & (kv_segments[0] != 0)
    shape = (-(-T // rows), rows, -(-S // block), block)
    widths = [(0, shape[0] * rows - T), (0, shape[2] * block - S)]
    some, whole = (np.pad(seen, widths, constant_values=value).reshape(shape) for value in (False, True))
    whole[..., -1, :] &= S % block == 0
    return some.any((1, 3)), whole.all((1, 3))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.sampled_from([(24, 24), (7, 30), (30, 7)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    segments=st.sampled_from(["no", "packed", "any"]),
    positions=st.sampled_from(["no", "shifted", "any"]),
    seed=st.integers(0, 9),
)
def test_every_seen_key_is_in_a_computed_block(lengths, causal, window, segments, positions, seed):
    rng, (T, S), rows, block = np.random.default_rng(seed), lengths, 6, 4
    marks = [None] * 4
    if segments != "no":
        marks[:2] = (rng.integers(0, 4, (1, n)) for n in lengths)
        if segments == "packed":
            marks[:2] = (np.sort(array)[:, ::-1] for array in marks[:2])
    if positions != "no":
        marks[2:] = (np.arange(n)[None] + rng.integers(-9, 30) for n in lengths)
        if positions == "any":
            marks[2:] = (rng.permutation(array, axis=1) for array in marks[2:])
    masks = Masks(T, S, causal, window, segments != "no", positions != "no")
    some, whole = seen_blocks(masks, rows, block, marks)
    data = [mark if mark is None else jnp.asarray(mark, jnp.int32) for mark in marks]
    (by_data,) = np.asarray(blocks.extents_by_data(masks, rows, block, *data))
    by_index = [blocks.extent_by_index(masks, block, low, low + rows - 1) for low in range(0, T, rows)]
    every = [by_data] if masks.by_data else [by_data, np.array(by_index)]
    for extents, tile in itertools.product(every, range(len(some))):
        first, end, full_first, full_end = (int(x) for x in extents[tile])
        computed, unmasked = np.zeros((2, some.shape[1]), bool)
        computed[first:end] = unmasked[full_first:full_end] = True
        assert 0 <= first <= end and (first == end or end <= some.shape[1])
        assert not (some[tile] & ~computed).any() and not (computed & unmasked & ~whole[tile]).any()
        if not masks.by_data and some[tile].any():
            # Nothing is computed in vain, and masked only where it must be.
            assert (computed == some[tile]).all() and (unmasked & computed == whole[tile]).all()


@pytest.fixture
def newer_jax(monkeypatch):
    """What is chosen does not depend on the JAX that the tests run with."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))


@pytest.mark.parametrize("widths", tiles.WIDTHS)
def test_tiles_fit_the_chip(newer_jax, widths):
    for heads, length, window, marks in itertools.product(
        ((1, 1), (8, 8), (32, 8), (96, 6)), (1, 17, 512, 131072), (None, 1, 4096), (False, True)
    ):
        case = AttentionCase("float16", length, length + 3, *heads, *widths, True, window, marks, marks)
        assert supports("pallas", case, H100) is None
        chosen = choose_tiles(case)
        keys = 2 * chosen.num_buffers * chosen.block * sum(widths)
        assert keys + 2 * chosen.num_queries * chosen.rows * widths[0] + 2048 < 232448
        threads = [128 * chosen.num_warpgroups, 128]
        assert sum(n * each for n, each in zip(threads, chosen.registers, strict=True)) <= 65536
        # Accumulators of scores and outputs, and the weights, of one thread.
        assert chosen.block * 64 // 128 * 1.5 + widths[1] * 64 // 128 < chosen.registers[0] - 24
        # The column tile of values in shared memory asks it.
        assert chosen.block % 64 == 0 and chosen.num_buffers >= 2
        assert chosen.num_heads == 1 or 2 * chosen.num_heads * min(length, 2 * (window or length)) * sum(widths) < 40e6


def test_heads_whose_keys_fit_the_cache_come_together():
    def together(**changes):
        return choose_tiles(dataclasses.replace(PLAIN, **changes)).num_heads

    assert [together(kv_length=length) for length in (2048, 8192, 16384, 131072)] == [32, 8, 4, 1]
    assert together(kv_length=131072, window=4096) == 8


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({}, Target("cpu"), "compute capability 9.0"),
        ({}, Target("gpu", (8, 0)), "8.0"),
        ({"dtype": "float32"}, H100, "not float32"),
        ({"key_dim": 192, "value_dim": 192}, H100, "192/128.*not 192/192"),
        ({"kv_length": 0}, H100, "2048 and 0"),
    ],
)
def test_refuses_what_it_cannot_do(newer_jax, changes, target, words):
    case = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(ValueError, match=f"'pallas' can't run: .*{words}"):
        choose("pallas", case, target)


def test_refuses_an_older_jax(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert "needs JAX 0.11" in supports("pallas", PLAIN, H100)


def test_the_op_runs_the_kernel_and_its_gradient(newer_jax, monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} has another interface of Mosaic GPU")
    from kernels.attention import gpu, gpu_backward

    calls = {}

    def forward(q, k, v, **arguments):
        calls["forward"] = arguments
        return 2 * q, jnp.full(q.shape[:3], 3.0)

    def backward(q, k, v, out, lse, d_out, d_lse, **arguments):
        calls["backward"] = arguments
        np.testing.assert_array_equal(out, 2 * q)
        np.testing.assert_array_equal(lse, 3.0)
        return d_out, k, 2 * v, arguments["sinks"] + d_lse.sum()

    monkeypatch.setattr(gpu, "forward", forward)
    monkeypatch.setattr(gpu_backward, "attention_gradients", backward)
    q, k, v = (jnp.full((1, 8, heads, 64), heads, jnp.bfloat16) for heads in (4, 2, 2))
    segments, sinks = jnp.ones((1, 8), jnp.int32), jnp.arange(4.0)
    arguments = {"scale": 0.5, "window": 5, "soft_cap": 9.0, "q_segments": segments}

    def loss(q, k, v, sinks):
        out, lse = op.attention(q, k, v, sinks=sinks, impl="pallas", target=H100, return_lse=True, **arguments)
        return out.astype(jnp.float32).sum() * 7 + lse.sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sinks)
    # As the two above make them: d_out, k, 2 v, and sinks with the sum of d_lse, of 32 rows.
    for gradient, expected in zip(gradients, (7 * jnp.ones_like(q), k, 2 * v, sinks + 32), strict=True):
        np.testing.assert_array_equal(gradient, expected)
    assert calls["forward"].pop("tiles") == choose_tiles(op._case(q, k, v, True, 5, segments, None, 9.0, sinks, True))
    for given_arguments in calls.values():
        np.testing.assert_array_equal(given_arguments.pop("kv_segments"), segments)
        assert {key: value for key, value in given_arguments.items() if value is not None and key != "sinks"} == {
            "causal": True,
            **arguments,
        }
