"""A plan as arrays of a few fixed shapes: what the host sends to the device for one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from serving.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, Sequence
from serving.sampling import seed_words

# Columns of the integers of a row, before its stop tokens and its biased tokens.
LENGTH, PROMPT, LIMIT, TOP_K, COUPLED, SEED_HIGH, SEED_LOW, DRAFTS, LOGPROBS = range(9)
STOPS = slice(9, 9 + MAX_STOP_IDS)
BIASED = slice(STOPS.stop, STOPS.stop + MAX_LOGIT_BIAS)
NUM_INTS = BIASED.stop
# Columns of the floats of a row, before its biases.
TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
BIASES = slice(6, 6 + MAX_LOGIT_BIAS)
NUM_FLOATS = BIASES.stop


@dataclasses.dataclass
class RowParams:
    """What is kept of a sequence's row from call to call: what stays the same, packed once, and its tokens so far.

    A list of 600 tokens takes 20 µs to become an array: for 256 rows, as long as half of a step of an 8B model.
    """

    ints: np.ndarray
    floats: np.ndarray
    penalised: bool
    """Whether the distribution depends on the tokens so far by more than the model."""
    tokens: np.ndarray
    """int32, as long as the sequence may become; the first `known` count."""
    known: int = 0

    def tokens_of(self, sequence: Sequence) -> np.ndarray:
        """The tokens so far, with those that came since the last call."""
        new = sequence.tokens[self.known :]
        self.tokens[self.known : self.known + len(new)] = new
        self.known += len(new)
        return self.tokens[: self.known]


def row_params(sequence: Sequence, *, seed: int, max_context: int) -> RowParams:
    """`seed` is the request's own, or the engine's choice where it has none."""
    params = sequence.request.params
    ints, floats = np.zeros(NUM_INTS, np.int32), np.zeros(NUM_FLOATS, np.float32)
    ints[PROMPT] = sequence.num_prompt
    ints[LIMIT] = min(sequence.num_prompt + params.max_tokens, max_context)
    ints[TOP_K] = min(params.top_k, np.iinfo(np.int32).max)
    ints[COUPLED] = params.seed is not None
    ints[[SEED_HIGH, SEED_LOW]] = np.array(seed_words(seed), np.uint32).view(np.int32)
    ints[LOGPROBS] = params.logprobs is not None
    ints[STOPS] = _padded(params.stop_ids, MAX_STOP_IDS, -1)
    ints[BIASED] = _padded([token for token, _ in params.logit_bias], MAX_LOGIT_BIAS, -1)
    floats[TEMPERATURE], floats[TOP_P], floats[MIN_P] = params.temperature, params.top_p, params.min_p
    floats[PRESENCE], floats[FREQUENCY] = params.presence_penalty, params.frequency_penalty
    floats[REPETITION] = params.repetition_penalty
    floats[BIASES] = _padded([value for _, value in params.logit_bias], MAX_LOGIT_BIAS, 0)
    penalised = params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)
    return RowParams(ints, floats, penalised, np.zeros(max(max_context, len(sequence.tokens)), np.int32))


def _padded(values: Sequences[float], length: int, fill: float) -> np.ndarray:
    return np.array([*values, *[fill] * (length - len(values))])


# A row that takes no part: greedy, no penalties.
_EMPTY_INTS = np.zeros(NUM_INTS, np.int32)
_EMPTY_INTS[STOPS], _EMPTY_INTS[BIASED] = -1, -1
_EMPTY_FLOATS = np.zeros(NUM_FLOATS, np.float32)
_EMPTY_FLOATS[[TOP_P, REPETITION]] = 1.0


ALL_ALLOWED = np.uint32(0xFFFFFFFF)
"""Word of a grammar's mask that allows everything."""


class DecodeBatch(NamedTuple):
    """Arrays of a decode call: B rows, M pages of each, W = M · page size tokens of each."""

    ints_BI: np.ndarray
    floats_BF: np.ndarray
    page_table_BM: np.ndarray
    tokens_BW: np.ndarray | None
    last_B: np.ndarray | None = None
    """The last token of each row, the next input; None for that of `tokens_BW`, which may hold anything if neither a
    penalty nor a draft reads it. A call that follows another takes this and what stands around it from that one."""
    length_B: np.ndarray | None = None
    """Tokens so far; None for those of `ints_BI`."""
    done_B: np.ndarray | None = None
    """Rows that take no more; None for none but those at their limit."""


class PrefillBatch(NamedTuple):
    """Arrays of a prefill call: C rows, each with a tile of T tokens."""

    ints_CI: np.ndarray
    floats_CF: np.ndarray
    page_table_CM: np.ndarray
    tokens_CW: np.ndarray
    tile_CT: np.ndarray
    spans_C3: np.ndarray
    """Start, count, and whether the tile ends the sequence's known tokens, so that the next one is drawn."""


class BatchBuilder:
    """Builds the arrays of a call."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size

    def decode(
        self,
        sequences: Sequences[Sequence],
        params: Sequences[RowParams],
        drafts: Sequences[int],
        rows: int,
        width: int,
    ) -> DecodeBatch:
        """`drafts`: drafts that each row may take in a round. Tokens are left out (None) where nothing reads them."""
        history = any(drafts) or any(constant.penalised for constant in params)
        batch = self._rows(sequences, params, rows, width, history=history)
        batch.ints_BI[: len(sequences), DRAFTS] = drafts
        last_B = np.zeros(rows, np.int32)
        last_B[: len(sequences)] = [sequence.tokens[-1] for sequence in sequences]
        return batch._replace(last_B=last_B, length_B=batch.ints_BI[:, LENGTH].copy(), done_B=np.zeros(rows, bool))

    def page_table(self, sequences: Sequences[Sequence], rows: int, width: int) -> np.ndarray:
        """int32 [rows, pages of `width`]."""
        table = np.zeros((rows, width // self._page_size), np.int32)
        for row, sequence in enumerate(sequences):
            pages = sequence.pages[: table.shape[1]]
            table[row, : len(pages)] = pages
        return table

    def prefill(
        self,
        spans: Sequences[tuple[Sequence, int, int]],
        params: Sequences[RowParams],
        rows: int,
        width: int,
        length: int,
    ) -> PrefillBatch:
        """`spans`: sequence, start and count (at most `length`) of each tile."""
        batch = self._rows([sequence for sequence, _, _ in spans], params, rows, width, history=True)
        tiles, spans_C3 = np.zeros((rows, length), np.int32), np.zeros((rows, 3), np.int32)
        for row, (sequence, start, count) in enumerate(spans):
            tiles[row, :count] = params[row].tokens_of(sequence)[start : start + count]
            spans_C3[row] = start, count, start + count == len(sequence.tokens)
        return PrefillBatch(*batch[:4], tiles, spans_C3)

    def _rows(self, sequences, params, rows: int, width: int, *, history: bool) -> DecodeBatch:
        assert len(sequences) <= rows, f"{len(sequences)} rows in a program of {rows}"
        ints, floats = np.tile(_EMPTY_INTS, (rows, 1)), np.tile(_EMPTY_FLOATS, (rows, 1))
        tokens = np.zeros((rows, width), np.int32) if history else None
        for row, (sequence, constant) in enumerate(zip(sequences, params, strict=True)):
            ints[row], floats[row] = constant.ints, constant.floats
            ints[row, LENGTH] = len(sequence.tokens)
            if tokens is not None:
                known = constant.tokens_of(sequence)[:width]
                tokens[row, : len(known)] = known
        return DecodeBatch(ints, floats, self.page_table(sequences, rows, width), tokens)


def trial_batch(rows: int, width: int, page_size: int, tile_tokens: int | None) -> DecodeBatch | PrefillBatch:
    """Rows in the middle of their context whose pages are all the trash page: to try a program, and to time it."""
    ints, floats = np.tile(_EMPTY_INTS, (rows, 1)), np.tile(_EMPTY_FLOATS, (rows, 1))
    ints[:, LENGTH], ints[:, LIMIT] = width // 2, width
    batch = DecodeBatch(ints, floats, np.zeros((rows, width // page_size), np.int32), np.zeros((rows, width), np.int32))
    if tile_tokens is None:
        zeros_B = np.zeros(rows, np.int32)
        return batch._replace(last_B=zeros_B, length_B=ints[:, LENGTH].copy(), done_B=np.zeros(rows, bool))
    count = min(tile_tokens, width)
    spans = np.tile(np.array([0, count, 1], np.int32), (rows, 1))
    return PrefillBatch(*batch[:4], np.zeros((rows, tile_tokens), np.int32), spans)
