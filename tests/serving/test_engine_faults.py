"""What goes wrong with one request, or ends it early, leaves the others their exact texts, and the pages to all."""

import logging
import time
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from serving import batch as columns
from serving import executor
from serving.batch import RowBatch
from serving.engine import FAILED, STOPPED
from serving.errors import Draining
from serving.request import Request, SamplingParams
from tests.model.tiny import VOCAB
from tests.serving.engines import Listener, NaiveDecoder, generate, start_tiny, submit

POISON = VOCAB - 1
"""A token whose embedding is NaN in some tests. No other request has it, in its prompt or its text."""
NEVER = ((POISON, -100.0),)
MARK = 666_666
"""Seed of the request that makes its call fail."""

RNG = np.random.default_rng(5)
PROMPTS = [tuple(RNG.integers(POISON, size=size).tolist()) for size in (3, 9, 17, 20, 26, 40)]
PARAMS = [
    SamplingParams(max_tokens=14, temperature=0.0, logit_bias=NEVER),
    SamplingParams(max_tokens=22, seed=1, logit_bias=NEVER, frequency_penalty=0.5),
    SamplingParams(max_tokens=18, seed=2, logit_bias=NEVER, temperature=1.4, top_p=0.9),
]
OTHERS = [(prompt, PARAMS[number % 3]) for number, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def server():
    server = start_tiny()
    yield server
    server.engine.stop()


@pytest.fixture(scope="module")
def naive(server):
    naive = NaiveDecoder(server)
    for request in OTHERS:
        naive(*request)
    return naive


@pytest.fixture(autouse=True)
def _quiet():
    """Failures are logged with their tracebacks, which say nothing here."""
    logger = logging.getLogger("serving.engine")
    logger.disabled = True
    yield
    logger.disabled = False


def submit_others(engine, prefix: str = "other", **more) -> list[Listener]:
    return [submit(engine, f"{prefix}{n}", *request, **more) for n, request in enumerate(OTHERS)]


def check_others(listeners: list[Listener], naive) -> None:
    for listener, request in zip(listeners, OTHERS[: len(listeners)], strict=True):
        want = naive(*request)
        assert (listener.wait().tokens, listener.finish, listener.last.error) == (want.tokens, want.finish, None)


def check_idle(engine) -> None:
    """Nothing is left of any request."""
    assert engine.drain(60)
    assert engine.alive and engine.scheduler.drained and engine.executor._params == {}
    assert engine.scheduler.pool.num_live == 0


# Numbers


@contextmanager
def poisoned(runner):
    """Weights with a NaN embedding."""
    (params, biases), draft = sound = runner._weights
    table = params["embedding"]["table"]
    broken = np.array(table)
    broken[POISON] = np.nan
    embedding = params["embedding"] | {"table": jax.device_put(broken, table.sharding)}
    runner._weights = ((params | {"embedding": embedding}, biases), draft)
    yield
    runner._weights = sound


@pytest.mark.parametrize(
    ("prompt", "params", "num_tokens"),
    [
        pytest.param((1, 2, POISON, 3), SamplingParams(max_tokens=9), 0, id="in a prompt"),
        pytest.param(
            (*PROMPTS[5][:33], POISON), SamplingParams(max_tokens=9, temperature=0.0), 0, id="in its last tile"
        ),
        pytest.param(
            PROMPTS[4], SamplingParams(max_tokens=9, seed=3, logit_bias=((POISON, 100.0),)), 1, id="while decoding"
        ),
    ],
)
def test_logits_that_are_not_finite(server, naive, prompt, params, num_tokens):
    # Few pages: what the failed one wrote is soon somebody else's.
    with poisoned(server.started.runner), server.compiling_nothing(), server.engine_over(num_pages=16) as engine:
        with engine.held():
            failing = submit(engine, "failing", prompt, params)
            others = submit_others(engine)
        assert failing.wait().finish == "error"
        assert failing.last.error == "the model's logits are not finite"
        assert len(failing.tokens) == num_tokens
        check_others(others, naive)
        check_others(submit_others(engine, "again"), naive)
        check_idle(engine)


def test_pages_of_a_failed_request_are_given_to_nobody(server, naive):
    """Its keys may be wrong though its tokens are those of the next one."""
    runner = server.started.runner
    prompt = (*PROMPTS[5][:4], POISON, *PROMPTS[5][5:30])
    params = SamplingParams(max_tokens=5, temperature=0.0, logit_bias=NEVER)
    want = naive(prompt, params)
    with server.engine_over(chunk_tokens=8) as engine, server.compiling_nothing():
        with poisoned(runner):
            assert generate(engine, "a", prompt, params).finish == "error"
        assert engine.scheduler.pool.num_cached == 0
        listener = generate(engine, "b", prompt, params)
        assert (listener.tokens, listener.last.usage.cached_tokens) == (want.tokens, 0)


# Calls that raise


class Faults:
    """Raises in place of, or after, each call that the marked request is in; `times` of them at most."""

    def __init__(self, runner, monkeypatch, *, where: str, kind: str, times: int) -> None:
        self.left, self.where, self.runner = times, where, runner
        self.count = 0
        if where == "result":
            fetch = executor._fetch
            monkeypatch.setattr(executor, "_fetch", lambda call: self.fetched(fetch, call))
        else:
            monkeypatch.setattr(runner, kind, self.wrapped(getattr(runner, kind)))

    def due(self, marked: bool) -> bool:
        if not marked or not self.left:
            return False
        self.left -= 1
        self.count += 1
        return True

    def wrapped(self, call):
        def run(*arguments):
            batch = next(argument for argument in arguments if isinstance(argument, RowBatch))
            if not self.due(bool((np.asarray(batch.ints_BI)[:, columns.SEED_LOW] == MARK).any())):
                return call(*arguments)
            if self.where == "cache":
                call(*arguments)
                for array in jax.tree.leaves((self.runner._cache, self.runner._draft_cache)):
                    array.delete()
            raise RuntimeError("injected")

        return run

    def fetched(self, fetch, call):
        if self.due(any(sequence.request.params.seed == MARK for sequence in call.sequences)):
            raise RuntimeError("injected")
        return fetch(call)


MARKED = SamplingParams(max_tokens=11, seed=MARK, logit_bias=NEVER)


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("call", "prefill"),
        ("call", "decode"),
        ("call", "draw"),
        ("result", "any"),
        ("cache", "prefill"),
        ("cache", "decode"),
    ],
)
@pytest.mark.parametrize("times", [1000, 1], ids=["always", "once"])
def test_a_call_that_raises(server, naive, monkeypatch, where, kind, times):
    """ "cache": it takes the cache along, as a call does that fails on the device."""
    want = naive(PROMPTS[4], MARKED)
    with server.engine_over(chunk_tokens=16) as engine, server.compiling_nothing():
        # Their pages are in the prefix cache when the call fails.
        check_others(submit_others(engine, "before"), naive)
        with engine.held():
            others = submit_others(engine, "ahead")
            failing = submit(engine, "failing", PROMPTS[4], MARKED)
            behind = submit_others(engine, "behind")
            faults = Faults(server.started.runner, monkeypatch, where=where, kind=kind, times=times)
        failing.wait()
        assert faults.count == 1 if times == 1 else faults.count >= 2
        # Decoding that always takes the cache along is done by prefills instead, which work.
        if times == 1 or (where, kind) == ("cache", "decode"):
            assert (failing.finish, failing.tokens) == ("length", want.tokens)
        else:
            assert (failing.finish, failing.last.error) == ("error", FAILED)
            assert failing.tokens == want.tokens[: len(failing.tokens)]
        check_others(others, naive)
        check_others(behind, naive)
        monkeypatch.undo()
        check_others(submit_others(engine, "again"), naive)
        assert generate(engine, "again", PROMPTS[4], MARKED).tokens == want.tokens
        check_idle(engine)


def test_an_engine_that_breaks_leaves_nobody_waiting(server, monkeypatch):
    def broken(lookahead):
        raise RuntimeError("injected")

    with server.engine_over(max_sequences=2) as engine:
        with engine.held():
            listeners = submit_others(engine)
            engine.after_step = lambda step: step == 3 and monkeypatch.setattr(engine.scheduler, "schedule", broken)
        for listener in listeners:
            assert (listener.wait().finish, listener.last.error) == ("error", STOPPED)
        engine._thread.join(30)
        assert not engine.alive
        with pytest.raises(Draining):
            submit(engine, "late", *OTHERS[0])
        assert engine.drain(1)


# Pages


def test_a_request_that_has_every_page_ends(server, naive):
    prompt, params = PROMPTS[3], SamplingParams(max_tokens=40, temperature=0.0)
    want = naive(prompt, params)
    with server.engine_over(num_pages=5) as engine, server.compiling_nothing():
        listener = generate(engine, "a", prompt, params)
        # Four pages hold 32 tokens, and the last token needs no place.
        assert (listener.finish, listener.tokens) == ("length", want.tokens[: 33 - len(prompt)])
        with pytest.raises(ValueError, match=r"shorten it, or raise num_pages=5"):
            submit(engine, "b", tuple(range(33)), params)
        # Two that fit alone and not together: the one turned out finishes too.
        with engine.held():
            others = [submit(engine, f"other{n}", *request) for n, request in enumerate(OTHERS[:2])]
        check_others(others, naive)
        check_idle(engine)


# Listeners


def test_a_listener_that_raises_ends_its_request(server, naive):
    calls = []

    def broken(delta):
        calls.append(delta)
        raise RuntimeError("injected")

    with server.engine_over(rounds_ahead=1) as engine, server.compiling_nothing():
        with engine.held():
            others = submit_others(engine)
            engine.submit(Request("failing", PROMPTS[0], SamplingParams(max_tokens=40, seed=3), broken))
        check_others(others, naive)
        check_idle(engine)
    assert calls[-1].finish == "cancelled" and sum(len(delta.tokens) for delta in calls) < 40


# Ends from outside


def at_step(engine, number: int, action) -> None:
    engine.after_step = lambda step: action() if step == number else None


def test_deadline_in_the_queue(server, naive):
    with server.engine_over(max_sequences=1) as engine, server.compiling_nothing():
        with engine.held():
            others = submit_others(engine)
            late = submit(engine, "late", PROMPTS[0], PARAMS[0], deadline=time.monotonic() - 1)
        assert (late.wait().finish, late.tokens, late.last.usage.completion_tokens) == ("deadline", (), 0)
        assert late.last.usage.first_token_seconds is None
        check_others(others, naive)
        check_idle(engine)


@pytest.mark.parametrize(("steps", "tokens"), [(3, 0), (10, 3)], ids=["mid-prefill", "decoding"])
def test_deadline_while_running(server, naive, steps, tokens):
    """The prompt of 40 tokens takes 5 steps, and each after them one token or more."""
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias=NEVER)
    want = naive(PROMPTS[5], params)
    deadline = time.monotonic() + 500
    with server.engine_over(chunk_tokens=8, rounds_ahead=1) as engine, server.compiling_nothing():
        clock = lambda: time.monotonic() + 1000  # noqa: E731
        at_step(engine, steps, lambda: setattr(engine.scheduler, "_clock", clock))
        late = submit(engine, "late", PROMPTS[5], params, deadline=deadline)
        assert late.wait().finish == "deadline"
        assert tokens <= len(late.tokens) < 20 and late.tokens == want.tokens[: len(late.tokens)]
        assert bool(late.tokens) == bool(tokens)
        check_others(submit_others(engine), naive)
        check_idle(engine)


@pytest.mark.parametrize("state", ["queued", "mid-prefill", "decoding", "before any step"])
def test_cancel(server, naive, state):
    params = SamplingParams(max_tokens=20, temperature=0.0, logit_bias=NEVER)
    prompt, rows = PROMPTS[5], 1 if state == "queued" else 4
    want = naive(prompt, params)
    with server.engine_over(max_sequences=rows, chunk_tokens=8, rounds_ahead=1) as engine, server.compiling_nothing():
        at_step(engine, {"mid-prefill": 3, "decoding": 10}.get(state, 1), lambda: engine.cancel("gone"))
        with engine.held():
            first = submit(engine, "first", *OTHERS[3]) if state == "queued" else None
            gone = submit(engine, "gone", prompt, params)
            if state == "before any step":
                engine.cancel("gone")
        assert gone.wait().finish == "cancelled"
        assert gone.tokens == want.tokens[: len(gone.tokens)]
        assert (3 <= len(gone.tokens) < 20) if state == "decoding" else not gone.tokens
        if first is not None:
            assert first.wait().tokens == naive(*OTHERS[3]).tokens
        engine.after_step = lambda step: None
        engine.cancel("gone")
        engine.cancel("never known")
        # What it had computed is right, and serves the next one.
        again = generate(engine, "gone", prompt, params)
        assert (again.tokens, again.finish) == (want.tokens, "length")
        assert bool(again.last.usage.cached_tokens) == (state in ("mid-prefill", "decoding"))
        check_others(submit_others(engine), naive)
        check_idle(engine)
