"""An engine without a model, a tokenizer of bytes, and a server around them: what the HTTP layer needs to be tested."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import uvicorn
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from serving.api import create_app
from serving.api_config import ApiConfig
from serving.chat import ChatTemplate
from serving.errors import Draining, QueueFull
from serving.grammar import GrammarCompiler
from serving.metrics import Metrics
from serving.request import Delta, Request, TokenLogprob, Usage
from serving.tokenizer import Tokenizer

MODEL = "fake/model"
MAX_CONTEXT = 4096
PADDING = 3
"""Ids of the model's vocabulary that the tokenizer lacks."""

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.content == 'raise' %}{{ raise_exception('no such message') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}"
    "{% endfor %}<assistant>"
)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; token 256 is the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's letters of bytes: the printable ones stand for themselves, the others follow at U+0100.
    byte_of = _letters_of_bytes()
    assert sorted(byte_of) == letters
    backend = Backend(models.BPE(vocab={letter: byte_of[letter] for letter in letters}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend.to_str(), end_ids=(256,), special_tokens={"eos_token": "<end>"})


def _letters_of_bytes() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def reply(request: Request) -> str:
    """The text of a request by default: of its prompt's length and its seed, so that both can be seen."""
    return f"{len(request.prompt)} tokens, seed {request.params.seed}: " + "naïve ☃ text " * 3


class FakeEngine:
    """Answers in a thread of its own, `characters` at a time, each time after `delay` seconds.

    Under a grammar the answer is what the matcher's mask allows, chosen so that it ends soon. `script` gives the text
    otherwise, `fail` the error of a request, or None. Every request is kept in `requests`.
    """

    def __init__(self, delay: float = 0.0, characters: int = 4, max_queue: int = 1000) -> None:
        self.tokenizer = byte_tokenizer()
        self.model_name, self.max_context = MODEL, MAX_CONTEXT
        self.vocab_size = self.tokenizer.vocab_size + PADDING
        self.chat: ChatTemplate | None = ChatTemplate(TEMPLATE, {})
        self.grammars: GrammarCompiler | None = GrammarCompiler(self.tokenizer, self.vocab_size, self.tokenizer.end_ids)
        self.metrics = Metrics()
        self.ready = True
        self.delay, self.characters, self.max_queue = delay, characters, max_queue
        self.script: Callable[[Request], str] = reply
        self.fail: Callable[[Request], str | None] = lambda request: None
        self.requests: list[Request] = []
        self.ended: dict[str, str] = {}
        self._running: dict[str, _Running] = {}
        self._cancelled: set[str] = set()
        self._draining = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        with self._changed:
            if self._draining:
                raise Draining
            if len(self._running) >= self.max_queue:
                raise QueueFull(2.5)
            if len(request.prompt) > self.max_context // 2 and request.priority == 999:
                raise ValueError("the request needs more pages than there are")
            self.requests.append(request)
            self._running[request.id] = _Running(request, self._text(request))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._running, timeout)

    def stop(self) -> None:
        """The thread ends, as after an error in it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def wait_idle(self, timeout: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _text(self, request: Request) -> str:
        if request.grammar is not None:
            return shortest(request.grammar, self.tokenizer, self.vocab_size)
        return self.script(request)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._stopped)
                if self._stopped:
                    return
                running = list(self._running.values())
            for each in running:
                self._step(each)
            if self.delay:
                time.sleep(self.delay)

    def _step(self, running: _Running) -> None:
        delta = running.step(self.characters, self.tokenizer, self.fail, self._cancelled)
        if delta.finish is not None:
            self.metrics.observe_request(delta.usage, delta.finish)
            with self._changed:
                self.ended[running.request.id] = delta.finish
                del self._running[running.request.id]
                self._changed.notify_all()
        running.request.on_delta(delta)


class _Running:
    def __init__(self, request: Request, text: str) -> None:
        self.request, self.shown, self.generated = request, 0, 0
        cut = min([i for stop in request.stop if (i := text.find(stop)) >= 0], default=len(text))
        self.text, self.finish = text[:cut], "stop"
        if len(data := self.text.encode()) > request.params.max_tokens:
            self.text, self.finish = data[: request.params.max_tokens].decode(errors="ignore"), "length"

    def step(self, characters: int, tokenizer: Tokenizer, fail: Callable, cancelled: set[str]) -> Delta:
        piece = self.text[self.shown : self.shown + characters]
        self.shown += len(piece)
        tokens = tuple(piece.encode())
        self.generated += len(tokens)
        finish = self.finish if self.shown >= len(self.text) else None
        error = fail(self.request)
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            finish = "deadline"
        if error is not None:
            finish = "error"
        if self.request.id in cancelled:
            finish = "cancelled"
        logprobs = ()
        if self.request.params.logprobs is not None:
            top = tuple((token, -0.5 - token) for token in range(self.request.params.logprobs))
            logprobs = tuple(TokenLogprob(token, -0.25, top) for token in tokens)
        usage = Usage(len(self.request.prompt), self.generated, 2, 0.0, 0.01, 0.02) if finish else None
        return Delta(piece, tokens, logprobs, finish, error, usage)


def shortest(grammar, tokenizer: Tokenizer, vocab_size: int) -> str:
    """A text of the grammar: what closes a value is taken before what goes on with it."""
    order = [*b'}]"', *b"0123456789", *range(256)]
    matcher, mask = grammar.matcher(), np.zeros(-(-vocab_size // 32), np.uint32)
    ids: list[int] = []
    while not matcher.accepting:
        matcher.mask(mask)
        token = next(t for t in order if mask[t // 32] >> (t % 32) & 1)
        matcher.advance(token)
        ids.append(token)
        assert len(ids) < 2000, tokenizer.decode(ids)
    return tokenizer.decode(ids)


@contextlib.contextmanager
def serving(engine: FakeEngine, **settings) -> Iterator[str]:
    """The URL of a server of the engine, in a thread; it is stopped in the end."""
    app = create_app(engine, ApiConfig(**settings))
    config = uvicorn.Config(app, http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def events(text: str) -> list:
    """The JSON of a stream's events; "[DONE]" stays a string."""
    data = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [block if block == "[DONE]" else json.loads(block) for block in data]


def long_text(request: Request, characters: int = 3000) -> str:
    return ("some words " * (characters // 11 + 1))[:characters]
