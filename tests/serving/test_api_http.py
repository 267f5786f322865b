"""What clients that are broken, hostile, slow or gone get, and that nobody else notices."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.api import create_app
from serving.api_config import ApiConfig
from serving.request import Delta, TokenLogprob, Usage
from serving.stream import DeltaStream, merge
from tests.serving.fake_engine import MODEL, FakeEngine, events, long_text, serving, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
JSON = {"Content-Type": "application/json"}
MAX_BODY = 20_000
USAGE = Usage(1, 3, 0, 0.0, 0.1, 0.2)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(characters=1000)


@pytest.fixture(scope="module")
def http_client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with (
        serving(engine, max_body_bytes=MAX_BODY) as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        yield client
        # Nothing here has hurt the server.
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert client.get("/health").json() == {"alive": True}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(key, error)] = response.json().items()
    assert key == "error" and set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"model": "\xff"}', "not valid UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"tools": [{"x": -Infinity}]}', "-Infinity is no number of JSON"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b'{"seed": 1, "seed": 2}', "given twice"),
        (b'{"messages": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested too deeply"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"\\uDfff": 1}', "surrogate"),
        (b'{"model": "fake/model", "messages": [{"role": "user", "content": "\\uD800"}]}', "surrogate"),
    ],
)
def test_bodies_that_are_no_json_object(http_client: httpx.Client, body: bytes, reason: str):
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        error = error_of(http_client.post(endpoint, content=body, headers=JSON), 400)
        assert reason in error["message"] and error["type"] == "invalid_request_error"


def test_a_pair_of_surrogates_is_a_character(http_client: httpx.Client, engine: FakeEngine):
    body = b'{"model": "fake/model", "prompt": "\\ud83d\\ude00", "echo": true}'
    response = http_client.post("/v1/completions", content=body, headers=JSON)
    assert response.json()["choices"][0]["text"].startswith("😀")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_NAMES = (
    "messages",
    "prompt",
    "tools",
    "tool_choice",
    "response_format",
    "logit_bias",
    "stop",
    "stream_options",
    "n",
    "temperature",
    "seed",
    "timeout",
    "logprobs",
    "max_tokens",
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(_NAMES), value=_VALUES)
def test_no_value_is_an_error_of_the_server(http_client: httpx.Client, name: str, value):
    body = json.dumps({**CHAT, name: value})
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        response = http_client.post(endpoint, content=body.encode("utf-8"), headers=JSON)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            error_of(response, 400)


def test_bodies_too_large(http_client: httpx.Client):
    large = b'{"model": "' + b"x" * MAX_BODY + b'"}'
    error = error_of(http_client.post("/v1/completions", content=large, headers=JSON), 413)
    assert str(MAX_BODY) in error["message"]
    # Without a declared length the limit holds as the bytes come.
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY:
            sent += 1000
            yield b"x" * 1000
            time.sleep(0.001)

    error_of(http_client.post("/v1/completions", content=chunks(), headers=JSON), 413)
    assert sent < 50 * MAX_BODY


def test_a_body_that_does_not_come(engine: FakeEngine):
    with serving(engine, stall_seconds=0.2) as url:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 408 and "0.2 s" in json.load(response)["error"]["message"]
        connection.close()


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({}, "Content-Type"),
        ({"Content-Type": "text/plain"}, "text/plain"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "form"),
        ({"Content-Type": "application/json; charset=latin-1"}, "latin-1"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_types_of_bodies_that_are_not_read(http_client: httpx.Client, headers: dict[str, str], word: str):
    error = error_of(http_client.post("/v1/completions", content=b"{}", headers=headers), 415)
    assert word in error["message"]


def test_json_may_say_its_charset(http_client: httpx.Client):
    headers = {"Content-Type": "Application/JSON; charset=UTF-8"}
    assert http_client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/completions/", 404),
        ("GET", "/", 404),
        ("GET", "/v1/../metrics", 404),
        ("GET", "//metrics", 404),
    ],
)
def test_paths_and_methods_that_are_not_there(http_client: httpx.Client, method: str, path: str, status: int):
    address = urlsplit(str(http_client.base_url))
    # http.client sends a path as it is.
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    assert response.status == status
    assert json.load(response)["error"]["message"]
    assert (response.getheader("allow") is not None) == (status == 405)
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /" + b"x" * 100_000,
    ],
)
def test_what_is_no_http(http_client: httpx.Client, data: bytes):
    address = urlsplit(str(http_client.base_url))
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(data)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_metrics_count_answers_by_route(http_client: httpx.Client, engine: FakeEngine):
    for _ in range(3):
        http_client.get("/v1/models/" + "x" * 50)
        http_client.get("/nowhere")
    http_client.post("/v1/chat/completions", json=CHAT)
    response = http_client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    counts = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("http_requests_total")}
    assert counts['http_requests_total{route="/v1/models/{name}",status="404"}'] >= 3
    assert counts['http_requests_total{route="other",status="404"}'] >= 3
    assert counts['http_requests_total{route="/v1/chat/completions",status="200"}'] >= 1
    assert "nowhere" not in response.text and "xxx" not in response.text


def test_an_engine_that_is_not_ready_or_has_died():
    engine = FakeEngine(characters=1, delay=0.01)
    engine.ready = False
    with serving(engine) as url, httpx.Client(base_url=url, timeout=10) as client:
        response = client.post("/v1/chat/completions", json=CHAT)
        assert error_of(response, 503)["type"] == "server_error" and int(response.headers["retry-after"]) > 0
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        engine.ready = True
        assert client.get("/ready").status_code == 200
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            text = response.iter_text()
            next(text)
            engine.stop()
            assert "the engine has stopped" in events("".join(text))[-1]["error"]["message"]
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        error_of(client.post("/v1/chat/completions", json=CHAT), 503)


def test_our_own_errors_are_500_and_logged(caplog):
    engine = FakeEngine()

    def broken(request):
        raise KeyError("a bug of ours")

    engine.submit = broken
    with serving(engine) as url, httpx.Client(base_url=url) as client:
        error = error_of(client.post("/v1/chat/completions", json=CHAT), 500)
        assert "a bug of ours" not in error["message"]
        assert client.get("/health").status_code == 200
        # It is written down after it is answered.
        wait_until(lambda: any(r.exc_info and "a bug of ours" in str(r.exc_info[1]) for r in caplog.records))


# --- clients that go away, or stay and do not read


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_all_of_its_sequences(stream: bool):
    engine = FakeEngine(characters=1, delay=0.005)
    engine.script = long_text
    with serving(engine) as url, httpx.Client(base_url=url) as client:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
        body = json.dumps({**CHAT, "n": 3, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, JSON)
        wait_until(lambda: engine.num_running == 3)
        connection.sock.close()
        assert engine.wait_idle()
        assert sorted(engine.ended.values()) == ["cancelled"] * 3
        if not stream:
            wait_until(lambda: 'status="499"} 1.0' in client.get("/metrics").text)


# Fast enough to fill the sockets' buffers (some MB) in half a second, slow enough for the loop to keep up with.
FAST = {"characters": 20_000, "delay": 0.002}


def endless(seed: int) -> FakeEngine:
    """An engine that has much to say to a request with this seed, and little to the others."""
    engine = FakeEngine(**FAST)
    engine.script = lambda request: long_text(request, 20_000_000) if request.params.seed == seed else "short"
    engine.max_context = 10**9
    return engine


def test_a_client_that_does_not_read_is_cancelled_and_holds_nobody_up():
    engine = endless(seed=1)
    with serving(engine, stream_buffer=4_000_000, stall_seconds=0.5) as url, httpx.Client(base_url=url) as client:
        address = urlsplit(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.hostname, address.port))
            body = json.dumps({**CHAT, "stream": True, "seed": 1}).encode()
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
            # The others are served meanwhile, and it does not keep its place.
            wait_until(lambda: engine.num_running == 1)
            while engine.num_running:
                answer = client.post("/v1/chat/completions", json=CHAT).json()
                assert answer["choices"][0]["message"]["content"] == "short"
            assert list(engine.ended.values()).count("cancelled") == 1
            # After stall_seconds the server hangs up: the stream has no end.
            time.sleep(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            connection.settimeout(5)
            received = bytearray()
            while data := connection.recv(1 << 20):
                received += data
            assert 100_000 < len(received) < 20_000_000
            assert b"[DONE]" not in received and b'"error"' not in received


def test_a_client_that_reads_again_is_told():
    engine = endless(seed=1)
    with serving(engine, stream_buffer=4_000_000) as url, httpx.Client(base_url=url, timeout=10) as client:
        body = {**CHAT, "stream": True, "seed": 1}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert engine.wait_idle(10)
            *whole, last = events(response.read().decode())
        assert "too slowly" in last["error"]["message"]
        assert len(whole) > 10 and list(engine.ended.values()) == ["cancelled"]


# --- the buffer between the engine's thread and the loop


def test_the_buffer_is_bounded_and_loses_nothing_within_its_bound():
    async def run():
        overflows = []
        stream = DeltaStream(10, lambda: overflows.append(1))
        put = stream.on_delta(0)
        thread = threading.Thread(target=lambda: [put(Delta("x", (1,))) for _ in range(10)])
        thread.start()
        thread.join()
        [(index, delta)] = merge(await stream.take(1))
        assert (index, delta.text, delta.tokens) == (0, "x" * 10, (1,) * 10)
        assert await stream.take(0.01) == [] and await stream.take(0.01) == []
        for _ in range(9):
            put(Delta("", (1,)))
        put(Delta("", (1, 1)))
        put(Delta("y", (1,)))
        await asyncio.sleep(0)
        assert overflows == [1] and stream.overflowed
        assert await stream.take(1) == []
        # The last delta always has a place.
        stream = DeltaStream(1, lambda: overflows.append(2))
        stream.on_delta(1)(Delta("a", (1,)))
        stream.on_delta(1)(Delta("b", (1, 2), finish="stop"))
        assert [delta.text for _, delta in await stream.take(1)] == ["a", "b"] and overflows == [1]

    asyncio.run(run())


def test_merged_deltas_lose_nothing():
    entries = [TokenLogprob(token, -token) for token in range(3)]
    deltas = [
        (0, Delta("a", (0,), (entries[0],))),
        (1, Delta("x", (7,))),
        (0, Delta("", (1,), (entries[1],))),
        (0, Delta("b", (2,), (entries[2],), "error", "reason", USAGE)),
    ]
    assert merge(deltas) == [
        (0, Delta("ab", (0, 1, 2), tuple(entries), "error", "reason", USAGE)),
        (1, Delta("x", (7,))),
    ]


def test_the_engines_thread_outlives_the_loop():
    async def make() -> DeltaStream:
        return DeltaStream(10, lambda: None)

    stream = asyncio.run(make())
    stream.on_delta(0)(Delta("x", (1,)))
    stream.on_delta(0)(Delta("x", (1,)))


# --- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"max_body_bytes": 0},
        {"max_choices": 0},
        {"stream_buffer": 0},
        {"stall_seconds": 0},
        {"grace_seconds": -1},
        {"metrics_need_admin_key": True},
    ],
)
def test_settings_out_of_range(wrong: dict):
    [name] = wrong
    with pytest.raises(ValueError, match=rf"api\.{name}"):
        ApiConfig(**wrong)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "can't be read"), (b"\n \n", "holds no key"), (b"k\xc3\xa9y", "printable")]
)
def test_key_files(tmp_path, content: bytes | None, reason: str):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    for name in ("api_key_file", "admin_key_file"):
        with pytest.raises(ValueError, match=reason) as caught:
            create_app(FakeEngine(), ApiConfig(**{name: str(path)}))
        assert f"api.{name}" in str(caught.value)
