"""Preparing a corpus: files to a tokenizer, two token streams and their rows, cached on disk. Host work only.

Every host prepares the whole corpus, and all of them come to the same rows. What costs time is kept in the cache
folder under a name that is a hash of all it depends on, so a changed file or setting never meets an old entry:
`tokenizer-HASH.json`, and `tokens-HASH/` with the encoded splits, which are memory-mapped from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from data.config import DataConfig
from data.packing import pack
from data.rows import PackedRows, RandomRows
from data.sources import SkipCount, digest_files, is_heldout, list_files, read_documents
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# Part of every cache name: raise it when training, encoding or the layout on disk changes.
_FORMAT = "1"
_SPLITS = ("train", "heldout")
# Characters that are encoded together: enough for all cores, little enough to stream a corpus larger than memory.
_ENCODE_CHARACTERS = 4 * 1024 * 1024
_GZIP_CONTAINER = 31
"""`wbits` of zlib for the gzip format with the largest window."""


@dataclasses.dataclass(frozen=True)
class SplitStats:
    """Size of a split: whole documents, their UTF-8 bytes, and tokens (each document's end token counted once)."""

    documents: int
    bytes: int
    tokens: int

    def describe(self) -> str:
        return f"{self.documents:,} documents, {self.bytes / 1e6:.1f} MB, {self.tokens:,} tokens"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus. The random source has neither tokenizer nor held-out split.

    Summed over `heldout` rows, the weighted loss counts every token of every held-out document once, and one end token
    for each: bits per byte = nats / ln 2 / `heldout_bytes`.
    """

    fingerprint: str
    tokenizer: Tokenizer | None
    train: PackedRows | RandomRows
    heldout: PackedRows | None
    train_stats: SplitStats | None
    heldout_stats: SplitStats | None
    skipped: SkipCount
    heldout_path: Path | None
    """UTF-8 text of the held-out documents, one after the other."""

    @property
    def heldout_bytes(self) -> int:
        return 0 if self.heldout_stats is None else self.heldout_stats.bytes

    @property
    def packing_efficiency(self) -> float:
        """Share of the training rows' positions that hold a token."""
        return self.train.index.efficiency if isinstance(self.train, PackedRows) else 1.0

    def heldout_gzip_bits_per_byte(self) -> float | None:
        """`gzip -9` of the held-out documents together; None without any."""
        if self.heldout_path is None or not self.heldout_bytes:
            return None
        with self.heldout_path.open("rb") as stream:
            return _gzip_bits_per_byte(iter(lambda: stream.read(1 << 20), b""))

    def summary(self) -> str:
        """One line for the log."""
        if self.train_stats is None or self.heldout_stats is None:
            return f"random tokens, corpus {self.fingerprint}"
        left_out = {
            "files that are not UTF-8": self.skipped.undecodable_files,
            "empty documents": self.skipped.empty_documents,
        }
        skipped = " and ".join(f"{count} {what}" for what, count in left_out.items() if count)
        return (
            f"training on {self.train_stats.describe()} in {len(self.train):,} rows "
            f"({self.packing_efficiency:.1%} full); held out {self.heldout_stats.describe()}; "
            f"left out {skipped or 'nothing'}"
        )


def prepare(config: DataConfig, *, vocab_size: int, cache_dir: Path) -> Corpus:
    """Reads, splits, tokenizes and packs the corpus of `config` for a model of `vocab_size` tokens.

    Raises ValueError for whatever is wrong with files, settings or tokenizer, and for a split that comes out empty.
    """
    if vocab_size < 1:
        raise ValueError(f"model.vocab_size={vocab_size} must be at least 1")
    if config.source == "random":
        rows = RandomRows(config.sequence_length, vocab_size, config.seed)
        return Corpus(str(rows.identity["corpus"]), None, rows, None, None, None, SkipCount(), None)
    files = list_files(config)
    content = digest_files(files)
    try:
        tokenizer = _tokenizer(config, files, content, vocab_size, cache_dir)
        tokenizer.check_vocabulary(vocab_size)
        fingerprint = _digest(content, *_reading(config), tokenizer.fingerprint)
        folder = cache_dir / f"tokens-{fingerprint}"
        if not folder.exists():
            _encode_corpus(config, files, tokenizer, folder)
    except OSError as error:  # of writing: what can't be read is a ValueError already
        raise ValueError(f"the data cache {cache_dir} can't be written ({error}); free space or move it") from error
    return _open_corpus(config, folder, tokenizer, fingerprint)


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits of `gzip -9` of the texts' UTF-8 one after the other, per byte. Raises ValueError without a byte."""
    return _gzip_bits_per_byte(text.encode("utf-8") for text in texts)


def _gzip_bits_per_byte(chunks: Iterable[bytes]) -> float:
    packer = zlib.compressobj(level=9, wbits=_GZIP_CONTAINER)
    given = written = 0
    for chunk in chunks:
        given += len(chunk)
        written += len(packer.compress(chunk))
    written += len(packer.flush())
    if not given:
        raise ValueError("bits per byte of an empty text: at least one byte is needed")
    return 8 * written / given


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, (_FORMAT, *parts))).encode("utf-8"), digest_size=12).hexdigest()


def _reading(config: DataConfig) -> tuple[object, ...]:
    """Settings that decide which documents the files' bytes hold, and their split."""
    text_field = config.text_field if config.source in ("jsonl", "parquet") else ""
    return config.source, text_field, config.heldout_fraction


def _tokenizer(config: DataConfig, files: list[Path], content: str, vocab_size: int, cache_dir: Path) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(Path(config.tokenizer), config.end_token)
    key = _digest(content, *_reading(config), config.tokenizer_bytes, config.end_token, vocab_size)
    path = cache_dir / f"tokenizer-{key}.json"
    if path.exists():
        return load_tokenizer(path, config.end_token)
    documents = _training_documents(config, files)
    first = next(documents, None)
    if first is None:
        raise _empty_split(config, "train")
    tokenizer = train_tokenizer(itertools.chain([first], documents), vocab_size, config.end_token)
    tokenizer.save(path)
    return tokenizer


def _training_documents(config: DataConfig, files: list[Path]) -> Iterator[str]:
    """Documents of the training split, up to the first that would pass `tokenizer_bytes`, but at least one."""
    taken = 0
    for text in read_documents(config, files, SkipCount()):
        if is_heldout(text, config.heldout_fraction):
            continue
        size = len(text.encode("utf-8"))
        if taken and taken + size > config.tokenizer_bytes:
            return
        taken += size
        yield text


def _empty_split(config: DataConfig, split: str) -> ValueError:
    read = ", ".join(config.paths) or f"source {config.source!r}"
    if split == "train":
        return ValueError(
            f"the corpus is empty: {read} holds no document for training "
            f"(data.heldout_fraction={config.heldout_fraction}); add text to data.paths or lower data.heldout_fraction"
        )
    return ValueError(
        f"no document of {read} fell into the held-out split with data.heldout_fraction={config.heldout_fraction}, "
        "which is drawn by document; raise it, give more documents, or set it to 0 for no evaluation"
    )


class _SplitWriter:
    """Appends encoded documents to a token stream on disk: end token, then each document and its end token."""

    def __init__(self, stream: IO[bytes], end_id: int, dtype: np.dtype) -> None:
        self._stream = stream
        self._end = np.asarray([end_id], dtype)
        self._stream.write(self._end.tobytes())
        self.offsets = [0]
        self.bytes = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        self._stream.write(tokens.astype(self._end.dtype).tobytes())
        self._stream.write(self._end.tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens) + 1)
        self.bytes += num_bytes


def _encode_corpus(config: DataConfig, files: list[Path], tokenizer: Tokenizer, folder: Path) -> None:
    """Fills `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    building.mkdir()
    try:
        _write_entry(config, files, tokenizer, building)
        try:
            building.rename(folder)
        except OSError:
            # Another process finished the same entry first; any other failure is one.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_entry(config: DataConfig, files: list[Path], tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<i4")
    skipped = SkipCount()
    with (
        (folder / "train.tokens").open("wb") as train_stream,
        (folder / "heldout.tokens").open("wb") as heldout_stream,
        (folder / "heldout.text").open("wb") as heldout_text,
    ):
        train = _SplitWriter(train_stream, tokenizer.end_id, dtype)
        heldout = _SplitWriter(heldout_stream, tokenizer.end_id, dtype)
        for texts in _chunks(read_documents(config, files, skipped), _ENCODE_CHARACTERS):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                content = text.encode("utf-8")
                if is_heldout(text, config.heldout_fraction):
                    heldout.add(tokens, len(content))
                    heldout_text.write(content)
                else:
                    train.add(tokens, len(content))
    for split, writer in zip(_SPLITS, (train, heldout), strict=True):
        if len(writer.offsets) == 1 and (split == "train" or config.heldout_fraction):
            raise _empty_split(config, split)
        np.save(folder / f"{split}.offsets.npy", np.asarray(writer.offsets, np.int64))
    facts = {
        "dtype": dtype.str,
        "bytes": {"train": train.bytes, "heldout": heldout.bytes},
        "skipped": dataclasses.asdict(skipped),
    }
    (folder / "facts.json").write_text(json.dumps(facts), "utf-8")


def _chunks(texts: Iterable[str], max_characters: int) -> Iterator[list[str]]:
    """Lists of texts that pass `max_characters` by the last text at most."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= max_characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _open_corpus(config: DataConfig, folder: Path, tokenizer: Tokenizer, fingerprint: str) -> Corpus:
    """Raises ValueError for an entry that something outside has damaged."""
    rows, stats = {}, {}
    identity = {"corpus": fingerprint, "sequence_length": config.sequence_length, "packing": config.packing}
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        skipped = SkipCount(**facts["skipped"])
        streams = {split: _open_split(folder, split, np.dtype(facts["dtype"])) for split in _SPLITS}
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"the cached tokens in {folder} are damaged ({error}); delete that folder") from error
    for split, (stream, offsets) in streams.items():
        rows[split] = PackedRows(stream, pack(offsets, config.sequence_length, config.packing), identity)
        stats[split] = SplitStats(len(offsets) - 1, facts["bytes"][split], int(offsets[-1]))
    return Corpus(
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        train=rows["train"],
        heldout=rows["heldout"] if stats["heldout"].documents else None,
        train_stats=stats["train"],
        heldout_stats=stats["heldout"],
        skipped=skipped,
        heldout_path=folder / "heldout.text",
    )


def _open_split(folder: Path, split: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Token stream and document offsets (see packing)."""
    offsets = np.load(folder / f"{split}.offsets.npy")
    stream = np.memmap(folder / f"{split}.tokens", dtype, mode="r")
    if len(stream) != offsets[-1] + 1:
        raise ValueError(f"{split}.tokens has {len(stream)} tokens, {offsets[-1] + 1} are recorded")
    return stream, offsets
