"""Attention on TPU: both passes in Pallas's interpreter, the table of steps, tiles, and TPU's own compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.attention import AttentionCase, attention, choose, reference, supports, tpu, tpu_backward, tpu_steps, xla
from kernels.attention.masks import Marks, Masks
from kernels.attention.tpu_steps import steps_of
from kernels.attention.tpu_tiles import (
    SMEM_BYTES,
    VMEM_BYTES,
    AllTiles,
    Shape,
    Tiles,
    choose_tiles,
    d_keys_bytes,
    d_queries_bytes,
    forward_bytes,
    shape_of,
    table_bytes,
)
from kernels.target import Target
from tests.host import OPTIMIZED
from tests.kernels.absent_tpu import SLICES, compiled_for, needs_libtpu

TPU = Target("tpu")
NEEDS = (forward_bytes, d_queries_bytes, d_keys_bytes)
MARKS = ("q_segments", "kv_segments", "q_positions", "kv_positions")
DEFAULTS = {"causal": True, "window": None, "soft_cap": None, **dict.fromkeys(MARKS)}


def arrays(T=200, S=None, N=2, K=1, H=16, V=None, B=1, dtype=jnp.float32, sinks=False, seed=0):
    """(q, k, v, sinks or None)"""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, V or H)
    drawn = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *drawn, jnp.asarray(rng.normal(size=N), jnp.float32) if sinks else None


def passes(attend, q, k, v, sinks, *, compiler_options=None, **arguments):
    """(out, lse, dq, dk, dv[, dsinks]) for random cotangents of out and of every finite lse."""
    arguments = {"scale": 0.3, **DEFAULTS, **arguments}
    rng = np.random.default_rng(7)
    out_weights = rng.normal(size=(*q.shape[:3], v.shape[3]))
    lse_weights = rng.normal(size=q.shape[:3])

    def loss(q, k, v, sinks):
        out, lse = attend(q, k, v, sinks=sinks, **arguments)
        finite = jnp.where(lse > -jnp.inf, lse, 0) * lse_weights.astype(lse.dtype)
        return jnp.sum(out.astype(lse.dtype) * out_weights.astype(q.dtype).astype(lse.dtype)) + finite.sum(), (out, lse)

    used = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    differentiate = jax.jit(jax.grad(loss, argnums=used, has_aux=True), compiler_options=compiler_options)
    gradients, results = differentiate(q, k, v, sinks)
    return *results, *gradients


def kernels(queries=128, keys=128, heads=1):
    """The kernels in the interpreter, with the same tiles in each."""
    tiles = AllTiles(*[Tiles(queries, keys, heads)] * 3)
    return functools.partial(tpu.attention, tiles=tiles, interpret=True)


def exactly(q, k, v, sinks, **arguments):
    """`passes` of the reference in float64."""
    with jax.enable_x64(True):
        wide = (None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, sinks))
        return [np.asarray(x) for x in passes(reference.attention, *wide, **arguments)]


def errors(actual, exact):
    """Relative error of each array; where one is infinite, so must the other be."""
    found = []
    for a, b in zip(actual, exact, strict=True):
        a = np.asarray(a, np.float64)
        assert not np.isnan(a).any() and (np.isinf(a) == np.isinf(b)).all() and np.isinf(b).sum() < b.size
        finite = np.isfinite(b)
        found.append(np.linalg.norm(a[finite] - b[finite]) / np.linalg.norm(b[finite]))
    return found


def segments(lengths):
    """int32 [1, sum]: each number as often as said."""
    return jnp.asarray(np.concatenate([np.full(n, number, np.int32) for number, n in lengths])[None])


DOCUMENTS = jnp.concatenate([segments([(1, 60), (2, 100), (0, 40)]), segments([(0, 140), (3, 60)])])
FEATURES = {
    "causal": ({}, {}),
    # Whole tiles: XLA's products on a CPU are less exact there than at 200 (1.45e-7, 0.84e-7), its own as ours.
    "full, wide values": ({"causal": False}, {"T": 256, "H": 64, "V": 80, "N": 4, "K": 2}),
    "window": ({"window": 70}, {"H": 96, "S": 333}),
    "everything": (
        {"window": 90, "soft_cap": 2.0, "q_segments": DOCUMENTS, "kv_segments": DOCUMENTS},
        {"sinks": True, "H": 192, "V": 128, "B": 2},
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype", "heads"),
    [
        ("causal", jnp.bfloat16, 2),
        ("window", jnp.bfloat16, 1),
        ("everything", jnp.bfloat16, 1),
        ("full, wide values", jnp.float32, 1),
        ("everything", jnp.float32, 1),
    ],
)
def test_error_is_at_most_half_above_that_of_xla(name, dtype, heads):
    arguments, shapes = FEATURES[name]
    given = arrays(**shapes, dtype=dtype)
    # Some roundings of float32 are what is compared, and the compiler decides where: it compiles as users have it.
    compiled = functools.partial(passes, compiler_options=OPTIMIZED if dtype == jnp.float32 else None)
    actual = compiled(kernels(heads=heads), *given, **arguments)
    assert actual[0].dtype == actual[2].dtype == actual[4].dtype == dtype and actual[1].dtype == jnp.float32
    exact = exactly(*given, **arguments)
    allowed = errors(compiled(xla.attention, *given, **arguments), exact)
    for name, ours, theirs in zip(
        ("out", "lse", "dq", "dk", "dv", "dsinks"), errors(actual, exact), allowed, strict=False
    ):
        assert ours <= 1.5 * theirs, f"{name}: {ours} against {theirs}"


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    heads=st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 1, 3), (4, 2, 2)]),
    tiles=st.sampled_from([(128, 128), (128, 256), (256, 128)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    soft_cap=st.none() | st.just(3.0),
    marks=st.tuples(st.booleans(), st.booleans()),
    sinks=st.booleans(),
    seed=st.integers(0, 9),
)
@example((300, 20), (4, 2, 1), (128, 128), True, 3, None, (False, False), False, 0)  # later tiles see no key at all
def test_any_mask(lengths, heads, tiles, causal, window, soft_cap, marks, sinks, seed):
    rng = np.random.default_rng(seed)
    arguments = {"causal": causal, "window": window, "soft_cap": soft_cap}
    for chosen, names, highest in zip(marks, (MARKS[:2], MARKS[2:]), (4, 400), strict=True):
        if chosen:
            # Sorted: whole blocks then differ, and some steps are skipped.
            numbers = [np.sort(rng.integers(0, highest, (2, n)), axis=1).astype(np.int32) for n in lengths]
            arguments |= dict(zip(names, map(jnp.asarray, numbers), strict=True))
    given = arrays(*lengths, N=heads[0], K=heads[1], H=8, V=16, B=2, sinks=sinks, seed=seed)
    actual = passes(kernels(*tiles, heads[2]), *given, **arguments)
    exact = exactly(*given, **arguments)
    for a, b in zip(actual, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b[np.isfinite(b)]).max(initial=0)))


@pytest.mark.parametrize("sinks", [False, True])
def test_blind_queries_give_zeros_and_no_gradient(sinks):
    given = arrays(T=300, sinks=sinks)
    numbers = segments([(0, 150), (1, 20), (0, 130)])
    out, lse, dq, dk, dv, *_ = passes(kernels(), *given, q_segments=numbers, kv_segments=numbers)
    blind = np.asarray(numbers) == 0
    expected = np.broadcast_to(given[3] if sinks else -np.inf, lse[blind].shape)
    np.testing.assert_allclose(lse[blind], expected, rtol=1e-6)
    for array in (out, dq, dk, dv):
        assert (np.asarray(array)[blind] == 0).all()
        assert np.isfinite(array).all() and np.abs(array).max() > 0


def test_under_scan_and_remat():
    q, k, v, _ = arrays(T=130)

    def layers(attend, x):
        body = jax.checkpoint(lambda x, _: (attend(x, k, v, scale=0.3, sinks=None, **DEFAULTS)[0], None))
        return jnp.sum(jax.lax.scan(body, x, None, length=2)[0] ** 2)

    ours, theirs = (jax.jit(jax.grad(functools.partial(layers, f)))(q) for f in (kernels(), reference.attention))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    tiles=st.sampled_from([(8, 8), (8, 16), (16, 8)]),
    outer=st.sampled_from(["queries", "keys"]),
    causal=st.booleans(),
    window=st.sampled_from([None, 5, 40]),
    marks=st.tuples(st.booleans(), st.booleans()),
    spread=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_steps_cover_what_is_seen(lengths, tiles, outer, causal, window, marks, spread, seed):
    """Every pair with something to see is computed once, without a mask only if all of it is seen."""
    (T, S), (queries, keys) = lengths, tiles
    rng, (segmented, positioned) = np.random.default_rng(seed), marks
    numbers = [np.sort(rng.integers(0, spread, (2, n)), axis=1).astype(np.int32) for n in (T, S, T, S)]
    data = Marks(*(jnp.asarray(x) if on else None for x, on in zip(numbers, np.repeat(marks, 2), strict=True)))
    masks = Masks(T, S, causal, window, segmented, positioned and (causal or window is not None))
    steps = jax.jit(functools.partial(steps_of, masks, queries, keys, outer))(data)
    seen = np.asarray(jax.jit(lambda data: reference.visible(2, T, S, causal, window, *data))(data))
    outers = np.asarray(steps.outer)
    assert (np.diff(outers) >= 0).all() and set(outers) == set(
        range(-(-(T if outer == "queries" else S) // tiles[outer == "keys"]))
    )
    assert steps.number <= tpu_steps.count(masks, queries, keys)
    for row in range(2):
        codes = np.asarray(steps.codes).reshape(-1, steps.number)[row if masks.by_data else 0]
        kinds, inners = tpu_steps.kind(codes), tpu_steps.inner(codes)
        starts = np.concatenate([[True], np.diff(outers) > 0])
        assert (tpu_steps.is_first(codes) == starts).all() and (tpu_steps.is_last(codes) == np.roll(starts, -1)).all()
        # A skipped step reads what is there already.
        assert (inners[1:] == inners[:-1])[kinds[1:] == tpu_steps.SKIPPED].all()
        computed = np.zeros((-(-T // queries), -(-S // keys)), int)
        for a, b, kind in zip(outers, inners, kinds, strict=True):
            tile, block = (a, b) if outer == "queries" else (b, a)
            piece = seen[row, tile * queries : (tile + 1) * queries, block * keys : (block + 1) * keys]
            computed[tile, block] += kind != tpu_steps.SKIPPED
            assert kind != tpu_steps.FULL or (piece.all() and piece.shape[1] == keys)
        needed = [
            [seen[row, i : i + queries, j : j + keys].any() for j in range(0, S, keys)] for i in range(0, T, queries)
        ]
        assert (computed <= 1).all() and (computed >= needed).all()
        if not masks.by_data:
            assert (computed == needed).all()


def test_packed_documents_and_the_future_are_skipped():
    numbers = segments([(1, 256), (2, 256), (3, 512)])
    masks = Masks(1024, 1024, True, None, True, False)
    kinds = tpu_steps.kind(np.asarray(steps_of(masks, 128, 128, "keys", Marks(numbers, numbers, None, None)).codes))
    assert len(kinds) == 8 * 9 // 2
    # Two documents of 2 blocks, one of 4: below their diagonals all is seen.
    assert (kinds == tpu_steps.FULL).sum() == 1 + 1 + 6 and (kinds == tpu_steps.MASKED).sum() == 8


PLAIN = AttentionCase("bfloat16", 8192, 8192, 32, 8, 128, 128)


def test_named_on_tpu_and_never_chosen():
    assert choose("pallas", PLAIN, TPU)[0] == "pallas"
    assert choose("auto", PLAIN, TPU) == ("xla", "pallas has been compiled for TPU, and not measured there")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "not float16"),
        ({"key_dim": 84}, "84/128"),
        ({"key_dim": 512}, "at most 256"),
        ({"kv_length": 0, "causal": False}, "8192 and 0"),
        ({"query_length": 2**20, "kv_length": 2**20}, "scalar memory"),
    ],
)
def test_refuses_what_it_cannot_do(changes, words):
    case = AttentionCase(**{**vars(PLAIN), **changes})
    assert words in supports("pallas", case, TPU)
    with pytest.raises(ValueError, match="'pallas' can't run"):
        choose("pallas", case, TPU)


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tiles(2048, 2048, 4), r"Tiles\(queries=2048, keys=2048, heads=4\).* needs .* MiB of vector memory"),
        (Tiles(128, 100, 1), "multiples of 128"),
        (Tiles(128, 128, 3), "heads must divide the 4"),
    ],
)
@pytest.mark.parametrize("name", ["forward", "d_queries", "d_keys"])
def test_tiles_without_room_are_named(name, tile, words):
    given = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 4096, 4, 64), *[(1, 4096, 1, 64)] * 2))
    tiles = AllTiles(**{**vars(AllTiles(*[Tiles(128, 128, 1)] * 3)), name: tile})
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda *a: tpu.attention(*a, sinks=None, scale=1, tiles=tiles, **DEFAULTS), *given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("share", [1, 3, 4, 5, 8])
def test_chosen_tiles_fit(dtype, widths, share):
    for length in (1, 130, 640, 8192, 65536):
        shape = shape_of(AttentionCase(dtype, length, length, 2 * share, 2, *widths))
        tiles = choose_tiles(shape)
        for tile, need in zip((tiles.forward, tiles.d_queries, tiles.d_keys), NEEDS, strict=True):
            assert need(shape, tile) <= VMEM_BYTES and table_bytes(shape, tile) <= SMEM_BYTES
            # What fills up the last tile is at most a quarter, or less than 128 rows.
            assert -length % tile.queries <= max(127, length / 4)


def compiled(chip, *, T, H, dtype=jnp.bfloat16, V=None, N=2, marks=(), sinks=False, attend=None, **arguments):
    """Both passes."""
    struct = jax.ShapeDtypeStruct
    shapes = [struct((1, T, N, H), dtype), struct((1, T, 1, H), dtype), struct((1, T, 1, V or H), dtype)]
    data = {name: struct((1, T), jnp.int32) for name in marks}
    attend = attend or functools.partial(attention, impl="pallas", target=TPU, return_lse=True)

    def both(q, k, v, sinks, data):
        def loss(q, k, v, sinks):
            out, lse = attend(q, k, v, sinks=sinks, scale=0.1, **data, **arguments)
            return jnp.sum(out.astype(jnp.float32) ** 2) + lse.sum(), out

        return jax.grad(loss, argnums=(0, 1, 2, 3) if sinks is not None else (0, 1, 2), has_aux=True)(q, k, v, sinks)

    return compiled_for(chip, both, *shapes, struct((N,), jnp.float32) if sinks else None, data)


@needs_libtpu
@pytest.mark.parametrize("chip", SLICES)
def test_compiles_for_tpu(chip):
    """By the public op, with all features at once, at widths that fill no register."""
    everything = {"marks": MARKS, "sinks": True, "window": 100, "soft_cap": 20.0}
    assert compiled(chip, T=200, H=80, V=96, **everything).as_text().count("tpu_custom_call") >= 3
    compiled(chip, T=256, H=64, dtype=jnp.float32)


@needs_libtpu
def test_no_array_of_scores_in_device_memory():
    """Beside arguments and results: a few arrays of the size of q, and not one of scores."""
    program = compiled("v6e", T=4096, H=128, N=1)
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 4


@needs_libtpu
@pytest.mark.parametrize("widths", [(128, 128), (64, 256)])
def test_vector_memory_is_not_underestimated(monkeypatch, widths):
    """The compiler, held to our own count for the tile, has enough."""
    tile, masks = Tiles(256, 384, 2), Masks(768, 768, True, None, True, False)
    shape = Shape(masks, 1, 2, *widths, 2)
    monkeypatch.setattr(tpu, "VMEM_BYTES", forward_bytes(shape, tile))
    monkeypatch.setattr(tpu_backward, "VMEM_BYTES", max(d_queries_bytes(shape, tile), d_keys_bytes(shape, tile)))
    attend = functools.partial(tpu.attention, tiles=AllTiles(tile, tile, tile), causal=True, window=None, soft_cap=None)
    attend = functools.partial(attend, q_positions=None, kv_positions=None)
    compiled("v5e", T=768, H=widths[0], V=widths[1], marks=MARKS[:2], attend=attend)
