"""Documents from files: the standard library's source, text files, JSON lines, Parquet.

A document is a text and nothing else. Empty ones are left out. The order is that of the sorted paths, never the file
system's.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import DataConfig

# Folders of the standard library that are not its source. Tests are half of it and repeat themselves.
_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_FOLDER_PATTERN = {"text": "*.txt", "jsonl": "*.jsonl", "parquet": "*.parquet"}
_PARQUET_BATCH_ROWS = 1024


@dataclasses.dataclass
class SkipCount:
    """What a pass over the documents left out."""

    undecodable_files: int = 0
    empty_documents: int = 0


def list_files(config: DataConfig) -> list[Path]:
    """Files of the corpus, in the order in which they are read.

    Raises ValueError if a path or pattern names nothing.
    """
    if config.source == "stdlib":
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    assert config.source in _FOLDER_PATTERN, config.source
    files: dict[Path, None] = {}
    for path in config.paths:
        files.update(dict.fromkeys(_expand(path, _FOLDER_PATTERN[config.source])))
    return list(files)


def _stdlib_files(root: Path) -> list[Path]:
    """`*.py` under `root` without tests, installed packages and the build's own record of absolute paths."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _STDLIB_EXCLUDED.isdisjoint(relative.parts[:-1]) and not relative.name.startswith("_sysconfigdata"):
            found.append((relative.as_posix(), path))
    if not found:
        raise ValueError(
            f"data.source='stdlib': no *.py under {root}; this Python ships without its source, set data.source to "
            "text, jsonl or parquet"
        )
    return [path for _, path in sorted(found)]


def _expand(path: str, folder_pattern: str) -> list[Path]:
    given = Path(path)
    if given.is_dir():
        found = sorted(p for p in given.rglob(folder_pattern) if p.is_file())
        if not found:
            raise ValueError(f"data.paths: folder {path} holds no {folder_pattern}; name files or a glob")
    elif given.exists():
        found = [given]
    elif glob.has_magic(path):
        found = sorted(p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file())
        if not found:
            raise ValueError(f"data.paths: no file matches {path}")
    else:
        raise ValueError(f"data.paths: {path} does not exist")
    return found


def digest_files(files: list[Path]) -> str:
    """Hex digest of the files' bytes in order. Where they lie does not matter.

    Raises ValueError for a file that can't be read.
    """
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
        except OSError as error:
            raise _unreadable(path, error) from error
    return total.hexdigest()


def read_documents(config: DataConfig, files: list[Path], skipped: SkipCount) -> Iterator[str]:
    """The corpus's documents in order; counts in `skipped` what is left out.

    Raises ValueError for an unreadable or malformed file, naming the file and the line, row or column. Of the standard
    library (which nobody can be asked to repair) a file that isn't UTF-8 is skipped instead.
    """
    for path in files:
        if config.source == "stdlib":
            texts = _read_text(path, skipped)
        elif config.source == "text":
            texts = _read_text(path, None)
        elif config.source == "jsonl":
            texts = _read_jsonl(path, config.text_field)
        else:
            texts = _read_parquet(path, config.text_field)
        for text in texts:
            if text:
                yield text
            else:
                skipped.empty_documents += 1


def _read_text(path: Path, skipped: SkipCount | None) -> Iterator[str]:
    try:
        # Bytes, then decode: text mode would rewrite line ends.
        yield path.read_bytes().decode("utf-8")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        if skipped is None:
            raise ValueError(f"data.paths: {path} is not UTF-8 text (byte {error.start}); convert it") from error
        skipped.undecodable_files += 1


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of_line(line, field, f"{path}:{number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def _text_of_line(line: bytes, field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is a {type(record).__name__}")
    if field not in record:
        raise ValueError(
            f"{where}: no field {field!r}; set data.text_field to one of those there: {', '.join(sorted(record))}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} holds {type(text).__name__}, a string is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair at character {error.start}") from error
    return text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    # Here, because it takes a third of a second and the other sources do without it.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_column(table.schema_arrow, field, path)
            # Batches never span row groups: one group is in memory at a time.
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield "" if text is None else text
    except OSError as error:
        raise _unreadable(path, error) from error
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data.paths: {path} is not a readable Parquet file ({error})") from error


def _check_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow

    if field not in schema.names:
        raise ValueError(
            f"{path}: no column {field!r}; set data.text_field to one of those there: {', '.join(schema.names)}"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {field!r} holds {kind}, strings are needed; set data.text_field to another")


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"data.paths: {path} can't be read ({error.strerror or error})")


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split.

    A function of the text alone: adding, renaming or re-ordering files moves no document, and two copies of one text
    never stand on both sides.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64
