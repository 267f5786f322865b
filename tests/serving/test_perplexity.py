"""The perplexity command: its windows, and its number by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.perplexity import Settings, measure, scorer, windows
from checkpoint.pretrained import open_pretrained
from kernels.paged_attention.quantize import dequantize, quantize_heads
from model.attention import Attention
from tests.serving.tiny_folder import write_tiny_folder

TEXT = "naïve text, some of it twice: some of it twice"


@pytest.mark.parametrize(("length", "context", "overlap"), [(1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 7), (50, 8, 0)])
def test_every_token_but_the_first_is_scored_once(length: int, context: int, overlap: int):
    found = list(windows(list(range(length)), context, overlap))
    assert [token for window in found for token in window.tokens[window.start :]] == list(range(1, length))
    for window in found:
        assert len(window.tokens) <= context and window.start >= 1
        assert window.tokens == list(range(window.tokens[0], window.tokens[0] + len(window.tokens)))
    assert all(window.start >= max(overlap, 1) for window in found[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("perplexity") / "tiny")


def test_the_number_is_that_of_one_token_after_another(folder: Path, tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    found = measure(Settings(str(folder), (path, path), tokens=60, context=32, overlap=20))
    score, data = scorer(open_pretrained(folder), "float32"), TEXT.encode()

    def log_probs(tokens: bytes) -> np.ndarray:
        padded = np.zeros(32, np.int32)
        padded[: len(tokens)] = list(tokens)
        return score(padded)[: len(tokens) - 1]

    # A token is a byte. The second window is of bytes 12 to 43 and the third of 24 on; the second file is cut short.
    assert len(data) == 47
    whole = [*log_probs(data[:32]), *log_probs(data[12:44])[19:], *log_probs(data[24:])[19:]]
    again = log_probs(data[:15])
    mean = -float(np.sum([*whole, *again])) / 60
    assert (found["tokens"], found["bytes"]) == (60, 60)
    assert found["nats_per_token"] == pytest.approx(mean, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), abs=1e-4)


def test_a_cache_in_few_bits_rounds_keys_and_values(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokens, pretrained = np.array(list(TEXT.encode())[:24], np.int32), open_pretrained(folder)
    plain, cached = scorer(pretrained, "float32")(tokens), scorer(pretrained, "float32", kv_dtype="int8")(tokens)
    project = Attention._project

    def rounded(self, *args):
        q, *sides = project(self, *args)
        return q, *(dequantize(*quantize_heads(x, "int8"), x.dtype) for x in sides)

    monkeypatch.setattr(Attention, "_project", rounded)
    np.testing.assert_allclose(cached, scorer(pretrained, "float32")(tokens), atol=1e-5)
    assert 0 < np.abs(cached - plain).max() < 0.1


def test_what_can_not_be_measured_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="overlap=8 must be at least 0 and below context=8"):
        Settings(context=8, overlap=8)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="nothing to score"):
        measure(Settings(str(folder), (tmp_path / "empty",)))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="bytes is no text in UTF-8"):
        measure(Settings(str(folder), (tmp_path / "bytes",)))
