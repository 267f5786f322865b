"""Which sequences get what in the next device call. Plain Python: it knows tokens and pages, no arrays and no text.

Order. Every sequence has one rank for life: its priority, raised by 1 for each `ageing_seconds` since it was submitted.
Two sequences age equally fast, so their order never changes, and a stream of high priorities overtakes a low one
for a bounded time only. The order is total, which is why there is no livelock: whoever is first is admitted first
and is never the one that gives up its pages.

A step. Prefilled sequences decode, all of them. Prompts are computed beside them in tiles: those begun first, then new
ones by rank, each with pages for all of its tokens and some to spare. The first that has no room stops admission:
passing it by would starve long prompts. Where decoding runs out of pages, the last by rank gives up its own and waits;
it keeps its tokens, and what the prefix cache still has of it is not computed again.

In flight. What a plan names belongs to the device until `commit` or `discard`: it is in no other plan, and its pages go
to no one else even when it is finished meanwhile. Requests may be submitted and cancelled at any time. A scheduler has
no lock of its own: who calls it from several threads holds one.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter

from serving.errors import QueueFull
from serving.pages import PagePool
from serving.request import FinishReason, Request, Sequence, State

_RANK = attrgetter("rank")

# Departures that the estimate of the service rate looks back on.
_WINDOW = 32
# Bounds of what a client is told, in seconds: it should neither hammer nor give up.
_RETRY = (1.0, 120.0)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """What `EngineConfig` says of scheduling. Raises ValueError for a value out of range, naming the field."""

    max_sequences: int
    """Rows of a batch: sequences that run at once."""
    max_queue: int
    """Sequences that may wait; one more is refused."""
    chunk_tokens: int
    """Prompt tokens computed per step beside decoding, padding included."""
    tile_tokens: int
    """Tokens of a tile; a shorter end of a prompt is padded to it."""
    max_context: int
    """Tokens of a sequence, prompt and generated ones together."""
    ageing_seconds: float
    """Being this old counts as much as one step of priority."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_queue", "chunk_tokens", "tile_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_context < 2:
            raise ValueError(f"max_context={self.max_context} must be at least 2: a prompt and a token")
        if self.chunk_tokens % self.tile_tokens:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} must be a multiple of tile_tokens={self.tile_tokens}; "
                "set chunk_tokens to one"
            )
        if not self.ageing_seconds > 0:
            raise ValueError(f"ageing_seconds={self.ageing_seconds} must be above 0; use inf for no ageing")


@dataclasses.dataclass(frozen=True)
class Tile:
    """tokens[start : start + count] of a sequence, to be computed."""

    sequence: Sequence
    start: int
    count: int
    last: bool
    """It ends with the sequence's last token: the next token is drawn from its logits."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One device call, and what became of sequences that are not in it."""

    tiles: tuple[Tile, ...] = ()
    """At most chunk_tokens / tile_tokens. Tiles of one sequence follow each other, in order."""
    decode: tuple[Sequence, ...] = ()
    """Sequences whose last token is the input, in no particular order."""
    lookahead: int = 1
    """Tokens that each of `decode` may write in a round: what was asked for, or 1 where pages are short."""
    preempted: tuple[Sequence, ...] = ()
    """Gave up their pages and wait again: computed is 0."""
    finished: tuple[tuple[Sequence, FinishReason], ...] = ()
    """Ended by the scheduler since the last plan: no further call of `finish` for them."""

    @property
    def empty(self) -> bool:
        """Nothing for the device to do; there is nothing to commit either."""
        return not (self.tiles or self.decode)


class Scheduler:
    """Holds every sequence from `submit` until it is finished."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.pool = pool
        self._clock = clock
        self._count = 0
        self._sequences: dict[str, Sequence] = {}
        # Sorted by rank.
        self._waiting: list[Sequence] = []
        # Running sequences in order of admission; a dict is an ordered set with removal.
        self._prefilling: dict[Sequence, None] = {}
        self._decoding: dict[Sequence, None] = {}
        self._in_flight: set[Sequence] = set()
        # What the next plan may have to end.
        self._cancelled: list[Sequence] = []
        # The last plan that decodes had to turn a sequence out.
        self._turned_out = False
        self._at_limit: list[Sequence] = []
        self._deadlines: dict[Sequence, float] = {}
        self._next_deadline = math.inf
        # The begin of the time that was busy throughout, or the departure before the oldest one counted; departures.
        self._departures: deque[float] = deque([clock()], maxlen=_WINDOW + 1)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_decoding(self) -> int:
        """Running sequences whose prompts are computed."""
        return len(self._decoding)

    @property
    def drained(self) -> bool:
        """Nothing waits, runs or is in flight."""
        return not self._sequences and not self._in_flight

    def submit(self, request: Request) -> Sequence:
        """Queues a request. Raises ValueError for one that can never be served, QueueFull when max_queue wait."""
        self._check_request(request)
        now = self._clock()
        if len(self._waiting) >= self.config.max_queue:
            raise QueueFull(self._retry_after(now))
        if not self._sequences:
            self._departures.clear()
            self._departures.append(now)
        sequence = Sequence(request, list(request.prompt))
        sequence.submitted = now
        sequence.rank = (now / self.config.ageing_seconds - request.priority, self._count)
        sequence.limit = min(sequence.num_prompt + request.params.max_tokens, self.config.max_context)
        self._count += 1
        self._sequences[request.id] = sequence
        self._set_deadline(sequence)
        bisect.insort(self._waiting, sequence, key=_RANK)
        return sequence

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next plan, or the one after its call lands. One that has ended is left alone."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and not sequence.cancelled:
            sequence.cancelled = True
            self._cancelled.append(sequence)

    def schedule(self, lookahead: int = 1, *, prompts: bool = True, decode: bool = True) -> Plan:
        """The next device call, of sequences that are in none: of `prompts`, of those that `decode`, or of both.

        `lookahead` is the number of tokens that a decoding sequence may write in a round: 1, plus the draft length.
        Each of `decode` has pages for its next `lookahead` tokens, as the plan grants it, as far as its limit;
        positions beyond belong on the trash page.
        """
        assert lookahead >= 1
        now = self._clock()
        finished = self._end_overdue(now)
        rows, preempted, tiles = (), [], []
        if decode:
            lookahead, preempted, without = self._make_room(lookahead, finished)
            rows = tuple(sequence for sequence in self._idle(self._decoding) if sequence not in without)
            self._turned_out = bool(preempted)
        if prompts:
            tiles = self._continue_prompts()
            # Who was just turned out, or another in its place, would be the next to be turned out.
            if not self._turned_out:
                tiles += self._admit(now, self.config.chunk_tokens // self.config.tile_tokens - len(tiles))
        self._in_flight.update(rows)
        self._in_flight.update(tile.sequence for tile in tiles)
        return Plan(tuple(tiles), rows, lookahead, tuple(preempted), tuple(finished))

    def prolong(self, plan: Plan, ahead: int) -> bool:
        """Whether one more round of a plan that decodes alone may follow the `ahead` rounds of it that have not landed:
        no prompt is being computed, no other sequence is to join it, some sequence can use it, and all have the pages,
        which they are given here. A queue that waits for a row or for pages is no reason against.
        """
        if self._prefilling or self._cancelled or self._clock() >= self._next_deadline:
            return False
        running = [sequence for sequence in plan.decode if sequence.state is State.RUNNING]
        # With half of the rows gone, a smaller program may do.
        if len(running) < len(self._decoding) or 2 * len(running) <= len(plan.decode):
            return False
        if any(sequence.request.grammar is not None for sequence in running):
            return False
        if all(sequence.limit - len(sequence.tokens) <= ahead for sequence in running):
            return False
        return self._extend(running, (ahead + 1) * plan.lookahead)

    def commit(self, plan: Plan, outputs: Mapping[Sequence, list[int]], *, followed: bool = False) -> None:
        """Takes in what a call computed: new tokens of `decode`, and the first one where a tile was the last.

        `followed`: the same sequences are in another call already (see `prolong`), so they stay in flight.

        A sequence may have fewer tokens than it was granted, or none (its row failed). Full pages become known to the
        prefix cache; pages that were granted and not needed stay with their sequence, which writes them next, so a
        running sequence's list of pages only ever grows. Call `finish` after this, so that its last pages are kept too.
        """
        ends = {tile.sequence: tile.start + tile.count for tile in plan.tiles}
        for sequence, end in ends.items():
            if self._landed(sequence):
                self._advance(sequence, end, outputs.get(sequence, ()))
        for sequence in plan.decode:
            landed = sequence.state is not State.FINISHED if followed else self._landed(sequence)
            if landed:
                tokens = outputs.get(sequence, ())
                self._advance(sequence, sequence.computed + len(tokens), tokens)

    def discard(self, plan: Plan) -> None:
        """Takes a plan back whose call failed: nothing was computed, and the next plan may name the same again."""
        for sequence in (*(tile.sequence for tile in plan.tiles), *plan.decode):
            if sequence in self._in_flight:
                self._landed(sequence)

    def restart(self) -> None:
        """The content of the pages is lost: everything that runs gives them up and is computed again. Nothing may be
        in flight."""
        assert not self._in_flight, "a call is still in flight"
        for sequence in (*self._prefilling, *self._decoding):
            self._preempt(sequence)
        self.pool.forget_all()

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state, once. Its pages are released now, or when the call that it is in lands."""
        assert sequence.state is not State.FINISHED, f"{sequence.request.id} has finished already"
        if sequence.state is State.WAITING:
            self._remove_waiting(sequence)
        else:
            self._prefilling.pop(sequence, None)
            self._decoding.pop(sequence, None)
        sequence.state = State.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.request.id]
        self._deadlines.pop(sequence, None)
        self._departures.append(self._clock())
        if sequence not in self._in_flight:
            self._release(sequence)

    # Submission

    def _check_request(self, request: Request) -> None:
        length, config = len(request.prompt), self.config
        if request.id in self._sequences:
            raise ValueError(f"id={request.id!r} belongs to a request that has not ended; give each its own")
        if not length:
            raise ValueError("the prompt has no token; at least one is required")
        if length + 1 > config.max_context:
            raise ValueError(
                f"the prompt has {length} tokens; with one to generate, at most max_context={config.max_context} fit"
            )
        if self.pool.pages_for(length) > self.pool.capacity:
            raise ValueError(
                f"the prompt has {length} tokens; the cache holds {self.pool.capacity * self.pool.page_size}: "
                f"shorten it, or raise num_pages={self.pool.num_pages}"
            )

    def _set_deadline(self, sequence: Sequence) -> None:
        deadline = sequence.request.deadline
        if deadline is not None:
            self._deadlines[sequence] = deadline
            self._next_deadline = min(self._next_deadline, deadline)

    def _retry_after(self, now: float) -> float:
        """Seconds until one more sequence leaves, at the rate of late: one that leaves frees a place in the queue."""
        since = now - self._departures[0]
        return min(max(since / max(len(self._departures) - 1, 1), _RETRY[0]), _RETRY[1])

    # Ends

    def _end_overdue(self, now: float) -> list[tuple[Sequence, FinishReason]]:
        """Ends what is cancelled, past its deadline or at its limit, except what is in flight."""
        finished: list[tuple[Sequence, FinishReason]] = []
        if self._cancelled:
            self._cancelled = self._end_each(self._cancelled, "cancelled", finished)
        if self._at_limit:
            self._at_limit = self._end_each(self._at_limit, "length", finished)
        if now >= self._next_deadline:
            overdue = [sequence for sequence, deadline in self._deadlines.items() if deadline <= now]
            self._end_each(overdue, "deadline", finished)
            self._next_deadline = min(self._deadlines.values(), default=math.inf)
        return finished

    def _end_each(
        self, sequences: Iterable[Sequence], reason: FinishReason, finished: list[tuple[Sequence, FinishReason]]
    ) -> list[Sequence]:
        """Returns those that are in flight and have to be ended later."""
        later = []
        for sequence in sequences:
            if sequence.state is State.FINISHED:
                continue
            if sequence in self._in_flight:
                later.append(sequence)
                continue
            self.finish(sequence, reason)
            finished.append((sequence, reason))
        return later

    # Pages for decoding

    def _make_room(
        self, lookahead: int, finished: list[tuple[Sequence, FinishReason]]
    ) -> tuple[int, list[Sequence], set[Sequence]]:
        """Gives every decoding sequence pages for one round: (lookahead granted, sequences preempted for it, those that
        have to wait for pages until what is in flight lands)."""
        decoding = self._idle(self._decoding)
        if self._extend(decoding, lookahead):
            return lookahead, [], set()
        # Drafts are a gamble on idle hardware: not worth computing another sequence again.
        preempted: list[Sequence] = []
        without: set[Sequence] = set()
        for sequence in decoding:
            while sequence.state is State.RUNNING and not self._extend([sequence], 1):
                if self.num_running == 1 and not self._in_flight:
                    # It has every page there is.
                    self.finish(sequence, "length")
                    finished.append((sequence, "length"))
                    break
                victim = max((*self._prefilling, *self._decoding), key=_RANK)
                # Who is first by rank is never turned out for one behind it that can't be turned out now.
                if victim in self._in_flight:
                    without.add(sequence)
                    break
                self._preempt(victim)
                preempted.append(victim)
        return 1, preempted, without

    def _extend(self, sequences: Iterable[Sequence], count: int) -> bool:
        """Gives each pages for `count` more tokens, as far as its limit. All or nothing."""
        size = self.pool.page_size
        short: list[tuple[Sequence, int]] = []
        total = 0
        for sequence in sequences:
            held = len(sequence.pages)
            if sequence.computed + count > held * size:
                # The last token of a sequence is never an input: it needs no place.
                needed = self.pool.pages_for(min(sequence.computed + count, sequence.limit - 1)) - held
                if needed > 0:
                    short.append((sequence, needed))
                    total += needed
        pages = self.pool.allocate(total) if total else []
        if pages is None:
            return False
        for sequence, needed in short:
            sequence.pages += pages[:needed]
            del pages[:needed]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._prefilling.pop(sequence, None)
        self._decoding.pop(sequence, None)
        self._release(sequence)
        sequence.computed = 0
        sequence.state = State.WAITING
        sequence.preemptions += 1
        bisect.insort(self._waiting, sequence, key=_RANK)

    # Prompts

    def _continue_prompts(self) -> list[Tile]:
        tiles: list[Tile] = []
        if self._prefilling:
            budget = self.config.chunk_tokens // self.config.tile_tokens
            for sequence in sorted(self._idle(self._prefilling), key=_RANK):
                tiles += self._tiles(sequence, budget - len(tiles))
        return tiles

    def _tiles(self, sequence: Sequence, budget: int) -> list[Tile]:
        """The next `budget` tiles of a sequence at most."""
        end, size = len(sequence.tokens), self.config.tile_tokens
        starts = range(sequence.computed, end, size)[:budget]
        return [Tile(sequence, start, min(size, end - start), start + size >= end) for start in starts]

    def _admit(self, now: float, budget: int) -> list[Tile]:
        """Starts waiting sequences while there are tiles, rows and pages: the tiles of those started."""
        tiles: list[Tile] = []
        while self._waiting and len(tiles) < budget and self.num_running < self.config.max_sequences:
            sequence = self._waiting[0]
            if not self._take_pages(sequence):
                break
            del self._waiting[0]
            sequence.state = State.RUNNING
            if sequence.started is None:
                sequence.started = now
                sequence.cached_tokens = sequence.computed
            self._prefilling[sequence] = None
            tiles += self._tiles(sequence, budget - len(tiles))
        return tiles

    def _take_pages(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence pages for all of its tokens, from the prefix cache where it can.

        There must be a page to spare for it and for each that runs, or it would soon have to give up its own. In a
        simulation of 512 requests (64 to 512 tokens in, 16 to 700 out) over 3000 pages of 16 tokens, one spare page
        in all led to 354 preemptions and 1.58 times the prompt tokens computed; this rule to 15 and 1.04, in 3% more
        steps.
        """
        pool = self.pool
        total = pool.pages_for(len(sequence.tokens))
        assert total <= pool.capacity
        known = pool.lookup(sequence.tokens, sequence.page_keys)
        spare = self.num_running + 1 if self.num_running else 0
        if total - len(known) + spare > pool.num_available_beside(known):
            return False
        known = pool.match(sequence.tokens, sequence.page_keys)
        rest = pool.allocate(total - len(known))
        assert rest is not None
        sequence.pages = known + rest
        sequence.computed = len(known) * pool.page_size
        return True

    # What a call leaves

    def _landed(self, sequence: Sequence) -> bool:
        """Takes a sequence out of flight; False if it has finished meanwhile."""
        self._in_flight.discard(sequence)
        if sequence.state is State.FINISHED:
            self._release(sequence)
            return False
        return True

    def _advance(self, sequence: Sequence, computed: int, tokens: Iterable[int]) -> None:
        sequence.tokens += tokens
        length, size = len(sequence.tokens), self.pool.page_size
        assert length <= sequence.limit, "a sequence was given tokens past its limit"
        # A last token that gave no next one has to be an input again.
        computed = min(computed, length - 1)
        assert computed <= len(sequence.pages) * size, "a sequence wrote more tokens than its plan granted"
        known = sequence.computed // size
        sequence.computed = computed
        if computed // size > known:
            self.pool.commit(sequence.tokens, sequence.pages, computed)
        if sequence.first_token is None and length > sequence.num_prompt:
            sequence.first_token = self._clock()
        if sequence in self._prefilling and not sequence.prefilling:
            del self._prefilling[sequence]
            self._decoding[sequence] = None
        if length >= sequence.limit:
            self._at_limit.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        # What made it fail may be in its keys and values.
        self.pool.release(sequence.pages, forget=sequence.finish_reason == "error")
        sequence.pages = []

    def _remove_waiting(self, sequence: Sequence) -> None:
        index = bisect.bisect_left(self._waiting, sequence.rank, key=_RANK)
        assert self._waiting[index] is sequence
        del self._waiting[index]

    def _idle(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those that are in no call."""
        if not self._in_flight:
            return list(sequences)
        return [sequence for sequence in sequences if sequence not in self._in_flight]
