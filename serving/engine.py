"""The engine: a thread that schedules, runs and answers requests.

Two flights may be with the device: one computes prompts, one decodes. Each is what the scheduler finds for sequences
that are in no flight (plan), as calls to the device (executor). While the device works on one, the host takes in what
the other gave, tells it, and starts the next, so that neither waits for the other. A flight that decodes goes on round
after round as long as no prompt is computed. Every array is the executor's; everything here is about sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from serving.chat import ChatTemplate
from serving.controller import DraftController, SpeculationStats
from serving.errors import Draining
from serving.executor import CallRecord, Executor, Outcome, Pending
from serving.grammar import GrammarCompiler, GrammarError, Matcher
from serving.metrics import Metrics
from serving.request import Delta, FinishReason, Request, Sequence, State, TokenLogprob, Usage
from serving.scheduler import Plan, Scheduler, Tile
from serving.text import TextStream
from serving.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FAILED = "the step of this request failed"
STOPPED = "the engine stopped"

IDLE_SECONDS = 0.05
"""How long an idle engine sleeps before it looks for deadlines."""

_FEW = 8
"""Sequences that are told what they got in less time (20 to 50 µs each) than the next calls take to start."""

_REVIEW = 16
"""Rounds after which the length of drafts is chosen anew."""


@dataclasses.dataclass
class _Answer:
    """The text side of a sequence."""

    text: TextStream
    matcher: Matcher | None
    last: float
    """When its last tokens came."""
    sent: int = 0


@dataclasses.dataclass(eq=False)
class _Flight:
    """A plan that is with the device."""

    plan: Plan
    drafts: int
    matchers: dict[Sequence, Matcher]
    begun: deque[list[Pending]] = dataclasses.field(default_factory=deque)
    """Its calls, and those of the rounds that follow."""
    rounds: int = 1
    """Rounds begun so far."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a step gave one sequence, decided but not yet told."""

    sequence: Sequence
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    text: str
    finish: FinishReason | None
    error: str | None


class Engine:
    """Serves requests until it is stopped. `submit`, `cancel` and `drain` may be called from any thread.

    `on_calls` gets the records of each step's calls, in the engine's thread.
    """

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        grammars: GrammarCompiler | None,
        vocab_size: int,
        scheduler: Scheduler,
        executor: Executor,
        controller: DraftController | None,
        max_draft_batch: int,
        rounds_ahead: int,
        metrics: Metrics,
        on_calls: Callable[[list[CallRecord]], None],
        seed: int,
    ) -> None:
        self.model_name, self.tokenizer, self.chat, self.grammars = model_name, tokenizer, chat, grammars
        self.vocab_size, self.max_context = vocab_size, scheduler.config.max_context
        self.metrics, self.ready = metrics, False
        self._scheduler, self._executor, self._controller = scheduler, executor, controller
        self._max_draft_batch, self._rounds_ahead, self._on_calls = max_draft_batch, rounds_ahead, on_calls
        self._random = random.Random(seed)
        # Guards the scheduler; never held while the device works or a callback runs.
        self._changed = threading.Condition()
        self._answers: dict[Sequence, _Answer] = {}
        self._untold: list[_Step] = []
        # In the order in which the device works on them.
        self._flights: list[_Flight] = []
        self._draining = self._stopping = self._cache_lost = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Everything is compiled: take requests."""
        self._thread.start()
        self.ready = True

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def speculation(self) -> SpeculationStats | None:
        """What drafts did so far; None without drafts."""
        return None if self._controller is None else self._controller.stats

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Draining, QueueFull, or ValueError for one that can never run."""
        self._check(request)
        answer = _Answer(
            TextStream(self.tokenizer, request.prompt, request.stop),
            None if request.grammar is None else request.grammar.matcher(),
            time.monotonic(),
        )
        with self._changed:
            if self._draining or self._stopping:
                raise Draining
            sequence = self._scheduler.submit(request)
            self._answers[sequence] = answer
            given = request.params.seed
            self._executor.admit(sequence, self._random.getrandbits(63) if given is None else given)
            self._changed.notify()

    def _check(self, request: Request) -> None:
        biased = [token for token, _ in request.params.logit_bias]
        for name, tokens in (("prompt", request.prompt), ("logit_bias", biased)):
            if any(not 0 <= token < self.vocab_size for token in tokens):
                raise ValueError(f"{name} has a token outside of the vocabulary, 0 to {self.vocab_size - 1}")

    def cancel(self, request_id: str) -> None:
        """Ends a request soon, in whatever state it is; one that has ended is left alone."""
        with self._changed:
            self._scheduler.cancel(request_id)
            self._changed.notify()

    def drain(self, timeout: float) -> bool:
        """Takes nothing new, and waits for what there is; True if everything has ended."""
        end = time.monotonic() + timeout
        with self._changed:
            self._draining = True
            while self._answers and self.alive and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, IDLE_SECONDS))
            return not self._answers

    def stop(self) -> None:
        """Ends the thread once what is under way has ended; what is unfinished then ends as cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.alive:
            self._thread.join()

    # The engine's thread

    def _run(self) -> None:
        reason: FinishReason = "error"
        try:
            while not self._stopping:
                # While the device works is a good time for everything that need not be done before; and a first token
                # should not wait until what follows it is started.
                if self._flights or len(self._untold) <= _FEW:
                    self._tell()
                self._begin()
                self._tell()
                if self._flights:
                    self._prolong(self._flights[0])
                    self._land(self._flights[0])
                else:
                    self._sleep()
            # What is under way ends in order, and gives its pages back.
            while self._flights:
                self._land(self._flights[0])
            reason = "cancelled"
        # Nobody may wait for an engine that is gone: /health says that it is.
        except Exception:
            logger.exception("the engine stopped")
        with self._changed:
            self._stopping = True
        told = {step.sequence for step in self._untold if step.finish is not None}
        for sequence in self._answers.keys() - told:
            self._untold.append(_Step(sequence, (), (), "", reason, STOPPED if reason == "error" else None))
        self._tell()

    def _sleep(self) -> None:
        with self._changed:
            if self._scheduler.num_waiting == 0 and self._scheduler.num_running == 0 and not self._stopping:
                self._changed.wait(IDLE_SECONDS)

    def _begin(self) -> None:
        """Starts flights for what is in none; at most one of each kind is under way."""
        # What was computed is lost with the cache, and what is under way comes first.
        if self._cache_lost:
            return
        if not any(flight.plan.decode for flight in self._flights):
            self._begin_flight(*self._next_plan(prompts=False))
        if not any(flight.plan.tiles for flight in self._flights) and not self._cache_lost:
            self._begin_flight(*self._next_plan(prompts=True))

    def _next_plan(self, *, prompts: bool) -> tuple[Plan, int]:
        """A plan of prompts, or of what decodes; and the drafts of each row."""
        with self._changed:
            drafts, rows = 0, self._scheduler.num_decoding
            if not prompts and self._controller is not None and 0 < rows <= self._max_draft_batch:
                drafts = self._controller.choose(rows)
            plan = self._scheduler.schedule(1 + drafts, prompts=prompts, decode=not prompts)
            for sequence, reason in plan.finished:
                self._note_end(sequence, reason)
            self.metrics.observe_preemption(len(plan.preempted))
            if plan.empty:
                self._observe([])
        return plan, min(drafts, plan.lookahead - 1)

    def _begin_flight(self, plan: Plan, drafts: int) -> None:
        if plan.empty:
            return
        sequences = [*(tile.sequence for tile in plan.tiles), *plan.decode]
        # Looked up one by one: other threads add answers meanwhile.
        found = {sequence: self._answers[sequence].matcher for sequence in sequences}
        matchers = {sequence: matcher for sequence, matcher in found.items() if matcher is not None}
        flight = _Flight(plan, drafts, matchers)
        self._flights.append(flight)
        with self._isolating(flight):
            flight.begun.append(self._executor.begin(plan, matchers, drafts))

    def _prolong(self, flight: _Flight) -> None:
        """Starts rounds that follow a flight's last, so that some are always with the device before the host has seen
        what the first of them gave."""
        most = _REVIEW if self._controller is not None else math.inf
        # Once the cache is lost, no round finds what it should read.
        if flight.plan.tiles or self._cache_lost:
            return
        with self._isolating(flight):
            while len(flight.begun) < self._rounds_ahead and flight.rounds < most:
                with self._changed:
                    if self._stopping or not self._scheduler.prolong(flight.plan, len(flight.begun)):
                        return
                calls = self._executor.follow(flight.begun[-1], flight.plan, len(flight.begun))
                if not calls:
                    return
                flight.begun.append(calls)
                flight.rounds += 1

    def _land(self, flight: _Flight) -> None:
        """Waits for the first calls of a flight, which ends if no others follow."""
        # A flight that failed meanwhile has ended.
        if flight not in self._flights:
            return
        ended = None
        with self._isolating(flight):
            ended = self._executor.end(flight.begun)
        if ended is not None:
            self._take_in(flight, *ended)

    @contextlib.contextmanager
    def _isolating(self, flight: _Flight) -> Iterator[None]:
        """Whatever a request brings about must not end the others: after an exception, the flight ends with its
        sequences run one by one."""
        try:
            yield
        except Exception:
            self._fail(flight)

    def _fail(self, flight: _Flight) -> None:
        """After an exception: the sequences of a flight are run one by one, so that the one at fault fails alone."""
        logger.exception("a step failed; its sequences are run one by one")
        self._tell()
        flight.begun.clear()
        self._take_in(flight, self._isolate(flight.plan, flight.matchers, flight.drafts), [])

    def _take_in(self, flight: _Flight, outcomes: dict[Sequence, Outcome], records: list[CallRecord]) -> None:
        now, followed = time.monotonic(), bool(flight.begun)
        if not followed:
            self._flights.remove(flight)
        # A sequence that ended on the host may still be in a call that followed.
        running = {s: outcome for s, outcome in outcomes.items() if s.state is not State.FINISHED}
        steps = [self._read(sequence, outcome) for sequence, outcome in running.items()]
        with self._changed:
            tokens = {step.sequence: list(step.tokens) for step in steps}
            self._scheduler.commit(flight.plan, tokens, followed=followed)
            for step in steps:
                self._settle(step, now)
            if self._cache_lost and not self._flights:
                self._scheduler.restart()
                self._cache_lost = False
            self._observe(records)
        try:
            self._on_calls(records)
        # A measurement that can't be right is told, and does not end the serving.
        except ValueError:
            logger.exception("the measurement of a step failed")

    def _isolate(self, plan: Plan, matchers: dict[Sequence, Matcher], drafts: int) -> dict[Sequence, Outcome]:
        """A plan that failed, sequence by sequence, so that the one at fault fails alone. Once a failure took the cache
        along, each is computed from its first token: nothing is left of what the cache held of it."""
        outcomes: dict[Sequence, Outcome] = {}
        self._cache_lost |= self._executor.recover()
        for sequence in dict.fromkeys([*(tile.sequence for tile in plan.tiles), *plan.decode]):
            if sequence.state is State.FINISHED:
                continue
            alone = self._whole(plan, sequence) if self._cache_lost else _only(plan, sequence)
            try:
                outcomes |= self._executor.end(deque([self._executor.begin(alone, matchers, drafts)]))[0]
            except Exception as error:
                logger.exception("the step of request %s failed", sequence.request.id)
                outcomes[sequence] = Outcome(error=str(error) if isinstance(error, GrammarError) else FAILED)
                self._cache_lost |= self._executor.recover()
        return outcomes

    def _whole(self, plan: Plan, sequence: Sequence) -> Plan:
        """As far as the plan takes a sequence (one round of decoding), without what its pages held before."""
        ends = [tile.start + tile.count for tile in plan.tiles if tile.sequence is sequence]
        end, size = max(ends, default=len(sequence.tokens)), self._scheduler.config.tile_tokens
        last = end == len(sequence.tokens)
        tiles = [
            Tile(sequence, start, min(size, end - start), last and start + size >= end) for start in range(0, end, size)
        ]
        return dataclasses.replace(plan, tiles=tuple(tiles), decode=())

    def _read(self, sequence: Sequence, outcome: Outcome) -> _Step:
        """Tokens to text, up to the first that ends the sequence."""
        answer, params = self._answers[sequence], sequence.request.params
        kept, shown, text, finish, error = 0, 0, "", None, outcome.error
        for token in outcome.tokens:
            kept += 1
            if token in params.stop_ids:
                finish = "stop"
                break
            shown += 1
            text += answer.text.push(token)
            if answer.text.stopped:
                finish = "stop"
                break
            if answer.matcher is not None:
                try:
                    answer.matcher.advance(token)
                except GrammarError as reason:
                    error = str(reason)
                    break
                if answer.matcher.finished:
                    finish = "stop"
                    break
        tokens = tuple(outcome.tokens[:kept])
        if error is not None:
            finish = "error"
        elif finish is None and len(sequence.tokens) + kept >= sequence.limit:
            finish = "length"
        return _Step(sequence, tokens, tuple(outcome.logprobs[:shown]), text, finish, error)

    def _settle(self, step: _Step, now: float) -> None:
        sequence = step.sequence
        answer = self._answers[sequence]
        if step.tokens:
            if answer.sent:
                self.metrics.observe_token_gap((now - answer.last) / len(step.tokens), len(step.tokens))
            answer.sent += len(step.tokens)
            answer.last = now
        if step.finish is not None:
            self._scheduler.finish(sequence, step.finish)
        if step.tokens or step.finish is not None:
            self._untold.append(step)

    def _note_end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._untold.append(_Step(sequence, (), (), "", reason, None))

    def _tell(self) -> None:
        """Gives requests what the step before decided."""
        untold, self._untold = self._untold, []
        for step in untold:
            sequence, usage, text = step.sequence, None, step.text
            if step.finish is not None:
                text += self._answers[sequence].text.finish()
                usage = self._usage(sequence)
                self.metrics.observe_request(usage, step.finish)
                self._executor.forget(sequence)
                with self._changed:
                    del self._answers[sequence]
                    self._changed.notify_all()
            shown = step.tokens[: len(step.tokens) - (step.finish == "stop" and self._ends(step))]
            delta = Delta(text, shown, step.logprobs, step.finish, step.error, usage)
            try:
                sequence.request.on_delta(delta)
            except Exception:
                logger.exception("request %s: its listener failed", sequence.request.id)
                self.cancel(sequence.request.id)

    def _ends(self, step: _Step) -> bool:
        """Whether the last token is one that ends the text and is no part of it."""
        return bool(step.tokens) and step.tokens[-1] in step.sequence.request.params.stop_ids

    def _usage(self, sequence: Sequence) -> Usage:
        request, now = sequence.request, time.monotonic()
        arrival = min(request.arrival or sequence.submitted, sequence.submitted)
        return Usage(
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_generated,
            cached_tokens=sequence.cached_tokens,
            queue_seconds=(sequence.started or now) - arrival,
            first_token_seconds=None if sequence.first_token is None else sequence.first_token - arrival,
            total_seconds=now - arrival,
        )

    def _observe(self, records: list[CallRecord]) -> None:
        pool = self._scheduler.pool
        self.metrics.observe_pages(pool.num_free, pool.num_cached, pool.num_live)
        self.metrics.observe_queue(self._scheduler.num_running, self._scheduler.num_waiting)
        for record in records:
            kind = "prefill" if record.cell.drafts is None else "verify" if record.drafts else "decode"
            self.metrics.observe_step(kind, record.seconds, record.rows)
            if self._controller is not None and kind != "prefill" and record.rounds:
                self._controller.update(record.rows, record.drafts, record.drafted, record.accepted, record.seconds)
                if record.drafts:
                    drafted, accepted, rounds = sum(record.drafted), sum(record.accepted), len(record.drafted)
                    self.metrics.observe_speculation(drafted, accepted, accepted + rounds, rounds)
                    stats = self._controller.stats
                    self.metrics.set_tokens_per_round(stats.tokens_per_round, stats.expected_tokens_per_round)


def _only(plan: Plan, sequence: Sequence) -> Plan:
    """A sequence's part of a plan."""
    tiles = tuple(tile for tile in plan.tiles if tile.sequence is sequence)
    return dataclasses.replace(plan, tiles=tiles, decode=() if tiles else (sequence,))
