"""The manifest beside a checkpoint's arrays: what was saved, by what, and how to tell that all of it is there."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

# Orbax rewrites these two after the manifest, just before the rename that commits, and no restored value depends
# on what they say.
_UNLISTED = (MANIFEST_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_COMMIT_FILE = "commit_success.txt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, through no fault of the settings."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array: global shape, dtype name, and how it was sharded when saved (information only)."""

    shape: tuple[int, ...]
    dtype: str
    sharding: str


@dataclasses.dataclass(frozen=True)
class File:
    """One file below the checkpoint: size in bytes, and CRC-32 or None where checksums were off."""

    size: int
    crc32: int | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its arrays. A directory without a valid one is no checkpoint.

    `architecture` decides whether a model can take the arrays; `run_config` and `devices` are information.
    `created` is ISO 8601, UTC. `metrics` has None for a value that was not finite.
    """

    step: int
    created: str
    architecture: dict[str, Any]
    run_config: dict[str, Any]
    data_state: dict[str, Any]
    metrics: dict[str, float | None]
    code: dict[str, Any]
    devices: dict[str, Any]
    tree: dict[str, Leaf]
    files: dict[str, File] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def architecture_hash(self) -> str:
        return digest(self.architecture)


def plain(value: Any, what: str) -> Any:
    """`value` as JSON gives it back (tuples become lists). Raises ValueError for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold only finite numbers, strings, lists and dictionaries: {error}") from error


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(leaves: Mapping[str, jax.Array]) -> dict[str, Leaf]:
    """Manifest entries of named arrays."""
    return {name: Leaf(tuple(x.shape), str(x.dtype), str(x.sharding)) for name, x in leaves.items()}


def finite_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    values = {name: float(value) for name, value in (metrics or {}).items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_manifest(directory: Path, manifest: Manifest, *, checksum: bool) -> None:
    """Lists the files below `directory` in `manifest` and writes it there, durably.

    To be called when every array file is complete and before the directory gets its final name.
    """
    names = [name for name in _files_below(directory) if name not in _UNLISTED]
    sizes = [(directory / name).stat().st_size for name in names]
    sums = _checksums(directory, names) if checksum else [None] * len(names)
    files = {name: File(size, crc) for name, size, crc in zip(names, sizes, sums, strict=True)}
    body = dataclasses.asdict(dataclasses.replace(manifest, files=files))
    body["architecture_hash"] = manifest.architecture_hash
    body["manifest_hash"] = digest(plain(body, "manifest"))
    with open(directory / MANIFEST_FILE, "w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Makes the entries of `directory` outlast a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Manifest of the checkpoint in `directory`.

    Raises CheckpointError if there is none or it is damaged, ValueError if another format version wrote it.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable: {error}") from error
    if not isinstance(body, dict) or body.pop("manifest_hash", None) != digest(body):
        raise CheckpointError(f"{path} does not match its own checksum")
    if body["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {directory} has format version {body['format_version']}, and this code reads version "
            f"{FORMAT_VERSION}; restore it with the code that wrote it: {body['code']}"
        )
    del body["architecture_hash"]
    tree = {name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["sharding"]) for name, leaf in body["tree"].items()}
    files = {name: File(**file) for name, file in body["files"].items()}
    return Manifest(**{**body, "tree": tree, "files": files})


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Raises CheckpointError if a file is missing or has not the size that the manifest lists."""
    if not (directory / _COMMIT_FILE).is_file():
        raise CheckpointError(f"{_COMMIT_FILE} is missing")
    for name, file in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{name} is missing") from error
        if size != file.size:
            raise CheckpointError(f"{name} has {size} bytes, and {file.size} were written")


def check_contents(directory: Path, manifest: Manifest, *, part: int, num_parts: int) -> None:
    """Raises CheckpointError if a file's checksum differs; `part` of `num_parts` shares the work among processes."""
    names = [name for name, file in manifest.files.items() if file.crc32 is not None][part::num_parts]
    try:
        sums = _checksums(directory, names)
    except OSError as error:
        raise CheckpointError(f"a file cannot be read: {error}") from error
    for name, found in zip(names, sums, strict=True):
        if found != manifest.files[name].crc32:
            raise CheckpointError(f"{name} does not match its checksum")


def _files_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _checksums(directory: Path, names: list[str]) -> list[int]:
    # zlib releases the interpreter lock for large blocks.
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda name: _crc32(directory / name), names))


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def architecture_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line per field whose value differs, named by its dotted path."""
    left, right = _flatten(saved), _flatten(wanted)
    absent = "absent"
    return [
        f"{name}: {left.get(name, absent)} in the checkpoint, {right.get(name, absent)} in this run"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, absent) != right.get(name, absent)
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat
