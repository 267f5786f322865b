"""The official client of OpenAI's API against the server."""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from serving.tools import call_text
from tests.serving.fake_engine import MAX_CONTEXT, MODEL, FakeEngine, serving

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 3}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "enum": ["Ann", "Bo"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    # With some time between the tokens, so that a stream comes in several chunks.
    return FakeEngine(delay=0.0005)


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with (
        serving(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=10) as client,
    ):
        yield client


@pytest.fixture
def says(engine: FakeEngine) -> Iterator:
    """Sets what the model says."""
    script = engine.script

    def say(text: str) -> None:
        engine.script = lambda request: text

    yield say
    engine.script = script


def test_models(client: openai.OpenAI):
    [model] = client.models.list()
    assert (model.id, model.model_extra["max_model_len"]) == (MODEL, MAX_CONTEXT)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_completion(client: openai.OpenAI):
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=100, seed=4)
    [choice] = answer.choices
    assert choice.text.startswith("5 tokens, seed 4: naïve ☃") and choice.finish_reason == "stop"
    size = len(choice.text.encode())
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": size,
        "total_tokens": 5 + size,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    short = client.completions.create(model=MODEL, prompt="hello")
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 16


def test_streamed_completion_is_the_whole_one(client: openai.OpenAI):
    arguments = dict(model=MODEL, prompt=["a", "bcd"], n=2, seed=1, max_tokens=200, logprobs=2)
    whole = client.completions.create(**arguments)
    texts, tokens, finishes = [""] * 4, [[] for _ in range(4)], {}
    chunks = list(client.completions.create(**arguments, stream=True))
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs:
            tokens[choice.index] += zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        if choice.finish_reason:
            finishes[choice.index] = choice.finish_reason
    assert len(chunks) > 8 and len({chunk.id for chunk in chunks}) == 1
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        assert list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)) == streamed


def test_logprobs_of_a_completion(client: openai.OpenAI, says):
    says("aï☃b")
    found = client.completions.create(model=MODEL, prompt="x", logprobs=2).choices[0].logprobs
    assert found.tokens == [
        "a", "bytes:\\xc3", "bytes:\\xaf", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83", "b"
    ]  # fmt: skip
    assert found.token_logprobs == [-0.25] * 7
    assert found.top_logprobs == [{"\x00": -0.5, "\x01": -1.5}] * 7
    # Characters of the text before the token.
    assert found.text_offset == [0, 1, 1, 2, 2, 2, 3]


def test_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, seed=2, n=2)
    prompt = len("<user>hello\n<assistant>")
    assert answer.object == "chat.completion"
    assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
    assert answer.choices[0].message.content.startswith(f"{prompt} tokens, seed 2: ")
    assert answer.choices[0].message.content != answer.choices[1].message.content
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].logprobs is None
    # The prompt counts once.
    assert answer.usage.prompt_tokens == prompt


def test_streamed_chat_is_the_whole_one(client: openai.OpenAI):
    arguments = dict(model=MODEL, messages=HELLO, seed=2, n=2, logprobs=True, top_logprobs=1)
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for i, choice in enumerate(whole.choices):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == i]
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [e for c in mine if c.logprobs for e in c.logprobs.content] == choice.logprobs.content
        assert [c.finish_reason for c in mine][-1] == "stop"
    assert whole.choices[0].logprobs.content[0].model_dump() == {
        "token": "2",
        "bytes": [50],
        "logprob": -0.25,
        "top_logprobs": [{"token": "\x00", "bytes": [0], "logprob": -0.5}],
    }


def test_stop_strings(client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, stop="naïve")
    assert answer.choices[0].message.content == "23 tokens, seed None: "
    assert answer.choices[0].finish_reason == "stop"


def test_a_json_schema_is_kept(client: openai.OpenAI):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=form)
    person = json.loads(answer.choices[0].message.content)
    assert person["name"] in ("Ann", "Bo") and isinstance(person["age"], int)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content) == {}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_tool_call(client: openai.OpenAI, choice):
    arguments = dict(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    answer = client.chat.completions.create(**arguments).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    [call] = answer.message.tool_calls
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    text, names, ids, finish = "", [], [], None
    for chunk in client.chat.completions.create(**arguments, stream=True):
        delta = chunk.choices[0].delta
        assert not delta.content
        for piece in delta.tool_calls or []:
            assert piece.index == 0
            text += piece.function.arguments
            names += [piece.function.name] if piece.function.name else []
            ids += [piece.id] if piece.id else []
        finish = chunk.choices[0].finish_reason or finish
    assert (text, names, len(ids), finish) == (call.function.arguments, ["get_weather"], 1, "tool_calls")


def test_tool_calls_that_the_model_chose(client: openai.OpenAI, says):
    says("I look.\n" + call_text("get_weather", {"city": "Oslo"}) + "\n" + call_text("get_weather", {"city": "Rom"}))
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER]).choices[0]
    assert answer.message.content == "I look." and answer.finish_reason == "tool_calls"
    cities = [json.loads(call.function.arguments)["city"] for call in answer.message.tool_calls]
    assert cities == ["Oslo", "Rom"]
    assert len({call.id for call in answer.message.tool_calls}) == 2
    # The answer can be sent back as it is.
    back = [
        *HELLO,
        answer.message,
        {"role": "tool", "content": "5 °C", "tool_call_id": answer.message.tool_calls[0].id},
    ]
    assert client.chat.completions.create(model=MODEL, messages=back, tools=[WEATHER]).choices
    for tool_choice, tools in [("none", [WEATHER]), (openai.omit, openai.omit)]:
        plain = client.chat.completions.create(model=MODEL, messages=HELLO, tools=tools, tool_choice=tool_choice)
        assert plain.choices[0].message.tool_calls is None and "<tool_call>" in plain.choices[0].message.content
        assert plain.choices[0].finish_reason == "stop"


# Four characters at a time, or all at once.
@pytest.mark.parametrize("characters", [4, 10_000])
@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_no_more_are_wanted(
    client: openai.OpenAI, engine: FakeEngine, says, monkeypatch, stream: bool, characters: int
):
    monkeypatch.setattr(engine, "characters", characters)
    two = call_text("get_weather", {"city": "Oslo"}) + "\n" + call_text("get_weather", {"city": "Rom"})
    says(two + " and more" * 100)
    arguments = dict(model=MODEL, messages=HELLO, tools=[WEATHER], parallel_tool_calls=False)
    if stream:
        choices = [chunk.choices[0] for chunk in client.chat.completions.create(**arguments, stream=True)]
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        finish = choices[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**arguments).choices
        calls, finish = choice.message.tool_calls, choice.finish_reason
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo"]
    assert finish == "tool_calls"
    assert engine.ended[engine.requests[-1].id] in ("cancelled", "stop")


def test_a_malformed_call_is_content(client: openai.OpenAI, says):
    says('<tool_call>\n{"name": "get_weather", "arguments": \n</tool_call>')
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER]).choices[0]
    assert answer.message.tool_calls is None and answer.finish_reason == "stop"
    assert "get_weather" in answer.message.content


@pytest.mark.parametrize(
    ("arguments", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"extra_body": {"best_of": 2}}, openai.BadRequestError, "best_of"),
        ({"max_tokens": MAX_CONTEXT + 1}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_errors_are_the_clients_own(client: openai.OpenAI, arguments, kind, param):
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "stream": stream, **arguments})
        assert caught.value.param == param and param in caught.value.message


def test_a_failed_request_fails_alone(client: openai.OpenAI, engine: FakeEngine):
    def fail(request):
        return "a logit is not a number" if request.params.seed == 13 else None

    def ask(seed: int):
        return client.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, n=2).choices[0].finish_reason

    engine.fail = fail
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = [pool.submit(ask, seed) for seed in (12, 13, 14)]
            assert [answers[i].result() for i in (0, 2)] == ["stop", "stop"]
            with pytest.raises(openai.InternalServerError, match="a logit is not a number"):
                answers[1].result()
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, seed=13, stream=True)
        with pytest.raises(openai.APIError, match="a logit is not a number"):
            list(stream)
    finally:
        engine.fail = lambda request: None
    assert engine.wait_idle()


def test_timeout_ends_the_answer_with_what_there_is(client: openai.OpenAI, says):
    says("word " * 4000)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"timeout": 0.3})
    assert answer.choices[0].finish_reason == "deadline"
    assert 0 < len(answer.choices[0].message.content) < 4000


def test_many_streams_at_once(client: openai.OpenAI):
    def read(seed: int) -> str:
        chunks = client.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(read, range(20)))
    assert texts == [f"23 tokens, seed {seed}: " + "naïve ☃ text " * 3 for seed in range(20)]


def test_a_full_queue_says_when_to_come_back():
    engine = FakeEngine(max_queue=3, delay=0.001)
    engine.script = lambda request: "short" if request.params.seed is None else "endless " * 10_000
    engine.max_context = 10**6
    with serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO, n=20, seed=1)
        assert caught.value.response.headers["retry-after"] == "3"
        # Those that had a place have given it back.
        assert engine.wait_idle() and list(engine.ended.values()) == ["cancelled"] * 3
        assert client.chat.completions.create(model=MODEL, messages=HELLO).choices


def test_keys(tmp_path):
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    (tmp_path / "admin").write_text("admin\n")
    engine = FakeEngine()
    files = dict(api_key_file=str(tmp_path / "keys"), admin_key_file=str(tmp_path / "admin"))
    with serving(engine, **files, metrics_need_admin_key=True) as url, httpx.Client(base_url=url) as http:

        def status(path: str, key: str | None, method: str = "GET") -> int:
            headers = {} if key is None else {"Authorization": key}
            return http.request(method, path, headers=headers).status_code

        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.chat.completions.create(model=MODEL, messages=HELLO).choices
        with openai.OpenAI(base_url=f"{url}/v1", api_key="third") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        for key in (None, "", "first", "Basic first", "Bearer", "Bearer firs", "Bearer firstt", "Bearer admin"):
            assert status("/v1/models", key) == 401, key
        assert status("/v1/nothing", None) == 401 and status("/v1/nothing", "Bearer first") == 404
        assert status("/health", None) == status("/ready", None) == 200
        for path, method in (("/metrics", "GET"), ("/admin/drain", "POST")):
            assert status(path, None, method) == status(path, "Bearer first", method) == 401
        assert status("/metrics", "bearer admin") == 200
        assert status("/admin/nothing", "Bearer admin") == 404
        assert status("/ready", None) == 200
        assert status("/admin/drain", "Bearer admin", "POST") == 202
        assert status("/ready", None) == 503 and status("/health", None) == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="first", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model=MODEL, messages=HELLO)
            assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) > 1


def test_a_trace_of_what_is_served(tmp_path):
    (tmp_path / "admin").write_text("admin\n")
    engine = FakeEngine()
    settings = dict(admin_key_file=str(tmp_path / "admin"), profile_dir=str(tmp_path / "traces"))
    headers = {"Authorization": "Bearer admin"}
    with serving(engine, **settings) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        for wrong in (
            {},
            {"seconds": 0},
            {"seconds": 61},
            {"seconds": True},
            {"seconds": "1"},
            {"seconds": 1, "x": 1},
            1,
        ):
            assert http.post("/admin/profile", json=wrong).status_code == 400, wrong
        broken = http.post("/admin/profile", content="{", headers={"Content-Type": "application/json"})
        assert broken.status_code == 400 and not (tmp_path / "traces").exists() and not engine.metrics.profiled
        assert httpx.post(f"{url}/admin/profile", json={"seconds": 1}).status_code == 401
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(http.post, "/admin/profile", json={"seconds": 1.5})
            while not engine.metrics.profiled:
                time.sleep(0.01)
            assert http.post("/admin/profile", json={"seconds": 1}).status_code == 409
            assert httpx.get(f"{url}/health").status_code == 200
            answer = first.result().json()
        note = json.loads((Path(answer["folder"]) / "capture.json").read_text())
        assert note["kind"] == "serve" and note["seconds"] >= 1.5 and note["absolute_numbers_count"] is False
        files = [path.name for path in Path(answer["folder"]).rglob("*") if path.is_file()]
        assert any(name.endswith(".xplane.pb") for name in files) and "perfetto_trace.json.gz" in files
        assert "profiles_total 1.0" in http.get("/metrics").text
        # For `python -m perf doctor`, which reads the folder.
        assert "compiles_after_ready_total" in (Path(answer["folder"]) / "metrics.prom").read_text()


def test_a_trace_that_can_not_be_written(tmp_path):
    (tmp_path / "admin").write_text("admin\n")
    (tmp_path / "file").write_text("")
    engine = FakeEngine()
    settings = dict(admin_key_file=str(tmp_path / "admin"), profile_dir=str(tmp_path / "file"))
    with (
        serving(engine, **settings) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer admin"}) as http,
    ):
        for _ in range(2):
            refused = http.post("/admin/profile", json={"seconds": 0.1})
            assert refused.status_code == 503 and "api.profile_dir" in refused.json()["error"]["message"]
        assert not engine.metrics.profiled and http.get("/health").status_code == 200


def test_without_an_admin_key_there_is_no_admin(client: openai.OpenAI):
    url = str(client.base_url).removesuffix("/v1/")
    assert httpx.post(f"{url}/admin/drain").status_code == 404
    assert httpx.get(f"{url}/ready").status_code == 200
