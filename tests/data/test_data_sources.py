import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig
from data.sources import SkipCount, digest_files, is_heldout, list_files, read_documents


def read(config: DataConfig, skipped: SkipCount | None = None) -> list[str]:
    return list(read_documents(config, list_files(config), skipped or SkipCount()))


def test_stdlib_is_source_without_tests_or_packages():
    config = DataConfig()
    files = list_files(config)
    names = {path.name for path in files}
    assert "argparse.py" in names
    assert any(path.parts[-2:] == ("json", "decoder.py") for path in files)
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in files)
    assert not any(path.name.startswith("_sysconfigdata") for path in files)
    assert files == list_files(config)
    skipped = SkipCount()
    documents = read(config, skipped)
    assert len(documents) + skipped.undecodable_files + skipped.empty_documents == len(files)
    assert 5e6 < sum(map(len, documents)) < 30e6


def test_stdlib_file_that_is_not_utf8_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text("skipped\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    skipped = SkipCount()
    assert read(DataConfig(), skipped) == ["x = 1\n"]
    assert skipped == SkipCount(undecodable_files=1)


def test_stdlib_without_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="ships without its source"):
        list_files(DataConfig())


def test_files_folders_and_globs_in_sorted_order(tmp_path):
    # Written out of order, so that a listing in the file system's order has a chance to show.
    for name in ("z.txt", "b/y.txt", "a/x.txt", "a/note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = DataConfig(source="text", paths=(str(tmp_path),))
    assert read(folder) == ["a/x.txt", "b/y.txt", "z.txt"]
    pattern = DataConfig(source="text", paths=(f"{tmp_path}/**/*.md", str(tmp_path / "z.txt"), str(tmp_path)))
    assert read(pattern) == ["a/note.md", "z.txt", "a/x.txt", "b/y.txt"]  # each file once, where first named


def test_line_ends_and_empty_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    (tmp_path / "b.txt").write_bytes(b"")
    skipped = SkipCount()
    assert read(DataConfig(source="text", paths=(str(tmp_path),)), skipped) == ["one\r\ntwo\r"]
    assert skipped.empty_documents == 1


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = ["first", "zweites ü", "", "third\nline"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]), "utf-8")
    pq.write_table(pa.table({"id": [0, 1, 2, 3], "body": [*texts[:2], None, texts[3]]}), tmp_path / "a.parquet", 2)
    for source in ("jsonl", "parquet"):
        skipped = SkipCount()
        config = DataConfig(source=source, paths=(str(tmp_path),), text_field="body")
        assert read(config, skipped) == [text for text in texts if text]
        assert skipped.empty_documents == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad.jsonl:2: not a line of JSON"),
        ("[1, 2]", r"bad.jsonl:2: a JSON object is needed, this is a list"),
        ('{"body": "x", "id": 3}', r"bad.jsonl:2: no field 'text'; set data.text_field .* body, id"),
        ('{"text": 3}', r"bad.jsonl:2: field 'text' holds int"),
        ('{"text": "\\ud800"}', r"bad.jsonl:2: field 'text' has half of a surrogate pair"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(DataConfig(source="jsonl", paths=(str(path),)))


def test_bad_bytes_in_a_json_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: not a line of JSON"):
        read(DataConfig(source="jsonl", paths=(str(path),)))


def test_bad_parquet(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "count": [1]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; set data.text_field .* body, count"):
        read(DataConfig(source="parquet", paths=(path,)))
    with pytest.raises(ValueError, match="column 'count' holds int64"):
        read(DataConfig(source="parquet", paths=(path,), text_field="count"))
    (tmp_path / "torn.parquet").write_bytes(Path(path).read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"torn.parquet is not a readable Parquet file"):
        read(DataConfig(source="parquet", paths=(str(tmp_path / "torn.parquet"),)))


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.txt does not exist"):
        list_files(DataConfig(source="text", paths=(str(tmp_path / "nowhere.txt"),)))
    with pytest.raises(ValueError, match=r"no file matches .*\*.txt"):
        list_files(DataConfig(source="text", paths=(str(tmp_path / "*.txt"),)))
    with pytest.raises(ValueError, match=r"holds no \*.txt"):
        list_files(DataConfig(source="text", paths=(str(tmp_path),)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        read(DataConfig(source="text", paths=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"gone.txt can't be read \(No such file"):
        digest_files([tmp_path / "gone.txt"])
    with pytest.raises(ValueError, match=r"gone.jsonl can't be read"):
        list(read_documents(DataConfig(source="jsonl", paths=("x",)), [tmp_path / "gone.jsonl"], SkipCount()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(ValueError, match=r"a.txt can't be read \(Permission denied"):
        digest_files([path])


def test_digest_depends_on_content_and_order_only(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    a.write_text("one")
    b.write_text("two")
    c.write_text("one")
    assert digest_files([a, b]) == digest_files([c, b])
    assert digest_files([a, b]) != digest_files([b, a])
    b.write_text("twO")
    assert digest_files([a, b]) != digest_files([a, a])


def test_heldout_is_a_threshold_on_a_hash_of_the_text():
    texts = [f"document {i}" for i in range(4000)]
    few = {t for t in texts if is_heldout(t, 0.05)}
    more = {t for t in texts if is_heldout(t, 0.2)}
    assert few < more  # a larger share keeps what was held out before
    assert 0.03 < len(few) / len(texts) < 0.07
    assert not any(is_heldout(t, 0.0) for t in texts)
    assert [i for i in range(60) if is_heldout(f"document {i}", 0.05)] == [17, 18, 20, 24, 40, 44, 54]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "text"}, "set data.paths"),
        ({"paths": ("a",)}, "not read by data.source='stdlib'"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"heldout_fraction": 1.0}, "data.heldout_fraction=1.0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"epochs": 0}, "data.epochs=0"),
        ({"source": "random", "tokenizer": "x"}, "not used by data.source='random'"),
        ({"end_token": ""}, "data.end_token=''"),
    ],
)
def test_settings_that_no_run_can_have(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
