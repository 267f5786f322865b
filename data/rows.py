"""Rows by index: the random-access view that the loader shuffles and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data.packing import RowIndex

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segments`, `positions` int32 and `weights` float32, each [T] in a row and [B, T] in a batch.

`segments` number the documents of a row from 1, 0 is padding; `positions` restart at 0 with each; `weights` are 1 at
every token and 0 at padding: each token has a target (see packing).
"""

# Rows of the random source: more than any benchmark draws, and an index that fits the 32 bits of Grain's shuffle.
_NUM_RANDOM_ROWS = 2**31 - 1


class Rows(Protocol):
    """A sequence of rows, and what a loader's state must match to be continued on it."""

    @property
    def identity(self) -> dict[str, str | int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of a token stream (uint16 or int32 [N + 1], usually a memory map)."""

    stream: np.ndarray
    index: RowIndex
    identity: dict[str, str | int]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_tokens(self) -> int:
        """Tokens with a target, over all rows."""
        return int(self.index.lengths.sum(dtype=np.int64))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = empty_batch(self.index.sequence_length)
        at = 0
        first, last = self.index.row_offsets[index : index + 2]
        for segment, piece in enumerate(range(first, last), start=1):
            start, length = int(self.index.starts[piece]), int(self.index.lengths[piece])
            place = slice(at, at + length)
            row["tokens"][place] = self.stream[start : start + length]
            row["targets"][place] = self.stream[start + 1 : start + length + 1]
            row["segments"][place] = segment
            row["positions"][place] = np.arange(length)
            row["weights"][place] = 1.0
            at += length
        return row


@dataclasses.dataclass(frozen=True)
class RandomRows:
    """Rows of uniformly random tokens, each one document; row i is a function of the seed and i alone."""

    sequence_length: int
    vocab_size: int
    seed: int

    @property
    def identity(self) -> dict[str, str | int]:
        return {"corpus": f"random-{self.vocab_size}", "sequence_length": self.sequence_length, "packing": "none"}

    def __len__(self) -> int:
        return _NUM_RANDOM_ROWS

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # The raw 64-bit output, because NumPy keeps only that the same from version to version.
        raw = np.random.Philox(key=[self.seed, index]).random_raw(self.sequence_length + 1)
        tokens = (raw % np.uint64(self.vocab_size)).astype(np.int32)
        row = empty_batch(self.sequence_length)
        row["tokens"][:], row["targets"][:] = tokens[:-1], tokens[1:]
        row["segments"][:], row["weights"][:] = 1, 1.0
        row["positions"][:] = np.arange(self.sequence_length)
        return row


def empty_batch(*shape: int) -> Batch:
    """Padding of `shape`: token 0 in segment 0 with weight 0."""
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = np.zeros(shape, np.float32)
    return batch


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Every row once, in order, in batches of `batch_size` filled up with padding rows: a fixed list.

    Host `process_index` of `process_count` gets its rows of each batch, as the loader's hosts do.
    Raises ValueError if the batch does not divide over the hosts.
    """

    rows: Rows
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        rows_per_host(self.batch_size, self.process_count)

    def __len__(self) -> int:
        return (len(self.rows) + self.batch_size - 1) // self.batch_size

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"evaluation batch {index} of {len(self)}")
        size = rows_per_host(self.batch_size, self.process_count)
        first = index * self.batch_size + self.process_index * size
        rows = [self.rows[i] for i in range(first, min(first + size, len(self.rows)))]
        padding = empty_batch(int(self.rows.identity["sequence_length"]))
        return {
            name: np.stack([*(row[name] for row in rows), *[padding[name]] * (size - len(rows))]) for name in padding
        }

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


def rows_per_host(batch_size: int, process_count: int) -> int:
    """Raises ValueError unless `batch_size` divides over the hosts."""
    if batch_size % process_count:
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by the {process_count} hosts; "
            f"set data.batch_size to a multiple of {process_count}"
        )
    return batch_size // process_count
