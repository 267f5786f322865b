"""The engine against decoding one sequence at a time, one token at a time, by the plain forward: the same tokens,
however requests arrive, share a batch, are cut into tiles, turned out and computed again."""

import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serving.byte_tokenizer import byte_tokenizer
from serving.errors import Draining, QueueFull
from serving.request import SamplingParams
from serving.text import TextStream
from tests.model.tiny import VOCAB
from tests.serving.engines import CheckedEngine, Expected, Listener, NaiveDecoder, generate, start_tiny, submit

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)

# Each with a seed: a request without one gets the engine's, which depends on what came before.
STYLES = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0),
    "greedy, log-probabilities": SamplingParams(max_tokens=9, temperature=0.0, logprobs=3),
    "plain": SamplingParams(max_tokens=20, seed=1),
    "penalties": SamplingParams(
        max_tokens=30, seed=2, presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.4, logprobs=0
    ),
    "greedy, penalties": SamplingParams(max_tokens=25, temperature=0.0, frequency_penalty=0.9, repetition_penalty=1.2),
    "top-k": SamplingParams(max_tokens=15, seed=-3, temperature=1.7, top_k=5),
    "top-p": SamplingParams(max_tokens=18, seed=2**62, temperature=1.3, top_p=0.8, logprobs=20),
    "min-p": SamplingParams(max_tokens=10, seed=5, temperature=1.5, min_p=0.1),
    "bias": SamplingParams(max_tokens=16, seed=6, logit_bias=((7, 4.0), (9, -100.0))),
    "stop tokens": SamplingParams(max_tokens=30, seed=7, temperature=1.5, stop_ids=(3, 11, 50, 51, 52, 53, 54, 55)),
    "everything": SamplingParams(
        max_tokens=22,
        seed=8,
        temperature=1.2,
        top_k=30,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=-0.3,
        frequency_penalty=0.4,
        repetition_penalty=1.1,
        logit_bias=((1, 1.0),),
        logprobs=5,
    ),
}


def catalogue() -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Prompts of 1 to 63 tokens, most of which begin alike, with each style of sampling."""
    rng = np.random.default_rng(0)
    shared = rng.integers(VOCAB, size=40).tolist()
    requests = []
    for number, params in enumerate(STYLES.values()):
        for begin in (0, (8, 16, 24, 32)[number % 4]):
            own = rng.integers(VOCAB, size=rng.integers(1, 24)).tolist()
            requests.append((tuple(shared[:begin] + own), params))
    requests.append((tuple(rng.integers(VOCAB, size=63).tolist()), GREEDY))
    return requests


REQUESTS = catalogue()


@pytest.fixture(scope="module")
def server():
    server = start_tiny()
    yield server
    server.engine.stop()


@pytest.fixture(scope="module")
def naive(server):
    """With everything of the catalogue known, so that nothing is compiled later."""
    naive = NaiveDecoder(server)
    for request in REQUESTS:
        naive(*request)
    return naive


def shown(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> str:
    stream = TextStream(byte_tokenizer(), prompt)
    return "".join(stream.push(token) for token in tokens) + stream.finish()


def check(listener: Listener, prompt: tuple[int, ...], params: SamplingParams, expected: Expected) -> None:
    """All that a request got that ended by itself."""
    assert listener.tokens == expected.tokens and listener.finish == expected.finish
    assert listener.text == shown(prompt, expected.tokens)
    assert all(delta.usage is None and delta.finish is None for delta in listener.deltas[:-1])
    usage = listener.last.usage
    assert usage.prompt_tokens == len(prompt)
    # The token that stopped it was generated, too.
    assert usage.completion_tokens == len(expected.tokens) + (expected.finish == "stop")
    if params.logprobs is None:
        assert listener.logprobs == []
        return
    assert tuple(logprob.token for logprob in listener.logprobs) == expected.tokens
    np.testing.assert_allclose([logprob.logprob for logprob in listener.logprobs], expected.logprobs, atol=2e-5)
    for logprob, top in zip(listener.logprobs, expected.tops, strict=True):
        assert len(logprob.top) == len(top) and len(top) <= params.logprobs
        np.testing.assert_allclose([value for _, value in logprob.top], [value for _, value in top], atol=2e-5)
        # Where two are nearly tied their order is rounding's.
        if np.diff([value for _, value in top]).max(initial=-1.0) < -1e-4:
            assert [token for token, _ in logprob.top] == [token for token, _ in top]


@dataclasses.dataclass
class Entry:
    """A request of a script: which, the step after which it comes, and how many steps later it is cancelled."""

    index: int
    step: int = 0
    priority: int = 0
    cancel_after: int | None = None


class Play:
    """Submits and cancels by the engine's own count of steps, in its thread, so that a script is the same each time."""

    def __init__(self, engine: CheckedEngine, script: list[Entry]) -> None:
        self.engine = engine
        self.entries = sorted(enumerate(script), key=lambda item: item[1].step)
        self.waiting = list(self.entries)
        self.cancels: list[tuple[int, str]] = []
        self.listeners: dict[int, Listener] = {}
        engine.after_step = self.act

    def act(self, step: int) -> None:
        with self.engine.held():
            while self.waiting and self.waiting[0][1].step <= step:
                number, entry = self.waiting.pop(0)
                prompt, params = REQUESTS[entry.index]
                self.listeners[number] = submit(self.engine, f"r{number}", prompt, params, priority=entry.priority)
                if entry.cancel_after is not None:
                    self.cancels.append((step + entry.cancel_after, f"r{number}"))
            for _, id in [item for item in self.cancels if item[0] <= step]:
                self.engine.cancel(id)
            self.cancels = [item for item in self.cancels if item[0] > step]

    def run(self) -> dict[int, Listener]:
        while (listeners := self._all()) is None:
            # The engine has nothing to do before the next one comes.
            with self.engine.held():
                if self.waiting:
                    self.act(max(self.waiting[0][1].step, self.engine.steps))
            for listener in list(self.listeners.values()):
                listener.wait()
        return {number: listener.wait() for number, listener in listeners.items()}

    def _all(self) -> dict[int, Listener] | None:
        """Every listener; None while an entry waits. The engine's thread may be submitting the last one just now."""
        with self.engine.held():
            return None if self.waiting else dict(self.listeners)


def check_script(server, naive, script: list[Entry], **settings) -> CheckedEngine:
    expected = [naive(*REQUESTS[entry.index]) for entry in script]
    with server.engine_over(**settings) as engine, server.compiling_nothing():
        listeners = Play(engine, script).run()
    for number, (entry, want) in enumerate(zip(script, expected, strict=True)):
        listener = listeners[number]
        if entry.cancel_after is not None and listener.finish == "cancelled":
            assert listener.tokens == want.tokens[: len(listener.tokens)]
            assert listener.text == shown(REQUESTS[entry.index][0], listener.tokens)
        else:
            check(listener, *REQUESTS[entry.index], want)
    assert engine.scheduler.drained and engine.scheduler.pool.num_live == 0
    return engine


entries = st.builds(
    Entry,
    index=st.integers(0, len(REQUESTS) - 1),
    step=st.integers(0, 40),
    priority=st.integers(-1, 2),
    cancel_after=st.none() | st.integers(0, 12),
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    script=st.lists(entries, min_size=1, max_size=14),
    max_sequences=st.integers(1, 4),
    tiles=st.integers(1, 4),
    rounds_ahead=st.integers(1, 4),
    # The longest request has eight pages.
    num_pages=st.integers(9, 33),
    prefix_cache=st.booleans(),
)
@example([Entry(i) for i in range(len(REQUESTS))], 4, 4, 4, 33, True)
@example([Entry(i) for i in range(len(REQUESTS))], 4, 1, 3, 12, False)
def test_equals_naive_decoding(server, naive, script, max_sequences, tiles, rounds_ahead, num_pages, prefix_cache):
    check_script(
        server,
        naive,
        script,
        max_sequences=max_sequences,
        chunk_tokens=8 * tiles,
        rounds_ahead=rounds_ahead,
        num_pages=num_pages,
        prefix_cache=prefix_cache,
    )


def test_what_is_turned_out_goes_on_where_it_was(server, naive):
    longest = sorted(range(len(REQUESTS)), key=lambda i: len(REQUESTS[i][0]) + REQUESTS[i][1].max_tokens)[-6:]
    engine = check_script(server, naive, [Entry(i) for i in longest], num_pages=12)
    assert engine.preemptions > 0


def test_a_beginning_is_computed_once(server, naive):
    prompt, params = REQUESTS[7]
    assert len(prompt) > 16
    expected = naive(prompt, params)
    with server.engine_over() as engine, server.compiling_nothing():
        first, second = (generate(engine, id, prompt, params) for id in "ab")
        # While it runs, its pages are there for others already.
        both = [submit(engine, id, prompt, params) for id in "cd"]
        for listener in (first, second, *both):
            check(listener.wait(), prompt, params, expected)
    assert first.last.usage.cached_tokens == 0
    assert second.last.usage.cached_tokens == both[0].last.usage.cached_tokens == (len(prompt) - 1) // 8 * 8


def test_a_seed_gives_the_same_text_in_a_crowd(server, naive):
    prompt, params = REQUESTS[3][0], STYLES["everything"]
    want = naive(prompt, params)
    with server.engine_over() as engine, server.compiling_nothing():
        alone = generate(engine, "alone", prompt, params)
        with engine.held():
            crowd = [submit(engine, f"c{n}", *REQUESTS[n]) for n in range(6)]
            among = submit(engine, "among", prompt, params)
        for listener in (*crowd, among):
            listener.wait()
    check(alone, prompt, params, want)
    check(among, prompt, params, want)


def test_without_a_seed_texts_differ(server):
    params = SamplingParams(max_tokens=30)
    with server.engine_over() as engine, server.compiling_nothing():
        texts = [generate(engine, id, (1, 2, 3), params).tokens for id in "abc"]
    with server.engine_over() as engine, server.compiling_nothing():
        again = [generate(engine, id, (1, 2, 3), params).tokens for id in "abc"]
    assert len(set(texts)) == 3
    # The engine's own seed is fixed, so a run can be repeated.
    assert again == texts


def test_the_engine_as_it_was_started(server, naive):
    """With its own meter and metrics. Once only: the other engines write over what its prefix cache remembers."""
    with server.compiling_nothing():
        listeners = [submit(server.engine, f"r{n}", *request) for n, request in enumerate(REQUESTS)]
        for listener, request in zip(listeners, REQUESTS, strict=True):
            check(listener.wait(), *request, naive(*request))
    assert server.engine.alive and server.engine.ready
    wanted = [naive(*request) for request in REQUESTS]
    value = server.started.metrics.registry.get_sample_value
    assert value("generation_tokens_total") == sum(len(want.tokens) + (want.finish == "stop") for want in wanted)
    assert value("requests_total", {"outcome": "stop"}) == sum(want.finish == "stop" for want in wanted) > 0
    assert value("kv_pages", {"state": "live"}) is not None and value("decode_mbu") <= 1


# Ends


def test_a_stop_string_is_cut_off_wherever_it_ends(server, naive):
    prompt, params = (5, 6, 7), SamplingParams(max_tokens=20, seed=3)
    want = naive(prompt, params)
    whole = shown(prompt, want.tokens)
    with server.engine_over() as engine, server.compiling_nothing():
        for begin, size in ((0, 1), (3, 2), (7, 3), (len(whole) - 1, 1)):
            stop = whole[begin : begin + size]
            listener = generate(engine, "a", prompt, params, stop=(stop, "not there"))
            at = whole.index(stop)
            assert (listener.text, listener.finish) == (whole[:at], "stop")
            # Every character is a byte, and so a token, here.
            assert listener.tokens == want.tokens[: at + size]
            assert listener.last.usage.completion_tokens == at + size


def test_a_stop_string_that_only_begins_is_shown_in_the_end(server, naive):
    prompt, params = (5, 6, 7), SamplingParams(max_tokens=6, seed=3)
    want = naive(prompt, params)
    text = shown(prompt, want.tokens)
    with server.engine_over() as engine:
        listener = generate(engine, "a", prompt, params, stop=(text[-2:] + "x",))
    check(listener, prompt, params, want)


def test_stop_tokens_are_no_part_of_the_text(server, naive):
    prompt = (9, 8, 7)
    free = naive(prompt, SamplingParams(max_tokens=20, seed=4, logprobs=1))
    for at in (0, 4, 11):
        if free.tokens[at] in free.tokens[:at]:
            continue
        params = SamplingParams(max_tokens=20, seed=4, logprobs=1, stop_ids=(free.tokens[at],))
        want = naive(prompt, params)
        assert want.finish == "stop" and want.tokens == free.tokens[:at]
        with server.engine_over() as engine, server.compiling_nothing():
            check(generate(engine, "a", prompt, params), prompt, params, want)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 9])
def test_max_tokens(server, naive, tokens):
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    want = naive((1, 2), params)
    with server.engine_over() as engine:
        check(generate(engine, "a", (1, 2), params), (1, 2), params, want)
    assert want.finish == "length" and len(want.tokens) == tokens


@pytest.mark.parametrize("length", [31, 32, 60, 62, 63])
def test_the_longest_context(server, naive, length):
    prompt = tuple(np.random.default_rng(length).integers(VOCAB, size=length).tolist())
    params = SamplingParams(max_tokens=1000, temperature=0.0)
    want = naive(prompt, params)
    with server.engine_over() as engine, server.compiling_nothing():
        check(generate(engine, "a", prompt, params), prompt, params, want)
    assert len(want.tokens) == 64 - length


# What is refused


def test_refusals_say_why(server):
    with server.engine_over(max_queue=1) as engine:
        for prompt, params, message in (
            ((), GREEDY, "no token"),
            (tuple(range(64)), GREEDY, "max_context=64"),
            ((1, VOCAB), GREEDY, "prompt has a token outside of the vocabulary"),
            ((1, -1), GREEDY, "prompt has a token outside of the vocabulary"),
            ((1,), SamplingParams(max_tokens=1, logit_bias=((VOCAB, 1.0),)), "logit_bias has a token outside"),
        ):
            with pytest.raises(ValueError, match=message):
                submit(engine, "a", prompt, params)
        with pytest.raises(ValueError, match="a stop string is empty"):
            submit(engine, "a", (1,), GREEDY, stop=("",))
        with engine.held():
            first = submit(engine, "a", (1,), GREEDY)
            with pytest.raises(QueueFull) as full:
                submit(engine, "b", (1,), GREEDY)
        assert full.value.retry_after >= 1
        with pytest.raises(ValueError, match="belongs to a request that has not ended"), engine.held():
            submit(engine, "a", (1,), GREEDY)
        first.wait()
        # The id is free again.
        assert generate(engine, "a", (1,), GREEDY).finish == "length"


# The engine's own end


def test_drain_finishes_what_there_is(server, naive):
    prompt, params = REQUESTS[0]
    want = naive(prompt, params)
    with server.engine_over() as engine:
        listeners = [submit(engine, f"r{n}", prompt, params) for n in range(6)]
        assert engine.drain(60)
        with pytest.raises(Draining):
            submit(engine, "late", prompt, params)
        assert engine.scheduler.drained
        for listener in listeners:
            check(listener.wait(), prompt, params, want)


def test_drain_gives_up_in_time(server):
    gate, reached = threading.Event(), threading.Event()

    def slow(step: int) -> None:
        reached.set()
        gate.wait(30)

    with server.engine_over() as engine:
        engine.after_step = slow
        listener = submit(engine, "a", (1, 2), GREEDY)
        assert reached.wait(30)
        began = time.monotonic()
        assert not engine.drain(0.2)
        assert 0.2 <= time.monotonic() - began < 5
        gate.set()
        assert engine.drain(60)
    assert listener.finish == "length"


def test_stop_ends_everything(server):
    gate = threading.Event()
    with server.engine_over(max_sequences=2) as engine:
        engine.after_step = lambda step: gate.wait(30)
        with engine.held():
            listeners = [submit(engine, f"r{n}", (1, 2, n), STYLES["greedy"]) for n in range(5)]
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        while not engine._stopping:
            time.sleep(0.001)
        gate.set()
        stopper.join(30)
        assert not engine.alive
        assert [listener.wait().finish for listener in listeners] == ["cancelled"] * 5
        assert engine._answers == {} and engine.executor._params == {}
        with pytest.raises(Draining):
            submit(engine, "late", (1,), GREEDY)
