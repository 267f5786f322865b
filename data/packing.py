"""Documents to rows of one length: which piece of which document stands where.

Layout of the token stream: `<|end|> document <|end|> document … <|end|>`, flat. Position i is the pair (input
stream[i], target stream[i + 1]), so a document of n tokens is n + 1 pairs: from the end token that opens it, which
predicts its first token, to its last token, which predicts the end token. A document cut in two keeps every pair,
because the last pair of the first piece reaches one token into the second.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data.config import Packing

# Documents that best-fit packing looks at together. More of them pack no tighter: at this size the padding that is
# left is what the last few rows of a window lack.
_WINDOW = 8192


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Pieces of a stream and the rows they stand in: row r is pieces row_offsets[r] to row_offsets[r + 1].

    `starts` int64 and `lengths` int32, one per piece, count pairs of the stream; `row_offsets` int64, one more than
    rows.
    """

    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray
    sequence_length: int

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of row positions that hold a token; 0 without rows."""
        positions = len(self) * self.sequence_length
        return int(self.lengths.sum(dtype=np.int64)) / positions if positions else 0.0


def pack(document_offsets: np.ndarray, sequence_length: int, packing: Packing) -> RowIndex:
    """Rows over a stream whose document k is the pairs document_offsets[k] to document_offsets[k + 1].

    Every pair stands in exactly one row, whichever the packing.
    """
    if packing == "concatenate":
        return _concatenate(document_offsets, sequence_length)
    parts = [
        _best_fit_window(document_offsets[first : first + _WINDOW + 1], sequence_length)
        for first in range(0, len(document_offsets) - 1, _WINDOW)
    ]
    starts = np.concatenate([np.zeros(0, np.int64), *(p.starts for p in parts)])
    lengths = np.concatenate([np.zeros(0, np.int32), *(p.lengths for p in parts)])
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(p.row_offsets) for p in parts)])
    return RowIndex(starts, lengths, np.cumsum(counts), sequence_length)


def _concatenate(document_offsets: np.ndarray, sequence_length: int) -> RowIndex:
    """Cuts the stream every `sequence_length` pairs; a piece is what a row holds of one document."""
    total = int(document_offsets[-1])
    row_starts = np.arange(0, total, sequence_length, dtype=np.int64)
    starts = np.union1d(document_offsets[:-1], row_starts)
    lengths = np.diff(np.append(starts, total)).astype(np.int32)
    row_offsets = np.append(np.searchsorted(starts, row_starts), len(starts))
    return RowIndex(starts, lengths, row_offsets, sequence_length)


def _best_fit_window(document_offsets: np.ndarray, sequence_length: int) -> RowIndex:
    """Full rows out of the long documents, then best-fit decreasing over what remains of each document."""
    begins, sizes = document_offsets[:-1], np.diff(document_offsets)
    num_full = sizes // sequence_length
    within = np.arange(num_full.sum()) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_starts = np.repeat(begins, num_full) + within * sequence_length

    rest_starts = begins + num_full * sequence_length
    rest_lengths = sizes - num_full * sequence_length
    rest_starts, rest_lengths = rest_starts[rest_lengths > 0], rest_lengths[rest_lengths > 0]
    rows = best_fit_decreasing(rest_lengths, sequence_length)
    order = np.asarray([piece for row in rows for piece in row], np.int64)

    starts = np.concatenate([full_starts, rest_starts[order]])
    lengths = np.concatenate([np.full(len(full_starts), sequence_length), rest_lengths[order]]).astype(np.int32)
    counts = np.concatenate(
        [[0], np.ones(len(full_starts), np.int64), np.asarray([len(row) for row in rows], np.int64)]
    )
    return RowIndex(starts, lengths, np.cumsum(counts), sequence_length)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, longest first, each placed in the row that it fills best.

    Ties go to the first of equal lengths and to the row touched last. Lengths are between 1 and `capacity`.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    # Bit r is set when some row has room for exactly r tokens: the tightest row is the lowest bit from `length` up.
    rooms = 0
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[piece]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        room -= length
        if room:
            rows_with_room.setdefault(room, []).append(row)
            rooms |= 1 << room
    return rows
