"""Engines over tiny models, listeners for their requests, and what a request's text should be: one token at a time,
each by a pass of the plain forward over all tokens before it."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.mesh import MeshConfig
from serving.byte_tokenizer import byte_tokenizer
from serving.config import EngineConfig, ServeRun
from serving.engine import Engine
from serving.executor import Executor
from serving.metrics import Metrics
from serving.pages import PagePool
from serving.request import Delta, Request, SamplingParams
from serving.resolve import Resolved, resolve
from serving.sampling import History, Rows, draw, log_distribution, seed_words, top_log_probs
from serving.scheduler import Scheduler, SchedulerConfig
from serving.startup import Started, start
from tests.model.tiny import COMPILE_FAST, dense, execution

WAIT = 60.0
"""Seconds until a request that has not ended counts as lost."""

ROUNDING = 1e-5
"""Log-probabilities nearer to each other than this may change their order with the order of a sum."""

# Logits of a spread of about 2, so that few tokens are nearly tied.
MODEL = dense(init_stddev=0.5)

SHAPES = EngineConfig(
    max_sequences=4,
    batch_sizes=(1, 4),
    widths=(32,),
    max_context=64,
    tile_tokens=8,
    tile_counts=(1, 4),
    page_size=8,
    num_pages=33,
)


@dataclasses.dataclass(frozen=True)
class TinyServer:
    """A started server; `resolved` says what it runs with."""

    started: Started
    resolved: Resolved

    @property
    def engine(self) -> Engine:
        return self.started.engine

    @contextmanager
    def engine_over(
        self,
        *,
        grammars: Any = None,
        num_pages: int | None = None,
        prefix_cache: bool = True,
        rounds_ahead: int | None = None,
        **changes: Any,
    ) -> Iterator[CheckedEngine]:
        """Another engine over the same programs and the same cache, with whatever earlier ones left in it. `changes`
        are fields of SchedulerConfig. One at a time; the pages are checked after each of its steps."""
        engine, resolved, runner = self.resolved.run.engine, self.resolved, self.started.runner
        settings = {
            "max_sequences": engine.max_sequences,
            "max_queue": engine.max_queue,
            "chunk_tokens": engine.tile_counts[-1] * engine.tile_tokens,
            "tile_tokens": engine.tile_tokens,
            "max_context": resolved.max_context,
            "ageing_seconds": engine.ageing_seconds,
        }
        assert (num_pages or 0) <= engine.num_pages
        pool = PagePool(num_pages or engine.num_pages, engine.page_size, prefix_cache=prefix_cache)
        checked = CheckedEngine(
            model_name="tiny",
            tokenizer=byte_tokenizer(),
            chat=None,
            grammars=grammars,
            vocab_size=resolved.model.vocab_size,
            scheduler=Scheduler(SchedulerConfig(**(settings | changes)), pool),
            executor=Executor(
                runner,
                page_size=engine.page_size,
                tile_tokens=engine.tile_tokens,
                vocab_size=resolved.model.vocab_size,
                max_draft=resolved.run.speculation.max_draft,
            ),
            controller=None,
            max_draft_batch=resolved.run.speculation.max_batch,
            rounds_ahead=rounds_ahead or engine.rounds_ahead,
            metrics=Metrics(),
            on_calls=lambda records: None,
            seed=0,
        )
        checked.start()
        try:
            yield checked
        finally:
            checked.stop()
        checked.check_pages()
        assert checked.failures == []

    @contextmanager
    def compiling_nothing(self) -> Iterator[None]:
        before = self.started.compilations.count
        yield
        assert self.started.compilations.count == before, "something was compiled while serving"


class CheckedEngine(Engine):
    """An engine whose pages are checked after every step. `after_step` is called then too, in the engine's thread."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts | {"on_calls": self._checked_calls})
        self.scheduler: Scheduler = parts["scheduler"]
        self.executor: Executor = parts["executor"]
        self.steps = 0
        self.preemptions = 0
        self.failures: list[BaseException] = []
        self.after_step: Callable[[int], None] = lambda step: None

    def _checked_calls(self, records: list) -> None:
        self.steps += 1
        try:
            self.check_pages()
            self.after_step(self.steps)
        except AssertionError as error:
            self.failures.append(error)

    def _next_plan(self, *, prompts: bool):
        plan, drafts = super()._next_plan(prompts=prompts)
        self.preemptions += len(plan.preempted)
        return plan, drafts

    def check_pages(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        assert pool.num_free + pool.num_cached + pool.num_live == pool.capacity
        # What ended while a call that followed was under way keeps its pages until that call lands.
        running = {*self.scheduler._prefilling, *self.scheduler._decoding, *self.scheduler._in_flight}
        assert pool.num_live == len({page for sequence in running for page in sequence.pages}), "a page has leaked"

    @contextmanager
    def held(self) -> Iterator[None]:
        """No plan is made meanwhile: what is submitted within arrives at once."""
        with self._changed:
            yield


def start_tiny(
    model: ModelConfig = MODEL, *, devices: int = 1, shapes: EngineConfig = SHAPES, **changes: Any
) -> TinyServer:
    """`changes` are fields of ServeRun."""
    mesh = MeshConfig(fsdp=1, tensor=devices)
    fast = tuple(f"{name}={value}" for name, value in COMPILE_FAST.items())
    run = ServeRun(name="tiny", model=model, dtype="float32", mesh=mesh, engine=shapes, xla_options=fast, **changes)
    resolved = resolve(run, jax.devices()[:devices])
    return TinyServer(start(resolved, lambda line: None), resolved)


class Listener:
    """Takes a request's deltas."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert not self.ended.is_set(), "a delta after the last"
        self.deltas.append(delta)
        if delta.finish is not None:
            self.ended.set()

    def wait(self) -> Listener:
        assert self.ended.wait(WAIT), f"not ended after {WAIT} s and {len(self.deltas)} deltas"
        return self

    @property
    def last(self) -> Delta:
        return self.deltas[-1]

    @property
    def finish(self) -> str | None:
        return self.last.finish

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> tuple[int, ...]:
        return sum((delta.tokens for delta in self.deltas), ())

    @property
    def logprobs(self) -> list:
        return [logprob for delta in self.deltas for logprob in delta.logprobs]


def submit(engine: Engine, id: str, prompt: tuple[int, ...], params: SamplingParams, **more: Any) -> Listener:
    listener = Listener()
    engine.submit(Request(id, prompt, params, listener, **more))
    return listener


def generate(engine: Engine, id: str, prompt: tuple[int, ...], params: SamplingParams, **more: Any) -> Listener:
    """One request, served to its end."""
    return submit(engine, id, prompt, params, **more).wait()


class Expected(NamedTuple):
    """A text by naive decoding, its log-probabilities as `TokenLogprob` has them, and why it ended."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]
    finish: str


class NaiveDecoder:
    """One sequence at a time, one token at a time, by `Transformer.__call__` over everything before it."""

    def __init__(self, server: TinyServer, *, max_bias: int = 2) -> None:
        definition = server.resolved.programs.definition
        weights, _ = server.started.runner._weights
        self._weights = jax.tree.map(np.asarray, weights)
        self._limit, self._max_bias = server.resolved.max_context, max_bias
        run = execution(definition.config)

        @jax.jit
        def step(weights, tokens_1W, length, prompt_length, rows):
            model: Transformer = definition.bind(*weights)
            positions = jnp.arange(tokens_1W.shape[1], dtype=jnp.int32)[None]
            hidden_1WD = model(tokens_1W, positions, None, run).hidden_BTD
            last = jax.lax.dynamic_slice_in_dim(hidden_1WD, length - 1, 1, axis=1)
            history = History(tokens_1W, prompt_length[None], length[None])
            scores = log_distribution(model.logits(last, run)[:, 0], rows, history)
            token = draw(scores, rows, length[None])
            # The noise of the draw is the same for any scores: at a distance of it, what would be drawn instead?
            # As far as rounding may go, the same token is drawn.
            stable = draw(scores.at[0, token[0]].add(-ROUNDING), rows, length[None]) == token
            return token, stable, top_log_probs(scores, token)

        self._step = step
        self._known: dict[tuple, Expected] = {}

    def __call__(self, prompt: tuple[int, ...], params: SamplingParams, max_context: int | None = None) -> Expected:
        limit = min(len(prompt) + params.max_tokens, max_context or self._limit)
        key = (prompt, params, limit)
        if key not in self._known:
            self._known[key] = self._decode(prompt, params, limit)
        return self._known[key]

    def _decode(self, prompt: tuple[int, ...], params: SamplingParams, limit: int) -> Expected:
        rows, tokens, values, tops = self._rows(params), list(prompt), [], []
        finish = "length"
        while len(tokens) < limit:
            padded = np.zeros((1, self._limit), np.int32)
            padded[0, : len(tokens)] = tokens
            token, stable, top = self._step(self._weights, padded, np.int32(len(tokens)), np.int32(len(prompt)), rows)
            assert stable, f"two tokens after {tokens} are nearly tied: take another prompt"
            if int(token[0]) in params.stop_ids:
                finish = "stop"
                break
            tokens.append(int(token[0]))
            chosen, ids, scores = (np.asarray(part)[0] for part in top)
            values.append(float(chosen))
            asked = params.logprobs or 0
            pairs = zip(ids[:asked].tolist(), scores[:asked].tolist(), strict=True)
            tops.append(tuple(pair for pair in pairs if pair[1] > -np.inf))
        return Expected(tuple(tokens[len(prompt) :]), tuple(values), tuple(tops), finish)

    def _rows(self, params: SamplingParams) -> Rows:
        assert len(params.logit_bias) <= self._max_bias
        bias = [*params.logit_bias, *[(-1, 0.0)] * (self._max_bias - len(params.logit_bias))]
        floats = functools.partial(np.array, dtype=np.float32)
        return Rows(
            temperature_B=floats([params.temperature]),
            top_k_B=np.array([params.top_k], np.int32),
            top_p_B=floats([params.top_p]),
            min_p_B=floats([params.min_p]),
            presence_B=floats([params.presence_penalty]),
            frequency_B=floats([params.frequency_penalty]),
            repetition_B=floats([params.repetition_penalty]),
            seed_B2=np.array([seed_words(params.seed or 0)], np.uint32),
            coupled_B=np.array([params.seed is not None]),
            bias_ids_BJ=np.array([[token for token, _ in bias]], np.int32),
            bias_values_BJ=floats([[value for _, value in bias]]),
        )
