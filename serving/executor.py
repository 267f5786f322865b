"""A plan as calls to the device, and what came of each sequence. Knows rows, cells and arrays; nothing of text."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import jax
import numpy as np

from serving.batch import ALL_ALLOWED, BatchBuilder, Drawing, RowBatch, RowParams, State, row_params
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


class CallRecord(NamedTuple):
    """One call, for the measurements."""

    cell: Cell
    rows: int
    rounds: int
    """1 for a round of decoding in which some row took part, else 0."""
    seconds: float
    """From the end of the call before (or its own start) to its own end. Calls that the host found ended share the
    time between two ends that it waited for: it knows when those were."""
    drafts: int
    lengths: tuple[int, ...]
    """Live tokens of each row at the start."""
    live: tuple[bool, ...]
    """Rows that took part."""
    spans: tuple[tuple[int, int], ...]
    """Start and count of each tile of a prefill."""
    draws: int
    """Rows whose next token was drawn."""
    emitted: int
    experts: int
    """Experts touched, summed over layers."""
    drafted: tuple[int, ...]
    """Of each row that emitted something: drafts proposed."""
    accepted: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A call that was started."""

    cell: Cell
    sequences: list[Sequence]
    """One for each row."""
    draws: list[bool]
    """Whether a row's next token is drawn: a tile that ends no prompt has none."""
    drafts: list[int]
    spans: tuple[tuple[int, int], ...]
    drawing: Drawing
    batch: RowBatch
    """On the device: a round that follows takes it too."""
    pages: int
    """Of all rows, in the batch's page table."""
    experts: jax.Array
    result: Result | None
    """None where nothing is drawn."""
    after: State | None
    """What a round that follows begins with."""
    started: float

    @property
    def ready(self) -> bool:
        """The host need not wait for it."""
        return (self.experts if self.result is None else self.result.counts_B).is_ready()


class _Host(NamedTuple):
    """A `Result` on the host."""

    tokens: list[list[int]]
    counts: list[int]
    drafted: list[int]
    experts: int
    chosen: np.ndarray | None
    top_ids: np.ndarray | None
    top_values: np.ndarray | None


class Executor:
    """Runs plans. `begin` starts the calls and returns at once, `end` waits for what they give."""

    def __init__(self, runner: Runner, *, page_size: int, tile_tokens: int, vocab_size: int, max_draft: int) -> None:
        self._runner, self._tile_tokens, self._max_draft = runner, tile_tokens, max_draft
        self._words = -(-vocab_size // 32)
        self._builder = BatchBuilder(page_size, runner.context)
        self._params: dict[Sequence, RowParams] = {}
        self._untimed: list[CallRecord] = []
        self._began = self._ended = 0.0

    def admit(self, sequence: Sequence, seed: int) -> None:
        """Packs what stays the same of a sequence's rows; once, before its first plan."""
        self._params[sequence] = row_params(sequence, seed=seed, max_context=sequence.limit)

    def forget(self, sequence: Sequence) -> None:
        self._params.pop(sequence, None)

    def recover(self) -> bool:
        """After a call that failed: True if it took the cache along, which is empty now."""
        self._untimed = []
        if self._runner.intact:
            return False
        self._runner.reset()
        return True

    # Starting calls

    def begin(self, plan: Plan, matchers: Mapping[Sequence, Matcher], drafts: int) -> list[Pending]:
        """Starts the calls of a plan: tiles first. `drafts` tokens are drafted for each row that may take them."""
        calls = [self._begin_prefill(tiles, matchers) for tiles in self._split_tiles(plan.tiles)]
        drafts = min(drafts, plan.lookahead - 1)
        groups = self._split_rows(plan.decode, plan.lookahead, drafts)
        return calls + [self._begin_decode(cell, rows, matchers, drafts) for cell, rows in groups]

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
        batch, state, arrays = self._runner.place(
            self._builder.prefill(spans, params, cell.rows, cell.width, self._tile_tokens)
        )
        draws = [tile.last for tile in tiles]
        drawn = [s if draw else None for s, draw in zip(sequences, draws, strict=True)]
        mask, drawing = self._mask(cell, drawn, matchers), self._drawing(drawn, matchers)
        started = time.monotonic()
        forward = self._runner.prefill(cell, batch, arrays)
        result = self._runner.draw(drawing, batch, state, forward, mask)[0] if any(draws) else None
        positions = tuple((tile.start, tile.count) for tile in tiles)
        none = [0] * len(tiles)
        return _started(
            Pending(cell, sequences, draws, none, positions, drawing, batch, 0, forward.experts, result, None, started)
        )

    def _begin_decode(
        self, cell: Cell, sequences: list[Sequence], matchers: Mapping[Sequence, Matcher], drafts: int
    ) -> Pending:
        params = [self._params[sequence] for sequence in sequences]
        # The grammar's mask is known for the next token only.
        allowed = [0 if sequence in matchers else drafts for sequence in sequences]
        batch, state = self._runner.place(self._builder.decode(sequences, params, allowed, cell.rows, cell.width))
        mask, drawing = self._mask(cell, sequences, matchers), self._drawing(sequences, matchers)
        draws, pages = [True] * len(sequences), _num_pages(sequences)
        return self._round(cell, sequences, draws, allowed, drawing, batch, pages, state, mask)

    def follow(self, last: list[Pending], plan: Plan, ahead: int) -> list[Pending]:
        """Starts the next round for the rows of `last`, of which `ahead` rounds have not ended, so that the device need
        not wait for the host. [] where a context would outgrow its program; rows under a grammar can't be followed.

        The pages of `ahead` + 1 times the plan's tokens must have been given.
        """
        reach = (ahead + 1) * plan.lookahead
        for call in last:
            longest = max(min(len(sequence.tokens) + reach, sequence.limit) for sequence in call.sequences)
            if call.after is None or longest > call.cell.width:
                return []
        return [self._follow_one(call) for call in last]

    def _follow_one(self, call: Pending) -> Pending:
        cell, batch, pages = call.cell, call.batch, _num_pages(call.sequences)
        # A list of pages only ever grows, so that as many are the same ones.
        if pages != call.pages:
            table = self._builder.page_table(call.sequences, cell.rows, cell.width)
            batch = batch._replace(page_table_BM=self._runner.place(table))
        return self._round(cell, call.sequences, call.draws, call.drafts, call.drawing, batch, pages, call.after, None)

    def _round(
        self, cell: Cell, sequences, draws, drafts, drawing: Drawing, batch: RowBatch, pages: int, state: State, mask
    ) -> Pending:
        started = time.monotonic()
        forward = self._runner.decode(cell, batch, state)
        result, after = self._runner.draw(drawing, batch, state, forward, mask)
        return _started(
            Pending(cell, sequences, draws, drafts, (), drawing, batch, pages, forward.experts, result, after, started)
        )

    def _drawing(self, sequences: Sequences[Sequence | None], matchers: Mapping[Sequence, Matcher]) -> Drawing:
        wanted = [Drawing.FULL if s in matchers else self._params[s].drawing for s in sequences if s is not None]
        return max(wanted, default=Drawing.GREEDY)

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

    def end(self, steps: deque[list[Pending]]) -> tuple[dict[Sequence, Outcome], list[CallRecord]]:
        """Waits for the calls of the first step, and takes along those of the next ones that have ended too."""
        outcomes: dict[Sequence, Outcome] = {}
        records: list[CallRecord] = []
        while True:
            for call in steps.popleft():
                waits = not call.ready
                self._take(call, outcomes)
                if waits:
                    records += self._timed()
            if not steps or not all(call.ready for call in steps[0]):
                break
        # With nothing left on the device, no later end is a better one.
        return outcomes, records if steps else records + self._timed()

    def _take(self, call: Pending, outcomes: dict[Sequence, Outcome]) -> None:
        host, emitted, drafted, accepted = _fetch(call), 0, [], []
        before = [outcomes.setdefault(sequence, Outcome()).tokens for sequence in call.sequences]
        lengths = tuple(len(s.tokens) + len(tokens) for s, tokens in zip(call.sequences, before, strict=True))
        for row, sequence in enumerate(call.sequences):
            outcome = outcomes[sequence]
            count = host.counts[row] if call.draws[row] else 0
            if count < 0:
                outcome.error = "the model's logits are not finite"
            elif count:
                _add_tokens(outcome, host, row, count, sequence.request.params.logprobs)
                drafted.append(host.drafted[row])
                accepted.append(count - 1)
                emitted += count
        if not self._untimed:
            self._began = max(call.started, self._ended)
        live = tuple(count != 0 for count in host.counts[: len(call.sequences)])
        self._untimed.append(
            CallRecord(
                cell=call.cell,
                rows=len(call.sequences),
                rounds=int(any(live)),
                seconds=0.0,
                drafts=max(call.drafts, default=0),
                lengths=lengths,
                live=live,
                spans=call.spans,
                draws=sum(call.draws),
                emitted=emitted,
                experts=host.experts,
                drafted=tuple(drafted),
                accepted=tuple(accepted),
            )
        )

    def _timed(self) -> list[CallRecord]:
        records, self._untimed, self._ended = self._untimed, [], time.monotonic()
        return [record._replace(seconds=(self._ended - self._began) / len(records)) for record in records]


def _num_pages(sequences: Sequences[Sequence]) -> int:
    return sum(len(sequence.pages) for sequence in sequences)


def _wanted(call: Pending) -> list[jax.Array]:
    """What the host reads of a call."""
    result = call.result
    if result is None:
        return [call.experts]
    wanted = [call.experts, result.tokens_BT, result.counts_B, result.drafted_B]
    if any(sequence.request.params.logprobs is not None for sequence in call.sequences):
        wanted += [result.chosen_BT, result.top_ids_BTL, result.top_values_BTL]
    return wanted


def _started(call: Pending) -> Pending:
    """Has what the host reads sent as soon as it is there."""
    for array in _wanted(call):
        array.copy_to_host_async()
    return call


def _fetch(call: Pending) -> _Host:
    experts, *arrays = jax.device_get(_wanted(call))
    if not arrays:
        rows = len(call.sequences)
        return _Host([[]] * rows, [0] * rows, [0] * rows, int(experts), None, None, None)
    tokens, counts, drafted, *log_probs = arrays
    return _Host(tokens.tolist(), counts.tolist(), drafted.tolist(), int(experts), *(log_probs or [None] * 3))


def _add_tokens(outcome: Outcome, host: _Host, row: int, count: int, asked: int | None) -> None:
    tokens = host.tokens[row][:count]
    outcome.tokens += tokens
    if asked is None:
        return
    for index, token in enumerate(tokens):
        ids, values = host.top_ids[row, index, :asked], host.top_values[row, index, :asked]
        # Fewer tokens than asked for may be possible at all.
        top = [(int(i), float(v)) for i, v in zip(ids, values, strict=True) if v > -np.inf]
        outcome.logprobs.append(TokenLogprob(token, float(host.chosen[row, index]), tuple(top)))
