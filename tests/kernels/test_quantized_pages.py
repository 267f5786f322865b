"""Pages of 8 bits: how keys and values are rounded and written, what XLA makes of them, and what is refused."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.hopper_chip import SHARED_BYTES
from kernels.paged_attention import (
    PagedAttentionCase,
    choose,
    extend_pages,
    paged_attention,
    supports,
    tiles,
    write_pages,
)
from kernels.paged_attention.quantize import LARGEST, dequantize, quantize_heads, scale_bytes
from kernels.target import Target
from tests.kernels.test_paged_attention import BLOCKS, FEATURES, explicit

CODES = tuple(LARGEST)
H100 = Target("gpu", (9, 0))
DECODE = PagedAttentionCase("bfloat16", 128, 1, 32, 8, 128, 64, 512, kv_dtype="int8")
SCALE = 0.3


def half_step(x, scale, code):
    """Of the format, at each element of `x`."""
    if code == "int8":
        return scale / 2
    # Three bits after the first one; below 2^-6 steps of 2^-9.
    return np.maximum(np.abs(x) / 16, scale * 2.0**-10)


@settings(max_examples=100, deadline=None)
@example(x=[0.0, 0.0, 0.0, 1.8e-39], code="float8_e4m3fn")
@example(x=[1e-38, 2e-36, -5e-34, 1e-33], code="int8")
@given(
    x=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    code=st.sampled_from(CODES),
)
def test_a_head_comes_back_to_half_a_step(x, code):
    x = np.array(x, np.float32)
    codes, scale = (np.asarray(part, np.float64) for part in quantize_heads(jnp.asarray(x), code))
    error = np.abs(codes * scale - x.astype(np.float64))
    assert (error <= half_step(x.astype(np.float64), scale, code) * (1 + 1e-5)).all()
    assert np.abs(codes).max() <= LARGEST[code] and scale > 0


@pytest.mark.parametrize("code", CODES)
def test_a_nan_shows_among_many_too(code):
    """Beyond some thousand elements XLA's maximum on a CPU leaves NaNs out."""
    x = np.ones((4, 16, 1, 64), np.float32)
    x[2, 3, 0, 17] = np.nan
    _, scale = jax.jit(quantize_heads, static_argnums=1)(jnp.asarray(x), jnp.dtype(code))
    assert np.isnan(scale[2, 3, 0]) and np.isnan(scale).sum() == 1


@pytest.mark.parametrize("code", CODES)
def test_zeros_and_what_is_not_finite(code):
    x = np.ones((4, 8), np.float32)
    x[0], x[1, 3], x[2, 5], x[3, 2] = 0, np.nan, -np.inf, 3e38
    codes, scale = quantize_heads(jnp.asarray(x), code)
    back = np.asarray(dequantize(codes, scale, jnp.float32))
    assert np.isfinite(np.asarray(codes, np.float32)).all()
    assert (back[0] == 0).all() and np.isnan(back[1:3]).all() and np.isclose(back[3, 2], 3e38, rtol=1e-6)
    assert scale_bytes(code) == scale.dtype.itemsize and scale_bytes("bfloat16") == 0


def quantised_cache(lengths, B, N, K, H, S, M, T, code, seed=0):
    """(q in float64, pages of keys, of values, their scales, page_table); scales are NaN where no row's key lies."""
    rng = np.random.default_rng(seed)
    P = B * M + 2
    page_table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    live = np.zeros((P, S), bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            live[page_table[b, position // S], position % S] = True
    pages, scales = [], []
    for _ in range(2):
        codes, scale = quantize_heads(jnp.asarray(rng.normal(size=(P, S, K, H)), jnp.float32), code)
        pages.append(codes)
        scales.append(jnp.where(live[..., None], scale, jnp.nan).transpose(0, 2, 1))
    return rng.normal(size=(B, T, N, H)), *pages, *scales, page_table


def wide(codes, scale):
    return np.asarray(codes, np.float64) * np.asarray(scale, np.float64).transpose(0, 2, 1)[..., None]


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("block", ["decode", "block with padding"])
@pytest.mark.parametrize(("name", "code"), [*zip(FEATURES, itertools.cycle(CODES), strict=False)])
def test_equals_explicit_queries(impl, block, name, code):
    T, lengths, starts = BLOCKS[block]
    q, k, v, k_scale, v_scale, page_table = quantised_cache(lengths, 4, N=6, K=3, H=8, S=4, M=6, T=T, code=code)
    starts = [length - T for length in lengths] if starts is None else starts
    pages = wide(k, k_scale), wide(v, v_scale)
    expected = explicit(q, *pages, page_table, lengths, starts, scale=SCALE, **FEATURES[name])
    with jax.enable_x64(True):
        features = {key: jnp.asarray(value) if key == "sinks" else value for key, value in FEATURES[name].items()}
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        integers = jnp.asarray(page_table), jnp.asarray(lengths)
        starts = jnp.asarray(starts)
        actual = paged_attention(
            jnp.asarray(q), k, v, *integers, starts_B=starts, scale=SCALE, impl=impl, **scales, **features
        )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    S=st.sampled_from([1, 4]),
    starts=st.lists(st.integers(0, 16), min_size=3, max_size=3),
    counts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    T=st.sampled_from([1, 6]),
)
def test_write_pages_rounds_each_token_in_its_place(S, starts, counts, T):
    B, M, K, H, code = 3, 4, 2, 3, "int8"
    rng = np.random.default_rng(1)
    P = B * M + 1
    pages = rng.integers(-127, 127, size=(2, P, S, K, H)).astype(np.int8)
    scales = rng.normal(size=(2, P, K, S)).astype(np.float32)
    new = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
    page_table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    want, want_scales = pages.copy(), scales.copy()
    codes, new_scales = (np.asarray(part) for part in quantize_heads(jnp.asarray(new), code))
    for side, b, t in itertools.product(range(2), range(B), range(T)):
        position = starts[b] + t
        if t < counts[b] and position < M * S:
            place = page_table[b, position // S], position % S
            want[side][place], want_scales[side, place[0], :, place[1]] = codes[side, b, t], new_scales[side, b, t]
    write = jax.jit(lambda pages, scales, *rest: write_pages(*pages, *rest, k_scale=scales[0], v_scale=scales[1]))
    actual = write(pages, scales, *new, page_table, np.array(starts), np.array(counts))
    # A quotient may round to the other side where it is half a step from both.
    for got, expected in zip(actual[:2], want, strict=True):
        assert np.abs(np.asarray(got, np.int32) - expected).max() <= 1 and (np.asarray(got) != expected).mean() < 0.01
    for got, expected in zip(actual[2:], want_scales, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_one_token_of_one_row_is_written_without_a_scatter():
    pages, scales = jnp.zeros((3, 4, 2, 8), jnp.int8), jnp.ones((3, 2, 4))
    new = jnp.arange(1.0, 17.0).reshape(1, 1, 2, 8)
    integers = jnp.array([[2, 1]]), jnp.array([5])
    write = jax.jit(
        lambda count: write_pages(pages, pages, new, -new, *integers, count, k_scale=scales, v_scale=scales)
    )
    k, v, k_scale, v_scale = write(jnp.array([1]))
    np.testing.assert_allclose(dequantize(k, k_scale.transpose(0, 2, 1), jnp.float32)[1, 1], new[0, 0], atol=0.07)
    np.testing.assert_allclose(dequantize(v, v_scale.transpose(0, 2, 1), jnp.float32)[1, 1], -new[0, 0], atol=0.07)
    assert (np.asarray(k)[2] == 0).all() and (np.asarray(k_scale)[2] == 1).all()
    # One that takes no part goes to page 0.
    k, _, k_scale, _ = write(jnp.array([0]))
    assert (np.asarray(k)[1:] == 0).all() and (np.asarray(k_scale)[1:] == 1).all()
    assert "scatter" not in write.lower(jnp.array([1])).as_text()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("code", CODES)
def test_what_is_not_finite_shows_in_those_that_see_it(code, side):
    rng = np.random.default_rng(0)
    T, K, H, S = 4, 1, 8, 4
    new = rng.normal(size=(2, 1, T, K, H)).astype(np.float32)
    new[side, 0, 2, 0, 1] = np.inf
    pages, scales = jnp.zeros((3, S, K, H), code), jnp.zeros((3, K, S))
    out, *_, k_scale, v_scale = extend_pages(
        jnp.asarray(rng.normal(size=(1, T, 1, H)), jnp.float32),
        *map(jnp.asarray, new),
        pages,
        pages,
        jnp.array([[1, 2]]),
        jnp.array([0]),
        jnp.array([T]),
        scale=SCALE,
        k_scale=scales,
        v_scale=scales,
        impl="xla",
    )
    seen = np.isfinite(np.asarray(out)[0, :, 0]).all(-1)
    # A value is multiplied by its weight of 0 in the queries before it; model.attention moves it to the key.
    assert not seen[2:].any() and (side == 1 or seen[:2].all())
    assert np.isnan(np.asarray((k_scale, v_scale)[side])[1, 0, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_scale": None}, r"pages of int8 need k_scale, float32 \[P, K, S\] = \[3, 2, 4\]"),
        (
            {"v_scale": jnp.ones((3, 4, 2))},
            r"v_scale is float32\[3, 4, 2\] and needs float32 \[P, K, S\] = \[3, 2, 4\]",
        ),
        ({"v_scale": jnp.ones((3, 2, 4), jnp.bfloat16)}, r"v_scale is bfloat16\[3, 2, 4\] and needs float32"),
        ({"dtype": jnp.float32}, "k_scale is for pages of int8 or float8_e4m3fn, and these are float32; leave it out"),
        ({"dtype": jnp.bfloat16, "k_scale": None, "v_scale": None}, "need q's dtype, or int8 or float8_e4m3fn with k_"),
        ({"v_dtype": jnp.float8_e4m3fn}, "k_pages are int8 and v_pages float8_e4m3fn; both need one dtype"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change, message):
    given = {"dtype": jnp.int8, "k_scale": jnp.ones((3, 2, 4)), "v_scale": jnp.ones((3, 2, 4)), **change}
    q, k = jnp.zeros((2, 1, 4, 8)), jnp.zeros((3, 4, 2, 8), given["dtype"])
    v = k.astype(given.get("v_dtype", given["dtype"]))
    scales = {side: given[side] for side in ("k_scale", "v_scale")}
    with pytest.raises(ValueError, match=message):
        paged_attention(q, k, v, jnp.zeros((2, 2), jnp.int32), jnp.ones(2, jnp.int32), scale=1.0, impl="xla", **scales)
    if given["k_scale"] is not None or given["v_scale"] is not None:
        new, row = jnp.zeros((2, 1, 2, 8)), jnp.zeros(2, jnp.int32)
        with pytest.raises(ValueError, match=message):
            write_pages(k, v, new, new, jnp.zeros((2, 2), jnp.int32), row, row, **scales)


@pytest.fixture
def newer_jax(monkeypatch):
    """What is chosen does not depend on the JAX that the tests run with."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))


def test_the_kernel_is_taken(newer_jax):
    assert choose("pallas", H100, DECODE) == ("pallas", "asked for by name")
    assert choose("auto", H100, DECODE)[0] == "pallas"


@pytest.mark.parametrize(
    ("batch", "width", "parts"), [(1, 1024, 4), (1, 8192, 32), (1, 131072, 33), (8, 8192, 4), (32, 1024, 1), (1, 64, 1)]
)
def test_a_row_is_cut_into_as_many_parts_as_were_measured_fastest(batch, width, parts):
    case = dataclasses.replace(DECODE, batch=batch, width=width, num_heads=32, num_kv_heads=8)
    assert tiles.choose_tiles(case).num_parts == parts
    assert supports("xla", DECODE, H100) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "takes pages of int8 with queries of bfloat16, not float16"),
        ({"page_size": 16}, "takes pages of int8 with 32, 64 or 128 positions, not 16"),
        ({"head_dim": 96}, "takes a head width of 64, 128 or 256, not 96"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(newer_jax, change, reason):
    with pytest.raises(ValueError, match=reason):
        choose("pallas", H100, dataclasses.replace(DECODE, **change))


@pytest.mark.parametrize(
    ("change", "few"),
    [
        ({}, True),
        ({"num_tokens": 8}, True),
        ({"num_tokens": 9}, False),
        ({"num_tokens": 2, "page_size": 128}, True),
        ({"num_tokens": 3, "page_size": 128}, False),
        ({"head_dim": 256}, True),
        ({"head_dim": 256, "page_size": 128}, False),
    ],
)
def test_how_many_queries_the_registers_hold_beside_codes(change, few):
    assert tiles.few_queries(dataclasses.replace(DECODE, **change)) == few


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_fit_the_chip(newer_jax, head_dim, page_size):
    for batch, heads, num_tokens, pages in itertools.product((1, 7, 300), ((1, 1), (8, 8), (64, 8)), (1, 4), (1, 2000)):
        case = PagedAttentionCase(
            "bfloat16", batch, num_tokens, *heads, head_dim, page_size, pages * page_size, kv_dtype="int8"
        )
        assert supports("pallas", case, H100) is None
        if not tiles.few_queries(case):
            continue
        chosen = tiles.choose_tiles(case)
        assert chosen.pages_per_block * page_size % 64 == 0 and chosen.num_buffers >= 2
        assert tiles.shared_bytes(case, chosen.num_buffers) <= SHARED_BYTES


def unpacked(text: str, selection: int, word: int) -> list[float]:
    """What `narrow`'s inline code makes of a word, by an interpreter of the few instructions in it."""
    registers = {"$1": word, "$2": selection}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(number: int) -> np.ndarray:
        return np.array([number & 0xFFFF, number >> 16], np.uint16).view(ml_dtypes.bfloat16)

    for line in filter(None, map(str.strip, text.split(";"))):
        name, rest = line.split(maxsplit=1)
        to, *sources = re.split(r",\s*", rest)
        a, *more = map(value, sources)
        match name, more:
            case "prmt.b32", (b, selector):
                whole = (a | b << 32).to_bytes(8, "little")
                result = int.from_bytes(bytes(whole[selector >> 4 * i & 7] for i in range(4)), "little")
            case "and.b32", (b,):
                result = a & b
            case "shl.b32", (b,):
                result = a << b & 0xFFFFFFFF
            case "shr.u32", (b,):
                result = a >> b
            case "lop3.b32", (b, c, table):
                assert table == (0xF0 & 0xCC) | 0xAA
                result = a & b | c
            case "mov.b32", ():
                result = a
            case (("sub.bf16x2" | "mul.bf16x2"), (b,)):
                left, right = halves(a), halves(b)
                low, high = (left - right if name.startswith("sub") else left * right).view(np.uint16).tolist()
                result = low | high << 16
            case _:
                raise AssertionError(f"unknown instruction {line}")
        registers[to] = result
    return halves(registers["$0"]).astype(np.float64).tolist()


@pytest.mark.parametrize("code", CODES)
def test_every_code_comes_apart_exactly(code):
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the kernel needs JAX 0.11, and this is JAX {jax.__version__}")
    from kernels.paged_attention import narrow

    text, selections = narrow._CODE[code]
    # Every code in each of the four places, beside others.
    numbers = np.arange(256)
    table = numbers.astype(np.uint8).view(code).astype(np.float64)
    finite = numbers[np.isfinite(table)].tolist()
    for place, number in itertools.product(range(4), finite):
        word = [finite[(number * 7 + 3 * i) % len(finite)] for i in range(4)]
        word[place] = number
        even, odd = (unpacked(text, selection, int.from_bytes(bytes(word), "little")) for selection in selections)
        assert [even[0], odd[0], even[1], odd[1]] == table[word].tolist()
