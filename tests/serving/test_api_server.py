"""The server's process: its address, and how it ends."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from serving.api_config import ApiConfig
from serving.server import LAST_WORDS_SECONDS, serve_http
from tests.contracts.tree import ROOT
from tests.serving.fake_engine import MODEL, FakeEngine, events, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}


class Server:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.url = process.stdout.readline().strip()

    def end(self) -> list[str]:
        """How its requests ended. It must have ended well."""
        out, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err, err
        self.err = err
        return json.loads(out)


@contextlib.contextmanager
def server(characters: int, grace: float, step: int = 10) -> Iterator[Server]:
    """A server whose answers have `characters`, `step` of them every 10 ms."""
    options = json.dumps({"characters": characters, "grace": grace, "step": step})
    command = [sys.executable, "-W", "error", "-m", "tests.serving.serve_fake", options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish(number: signal.Signals):
    # A second and a half of text.
    with server(characters=1500, grace=10) as running, httpx.Client(base_url=running.url) as client:
        with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            text = response.iter_text()
            received = next(text)
            running.process.send_signal(number)
            wait_until(lambda: httpx.get(f"{running.url}/ready").status_code == 503)
            late = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
            assert late.status_code == 503 and int(late.headers["retry-after"]) >= 10
            assert "stopping" in late.json()["error"]["message"]
            assert httpx.get(f"{running.url}/health").status_code == 200
            received += "".join(text)
        *chunks, usage_free_last, done = events(received)
        assert done == "[DONE]" and usage_free_last["choices"][0]["finish_reason"] == "stop"
        contents = [chunk["choices"][0]["delta"].get("content") or "" for chunk in [*chunks, usage_free_last]]
        assert len("".join(contents)) == 1500
        assert running.end() == ["stop"]
        assert number.name in running.err


def test_what_outlasts_the_grace_period_is_cancelled_and_told():
    with server(characters=1_000_000, grace=0.3) as running, httpx.Client(base_url=running.url) as client:
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "n": 2}) as response:
            text = response.iter_text()
            received = next(text)
            running.process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            last = events(received + "".join(text))[-1]
        assert "the server stopped" in last["error"]["message"]
        assert running.end() == ["cancelled"] * 2
        assert 0.2 < time.monotonic() - begin < 10


def test_a_second_signal_does_not_wait():
    with server(characters=1_000_000, grace=60) as running, httpx.Client(base_url=running.url) as client:
        with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            text = response.iter_text()
            next(text)
            for _ in range(2):
                running.process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            begin = time.monotonic()
            assert "the server stopped" in "".join(text)
        assert running.end() == ["cancelled"]
        assert time.monotonic() - begin < 20


def test_a_stalled_client_does_not_keep_the_process():
    with server(characters=100_000_000, grace=0.1, step=100_000) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            body = json.dumps(CHAT).encode()
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
            connection.recv(10)
            time.sleep(1)  # 10 MB: more than the sockets hold.
            running.process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            assert running.end() == ["cancelled"]
            assert "hanging up on 1 client" in running.err
            assert LAST_WORDS_SECONDS < time.monotonic() - begin < 10 * LAST_WORDS_SECONDS


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"api\.port={port}"):
            serve_http(FakeEngine(), ApiConfig(port=port), print)
    with pytest.raises(ValueError, match=r"api\.host"):
        serve_http(FakeEngine(), ApiConfig(host="no such host"), print)


def test_events_do_not_wait_for_acknowledgements():
    """Accepted connections have Nagle's algorithm off, which asyncio sees to for sockets that say they are TCP."""
    from serving.server import _listen

    with _listen(ApiConfig(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP
