"""Records of runs: what they must hold, and two kinds of store that lose none and name what they refuse."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perf.fleet_store import FolderStore, SqliteStore, open_store
from perf.records import (
    METRICS,
    SCHEMA_VERSION,
    UTILISATIONS,
    NewerRecordError,
    RunRecord,
    config_hash,
    distribution,
    from_summary,
    software_versions,
    work_per_device,
)
from tests.contracts.tree import ROOT
from tests.perf.fleet_records import record, summary


@pytest.fixture(params=["fleet.sqlite", "fleet"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    """Either kind, not there yet."""
    return open_store(tmp_path / request.param, create=True)


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


# The record


def test_a_record_says_what_its_summary_said():
    made = record(mfu=0.5, size=16)
    assert (made.mfu, made.hfu, made.goodput) == (0.5, 0.505, 0.8)
    assert made.goodput_seconds == {"step": 480.0, "compile": 90.0, "input_wait": 30.0, "lost_work": 0.0}
    assert [one.host for one in made.step_times] == [0, 1]
    assert made.step_times[0].count == 4 and made.step_times[0].max == 0.3
    assert (made.mesh, made.num_processes, made.profiled) == ({"fsdp": 16}, 2, False)
    assert made.schema_version == SCHEMA_VERSION


def test_what_is_not_known_has_its_reason():
    made = record(mfu=None, step_times=[])
    assert made.reasons["mfu"] == "no peak is known" and made.reasons["scaling_tax"] == "no baseline"
    assert "train" in made.reasons["decode_mbu"] and "train" in made.reasons["compiles"]
    assert "step_times" in made.reasons
    assert set(made.reasons) == {name for name in METRICS if made.metric(name) is None} | {"step_times"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mfu": None}, "mfu is null without a reason"),
        ({"mfu": 1.01}, "mfu=1.01 is not between 0 and 1"),
        ({"goodput": -0.1}, "goodput=-0.1 is not between 0 and 1"),
        ({"tokens_per_second": float("nan")}, "tokens_per_second=nan is not finite"),
        ({"step_times": ()}, "step_times is empty without a reason"),
    ],
)
def test_a_wrong_record_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(record(), **changes)


def test_a_summary_without_facts_is_refused_by_their_names():
    whole = summary()
    for name in ("chip", "config_hash", "mesh"):
        del whole[name]
    with pytest.raises(ValueError, match="it has no config_hash, chip, mesh"):
        from_summary(whole)


def test_the_id_is_of_the_contents():
    assert record().id == record().id
    assert record().id.startswith("20260921T141320Z-")
    assert len({record(**changes).id for changes in ({}, {"mfu": 0.6}, {"size": 16}, {"hour": 1})}) == 4


def test_config_hash_is_of_the_values_and_not_of_their_order():
    settings = {"model": {"layers": 2, "width": 64}, "paths": [1, 2]}
    assert config_hash(settings) == config_hash({"paths": [1, 2], "model": {"width": 64, "layers": 2}})
    # SHA-256 of {"a":1}, by another program.
    assert config_hash({"a": 1}) == "015abd7f5cc57a2d"
    assert config_hash({"a": 1}) != config_hash({"a": 1.5}) != config_hash({"a": "1"})


def test_work_per_device_is_equal_at_every_size_of_a_weak_scaling():
    assert work_per_device(32, 8) == work_per_device(256, 64) == "4/1"
    assert work_per_device(8, 16) == "1/2" != work_per_device(8, 8)


def test_distribution_of_step_times():
    found = distribution(3, [float(n) for n in range(1, 102)])
    # Percentiles of 1, 2, ..., 101 are one above their names.
    expected = {
        "host": 3,
        "count": 101,
        "mean": 51.0,
        "p10": 11.0,
        "p50": 51.0,
        "p90": 91.0,
        "p99": 100.0,
        "max": 101.0,
    }
    assert found == pytest.approx(expected)
    assert distribution(0, []) is None


def test_versions_are_those_that_are_installed():
    found = software_versions("cpu", {"commit": None})
    assert found.keys() == {"python", "jax", "jaxlib"}
    assert found["jax"] == importlib.metadata.version("jax") and sys.version.startswith(found["python"])
    assert software_versions("cpu", {"commit": "abc", "modified": False})["commit"] == "abc"
    assert software_versions("cpu", {"commit": "abc", "modified": True})["commit"] == "abc+changes"


# Stores


def test_a_record_comes_back_as_it_was(store):
    made = [record(hour=hour, size=size, measures={"ttft_8_ms": 1.5}) for hour, size in ((2, 8), (1, 16), (3, 8))]
    assert [store.append(one) for one in made] == [True] * 3
    assert [store.append(one) for one in made] == [False] * 3
    read = open_store(store.path).read()
    # By when they ended.
    assert read.records == (made[1], made[0], made[2]) and read.refused == ()


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.none() | st.floats(0, 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metrics=st.tuples(*(shares if name in UTILISATIONS else st.none() | numbers for name in METRICS)),
    measures=st.dictionaries(texts, numbers, max_size=3),
    names=st.tuples(texts, texts),
    ended=st.floats(0, 4e9),
)
def test_any_record_survives_both_stores(tmp_path: Path, metrics, measures, names, ended):
    values = dict(zip(METRICS, metrics, strict=True))
    reasons = {f"{name}_reason": "why not" for name, value in values.items() if value is None}
    changes = {**values, **reasons, "measures": measures, "config": f"c{names[0]}", "chip": f"c{names[1]}"}
    made = from_summary({**summary(), **changes, "ended": ended})
    for name in ("any.sqlite", "any"):
        store = open_store(tmp_path / name, create=True)
        store.append(made)
        assert made in store.read().records


WRITER = """
import sys
from perf.fleet_store import open_store
from tests.perf.fleet_records import record
path, number = sys.argv[1], int(sys.argv[2])
store = open_store(path, create=True)
made = [record(size=8 * (number + 1), hour=hour) for hour in range(25)]
print("ready", flush=True)
sys.stdin.readline()
for one in made:
    assert store.append(one)
"""


def test_two_writers_at_once_lose_nothing(store):
    """From before there is a store: they make it together, too."""
    command = [sys.executable, "-c", WRITER, str(store.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(number)], cwd=ROOT, **pipes) for number in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    read = store.read()
    assert read.refused == ()
    assert sorted((one.num_devices, one.id) for one in read.records) == sorted(
        (size, record(size=size, hour=hour).id) for size in (8, 16) for hour in range(25)
    )
    assert not list(store.path.parent.glob(".*")) and (store.path.is_file() or not list(store.path.glob(".*")))


def test_a_newer_record_is_refused_by_name_and_left_as_it_is(tmp_path: Path):
    newer = {**record(hour=1).to_json(), "id": "from-the-future", "schema_version": SCHEMA_VERSION + 1, "colour": "red"}
    with pytest.raises(NewerRecordError):
        RunRecord.from_json(newer)

    folder = open_store(tmp_path / "fleet", create=True)
    folder.append(record())
    row = {name: None if isinstance(value, dict | list) else value for name, value in newer.items()}
    pq.write_table(pa.Table.from_pylist([row]), folder.path / "from-the-future.parquet")

    file = open_store(tmp_path / "fleet.sqlite", create=True)
    file.append(record())
    with contextlib.closing(sqlite3.connect(file.path)) as connection:
        columns = "id, schema_version, config, config_hash, chip, num_devices, ended, record"
        values = ("from-the-future", SCHEMA_VERSION + 1, "c", "h", "c", 8, 0.0, json.dumps(newer))
        connection.execute(f"INSERT INTO records ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        connection.commit()

    for store in (folder, file):
        before = contents(store.path)
        assert not store.append(record()), "an append of what is there changes nothing"
        read = store.read()
        assert read.records == (record(),)
        [line] = read.refused
        assert "from-the-future" in line and f"version {SCHEMA_VERSION + 1} is newer" in line
        assert contents(store.path) == before


def test_a_file_of_a_newer_layout_is_neither_read_nor_written(tmp_path: Path):
    store = SqliteStore(tmp_path / "fleet.sqlite")
    store.append(record())
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute("PRAGMA user_version=2")
    before = contents(store.path)
    for use in (store.read, lambda: store.append(record(hour=1)), lambda: open_store(store.path, create=True)):
        with pytest.raises(NewerRecordError, match=r"fleet\.sqlite has layout 2"):
            use()
    assert contents(store.path) == before


def test_a_truncated_record_is_named_and_the_rest_is_read(tmp_path: Path):
    store = FolderStore(tmp_path / "fleet")
    for hour in range(3):
        store.append(record(hour=hour))
    broken = store.path / f"{record(hour=1).id}.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    (store.path / "empty.parquet").touch()
    pq.write_table(pa.table({"x": [1]}), store.path / "foreign.parquet")
    pq.write_table(pa.table({"schema_version": [1]}), store.path / "other.parquet")
    (store.path / "notes.txt").write_text("not ours")
    read = store.read()
    assert read.records == (record(hour=0), record(hour=2))
    assert [line.split(":")[0] for line in read.refused] == [
        broken.name,
        "empty.parquet",
        "foreign.parquet",
        "other.parquet",
    ]


def test_a_damaged_row_is_named_and_a_damaged_file_is_refused(tmp_path: Path):
    store = SqliteStore(tmp_path / "fleet.sqlite")
    for hour in range(2):
        store.append(record(hour=hour))
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        connection.execute("UPDATE records SET record='{\"id\": ' WHERE id=?", (record(hour=1).id,))
        connection.commit()
    read = store.read()
    assert read.records == (record(hour=0),)
    [line] = read.refused
    assert record(hour=1).id in line
    (tmp_path / "short.sqlite").write_bytes(store.path.read_bytes()[:5000])
    (tmp_path / "text.sqlite").write_text("no database at all, " * 100)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE things (id TEXT)")
    for name in ("short.sqlite", "text.sqlite", "other.db"):
        with pytest.raises(ValueError, match=name):
            open_store(tmp_path / name).read()


def test_paths_that_are_no_store(tmp_path: Path):
    open_store(tmp_path / "here.sqlite", create=True).append(record())
    open_store(tmp_path / "folder", create=True).append(record())
    with pytest.raises(ValueError, match=r"no store at .*there\.sqlite; stores in .*: folder, here\.sqlite"):
        open_store(tmp_path / "there.sqlite")
    with pytest.raises(ValueError, match=r"run\.json is neither; a store is a file NAME\.sqlite, or a folder"):
        open_store(tmp_path / "run.json", create=True)
    with pytest.raises(ValueError, match=r"the folder .*nowhere is not there"):
        open_store(tmp_path / "nowhere" / "fleet", create=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "here.sqlite"]


def test_a_full_disk_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = FolderStore(tmp_path / "fleet")
    store.append(record())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.append(record(hour=1))
    assert [path.stem for path in store.path.iterdir()] == [record().id]


def test_other_programs_read_a_folder_as_one_table(tmp_path: Path):
    store = FolderStore(tmp_path / "fleet")
    store.append(record(mfu=0.4))
    store.append(record(mfu=None, hour=1, measures={"a": 1.0}))
    table = pq.read_table(store.path)
    assert table.num_rows == 2 and sorted(table["mfu"].to_pylist(), key=str) == [0.4, None]
