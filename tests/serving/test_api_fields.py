"""Every field of a request reaches the engine or is refused by its name, alone and beside every other field."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serving.chat import ChatTemplate
from serving.request import Request
from serving.schema import CHAT, COMPLETION, sequence_seed
from tests.serving.fake_engine import MAX_CONTEXT, MODEL, FakeEngine, serving

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
BASE = {
    "completions": {"model": MODEL, "prompt": "hello"},
    "chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
}


class Client:
    def __init__(self, engine: FakeEngine, http: httpx.Client) -> None:
        self.engine, self.http = engine, http

    def post(self, endpoint: str, fields: dict[str, Any], base: bool = True) -> httpx.Response:
        return self.http.post(f"/v1/{endpoint}", json={**(BASE[endpoint] if base else {}), **fields})

    def seen(self, endpoint: str, fields: dict[str, Any]) -> tuple[list[Request], httpx.Response]:
        """What the engine got of a request that must be taken, and the answer."""
        before = len(self.engine.requests)
        response = self.post(endpoint, fields)
        assert response.status_code == 200, response.text
        return self.engine.requests[before:], response

    def refused(self, endpoint: str, fields: dict[str, Any], param: str | None, status: int = 400) -> dict[str, Any]:
        before = len(self.engine.requests)
        response = self.post(endpoint, fields)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        assert error["type"] == "invalid_request_error"
        assert len(self.engine.requests) == before, "refused, and still given to the engine"
        return error


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = FakeEngine(characters=1000)
    with serving(engine, max_choices=8) as url, httpx.Client(base_url=url, timeout=10) as http:
        yield Client(engine, http)


def params(name: str) -> Callable[[list[Request]], Any]:
    return lambda requests: getattr(requests[0].params, name)


def attribute(name: str) -> Callable[[list[Request]], Any]:
    return lambda requests: getattr(requests[0], name)


def prompt_text(requests: list[Request]) -> str:
    return bytes(requests[0].prompt).decode()


# Field -> (value, more fields it needs, what of the engine's requests shows it, the value there).
Row = tuple[Any, dict[str, Any], Callable[[list[Request]], Any], Any]
SHARED: dict[str, Row] = {
    "n": (3, {}, len, 3),
    "stop": (["x", "yz"], {}, attribute("stop"), ("x", "yz")),
    "seed": (7, {}, params("seed"), 7),
    "temperature": (0.5, {}, params("temperature"), 0.5),
    "top_p": (0.25, {}, params("top_p"), 0.25),
    "top_k": (5, {}, params("top_k"), 5),
    "min_p": (0.125, {}, params("min_p"), 0.125),
    "presence_penalty": (1, {}, params("presence_penalty"), 1.0),
    "frequency_penalty": (-1.5, {}, params("frequency_penalty"), -1.5),
    "repetition_penalty": (1.25, {}, params("repetition_penalty"), 1.25),
    "logit_bias": ({"65": 3, "1": -100}, {}, params("logit_bias"), ((1, -100.0), (65, 3.0))),
    "max_tokens": (9, {}, params("max_tokens"), 9),
    "ignore_eos": (True, {}, params("stop_ids"), ()),
    "priority": (-3, {}, attribute("priority"), -3),
    "timeout": (60, {}, lambda requests: requests[0].deadline - requests[0].arrival, pytest.approx(60)),
}
ENFORCED: dict[str, dict[str, Row]] = {
    "completions": {
        **SHARED,
        "prompt": ("abc", {}, attribute("prompt"), (97, 98, 99)),
        "logprobs": (2, {}, params("logprobs"), 2),
    },
    "chat/completions": {
        **SHARED,
        "messages": ([{"role": "user", "content": "x"}], {}, prompt_text, "<user>x\n<assistant>"),
        "max_completion_tokens": (11, {}, params("max_tokens"), 11),
        "logprobs": (True, {}, params("logprobs"), 0),
        "top_logprobs": (4, {"logprobs": True}, params("logprobs"), 4),
        "response_format": ({"type": "json_object"}, {}, lambda requests: requests[0].grammar is None, False),
        "tools": (TOOLS, {}, lambda requests: '"name": "look"' in prompt_text(requests), True),
        "tool_choice": ("required", {"tools": TOOLS}, lambda requests: requests[0].grammar is None, False),
    },
}
# Fields that show in the answer, or that other tests below hold.
ELSEWHERE = {
    "completions": {"model", "stream", "stream_options", "echo", "best_of"},
    "chat/completions": {"model", "stream", "stream_options", "parallel_tool_calls"},
}
# They identify a request, and can't change its answer.
HARMLESS: dict[str, Any] = {
    "user": "somebody",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "store": False,
    "service_tier": "auto",
}
HARMLESS_IN_CHAT = {"modalities": ["text"]}
REFUSED = {
    "completions": {"suffix": "x"},
    "chat/completions": {
        "audio": {"voice": "x", "format": "wav"},
        "functions": [],
        "function_call": "auto",
        "moderation": {"model": "x"},
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_options": {},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "low",
        "verbosity": "low",
        "web_search_options": {},
    },
}


def rows(table: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(endpoint, field, row, id=f"{endpoint}-{field}")
        for endpoint, fields in table.items()
        for field, row in fields.items()
    ]


def test_the_tables_hold_every_field_that_openai_documents():
    documented = {
        "completions": completion_create_params.CompletionCreateParamsBase.__annotations__,
        "chat/completions": chat_create_params.CompletionCreateParamsBase.__annotations__,
    }
    for endpoint, checks in (("completions", COMPLETION), ("chat/completions", CHAT)):
        harmless = {*HARMLESS, *(HARMLESS_IN_CHAT if endpoint.startswith("chat") else ())}
        tested = {*ENFORCED[endpoint], *ELSEWHERE[endpoint], *harmless, *REFUSED[endpoint]}
        assert set(checks) == tested
        assert {*documented[endpoint], "stream"} <= tested


@pytest.mark.parametrize(("endpoint", "field", "row"), rows(ENFORCED))
def test_a_field_reaches_the_engine(client: Client, endpoint: str, field: str, row: Row):
    value, needed, observe, expected = row
    with_field, _ = client.seen(endpoint, {**needed, field: value})
    assert observe(with_field) == expected
    if field not in ("prompt", "messages"):
        # null is the field left out, and that is something else.
        without, _ = client.seen(endpoint, {**needed, field: None})
        assert field == "timeout" or observe(without) != expected


@pytest.mark.parametrize("endpoint", BASE)
def test_harmless_fields_change_nothing(client: Client, endpoint: str):
    plain, _ = client.seen(endpoint, {"seed": 1})
    more = HARMLESS_IN_CHAT if endpoint.startswith("chat") else {}
    dressed, _ = client.seen(endpoint, {"seed": 1, **HARMLESS, **more})
    assert (plain[0].prompt, plain[0].params, plain[0].stop) == (dressed[0].prompt, dressed[0].params, dressed[0].stop)


@pytest.mark.parametrize(("endpoint", "field", "value"), rows(REFUSED))
def test_a_field_is_refused_by_its_name(client: Client, endpoint: str, field: str, value: Any):
    error = client.refused(endpoint, {field: value}, field)
    assert error["code"] == "unsupported_parameter"
    client.seen(endpoint, {field: None})


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize("field", ["temprature", "min_tokens", "guided_json", "prompt_logprobs", "extra"])
def test_an_unknown_field_is_refused(client: Client, endpoint: str, field: str):
    assert client.refused(endpoint, {field: None}, field)["code"] == "unknown_field"


WRONG: dict[str, list[Any]] = {
    "model": [1],
    "n": [0, 129, 1.5, "1", True],
    "stop": [1, [1], [""], "", ["a"] * 5, "a" * 2000],
    "seed": [2**63, 1.5, "1", False],
    "temperature": [-0.1, 101, "1", True, 10**400],
    "top_p": [0, 1.1, "1"],
    "top_k": [-1, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, "1"],
    "frequency_penalty": [-2.1, 2.1, []],
    "repetition_penalty": [0, -1, 101],
    "logit_bias": [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"999999": 1}, {"1": 1, "01": 2}, {"1_0": 1}, {"1": None}],
    "max_tokens": [0, -1, 1.5, "10"],
    "ignore_eos": [1, "true"],
    "priority": [1001, 0.5, "high"],
    "timeout": [0, -1, 10**6, "1"],
    "stream": ["true", 1],
    "user": [1],
    "metadata": [{"a": 1}, "a"],
    "store": [True],
    "service_tier": ["flex", ["auto"]],
}  # fmt: skip
WRONG_COMPLETION: dict[str, list[Any]] = {
    "prompt": ["", [], [[]], [1, "a"], [-1], [999999], [1.5], [[1], 2], {"a": 1}, 3, [True]],
    "echo": ["yes"],
    "logprobs": [-1, 21, True],
    "best_of": [2, 0],
}
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": ["hello", [], {}],
    "max_completion_tokens": [0, "5"],
    "logprobs": [1, "true"],
    "top_logprobs": [1],
    "tool_choice": ["required", "auto"],
    "parallel_tool_calls": [True],
    "modalities": [["text", "audio"], "text", []],
}


@pytest.mark.parametrize("endpoint", BASE)
def test_wrong_values_are_refused(client: Client, endpoint: str):
    table = {**WRONG, **(WRONG_CHAT if endpoint.startswith("chat") else WRONG_COMPLETION)}
    for field, values in table.items():
        for value in values:
            response = client.post(endpoint, {field: value})
            assert response.status_code == (404 if field == "model" and isinstance(value, str) else 400), (field, value)
            name = response.json()["error"]["param"]
            assert name == field or name.startswith((f"{field}.", f"{field}[")), (field, value, name)
            assert field in response.json()["error"]["message"]


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **function}}]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "audio": {"id": "x"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "x"}]}]},
            "messages[0].tool_calls[0].type",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "raise"}]}, "messages"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": tool(name="a b")}, "tools[0].function.name"),
        ({"tools": tool() + tool()}, "tools[1].function.name"),
        ({"tools": tool(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": tool(parameters={"type": "nothing"}), "tool_choice": "required"}, "tools"),
        ({"tools": tool(parameters={"type": "nothing"}, strict=True)}, "tools"),
        ({"tools": tool(), "tool_choice": "always"}, "tool_choice"),
        ({"tools": tool(), "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        (
            {"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"n": 9}, "n"),
    ],
)
def test_wrong_parts_of_a_chat_are_refused_by_their_place(client: Client, fields: dict[str, Any], param: str):
    client.refused("chat/completions", fields, param)


def test_required_fields(client: Client):
    for endpoint, base in BASE.items():
        for field in base:
            rest = {name: value for name, value in base.items() if name != field}
            response = client.post(endpoint, rest, base=False)
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_the_context_has_an_end(client: Client):
    error = client.refused("completions", {"prompt": "x" * MAX_CONTEXT}, "prompt")
    assert str(MAX_CONTEXT) in error["message"] and error["code"] == "context_length_exceeded"
    client.refused("completions", {"prompt": "x" * (MAX_CONTEXT - 5), "max_tokens": 6}, "max_tokens")
    error = client.refused("chat/completions", {"max_completion_tokens": MAX_CONTEXT}, "max_completion_tokens")
    assert f"max_completion_tokens={MAX_CONTEXT}" in error["message"]
    client.refused("completions", {"prompt": ["y", "x" * MAX_CONTEXT]}, "prompt")
    # A default is cut to what is left, a wish is not.
    [request], _ = client.seen("completions", {"prompt": "x" * (MAX_CONTEXT - 5)})
    assert request.params.max_tokens == 5
    [request], _ = client.seen("chat/completions", {})
    assert request.params.max_tokens == MAX_CONTEXT - len(request.prompt)


def test_what_only_the_engine_knows_is_refused_too(client: Client):
    fields = {"prompt": "x" * (MAX_CONTEXT - 20), "priority": 999}
    assert "more pages than there are" in client.refused("completions", fields, "prompt")["message"]


def test_kinds_of_prompts(client: Client):
    for prompt, expected in [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ]:
        requests, response = client.seen("completions", {"prompt": prompt})
        assert [request.prompt for request in requests] == expected
        assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(expected)))


def test_echo(client: Client):
    _, response = client.seen("completions", {"prompt": ["ab", "c"], "n": 2, "echo": True})
    assert [choice["text"][:2] for choice in response.json()["choices"]] == ["ab", "ab", "c1", "c1"]
    _, response = client.seen("completions", {"prompt": [97, 98], "echo": True})
    assert response.json()["choices"][0]["text"].startswith("ab")
    client.refused("completions", {"echo": True, "logprobs": 1}, "echo")


def test_best_of_must_be_n(client: Client):
    client.seen("completions", {"n": 2, "best_of": 2})
    client.refused("completions", {"n": 2, "best_of": 3}, "best_of")


def test_sequences_of_a_seeded_request_have_seeds_of_their_own(client: Client):
    requests, _ = client.seen("completions", {"prompt": ["a", "b"], "n": 3, "seed": 5})
    seeds = [request.params.seed for request in requests]
    assert seeds[:3] == seeds[3:] == [sequence_seed(5, i) for i in range(3)]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    requests, _ = client.seen("completions", {"n": 3})
    assert [request.params.seed for request in requests] == [None] * 3


def test_messages_reach_the_template(client: Client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    [request], _ = client.seen("chat/completions", {"messages": messages})
    text = bytes(request.prompt).decode()
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert text == f"<system>be short\n<assistant>{call}\n<tool>42\n<assistant>"


def test_tools_are_not_shown_where_none_may_be_called(client: Client):
    [request], _ = client.seen("chat/completions", {"tools": TOOLS, "tool_choice": "none"})
    assert "look" not in bytes(request.prompt).decode()


def test_without_a_template_or_grammars(tmp_path):
    engine = FakeEngine(characters=1000)
    engine.grammars = None
    with serving(engine) as url, httpx.Client(base_url=url) as http:
        client = Client(engine, http)
        client.refused("chat/completions", {"response_format": {"type": "json_object"}}, "response_format")
        client.refused("chat/completions", {"tools": TOOLS, "tool_choice": "required"}, "tools")
        client.seen("chat/completions", {"tools": TOOLS})
        # A template that wants calls in a form that nothing here would read.
        engine.chat = ChatTemplate("{{ tools | tojson }}", {})
        client.refused("chat/completions", {"tools": TOOLS}, "tools")
        engine.chat = None
        client.refused("chat/completions", {}, "messages")
        client.seen("completions", {})


# --- pairs

MORE_FEATURES: dict[str, dict[str, Any]] = {
    "completions": {
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "echo": {"echo": True},
        "best_of": {"best_of": 1},
        "model": {"model": MODEL},
        "suffix": {"suffix": "x"},
    },
    "chat/completions": {
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "response_format ": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        },
        "tools ": {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]},
        "tool_choice ": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}},
        "tool_choice  ": {"tools": TOOLS, "tool_choice": "none"},
        "parallel_tool_calls": {"tools": TOOLS, "parallel_tool_calls": False},
        "reasoning_effort": {"reasoning_effort": "low"},
    },
}


def features(endpoint: str) -> dict[str, dict[str, Any]]:
    enforced = {field: {**needed, field: value} for field, (value, needed, _, _) in ENFORCED[endpoint].items()}
    return enforced | MORE_FEATURES[endpoint] | {field: {field: value} for field, value in HARMLESS.items()}


@pytest.mark.parametrize("endpoint", BASE)
def test_every_pair_of_features_works_or_is_refused_by_name(client: Client, endpoint: str):
    taken = refused = 0
    table = features(endpoint)
    for (first, fields), (second, others) in itertools.combinations(table.items(), 2):
        if any(fields[name] != others[name] for name in fields.keys() & others.keys()):
            continue  # One field can't have two values.
        response = client.post(endpoint, {**fields, **others})
        if response.status_code == 200:
            taken += 1
            _check_answer(response, {**fields, **others})
        else:
            assert response.status_code == 400, (first, second, response.text)
            assert response.json()["error"]["param"] in {*fields, *others}, (first, second, response.text)
            refused += 1
    print(f"{endpoint}: {taken} pairs work, {refused} are refused")
    assert taken > 5 * refused


def _check_answer(response: httpx.Response, fields: dict[str, Any]) -> None:
    """The features that show in an answer show beside every other one."""
    if fields.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and not line.endswith("[DONE]")]
        assert ("usage" in chunks[-1]) == ("stream_options" in fields)
        indices = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
        finishes = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    else:
        choices = response.json()["choices"]
        indices, finishes = {choice["index"] for choice in choices}, [choice["finish_reason"] for choice in choices]
        if fields.get("logprobs") and not fields.get("echo"):
            assert all(choice["logprobs"] is not None for choice in choices)
        if fields.get("response_format") and {*finishes} == {"stop"} and "stop" not in fields:
            assert all(isinstance(json.loads(choice["message"]["content"]), dict) for choice in choices)
        if fields.get("tool_choice") not in (None, "none") and {*finishes} == {"tool_calls"}:
            assert all(choice["message"]["tool_calls"][0]["function"]["name"] == "look" for choice in choices)
    assert indices == set(range(fields.get("n", 1)))
    assert len(finishes) == fields.get("n", 1) and {*finishes} <= {"stop", "length", "tool_calls"}
