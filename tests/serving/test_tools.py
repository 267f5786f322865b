import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tools import ToolCallParser, call_text, tool_grammar, tools_prompt

NAMES = ("get_weather", "now")


def parse(text: str, cuts=(), forced: bool = False) -> tuple[str, list[tuple[str, str]], list]:
    """Content, calls put together from their pieces, and the pieces, of a text fed in parts."""
    parser = ToolCallParser(NAMES, forced=forced)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    results = [parser.feed(text[a:b]) for a, b in itertools.pairwise(places)]
    results.append(parser.finish())
    deltas = [delta for _, found in results for delta in found]
    calls: list[list] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.index == len(calls) and delta.id.startswith("call_")
            calls.append([delta.name, ""])
        assert delta.index == len(calls) - 1
        calls[-1][1] += delta.arguments
    assert parser.num_calls == len(calls)
    return "".join(content for content, _ in results), [tuple(call) for call in calls], deltas


PARIS = call_text("get_weather", {"city": "Paris", "days": 3})
NOW = call_text("now", {})
WELL_FORMED = [
    (PARIS, "", [("get_weather", '{"city": "Paris", "days": 3}')]),
    (f"{NOW}\n{PARIS}\n", "", [("now", "{}"), ("get_weather", '{"city": "Paris", "days": 3}')]),
    (f"\n\nLet me see.\n{NOW}", "\n\nLet me see.", [("now", "{}")]),
    (f"{NOW}\n\nDone.\n", "\n\nDone.\n", [("now", "{}")]),
    ('<tool_call>{"name":"now","arguments":{"x":1.50}}</tool_call>', "", [("now", '{"x":1.50}')]),
    ('<tool_call>{"arguments": {"x": "é"}, "name": "now"}</tool_call>', "", [("now", '{"x": "\\u00e9"}')]),
    (call_text("now", {"x": 'a </tool_call> \\" {'}), "", [("now", '{"x": "a </tool_call> \\\\\\" {"}')]),
    ("a < b <tool> </tool_call>", "a < b <tool> </tool_call>", []),
    ("", "", []),
    (" \n ", " \n ", []),
]
MALFORMED = [
    "<tool_call>\n{}\n</tool_call>",
    "<tool_call>\nhello\n</tool_call> more",
    'a <tool_call>\n{"name": "now", "arguments": {}\n</tool_call>\n',
    '<tool_call>{"name": "nope", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": []}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {}, "more": 1}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>',
    "<tool_call>" + "[" * 5000 + "</tool_call>",
    "x <tool_call>",
    "x <tool_c",
    "<tool_call><tool_call>",
]


@pytest.mark.parametrize(("text", "content", "calls"), WELL_FORMED)
def test_calls_are_read(text, content, calls):
    assert parse(text)[:2] == (content, calls)


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_call_is_content_as_written(text):
    assert parse(text)[:2] == (text, [])
    assert parse(f"Hm.\n {text}")[:2] == (f"Hm.\n {text}", [])
    before = parse(f"{NOW}\n{text}")
    assert before[1] == [("now", "{}")]
    assert before[0] == f"\n{text}"


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(st.sampled_from([*(text for text, _, _ in WELL_FORMED), *MALFORMED, "\n", "{", '"', "<", "xy"])),
    cuts=st.lists(st.integers(0, 300)),
)
def test_it_does_not_matter_how_the_text_arrives(parts, cuts):
    text = "".join(parts)
    assert parse(text, cuts)[:2] == parse(text)[:2]


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from('<tool_call>/ab \n{"name": "now", "arguments": {}}')))
def test_text_without_calls_comes_back(text):
    assert parse(text)[:2] == (text, [])


def test_content_waits_only_for_what_may_be_a_call():
    parser = ToolCallParser(NAMES)
    assert parser.feed("a ") == ("a", [])
    assert parser.feed("<b <tool") == (" <b", [])
    assert parser.feed("s") == (" <tools", [])


def test_forced_arguments_are_streamed():
    parser = ToolCallParser(NAMES, forced=True)
    pieces = [
        '<tool_call>\n{"name": "get_',
        'weather", "arguments": {"ci',
        'ty": "{}',
        '\\"}"',
        "}",
        "}\n</tool",
        "_call>",
    ]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)[1]]
    assert [(delta.index, delta.name, delta.arguments) for delta in deltas] == [
        (0, "get_weather", ""),
        (0, None, '{"ci'),
        (0, None, 'ty": "{}'),
        (0, None, '\\"}"'),
        (0, None, "}"),
    ]
    assert parser.finish() == ("", [])


@settings(deadline=None, max_examples=200)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), st.text(st.sampled_from('{}"\\</é'))))
    ),
    cuts=st.lists(st.integers(0, 300)),
)
def test_forced_calls_come_out_as_the_others_do(calls, cuts):
    text = "\n".join(call_text(name, arguments) for name, arguments in calls)
    expected = ("", [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls])
    assert parse(text, cuts, forced=True)[:2] == expected
    assert parse(text, cuts)[:2] == expected


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')]),
        ('<tool_call>\n{"name": "now", "arguments": {}}\n</too', "", [("now", "{}")]),
        ('<tool_call>\n{"name": "no', '<tool_call>\n{"name": "no', []),
    ],
)
def test_a_forced_call_cut_short(text, content, calls):
    assert parse(text, forced=True)[:2] == (content, calls)


def test_the_prompt_names_the_tools():
    tool = {"type": "function", "function": {"name": "größe"}}
    assert '{"type": "function", "function": {"name": "größe"}}' in tools_prompt([tool])


def function(name: str, **more) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


def test_free_choices_have_no_grammar():
    assert tool_grammar([function("f")], "auto") is None
    assert tool_grammar([function("f")], "none") is None
    assert tool_grammar([], "auto") is None


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([{"type": "x"}], "auto", r"tools\[0\]\.type"),
        (["x"], "auto", r"tools\[0\]\.type"),
        ([{"type": "function"}], "auto", r"tools\[0\]\.function must be"),
        ([function("f"), function(3)], "auto", r"tools\[1\]\.function must be"),
        ([function('a"b')], "auto", r"tools\[0\]\.function\.name must be"),
        ([function("f"), function("f")], "auto", r"tools\[1\]\.function\.name='f' is the name of an earlier"),
        ([function("f", parameters=[])], "auto", r"parameters must be"),
        ([], "required", "tools is empty"),
        ([function("f")], "always", "tool_choice must be"),
        ([function("f")], {"type": "function"}, "tool_choice must be"),
        ([function("f")], function("g"), r"tool_choice\.function\.name='g' is none of the tools: f"),
    ],
)
def test_bad_tools_and_choices_are_named(tools, choice, reason):
    with pytest.raises(ValueError, match=reason):
        tool_grammar(tools, choice)
