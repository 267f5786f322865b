"""A request, the state of a sequence that answers it, and what it sends back. Plain Python: no arrays here."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Literal

MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20
MAX_STOP_IDS = 8

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a sequence are drawn; `serving.sampling` gives the order in which this is applied.

    Raises ValueError for a value out of range, naming the field.
    """

    max_tokens: int
    """Tokens to generate at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Keep the tokens of at least this share of the largest probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as many times as it was generated before."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and of the text so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, addend to its logit)."""
    seed: int | None = None
    """Same seed, same text, whatever else is served; None for a seed of the engine's choice."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text and are not part of it."""
    logprobs: int | None = None
    """Also report log-probabilities: of the chosen token, and of this many most likely ones."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, math.inf),
            ("temperature", 0, 100),
            ("top_k", 0, math.inf),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} must be between {low} and {high}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 < self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 and at most 100")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        if any(not -100 <= value <= 100 for _, value in self.logit_bias):
            raise ValueError("logit_bias: each value must be between -100 and 100")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit in 64 bits")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_ids has {len(self.stop_ids)} tokens; at most {MAX_STOP_IDS} are allowed")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"logprobs={self.logprobs} must be between 0 and {MAX_TOP_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token, and of the most likely ones, in the distribution that it was drawn from."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a request's `on_delta` receives, from the engine's thread: new text, and at the end why it ended.

    `text` never ends within a character or within what may become a stop string. `error` says what went wrong where
    `finish` is "error".
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    usage: Usage | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a finished request; `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to generate. Times are of `time.monotonic()`."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    on_delta: Callable[[Delta], None]
    """Called in the engine's thread: must not block."""
    stop: tuple[str, ...] = ()
    """Strings that end the text and are not part of it."""
    grammar: Any | None = None
    """A `serving.grammar.Grammar`; each sequence gets a matcher of its own."""
    priority: int = 0
    """Higher is served first; waiting raises it (see `serving.scheduler`)."""
    deadline: float | None = None
    """The request ends with "deadline" at this time, wherever it is."""
    arrival: float = 0.0


class State(enum.Enum):
    WAITING = "waiting"
    """Has no pages: new, or preempted and to be computed again."""
    RUNNING = "running"
    """Has a row in the batch, its prompt maybe not yet computed."""
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """The tokens of a request and how far they are computed.

    Invariant: keys and values of tokens[:computed] are in `pages`; a sequence that is not prefilling has
    computed == len(tokens) - 1, because the last token is the input of the next step.
    """

    request: Request
    tokens: list[int]
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    state: State = State.WAITING
    cancelled: bool = False
    cached_tokens: int = 0
    preemptions: int = 0
    started: float | None = None
    """When it first got a row."""
    first_token: float | None = None
    finish_reason: FinishReason | None = None
    submitted: float = 0.0
    """When the scheduler took it, by the scheduler's clock; waiting is counted from here."""
    rank: tuple[float, int] = (0.0, 0)
    """Place among all sequences, lowest first: see `serving.scheduler`. It never changes."""
    limit: int = 0
    """len(tokens) at which it ends with "length"."""
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    """Hashes of the full pages of `tokens`, as many as were needed so far: see `serving.pages`."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.tokens) - 1 or not self.num_generated
