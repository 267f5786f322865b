"""Where a fleet's records are kept: one SQLite file of a host, or a folder of Parquet files that many hosts may write.

SQLite's write-ahead log needs memory that its writers share, so a file serves the processes of one host; on a network
file system give a folder. There every record is a file of its own, written beside and renamed: two writers never touch
the same bytes, and a reader sees a record whole or not at all. `SELECT * FROM 'store/*.parquet'` reads it elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from perf.records import NewerRecordError, RunRecord

SUFFIXES = (".sqlite", ".db")
LAYOUT_VERSION = 1
"""Of the SQLite table, kept as the file's user_version; a record's own version is beside each record."""
BUSY_SECONDS = 30.0
"""How long a writer waits for the others; an insert takes milliseconds."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """Records in the order in which the runs ended, and a line for each thing in the store that can't be read."""

    records: tuple[RunRecord, ...]
    refused: tuple[str, ...]


class FleetStore(Protocol):
    path: Path

    def check(self) -> None:
        """Raises ValueError for a file that is no store; one that is not there yet may become one."""

    def append(self, record: RunRecord) -> bool:
        """False if it is there already. Raises OSError where nothing can be written, ValueError for a foreign file."""

    def read(self) -> Contents:
        """Raises ValueError for a file that is no store."""


def open_store(path: Path | str, *, create: bool = False) -> FleetStore:
    """The store at `path`: a file if it ends in .sqlite or .db, else a folder. `create` allows it not to be there yet.

    Nothing is written until something is appended. Raises ValueError for a path that is, or can become, no store.
    """
    path = Path(path)
    wanted = "a store is a file NAME.sqlite, or a folder"
    if path.suffix in SUFFIXES and not path.is_dir():
        kind = SqliteStore
    elif path.is_dir() or (not path.exists() and not path.suffix):
        kind = FolderStore
    else:
        raise ValueError(f"store {path} is neither; {wanted}")
    if not path.exists() and not create:
        there = ", ".join(_stores_in(path.parent)) or "none"
        raise ValueError(f"no store at {path}; stores in {path.parent}: {there}")
    if not path.exists() and not path.absolute().parent.is_dir():
        raise ValueError(f"store {path}: the folder {path.parent} is not there; make it, or name another store")
    store = kind(path)
    store.check()
    return store


def _stores_in(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if (path.is_file() and path.suffix in SUFFIXES) or (path.is_dir() and any(path.glob("*.parquet"))):
            yield path.name


def _ordered(records: list[RunRecord], refused: list[str]) -> Contents:
    return Contents(tuple(sorted(records, key=lambda record: (record.ended, record.id))), tuple(refused))


@dataclasses.dataclass(frozen=True)
class SqliteStore:
    """A table `records`: the record as JSON, and beside it the columns that people ask for."""

    path: Path

    def check(self) -> None:
        if self.path.exists():
            with self._connection("ro"):
                pass

    def append(self, record: RunRecord) -> bool:
        if not self.path.exists():
            self._create()
        row = record.to_json()
        names = ("id", "schema_version", "config", "config_hash", "chip", "num_devices", "ended", "mfu", "decode_mbu")
        values = [*(row[name] for name in names), json.dumps(row, allow_nan=False)]
        statement = f"INSERT OR IGNORE INTO records VALUES ({', '.join('?' * len(values))})"
        with self._connection("rw") as connection:
            try:
                with connection:
                    return connection.execute(statement, values).rowcount == 1
            except sqlite3.OperationalError as error:
                raise OSError(f"store {self.path} can't be written: {error}") from error

    def read(self) -> Contents:
        records, refused = [], []
        with self._connection("ro") as connection:
            rows = connection.execute("SELECT id, record FROM records").fetchall()
        for name, text in rows:
            try:
                records.append(RunRecord.from_json(json.loads(text)))
            except (ValueError, TypeError, AttributeError) as error:
                refused.append(f"{self.path.name}, record {name}: {error}")
        return _ordered(records, refused)

    def _create(self) -> None:
        """Made beside and linked into place, so that a store is never seen without its table or its log mode."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(
                "CREATE TABLE records (id TEXT PRIMARY KEY, schema_version INTEGER NOT NULL, config TEXT NOT NULL, "
                "config_hash TEXT NOT NULL, chip TEXT NOT NULL, num_devices INTEGER NOT NULL, ended REAL NOT NULL, "
                "mfu REAL, decode_mbu REAL, record TEXT NOT NULL)"
            )
            connection.execute(f"PRAGMA user_version={LAYOUT_VERSION}")
            connection.commit()
        try:
            # A second process may have been first: its store is as good.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self.path)
        finally:
            temporary.unlink()

    @contextlib.contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        try:
            uri = f"{self.path.absolute().as_uri()}?mode={mode}"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version > LAYOUT_VERSION:
                    raise NewerRecordError(
                        f"store {self.path} has layout {version}, newer than this code's {LAYOUT_VERSION}; it is left "
                        "as it is: use the version of Ridgeline that wrote it, or another store"
                    )
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name='records'").fetchone() is None:
                    raise ValueError(f"{self.path} is an SQLite file without a table of records; name another store")
                yield connection
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} can't be read as a store: {error}") from error


@dataclasses.dataclass(frozen=True)
class FolderStore:
    """ID.parquet for each record, one row each, all of one schema."""

    path: Path

    def check(self) -> None:
        """A file that is no record is named by `read`, and stands in nobody's way."""

    def append(self, record: RunRecord) -> bool:
        self.path.mkdir(exist_ok=True)
        target = self.path / f"{record.id}.parquet"
        if target.exists():
            return False
        temporary = self.path / f".{record.id}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(_parquet_bytes(record))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def read(self) -> Contents:
        records, refused = [], []
        for path in sorted(self.path.glob("*.parquet")):
            try:
                records.append(_from_parquet(path))
            except (ValueError, OSError) as error:
                refused.append(f"{path.name}: {error}")
        return _ordered(records, refused)


def _schema():
    # Imported late: half a second that a run without a store, or with a file, need not wait.
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    times = [pa.field(name, number) for name in ("mean", "p10", "p50", "p90", "p99", "max")]
    steps = pa.struct([pa.field("host", pa.int64()), pa.field("count", pa.int64()), *times])
    kinds: dict[str, Any] = {
        "schema_version": pa.int64(),
        "num_devices": pa.int64(),
        "num_processes": pa.int64(),
        "profiled": pa.bool_(),
        "mesh": pa.map_(text, pa.int64()),
        "versions": pa.map_(text, text),
        "measures": pa.map_(text, number),
        "goodput_seconds": pa.map_(text, number),
        "reasons": pa.map_(text, text),
        "step_times": pa.list_(steps),
    }
    texts = ("id", "mode", "workload", "config", "config_hash", "chip")
    names = [field.name for field in dataclasses.fields(RunRecord)]
    return pa.schema([pa.field(name, kinds.get(name, text if name in texts else number)) for name in names])


def _parquet_bytes(record: RunRecord) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {name: list(value.items()) if isinstance(value, dict) else value for name, value in record.to_json().items()}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=_schema()), sink, compression="none")
    return sink.getvalue()


def _from_parquet(path: Path) -> RunRecord:
    """Raises ValueError for what is not one record (pyarrow's own errors of damaged files are ValueErrors too)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(io.BytesIO(path.read_bytes())).read()
    if table.num_rows != 1:
        raise ValueError(f"it has {table.num_rows} rows: not one record of a run")
    (row,) = table.to_pylist()
    for field in table.schema:
        if pa.types.is_map(field.type) and row[field.name] is not None:
            row[field.name] = dict(row[field.name])
    return RunRecord.from_json(row)
