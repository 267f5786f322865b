"""Attention over pages: every implementation against a loop in float64, the Hopper kernel interpreted or on a GPU."""

import dataclasses
import itertools
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.paged_attention
from kernels import aot
from kernels.hopper_chip import SHARED_BYTES
from kernels.paged_attention import (
    PagedAttentionCase,
    choose,
    combine,
    extend_pages,
    paged_attention,
    supports,
    tiles,
    write_pages,
)
from kernels.paged_attention.combine import combine_parts
from kernels.paged_attention.tiles import Tiles, choose_tiles
from kernels.target import Target

CPU = Target("cpu")
H100 = Target("gpu", (9, 0))
DECODE = PagedAttentionCase("bfloat16", 128, 1, 32, 8, 128, 64, 512)
SCALE = 0.3


def cache(lengths, B, N, K, H, S, M, T, seed=0):
    """(q, k_pages, v_pages, page_table) in float64, with NaN wherever no row's key lies; pages are in no order."""
    rng = np.random.default_rng(seed)
    P = B * M + 2
    q = rng.normal(size=(B, T, N, H))
    k_pages, v_pages = rng.normal(size=(2, P, S, K, H))
    page_table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    live = np.zeros((P, S), bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            live[page_table[b, position // S], position % S] = True
    k_pages[~live] = v_pages[~live] = np.nan
    return q, k_pages, v_pages, page_table


def explicit(q, k_pages, v_pages, page_table, lengths, starts, *, scale, window=None, soft_cap=None, sinks=None):
    """Query by query in float64."""
    B, T, N, _ = q.shape
    S, K = k_pages.shape[1:3]
    out = np.zeros(q.shape)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        position = starts[b] + t
        first = 0 if window is None else max(0, position - window + 1)
        seen = range(first, min(position + 1, lengths[b]))
        k = [k_pages[page_table[b, p // S], p % S, n * K // N] for p in seen]
        v = [v_pages[page_table[b, p // S], p % S, n * K // N] for p in seen]
        if not k:
            continue
        scores = scale * np.stack(k) @ q[b, t, n]
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        terms = np.exp(scores)
        out[b, t, n] = terms @ np.stack(v) / (terms.sum() + (0 if sinks is None else math.exp(sinks[n])))
    return out


SINKS = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": SINKS},
    "everything": {"window": 9, "soft_cap": 2.0, "sinks": SINKS},
}
BLOCKS = {
    "decode": (1, [17, 0, 24, 1], None),
    "block": (4, [17, 4, 24, 9], None),
    "block that begins before its row": (4, [17, 2, 0, 9], None),
    "block with padding": (4, [14, 1, 24, 5], [12, 0, 22, 5]),
}


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FEATURES)
def test_equals_explicit_queries(impl, block, name):
    T, lengths, starts = BLOCKS[block]
    q, k_pages, v_pages, page_table = cache(lengths, B=4, N=6, K=3, H=8, S=4, M=6, T=T)
    given_starts = None if starts is None else jnp.asarray(starts)
    starts = [length - T for length in lengths] if starts is None else starts
    expected = explicit(q, k_pages, v_pages, page_table, lengths, starts, scale=SCALE, **FEATURES[name])
    with jax.enable_x64(True):
        features = {key: jnp.asarray(value) if key == "sinks" else value for key, value in FEATURES[name].items()}
        actual = paged_attention(
            *(jnp.asarray(x) for x in (q, k_pages, v_pages, page_table, lengths)),
            starts_B=given_starts,
            scale=SCALE,
            impl=impl,
            **features,
        )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 1)])
@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_query_heads_share_kv_heads(impl, N, K):
    q, k_pages, v_pages, page_table = cache([7, 12], B=2, N=N, K=K, H=8, S=4, M=3, T=2)
    expected = explicit(q, k_pages, v_pages, page_table, [7, 12], [5, 10], scale=SCALE)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x) for x in (q, k_pages, v_pages, page_table, np.array([7, 12])))
        np.testing.assert_allclose(paged_attention(*arrays, scale=SCALE, impl=impl), expected, atol=1e-12)


def test_kernels_compile_for_an_h100_without_spills():
    if aot.missing() is not None:
        pytest.skip(f"python -m kernels.aot {aot.missing()}")
    reports = aot.reports()
    assert [report.name for report in reports] == list(aot.CASES)
    # The backward pass of the widest heads, and that with all masks, put a few words of addresses aside in each step;
    # so does the feed-forward's first product, in each tile.
    few = {name for name, case in aot.CASES.items() if isinstance(case, aot.GradientsCase)} | {"grouped hidden"}
    assert not [report for report in reports if report.spilled_bytes > (64 if report.name in few else 0)]
    assert not [report for report in reports if report.serialized]
    assert not [report for report in reports if report.registers > 255]
    # Two blocks of threads on a processor in decode, so that one computes while the other waits for its copies.
    assert 2 * reports[0].shared_bytes <= SHARED_BYTES and 2 * 128 * reports[0].registers <= 65536


def computed(execution, q, k_pages, v_pages, page_table, lengths, starts, dtype, tiles=None, new=None, **features):
    """Of the Hopper kernel: out, and the pages where it writes `new` to them."""
    from kernels.paged_attention import case_of, gpu

    arrays = [jnp.asarray(x, dtype) for x in (q, k_pages, v_pages)]
    integers = [jnp.asarray(x, jnp.int32) for x in (page_table, lengths, starts)]
    results = execution.kernel(
        gpu.paged_attention,
        *arrays,
        *integers,
        **{"scale": SCALE, "window": None, "soft_cap": None, "sinks": None, **features},
        tiles=choose_tiles(case_of(arrays[0], arrays[1], integers[0])) if tiles is None else tiles,
        new=None if new is None else tuple(jnp.asarray(x, dtype) for x in new),
    )
    out = results if new is None else results[0]
    assert not np.isnan(out).any()
    return results


# One case for each way through the kernel; an interpreted one takes seconds.
KERNEL_CASES = {
    "decode, ragged": dict(lengths=[70, 0, 300], M=5, tiles=Tiles(1, 2, 1)),
    "parts, some empty": dict(lengths=[130, 5], M=3, tiles=Tiles(1, 2, 3)),
    "verification, window": dict(lengths=[150, 40], M=3, T=3, starts=[147, 38], window=50, N=4, K=2),
    "soft cap, sinks": dict(lengths=[90], M=2, soft_cap=1.5, sinks=3 * SINKS[:4], N=4, K=2, T=2),
    "small pages, window, parts": dict(lengths=[150], M=10, S=16, window=100, tiles=Tiles(4, 3, 2), dtype="float16"),
    "wide heads": dict(lengths=[70], M=1, S=128, H=128, N=2, T=9),
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernel_equals_explicit_queries(execution, name):
    case = {"S": 64, "T": 1, "N": 3, "K": 1, "H": 64, "dtype": "bfloat16", **KERNEL_CASES[name]}
    lengths, T, dtype = case.pop("lengths"), case["T"], case.pop("dtype")
    starts = case.pop("starts", [length - T for length in lengths])
    arrays = cache(lengths, len(lengths), **{key: case.pop(key) for key in ("N", "K", "H", "S", "M", "T")})
    rounded = [np.asarray(jnp.asarray(x, dtype)).astype(np.float64) for x in arrays[:3]]
    features = {key: value for key, value in case.items() if key != "tiles"}
    expected = explicit(*rounded, arrays[3], lengths, starts, scale=SCALE, **features)
    if "sinks" in case:
        case["sinks"] = jnp.asarray(case["sinks"], jnp.float32)
    actual = computed(execution, *arrays, lengths, starts, dtype, **case)
    assert actual.dtype == dtype
    # Weights and outputs are rounded to the dtype, once each.
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), expected, atol=3 * float(jnp.finfo(dtype).eps))


WRITE_CASES = {
    # The last token of a page, the first, one past the table (in its last block too), and two rows that take no part.
    "ragged": dict(lengths=[64, 65, 129, 70, 0], counts=[1, 1, 1, 0, 0], M=2, N=6, K=2),
    "parts, small pages, window": dict(
        lengths=[150, 17, 166], counts=[1, 1, 1], M=10, S=16, window=100, tiles=Tiles(4, 3, 2)
    ),
}


@pytest.mark.parametrize("name", WRITE_CASES)
def test_kernel_writes_the_new_token_and_attends_to_it(execution, name):
    case = {"S": 64, "N": 3, "K": 1, "H": 64, **WRITE_CASES[name]}
    lengths, counts = np.array(case.pop("lengths")), np.array(case.pop("counts"))
    shape = {key: case.pop(key) for key in ("N", "K", "H", "S", "M")}
    held = np.minimum(lengths - counts, shape["S"] * shape["M"])
    q, k_pages, v_pages, page_table = cache(held, len(lengths), **shape, T=1)
    new = np.random.default_rng(1).normal(size=(2, len(lengths), 1, shape["K"], shape["H"]))
    q, k_pages, v_pages, new = (jnp.asarray(x, jnp.bfloat16) for x in (q, k_pages, v_pages, new))
    expected_pages = write_pages(k_pages, v_pages, *new, page_table, lengths - counts, counts)
    wide = [np.asarray(x, np.float64) for x in (q, *expected_pages)]
    features = {key: value for key, value in case.items() if key != "tiles"}
    within = lengths <= shape["S"] * shape["M"]
    expected = explicit(*wide, page_table, lengths * within, lengths - counts, scale=SCALE, **features)
    arrays = (q, k_pages, v_pages, page_table, lengths, lengths - counts)
    out, *pages = computed(execution, *arrays, "bfloat16", new=new, **case)
    error = np.abs(np.asarray(out, np.float64) - expected)[within]
    assert error.max() <= 3 * float(jnp.finfo("bfloat16").eps)
    for actual, want in zip(pages, expected_pages, strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("T", [1, 3])
def test_extend_pages_writes_and_then_attends(T):
    starts, counts = np.array([5, 11, 0]), np.array([1, T, 0])
    q, k_pages, v_pages, page_table = cache(starts, 3, N=4, K=2, H=8, S=4, M=4, T=T)
    new = np.random.default_rng(1).normal(size=(2, 3, T, 2, 8))
    with jax.enable_x64(True):
        q, k_pages, v_pages, *new = (jnp.asarray(x) for x in (q, k_pages, v_pages, *new))
        out, *pages = extend_pages(q, *new, k_pages, v_pages, page_table, starts, counts, scale=SCALE, impl="xla")
        expected_pages = write_pages(k_pages, v_pages, *new, page_table, starts, counts)
        expected = paged_attention(
            q, *expected_pages, page_table, starts + counts, starts_B=starts, scale=SCALE, impl="reference"
        )
    np.testing.assert_allclose(out, expected, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, tuple(pages), expected_pages)


def test_one_token_of_each_row_is_written_by_the_kernel_that_attends(newer_jax, monkeypatch):
    calls = []

    def attend(q, k_pages, v_pages, *rest, new=None, **_):
        calls.append(new)
        return q if new is None else (q, k_pages, v_pages)

    gpu = types.SimpleNamespace(paged_attention=attend)
    monkeypatch.setitem(sys.modules, "kernels.paged_attention.gpu", gpu)
    monkeypatch.setattr(kernels.paged_attention, "gpu", gpu, raising=False)
    pages = jnp.zeros((5, 64, 2, 64), jnp.bfloat16)
    integers = jnp.zeros((2, 2), jnp.int32), jnp.array([3, 4]), jnp.array([1, 1])
    for T in (1, 2):
        q, new = jnp.zeros((2, T, 4, 64), jnp.bfloat16), jnp.zeros((2, T, 2, 64), jnp.bfloat16)
        extend_pages(q, new, new, pages, pages, *integers, scale=1.0, impl="auto", target=H100)
    assert [given is None for given in calls] == [False, True]


@pytest.mark.parametrize("most_terms", [16, 1])
def test_parts_add_up_to_the_whole(monkeypatch, most_terms):
    monkeypatch.setattr(combine, "MOST_TERMS", most_terms)
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4, 2))
    scores[1, :, 0] = -np.inf
    scores[:, :, 3] = -np.inf
    terms = np.exp(scores)
    sinks = np.array([0.5, -1.0, 2.0, 0.0])
    for sink in (None, sinks):
        total = terms.sum((0, 1)) + (0 if sink is None else np.exp(sink))
        expected = np.einsum("xsr,xsrh->rh", terms, values) / np.where(total == 0, 1, total)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.nan_to_num(np.einsum("xsr,xsrh->xrh", terms, values) / terms.sum(1)[..., None])
            lse = np.log2(terms.sum(1))
        actual = combine_parts(
            jnp.asarray(part, jnp.float32)[:, None, None],
            jnp.asarray(lse, jnp.float32)[:, None, None],
            None if sink is None else jnp.asarray(sink)[None],
        )
        np.testing.assert_allclose(actual[0, 0], expected, atol=1e-6)


@pytest.fixture
def newer_jax(monkeypatch):
    """What is chosen does not depend on the JAX that the tests run with."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_fit_the_chip(newer_jax, head_dim, page_size):
    for batch, heads, num_tokens, pages in itertools.product(
        (1, 2, 7, 40, 300), ((1, 1), (4, 1), (8, 8), (64, 8)), (1, 2, 8, 64), (1, 3, 100, 2000)
    ):
        case = PagedAttentionCase("bfloat16", batch, num_tokens, *heads, head_dim, page_size, pages * page_size)
        if not tiles.few_queries(case):
            continue
        chosen = choose_tiles(case)
        block = chosen.pages_per_block * page_size
        columns = -(-num_tokens * heads[0] // heads[1] // 8) * 8
        buffers = 2 * 2 * chosen.num_buffers * block * head_dim
        assert buffers + columns * (8 * head_dim + 2 * block) + 4 * head_dim + 2088 <= 232448
        assert block % 64 == 0 and chosen.num_buffers >= 2
        assert chosen.num_parts == 1 or (
            batch * heads[1] * chosen.num_parts <= 264 and case.width // chosen.num_parts >= 128
        )


def test_choice_and_its_reason(newer_jax):
    assert choose("auto", CPU, DECODE) == choose("auto", CPU) == ("xla", "the only fast implementation for cpu")
    assert choose("auto", H100, DECODE)[0] == "pallas"
    assert choose("auto", H100)[0] == "auto"
    assert choose("auto", Target("gpu", (8, 0)))[0] == "xla"
    assert choose("xla", H100, DECODE) == ("xla", "asked for by name")
    with pytest.raises(ValueError, match="impl='magic' is unknown; choose one of auto, reference, xla, pallas"):
        choose("magic", H100)
    with pytest.raises(ValueError, match="impl='magic' is unknown"):
        supports("magic", DECODE, H100)


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({}, CPU, "compute capability 9.0, and the target is cpu"),
        ({}, Target("gpu", (10, 0)), "compute capability 9.0, and the target is gpu of compute capability 10.0"),
        ({"dtype": "float32"}, H100, "takes bfloat16 and float16, not float32"),
        ({"head_dim": 80}, H100, "a head width of 64, 128 or 256, not 80"),
        ({"page_size": 48}, H100, "pages of 16, 32, 64 or 128 positions, not 48"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(newer_jax, change, target, reason):
    case = dataclasses.replace(DECODE, **change)
    assert supports("xla", case, target) is None
    with pytest.raises(ValueError, match=reason):
        choose("pallas", target, case)
    assert choose("auto", target, case)[0] == "xla"


def test_older_jax_has_no_kernel(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert choose("auto", H100, DECODE) == (
        "xla",
        "pallas can't: the kernel needs JAX 0.11 (Python 3.12), and this is JAX 0.10.2",
    )


def test_kernel_asked_for_by_name_on_a_cpu_raises():
    q, pages = jnp.zeros((1, 1, 4, 64), jnp.bfloat16), jnp.zeros((2, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="can't run: the kernel is written for NVIDIA GPUs"):
        paged_attention(q, pages, pages, jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32), scale=1.0, impl="pallas")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 4, 8)}, r"needs q \[B,T,N,H\]"),
        ({"v": (3, 4, 1, 8)}, r"needs q \[B,T,N,H\] and pages \[P,S,K,H\]"),
        ({"k": (3, 4, 3, 8), "v": (3, 4, 3, 8)}, "must be a multiple of the kv heads"),
        ({"table": (3, 2)}, r"need \[B, M\] and \[B\] with B=2"),
    ],
)
def test_shapes_that_disagree_are_refused(change, message):
    shapes = {"q": (2, 1, 4, 8), "k": (3, 4, 2, 8), "v": (3, 4, 2, 8), "table": (2, 2), **change}
    arrays = [jnp.zeros(shapes[name], jnp.int32 if name == "table" else jnp.float32) for name in shapes]
    with pytest.raises(ValueError, match=message):
        paged_attention(*arrays, jnp.ones(2, jnp.int32), scale=1.0, impl="xla")


@settings(max_examples=50, deadline=None)
@given(
    S=st.sampled_from([1, 4]),
    starts=st.lists(st.integers(0, 16), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
def test_write_pages_puts_each_token_in_its_place(S, starts, counts):
    B, T, M, K, H = 3, 6, 4, 2, 3
    rng = np.random.default_rng(1)
    pages = rng.normal(size=(2, B * M + 1, S, K, H)).astype(np.float32)
    new = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
    page_table = rng.permutation(B * M + 1)[: B * M].reshape(B, M).astype(np.int32)
    expected = pages.copy()
    for b, t in itertools.product(range(B), range(T)):
        position = starts[b] + t
        if t < counts[b] and position < M * S:
            expected[:, page_table[b, position // S], position % S] = new[:, b, t]
    actual = jax.jit(write_pages)(*pages, *new, page_table, np.array(starts), np.array(counts))
    np.testing.assert_array_equal(actual, expected)


def test_write_pages_is_in_place_where_the_pages_are_donated():
    pages = jax.ShapeDtypeStruct((64, 16, 2, 32), jnp.float32)
    new = jax.ShapeDtypeStruct((2, 1, 2, 32), jnp.float32)
    table, row = jax.ShapeDtypeStruct((2, 4), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = jax.jit(write_pages, donate_argnums=(0, 1)).lower(pages, pages, new, new, table, row, row).compile()
    memory = compiled.memory_analysis()
    size = 4 * math.prod(pages.shape)
    assert memory.alias_size_in_bytes == 2 * size and memory.temp_size_in_bytes < size


def test_tiles_name_the_part_count_of_measured_shapes():
    def parts(batch, width):
        return choose_tiles(PagedAttentionCase("bfloat16", batch, 1, 32, 8, 128, 64, width)).num_parts

    assert [parts(*shape) for shape in ((1, 512), (1, 8192), (8, 1024), (32, 1024), (128, 512))] == [4, 8, 1, 1, 1]
    assert tiles.MAX_PARTS >= parts(1, 131072) > 8
