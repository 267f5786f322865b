"""The HTTP server's process: listens, says when it does, and stops in order on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from serving.api import Api, create_app
from serving.api_config import ApiConfig
from serving.exchange import Engine

LAST_WORDS_SECONDS = 2.0
"""How long connections may take to be told the end after the engine has ended everything."""

logger = logging.getLogger(__name__)


def serve_http(engine: Engine, config: ApiConfig, on_started: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT, in the main thread; returns the exit status, 0.

    `on_started` is called with the server's URL once it listens (which may be before the engine is ready: /ready says).
    On a signal new requests get 503, running ones `grace_seconds`; then they are cancelled. A second signal cancels
    them at once. Raises ValueError if the address can't be listened at, or a key file can't be read.
    """
    app = create_app(engine, config)
    listener = _listen(config)
    # The parser and loop that are declared dependencies, whatever else happens to be installed. No logging
    # configuration: uvicorn's own would write to stdout.
    settings = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
    )
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"
    with listener:
        _Server(settings, app.state.api, lambda: on_started(url)).run(sockets=[listener])
    return 0


def _listen(config: ApiConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # asyncio turns Nagle's algorithm off only for sockets that say that they are TCP: with it on, an event
        # would wait for the acknowledgement of the one before, up to 40 ms.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"api.host={config.host!r} is no address of this machine: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"api.host={config.host!r}, api.port={config.port} can't be listened at ({error.strerror}); "
            "choose another port, or 0 for a free one"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn with another end: it would close on a signal at once, and then die of that signal."""

    def __init__(self, config: uvicorn.Config, api: Api, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._api, self._on_started = api, on_started
        self._stop_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop_task is None:
            logger.warning("%s: finishing what runs, at most %g s", name, self._api.config.grace_seconds)
            self._stop_task = asyncio.create_task(self._stop())
        else:
            logger.warning("%s again: cancelling what runs", name)
            self._api.cancel_all()

    async def _stop(self) -> None:
        try:
            if not await self._api.drain():
                self._api.cancel_all()
            await self._api.idle(LAST_WORDS_SECONDS)
            if self._api.exchanges:
                # Clients that do not read: uvicorn would wait for them, and then cancel with a traceback each.
                logger.warning("hanging up on %d clients that do not read", len(self._api.exchanges))
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
                await self._api.idle(LAST_WORDS_SECONDS)
        finally:
            self.should_exit = True
