"""A plan as calls to the device, and what came of each sequence. Knows rows, cells and arrays; nothing of text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import jax
import numpy as np

from serving.batch import ALL_ALLOWED, BatchBuilder, DecodeBatch, RowParams, row_params
from serving.grammar import Matcher
from serving.programs import Result
from serving.request import Sequence, TokenLogprob
from serving.runner import Cell, Runner
from serving.scheduler import Plan, Tile


@dataclasses.dataclass
class Outcome:
    """What a plan's calls gave one sequence. `error` says why its row is lost; the tokens before that stand."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    error: str | None = None
    drafted: list[int] = dataclasses.field(default_factory=list)
    """Of each round that emitted something: drafts proposed."""
    accepted: list[int] = dataclasses.field(default_factory=list)


class CallRecord(NamedTuple):
    """One call, for the measurements."""

    cell: Cell
    rows: int
    rounds: int
    """Rounds that ran: a call ends early when every row is done."""
    seconds: float
    """From the end of the call before (or its own start) to its own end."""
    drafts: int
    lengths: tuple[int, ...]
    """Live tokens of each row at the start."""
    row_rounds: tuple[int, ...]
    """Rounds that each row took part in."""
    spans: tuple[tuple[int, int], ...]
    """Start and count of each tile of a prefill."""
    draws: int
    """Rows whose next token was drawn."""
    emitted: int
    experts: int
    """Experts touched, summed over layers and rounds."""
    drafted: tuple[int, ...]
    """Of each row in each round that emitted something: drafts proposed."""
    accepted: tuple[int, ...]


@dataclasses.dataclass
class Pending:
    """A call that was started."""

    cell: Cell
    sequences: list[Sequence]
    """One for each row."""
    draws: list[bool]
    """Whether a row's next token is drawn: a tile that ends no prompt has none."""
    drafts: list[int]
    spans: tuple[tuple[int, int], ...]
    result: Result
    started: float
    after: DecodeBatch | None = None
    """Of a decode call: what a call that follows it begins with."""


class _Host(NamedTuple):
    """A `Result` on the host."""

    tokens: np.ndarray
    counts: np.ndarray
    drafted: np.ndarray
    experts: np.ndarray
    chosen: np.ndarray | None
    top_ids: np.ndarray | None
    top_values: np.ndarray | None


class Executor:
    """Runs plans. `begin` starts the calls and returns at once, `end` waits for what they give."""

    def __init__(self, runner: Runner, *, page_size: int, tile_tokens: int, vocab_size: int, max_draft: int) -> None:
        self._runner, self._tile_tokens, self._max_draft = runner, tile_tokens, max_draft
        self._words = -(-vocab_size // 32)
        self._builder = BatchBuilder(page_size)
        self._params: dict[Sequence, RowParams] = {}
        self._ended = 0.0

    def admit(self, sequence: Sequence, seed: int) -> None:
        """Packs what stays the same of a sequence's rows; once, before its first plan."""
        self._params[sequence] = row_params(sequence, seed=seed, max_context=sequence.limit)

    def forget(self, sequence: Sequence) -> None:
        self._params.pop(sequence, None)

    def recover(self) -> bool:
        """After a call that failed: True if it took the cache along, which is empty now."""
        if self._runner.intact:
            return False
        self._runner.reset()
        return True

    # Starting calls

    def begin(self, plan: Plan, matchers: Mapping[Sequence, Matcher], drafts: int) -> list[Pending]:
        """Starts the calls of a plan: tiles first. `drafts` tokens are drafted for each row that may take them."""
        calls = [self._begin_prefill(tiles, matchers) for tiles in self._split_tiles(plan.tiles)]
        reach = plan.rounds * plan.lookahead
        drafts = min(drafts, plan.lookahead - 1)
        groups = self._split_rows(plan.decode, reach, drafts)
        return calls + [self._begin_decode(cell, rows, matchers, plan.rounds, drafts) for cell, rows in groups]

    def _split_tiles(self, tiles: Sequences[Tile]) -> list[tuple[Cell, list[Tile]]]:
        """Tiles in order: a tile reads what those before it wrote, in its own call or an earlier one."""
        if not tiles:
            return []
        # A row carries all known tokens, for the penalties of the token that is drawn.
        reach = [len(tile.sequence.tokens) if tile.last else tile.start + tile.count for tile in tiles]
        groups, first = [], 0
        for cell in sorted(self._runner.split(len(tiles), max(reach)), key=lambda cell: -cell.rows):
            group = list(tiles[first : first + cell.rows])
            first += len(group)
            # What is wide in another group is none of this one's.
            own = self._runner.cell(cell.rows, max(reach[first - len(group) : first]), None)
            groups.append((own or cell, group))
        return groups

    def _split_rows(self, sequences: Iterable[Sequence], reach: int, drafts: int) -> list[tuple[Cell, list[Sequence]]]:
        """Rows by falling length, so that the few long ones do not widen the call of all the others."""
        groups, rest = [], sorted(sequences, key=lambda sequence: len(sequence.tokens), reverse=True)
        block = self._max_draft if drafts else 0
        while rest:
            width = min(len(rest[0].tokens) + reach, max(cell.width for cell in self._runner.cells))
            count = len(rest)
            while (cell := self._runner.cell(count, width, block)) is None:
                assert count > 1, f"no decode program holds a context of {width} with {block} drafts"
                count = max(c.rows for c in self._runner.cells if c.drafts == block and c.rows < count)
            groups.append((cell, rest[:count]))
            rest = rest[count:]
        return groups

    def _begin_prefill(self, group: tuple[Cell, list[Tile]], matchers: Mapping[Sequence, Matcher]) -> Pending:
        cell, tiles = group
        sequences = [tile.sequence for tile in tiles]
        spans = [(tile.sequence, tile.start, tile.count) for tile in tiles]
        params = [self._params[sequence] for sequence in sequences]
        batch = self._builder.prefill(spans, params, cell.rows, cell.width, self._tile_tokens)
        draws = [tile.last for tile in tiles]
        mask = self._mask(cell, [s if draw else None for s, draw in zip(sequences, draws, strict=True)], matchers)
        started = time.monotonic()
        result = self._runner.prefill(cell, batch, mask)
        positions = tuple((tile.start, tile.count) for tile in tiles)
        return Pending(cell, sequences, draws, [0] * len(tiles), positions, result, started)

    def _begin_decode(
        self, cell: Cell, sequences: list[Sequence], matchers: Mapping[Sequence, Matcher], rounds: int, drafts: int
    ) -> Pending:
        params = [self._params[sequence] for sequence in sequences]
        # The grammar's mask is known for the next token only.
        allowed = [0 if sequence in matchers else drafts for sequence in sequences]
        batch = self._builder.decode(sequences, params, allowed, cell.rows, cell.width)
        mask = self._mask(cell, sequences, matchers)
        started = time.monotonic()
        result, after = self._runner.decode(cell, batch, mask, rounds)
        return Pending(cell, sequences, [True] * len(sequences), allowed, (), result, started, after)

    def follow(self, calls: list[Pending], plan: Plan) -> list[Pending]:
        """Starts as many rounds again for the rows of decode calls that have not ended, so that the device need not
        wait for the host. [] where a context would outgrow its program; rows under a grammar can't be followed.

        The pages of twice the plan's tokens must have been given.
        """
        reach = 2 * plan.rounds * plan.lookahead
        for call in calls:
            longest = max(min(len(sequence.tokens) + reach, sequence.limit) for sequence in call.sequences)
            if call.after is None or longest > call.cell.width:
                return []
        return [self._follow_one(call, plan.rounds) for call in calls]

    def _follow_one(self, call: Pending, rounds: int) -> Pending:
        table = self._builder.page_table(call.sequences, call.cell.rows, call.cell.width)
        started = time.monotonic()
        result, after = self._runner.decode(call.cell, call.after._replace(page_table_BM=table), None, rounds)
        return dataclasses.replace(call, result=result, started=started, after=after)

    def _mask(
        self, cell: Cell, sequences: Sequences[Sequence | None], matchers: Mapping[Sequence, Matcher]
    ) -> np.ndarray | None:
        if not any(sequence in matchers for sequence in sequences if sequence is not None):
            return None
        mask = np.full((cell.rows, self._words), ALL_ALLOWED)
        for row, sequence in enumerate(sequences):
            if sequence is not None and sequence in matchers:
                matchers[sequence].mask(mask[row])
        return mask

    # Their results

    def end(self, calls: list[Pending]) -> tuple[dict[Sequence, Outcome], list[CallRecord]]:
        """Waits for calls, in the order they were started."""
        outcomes: dict[Sequence, Outcome] = {}
        records = []
        for call in calls:
            lengths = tuple(len(sequence.tokens) for sequence in call.sequences)
            host = _fetch(call)
            now = time.monotonic()
            seconds, self._ended = now - max(call.started, self._ended), now
            drawn = {row: _outcome(host, row, s) for row, s in enumerate(call.sequences) if call.draws[row]}
            for row, sequence in enumerate(call.sequences):
                if row in drawn:
                    outcomes[sequence] = drawn[row]
                else:
                    outcomes.setdefault(sequence, Outcome())
            records.append(
                CallRecord(
                    cell=call.cell,
                    rows=len(call.sequences),
                    rounds=int(np.count_nonzero(np.any(host.counts != 0, axis=1))),
                    seconds=seconds,
                    drafts=max(call.drafts, default=0),
                    lengths=lengths,
                    row_rounds=tuple(np.count_nonzero(host.counts[:, : len(call.sequences)], axis=0).tolist()),
                    spans=call.spans,
                    draws=sum(call.draws),
                    emitted=sum(len(outcome.tokens) for outcome in drawn.values()),
                    experts=int(host.experts.sum()),
                    drafted=tuple(n for outcome in drawn.values() for n in outcome.drafted),
                    accepted=tuple(n for outcome in drawn.values() for n in outcome.accepted),
                )
            )
        return outcomes, records


def _fetch(call: Pending) -> _Host:
    result = call.result
    arrays = [result.tokens_RBT, result.counts_RB, result.drafted_RB, result.experts_R]
    wanted = any(sequence.request.params.logprobs is not None for sequence in call.sequences)
    if wanted:
        arrays += [result.chosen_RBT, result.top_ids_RBTL, result.top_values_RBTL]
    return _Host(*jax.device_get(arrays), *([] if wanted else [None] * 3))


def _outcome(host: _Host, row: int, sequence: Sequence) -> Outcome:
    outcome, asked = Outcome(), sequence.request.params.logprobs
    counts = host.counts[:, row]
    if host.tokens.shape[2] == 1 and asked is None and counts.min() >= 0:
        # Plain decoding, without a loop over the rounds.
        emitted = counts > 0
        outcome.tokens = host.tokens[emitted, row, 0].tolist()
        outcome.drafted = outcome.accepted = [0] * len(outcome.tokens)
        return outcome
    for round_, count in enumerate(counts.tolist()):
        if count < 0:
            outcome.error = "the model's logits are not finite"
            break
        outcome.tokens += host.tokens[round_, row, :count].tolist()
        if asked is not None:
            outcome.logprobs += [_logprob(host, round_, row, token, asked) for token in range(count)]
        if count:
            outcome.drafted.append(int(host.drafted[round_, row]))
            outcome.accepted.append(count - 1)
    return outcome


def _logprob(host: _Host, round_: int, row: int, index: int, asked: int) -> TokenLogprob:
    ids, values = host.top_ids[round_, row, index, :asked], host.top_values[round_, row, index, :asked]
    # Fewer tokens than asked for may be possible at all.
    top = [(int(i), float(v)) for i, v in zip(ids, values, strict=True) if v > -np.inf]
    return TokenLogprob(int(host.tokens[round_, row, index]), float(host.chosen[round_, row, index]), tuple(top))
