"""The load generator: arrivals, arithmetic on hand-made records, HTTP and events broken anywhere, and whole runs."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import rich.console

from benchmarks import serving, streaming
from benchmarks.serving import Prompts, Record, Run, Settings
from benchmarks.streaming import EventParser, ProtocolError, Target
from tests.serving.fake_engine import FakeEngine
from tests.serving.fake_engine import serving as real_server

# Arrivals


def test_arrivals_are_a_poisson_process():
    rng = random.Random(0)
    times = serving.arrivals(50.0, 10.0, 200.0, None, rng)
    assert times == sorted(times) and times[0] >= -10 and times[-1] < 200
    # 10,500 expected, standard deviation 102; 500 of them in the warm-up, standard deviation 22.
    assert abs(len(times) - 10_500) < 400 and abs(sum(t < 0 for t in times) - 500) < 90
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # Exponential: the standard deviation equals the mean, and 1/e of the gaps are above it.
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.04)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.06)
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


def test_a_given_number_of_arrivals():
    runs = [serving.arrivals(2.0, 5.0, 50.0, 100, random.Random(seed)) for seed in range(20)]
    measured = [[t for t in times if t >= 0] for times in runs]
    assert {len(times) for times in measured} == {100}
    assert all(times == sorted(times) and times[-1] < 50 for times in runs)
    # Counts in a tenth of the time are binomial: mean 10, variance 9.
    counts = [sum(i * 5 <= t < (i + 1) * 5 for t in times) for times in measured for i in range(10)]
    assert statistics.variance(counts) == pytest.approx(9, rel=0.35)
    assert statistics.fmean(len(times) - 100 for times in runs) == pytest.approx(10, abs=3)
    assert runs[0] == serving.arrivals(2.0, 5.0, 50.0, 100, random.Random(0)) != runs[1]


# Arithmetic


def record(due: float, *pieces: float, tokens: int | None = None, **changes) -> Record:
    fields = {"sent": due, "end": pieces[-1] if pieces else due, "tokens": tokens, "outcome": "ok", "status": 200}
    return Record(due, pieces=list(pieces), **(fields | changes))


def test_a_request_meets_the_objective_or_not():
    good = record(1.0, 1.5, 1.7, 2.1, tokens=4)
    assert good.ttft == 0.5 and good.gaps == pytest.approx([0.2, 0.4])
    # Three tokens after the first in 0.6 s.
    assert good.time_per_token == pytest.approx(0.2)
    assert good.meets(0.5, 0.21) and not good.meets(0.49, 0.21) and not good.meets(0.5, 0.19)
    for outcome in ("refused", "error", "timeout"):
        assert not record(1.0, 1.5, 1.7, 2.1, tokens=4, outcome=outcome).meets(10, 10)
    one = record(0.0, 0.2, tokens=1)
    assert one.time_per_token is None and one.meets(0.2, 1e-9)
    silent = record(0.0, tokens=3, end=0.7)
    assert silent.ttft == 0.7 and silent.meets(0.7, 0.1) and not silent.meets(0.6, 0.1)


def test_figures_of_a_run_by_hand():
    run = Run(
        rate=0.5,
        seed=0,
        seconds=10.0,
        metrics={},
        records=[
            # In the warm-up: not measured, but half of its pieces and its end come within the measured time.
            record(-1.0, -0.5, 0.5, tokens=6),
            record(0.0, 0.1, 0.2, 0.3, tokens=3, sent=0.002),
            record(4.0, 4.3, 4.5, tokens=21),
            record(8.0, outcome="refused", status=429, tokens=None),
            # Arrives in the measured time, and a third of its pieces come in it.
            record(9.5, 9.9, 10.5, 11.5, tokens=9),
        ],
    )
    figures = serving.describe(run, ttft=0.35, itl=0.3)
    assert figures["offered_rate"] == 0.4 and figures["completed_rate"] == pytest.approx(0.3)
    assert figures["output_tokens_per_second"] == pytest.approx((3 + 3 + 21 + 3) / 10)
    # The first two measured ones meet it; the last was too late to begin.
    assert figures["goodput"] == 0.2 and figures["share_within"] == 0.5
    assert figures["ttft_ms_p50"] == pytest.approx(300) and figures["ttft_ms_p99"] == pytest.approx(398)
    # Gaps 0.1, 0.1, 0.2, 0.6, 1.0.
    assert figures["itl_ms_p50"] == pytest.approx(200) and figures["itl_ms_p99"] == pytest.approx(984)
    # 0.1, 0.01 and 0.2 seconds a token.
    assert figures["time_per_token_ms_p50"] == pytest.approx(100)
    assert figures["e2e_ms_p50"] == pytest.approx(500) and figures["late_send_ms_p99"] == pytest.approx(1.94)


def test_nothing_has_no_percentiles():
    figures = serving.describe(Run(1.0, 0, 10.0, [record(1.0, outcome="error", end=2.0)], {}), 1, 1)
    assert figures["ttft_ms_p50"] is None and figures["goodput"] == 0.0 and figures["share_within"] == 0.0
    assert serving.percentiles([]) == (None, None)
    assert serving.percentiles([0.004, 0.002, 0.003]) == pytest.approx((3, 3.98))


def test_an_interval_over_repeats():
    assert serving.interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "repeats": [2.0]}
    assert serving.interval([None, None])["mean"] is None
    # Deviation 1 over the root of 3, times 4.303.
    known = serving.interval([1.0, 2.0, None, 3.0])
    assert known["mean"] == 2.0 and known["high"] - 2 == 2 - known["low"] == pytest.approx(4.303 / math.sqrt(3))
    assert known["repeats"] == [1.0, 2.0, None, 3.0]


def test_the_knee_is_the_highest_rate_that_holds():
    rates = [{"rate": r, "share_within": share} for r, share in ((1, 1.0), (2, 0.9), (4, 0.89), (8, None))]
    assert serving.knee(rates, 0.9) == 2
    assert serving.knee(rates, 0.5) == 4
    assert serving.knee(rates[2:], 0.9) is None


def test_repeats_are_pooled():
    runs = [
        Run(2.0, seed, 2.0, [record(0.5, 0.6, 0.7, tokens=2), record(1.0, outcome=outcome, error="e")], {})
        for seed, outcome in enumerate(("refused", "error", "timeout"))
    ]
    summary = serving.summarise(runs, 0.2, 0.2)
    assert [summary[name] for name in ("requests", "ok", "refused", "error", "timeout")] == [6, 3, 1, 1, 1]
    assert summary["share_within"] == 0.5 and summary["errors"] == ["e"]
    assert summary["goodput"]["mean"] == 0.5 and summary["goodput"]["low"] == 0.5


def test_the_table_shows_what_there_is(capsys):
    served = serving.summarise([Run(2.0, seed, 2.0, [record(0.5, 0.6, 0.7, tokens=2)], {}) for seed in (0, 1)], 1, 1)
    failed = serving.summarise([Run(4.0, 0, 2.0, [record(0.5, outcome="error")], {})], 1, 1)
    rich.console.Console(width=140).print(serving.table([served, failed], Settings()))
    *_, first, second, _ = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in (first, second)]
    one, other = ["2", "2", "0", "0", "0.5", "1", "100 / 100"], ["4", "1", "0", "1", "0", "0", "- / -"]
    assert [row[:7] for row in cells] == [one, other]
    assert [row[-2:] for row in cells] == [["0.5 ± 0", "100.0%"], ["0", "0.0%"]]


# Prompts


def test_prompts_have_the_tokens_asked_for():
    prompts, rng = Prompts(None), random.Random(0)
    # A chat template of 7 tokens, 1.5 tokens a word.
    prompts.calibrate([(10, 22), (30, 52)])
    assert len(prompts.prompt(307, rng).split()) == 200
    assert prompts.prompt(1, rng) in serving.WORDS.split()
    assert prompts.prompt(50, rng) != prompts.prompt(50, rng)
    with pytest.raises(ValueError, match="prompts of 1 and 2 words have 5 and 5 tokens"):
        prompts.calibrate([(1, 5), (2, 5)])


def test_prompts_of_a_text_are_its_pieces():
    prompts = Prompts("a b c\nd e")
    for seed in range(20):
        piece = prompts.words(3, random.Random(seed))
        assert piece in "a b c d e a b"
    assert len(prompts.words(12, random.Random(0)).split()) == 12


# Events and HTTP

STREAM = 'data: {"a": "☃"}\n\n: ping\n\ndata: one\r\nevent: x\r\ndata:two\r\n\r\n\n\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_may_break_anywhere(size):
    parser = EventParser()
    events = [event for i in range(0, len(STREAM), size) for event in parser.feed(STREAM[i : i + size])]
    assert events == ['{"a": "☃"}', "one\ntwo", "[DONE]"]


def test_an_event_comes_with_the_piece_that_ends_it():
    parser = EventParser()
    assert parser.feed(b"data: a\n") == [] and parser.feed(b"\ndata: b\n\nda") == ["a", "b"]
    assert parser.feed(b"ta: c\n\n") == ["c"]


async def respond(raw: bytes, size: int) -> tuple[int, dict[str, str], bytes]:
    """What the client makes of these bytes, sent `size` at a time."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for i in range(0, len(raw), size):
            writer.write(raw[i : i + size])
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        target = Target("127.0.0.1", server.sockets[0].getsockname()[1], False, "")
        async with streaming.request(target, "GET", "/") as response:
            body = b"".join([piece async for piece in response.pieces])
            return response.status, response.headers, body


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (CHUNKED + b"3\r\nabc\r\n1a;x=y\r\n" + b"\r\n" * 13 + b"\r\n0\r\nT: x\r\n\r\n", 200, b"abc" + b"\r\n" * 13),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\nno", 429, b"no"),
        (b"HTTP/1.0 500\r\nServer: x\r\n\r\nto the end", 500, b"to the end"),
    ],
)
def test_bodies_of_all_three_forms(raw, status, body, size):
    got = asyncio.run(respond(raw, size))
    assert (got[0], got[2]) == (status, body)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (CHUNKED + b"5\r\nabc", asyncio.IncompleteReadError),
        (CHUNKED + b"5\r\nabcde\r\n", asyncio.IncompleteReadError),
        (CHUNKED + b"zz\r\n", ProtocolError),
        (CHUNKED + b"2\r\nabc\r\n", ProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", asyncio.IncompleteReadError),
        (b"SSH-2.0-x\r\n\r\n", ProtocolError),
        (b"", asyncio.IncompleteReadError),
    ],
)
def test_broken_responses_are_errors(raw, error):
    with pytest.raises(error):
        asyncio.run(respond(raw, 1000))


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", Target("127.0.0.1", 8000, False, "")),
        ("https://host/api/", Target("host", 443, True, "/api")),
        ("http://[::1]:80", Target("::1", 80, False, "")),
    ],
)
def test_urls(url, target):
    assert Target.parse(url) == target


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host/?a=b"])
def test_bad_urls(url):
    with pytest.raises(ValueError, match="must be http://HOST"):
        Target.parse(url)


# Whole runs


class FakeServer:
    """Answers in OpenAI's form, the n-th stream by `script(n)`: a status, or what it sends and when."""

    def __init__(self, script: Callable[[int], AsyncIterator[bytes] | int]) -> None:
        self.script, self.streams, self.bodies = script, 0, []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, reader, writer) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
            await self._answer(head, await reader.readexactly(length), writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, body: bytes, writer) -> None:
        path = head.split()[1]
        if path == b"/v1/models":
            self._whole(writer, 200, {"data": [{"id": "m"}]})
        elif path == b"/metrics":
            text = b"# TYPE decode_mbu gauge\ndecode_mbu 0.5\ncompiles_after_ready_total 0.0\n"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        elif not (fields := json.loads(body)).get("stream"):
            self._whole(writer, 200, {"usage": {"prompt_tokens": 3 + 2 * len(fields["prompt"].split())}})
        else:
            self.bodies.append(fields)
            self.streams += 1
            answer = self.script(self.streams)
            if isinstance(answer, int):
                self._whole(writer, answer, {"error": {"message": "busy"}})
                return
            writer.write(CHUNKED)
            async for piece in answer:
                writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")

    def _whole(self, writer, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)


def event(body: dict | str) -> bytes:
    return b"data: " + (body if isinstance(body, str) else json.dumps(body)).encode() + b"\n\n"


USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}})


async def answer(*pieces: bytes, first: float = 0.0, gap: float = 0.0) -> AsyncIterator[bytes]:
    await asyncio.sleep(first)
    for number, piece in enumerate(pieces):
        await asyncio.sleep(gap if number else 0)
        yield piece


def text(piece: str) -> bytes:
    return event({"choices": [{"text": piece}]})


def good(**delays: float) -> AsyncIterator[bytes]:
    return answer(text(""), text("a b"), text(" c"), USAGE + event("[DONE]"), **delays)


def run_main(capsys, url: str, *arguments: str) -> dict:
    code = serving.main(["--url", url, "--warmup-seconds", "0", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])


def test_a_run_with_every_kind_of_answer(capsys, tmp_path):
    kinds = {
        1: lambda: 429,
        2: lambda: answer(text("a"), event({"error": {"message": "broken"}}), event("[DONE]")),
        3: lambda: good(first=1.2),
        4: lambda: answer(text("a"), USAGE),
        5: lambda: answer(text("a"), event("[DONE]")),
        6: lambda: answer(text("a"), b"data: {\n\n"),
        7: lambda: good(gap=30.0),
        8: lambda: 503,
    }
    with FakeServer(lambda n: kinds.get(n, good)()) as server:
        output = tmp_path / "raw.json"
        arguments = ("--rates", "40,80", "--requests", "10", "--repeats", "2", "--timeout", "3", "--ttft-ms", "1000")
        report = run_main(capsys, server.url, *arguments, "--output", str(output), "--prompt-tokens", "43")
    first, second = report["rates"]
    counts = [first[name] for name in ("requests", "ok", "refused", "error", "timeout")]
    assert counts == [20, 13, 1, 5, 1]
    # The slow one ended well, and not in time.
    assert first["share_within"] == 12 / 20 and second["share_within"] == 1.0 and report["knee"] == 80
    assert first["goodput"]["repeats"] == [2 / 0.25, 10 / 0.25] and second["goodput"]["low"] is not None
    assert second["ttft_ms_p50"]["mean"] < 1000 and second["completion_tokens_mean"] == 5
    assert report["server"]["model"] == "m" and report["server_metrics"]["decode_mbu"] == 0.5
    assert report["server_metrics"]["compiles_after_ready_total"] == 0 and report["server_metrics"]["running"] is None
    assert {body["max_tokens"] for body in server.bodies} == {256} and "ignore_eos" not in server.bodies[0]
    # 43 tokens: 3 of a template and 2 a word.
    assert {len(body["prompt"].split()) for body in server.bodies} == {20} and report["tokens_per_word"] == 2
    raw = json.loads(output.read_text())["raw"]
    assert [len(run["requests"]) for run in raw] == [10] * 4
    first_run = raw[0]["requests"]
    for message in ("broken", "without [DONE]", "no usage", "not JSON", "no end after 3"):
        assert sum(message in (each["error"] or "") for each in first_run) == 1, message
    assert sorted(each["status"] for each in first_run) == [200] * 8 + [429, 503]
    slow = [each for each in first_run if each["outcome"] == "ok" and each["ttft"] >= 1.2]
    assert len(slow) == 1 and len(slow[0]["gaps"]) == 1 and slow[0]["end"] >= slow[0]["pieces"][1]


def test_a_late_server_does_not_slow_the_arrivals(capsys):
    with FakeServer(lambda n: good(first=0.6)) as server:
        began = time.monotonic()
        report = run_main(capsys, server.url, "--rates", "100", "--requests", "50", "--repeats", "1")
        # One after another they would take 30 s.
        assert time.monotonic() - began < 10
    only = report["rates"][0]
    assert only["ok"] == 50 and only["ttft_ms_p50"]["mean"] > 600
    # None ended while the others arrived, in half a second.
    assert only["completed_rate"]["mean"] == 0 and only["offered_rate"]["mean"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "GET http://127.0.0.1:1/v1/models failed"),
        (["--url", "nowhere"], "url='nowhere' must be http://HOST"),
        (["--prompt-file", "missing.txt"], "prompt_file=missing.txt can't be read"),
        (["--api-key-file", "missing.key"], "api_key_file=missing.key can't be read"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, message, capsys):
    assert serving.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": (2.0, 1.0)},
        {"rates": ()},
        {"rates": (0.0,)},
        {"requests": 0},
        {"repeats": 11},
        {"knee_share": 0.0},
        {"prompt_tokens": (0,)},
        {"itl_ms": math.nan},
    ],
)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_this_projects_server(endpoint, capsys, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    engine = FakeEngine(delay=0.001)
    try:
        with real_server(engine, api_key_file=str(key)) as url:
            arguments = ("--rates", "40", "--requests", "12", "--repeats", "1", "--prompt-tokens", "100,200")
            arguments += ("--endpoint", endpoint, "--api-key-file", str(key), "--max-tokens", "20", "--ignore-eos")
            arguments += ("--ttft-ms", "10000", "--itl-ms", "1000")
            report = run_main(capsys, url, *arguments)
    finally:
        engine.stop()
    only = report["rates"][0]
    assert only["ok"] == 12 and only["errors"] == []
    assert only["completion_tokens_mean"] == 20 and only["share_within"] == 1.0
    # Every byte is a token, and words have their length: about as many as asked for.
    assert 70 < only["prompt_tokens_mean"] < 230
    # Four characters a piece.
    assert only["time_per_token_ms_p50"]["mean"] < only["itl_ms_p50"]["mean"]
    assert report["server_metrics"]["compiles_after_ready_total"] == 0
