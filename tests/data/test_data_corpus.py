import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, EvaluationBatches, gzip_bits_per_byte, prepare, train_tokenizer
from data import corpus as corpus_module
from data.sources import is_heldout

TEXTS = [f"Document {i}: {'naïve words and more words ' * (i % 7 + 1)}\n" for i in range(60)]


def write_corpus(folder: Path, texts: list[str]) -> DataConfig:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "corpus.jsonl").write_text("\n".join(lines), "utf-8")
    return DataConfig(
        source="jsonl", paths=(str(folder),), sequence_length=32, batch_size=4, heldout_fraction=0.2, seed=1
    )


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return write_corpus(tmp_path / "text", TEXTS)


def documents_of(rows, end_id: int) -> list[tuple[int, ...]]:
    """Documents put together again from the stream."""
    ends = np.flatnonzero(rows.stream == end_id)
    assert ends[0] == 0 and ends[-1] == len(rows.stream) - 1
    return [tuple(rows.stream[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_splits_hold_each_document_once(config, tmp_path, packing):
    config = dataclasses.replace(config, packing=packing)
    corpus = prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")
    decode = corpus.tokenizer.decode
    train = [decode(d) for d in documents_of(corpus.train, corpus.tokenizer.end_id)]
    heldout = [decode(d) for d in documents_of(corpus.heldout, corpus.tokenizer.end_id)]
    assert train == [t for t in TEXTS if not is_heldout(t, 0.2)]
    assert heldout == [t for t in TEXTS if is_heldout(t, 0.2)]
    assert heldout and not set(train) & set(heldout)
    assert corpus.train_stats.documents == len(train) and corpus.heldout_stats.documents == len(heldout)
    assert corpus.heldout_bytes == sum(len(t.encode()) for t in heldout)
    assert corpus.heldout_path.read_text("utf-8") == "".join(heldout)
    assert corpus.train.num_tokens == corpus.train_stats.tokens
    assert 0.5 < corpus.packing_efficiency <= 1
    assert f"{len(train)} documents" in corpus.summary()


def test_evaluation_predicts_each_heldout_byte_once(config, tmp_path):
    corpus = prepare(config, vocab_size=300, cache_dir=tmp_path)
    targets = []
    for batch in EvaluationBatches(corpus.heldout, config.batch_size):
        targets += batch["targets"][batch["weights"] > 0].tolist()
    ends = targets.count(corpus.tokenizer.end_id)
    assert ends == corpus.heldout_stats.documents
    assert len(targets) == corpus.heldout_stats.tokens
    texts = [t for t in TEXTS if is_heldout(t, 0.2)]
    wanted = np.concatenate(corpus.tokenizer.encode_batch(texts))
    np.testing.assert_array_equal(sorted(t for t in targets if t != corpus.tokenizer.end_id), sorted(wanted))


def test_gzip_bits_per_byte(config, tmp_path):
    corpus = prepare(config, vocab_size=300, cache_dir=tmp_path)
    texts = [t for t in TEXTS if is_heldout(t, 0.2)]
    whole = "".join(texts).encode()
    expected = 8 * len(gzip.compress(whole, 9)) / len(whole)
    assert corpus.heldout_gzip_bits_per_byte() == pytest.approx(expected)
    assert gzip_bits_per_byte(texts) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one byte"):
        gzip_bits_per_byte([])


def test_second_prepare_reads_the_cache_and_agrees(config, tmp_path, monkeypatch):
    first = prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()) == ["tokenizer", "tokens"]

    def never(*arguments):
        raise AssertionError("worked again")

    monkeypatch.setattr(corpus_module, "train_tokenizer", never)
    monkeypatch.setattr(corpus_module, "read_documents", never)
    second = prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    assert (second.train_stats, second.heldout_stats) == (first.train_stats, first.heldout_stats)
    np.testing.assert_array_equal(second.train.stream, first.train.stream)


def test_fingerprint_follows_content_and_settings_only(config, tmp_path):
    def fingerprint(config, vocab_size=300, cache="a"):
        return prepare(config, vocab_size=vocab_size, cache_dir=tmp_path / cache).fingerprint

    base = fingerprint(config)
    assert fingerprint(config, cache="b") == base  # trained anew
    elsewhere = write_corpus(tmp_path / "elsewhere", TEXTS)
    assert fingerprint(elsewhere) == base
    assert fingerprint(dataclasses.replace(config, sequence_length=64, seed=9, batch_size=1)) == base
    changed = [
        fingerprint(dataclasses.replace(config, heldout_fraction=0.3)),
        fingerprint(config, vocab_size=290),
        fingerprint(write_corpus(tmp_path / "more", [*TEXTS, "one more"])),
    ]
    assert len({base, *changed}) == 4


def test_loaded_tokenizer_gives_the_same_stream(config, tmp_path):
    first = prepare(config, vocab_size=300, cache_dir=tmp_path / "a")
    first.tokenizer.save(tmp_path / "tokenizer.json")
    loaded = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
    second = prepare(loaded, vocab_size=512, cache_dir=tmp_path / "b")
    assert second.fingerprint == first.fingerprint
    with pytest.raises(ValueError, match=r"up to 299 and model.vocab_size=256"):
        prepare(loaded, vocab_size=256, cache_dir=tmp_path / "c")


def test_tokenizer_is_trained_on_the_training_split_only(config, tmp_path, monkeypatch):
    seen = []

    def watched(texts, vocab_size, end_token):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size, end_token)

    monkeypatch.setattr(corpus_module, "train_tokenizer", watched)
    prepare(config, vocab_size=300, cache_dir=tmp_path)
    assert seen == [t for t in TEXTS if not is_heldout(t, 0.2)]
    few = dataclasses.replace(config, tokenizer_bytes=100)
    seen.clear()
    prepare(few, vocab_size=300, cache_dir=tmp_path)
    assert len(seen) >= 1 and (len(seen) == 1 or sum(len(t.encode()) for t in seen) <= 100)


def test_encoding_in_chunks_changes_nothing(config, tmp_path, monkeypatch):
    whole = prepare(config, vocab_size=300, cache_dir=tmp_path / "a")
    monkeypatch.setattr(corpus_module, "_ENCODE_CHARACTERS", 200)
    parts = prepare(config, vocab_size=300, cache_dir=tmp_path / "b")
    np.testing.assert_array_equal(parts.train.stream, whole.train.stream)
    np.testing.assert_array_equal(parts.heldout.stream, whole.heldout.stream)


def test_storage_is_two_bytes_where_the_vocabulary_allows(config, tmp_path):
    corpus = prepare(config, vocab_size=300, cache_dir=tmp_path)
    assert corpus.train.stream.dtype == np.uint16
    corpus.tokenizer.save(tmp_path / "t.json")
    parsed = json.loads((tmp_path / "t.json").read_text())
    extra = {"id": 70000, "content": "<|far|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fillers = {f"filler-{i}": i for i in range(300, 70000)}
    parsed["model"]["vocab"].update(fillers)
    parsed["added_tokens"].append({**extra, **flags})
    (tmp_path / "t.json").write_text(json.dumps(parsed))
    big = dataclasses.replace(config, tokenizer=str(tmp_path / "t.json"), end_token="<|far|>")
    corpus = prepare(big, vocab_size=70001, cache_dir=tmp_path)
    assert corpus.train.stream.dtype == np.int32
    assert corpus.train[0]["tokens"][0] == 70000  # each document begins with its end token


def test_empty_corpora_and_splits(tmp_path):
    with pytest.raises(ValueError, match=r"the corpus is empty: .*nothing"):
        prepare(write_corpus(tmp_path / "nothing", []), vocab_size=300, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"the corpus is empty: .*blank"):
        prepare(write_corpus(tmp_path / "blank", ["", ""]), vocab_size=300, cache_dir=tmp_path)
    kept = next(t for t in TEXTS if not is_heldout(t, 0.2))
    with pytest.raises(ValueError, match=r"held-out split with data.heldout_fraction=0.2"):
        prepare(write_corpus(tmp_path / "one", [kept]), vocab_size=300, cache_dir=tmp_path)
    held = next(t for t in TEXTS if is_heldout(t, 0.2))
    with pytest.raises(ValueError, match=r"no document for training"):
        prepare(write_corpus(tmp_path / "held", [held]), vocab_size=300, cache_dir=tmp_path)
    assert not list(tmp_path.glob(".tokens-*"))  # nothing half-built is left


def test_no_heldout_split_when_none_is_asked_for(config, tmp_path):
    corpus = prepare(dataclasses.replace(config, heldout_fraction=0.0), vocab_size=300, cache_dir=tmp_path)
    assert corpus.heldout is None and corpus.heldout_bytes == 0
    assert corpus.heldout_gzip_bits_per_byte() is None
    assert corpus.train_stats.documents == len(TEXTS)


def test_bad_line_is_named_by_prepare(tmp_path):
    config = write_corpus(tmp_path / "bad", TEXTS)
    path = tmp_path / "bad" / "corpus.jsonl"
    path.write_text(path.read_text() + "\n{broken")
    with pytest.raises(ValueError, match=r"corpus.jsonl:61: not a line of JSON"):
        prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "facts"])
def test_damaged_cache_is_named(config, tmp_path, damage):
    prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    if damage == "cut":
        (folder / "train.tokens").write_bytes((folder / "train.tokens").read_bytes()[:-2])
    elif damage == "gone":
        (folder / "heldout.offsets.npy").unlink()
    else:
        (folder / "facts.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokens-\w+ are damaged .* delete that folder"):
        prepare(config, vocab_size=300, cache_dir=tmp_path / "cache")


def test_entry_finished_by_another_process_first(config, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    write_entry = corpus_module._write_entry

    def overtaken(config, files, tokenizer, folder):
        write_entry(config, files, tokenizer, folder)
        monkeypatch.setattr(corpus_module, "_write_entry", write_entry)
        prepare(config, vocab_size=300, cache_dir=cache)

    monkeypatch.setattr(corpus_module, "_write_entry", overtaken)
    corpus = prepare(config, vocab_size=300, cache_dir=cache)
    assert corpus.train_stats.documents > 0
    assert not list(cache.glob(".tokens-*"))


def test_random_corpus(tmp_path):
    config = DataConfig(source="random", sequence_length=16, batch_size=2)
    corpus = prepare(config, vocab_size=1000, cache_dir=tmp_path)
    assert corpus.tokenizer is None and corpus.heldout is None
    assert corpus.heldout_gzip_bits_per_byte() is None and corpus.heldout_bytes == 0
    assert corpus.train[5]["tokens"].shape == (16,)
    assert corpus.packing_efficiency == 1
    assert not list(tmp_path.iterdir())
    assert corpus.fingerprint != prepare(config, vocab_size=999, cache_dir=tmp_path).fingerprint


def test_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"the data cache .*file can't be written"):
        prepare(config, vocab_size=300, cache_dir=tmp_path / "file")
