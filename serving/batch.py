"""A plan as arrays of a few fixed shapes: what the host sends to the device for one call."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from serving.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams, Sequence
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


class Drawing(enum.IntEnum):
    """What it takes to draw the tokens of a batch. Each does all that those before it do, for rows that want it."""

    GREEDY = 0
    """The argmax of the logits."""
    SAMPLED = 1
    """A temperature."""
    FILTERED = 2
    """top-k, top-p or min-p."""
    FULL = 3
    """Penalties, biases, a grammar's mask, log-probabilities."""


@dataclasses.dataclass
class RowParams:
    """What is kept of a sequence's row from call to call: what stays the same, packed once, and its tokens so far.

    A list of 600 tokens takes 20 µs to become an array: for 256 rows, as long as half of a step of an 8B model.
    """

    ints: np.ndarray
    floats: np.ndarray
    penalised: bool
    """Whether the distribution depends on the tokens so far by more than the model."""
    drawing: Drawing
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
    return RowParams(
        ints, floats, penalised, _drawing(params, penalised), np.zeros(max(max_context, len(sequence.tokens)), np.int32)
    )


def _drawing(params: SamplingParams, penalised: bool) -> Drawing:
    if penalised or params.logit_bias or params.logprobs is not None:
        return Drawing.FULL
    # As `Rows.greedy_B` has it.
    if np.float32(params.temperature) < np.finfo(np.float32).tiny:
        return Drawing.GREEDY
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return Drawing.FILTERED if filtered else Drawing.SAMPLED


def _padded(values: Sequences[float], length: int, fill: float) -> np.ndarray:
    return np.array([*values, *[fill] * (length - len(values))])


# A row that takes no part: greedy, no penalties.
_EMPTY_INTS = np.zeros(NUM_INTS, np.int32)
_EMPTY_INTS[STOPS], _EMPTY_INTS[BIASED] = -1, -1
_EMPTY_FLOATS = np.zeros(NUM_FLOATS, np.float32)
_EMPTY_FLOATS[[TOP_P, REPETITION]] = 1.0


ALL_ALLOWED = np.uint32(0xFFFFFFFF)
"""Word of a grammar's mask that allows everything."""


class RowBatch(NamedTuple):
    """Arrays of B rows that stay the same from round to round: what their requests say, and M pages of each."""

    ints_BI: np.ndarray
    floats_BF: np.ndarray
    page_table_BM: np.ndarray


class State(NamedTuple):
    """Rows between rounds. A round that follows another takes this from it."""

    tokens_BW: np.ndarray | None
    """Tokens so far, of W at most; None where neither penalties nor drafts can read them, and anything where they
    could and do not."""
    last_B: np.ndarray
    """The last token, the next input."""
    length_B: np.ndarray
    """Tokens so far."""
    done_B: np.ndarray
    """Rows that take no more."""


class Tiles(NamedTuple):
    """Arrays of the T prompt tokens of each of C rows."""

    tokens_CT: np.ndarray
    starts_C: np.ndarray
    counts_C: np.ndarray


class BatchBuilder:
    """Builds the arrays of a call. `context` is the W of a state's tokens."""

    def __init__(self, page_size: int, context: int) -> None:
        self._page_size, self._context = page_size, context

    def decode(
        self,
        sequences: Sequences[Sequence],
        params: Sequences[RowParams],
        drafts: Sequences[int],
        rows: int,
        width: int,
    ) -> tuple[RowBatch, State]:
        """`drafts`: drafts that each row may take in a round. Tokens are left out (None) where nothing reads them."""
        history = any(drafts) or any(constant.penalised for constant in params)
        batch, state = self._rows(sequences, params, rows, width, history=history)
        batch.ints_BI[: len(sequences), DRAFTS] = drafts
        state.last_B[: len(sequences)] = [sequence.tokens[-1] for sequence in sequences]
        return batch, state

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
    ) -> tuple[RowBatch, State, Tiles]:
        """`spans`: sequence, start and count (at most `length`) of each tile. A tile that ends its sequence's known
        tokens is one whose next token is drawn; the rows of the others are done."""
        sequences = [sequence for sequence, _, _ in spans]
        history = any(constant.penalised for constant in params)
        batch, state = self._rows(sequences, params, rows, width, history=history)
        tiles = Tiles(np.zeros((rows, length), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32))
        for row, (sequence, start, count) in enumerate(spans):
            tiles.tokens_CT[row, :count] = params[row].tokens_of(sequence)[start : start + count]
            tiles.starts_C[row], tiles.counts_C[row] = start, count
            state.done_B[row] = start + count != len(sequence.tokens)
        return batch, state, tiles

    def _rows(self, sequences, params, rows: int, width: int, *, history: bool) -> tuple[RowBatch, State]:
        assert len(sequences) <= rows, f"{len(sequences)} rows in a program of {rows}"
        ints, floats = np.tile(_EMPTY_INTS, (rows, 1)), np.tile(_EMPTY_FLOATS, (rows, 1))
        tokens = np.zeros((rows, self._context), np.int32) if history else None
        for row, (sequence, constant) in enumerate(zip(sequences, params, strict=True)):
            ints[row], floats[row] = constant.ints, constant.floats
            ints[row, LENGTH] = len(sequence.tokens)
            if tokens is not None:
                known = constant.tokens_of(sequence)[: self._context]
                tokens[row, : len(known)] = known
        length = ints[:, LENGTH].copy()
        state = State(tokens, np.zeros(rows, np.int32), length, length >= ints[:, LIMIT])
        return RowBatch(ints, floats, self.page_table(sequences, rows, width)), state


def trial_batch(rows: int, width: int, page_size: int) -> tuple[RowBatch, State]:
    """Rows in the middle of their context whose pages are all the trash page: to try a program, and to time it."""
    ints, floats = np.tile(_EMPTY_INTS, (rows, 1)), np.tile(_EMPTY_FLOATS, (rows, 1))
    ints[:, LENGTH], ints[:, LIMIT] = width // 2, width
    state = State(None, np.zeros(rows, np.int32), ints[:, LENGTH].copy(), np.zeros(rows, bool))
    return RowBatch(ints, floats, np.zeros((rows, width // page_size), np.int32)), state


def trial_tiles(rows: int, length: int, width: int) -> Tiles:
    """The first tile of a context, for `trial_batch`."""
    counts = np.full(rows, min(length, width), np.int32)
    return Tiles(np.zeros((rows, length), np.int32), np.zeros(rows, np.int32), counts)
