"""One HTTP request against the engine: submitted, answered as a stream or whole, cancelled when nobody reads it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving import responses
from serving.metrics import Metrics
from serving.request import Delta, Request, Usage
from serving.responses import Piece, answer_for
from serving.schema import Call, Model
from serving.stream import DeltaStream, merge

T = TypeVar("T")

ALIVE_SECONDS = 1.0
"""How often an exchange that hears nothing looks whether the engine lives."""

logger = logging.getLogger(__name__)


class Engine(Model, Protocol):
    """What the HTTP server needs of an engine. `submit`, `cancel` and `drain` may be called from any thread."""

    metrics: Metrics
    ready: bool
    """Everything is compiled."""
    alive: bool
    """The engine's thread runs."""

    def submit(self, request: Request) -> None:
        """Raises QueueFull, Draining, or ValueError for a request that can never run. Deltas come from the engine's
        thread; the last one of a request has `finish` and `usage`."""

    def cancel(self, request_id: str) -> None:
        """In any state, also of a request that ended."""

    def drain(self, timeout: float) -> bool:
        """Takes nothing new, and waits up to `timeout` seconds; True if everything has ended."""


class Failed(Exception):
    """The engine did not answer; `status` says whose fault that is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Exchange:
    """The requests of one call. Stands in `register` until `close`, which whoever made it calls in the end."""

    def __init__(self, engine: Engine, call: Call, stream_buffer: int, register: set[Exchange]) -> None:
        self.call = call
        self._engine, self._register = engine, register
        # A whole answer is collected at once and bounded by max_tokens: only a stream's client can fall behind.
        limit = stream_buffer * call.num_choices if call.stream else None
        self._stream = DeltaStream(limit, self.cancel)
        self._requests = call.requests(self._stream.on_delta)
        self._running: set[int] = set()
        self._usages: list[Usage | None] = [None] * call.num_choices
        self._complete: set[int] = set()
        self.answers = [answer_for(call, i, engine.tokenizer) for i in range(call.num_choices)]
        register.add(self)

    @property
    def usages(self) -> list[Usage]:
        assert None not in self._usages
        return self._usages

    def submit(self) -> None:
        """Raises what `Engine.submit` raises; nothing is left running then."""
        try:
            for i, request in enumerate(self._requests):
                self._engine.submit(request)
                self._running.add(i)
        finally:
            if len(self._running) < len(self._requests):
                self.close()

    def close(self) -> None:
        """Nobody reads on: what still runs is cancelled."""
        self._stream.close()
        self.cancel()
        self._register.discard(self)

    def cancel(self) -> None:
        """What runs ends with "cancelled", and whoever reads is told."""
        for i in self._running:
            self._engine.cancel(self._requests[i].id)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What came since the last time, until every choice has ended. Raises Failed."""
        while self._running:
            taken = await self._stream.take(ALIVE_SECONDS)
            if self._stream.overflowed:
                raise Failed(503, "the client read its stream too slowly; it was cancelled")
            if not taken and not self._engine.alive:
                raise Failed(500, "the engine has stopped")
            if pieces := [(i, piece) for i, delta in merge(taken) if (piece := self._piece(i, delta)) is not None]:
                yield pieces

    def _piece(self, i: int, delta: Delta) -> Piece | None:
        if delta.finish is not None:
            self._running.discard(i)
            self._usages[i] = delta.usage
        if i in self._complete:
            return None
        if delta.finish == "error":
            raise Failed(500, delta.error or "the engine failed")
        if delta.finish == "cancelled":
            raise Failed(503, "the server stopped before the answer was complete")
        piece = self.answers[i].push(delta)
        if piece.finish is not None and delta.finish is None:
            # The answer is complete before its sequence: the rest is not wanted, its usage still is.
            self._complete.add(i)
            self._engine.cancel(self._requests[i].id)
        return piece


async def whole(exchange: Exchange) -> bytes:
    """Body of an answer that is not streamed. Raises Failed."""
    pieces = [[answer.first()] for answer in exchange.answers]
    async for batch in exchange.pieces():
        for i, piece in batch:
            pieces[i].append(piece)
    choices = [answer.whole(pieces[i]) for i, answer in enumerate(exchange.answers)]
    return responses.Envelope(exchange.call).whole(choices, exchange.usages)


class EventStream(Response):
    """Server-sent events of an exchange. A client that takes nothing for `stall_seconds` is dropped."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, stall_seconds: float) -> None:
        # Proxies are told to pass events on as they come.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._stall_seconds = exchange, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except ClientDisconnect:
            logger.info("the client of %s went away", self._exchange.call.id)
        except TimeoutError:
            logger.warning("the client of %s took nothing for %g s", self._exchange.call.id, self._stall_seconds)
        finally:
            self._exchange.close()

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for events in self._events():
            await self._send(send, {"type": "http.response.body", "body": events, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._stall_seconds):
            await send(message)

    async def _events(self) -> AsyncIterator[bytes]:
        exchange, envelope = self._exchange, responses.Envelope(self._exchange.call)
        if exchange.call.kind == "chat" or exchange.call.echo is not None:
            yield b"".join(envelope.chunk(a.chunk(a.first(), first=True)) for a in exchange.answers)
        try:
            async for batch in exchange.pieces():
                # Nothing to show yet: held back text, or a token that is half a character.
                shown = [(i, p) for i, p in batch if p.text or p.logprobs or p.tool_calls or p.finish]
                if shown:
                    yield b"".join(envelope.chunk(exchange.answers[i].chunk(piece)) for i, piece in shown)
        except Failed as error:
            yield responses.event(responses.error_body(error.status, str(error)))
            return
        if exchange.call.include_usage:
            yield envelope.usage_chunk(exchange.usages)
        yield responses.DONE


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first (ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    tasks = (task, asyncio.ensure_future(_disconnected(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
