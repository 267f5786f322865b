"""Drafts of every kind in a serving engine: greedy and seeded texts are those of plain decoding, whatever else happens
to them, and no page or compilation is lost on the way.

How often drafts are taken is scripted, so that it doesn't depend on this machine's speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from checkpoint.huggingface import save_huggingface
from model.transformer import Definition
from serving.config import SpeculationConfig
from serving.controller import DraftController
from serving.grammar import GrammarCompiler
from serving.request import Delta, Request, SamplingParams
from serving.tokenizer import Tokenizer
from tests.serving.engines import MODEL, SHAPES, CheckedEngine, Listener, TinyServer, start_tiny, submit

DRAFTS = 3
KINDS = ("ngram", "layers", "model")
# One program of each kind: what is tested doesn't depend on how many there are.
FEW_SHAPES = dataclasses.replace(SHAPES, batch_sizes=(4,), widths=(64,), tile_counts=(2,))
PLAIN = (0,)
ALWAYS = (DRAFTS,)
# All lengths, and rounds without drafts between them, which leave holes in a draft model's cache.
CHANGING = (DRAFTS, 1, 0, 2, 0, 0, 0, DRAFTS)
POISON = 63
"""A token whose embedding some tests replace by NaN."""


class Scripted(DraftController):
    """Draft lengths in turn, and what became of each step: (rows, drafts of each)."""

    def __init__(self, lengths: Iterable[int]) -> None:
        super().__init__(range(DRAFTS + 1), FEW_SHAPES.batch_sizes)
        self._script = itertools.cycle(lengths)
        self.steps: list[tuple[int, int]] = []

    def choose(self, batch: int) -> int:
        return next(self._script)

    def update(self, batch, length, drafted, accepted, seconds) -> None:
        self.steps.append((batch, length))
        super().update(batch, length, drafted, accepted, seconds)


class Priced(DraftController):
    """The controller, with a draft at a tenth of the price of a round whatever this machine says."""

    def __init__(self) -> None:
        super().__init__(range(DRAFTS + 1), FEW_SHAPES.batch_sizes)
        for length in range(DRAFTS + 1):
            self.record_time(1, length, 0.0)

    def record_time(self, batch: int, length: int, seconds: float) -> None:
        super().record_time(batch, length, 1 + 0.1 * length)


def near_copy(definition: Definition):
    """The weights of the tiny server's model, 5% off: its drafts are often right, and not always."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rng = np.random.default_rng(5)
    params, biases = definition.init(jax.random.key(0), lambda names: device)
    return jax.tree.map(lambda x: (x * (1 + 0.05 * rng.standard_normal(x.shape))).astype(np.float32), params), biases


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory) -> TinyServer:
    match request.param:
        case "ngram":
            speculation = SpeculationConfig("ngram", max_draft=DRAFTS, max_batch=4)
        case "layers":
            speculation = SpeculationConfig("layers", max_draft=DRAFTS, max_batch=4, num_layers=1)
        case "model":
            folder = tmp_path_factory.mktemp("draft") / "weights"
            save_huggingface(folder, MODEL, *near_copy(Definition(MODEL, False, "float32")), dtype="float32")
            speculation = SpeculationConfig("model", max_draft=DRAFTS, max_batch=4, draft=str(folder))
    return start_tiny(shapes=FEW_SHAPES, speculation=speculation)


@pytest.fixture(scope="module")
def grammar():
    """Of a vocabulary of the model's size: 63 characters and an end token."""
    characters = [chr(code) for code in range(33, 126) if chr(code) not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ^_`|"]
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(characters[:POISON])}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    tokenizer = Tokenizer(backend.to_str(), end_ids=(POISON,))
    return GrammarCompiler(tokenizer, MODEL.vocab_size, (POISON,)).compile_regex("([a-d]{2}[0-9]){4}")


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    """Tokens that repeat themselves, so that there are n-grams to go on with."""
    rng = random.Random(seed)
    words = [[rng.randrange(POISON) for _ in range(3)] for _ in range(3)]
    return tuple(itertools.chain.from_iterable(rng.choice(words) for _ in range(length)))[:length]


GREEDY = {
    # Repetition makes n-grams right; a prompt of 40 tokens is computed in three steps, while others decode.
    f"greedy {length}": (prompt_of(length, length), SamplingParams(max_tokens=tokens, temperature=0.0))
    for length, tokens in ((5, 30), (1, 24), (40, 20), (17, 30), (9, 40))
}
SEEDED = {
    "seeded": (prompt_of(7, 1), SamplingParams(max_tokens=30, seed=11)),
    "cold": (prompt_of(12, 2), SamplingParams(max_tokens=30, temperature=0.5, seed=12)),
    "filtered": (
        prompt_of(9, 3),
        SamplingParams(max_tokens=25, temperature=1.3, top_k=9, top_p=0.9, min_p=0.02, seed=3),
    ),
    "penalised": (
        prompt_of(20, 4),
        SamplingParams(
            max_tokens=25, temperature=0.8, presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.1, seed=4
        ),
    ),
    "penalised greedy": (prompt_of(6, 5), SamplingParams(max_tokens=25, temperature=0.0, frequency_penalty=0.3)),
    "biased": (
        prompt_of(8, 6),
        SamplingParams(max_tokens=25, temperature=0.7, seed=5, logit_bias=((9, 2.0), (30, -5.0))),
    ),
    "logprobs": (prompt_of(33, 7), SamplingParams(max_tokens=25, temperature=0.6, seed=6, logprobs=4)),
    "greedy logprobs": (prompt_of(10, 8), SamplingParams(max_tokens=25, temperature=0.0, logprobs=2)),
}
UNSEEDED = {
    "unseeded": (prompt_of(11, 9), SamplingParams(max_tokens=30)),
    "unseeded filtered": (prompt_of(14, 10), SamplingParams(max_tokens=30, temperature=0.7, top_p=0.9)),
}
CONSTRAINED = {
    "grammar": (prompt_of(5, 11), SamplingParams(max_tokens=30, seed=7)),
    "greedy grammar": (prompt_of(6, 12), SamplingParams(max_tokens=30, temperature=0.0)),
}
Requests = dict[str, tuple[tuple[int, ...], SamplingParams]]


def shuffled(*groups: Requests) -> Requests:
    """Kinds of rows side by side in every batch."""
    requests = list(itertools.chain.from_iterable(group.items() for group in groups))
    random.Random(3).shuffle(requests)
    return dict(requests)


def serve(engine: CheckedEngine, requests: Requests, lengths: Iterable[int], grammar=None) -> dict[str, Listener]:
    """All of them at once, to their ends, with drafts of these lengths in turn."""
    engine._controller = Scripted(lengths)
    with engine.held():
        listeners = {
            id: submit(engine, id, prompt, params, grammar=grammar if "grammar" in id else None)
            for id, (prompt, params) in requests.items()
        }
    return {id: listener.wait() for id, listener in listeners.items()}


def plainly(server: TinyServer, requests: Requests, grammar=None) -> dict[str, Listener]:
    with server.engine_over(prefix_cache=False) as engine:
        return serve(engine, requests, PLAIN, grammar)


def assert_same(got: dict[str, Listener], want: dict[str, Listener], ids: Iterable[str]) -> None:
    for id in ids:
        assert (got[id].tokens, got[id].text, got[id].finish) == (want[id].tokens, want[id].text, want[id].finish), id
        assert [entry.token for entry in got[id].logprobs] == [entry.token for entry in want[id].logprobs]
        for ours, theirs in zip(got[id].logprobs, want[id].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4), id
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top], id
            assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-4), id


def metric(engine: CheckedEngine, name: str) -> float:
    return engine.metrics.registry.get_sample_value(name)


@pytest.fixture(scope="module")
def plain(server, grammar) -> dict[str, Listener]:
    return plainly(server, shuffled(GREEDY, SEEDED, CONSTRAINED, UNSEEDED), grammar)


@pytest.mark.parametrize("num_pages", [33, 14], ids=["room", "scarce pages"])
@pytest.mark.parametrize("lengths", [ALWAYS, CHANGING], ids=["always", "changing"])
def test_texts_of_a_mixed_batch_are_those_of_plain_decoding(server, grammar, plain, lengths, num_pages):
    requests = shuffled(GREEDY, SEEDED, CONSTRAINED, UNSEEDED)
    with server.compiling_nothing(), server.engine_over(num_pages=num_pages) as engine:
        served = serve(engine, requests, lengths, grammar)
        assert_same(served, plain, GREEDY | SEEDED | CONSTRAINED)
        for id, (_, params) in UNSEEDED.items():
            assert (len(served[id].tokens), served[id].finish) == (params.max_tokens, "length")
        assert (engine.preemptions > 0) == (num_pages == 14)
        assert metric(engine, "draft_accepted_tokens_total") > 0
        assert metric(engine, "draft_accepted_tokens_total") < metric(engine, "draft_tokens_total")


@pytest.mark.parametrize("lengths", [ALWAYS, CHANGING], ids=["always", "changing"])
def test_texts_of_a_greedy_batch_are_those_of_plain_decoding(server, plain, lengths):
    with server.compiling_nothing(), server.engine_over() as engine:
        assert_same(serve(engine, GREEDY, lengths), plain, GREEDY)
        assert metric(engine, "draft_tokens_total") > 0
        # With lengths that change, the few that are right depend on which step they meet.
        assert lengths is CHANGING or metric(engine, "draft_accepted_tokens_total") > 0


def test_prompts_that_begin_alike_share_pages_and_not_texts(server):
    shared = prompt_of(24, 13)
    requests = {
        "short": (shared[:18], SamplingParams(max_tokens=20, temperature=0.0)),
        "whole": (shared, SamplingParams(max_tokens=20, seed=1)),
        "other end": ((*shared, 5, 6), SamplingParams(max_tokens=20, temperature=0.8, seed=2)),
        "same prompt": (shared, SamplingParams(max_tokens=20, temperature=0.0)),
    }
    plain = plainly(server, requests)
    # A text that was generated with drafts is the beginning of the next prompt: its pages hold accepted drafts.
    continued = {
        "continued": ((*shared, *plain["whole"].tokens), SamplingParams(max_tokens=15, temperature=0.0)),
        "continued, seeded": ((*shared[:18], *plain["short"].tokens), SamplingParams(max_tokens=15, seed=8)),
    }
    plain |= plainly(server, continued)
    with server.engine_over() as engine:
        first = {id: requests[id] for id in ("whole", "short")}
        assert_same(serve(engine, first, CHANGING), plain, first)
        second = serve(engine, {id: requests[id] for id in ("other end", "same prompt")} | continued, ALWAYS)
        assert_same(second, plain, second)
        assert second["continued"].last.usage.cached_tokens >= 40
        assert second["same prompt"].last.usage.cached_tokens == 16


def test_a_row_that_is_cancelled_while_it_drafts_leaves_the_others_as_they_are(server, plain):
    requests = shuffled(GREEDY, SEEDED)
    cancelled = ("greedy 9", "seeded", "filtered", "greedy 5")
    with server.compiling_nothing(), server.engine_over() as engine:
        engine._controller = Scripted(ALWAYS)
        listeners = {}

        class Impatient(Listener):
            def __call__(self, delta: Delta) -> None:
                super().__call__(delta)
                if delta.finish is None and len(self.tokens) >= 5:
                    # Called while the next call, with its drafts, is under way.
                    engine.cancel(self.id)

        with engine.held():
            for id, (prompt, params) in requests.items():
                listeners[id] = Impatient() if id in cancelled else Listener()
                listeners[id].id = id
                engine.submit(Request(id, prompt, params, listeners[id]))
        for listener in listeners.values():
            listener.wait()
        assert_same(listeners, plain, requests.keys() - set(cancelled))
        for id in cancelled:
            tokens = listeners[id].tokens
            assert listeners[id].finish == "cancelled" and 5 <= len(tokens) < len(plain[id].tokens)
            assert tokens == plain[id].tokens[: len(tokens)]


@pytest.mark.parametrize("id", ["greedy 9", "cold"])
def test_an_end_within_accepted_drafts_is_where_plain_decoding_ends(server, plain, id):
    prompt, params = (GREEDY | SEEDED)[id]
    tokens, text = plain[id].tokens, plain[id].text
    # Each token is one character of the text.
    assert len(text) == len(tokens)
    # The end of it, as the answer to the rest: noise depends on the seed and the position alone, so it is the same
    # text, and by then it repeats itself.
    prompt, tokens, text = (*prompt, *tokens[:-10]), tokens[-10:], text[-10:]
    params = dataclasses.replace(params, max_tokens=10)
    limits = {f"{n} tokens": dataclasses.replace(params, max_tokens=n) for n in range(1, 9)}
    stops = {f"stop at {n}": dataclasses.replace(params, stop_ids=(tokens[n],)) for n in range(9)}
    with server.compiling_nothing(), server.engine_over() as engine:
        served = serve(engine, {name: (prompt, p) for name, p in (limits | stops).items()}, ALWAYS)
        strings = {n: submit(engine, f"string {n}", prompt, params, stop=(text[n : n + 2],)).wait() for n in range(8)}
        assert metric(engine, "draft_accepted_tokens_total") > 0
    for n in range(1, 9):
        ended = served[f"{n} tokens"]
        assert (ended.tokens, ended.finish) == (tokens[:n], "length")
    for n in range(9):
        ended, end = served[f"stop at {n}"], tokens.index(tokens[n])
        assert (ended.tokens, ended.text, ended.finish) == (tokens[:end], text[:end], "stop")
        assert ended.last.usage.completion_tokens == end + 1
    for n, ended in strings.items():
        end = text.index(text[n : n + 2])
        assert (ended.text, ended.finish) == (text[:end], "stop")
        assert ended.tokens == tokens[: end + 2]


@contextmanager
def loaded(server: TinyServer, weights=None, draft=None) -> Iterator[None]:
    """With other weights than it was started with."""
    runner = server.started.runner
    own = runner._weights
    runner.load(own[0] if weights is None else weights, own[1] if draft is None else draft)
    try:
        yield
    finally:
        runner.load(*own)


def poisoned(weights, token: int):
    """With NaN in the embedding of one token."""
    params, biases = weights
    table = np.array(params["embedding"]["table"])
    table[token] = np.nan
    return params | {"embedding": params["embedding"] | {"table": jax.device_put(table)}}, biases


def test_a_row_that_is_not_finite_fails_alone(server):
    never, often = ((POISON, -100.0),), ((POISON, 1.5),)
    healthy = {
        "greedy": (prompt_of(9, 21), SamplingParams(max_tokens=30, temperature=0.0, logit_bias=never)),
        "seeded": (prompt_of(6, 22), SamplingParams(max_tokens=30, seed=1, logit_bias=never)),
        "later": (prompt_of(30, 23), SamplingParams(max_tokens=20, temperature=0.0, logit_bias=never)),
    }
    failing = {
        f"emits {n}": (prompt_of(8, 30 + n), SamplingParams(max_tokens=40, seed=n, logit_bias=often)) for n in range(4)
    }
    failing["in the prompt"] = ((*prompt_of(4, 25), POISON, 3), SamplingParams(max_tokens=20, temperature=0.0))
    with loaded(server, poisoned(server.started.runner._weights[0], POISON)):
        plain = plainly(server, failing | healthy)
        with server.compiling_nothing(), server.engine_over(num_pages=20) as engine:
            served = serve(engine, failing | healthy, ALWAYS)
            assert_same(served, plain, healthy)
            assert served["in the prompt"].tokens == ()
            assert sum(listener.finish == "error" for listener in served.values()) >= 3
            for id in failing:
                tokens = served[id].tokens
                assert served[id].finish == plain[id].finish and tokens == plain[id].tokens[: len(tokens)]
            # Their pages, with NaN in them, go to others; and what is like them finds nothing of theirs.
            again = {id: (prompt, params) for id, (prompt, params) in healthy.items()}
            assert_same(serve(engine, again, ALWAYS), plain, again)


# The other kinds have no weights and no cache of their own.
of_draft_model = pytest.mark.parametrize("server", ["model"], indirect=True)


@of_draft_model
@pytest.mark.parametrize("fill", [np.nan, np.inf, 30.0])
def test_whatever_a_draft_model_finds_in_its_cache_changes_no_text(server, plain, fill):
    """Rounds without drafts leave holes there, with what an earlier sequence wrote."""
    runner, requests = server.started.runner, shuffled(GREEDY, SEEDED, UNSEEDED)

    def spoil(step: int) -> None:
        if step % 3 == 0:
            runner._draft_cache = jax.tree.map(lambda pages: jnp.full_like(pages, fill), runner._draft_cache)

    with server.engine_over(num_pages=20) as engine:
        engine.after_step = spoil
        assert_same(serve(engine, requests, ALWAYS), plain, GREEDY | SEEDED)
        assert metric(engine, "draft_tokens_total") > 0


@of_draft_model
def test_a_draft_model_that_is_not_finite_after_a_token_changes_no_text(server, plain):
    common = max(set(plain["greedy 9"].tokens), key=plain["greedy 9"].tokens.count)
    draft = poisoned(server.started.runner._weights[1], common)
    with loaded(server, draft=draft), server.engine_over() as engine:
        assert_same(serve(engine, shuffled(GREEDY, SEEDED), ALWAYS), plain, GREEDY | SEEDED)
        assert metric(engine, "draft_accepted_tokens_total") > 0


# ---- The controller ----


def consistent(engine: CheckedEngine) -> bool:
    stats = engine._controller.stats
    names = {
        "draft_tokens_total": stats.drafted,
        "draft_accepted_tokens_total": stats.accepted,
        "draft_rounds_total": stats.rounds,
        "draft_emitted_tokens_total": stats.emitted,
    }
    return {name: metric(engine, name) for name in names} == names


@of_draft_model
def test_drafts_that_are_always_right_are_taken_at_batch_1(server, plain):
    with loaded(server, draft=server.started.runner._weights[0]), server.engine_over() as engine:
        engine._controller = Priced()
        got = {id: submit(engine, id, *(GREEDY | SEEDED)[id]).wait() for id in ("greedy 9", "seeded", "greedy 5")}
        assert_same(got, plain, got)
        stats = engine._controller.stats
        assert engine._controller.choose(1) == DRAFTS
        # All but the drafts after rounds without any, where there was a hole.
        assert stats.acceptance > 0.9 and stats.tokens_per_round > 0.75 * (DRAFTS + 1)
        assert consistent(engine)


@of_draft_model
def test_drafts_that_are_never_right_are_given_up(server, plain):
    params, biases = server.started.runner._weights[1]
    unlikely = params | {"lm_head": -params["lm_head"]}, biases
    with loaded(server, draft=unlikely), server.engine_over() as engine:
        engine._controller = Priced()
        ids = [*GREEDY, "penalised greedy"]
        assert_same(serve_as_is(engine, ids), plain, ids)
        stats = engine._controller.stats
        # The running estimate begins at the prior, and stays where drafts stop to pay: at the price of one, a tenth.
        assert stats.acceptance < 0.1 and engine._controller._best(4, 1) == 0
        assert stats.plain_rounds > stats.rounds > 0 and consistent(engine)


def serve_as_is(engine: CheckedEngine, ids: Iterable[str]) -> dict[str, Listener]:
    return {id: submit(engine, id, *(GREEDY | SEEDED)[id]).wait() for id in ids}


def test_a_batch_above_max_batch_decodes_plainly(server, plain):
    with server.compiling_nothing(), server.engine_over() as engine:
        engine._max_draft_batch = 2
        got = serve(engine, GREEDY | SEEDED, ALWAYS)
        assert_same(got, plain, got)
        assert consistent(engine)
        steps = engine._controller.steps
    assert {rows for rows, drafts in steps if drafts} <= {1, 2} and (4, 0) in steps
    # And again with drafts once there is room, over what the plain rounds left.
    assert any(drafts for _, drafts in steps[steps.index((4, 0)) :])


def test_metrics_are_those_of_the_controller(server, grammar):
    with server.engine_over() as engine:
        serve(engine, shuffled(GREEDY, SEEDED, CONSTRAINED, UNSEEDED), CHANGING, grammar)
        stats = engine._controller.stats
        assert consistent(engine) and 0 < stats.accepted < stats.drafted and stats.plain_rounds
        assert metric(engine, "acceptance_rate") == pytest.approx(stats.accepted / stats.drafted)


def test_batches_too_large_for_drafts_are_served_too():
    """As `start` gives it: with programs of 2 and of 4 rows, and drafts for batches of 2 alone."""
    speculation = SpeculationConfig(kind="ngram", max_draft=2, max_batch=2)
    server = start_tiny(shapes=dataclasses.replace(SHAPES, widths=(64,), max_context=64), speculation=speculation)
    try:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        listeners = [submit(server.engine, f"r{i}", (1, 2, 3, 1, 2, 3, 1 + i), params) for i in range(4)]
        assert [listener.wait().finish for listener in listeners] == ["length"] * 4
        assert server.engine.alive and server.engine.speculation.plain_rounds > 0
    finally:
        server.engine.stop()
