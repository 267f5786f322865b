"""The one function that makes the distribution, against an oracle that sorts; and statistics of draws from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from serving import sampling
from serving.sampling import History, draw, log_distribution, row_is_valid, seed_words, top_log_probs, uniform
from tests.host import OPTIMIZED
from tests.serving.distribution_oracle import (
    ORDER,
    Params,
    agrees,
    chi_square,
    distribution,
    packed,
    repeated_rows,
    rows_of,
)

V, W, B = 17, 8, 4
DRAWS = 131_072

compiled = jax.jit(log_distribution)
drawn = jax.jit(draw)


def history(prompts, outputs, junk=3) -> History:
    """Of each row, followed by junk that must not count."""
    tokens = np.full((len(prompts), W), junk, np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        tokens[row, : len(prompt) + len(output)] = [*prompt, *output]
    prompt_length = np.array([len(prompt) for prompt in prompts], np.int32)
    return History(tokens, prompt_length, prompt_length + np.array([len(output) for output in outputs], np.int32))


def ours(logits, params, prompts=None, outputs=None, allowed=None):
    """Probabilities [B, V] of rows; shapes are padded to B rows, so that it is compiled once."""
    count = len(params)
    fill = B - count
    prompts, outputs = (list(texts or [()] * count) + [()] * fill for texts in (prompts, outputs))
    allowed = np.ones((count, V), bool) if allowed is None else np.asarray(allowed)
    mask = packed(np.concatenate([allowed, np.ones((fill, V), bool)]))
    logits = np.concatenate([np.asarray(logits, np.float32), np.zeros((fill, V), np.float32)])
    rows = rows_of([*params, *[Params()] * fill])
    return np.exp(np.asarray(compiled(logits, rows, history(prompts, outputs), mask))[:count])


# Logits on a grid, so that ties happen and are exact in float32 too.
LOGIT = st.one_of(st.integers(-24, 24).map(lambda i: i / 4), st.just(-np.inf))
TOKEN = st.integers(0, V - 1)
PARAMS = st.builds(
    Params,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 10)),
    top_k=st.integers(0, V + 3),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    presence=st.integers(-8, 8).map(lambda i: i / 4),
    frequency=st.integers(-8, 8).map(lambda i: i / 4),
    repetition=st.sampled_from([0.5, 1.0, 1.25, 2.0]),
    bias=st.lists(st.tuples(TOKEN, st.integers(-40, 40).map(float)), max_size=2).map(tuple),
)
ROW = st.tuples(
    st.lists(LOGIT, min_size=V, max_size=V),
    PARAMS,
    st.lists(TOKEN, max_size=4),
    st.lists(TOKEN, max_size=4),
    st.lists(st.booleans(), min_size=V, max_size=V),
)


@given(st.lists(ROW, min_size=1, max_size=B))
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_distribution_is_the_oracles(rows):
    wanted = []
    for logits, params, prompt, output, allowed in rows:
        assume(np.any(np.isfinite(logits) & np.array(allowed)))
        p, margin = distribution(logits, params, prompt, output, np.array(allowed))
        # Float32 may decide otherwise only where float64 nearly does.
        assume(margin > 1e-5)
        wanted.append(p)
    columns = [list(column) for column in zip(*rows, strict=True)]
    got = ours(*columns)
    np.testing.assert_array_equal(got > 0, np.where(np.array(wanted) < 1e-35, got > 0, True))
    np.testing.assert_allclose(got, wanted, rtol=3e-5, atol=1e-30)


SLOPE = np.linspace(2, -2, V)


@pytest.mark.parametrize(
    ("logits", "params", "kept"),
    [
        ([3.0, 2.0, 2.0, 2.0] + [0.0] * 13, Params(top_k=2), [0, 1, 2, 3]),
        ([3.0, 2.0, 2.0, 2.0] + [0.0] * 13, Params(top_k=4), [0, 1, 2, 3]),
        # One unit in the last place apart is no tie.
        ([2.0, float(np.nextafter(np.float32(1), np.float32(2)))] + [1.0] * 15, Params(top_k=2), [0, 1]),
        ([0.0] * V, Params(top_k=1), range(V)),
        ([0.0, -0.0] + [-1.0] * 15, Params(top_k=1), [0, 1]),
        ([0.0] * V, Params(top_p=0.01), range(V)),
        (SLOPE, Params(top_k=V), range(V)),
        (SLOPE, Params(top_k=10**9), range(V)),
        (SLOPE, Params(top_k=1), [0]),
        (SLOPE, Params(top_p=1.0, top_k=5), range(5)),
        (SLOPE, Params(top_p=1e-30), [0]),
        (SLOPE, Params(top_p=1e-50), [0]),
        (SLOPE, Params(min_p=1.0), [0]),
        (SLOPE, Params(temperature=2e-38), [0]),
        (SLOPE * 1e30, Params(temperature=1e-30, top_p=0.5, top_k=3, min_p=0.1), [0]),
        (SLOPE, Params(temperature=1e-45), range(V)),
        (SLOPE, Params(temperature=0, top_k=1, top_p=0.1, min_p=0.9), range(V)),
        ([1.0] + [-np.inf] * 16, Params(top_k=5, top_p=0.9, min_p=0.5), [0]),
        ([-np.inf] * 16 + [-1e30], Params(temperature=0.01, top_k=5, top_p=0.9), [16]),
        ([-np.inf] * 15 + [0.0, 0.0], Params(repetition=2.0, frequency=1.0), [15, 16]),
    ],
)
def test_what_is_kept(logits, params, kept):
    got = ours([logits], [params], [[1]], [[0]])[0]
    assert np.flatnonzero(got).tolist() == list(kept)
    assert got.sum() == pytest.approx(1, abs=1e-6)


def test_a_single_allowed_token_has_all_the_probability():
    for params in (Params(), Params(temperature=0), Params(temperature=3.0, top_k=2, top_p=0.3, min_p=0.2)):
        got = ours([SLOPE], [params], allowed=[np.arange(V) == 11])[0]
        assert got[11] == 1 and got.sum() == 1


def test_only_the_text_so_far_is_penalised():
    """Prompt and output under repetition, output alone under the others; never what lies beyond the length."""
    one = ours([[1.0] * V], [Params(repetition=2.0)], [[4]], [[5, 5]])[0]
    assert np.flatnonzero(one < one[0]).tolist() == [4, 5]
    two = np.log(ours([[1.0] * V], [Params(presence=0.5, frequency=0.25)], [[4, 6]], [[5, 7, 5]])[0])
    np.testing.assert_allclose(two[[4, 6, 5, 7]] - two[0], [0, 0, -1.0, -0.75], atol=1e-6)


def test_appended_drafts_count_as_output():
    rows = rows_of([Params(frequency=0.5, presence=0.25, repetition=1.5)])
    logits = SLOPE[None].astype(np.float32)
    plain = compiled(logits, rows, history([[1]], [[2, 3, 2]]))
    appended = compiled(logits, rows, history([[1]], [[2]])._replace(appended_BA=np.array([[3, 2]], np.int32)))
    np.testing.assert_array_equal(plain, appended)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_thresholds_are_exact_over_a_large_vocabulary(scale):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((6, 50_000)) * scale).astype(np.float32)
    params = [
        Params(top_k=40),
        Params(top_k=1),
        Params(top_p=0.9, temperature=1.3),
        Params(top_p=0.999),
        Params(top_k=5000, top_p=0.5, min_p=1e-4),
        Params(top_p=1.0),
    ]
    got = np.exp(np.asarray(compiled(logits, rows_of(params), history([()] * 6, [()] * 6))))
    for row in range(6):
        p, _ = distribution(logits[row], params[row])
        # Rounding of a sum of 50,000 terms may shift the cut by a token or two, of the least likely.
        odd = np.flatnonzero((got[row] > 0) != (p > 0))
        assert len(odd) <= 2 * (params[row].top_p < 1) and np.all(np.maximum(p, got[row])[odd] < 2e-5)
        np.testing.assert_allclose(np.delete(got[row], odd), np.delete(p, odd), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("params", [Params(), Params(temperature=0), Params(top_k=3, top_p=0.9, frequency=1.0)])
@pytest.mark.parametrize(
    "broken", ["nan", "inf", "nothing", "all masked", "nan under the mask", "inf under the mask", "nothing but masked"]
)
def test_a_row_without_a_distribution_is_found_and_alone(params, broken):
    logits, allowed = np.tile(SLOPE, (3, 1)), np.ones((3, V), bool)
    neighbours = ours(logits, [params] * 3, [[1]] * 3, [[2]] * 3)
    if "masked" in broken:
        allowed[1] = False
    if broken == "nothing":
        logits[1] = -np.inf
    elif broken == "nothing but masked":
        logits[1], allowed[1] = -np.inf, True
        logits[1, 4], allowed[1, 4] = 1.0, False
    elif "nan" in broken or "inf" in broken:
        logits[1, 5] = np.nan if "nan" in broken else np.inf
        allowed[1, 5] = "under" not in broken
    got = ours(logits, [params] * 3, [[1]] * 3, [[2]] * 3, allowed)
    assert row_is_valid(got).tolist() == [True, False, True] and np.all(np.isnan(got[1]))
    np.testing.assert_array_equal(got[[0, 2]], neighbours[[0, 2]])


def test_a_neighbour_that_wants_every_stage_changes_no_bit_of_a_row():
    """The stages are skipped where no row of the batch wants them; the result is the same either way."""
    demanding = Params(0.5, 3, 0.8, 0.1, 1.0, 1.0, 2.0, bias=((3, 5.0),))
    for quiet in (Params(), Params(temperature=0), Params(temperature=0.6)):
        alone = ours([SLOPE], [quiet], [[1]], [[2]])
        beside = ours([SLOPE, SLOPE], [quiet, demanding], [[1], [1]], [[2], [2]])
        np.testing.assert_array_equal(alone[0], beside[0])


def test_quiet_rows_are_the_models_own_log_softmax():
    logits = np.random.default_rng(1).standard_normal((3, V)).astype(np.float32)
    got = np.log(ours(logits, [Params(), Params(temperature=0), Params(temperature=0, top_k=1)]))
    np.testing.assert_allclose(got, jax.nn.log_softmax(logits), atol=1e-6)


# ---- draws ----

# Each stage excludes or moves something here, and each two in the wrong order too.
DEMANDING = Params(1.2, 5, 0.9, 0.1, 0.5, 0.25, 1.3, bias=((5, 1.0),))
CONFIGS = {
    "plain": Params(),
    "temperature": Params(temperature=0.6),
    "hot, top-k": Params(temperature=1.8, top_k=5),
    "hot, top-p": Params(temperature=1.5, top_p=0.8),
    "cold, min-p": Params(temperature=0.7, min_p=0.2),
    "penalties, bias": Params(presence=0.7, frequency=-0.4, repetition=1.3, bias=((2, 1.0),)),
    "top-k, top-p": Params(top_k=6, top_p=0.8),
    "everything": DEMANDING,
}
LOGITS = np.random.default_rng(2).standard_normal(12) * 1.5
ALLOWED = np.arange(12) % 5 != 1
PROMPT, OUTPUT = [2, 5], [5, 7, 5]


# Of many rows: it runs longer than it compiles.
@functools.partial(jax.jit, compiler_options=OPTIMIZED)
def _many(logits_V, rows, mask_U, position_B):
    batch = len(position_B)
    tokens_BW = jnp.broadcast_to(jnp.array([*PROMPT, *OUTPUT]), (batch, len(PROMPT) + len(OUTPUT)))
    past = History(tokens_BW, jnp.full(batch, len(PROMPT)), jnp.full(batch, tokens_BW.shape[1]))
    logits_BV = jnp.broadcast_to(logits_V.astype(jnp.float32), (batch, logits_V.shape[0]))
    log_probs = log_distribution(logits_BV, rows, past, jnp.broadcast_to(mask_U, (batch, mask_U.shape[0])))
    return draw(log_probs, rows, position_B)


def many_draws(params: Params, masked: bool, one_seed: bool = False) -> np.ndarray:
    """DRAWS tokens: one of each of as many seeds, or of each position of one seed."""
    rows, positions = repeated_rows(params, DRAWS), np.full(DRAWS, 5, np.int32)
    if one_seed:
        rows = rows._replace(seed_B2=np.tile(rows.seed_B2[:1], (DRAWS, 1)))
        positions = np.arange(DRAWS, dtype=np.int32)
    return np.asarray(_many(LOGITS, rows, packed(ALLOWED | (not masked)), positions))


def wanted(params: Params, masked: bool, order=ORDER) -> np.ndarray:
    return distribution(LOGITS, params, PROMPT, OUTPUT, ALLOWED | (not masked), order)[0]


@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_draws_follow_the_distribution(name, masked):
    for one_seed in (False, True):
        assert agrees(many_draws(CONFIGS[name], masked, one_seed), wanted(CONFIGS[name], masked))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("hot, top-p", ("top_k", "top_p", "min_p", "temperature")),
        ("cold, min-p", ("top_k", "top_p", "min_p", "temperature")),
        ("top-k, top-p", ("temperature", "top_p", "top_k", "min_p")),
        ("everything", ("top_p", "temperature", "top_k", "min_p")),
        ("everything", ("temperature", "min_p", "top_p", "top_k")),
    ],
)
def test_the_comparison_detects_a_wrong_order(name, order):
    assert not agrees(many_draws(CONFIGS[name], False), wanted(CONFIGS[name], False, order))


@pytest.mark.parametrize(
    "field", ["temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition", "bias"]
)
def test_the_comparison_detects_a_parameter_that_is_ignored(field):
    config = dataclasses.replace(DEMANDING, min_p=0.3 if field == "min_p" else 0.1)
    without = dataclasses.replace(config, **{field: getattr(Params(), field)})
    assert not agrees(many_draws(config, False), wanted(without, False))


def test_a_row_draws_the_same_in_any_batch_at_any_place():
    rng = np.random.default_rng(3)
    log_probs = np.asarray(jax.nn.log_softmax(rng.standard_normal((12, 300)).astype(np.float32)))
    rows = rows_of([Params(seed=int(seed)) for seed in rng.integers(-(2**63), 2**63, 12)])
    positions = rng.integers(0, 10**6, 12).astype(np.int32)
    together = np.asarray(drawn(log_probs, rows, positions))
    for count in (1, 5, 12):
        order = rng.permutation(12)[:count]
        picked = rows._replace(**{name: getattr(rows, name)[order] for name in rows._fields})
        np.testing.assert_array_equal(drawn(log_probs[order], picked, positions[order]), together[order])


def test_seeds_positions_and_both_words_of_a_seed_matter():
    log_probs = np.full((64, 500), -np.log(500), np.float32)
    still = np.zeros(64, np.int32)
    seeds = rows_of([Params(seed=s) for s in range(64)])
    high = rows_of([Params(seed=s << 32) for s in range(64)])
    same = rows_of([Params(seed=1)] * 64)
    moving = np.arange(64, dtype=np.int32)
    texts = [drawn(log_probs, seeds, still), drawn(log_probs, high, still), drawn(log_probs, same, moving)]
    assert all(len(set(np.asarray(text).tolist())) > 45 for text in texts)
    assert len(set(np.asarray(drawn(log_probs, same, still)).tolist())) == 1


def test_the_text_of_a_seed_does_not_change_with_versions_or_defaults():
    log_probs = np.tile(np.asarray(jax.nn.log_softmax(np.linspace(0, 3, 50, dtype=np.float32))), (6, 1))
    rows = rows_of([Params(seed=s) for s in (0, 1, -1, 1234, 2**40, 2**63 - 1)])
    golden = [23, 35, 20, 34, 44, 36]
    assert np.asarray(drawn(log_probs, rows, np.arange(6, dtype=np.int32))).tolist() == golden
    with jax.default_prng_impl("rbg"):
        # A function of its own, or the program compiled above would be taken.
        assert (
            np.asarray(jax.jit(functools.partial(draw))(log_probs, rows, np.arange(6, dtype=np.int32))).tolist()
            == golden
        )


def test_greedy_rows_take_the_most_likely_token_beside_sampled_ones():
    logits = np.random.default_rng(4).standard_normal((B, V)).astype(np.float32)
    for params in ([Params(temperature=0)] * B, [Params(temperature=0), Params(), Params(temperature=0), Params()]):
        rows = rows_of(params)
        tokens = np.asarray(drawn(np.log(ours(logits, params)), rows, np.arange(B, dtype=np.int32)))
        greedy = [p.temperature == 0 for p in params]
        assert tokens[greedy].tolist() == np.argmax(logits, axis=1)[greedy].tolist()


def test_excluded_tokens_are_never_drawn_whatever_the_noise():
    """The noise is finite from end to end of its range."""
    words = np.array([0, 1, 2**31, 2**32 - 2**8, 2**32 - 1], np.uint32)
    noise = []
    for word in words:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "bits", lambda key, shape, word=word: jnp.full(shape, word, jnp.uint32))
            noise.append(float(sampling._gumbel(None, 1)[0]))
    assert noise == sorted(noise, reverse=True) and noise[0] == pytest.approx(22.87, abs=0.01) and noise[-1] > -2.9


def test_streams_are_independent():
    """The token of one stream says nothing about that of another, nor about the number that decides over drafts."""
    rows, positions = repeated_rows(Params(), DRAWS), np.zeros(DRAWS, np.int32)
    log_probs = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2])), (DRAWS, 3))
    streams = [
        np.asarray(jax.jit(sampling.draw_from_stream)(log_probs, rows, positions, np.full(DRAWS, stream, np.int32)))
        for stream in (sampling.DRAW, sampling.RESIDUAL)
    ]
    numbers = np.asarray(jax.jit(uniform)(rows, positions))
    assert numbers.min() >= 0 and numbers.max() < 1
    streams.append((numbers * 3).astype(int))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        table = np.zeros((3, 3))
        np.add.at(table, (streams[one], streams[other]), 1)
        expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / DRAWS
        assert chi_square(table.reshape(1, -1), expected.reshape(1, -1)) > 1e-6
        assert chi_square(np.diag(table.sum(axis=1)).reshape(1, -1), expected.reshape(1, -1)) < 1e-6


@pytest.mark.parametrize("vocab", [7, 256, 12_000])
def test_top_log_probs_are_those_of_a_sort(vocab):
    rng = np.random.default_rng(5)
    # On a grid: many ties, of which the lowest ids come first.
    log_probs = np.round(rng.standard_normal((3, vocab)) * 4).astype(np.float32)
    log_probs[0, 5:] = -np.inf
    tokens = np.array([0, 1, 6], np.int32)
    chosen, ids, values = jax.jit(top_log_probs)(log_probs, tokens)
    np.testing.assert_array_equal(chosen, log_probs[[0, 1, 2], tokens])
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :20]
    sorted_values = np.take_along_axis(log_probs, order, axis=1)
    np.testing.assert_array_equal(values[:, : order.shape[1]], sorted_values)
    assert np.all(values[:, order.shape[1] :] == -np.inf) and ids.shape == values.shape == (3, 20)
    possible = sorted_values > -np.inf
    np.testing.assert_array_equal(np.asarray(ids)[:, : order.shape[1]][possible], order[possible])


@pytest.mark.parametrize(
    ("seed", "words"), [(0, (0, 0)), (2**32 + 5, (1, 5)), (-1, (2**32 - 1, 2**32 - 1)), (-(2**63), (2**31, 0))]
)
def test_seed_words(seed, words):
    assert seed_words(seed) == words
