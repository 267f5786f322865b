"""The programs that decode: when rounds end and what they emit; and that a text drawn through them, with drafts of any
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
from serving.batch import DecodeBatch, PrefillBatch, row_params
from serving.programs import Drafting, Programs
from serving.request import MAX_TOP_LOGPROBS, Request, SamplingParams, Sequence
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


def make(kind: str | None, config=TARGET, rounds: int = 3) -> Programs:
    drafting = None
    match kind:
        case "ngram":
            drafting = Drafting("ngram", DRAFTS)
        case "layers":
            drafting = Drafting("layers", DRAFTS, num_layers=1)
        case "model":
            drafting = Drafting("model", DRAFTS, None, Definition(DRAFT, False, "float32"), execution(DRAFT))
    return Programs(Definition(config, False, "float32"), execution(config), rounds, drafting)


def sequence_of(prompt=PROMPT, **params) -> Sequence:
    request = Request("r", tuple(prompt), SamplingParams(**({"max_tokens": 3} | params)), lambda delta: None)
    return Sequence(request, list(prompt))


class Bench(NamedTuple):
    """Rows that have computed all of their prompts but the last token; row r owns page r + 1."""

    weights: tuple
    draft_weights: tuple | None
    cache: list
    draft_cache: list
    batch: DecodeBatch


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
    batch = DecodeBatch(ints, floats, np.arange(1, rows + 1, dtype=np.int32)[:, None], tokens)
    weights = to_device(weights_of(config, 0))
    draft_weights = to_device(weights_of(DRAFT, 1)) if kind == "model" else None
    cache = computed(config, weights, prompt, rows)
    return Bench(
        weights, draft_weights, cache, computed(DRAFT, draft_weights, prompt, rows) if draft_weights else [], batch
    )


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


@functools.cache
def compiled(kind: str | None, config=TARGET, drafts: int = DRAFTS):
    return jax.jit(functools.partial(make(kind, config).decode, drafts))


def decode(kind: str | None, bench: Bench, rounds: int = 3, drafts: int = DRAFTS, config=TARGET, run=None):
    mask = np.full((len(bench.batch.ints_BI), 1), EVERYTHING)
    run = compiled(kind, config, drafts) if run is None else run
    return run(*bench[:4], bench.batch, mask, np.int32(rounds))[2]


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


def draw_texts(kind: str, run=None, draft_weights=None) -> tuple[dict[str, np.ndarray], float]:
    """Texts [N, 3] of unseeded rows, for each setting; and the share of drafts accepted."""
    bench = prepare(kind, mixed_rows())
    if draft_weights is not None:
        bench = bench._replace(draft_weights=draft_weights)
    drawn, drafted, accepted = [], 0, 0
    for call in range(CALLS):
        # Seeds as an engine would choose them: no two rows have the same.
        bench.batch.ints_BI[:, columns.SEED_HIGH] = call + 1
        result = decode(kind, bench, run=run)
        drawn.append(texts(result))
        counts, of = np.asarray(result.counts_RB), np.asarray(result.drafted_RB)
        drafted, accepted = drafted + of.sum(), accepted + (counts[of > 0] - 1).sum()
    number, drawn = np.tile(np.arange(BATCH) % len(SETTINGS), CALLS), np.concatenate(drawn)
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
    drawn, _ = draw_texts("model", run=jax.jit(functools.partial(make("model").decode, DRAFTS)))
    assert {"temperature", "hot, top-p"} <= set(misfits(drawn))


def test_a_draft_model_that_fails_after_some_tokens_leaves_the_distribution_as_it_is():
    """Whether it fails depends on what it drew: the drafts before must be judged as if it had not."""
    params, biases = weights_of(DRAFT, 1)
    table = np.array(params["embedding"]["table"])
    table[[1, 3, 7, 9]] = np.nan
    broken = params | {"embedding": {"table": table}}
    drawn, _ = draw_texts("model", draft_weights=to_device((broken, biases)))
    assert misfits(drawn) == []


@pytest.mark.parametrize("kind", ["ngram", "layers", "model"])
def test_seeded_and_greedy_rows_emit_the_text_of_plain_decoding(kind):
    rows = mixed_rows(seed=1)
    rows[::9] = [sequence_of(temperature=0.0)] * len(rows[::9])
    plain = texts(decode(None, prepare(None, rows, drafts=0), drafts=0))
    result = decode(kind, prepare(kind, rows))
    np.testing.assert_array_equal(texts(result), plain)
    assert np.any(np.asarray(result.counts_RB) > 1)
