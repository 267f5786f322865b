"""Deltas on their way from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from serving.request import Delta


class DeltaStream:
    """Deltas of the sequences that answer one HTTP request, by their index.

    The engine's thread puts, the event loop takes all that has come. With a `limit`, at most that many tokens wait here
    (one delta may go beyond it): then everything waiting is dropped, nothing more is taken, and `overflowed` is
    set, so that a client that does not read costs no more memory than that and never holds up the engine.
    `on_overflow` is then called once, in the loop: whoever takes may be held up by the client himself.
    """

    def __init__(self, limit: int | None, on_overflow: Callable[[], None]) -> None:
        self.overflowed = False
        self._limit, self._on_overflow = limit, on_overflow
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Delta]] = []
        self._size = 0
        self._closed = False

    def on_delta(self, index: int) -> Callable[[Delta], None]:
        """The `on_delta` of the request that answers with choice `index`."""
        return lambda delta: self._put(index, delta)

    def _put(self, index: int, delta: Delta) -> None:
        with self._lock:
            if self._closed:
                return
            tell = None if self._waiting else self._arrived.set
            self._waiting.append((index, delta))
            self._size += max(1, len(delta.tokens))
            # The last delta of a sequence always has a place: the sequence holds nothing up any more.
            if self._limit is not None and self._size > self._limit and delta.finish is None:
                self._waiting, self._closed, self.overflowed = [], True, True
                tell = self._overflow
        if tell is not None:
            try:
                self._loop.call_soon_threadsafe(tell)
            except RuntimeError:
                # The loop is closed: the server has stopped, nobody will read this. The engine's thread goes on.
                self.close()

    def _overflow(self) -> None:
        self._arrived.set()
        self._on_overflow()

    async def take(self, timeout: float) -> list[tuple[int, Delta]]:
        """What came since the last call, waiting up to `timeout` seconds for something; [] if nothing came."""
        if not self._waiting and not self.overflowed:
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        self._arrived.clear()
        with self._lock:
            taken, self._waiting, self._size = self._waiting, [], 0
        return taken

    def close(self) -> None:
        """Nothing that comes later is kept."""
        with self._lock:
            self._waiting, self._closed = [], True


def merge(deltas: Sequence[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """One delta for each index, in order of appearance: a slow reader gets fewer and larger chunks."""
    groups: dict[int, list[Delta]] = {}
    for index, delta in deltas:
        groups.setdefault(index, []).append(delta)
    return [(index, group[0] if len(group) == 1 else _join(group)) for index, group in groups.items()]


def _join(group: list[Delta]) -> Delta:
    last = group[-1]
    assert all(delta.finish is None for delta in group[:-1]), "a delta after the last one of its sequence"
    return Delta(
        text="".join(delta.text for delta in group),
        tokens=tuple(token for delta in group for token in delta.tokens),
        logprobs=tuple(entry for delta in group for entry in delta.logprobs),
        finish=last.finish,
        error=last.error,
        usage=last.usage,
    )
