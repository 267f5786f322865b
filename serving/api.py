"""The HTTP server's routes: OpenAI's completions and chat completions, models, health, metrics, administration."""

from __future__ import annotations

import asyncio
import datetime
import hmac
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perf.capture import Capture
from perf.serving_facts import METRICS_FILE
from serving import responses
from serving.api_config import ApiConfig, read_keys
from serving.errors import Draining, QueueFull
from serving.exchange import Engine, EventStream, Exchange, Failed, while_connected, whole
from serving.fields import BadRequest
from serving.schema import Call, parse_chat, parse_completion, unknown_model

NOT_READY_SECONDS = 5
"""Retry-After while programs are compiled."""

CLIENT_GONE = 499
"""Status that a request is counted under whose client did not wait; never sent."""

MAX_PROFILE_SECONDS = 60
"""A trace of a minute is gigabytes already."""

logger = logging.getLogger(__name__)


def create_app(engine: Engine, config: ApiConfig) -> Starlette:
    """The application; its `state.api` is the `Api`. Raises ValueError for a key file that can't be used."""
    api = Api(engine, config)
    handlers = {
        BadRequest: _bad_request,
        QueueFull: _queue_full,
        Draining: api.stopping,
        Failed: lambda request, error: error_response(error.status, str(error)),
        HTTPException: _http_error,
        Exception: _our_bug,
    }
    app = Starlette(routes=api.routes(), middleware=[Middleware(Gate, api=api)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.api = api
    return app


class Api:
    """What the routes share: the engine, the keys, the exchanges under way."""

    def __init__(self, engine: Engine, config: ApiConfig) -> None:
        self.engine, self.config = engine, config
        self.keys = read_keys(config.api_key_file, "api.api_key_file")
        self.admin_keys = read_keys(config.admin_key_file, "api.admin_key_file")
        self.draining = False
        self.exchanges: set[Exchange] = set()
        self._started = int(time.time())
        self._drain_task: asyncio.Task[bool] | None = None
        self._profile_task: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
        ]
        if self.admin_keys:
            routes.append(Route("/admin/drain", self.admin_drain, methods=["POST"]))
            routes.append(Route("/admin/profile", self.admin_profile, methods=["POST"]))
        return routes

    def needed_keys(self, path: str) -> tuple[bytes, ...]:
        """The keys one of which a path asks for; () where everybody may enter."""
        if path.startswith("/admin/") or (path == "/metrics" and self.config.metrics_need_admin_key):
            return self.admin_keys
        return self.keys if path.startswith("/v1/") else ()

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def _answer(self, request: Request, parse: Callable[..., Call]) -> Response:
        arrival = time.monotonic()
        if self.draining:
            raise Draining
        if not self.engine.ready or not self.engine.alive:
            state = "stopped" if self.engine.ready else "not ready yet"
            return error_response(503, f"the engine is {state}", retry_after=NOT_READY_SECONDS)
        try:
            body = await read_json_body(request, self.config)
            # A long text takes long to encode, a schema to compile: the other streams go on meanwhile.
            call = await run_in_threadpool(parse, body, self.engine, self.config.max_choices, arrival)
            exchange = Exchange(self.engine, call, self.config.stream_buffer, self.exchanges)
            self._submit(exchange)
            if call.stream:
                return EventStream(exchange, self.config.stall_seconds)
            try:
                return json_response(await while_connected(request.receive, whole(exchange)))
            finally:
                exchange.close()
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    def _submit(self, exchange: Exchange) -> None:
        try:
            exchange.submit()
        except ValueError as error:
            # The engine knows limits of its own, such as the size of its cache.
            raise BadRequest(str(error), "messages" if exchange.call.kind == "chat" else "prompt") from error

    def describe_model(self) -> dict[str, object]:
        return {
            "id": self.engine.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "ridgeline",
            "max_model_len": self.engine.max_context,
        }

    async def models(self, request: Request) -> Response:
        return json_response(responses.encode({"object": "list", "data": [self.describe_model()]}))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.engine.model_name:
            raise unknown_model(name, self.engine)
        return json_response(responses.encode(self.describe_model()))

    async def health(self, request: Request) -> Response:
        """200 while the engine's thread lives, or has yet to start; whether requests are taken is /ready's to say."""
        alive = self.engine.alive or not self.engine.ready
        return json_response(responses.encode({"alive": alive}), 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        ready = self.engine.ready and self.engine.alive and not self.draining
        return json_response(responses.encode({"ready": ready}), 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def admin_drain(self, request: Request) -> Response:
        """Takes nothing new from now on, for good: the server can be stopped when /metrics shows nothing running."""
        if await read_body(request, self.config):
            raise BadRequest("/admin/drain takes no body")
        if self._drain_task is None:
            self._drain_task = asyncio.create_task(self.drain())
        return json_response(responses.encode({"draining": True}), 202)

    async def admin_profile(self, request: Request) -> Response:
        """Captures a trace of what is served meanwhile, for {"seconds": N}, and answers with its folder."""
        seconds = parse_profile(await read_json_body(request, self.config))
        if self._profile_task is not None and not self._profile_task.done():
            raise HTTPException(409, "a trace is being captured; ask again when it is done")
        now = datetime.datetime.now(datetime.UTC)
        capture = Capture(Path(self.config.profile_dir) / now.strftime("%Y%m%d-%H%M%S-%f"))
        # A client that goes away leaves no profiler running.
        self._profile_task = asyncio.create_task(self._profile(capture, seconds))
        try:
            await asyncio.shield(self._profile_task)
        except OSError as error:
            setting = f"api.profile_dir={self.config.profile_dir}"
            raise HTTPException(503, f"{setting} can't be written: {error.strerror}") from error
        return json_response(responses.encode({"folder": str(capture.folder), "seconds": seconds}))

    async def _profile(self, capture: Capture, seconds: float) -> None:
        await asyncio.to_thread(capture.start)
        self.engine.metrics.observe_profile()
        try:
            await asyncio.sleep(seconds)
        finally:
            await asyncio.to_thread(capture.stop, kind="serve", model=self.engine.model_name)
            # What `python -m perf doctor` reads beside the trace: bandwidth, drafts, compilations.
            await asyncio.to_thread((capture.folder / METRICS_FILE).write_bytes, self.engine.metrics.text())

    async def drain(self) -> bool:
        """Stops admission and waits for the grace period at most; False if something still runs."""
        self.draining = True
        return await asyncio.to_thread(self.engine.drain, self.config.grace_seconds)

    def cancel_all(self) -> None:
        for exchange in self.exchanges:
            exchange.cancel()

    async def idle(self, timeout: float) -> None:
        """Waits until nobody is being answered, `timeout` seconds at most."""
        end = time.monotonic() + timeout
        while self.exchanges and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def stopping(self, request: Request, error: Exception) -> Response:
        retry_after = math.ceil(self.config.grace_seconds) + 1
        return error_response(503, "the server is stopping and takes nothing new", retry_after=retry_after)


class Gate:
    """Asks for keys and counts answers, around all routes."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app, self._api = app, api
        self._paths = {route.path for route in api.routes()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # What ends without a status is an error that the handler outside turns into 500.
        status = 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            keys = self._api.needed_keys(scope["path"])
            answer = self._app if not keys or has_key(scope, keys) else _unauthorized
            await answer(scope, receive, counting)
        finally:
            self._api.engine.metrics.observe_http(self._route(scope["path"]), status)

    def _route(self, path: str) -> str:
        if path in self._paths:
            return path
        return "/v1/models/{name}" if path.startswith("/v1/models/") else "other"


def has_key(scope: Scope, keys: tuple[bytes, ...]) -> bool:
    """Whether the request carries one of the keys; takes as long for a wrong key as for a right one."""
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, given = header.partition(b" ")
    # All keys are compared, so that the time does not tell which one was nearly right.
    matches = [hmac.compare_digest(given.strip(), key) for key in keys]
    return scheme.lower() == b"bearer" and any(matches)


async def _unauthorized(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(401, "this path needs a key: Authorization: Bearer KEY", code="invalid_api_key")
    response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)


def parse_profile(body: bytes) -> float:
    """Seconds of {"seconds": N}. Raises BadRequest for anything else."""
    try:
        given = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(given, dict) or given.keys() != {"seconds"}:
        raise BadRequest('the body must be {"seconds": N}')
    seconds = given["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.1 <= seconds <= MAX_PROFILE_SECONDS:
        raise BadRequest(f"seconds must be a number from 0.1 to {MAX_PROFILE_SECONDS}", "seconds")
    return float(seconds)


async def read_json_body(request: Request, config: ApiConfig) -> bytes:
    """The bytes of a JSON body. Raises HTTPException for another type."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise HTTPException(415, f"Content-Type must be application/json, not {kind[:80]!r}")
    if "charset" in parameters.lower() and "utf-8" not in parameters.lower():
        raise HTTPException(415, f"Content-Type must have charset=utf-8, not {parameters[:80]!r}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding is not supported: send the body as it is")
    return await read_body(request, config)


async def read_body(request: Request, config: ApiConfig) -> bytes:
    """The body, at most `max_body_bytes` of which are ever held. Raises HTTPException 413 or 408."""
    limit = config.max_body_bytes
    declared = request.headers.get("content-length", "0")
    # The HTTP parser has refused what is no number.
    if int(declared) > limit:
        raise _too_large(limit)
    body, chunks = bytearray(), aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(config.stall_seconds):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            raise HTTPException(408, f"no byte of the body came for {config.stall_seconds:g} s", _CLOSE) from error
        if chunk is None:
            return bytes(body)
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)


# What the client still sends would be read as its next request.
_CLOSE = {"Connection": "close"}


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes, this server's limit", _CLOSE)


def json_response(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
) -> Response:
    response = json_response(responses.encode(responses.error_body(status, message, param=param, code=code)), status)
    if retry_after is not None:
        response.headers["retry-after"] = str(retry_after)
    return response


async def _bad_request(request: Request, error: BadRequest) -> Response:
    return error_response(error.status, str(error), param=error.param, code=error.code)


async def _queue_full(request: Request, error: QueueFull) -> Response:
    return error_response(429, str(error), code="queue_full", retry_after=max(1, math.ceil(error.retry_after)))


async def _http_error(request: Request, error: HTTPException) -> Response:
    response = error_response(error.status_code, error.detail)
    response.headers.update(error.headers or {})
    return response


async def _our_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer: uvicorn writes it down and hangs up, which the client must know.
    response = error_response(500, "an error in the server; it was logged")
    response.headers.update(_CLOSE)
    return response
