"""Attention over pages of 8 bits: the Hopper kernel interpreted or on a GPU, and the write that quantises."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.paged_attention import extend_pages, write_pages
from kernels.paged_attention.quantize import quantize_heads
from kernels.paged_attention.tiles import Tiles
from kernels.target import Target
from tests.kernels.interpreter import plain_products
from tests.kernels.test_paged_attention import explicit

H100 = Target("gpu", (9, 0))
SCALE = 0.3
SINKS = np.array([0.5, -1.0, 2.0, 0.0])


@pytest.fixture
def decode(monkeypatch, execution):
    """The kernel's module, as the interpreter can run it."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from kernels.paged_attention import gpu_quantized, narrow

    def load(smem):
        codes = smem[...].astype(jnp.bfloat16)
        return codes[:, 0::2], codes[:, 1::2]

    def load_transposed(smem):
        halves = tuple(half.T for half in load(smem))
        return halves if smem.shape[1] > 64 else (jnp.concatenate(halves),)

    def products(parts, b_smem):
        b = b_smem[...].astype(jnp.float32)
        # The interpreter asks it between a read into registers and the next copy to that place.
        plgpu.commit_smem()
        return tuple(part.astype(jnp.float32) @ b for part in parts)

    def scores_of(even, odd, b_smem):
        b = b_smem[...].astype(jnp.float32)
        half = b.shape[0] // 2
        return even.astype(jnp.float32) @ b[:half] + odd.astype(jnp.float32) @ b[half:]

    plain = {"load": load, "load_transposed": load_transposed, "products": products, "scores_of": scores_of}
    execution.put_plainly(monkeypatch, narrow, **plain)
    return gpu_quantized


def cache(lengths, N, K, H, S, M, T, dtype, seed=0):
    """(q, codes and scales of keys, of values, page_table); scales are NaN wherever no row's key lies, pages in no
    order."""
    rng = np.random.default_rng(seed)
    B, P = len(lengths), len(lengths) * M + 2
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16)
    page_table = rng.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    live = np.zeros((P, S), bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            live[page_table[b, position // S], position % S] = True
    sides = []
    for _ in range(2):
        # Sizes differ by position and head, as scales must.
        values = rng.normal(size=(P, S, K, H)) * np.exp(rng.normal(size=(P, S, K, 1)))
        codes, scale = quantize_heads(jnp.asarray(values, jnp.float32), dtype)
        scale = jnp.where(live[..., None], scale, jnp.nan)
        sides.append((codes, scale.transpose(0, 2, 1)))
    return q, *sides, page_table


def wide(codes, scale):
    """float64 values of pages."""
    return np.asarray(codes, np.float64) * np.asarray(scale, np.float64).transpose(0, 2, 1)[..., None]


def computed(execution, decode, q, keys, values, page_table, lengths, starts, tiles, new=None, **features):
    integers = [jnp.asarray(x, jnp.int32) for x in (page_table, lengths, starts)]
    if "sinks" in features:
        features["sinks"] = jnp.asarray(features["sinks"], jnp.float32)
    return execution.kernel(
        decode.paged_attention,
        q,
        keys[0],
        values[0],
        *integers,
        k_scale=keys[1],
        v_scale=values[1],
        **{"scale": SCALE, "window": None, "soft_cap": None, "sinks": None, **features},
        tiles=tiles,
        new=new,
    )


# One case for each way through the kernel; an interpreted one takes seconds.
KERNEL_CASES = {
    "decode, ragged": dict(lengths=[70, 0, 300], M=5, tiles=Tiles(1, 2, 1)),
    "parts, some empty": dict(lengths=[130, 5], M=3, tiles=Tiles(1, 2, 3), dtype="float8_e4m3fn"),
    "verification, window": dict(lengths=[150, 40], M=3, T=3, starts=[147, 38], window=50, N=4, K=2),
    "soft cap, sinks": dict(lengths=[90], M=2, soft_cap=1.5, sinks=3 * SINKS, N=4, K=2, T=2, dtype="float8_e4m3fn"),
    "small pages, narrow heads, window, parts": dict(lengths=[150], M=5, S=32, H=64, window=100, tiles=Tiles(2, 3, 2)),
    "wide heads": dict(lengths=[70], M=1, S=128, H=256, N=2, T=9),
}


SLOW = ("verification, window", "wide heads")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in KERNEL_CASES]
)
def test_kernel_equals_explicit_queries(execution, decode, name):
    case = {"S": 64, "T": 1, "N": 3, "K": 1, "H": 128, "dtype": "int8", "tiles": Tiles(1, 2, 1), **KERNEL_CASES[name]}
    lengths, T, tiles = case.pop("lengths"), case["T"], case.pop("tiles")
    starts = case.pop("starts", [length - T for length in lengths])
    shape = {key: case.pop(key) for key in ("N", "K", "H", "S", "M", "T", "dtype")}
    q, keys, values, page_table = cache(lengths, **shape)
    arrays = np.asarray(q, np.float64), wide(*keys), wide(*values)
    expected = explicit(*arrays, page_table, lengths, starts, scale=SCALE, **case)
    actual = computed(execution, decode, q, keys, values, page_table, lengths, starts, tiles, **case)
    assert actual.dtype == q.dtype and np.abs(expected).max() > 0.1
    # Weights times scales, and outputs, are rounded to bfloat16, once each.
    size = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, atol=3 * size * float(jnp.finfo("bfloat16").eps)
    )


WRITE_CASES = {
    # The last token of a page, the first, which sees itself alone, one past the table (in its last block too), and two
    # rows that take no part.
    "ragged": dict(lengths=[64, 1, 129, 70, 0], counts=[1, 1, 1, 0, 0], M=2, H=64),
    "parts, small pages, window": dict(
        lengths=[150, 2, 166], counts=[1, 1, 1], M=5, S=32, window=100, tiles=Tiles(2, 3, 2), dtype="float8_e4m3fn"
    ),
}


@pytest.mark.parametrize("name", WRITE_CASES)
def test_kernel_writes_the_new_token_and_attends_to_it(execution, decode, name):
    case = {"S": 64, "N": 3, "K": 1, "H": 128, "dtype": "int8", "tiles": Tiles(1, 2, 1), **WRITE_CASES[name]}
    lengths, counts, tiles = np.array(case.pop("lengths")), np.array(case.pop("counts")), case.pop("tiles")
    shape = {key: case.pop(key) for key in ("N", "K", "H", "S", "M", "dtype")}
    width = shape["S"] * shape["M"]
    held = np.minimum(lengths - counts, width)
    q, keys, values, page_table = cache(held, **shape, T=1)
    new = np.random.default_rng(1).normal(size=(2, len(lengths), 1, shape["K"], shape["H"]))
    new = tuple(jnp.asarray(x, jnp.bfloat16) for x in new)
    scales = {"k_scale": keys[1], "v_scale": values[1]}
    pages = write_pages(keys[0], values[0], *new, page_table, lengths - counts, counts, **scales)
    within = lengths <= width
    arrays = np.asarray(q, np.float64), wide(pages[0], pages[2]), wide(pages[1], pages[3])
    expected = explicit(*arrays, page_table, lengths * within, lengths - counts, scale=SCALE, **case)
    starts = lengths - counts
    operands = (q, keys, values, page_table, lengths, starts, tiles, new)
    out, *written = computed(execution, decode, *operands, **case)
    error = np.abs(np.asarray(out, np.float64) - expected)[within]
    assert error.max() <= 3 * max(1.0, np.abs(expected).max()) * float(jnp.finfo("bfloat16").eps)
    for actual, want in zip(written, pages, strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(want, np.float32))


WIDEN_CASES = {
    # Two tiles of one row, then a row of its own, then one without keys.
    "rows that share pages": dict(lengths=[100, 100, 70, 0], tables=[0, 0, 2, 3], dtype="int8", S=64, M=2),
    "small pages": dict(lengths=[90], tables=[0], dtype="float8_e4m3fn", S=32, M=4),
}


@pytest.mark.parametrize("name", WIDEN_CASES)
def test_live_pages_are_widened_once(execution, decode, name):
    """`decode` puts plain parts in the kernel's place too."""
    from kernels.paged_attention import narrow, widen

    case = dict(WIDEN_CASES[name])
    lengths, rows = np.array(case.pop("lengths")), case.pop("tables")
    q, keys, values, page_table = cache(lengths, N=2, K=2, H=128, T=1, **case)
    page_table = page_table[rows]
    operands = (q, keys[0], values[0], page_table, lengths, keys[1], values[1])
    # Pages past a row's length hold anything.
    wide_q, *pages, table = execution.run(widen.widened_pages, *operands, interpret=execution.interpret(races=False))
    np.testing.assert_array_equal(narrow.join(wide_q), q)
    np.testing.assert_array_equal(narrow.join(narrow.split(q)), q)
    S, M = case["S"], case["M"]
    np.testing.assert_array_equal(table // M, np.broadcast_to(np.array(rows)[:, None], table.shape))
    for side, made in zip((keys, values), pages, strict=True):
        want = wide(*side)[page_table]
        # Widened by JAX: of what lies past a length NumPy warns, where it is no number.
        got = np.asarray(narrow.join(made).astype(jnp.float32))[np.asarray(table)]
        for b, length in enumerate(lengths):
            flat = [x[b].reshape(M * S, 2, 128)[:length] for x in (got, want)]
            np.testing.assert_allclose(*flat, rtol=2**-8)


@pytest.mark.parametrize("T", [1, 33])
def test_the_op_takes_the_kernels_by_name(execution, decode, monkeypatch, T):
    from kernels.paged_attention import gpu_quantized, prefill, widen

    plain_products(monkeypatch, execution)
    called = []

    def interpreting(module, name):
        run = getattr(module, name)

        def call(*args, **kwargs):
            called.append(name)
            return run(*args, **kwargs, interpret=execution.interpret(races=False))

        monkeypatch.setattr(module, name, call)

    for module, name in ((gpu_quantized, "paged_attention"), (prefill, "paged_attention"), (widen, "widened_pages")):
        interpreting(module, name)
    starts, counts = np.array([70, 0]), np.array([T, 1])
    q, keys, values, page_table = cache(starts, N=2, K=1, H=128, S=64, M=2, T=T, dtype="int8")
    new = (jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(1).normal(size=(2, 2, T, 1, 128)))
    operands = (q, *new, keys[0], values[0], page_table, starts, counts)
    settings = {"scale": SCALE, "impl": "pallas", "target": H100}
    out, *pages = execution.run(extend_pages, *operands, **settings, k_scale=keys[1], v_scale=values[1])
    arrays = np.asarray(q, np.float64), wide(pages[0], pages[2]), wide(pages[1], pages[3])
    expected = explicit(*arrays, page_table, starts + counts, starts, scale=SCALE)
    assert called == (["paged_attention"] if T == 1 else ["widened_pages", "paged_attention"])
    # Widened keys and values are rounded to bfloat16 once more.
    tolerance = (3 if T == 1 else 8) * max(1.0, np.abs(expected).max()) * float(jnp.finfo("bfloat16").eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)
