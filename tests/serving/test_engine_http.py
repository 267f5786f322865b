"""The real engine behind the real server, asked by OpenAI's own client: a random model's text shows every field."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jax
import openai
import pytest

from parallel.mesh import MeshConfig
from serving import utilization
from serving.config import ServeRun
from serving.resolve import resolve
from serving.startup import Started, start
from tests.serving.fake_engine import events, serving, wait_until
from tests.serving.tiny_folder import CONTEXT, END, FAST, SHAPES, write_tiny_folder

NAME = "tiny"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")
    run = ServeRun(
        name=NAME,
        source=str(folder),
        dtype="float32",
        mesh=MeshConfig(fsdp=1, tensor=1),
        engine=SHAPES,
        xla_options=FAST,
    )
    started = start(resolve(run, jax.devices()[:1]), lambda line: None)
    try:
        yield started
        # Of all the tests below, in whatever order.
        assert started.compilations.count == 0
        assert metric_of(started, "compiles_after_ready_total") == 0
    finally:
        started.engine.stop()
        started.compilations.stop()


def metric_of(started: Started, name: str, **labels: str) -> float:
    value = started.metrics.registry.get_sample_value(name, labels)
    assert value is not None, name
    return value


@pytest.fixture(scope="module")
def url(started: Started) -> Iterator[str]:
    with serving(started.engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str = "hello", **fields):
    """The only choice of a completion; fields that OpenAI does not have go in the body."""
    return completion(client, prompt, **fields).choices[0]


def completion(client: openai.OpenAI, prompt: str = "hello", **fields):
    extra = {key: fields.pop(key) for key in ("min_p", "top_k", "repetition_penalty", "ignore_eos") if key in fields}
    return client.completions.create(model=NAME, prompt=prompt, extra_body=extra, **fields)


def tokens_of(client: openai.OpenAI, **fields) -> list[str]:
    return complete(client, logprobs=0, **fields).logprobs.tokens


def test_greedy_is_the_most_likely_token_each_time(client: openai.OpenAI):
    found = complete(client, temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
    assert found.finish_reason == "length" and len(found.logprobs.tokens) == 12
    for token, value, top in zip(
        found.logprobs.tokens, found.logprobs.token_logprobs, found.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3 and value == max(top.values()) == top[token]
        assert -math.log(260) <= value < 0
        assert sum(map(math.exp, top.values())) < 1
    again = complete(client, temperature=0, max_tokens=12, ignore_eos=True)
    assert again.text == found.text and again.logprobs is None


def test_a_stream_is_the_whole_answer(client: openai.OpenAI):
    arguments = dict(model=NAME, messages=HELLO, seed=5, n=3, max_tokens=40, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for i, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == i]
        assert len(mine) > 3
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        streamed = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
        assert [entry.token for entry in streamed] == [entry.token for entry in choice.logprobs.content]
        for one, other in zip(streamed, choice.logprobs.content, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert mine[-1].finish_reason == choice.finish_reason


def test_a_seed_gives_the_same_text_whatever_else_runs(client: openai.OpenAI):
    alone = complete(client, seed=11, max_tokens=30)
    beside = completion(client, prompt=["hello", "what else", "runs here, a longer one"], seed=11, max_tokens=30)
    assert beside.choices[0].text == alone.text
    assert complete(client, seed=12, max_tokens=30).text != alone.text
    # Without a seed every request has its own.
    assert complete(client, max_tokens=30).text != complete(client, max_tokens=30).text


def test_a_bias_forces_and_forbids_tokens(client: openai.OpenAI):
    forced = complete(client, logit_bias={str(ord("z")): 100}, max_tokens=7)
    assert (forced.text, forced.finish_reason) == ("z" * 7, "length")
    ended = completion(client, logit_bias={str(END): 100}, max_tokens=7)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    usual = chat_tokens(client, temperature=0)[0]
    assert chat_tokens(client, temperature=0, logit_bias={str(usual): -100})[0] != usual


def chat_tokens(client: openai.OpenAI, **fields) -> list[int]:
    """Ids of the first tokens of an answer: the tokens are bytes."""
    answer = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=3, logprobs=True, **fields)
    return [entry.bytes[0] for entry in answer.choices[0].logprobs.content]


def test_a_stop_string_cuts_the_text(client: openai.OpenAI):
    whole = complete(client, seed=3, max_tokens=40, ignore_eos=True).text
    stop = whole[10:12]
    cut = complete(client, seed=3, max_tokens=40, ignore_eos=True, stop=[stop, "never to be seen"])
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_penalties_end_the_repetition(client: openai.OpenAI):
    def repeats(**fields) -> int:
        tokens = tokens_of(client, temperature=0, max_tokens=60, ignore_eos=True, **fields)
        return len(tokens) - len(set(tokens))

    usual = repeats()
    assert usual > 20
    # A tenth of the spread of the logits would be seen; these are large.
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5.0}):
        assert repeats(**fields) < usual / 2, fields


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["red", "green"]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "parts"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_random_model_keeps_a_schema(client: openai.OpenAI, temperature: int):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, response_format=form, temperature=temperature, seed=1, n=3
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        thing = json.loads(choice.message.content)
        assert list(thing) == ["name", "kind", "parts"]
        assert len(thing["name"]) <= 4 and thing["kind"] in ("red", "green")
        assert 1 <= len(thing["parts"]) <= 2 and set(map(type, thing["parts"])) == {bool}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "minLength": 3, "maxLength": 3}, "days": {"enum": [1, 2, 7]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_a_random_model_calls_the_tool_that_it_must(client: openai.OpenAI):
    arguments = dict(model=NAME, messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    for seed in (1, 2):
        choice = client.chat.completions.create(**arguments, seed=seed).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        [call] = choice.message.tool_calls
        given = json.loads(call.function.arguments)
        assert call.function.name == "get_weather" and len(given["city"]) == 3 and given["days"] in (1, 2, 7)
        chunks = client.chat.completions.create(**arguments, seed=seed, stream=True)
        pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
        assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments


def test_the_prefix_cache_gives_the_same_text(started: Started, client: openai.OpenAI):
    prompt = "a prompt of several pages, " * 4
    first, second = (completion(client, prompt, seed=2, max_tokens=20) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt) // SHAPES.page_size * SHAPES.page_size


# Nobody reads on


def idle(started: Started) -> bool:
    """No sequence has a row, waits, or holds a page that is not merely cached."""
    return (
        metric_of(started, "running") == metric_of(started, "waiting") == 0
        and metric_of(started, "kv_pages", state="live") == 0
    )


def test_a_disconnect_frees_the_rows(started: Started, url: str):
    before = metric_of(started, "requests_total", outcome="cancelled") if _was_cancelled(started) else 0
    body = {"model": NAME, "prompt": "hello", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 100}
    with httpx.Client(base_url=url) as http, http.stream("POST", "/v1/completions", json=body) as response:
        # Kept: an iterator that is dropped closes the connection.
        pieces = response.iter_bytes()
        next(pieces)
        wait_until(lambda: metric_of(started, "running") == SHAPES.max_sequences)
    wait_until(lambda: idle(started))
    assert metric_of(started, "requests_total", outcome="cancelled") > before + 50


def _was_cancelled(started: Started) -> bool:
    return started.metrics.registry.get_sample_value("requests_total", {"outcome": "cancelled"}) is not None


def test_a_context_that_is_too_long_is_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        completion(client, "x" * CONTEXT)
    assert caught.value.code == "context_length_exceeded" and str(CONTEXT) in caught.value.message
    last = completion(client, "x" * (CONTEXT - 1), max_tokens=1, ignore_eos=True)
    assert last.usage.completion_tokens == 1


def test_metrics_are_those_of_what_was_served(started: Started, url: str, client: openai.OpenAI, monkeypatch):
    monkeypatch.setattr(utilization, "_WINDOW_SECONDS", 0.0)

    def sample(text: str, name: str) -> float:
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))

    before = httpx.get(f"{url}/metrics").text
    completion(client, max_tokens=9, ignore_eos=True)
    wait_until(lambda: idle(started))
    after = httpx.get(f"{url}/metrics").text
    for name, count in (("prompt_tokens_total", 5), ("generation_tokens_total", 9)):
        assert sample(after, name) - sample(before, name) == count
    assert sample(after, "compiles_after_ready_total") == 0
    # The weights fit in a CPU's caches, so that no share of its memory's bandwidth can be said.
    assert sample(after, "decode_mbu") == 0
    assert 0 < sample(after, "prefill_mfu") < 1


# Every pair of features

THREE = {"type": "string", "minLength": 3, "maxLength": 3}
SMALL = {"type": "object", "properties": {"a": THREE}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SMALL}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SMALL}}
TOKENS = 40
BIASED = "z"


@dataclasses.dataclass(frozen=True)
class Feature:
    """Fields of a chat request. `shows(both, other)` says whether they show in an answer with them and those of another
    feature, given the answer with those of the other one alone."""

    fields: dict[str, Any]
    shows: Callable[[Answer, Answer], bool]
    rewrites: bool = False
    """Changes the text in a way that only the text itself tells: shown by a difference, where nothing pins the text."""


class Answer:
    """An answer to a chat request, streamed or not."""

    def __init__(self, fields: dict[str, Any], response: httpx.Response) -> None:
        self.fields, self.status = fields, response.status_code
        self.kind = response.headers["content-type"].partition(";")[0]
        self.error = response.json()["error"] if self.status != 200 else None
        if self.error is not None:
            return
        if self.kind == "text/event-stream":
            self.choices, self.usage = _from_events(events(response.text))
        else:
            body = response.json()
            self.choices, self.usage = [_from_message(choice) for choice in body["choices"]], body["usage"]

    @property
    def said(self) -> list[str]:
        """The text of each choice: content, or the arguments of its calls."""
        return [choice["content"] or choice["arguments"] for choice in self.choices]


def _from_message(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice["message"].get("tool_calls") or []
    return {
        "content": choice["message"]["content"] or "",
        "arguments": "".join(call["function"]["arguments"] for call in calls),
        "logprobs": (choice["logprobs"] or {}).get("content") or [],
        "finish": choice["finish_reason"],
    }


def _from_events(stream: list) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    *chunks, done = stream
    assert done == "[DONE]"
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            mine = found.setdefault(choice["index"], {"content": "", "arguments": "", "logprobs": [], "finish": None})
            mine["content"] += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls") or []:
                mine["arguments"] += call["function"].get("arguments") or ""
            mine["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
            mine["finish"] = choice["finish_reason"] or mine["finish"]
    return [found[i] for i in sorted(found)], chunks[-1].get("usage")


def first_said(both: Answer, other: Answer) -> bool:
    """The same text, as far as both have as many choices."""
    return all(a == b for a, b in zip(both.said, other.said, strict=False))


def greedily(both: Answer, other: Answer) -> bool:
    """What leaves one token to draw leaves no choice between seeds, nor between choices."""
    return len(set(both.said)) == 1


def is_cut(both: Answer, other: Answer) -> bool:
    stops = both.fields["stop"]
    for a, b in zip(both.choices, other.choices, strict=False):
        places = [b["content"].find(stop) for stop in stops if stop in b["content"]]
        # A call that is cut short is no call, and its beginning is text.
        if not b["arguments"] and a["content"] != b["content"][: min(places, default=None)]:
            return False
    return True


def is_short(both: Answer, other: Answer) -> bool:
    """The beginning of the same text, which of a call is its markup."""
    pairs = zip(both.choices, other.choices, strict=False)
    return all(
        a["finish"] in ("length", b["finish"]) and (b["content"] or "<tool_call>").startswith(a["content"])
        for a, b in pairs
    )


def has_logprobs(both: Answer, other: Answer) -> bool:
    for choice in both.choices:
        data = b"".join(bytes(entry["bytes"] or []) for entry in choice["logprobs"]).decode("utf-8", "replace")
        if not all(0 < len(entry["top_logprobs"]) <= 2 for entry in choice["logprobs"]):
            return False
        if not (data.startswith(choice["content"]) and choice["arguments"] in data):
            return False
    return True


def is_biased(both: Answer, other: Answer) -> bool:
    """What is free to be anything is the biased token; in JSON that is the string."""
    for choice in both.choices:
        text = choice["content"] or choice["arguments"]
        free = json.loads(text)["a"] if choice["finish"] in ("stop", "tool_calls") and "{" in text else text
        if "{" not in free and set(free) - {BIASED}:
            return False
    return True


def keeps_schema(both: Answer, other: Answer) -> bool:
    return all(
        len(json.loads(choice["content"])["a"]) == 3
        for choice in both.choices
        if choice["finish"] == "stop" and "stop" not in both.fields
    )


def calls_tool(both: Answer, other: Answer) -> bool:
    return all(
        len(json.loads(choice["arguments"])["a"]) == 3 and choice["content"] == ""
        for choice in both.choices
        if choice["finish"] == "tool_calls"
    ) and all(choice["finish"] != "stop" or "stop" in both.fields for choice in both.choices)


FEATURES = {
    "stream": Feature(
        {"stream": True}, lambda both, other: both.kind == "text/event-stream" and first_said(both, other)
    ),
    "usage": Feature(
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda both, other: both.usage["completion_tokens"] > 0 and first_said(both, other),
    ),
    "n": Feature({"n": 2}, lambda both, other: len(both.choices) == 2 and first_said(both, other)),
    "seed": Feature({"seed": 8}, lambda both, other: both.said != other.said, rewrites=True),
    "temperature": Feature({"temperature": 0}, greedily),
    "top_k": Feature({"top_k": 1}, greedily),
    "top_p": Feature({"top_p": 1e-6}, greedily),
    "min_p": Feature({"min_p": 1}, greedily),
    "presence": Feature({"presence_penalty": -0.5}, lambda both, other: both.said != other.said, rewrites=True),
    "frequency": Feature({"frequency_penalty": 0.6}, lambda both, other: both.said != other.said, rewrites=True),
    "repetition": Feature({"repetition_penalty": 0.8}, lambda both, other: both.said != other.said, rewrites=True),
    "bias": Feature({"logit_bias": {str(ord(BIASED)): 100}}, is_biased),
    "stop": Feature({"stop": ["e", "i", "<", BIASED]}, is_cut),
    "logprobs": Feature({"logprobs": True, "top_logprobs": 2}, has_logprobs),
    "length": Feature({"max_tokens": 5}, is_short),
    "schema": Feature({"response_format": FORM, "max_tokens": 250}, keeps_schema),
    "tools": Feature(
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 250}, calls_tool
    ),
    "ignore_eos": Feature(
        {"ignore_eos": True},
        lambda both, other: all(c["finish"] == "length" or "stop" in both.fields for c in both.choices),
    ),
    "timeout": Feature({"timeout": 60, "priority": 3}, first_said),
}
# What leaves so little to choose that another text can't be asked for.
PINS = {"temperature", "top_k", "top_p", "min_p", "bias", "stop", "length", "schema", "tools"}


def test_every_pair_of_features_shows_or_is_refused_by_name(url: str):
    with httpx.Client(base_url=url, timeout=60) as http:

        def ask(*names: str) -> Answer:
            fields = {"model": NAME, "messages": HELLO, "seed": 7, "temperature": 0.3, "max_tokens": TOKENS}
            for name in names:
                fields |= FEATURES[name].fields
            if "length" in names:
                fields |= FEATURES["length"].fields
            return Answer(fields, http.post("/v1/chat/completions", json=fields))

        alone = {name: ask(name) for name in FEATURES}
        plain = ask()
        assert {name for name, answer in alone.items() if answer.status != 200} == set()
        for name, answer in alone.items():
            assert FEATURES[name].shows(answer, plain), name
        refused = []
        for one, two in itertools.combinations(FEATURES, 2):
            both = ask(one, two)
            if both.status != 200:
                assert both.status == 400, (one, two, both.error)
                assert both.error["param"] in {*FEATURES[one].fields, *FEATURES[two].fields}, (one, two, both.error)
                refused.append((one, two))
                continue
            for name, other in ((one, two), (two, one)):
                if not (FEATURES[name].rewrites and other in PINS):
                    assert FEATURES[name].shows(both, alone[other]), (name, other, both.said, alone[other].said)
    assert refused == [("schema", "tools"), ("schema", "ignore_eos"), ("tools", "ignore_eos")]
