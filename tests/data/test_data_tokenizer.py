import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [f"def function_{i}(value):\n    return value + {i}  # größe\n" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320, "<|end|>")


# Surrogates have no UTF-8: no file holds them.
@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["<|end|>", "a<|end|>b", "\r\n\t  \x00", "  leading", "\u00a0é\u0301\ufeff", "🏳️‍🌈"])
def test_awkward_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_id not in ids


def test_batch_equals_one_by_one_and_end_is_silent(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    ids = tokenizer.encode("value")
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == "value"
    assert len(tokenizer.encode("return value")) < len("return value")  # merges were learnt


def test_training_is_deterministic():
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], k=3000)
    texts = [" ".join(words[i : i + 30]) for i in range(0, 3000, 30)]
    assert len({train_tokenizer(iter(texts), 400, "<|end|>").fingerprint for _ in range(4)}) == 1


def test_vocabulary_size(tokenizer):
    assert tokenizer.vocab_size == 320
    assert train_tokenizer(["ab"], 4096, "<|end|>").vocab_size < 300  # a small corpus gives fewer
    tokenizer.check_vocabulary(320)
    with pytest.raises(ValueError, match=r"up to 319 and model.vocab_size=319; set model.vocab_size to at least 320"):
        tokenizer.check_vocabulary(319)
    with pytest.raises(ValueError, match=r"model.vocab_size=256 is too small"):
        train_tokenizer(TEXTS, 256, "<|end|>")


def test_saved_and_loaded(tokenizer, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path, "<|end|>")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.end_id == tokenizer.end_id
    for text in (*TEXTS, "<|end|>"):
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]  # nothing temporary left


def test_loaded_settings_that_would_change_documents_are_off(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    parsed = json.loads((tmp_path / "t.json").read_text())
    parsed["truncation"] = {"max_length": 4, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(parsed))
    loaded = load_tokenizer(tmp_path / "t.json", "<|end|>")
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nope", "is not JSON"),
        ("[]", "is not a tokenizer.json"),
        ('{"model": {"type": "BPE"}}', "is not a tokenizer.json"),
        ('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "holds a WordLevel model"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "t.json", "<|end|>")


def test_missing_file_and_missing_end_token(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"absent.json can't be read"):
        load_tokenizer(tmp_path / "absent.json", "<|end|>")
    tokenizer.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"no token '<eos>'; set data.end_token .* <\|end\|>"):
        load_tokenizer(tmp_path / "t.json", "<eos>")
