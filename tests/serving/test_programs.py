"""The programs that decode: what rounds emit, one after another; and that a text drawn through them, with drafts of any
kind, has the distribution that the model's forward pass in float64 gives."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cache import PagedRows
from model.transformer import Definition
from serving import batch as columns
from serving import programs as programs_module
from serving.batch import Drawing, RowBatch, State, Tiles, row_params
from serving.programs import Drafting, Programs
from serving.request import MAX_TOP_LOGPROBS, Request, SamplingParams, Sequence
from tests.host import OPTIMIZED
from tests.model import oracle
from tests.model.tiny import dense, execution, moe, random_params, to_device
from tests.serving.distribution_oracle import Params, agrees, distribution

V, WIDTH, DRAFTS = 16, 16, 2
EVERYTHING = np.uint32(0xFFFFFFFF)
PROMPT = (15, 4, 11, 15)
"""Chosen among all of this form: the model gives what the n-gram drafts, 4 and 11, probabilities of 0.21 and 0.69."""

TARGET = dense(vocab_size=V, embed_dim=8, mlp_dim=16, num_heads=2, num_kv_heads=1, max_positions=WIDTH)
DRAFT = dataclasses.replace(TARGET, num_layers=1, embed_dim=4)


@functools.cache
def weights_of(config, seed: int):
    return random_params(Definition(config, False, "float32"), seed)


def make(kind: str | None, config=TARGET) -> Programs:
    drafting = None
    match kind:
        case "ngram":
            drafting = Drafting("ngram", DRAFTS)
        case "layers":
            drafting = Drafting("layers", DRAFTS, num_layers=1)
        case "model":
            drafting = Drafting("model", DRAFTS, None, Definition(DRAFT, False, "float32"), execution(DRAFT))
    return Programs(Definition(config, False, "float32"), execution(config), drafting)


def sequence_of(prompt=PROMPT, **params) -> Sequence:
    request = Request("r", tuple(prompt), SamplingParams(**({"max_tokens": 3} | params)), lambda delta: None)
    return Sequence(request, list(prompt))


class Bench(NamedTuple):
    """Rows that have computed all of their prompts but the last token; row r owns page r + 1."""

    weights: tuple
    draft_weights: tuple | None
    cache: list
    draft_cache: list
    batch: RowBatch
    state: State


def prepare(kind: str | None, sequences: list[Sequence], config=TARGET, drafts: int = DRAFTS) -> Bench:
    """Rows of one page each. `sequences` have one prompt; each row's seed is its number."""
    rows, prompt = len(sequences), sequences[0].tokens
    packed = {sequence: row_params(sequence, seed=0, max_context=WIDTH) for sequence in sequences}
    ints = np.array([packed[sequence].ints for sequence in sequences])
    floats = np.array([packed[sequence].floats for sequence in sequences])
    ints[:, columns.LENGTH], ints[:, columns.DRAFTS] = len(prompt), drafts
    ints[:, columns.SEED_LOW] = np.arange(rows)
    tokens = np.zeros((rows, WIDTH), np.int32)
    tokens[:, : len(prompt)] = prompt
    batch = RowBatch(ints, floats, np.arange(1, rows + 1, dtype=np.int32)[:, None])
    length = ints[:, columns.LENGTH].copy()
    state = State(tokens, np.full(rows, prompt[-1], np.int32), length, np.zeros(rows, bool))
    weights = to_device(weights_of(config, 0))
    draft_weights = to_device(weights_of(DRAFT, 1)) if kind == "model" else None
    cache = computed(config, weights, prompt, rows)
    draft_cache = computed(DRAFT, draft_weights, prompt, rows) if draft_weights else []
    return Bench(weights, draft_weights, cache, draft_cache, batch, state)


def computed(config, weights, prompt, rows: int) -> list:
    """A cache in which every row's page holds its prompt's keys and values, but for the last token's."""
    definition = Definition(config, False, "float32")
    shape = (2, WIDTH, config.num_kv_heads, config.head_dim)

    @jax.jit
    def run(weights, tokens):
        cache = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]
        paged = PagedRows(jnp.ones((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, len(prompt) - 1, jnp.int32))
        return definition.bind(*weights).extend(tokens, cache, paged, execution(config))[1]

    cache = run(weights, np.array([prompt[:-1]], np.int32))
    return jax.tree.map(lambda pages: jnp.repeat(pages[1:], rows + 1, axis=0), cache)


class Rounds(NamedTuple):
    """Results of R rounds that follow each other."""

    tokens_RBT: np.ndarray
    counts_RB: np.ndarray
    drafted_RB: np.ndarray
    chosen_RBT: np.ndarray
    top_ids_RBTL: np.ndarray
    top_values_RBTL: np.ndarray
    experts_R: np.ndarray


def build(kind: str | None, config=TARGET, drafts: int = DRAFTS, drawing: Drawing = Drawing.FULL, branches=True):
    """A round: (cache, draft_cache, Result, State, experts)."""
    programs = dataclasses.replace(make(kind, config), branches=branches)

    # Most calls are of these programs: they run for longer than they compile.
    often = config == TARGET and drawing is Drawing.FULL and branches

    @functools.partial(jax.jit, compiler_options=OPTIMIZED if often else None)
    def run(weights, draft_weights, cache, draft_cache, batch, state, mask):
        held = (weights, draft_weights, cache, draft_cache)
        cache, draft_cache, forward = programs.decode(drafts, *held, batch, state)
        result, state = programs.draw(drawing, weights, batch, state, forward, mask)
        return cache, draft_cache, result, state, forward.experts

    return run


compiled = functools.cache(build)


def decode(
    kind: str | None, bench: Bench, rounds: int = 3, drafts: int = DRAFTS, config=TARGET, run=None, drawing=Drawing.FULL
) -> Rounds:
    mask = np.full((len(bench.batch.ints_BI), 1), EVERYTHING) if drawing is Drawing.FULL else None
    run = compiled(kind, config, drafts, drawing) if run is None else run
    (weights, draft_weights, *caches, batch, state), results = bench, []
    for _ in range(rounds):
        *caches, result, state, experts = run(weights, draft_weights, *caches, batch, state, mask)
        results.append((*result, experts))
    return Rounds(*(np.stack([np.asarray(x) for x in part]) for part in zip(*results, strict=True)))


def texts(result, length: int = 3) -> np.ndarray:
    """The first tokens of each row [B, length], from the rounds joined."""
    tokens, counts = np.asarray(result.tokens_RBT), np.asarray(result.counts_RB)
    emitted = np.arange(tokens.shape[2]) < counts[..., None]
    order = np.argsort(~emitted.transpose(1, 0, 2).reshape(tokens.shape[1], -1), axis=1, kind="stable")[:, :length]
    assert emitted.sum(axis=(0, 2)).min() >= length
    return np.take_along_axis(tokens.transpose(1, 0, 2).reshape(tokens.shape[1], -1), order, axis=1)


# ---- The distribution ----

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot, top-k": {"temperature": 1.7, "top_k": 4},
    "hot, top-p": {"temperature": 1.4, "top_p": 0.8},
    "cold, min-p": {"temperature": 0.7, "min_p": 0.1},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
    "everything": {
        "temperature": 1.2,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": ((5, 1.0),),
    },
}
BATCH = 4096
CALLS = 26


def oracle_params(setting: dict) -> Params:
    names = {"presence_penalty": "presence", "frequency_penalty": "frequency", "repetition_penalty": "repetition"}
    names["logit_bias"] = "bias"
    return Params(**{names.get(name, name): value for name, value in setting.items()})


@functools.cache
def logits_after(length: int) -> np.ndarray:
    """float64 [V] * length + [V]: of the prompt and each text of that length."""
    ends = np.array(list(np.ndindex(*[V] * length)), np.int32).reshape(V**length, length)
    tokens = np.concatenate([np.tile(np.array(PROMPT, np.int32), (len(ends), 1)), ends], axis=1)
    positions = np.tile(np.arange(tokens.shape[1]), (len(ends), 1))
    _, logits = oracle.forward(TARGET, *weights_of(TARGET, 0), {"tokens": tokens, "positions": positions})
    return logits[:, -1].reshape([V] * length + [V])


@functools.cache
def joint(name: str, length: int = 3) -> np.ndarray:
    """Probabilities of all texts of `length` tokens, [V] * length."""
    params, wanted = oracle_params(SETTINGS[name]), np.ones(())
    for done in range(length):
        laws = np.zeros([V] * done + [V])
        for text in np.ndindex(*[V] * done):
            if wanted[text]:
                laws[text], margin = distribution(logits_after(done)[text], params, PROMPT, text)
                # Far from a threshold that float32 could fall on the other side of.
                assert margin > 1e-5
        wanted = wanted[..., None] * laws
    return wanted


def mixed_rows(**more) -> list[Sequence]:
    """Every setting, in turn."""
    kinds = [sequence_of(**setting, **more) for setting in SETTINGS.values()]
    return [kinds[row % len(kinds)] for row in range(BATCH)]


def draw_texts(
    kind: str, run=None, draft_weights=None, spoil=None, calls: int = CALLS
) -> tuple[dict[str, np.ndarray], float]:
    """Texts [N, 3] of unseeded rows, for each setting; and the share of drafts accepted."""
    bench = prepare(kind, mixed_rows())
    if draft_weights is not None:
        bench = bench._replace(draft_weights=draft_weights)
    if spoil is not None:
        bench = bench._replace(draft_cache=jax.tree.map(spoil, bench.draft_cache))
    drawn, drafted, accepted = [], 0, 0
    for call in range(calls):
        # Seeds as an engine would choose them: no two rows have the same.
        bench.batch.ints_BI[:, columns.SEED_HIGH] = call + 1
        result = decode(kind, bench, run=run)
        drawn.append(texts(result))
        counts, of = np.asarray(result.counts_RB), np.asarray(result.drafted_RB)
        drafted, accepted = drafted + of.sum(), accepted + (counts[of > 0] - 1).sum()
    number, drawn = np.tile(np.arange(BATCH) % len(SETTINGS), calls), np.concatenate(drawn)
    return {name: drawn[number == index] for index, name in enumerate(SETTINGS)}, accepted / drafted


def misfits(drawn: dict[str, np.ndarray]) -> list[str]:
    """Settings whose texts can't have the joint distribution; their beginnings must fit too."""
    return [
        name
        for name, tokens in drawn.items()
        if not all(
            agrees(np.ravel_multi_index(tuple(tokens[:, :length].T), [V] * length), joint(name, length).ravel())
            for length in range(1, tokens.shape[1] + 1)
        )
    ]


@pytest.mark.parametrize(("kind", "least"), [("ngram", 0.05), ("layers", 0.3), ("model", 0.1)])
def test_drafts_of_any_kind_leave_the_distribution_of_texts_as_it_is(kind, least):
    drawn, accepted = draw_texts(kind)
    assert sum(len(tokens) for tokens in drawn.values()) >= 100_000
    # Both ways out of the verification were taken.
    assert least < accepted < 0.9
    assert misfits(drawn) == []


def test_the_comparison_detects_a_draft_that_misreports_its_distribution(monkeypatch):
    """Drawn with the temperature, reported without."""
    right, draw = programs_module.log_distribution, programs_module.draw

    def reported(logits_BV, rows, history, mask_BU):
        return right(logits_BV, rows._replace(temperature_B=jnp.ones_like(rows.temperature_B)), history, mask_BU)

    def drawn_from(log_probs_BV, rows, position_B):
        return draw(jax.nn.log_softmax(log_probs_BV / rows.temperature_B[:, None]), rows, position_B)

    monkeypatch.setattr(programs_module, "log_distribution", reported)
    monkeypatch.setattr(programs_module, "draw", drawn_from)
    drawn, _ = draw_texts("model", run=build("model"), calls=10)
    found = misfits(drawn)
    assert "temperature" in found and "plain" not in found


def test_a_draft_model_that_fails_after_some_tokens_leaves_the_distribution_as_it_is():
    """Whether it fails depends on what it drew: the drafts before must be judged as if it had not."""
    params, biases = weights_of(DRAFT, 1)
    table = np.array(params["embedding"]["table"])
    table[[1, 3, 7, 9]] = np.nan
    broken = params | {"embedding": {"table": table}}
    drawn, _ = draw_texts("model", draft_weights=to_device((broken, biases)), calls=12)
    assert misfits(drawn) == []


@pytest.mark.parametrize("kind", ["ngram", "layers", "model"])
def test_seeded_and_greedy_rows_emit_the_text_of_plain_decoding(kind):
    rows = mixed_rows(seed=1)
    rows[::9] = [sequence_of(temperature=0.0)] * len(rows[::9])
    plain = texts(decode(None, prepare(None, rows, drafts=0), drafts=0))
    result = decode(kind, prepare(kind, rows))
    np.testing.assert_array_equal(texts(result), plain)
    assert np.any(np.asarray(result.counts_RB) > 1)


def test_a_draft_cache_that_missed_tokens_leaves_the_distribution_as_it_is():
    """As after rounds without drafts: what lies there is of other texts."""
    rng = np.random.default_rng(6)
    drawn, accepted = draw_texts("model", spoil=lambda x: x + rng.normal(size=x.shape).astype(np.float32), calls=12)
    assert accepted > 0.01 and misfits(drawn) == []


# ---- What rounds emit ----


def repeated(*kinds: Sequence) -> list[Sequence]:
    """A whole batch of these, in turn, so that no further program has to be compiled."""
    return [kinds[row % len(kinds)] for row in range(BATCH)]


def greedy(max_tokens: int = 6, **params) -> Sequence:
    return sequence_of(max_tokens=max_tokens, temperature=0.0, **params)


def emitted(kind: str | None, rows: list[Sequence], rounds: int = 3):
    """The result, and the counts of its rounds for each kind of row, of which all rows have the same."""
    drafts = DRAFTS if kind else 0
    result = decode(kind, prepare(kind, rows, drafts=drafts), rounds, drafts)
    kinds = len(dict.fromkeys(rows))
    counts = np.asarray(result.counts_RB)
    for row in range(kinds):
        assert np.all(counts[:, row : BATCH - kinds : kinds] == counts[:, row, None])
    return result, counts[:, :kinds]


def test_a_row_takes_no_part_once_it_is_at_its_limit():
    assert emitted(None, repeated(greedy(2), greedy(1)))[1].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert emitted(None, repeated(greedy(3)))[1].tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("kind", [None, "ngram"])
def test_what_a_batch_needs_is_enough_for_it(kind):
    """Each way to draw gives what the one that can do everything gives, where it is enough."""
    settings = {
        Drawing.GREEDY: [{"temperature": 0.0}],
        Drawing.SAMPLED: [{"temperature": 0.0}, {}, {"temperature": 0.6}],
        Drawing.FILTERED: [
            {"temperature": 0.0},
            {},
            *(SETTINGS[n] for n in ("hot, top-k", "hot, top-p", "cold, min-p")),
        ],
    }
    drafts, params = DRAFTS if kind else 0, {}
    for drawing, kinds in settings.items():
        rows = repeated(*(sequence_of(**setting, **more) for setting in kinds for more in ({}, {"seed": 1})))
        params = {row_params(row, seed=0, max_context=WIDTH).drawing for row in rows}
        assert max(params) is drawing
        bench = prepare(kind, rows, drafts=drafts)
        if not drafts:
            bare = bench._replace(state=bench.state._replace(tokens_BW=None))
        own = decode(kind, bench if drafts else bare, drafts=drafts, drawing=drawing)
        full = decode(kind, bench, drafts=drafts)
        np.testing.assert_array_equal(own.counts_RB, full.counts_RB)
        np.testing.assert_array_equal(texts(own), texts(full))


@pytest.mark.parametrize("kind", [None, "ngram"])
def test_a_draw_without_branches_gives_what_one_with_them_gives(kind):
    drafts = DRAFTS if kind else 0
    for rows in (mixed_rows(), mixed_rows(seed=1, logprobs=2)):
        bench = prepare(kind, rows, drafts=drafts)
        branching = decode(kind, bench, drafts=drafts)
        straight = decode(kind, bench, drafts=drafts, run=build(kind, drafts=drafts, branches=False))
        np.testing.assert_array_equal(straight.counts_RB, branching.counts_RB)
        np.testing.assert_array_equal(texts(straight), texts(branching))
        if rows[0].request.params.logprobs:
            emitted = np.arange(straight.tokens_RBT.shape[2]) < straight.counts_RB[..., None]
            np.testing.assert_allclose(straight.chosen_RBT[emitted], branching.chosen_RBT[emitted], rtol=1e-5)
            np.testing.assert_array_equal(straight.top_ids_RBTL[emitted], branching.top_ids_RBTL[emitted])


@pytest.mark.parametrize(
    "setting", [SETTINGS["penalties"], {"logit_bias": ((5, 1.0),)}, {"temperature": 0.0, "logprobs": 0}]
)
def test_what_only_the_whole_draw_can_do(setting):
    assert row_params(sequence_of(**setting), seed=0, max_context=WIDTH).drawing is Drawing.FULL


def test_a_stop_token_is_emitted_and_nothing_after_it():
    # The penalty is there for texts that do not repeat themselves.
    first, second, _ = texts(emitted(None, repeated(greedy(frequency_penalty=2.0)))[0])[0].tolist()
    assert first != second
    stops = ((first,), (V - 1, second), ())
    rows = repeated(*(greedy(frequency_penalty=2.0, stop_ids=ids) for ids in stops))
    result, counts = emitted(None, rows)
    assert counts.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert np.asarray(result.tokens_RBT)[[0, 1], 1, 0].tolist() == [first, second]


@pytest.mark.parametrize("kind", ["ngram", "layers", "model"])
def test_a_stop_token_within_accepted_drafts_ends_the_row(kind):
    """The host cuts the text; here no further round may run for it."""
    rows = [sequence_of(max_tokens=9, stop_ids=(token,), temperature=0.9, seed=1) for token in range(V)]
    result = decode(kind, prepare(kind, repeated(*rows)))
    counts, emitted_tokens = np.asarray(result.counts_RB), np.asarray(result.tokens_RBT)
    within = 0
    for row in range(BATCH):
        stop = row % V
        hit = [stop in emitted_tokens[r, row, : counts[r, row]].tolist() for r in range(3)]
        first = hit.index(True) if True in hit else 3
        assert np.all(counts[:first, row] > 0) and np.all(counts[first + 1 :, row] == 0)
        within += first < 3 and emitted_tokens[first, row, counts[first, row] - 1] != stop
    assert within > 0


@pytest.mark.parametrize("kind", ["ngram", "layers", "model"])
def test_drafts_are_bounded_by_the_room_and_by_what_the_row_may_take(kind):
    rows = [sequence_of(max_tokens=limit, seed=1) for limit in (1, 2, 3, 9)]
    bench = prepare(kind, repeated(*rows, rows[3], rows[3]))
    bench.batch.ints_BI[4::6, columns.DRAFTS] = 0
    bench.batch.ints_BI[5::6, columns.DRAFTS] = 1
    result = decode(kind, bench)
    counts, drafted = np.asarray(result.counts_RB), np.asarray(result.drafted_RB)
    total = counts.sum(axis=0)
    assert np.all(counts >= 0) and np.all(counts <= drafted + 1)
    for number, limit in enumerate((1, 2, 3)):
        assert np.all(total[number::6] == limit)
    left = np.array([1, 2, 3, 9, 9, 9])[np.arange(BATCH) % 6] - np.cumsum(counts, axis=0) + counts
    may = np.array([2, 2, 2, 2, 0, 1])[np.arange(BATCH) % 6]
    if kind == "ngram":
        # Not every text goes on with something it had before; the prompt does.
        assert np.all(drafted <= np.minimum(np.maximum(left - 1, 0), may))
        assert np.all(drafted[0] == np.minimum(left[0] - 1, may))
    else:
        np.testing.assert_array_equal(drafted, np.where(left > 0, np.minimum(left - 1, may), 0))
    assert counts[:, 3::6].max() == DRAFTS + 1


@pytest.mark.parametrize("kind", [None, "layers"])
def test_log_probs_are_those_of_the_distribution_where_a_row_asks(kind):
    setting = SETTINGS["everything"] | {"max_tokens": 3, "seed": 1}
    asked, silent = sequence_of(**setting, logprobs=3), sequence_of(**setting)
    drafts = DRAFTS if kind else 0
    result = decode(kind, prepare(kind, repeated(asked, silent), drafts=drafts), drafts=drafts)
    counts, tokens = np.asarray(result.counts_RB), np.asarray(result.tokens_RBT)
    chosen, ids, values = (np.asarray(x) for x in result[3:6])
    assert ids.shape[-1] == MAX_TOP_LOGPROBS
    for row in range(0, 200, 2):
        text = []
        for r in range(3):
            for t in range(counts[r, row]):
                law, _ = distribution(
                    logits_after(len(text))[tuple(text)], oracle_params(SETTINGS["everything"]), PROMPT, text
                )
                token = tokens[r, row, t]
                assert chosen[r, row, t] == pytest.approx(np.log(law[token]), abs=1e-4)
                order = np.argsort(-law)[:3]
                assert ids[r, row, t, :3].tolist() == order.tolist()
                np.testing.assert_allclose(np.exp(values[r, row, t, :3]), law[order], atol=1e-5)
                text.append(token)
    assert not np.any(
        np.asarray(decode(kind, prepare(kind, repeated(silent), drafts=drafts), drafts=drafts).chosen_RBT)
    )


@pytest.mark.parametrize("kind", ["ngram", "layers", "model"])
def test_a_row_that_is_not_finite_is_marked_once_and_the_others_go_on(kind):
    rows = repeated(sequence_of(seed=1))
    right = decode(kind, prepare(kind, rows))
    bench = prepare(kind, rows)
    broken = [(k, v.at[3].set(jnp.nan)) for k, v in bench.cache]
    result = decode(kind, bench._replace(cache=broken))
    assert np.asarray(result.counts_RB)[:, 2].tolist() == [-1, 0, 0]
    others = np.arange(BATCH) != 2
    np.testing.assert_array_equal(np.asarray(result.counts_RB)[:, others], np.asarray(right.counts_RB)[:, others])
    np.testing.assert_array_equal(texts_of(result, others), texts_of(right, others))


def texts_of(result, rows: np.ndarray) -> np.ndarray:
    return texts(result._replace(tokens_RBT=result.tokens_RBT[:, rows], counts_RB=result.counts_RB[:, rows]))


def test_experts_count_those_that_live_rows_reach():
    config = moe(vocab_size=V, embed_dim=8, num_heads=2, num_kv_heads=1, max_positions=WIDTH)
    # The row that is done would go on with other tokens, which reach other experts.
    rows = [greedy(2), *(greedy(1, logit_bias=((token, 100.0),)) for token in (2, 5, 8))]
    result = decode(None, prepare(None, rows, config, 0), drafts=0, config=config)
    each = config.num_layers * config.moe.experts_per_token
    # All rows feed the same token, then one goes on alone, then nothing runs.
    assert np.asarray(result.experts_R).tolist() == [each, each, 0]
    assert not np.any(np.asarray(emitted(None, repeated(greedy(2)))[0].experts_R))


def test_a_prefill_draws_where_a_tile_ends_the_known_tokens():
    """Tiles of three tokens: the second one of a row reads what the first wrote."""
    tile, config = 3, TARGET
    sequences = [sequence_of(max_tokens=3, temperature=0.0, logprobs=1)] * 2 + [sequence_of(max_tokens=3, seed=1)]
    bench = prepare(None, sequences)
    tokens = np.array([PROMPT[:3], [PROMPT[3], 0, 0], PROMPT[:3]], np.int32)
    tiles = Tiles(tokens, np.array([0, 3, 0], np.int32), np.array([3, 1, 3], np.int32))
    bench.batch.page_table_BM[:, 0] = [1, 1, 2]
    bench.batch.ints_BI[2, columns.LENGTH] = tile
    empty = jax.tree.map(jnp.zeros_like, bench.cache)
    mask = np.full((3, 1), EVERYTHING)
    programs = make(None, config)
    state = bench.state._replace(length_B=bench.batch.ints_BI[:, columns.LENGTH], done_B=np.array([True, False, False]))
    *_, forward = jax.jit(programs.prefill)(bench.weights, None, empty, [], bench.batch, tiles)
    draw = jax.jit(programs.draw, static_argnums=0)
    result, after = draw(Drawing.FULL, bench.weights, bench.batch, state, forward, mask)
    assert np.asarray(result.counts_B).tolist() == [0, 1, 1]
    assert np.asarray(after.length_B).tolist() == [4, 5, 4]
    law = distribution(logits_after(0), Params(temperature=0.0))[0]
    assert np.asarray(result.tokens_BT)[1, 0] == np.argmax(law)
    assert np.asarray(result.chosen_BT)[1, 0] == pytest.approx(np.log(law.max()), abs=1e-4)
