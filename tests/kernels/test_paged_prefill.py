"""Attention of many queries over pages: the Hopper kernel interpreted or on a GPU, and what it is chosen for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.paged_attention import PagedAttentionCase, case_of, choose, supports, tiles
from kernels.paged_attention.tiles import PrefillTiles, choose_prefill_tiles
from kernels.target import Target
from tests.kernels.interpreter import plain_products

H100 = Target("gpu", (9, 0))
PREFILL = PagedAttentionCase("bfloat16", 16, 128, 32, 8, 128, 64, 8192)


def cache(lengths, N, K, H, S, M, T):
    """(q, k_pages, v_pages, page_table) in float64, with NaN wherever no row's key lies; pages are in no order."""
    rng = np.random.default_rng(0)
    B, P = len(lengths), len(lengths) * M + 2
    q = rng.normal(size=(B, T, N, H))
    pages = rng.normal(size=(2, P, S, K, H))
    page_table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    live = np.zeros((P, S), bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            live[page_table[b, position // S], position % S] = True
    pages[:, ~live] = np.nan
    return q, *pages, page_table


def explicit(q, k_pages, v_pages, page_table, lengths, starts, *, scale, window=None, soft_cap=None, sinks=None):
    """The definition in float64, a row and a head at a time."""
    out = np.zeros(q.shape)
    _, T, N, _ = q.shape
    K = k_pages.shape[2]
    for b, n in itertools.product(range(len(q)), range(N)):
        laid_out = [pages[page_table[b], :, n * K // N].reshape(-1, q.shape[3]) for pages in (k_pages, v_pages)]
        k, v = (pages[: lengths[b]] for pages in laid_out)
        scores = scale * q[b, :, n] @ k.T
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        behind = starts[b] + np.arange(T)[:, None] - np.arange(lengths[b])
        seen = (behind >= 0) & (behind < (np.inf if window is None else window))
        terms = np.where(seen, np.exp(scores), 0)
        total = terms.sum(1, keepdims=True) + (0 if sinks is None else np.exp(sinks[n]))
        out[b, :, n] = terms @ v / np.where(total == 0, 1, total)
    return out


@pytest.fixture
def prefill(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it."""
    plain_products(monkeypatch, execution)
    from kernels.paged_attention import prefill

    return prefill


def computed(execution, prefill, arrays, lengths, starts, dtype, chosen=None, **features):
    floats = [jnp.asarray(x, dtype) for x in arrays[:3]]
    integers = [jnp.asarray(x, jnp.int32) for x in (arrays[3], lengths, starts)]
    out = execution.kernel(
        prefill.paged_attention,
        *floats,
        *integers,
        **{"window": None, "soft_cap": None, "sinks": None, **features},
        tiles=choose_prefill_tiles(case_of(floats[0], floats[1], integers[0])) if chosen is None else chosen,
    )
    assert not np.isnan(out).any()
    return out


SINKS = np.array([1.5, -3.0, 6.0])
# One case for each way through the kernel; an interpreted one takes seconds.
CASES = {
    "whole blocks of rows, with padding": dict(T=128, N=4, K=2, lengths=[130, 200], starts=[2, 100], M=4),
    "queries of a kv head side by side, ragged": dict(T=35, lengths=[150, 0, 300], M=5),
    "more items than processors": dict(T=130, lengths=[190, 0, 260], M=5, processors=2),
    "parts, window, soft cap, sinks": dict(
        T=40, N=3, lengths=[400], M=7, window=100, soft_cap=2.0, sinks=SINKS, chosen=PrefillTiles(128, 3, 2, 2)
    ),
    "empty parts, sinks, no query heads to share": dict(
        T=66, N=1, lengths=[70, 0], M=2, sinks=SINKS[:1], chosen=PrefillTiles(128, 2, 2, 2)
    ),
    "small pages, window": dict(
        T=70, lengths=[500], M=32, S=16, window=200, dtype="float16", chosen=PrefillTiles(64, 2, 1, 1)
    ),
    "pages larger than blocks, negative scale": dict(
        T=66, lengths=[200], M=2, S=128, H=128, scale=-0.2, chosen=PrefillTiles(64, 2, 1, 1)
    ),
    "wide heads, window": dict(T=65, lengths=[200], M=4, H=256, window=90, scale=0.1, processors=1),
}


@pytest.mark.parametrize("name", CASES)
def test_prefill_equals_the_definition(execution, prefill, monkeypatch, name):
    case = {"S": 64, "N": 2, "K": 1, "H": 64, "dtype": "bfloat16", "scale": 0.3, **CASES[name]}
    monkeypatch.setattr(prefill, "NUM_PROCESSORS", case.pop("processors", 132))
    lengths, T, dtype = case.pop("lengths"), case["T"], case.pop("dtype")
    starts = case.pop("starts", [length - T for length in lengths])
    arrays = cache(lengths, **{key: case.pop(key) for key in ("N", "K", "H", "S", "M", "T")})
    rounded = [np.asarray(jnp.asarray(x, dtype)).astype(np.float64) for x in arrays[:3]]
    expected = explicit(*rounded, arrays[3], lengths, starts, **{k: v for k, v in case.items() if k != "chosen"})
    if "sinks" in case:
        case["sinks"] = jnp.asarray(case["sinks"], jnp.float32)
    actual = computed(execution, prefill, arrays, lengths, starts, dtype, **case)
    assert actual.dtype == dtype and np.abs(expected).max() > 0.1
    # Weights and outputs are rounded to the dtype, once each.
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), expected, atol=3 * float(jnp.finfo(dtype).eps))


@pytest.fixture
def newer_jax(monkeypatch):
    """What is chosen does not depend on the JAX that the tests run with."""
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_prefill_tiles_fit_the_chip(newer_jax, head_dim, page_size):
    for batch, heads, num_tokens, pages in itertools.product(
        (1, 2, 7, 40), ((1, 1), (8, 8), (32, 8), (64, 8)), (2, 17, 128, 256), (1, 3, 100, 2000)
    ):
        case = PagedAttentionCase("bfloat16", batch, num_tokens, *heads, head_dim, page_size, pages * page_size)
        assert supports("pallas", case, H100) is None
        chosen = choose_prefill_tiles(case)
        buffers = 2 * 2 * chosen.num_buffers * chosen.block * head_dim
        assert buffers + 2 * 128 * chosen.num_queries * head_dim + 2048 < 232448
        # What is copied at once divides both the block and the page.
        assert chosen.block % 64 == 0 and chosen.num_buffers >= 2
        assert max(chosen.block, page_size) % min(chosen.block, page_size) == 0
        assert chosen.num_parts == 1 or case.width // chosen.num_parts >= 1024


def test_parts_of_measured_shapes():
    def parts(batch, width):
        return choose_prefill_tiles(dataclasses.replace(PREFILL, batch=batch, width=width)).num_parts

    assert [parts(*shape) for shape in ((1, 512), (1, 2048), (1, 8192), (4, 8192), (16, 512))] == [1, 2, 4, 1, 1]


@pytest.mark.parametrize(
    ("change", "few"),
    [
        ({"num_tokens": 1}, True),
        ({"num_tokens": 16}, True),
        ({"num_tokens": 17}, False),
        ({"num_tokens": 9, "page_size": 128}, False),
        ({"num_tokens": 9, "head_dim": 256}, False),
        ({"num_tokens": 1, "head_dim": 256, "page_size": 128}, False),
        ({}, False),
    ],
)
def test_which_kernel_takes_the_queries(newer_jax, monkeypatch, change, few):
    from kernels import paged_attention as op

    case = dataclasses.replace(PREFILL, batch=1, width=256, **change)
    assert choose("auto", H100, case)[0] == "pallas" and tiles.few_queries(case) == few
    if jax.__version_info__ < (0, 11):
        return
    from kernels.paged_attention import gpu, prefill

    called = []
    for module in (gpu, prefill):
        monkeypatch.setattr(
            module, "paged_attention", lambda *args, tiles, module=module, **kwargs: called.append(module)
        )
    q = jnp.zeros((1, case.num_tokens, case.num_heads, case.head_dim), case.dtype)
    pages = jnp.zeros((2, case.page_size, case.num_kv_heads, case.head_dim), case.dtype)
    table = jnp.zeros((1, case.width // case.page_size), jnp.int32)
    op.paged_attention(q, pages, pages, table, jnp.ones(1, jnp.int32), scale=1.0, impl="pallas", target=H100)
    assert called == [gpu if few else prefill]
