"""Speculation leaves every distribution as it is: for both rules, three kinds of drafts, all parameters, mixed rows.

Target and draft model are tables: the logits after a token depend on that token. A position is compared within each
text that led there, so the joint distribution is, too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving import verification
from serving.sampling import History, draw, log_distribution
from serving.verification import Verified, verify
from tests.host import OPTIMIZED
from tests.serving.distribution_oracle import (
    FALSE_ALARM,
    Params,
    agrees,
    chi_square,
    distribution,
    packed,
    repeated_rows,
    total_variation,
)

V, K = 12, 2
DRAWS = 100_000
"""For each of the two rules."""
GREEDY = 1_000
PROMPT, OUTPUT = [2, 5], [5, 7, 5]
START = len(PROMPT) + len(OUTPUT)
WIDTH = 16

RNG = np.random.default_rng(11)
TARGET = RNG.standard_normal((V, V)).astype(np.float32) * 1.5
DRAFTS = {
    "draft model": RNG.standard_normal((V, V)).astype(np.float32) * 1.5,
    "self-draft": TARGET + 0.2 * RNG.standard_normal((V, V)).astype(np.float32),
    "n-gram": None,
}
# By position, so that a mask for the wrong one shows.
ALLOWED = RNG.random((WIDTH, V)) < 0.7

CONFIGS = {
    "plain": Params(),
    "temperature": Params(temperature=0.6),
    "hot, top-k": Params(temperature=1.8, top_k=4),
    "hot, top-p": Params(temperature=1.5, top_p=0.8),
    "cold, min-p": Params(temperature=0.7, min_p=0.1),
    "penalties, bias": Params(presence=0.7, frequency=0.6, repetition=1.3, bias=((2, 1.0),)),
    "top-k, top-p": Params(temperature=1.2, top_k=6, top_p=0.8),
    "everything": Params(1.2, 5, 0.9, 0.1, 0.5, 0.25, 1.3, bias=((5, 1.0),)),
}


def last_token(past: History) -> jax.Array:
    return jnp.take_along_axis(past.tokens_BW, past.length_B[:, None] - 1, axis=1)[:, 0]


def propose(table_VV, rows, past, masks_PU):
    """K drafts and their distributions from a draft model; from the last token alone, without them, if it has none."""
    token_B = last_token(past)
    if table_VV is None:
        # Any rule will do that doesn't look at noise: now likely tokens, now unlikely ones.
        return jnp.stack([(token_B * 5 + 3 * t) % V for t in range(1, K + 1)], axis=1), None
    drafts, log_probs = [], []
    for t in range(K):
        seen = past._replace(appended_BA=jnp.stack(drafts, axis=1)) if drafts else past
        log_q_BV = log_distribution(table_VV[token_B], rows, seen, masks_PU[past.length_B + t])
        token_B = draw(log_q_BV, rows, past.length_B + t)
        drafts.append(token_B)
        log_probs.append(log_q_BV)
    return jnp.stack(drafts, axis=1), jnp.stack(log_probs, axis=1)


def a_round(table_VV, rows, past, masks_PU, *, num_drafts=K) -> tuple[jax.Array, Verified]:
    """Propose, run the target over the drafts, verify."""
    drafts_BK, log_q_BKV = propose(table_VV, rows, past, masks_PU)
    if num_drafts == 0:
        drafts_BK, log_q_BKV = drafts_BK[:, :0], None
    inputs_BT = jnp.concatenate([last_token(past)[:, None], drafts_BK], axis=1)
    positions_BT = past.length_B[:, None] + jnp.arange(num_drafts + 1)
    num_drafts_B = jnp.full(len(past.length_B), num_drafts)
    logits_BTV = jnp.asarray(TARGET)[inputs_BT]
    return drafts_BK, verify(logits_BTV, drafts_BK, log_q_BKV, num_drafts_B, rows, past, masks_PU[positions_BT])


def advance(past: History, verified: Verified) -> History:
    places_BT = past.length_B[:, None] + jnp.arange(verified.tokens_BT.shape[1])
    places_BT = jnp.where(places_BT < (past.length_B + verified.count_B)[:, None], places_BT, WIDTH)
    tokens_BW = past.tokens_BW.at[jnp.arange(len(places_BT))[:, None], places_BT].set(verified.tokens_BT, mode="drop")
    return past._replace(tokens_BW=tokens_BW, length_B=past.length_B + verified.count_B)


# Those that many tests call with many rows run longer than they compile.
advance_compiled = jax.jit(advance, compiler_options=OPTIMIZED)
one_round = jax.jit(a_round, static_argnames="num_drafts", compiler_options=OPTIMIZED)
propose_compiled = jax.jit(propose, compiler_options=OPTIMIZED)
verify_compiled = jax.jit(verify, static_argnames="with_log_probs")


def three_rounds(table_VV, rows, past, masks_PU, num_drafts=K):
    """The text after three rounds, which hold three tokens at least."""
    for _ in range(3):
        _, verified = one_round(table_VV, rows, past, masks_PU, num_drafts=num_drafts)
        past = advance_compiled(past, verified)
    return past


def start(batch: int) -> History:
    tokens = np.zeros((batch, WIDTH), np.int32)
    tokens[:, :START] = [*PROMPT, *OUTPUT]
    return History(tokens, np.full(batch, len(PROMPT), np.int32), np.full(batch, START, np.int32))


def mixed_rows(params: Params):
    """Rows that follow the ratio rule, coupled ones, and greedy ones of both kinds, shuffled."""
    rows = repeated_rows(params, 2 * DRAWS + GREEDY)
    kind = np.random.default_rng(12).permutation(np.repeat([0, 1, 2], [DRAWS, DRAWS, GREEDY]))
    temperature = np.where(kind == 2, 0.0, rows.temperature_B).astype(np.float32)
    return rows._replace(
        coupled_B=(kind == 1) | ((kind == 2) & (np.arange(len(kind)) % 2 == 0)), temperature_B=temperature
    ), kind


def masks(masked: bool) -> np.ndarray:
    return packed(ALLOWED | (not masked))


@functools.cache
def law(params: Params, text: tuple[int, ...], masked: bool) -> np.ndarray:
    """What the token after START tokens and `text` is drawn from."""
    output = [*OUTPUT, *text]
    return distribution(TARGET[output[-1]], params, PROMPT, output, ALLOWED[START + len(text)] | (not masked))[0]


def joint(params: Params, masked: bool, length: int) -> np.ndarray:
    """Probabilities of all texts of `length` tokens, [V] * length."""
    wanted = np.ones(())
    for done in range(length):
        wanted = np.stack(
            [
                wanted[text] * law(params, text, masked) if wanted[text] else np.zeros(V)
                for text in np.ndindex(*[V] * done)
            ]
        ).reshape([V] * (done + 1))
    return wanted


def fits(texts: np.ndarray, params: Params, masked: bool) -> bool:
    """Whether texts [N, length] may have the joint distribution."""
    wanted = joint(params, masked, texts.shape[1]).ravel()
    return agrees(np.ravel_multi_index(tuple(texts.T), [V] * texts.shape[1]), wanted)


def round_fits(tokens: np.ndarray, count: np.ndarray, params: Params, masked: bool) -> bool:
    """Whether each position of a round, within each text before it, has the distribution it should."""
    if not fits(tokens[:, :1], params, masked):
        return False
    for t in range(1, tokens.shape[1]):
        reached = tokens[count > t]
        cells = np.bincount(np.ravel_multi_index(tuple(reached[:, : t + 1].T), [V] * (t + 1)), minlength=V ** (t + 1))
        cells = cells.reshape(-1, V)
        laws = np.zeros(cells.shape)
        for text in np.flatnonzero(cells.sum(axis=1)):
            laws[text] = law(params, tuple(int(i) for i in np.unravel_index(text, [V] * t)), masked)
        if chi_square(cells, laws * cells.sum(axis=1, keepdims=True)) <= FALSE_ALARM:
            return False
    return True


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_leaves_the_distribution_as_it_is(name, kind):
    params = CONFIGS[name]
    rows, rule = mixed_rows(params)
    masked = name in ("temperature", "hot, top-p", "penalties, bias", "everything")
    drafts, verified = one_round(DRAFTS[kind], rows, start(len(rule)), masks(masked))
    drafts, tokens, count, accepted = (
        np.asarray(x) for x in (drafts, verified.tokens_BT, verified.count_B, verified.accepted_B)
    )
    assert np.all(verified.valid_B) and np.array_equal(count, accepted + 1)
    for t in range(K):
        assert np.all((tokens == np.pad(drafts, ((0, 0), (0, 1))))[:, t][accepted > t])
    for which in (0, 1):
        assert round_fits(tokens[rule == which], count[rule == which], params, masked), which
    # Of the sampled rows some must have had drafts accepted and some rejected, or nothing was tested.
    sampled = accepted[rule < 2]
    assert kind == "n-gram" or 0.05 < (sampled > 0).mean() < 1
    greedy = tokens[rule == 2]
    cold = dataclasses.replace(params, temperature=0.0)
    best = np.argmax(law(cold, (), masked))
    assert np.all(greedy[:, 0] == best)
    going_on = greedy[count[rule == 2] > 1]
    assert np.all(going_on[:, 1] == np.argmax(law(cold, (int(best),), masked)))


@functools.cache
def plain_text() -> np.ndarray:
    """Three tokens of each of the mixed rows, without drafts."""
    rows, rule = mixed_rows(CONFIGS["everything"])
    past = three_rounds(None, rows, start(len(rule)), masks(True), num_drafts=0)
    assert np.all(np.asarray(past.length_B) == START + 3)
    return np.asarray(past.tokens_BW)[:, START : START + 3]


def test_plain_decoding_has_the_joint_distribution():
    _, rule = mixed_rows(CONFIGS["everything"])
    for which in (0, 1):
        assert fits(plain_text()[rule == which], CONFIGS["everything"], True)


@pytest.mark.parametrize("kind", DRAFTS)
def test_rounds_joined_have_the_joint_distribution(kind):
    """Noise of a rejected draft is used again by later rounds, at its position: that must not show."""
    params = CONFIGS["everything"]
    rows, rule = mixed_rows(params)
    spoken = three_rounds(DRAFTS[kind], rows, start(len(rule)), masks(True))
    assert np.asarray(spoken.length_B).max() > START + 3
    texts, plainly = np.asarray(spoken.tokens_BW)[:, START : START + 3], plain_text()
    for which in (0, 1):
        assert fits(texts[rule == which], params, True)
    # Coupled and greedy rows: not only the distribution, the very text.
    np.testing.assert_array_equal(texts[rule > 0], plainly[rule > 0])
    assert np.any(texts[rule == 0] != plainly[rule == 0]) or kind == "n-gram"


def test_the_ratio_rule_accepts_as_much_as_any_rule_can():
    """The sum of min(p, q), which is one minus the total variation between target and draft."""
    rows, rule = mixed_rows(Params())
    for kind in ("draft model", "self-draft"):
        _, verified = one_round(DRAFTS[kind], rows, start(len(rule)), masks(False))
        accepted = np.asarray(verified.accepted_B)[rule == 0] > 0
        q, _ = distribution(DRAFTS[kind][OUTPUT[-1]], Params())
        overlap = np.minimum(law(Params(), (), False), q).sum()
        # Five standard deviations of a share of 100,000 rows.
        assert accepted.mean() == pytest.approx(overlap, abs=5 * np.sqrt(0.25 / DRAWS))
        # The shared noise of coupled rows brings them near it, above the sum of p q of independent draws.
        shared = (np.asarray(verified.accepted_B)[rule == 1] > 0).mean()
        assert shared > (law(Params(), (), False) * q).sum() + 0.05 and shared < overlap + 0.01


# ---- The comparison can fail ----


def one_draft_fits(patches: dict, kind: str) -> bool:
    """Whether rounds of one draft still fit with parts of the verifier replaced."""
    params = CONFIGS["hot, top-p"]
    rows, past, free = repeated_rows(params, DRAWS), start(DRAWS), masks(False)
    drafts, log_q = propose_compiled(DRAFTS[kind], rows, past, free)
    drafts, log_q = drafts[:, :1], None if log_q is None else log_q[:, :1]
    logits = TARGET[np.stack([np.full(DRAWS, OUTPUT[-1]), drafts[:, 0]], axis=1)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(verification, name, value)
        # A function of its own, because the cache of `verify_compiled` doesn't know of the patches.
        compiled = jax.jit(functools.partial(verify))
        verified = compiled(logits, drafts, log_q, np.ones(DRAWS, np.int32), rows, past)
    return round_fits(np.asarray(verified.tokens_BT), np.asarray(verified.count_B), params, False)


def temperature_last(logits_BV, rows, history, mask_BU, stages):
    """top-p before the temperature, as if the verifier had a sampler of its own."""
    warm = rows._replace(temperature_B=jnp.ones_like(rows.temperature_B))
    cut = log_distribution(logits_BV, warm, history, mask_BU, stages)
    return jax.nn.log_softmax(cut / rows.temperature_B[:, None])


@pytest.mark.parametrize(
    ("patches", "kind"),
    [
        ({"_acceptance": lambda p, q, d: jnp.ones(d.shape)}, "draft model"),
        ({"_acceptance": lambda p, q, d: jnp.ones(d.shape)}, "self-draft"),
        ({"_acceptance": lambda p, q, d: jnp.exp(verification._at(p, d))}, "draft model"),
        ({"_residual": lambda p, q, d: p}, "draft model"),
        ({"_residual": lambda p, q, d: p}, "n-gram"),
        ({"log_distribution": temperature_last}, "draft model"),
        # A replacement drawn with the noise that its rejected draft was drawn with.
        ({"RESIDUAL": verification.DRAW}, "draft model"),
    ],
    ids=[
        "accept all",
        "accept all of a near copy",
        "acceptance p",
        "residual p",
        "n-gram residual p",
        "order",
        "noise",
    ],
)
def test_the_comparison_detects_a_wrong_rule(patches, kind):
    assert not one_draft_fits(patches, kind)


def test_the_comparison_passes_the_right_rule():
    assert one_draft_fits({}, "draft model")


def test_the_comparison_detects_a_bonus_from_the_draft_model():
    params = CONFIGS["hot, top-p"]
    rows, past = repeated_rows(params, DRAWS), start(DRAWS)
    _, verified = one_round(DRAFTS["self-draft"], rows, past, masks(False))
    tokens, count = np.array(verified.tokens_BT), np.asarray(verified.count_B)
    assert round_fits(tokens, count, params, False)
    log_q = log_distribution(DRAFTS["self-draft"][tokens[:, K - 1]], rows, past)
    tokens[:, K] = np.where(count == K + 1, draw(log_q, rows, past.length_B + K), tokens[:, K])
    assert not round_fits(tokens, count, params, False)


def test_the_comparison_detects_penalties_that_miss_the_drafts():
    class Forgetful(History):
        def _replace(self, **fields):
            return self

    params = Params(presence=0.5, frequency=0.5, repetition=1.5)
    # The draft that is likely to come, and to come twice if it is not penalised.
    likely = law(params, (), False) * [distribution(TARGET[token], Params())[0][token] for token in range(V)]
    drafts = np.full((DRAWS, 1), np.argmax(likely), np.int32)
    rows = repeated_rows(params, DRAWS)
    logits = TARGET[np.stack([np.full(DRAWS, OUTPUT[-1]), drafts[:, 0]], axis=1)]
    judged = []
    for history_class in (History, Forgetful):
        verified = verify_compiled(logits, drafts, None, np.ones(DRAWS, np.int32), rows, history_class(*start(DRAWS)))
        judged.append(round_fits(np.asarray(verified.tokens_BT), np.asarray(verified.count_B), params, False))
    assert judged == [True, False]


def test_total_variation_has_a_bound_that_can_be_passed():
    p = np.array([0.5, 0.3, 0.2])
    counts = np.random.default_rng(0).multinomial(DRAWS, p)
    distance, bound = total_variation(counts, p)
    assert distance < bound < 0.02
    assert total_variation(counts, np.array([0.52, 0.28, 0.2]))[0] > bound


# ---- Rows ----

SMALL = 6


def small_round(num_drafts, params=CONFIGS["plain"], coupled=False, logits=None, drafts=None, log_q=None, **options):
    rows = repeated_rows(params, SMALL)._replace(coupled_B=np.full(SMALL, coupled))
    past = start(SMALL)
    logits = TARGET[np.arange(SMALL * (K + 1)).reshape(SMALL, K + 1) % V] if logits is None else logits
    drafts = np.full((SMALL, K), 3, np.int32) if drafts is None else drafts
    return rows, past, logits, verify_compiled(logits, drafts, log_q, np.asarray(num_drafts), rows, past, **options)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_row_without_drafts_draws_as_in_plain_decoding(coupled):
    """Whatever stands in its drafts, and whatever the rest of the batch does."""
    for drafts in (None, np.full((SMALL, K), -1, np.int32), np.full((SMALL, K), 10**6, np.int32)):
        rows, past, logits, verified = small_round([0, 2, 0, 1, 0, 0], coupled=coupled, drafts=drafts)
        plain = draw(log_distribution(logits[:, 0], rows, past), rows, past.length_B)
        without = np.array([0, 2, 4, 5])
        np.testing.assert_array_equal(np.asarray(verified.tokens_BT)[without, 0], np.asarray(plain)[without])
        assert np.all(np.asarray(verified.count_B)[without] == 1) and np.asarray(verified.count_B)[3] <= 2


def test_no_drafts_at_all_is_plain_decoding():
    rows, past = repeated_rows(Params(), SMALL), start(SMALL)
    logits = TARGET[:SMALL, None]
    verified = verify_compiled(logits, np.zeros((SMALL, 0), np.int32), None, np.zeros(SMALL, np.int32), rows, past)
    plain = draw(log_distribution(logits[:, 0], rows, past), rows, past.length_B)
    np.testing.assert_array_equal(verified.tokens_BT[:, 0], plain)
    assert verified.tokens_BT.shape == (SMALL, 1) and np.all(verified.count_B == 1) and verified.log_probs is None


def test_a_certain_draft_is_always_accepted_and_an_impossible_one_never():
    certain = np.full((SMALL, K + 1, V), -np.inf, np.float32)
    certain[..., 3] = 0.5
    for coupled in (False, True):
        for params in (Params(), Params(temperature=0), Params(temperature=0.3, top_k=2, top_p=0.5)):
            # A draft beyond a row's number is none, however right.
            *_, verified = small_round([K, 0, 1, K, K, K], params, coupled, certain)
            assert np.asarray(verified.count_B).tolist() == [K + 1, 1, 2, K + 1, K + 1, K + 1]
            assert np.all(verified.tokens_BT == 3)
            *_, verified = small_round([K] * SMALL, params, coupled, certain, np.full((SMALL, K), 4, np.int32))
            assert np.all(verified.count_B == 1) and np.all(verified.tokens_BT[:, 0] == 3)


def test_only_positions_that_are_reached_make_a_row_invalid():
    logits = np.full((SMALL, K + 1, V), -np.inf, np.float32)
    logits[..., 3] = 0.0
    drafts = np.full((SMALL, K), 3, np.int32)
    logits[0, 0] = np.nan  # the first position
    logits[1, 1, 7] = np.inf  # reached after an accepted draft
    logits[2, 2] = -np.inf  # the last one
    logits[3, 1:], drafts[3, 0] = np.nan, 4  # behind a rejected draft
    logits[4, 1] = np.nan  # behind the only draft, accepted
    *_, verified = small_round([K, K, K, K, 1, K], logits=logits, drafts=drafts)
    assert np.asarray(verified.valid_B).tolist() == [False, False, False, True, False, True]
    assert np.asarray(verified.count_B)[[3, 5]].tolist() == [1, K + 1]
    logits[4, 1:], drafts[4, 0] = np.nan, 4
    *_, verified = small_round([K, K, K, K, 0, K], logits=logits, drafts=drafts)
    assert np.asarray(verified.valid_B).tolist() == [False, False, False, True, True, True]


def test_a_nan_among_many_logits_is_found_by_the_greedy_verifier():
    """XLA's maximum on a CPU leaves it out of rows so long."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4096)).astype(np.float32)
    logits[1, 0, 1000] = np.nan
    result = jax.jit(verification.verify_greedy)(logits, np.zeros((2, 2), np.int32), np.zeros(2, np.int32))
    np.testing.assert_array_equal(result.valid_B, [True, False])


def test_a_draft_model_that_fails_costs_its_drafts_and_nothing_else():
    params = Params(temperature=0.9)
    rows, past = repeated_rows(params, DRAWS), start(DRAWS)
    drafts = np.full((DRAWS, 1), 3, np.int32)
    logits = np.broadcast_to(TARGET[OUTPUT[-1]], (DRAWS, 2, V))
    log_q = np.full((DRAWS, 1, V), np.nan, np.float32)
    verified = verify_compiled(logits, drafts, log_q, np.ones(DRAWS, np.int32), rows, past)
    assert np.all(verified.valid_B) and np.all(verified.accepted_B == 0)
    assert fits(np.asarray(verified.tokens_BT)[:, :1], params, False)


def test_log_probs_are_those_of_the_distribution_that_was_drawn_from():
    params = Params(0.8, 5, 0.95, 0.01, 0.3, 0.2, 1.1)
    rows, past, logits, verified = small_round([K] * SMALL, params, with_log_probs=True)
    drafts = np.full((SMALL, K), 3, np.int32)
    for t in range(K + 1):
        seen = past._replace(appended_BA=drafts[:, :t])
        wanted = np.asarray(log_distribution(logits[:, t], rows, seen))
        tokens = np.asarray(verified.tokens_BT)[:, t]
        np.testing.assert_allclose(verified.log_probs.chosen_BT[:, t], wanted[np.arange(SMALL), tokens], rtol=1e-6)
        np.testing.assert_allclose(verified.log_probs.top_values_BTk[:, t, :5], -np.sort(-wanted)[:, :5], rtol=1e-6)
        assert np.all(verified.log_probs.top_values_BTk[:, t, 5:] == -np.inf)
        assert np.array_equal(verified.log_probs.top_ids_BTk[:, t, 0], np.argmax(wanted, axis=1))


def test_log_probs_are_computed_only_where_a_row_wants_them():
    *_, wanted = small_round([K] * SMALL, with_log_probs=True)
    *_, one = small_round([K] * SMALL, with_log_probs=True, wants_log_probs_B=np.arange(SMALL) == 3)
    *_, none = small_round([K] * SMALL, with_log_probs=True, wants_log_probs_B=np.zeros(SMALL, bool))
    for field in range(3):
        np.testing.assert_array_equal(one.log_probs[field], wanted.log_probs[field])
        assert not np.any(none.log_probs[field])
    np.testing.assert_array_equal(none.tokens_BT, wanted.tokens_BT)


def test_a_row_verifies_the_same_in_any_batch():
    rng = np.random.default_rng(13)
    rows = repeated_rows(CONFIGS["everything"], SMALL)._replace(coupled_B=np.arange(SMALL) % 2 == 0)
    logits = rng.standard_normal((SMALL, K + 1, V)).astype(np.float32)
    drafts, past = rng.integers(0, V, (SMALL, K)).astype(np.int32), start(SMALL)
    log_q = np.asarray(jax.nn.log_softmax(rng.standard_normal((SMALL, K, V)).astype(np.float32)))
    num = np.array([2, 1, 2, 0, 2, 2], np.int32)
    together = verify_compiled(logits, drafts, log_q, num, rows, past)
    order = np.array([4, 1, 0])
    picked = [type(x)(*(None if f is None else f[order] for f in x)) for x in (rows, past)]
    apart = verify_compiled(logits[order], drafts[order], log_q[order], num[order], *picked)
    np.testing.assert_array_equal(np.asarray(together.count_B)[order], apart.count_B)
    for row, count in enumerate(np.asarray(apart.count_B)):
        np.testing.assert_array_equal(np.asarray(together.tokens_BT)[order[row], :count], apart.tokens_BT[row, :count])
