"""Load on a running OpenAI-compatible server, at rising rates: `python -m benchmarks.serving --url URL --rates 1,2,4`.

Requests arrive as a Poisson process and are sent when they are due, however late the server is (an open loop): a queue
that grows is seen. Each rate runs `repeats` times with seeds of its own. Arrivals of the first `warmup_seconds` load
the server and are not measured; those after them are, to their end, also when it comes after the last arrival.

Per request: TTFT is from the send (connecting included) to the first text; a gap is the time between two pieces of
text, which may hold several tokens; time per token is from the first piece to the last over the tokens but one.
A request meets the objective if it ended well, TTFT <= `ttft_ms` and its time per token <= `itl_ms`. Goodput is the
requests that arrived in the measured time and met the objective, per second of it. The knee is the highest rate at
which `knee_share` of the requests met it; a refused (429) or failed request did not. Refused ones are not sent again.

The last line of stdout is one JSON object; a table goes to stderr, every request to `--output`.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import rich.console
import rich.table
import tyro
from prometheus_client.parser import text_string_to_metric_families
from tyro.constructors import PrimitiveConstructorSpec

from benchmarks.streaming import CONNECTION_ERRORS, EventParser, ProtocolError, Target, request


def _comma_separated(kind: type) -> PrimitiveConstructorSpec:
    """How the command line spells a tuple: 1,2,4."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()},...",
        instance_from_str=lambda texts: tuple(kind(part) for part in texts[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(each, kind) for each in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


# Short words that most tokenizers have as one token each.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face level office door health person art war history
party result change morning reason research girl guy moment air teacher force education
"""

# Quantiles 0.975 of Student's t for 1, 2, ... degrees of freedom (any statistics table).
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# A client this late at sending is at its own limit, and the server may not be.
LATE_SEND_MS = 50.0

SERVER_METRICS = (
    "decode_mbu",
    "prefill_mfu",
    "compiles_after_ready_total",
    "preemptions_total",
    "acceptance_rate",
    "running",
    "waiting",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    url: str = "http://127.0.0.1:8000"
    """The server, without /v1."""
    rates: Annotated[tuple[float, ...], _comma_separated(float)] = (0.5, 1.0, 2.0, 4.0)
    """Requests per second, rising."""
    requests: int | None = 100
    """Measured requests of each run; None to measure for `seconds`."""
    seconds: float = 60.0
    """Measured time of each run, where `requests` is None."""
    warmup_seconds: float = 5.0
    """Arrivals before the measured ones, in each run."""
    repeats: int = 3
    """Runs of each rate, with different arrivals and prompts."""
    seed: int = 0
    """Of the first run; the others follow it."""
    prompt_tokens: Annotated[tuple[int, ...], _comma_separated(int)] = (512,)
    """Lengths of prompts; each request takes one at random. Two requests before the runs measure tokens per word."""
    prompt_file: Path | None = None
    """Text whose pieces are the prompts; None for random words, which share no prefix."""
    max_tokens: int = 256
    """Tokens that each request asks for."""
    ignore_eos: bool = False
    """Ask for exactly `max_tokens`: a field that this project's server and vLLM have beyond OpenAI's."""
    temperature: float = 0.0
    """Sampling temperature."""
    endpoint: Literal["completions", "chat"] = "completions"
    """/v1/completions or /v1/chat/completions."""
    model: str = ""
    """Name of the model; empty for the first one of /v1/models."""
    ttft_ms: float = 1000.0
    """Objective: longest time to the first text."""
    itl_ms: float = 50.0
    """Objective: longest time per token, the mean of a request's tokens after the first piece."""
    knee_share: float = 0.9
    """Share of the requests that meets the objective up to the knee."""
    timeout: float = 300.0
    """Seconds after which a request has failed."""
    api_key_file: Path | None = None
    """File whose first line is sent as `Authorization: Bearer KEY`."""
    admin_key_file: Path | None = None
    """As `api_key_file`, for /metrics alone."""
    output: Path | None = None
    """JSON file for the report with every request."""

    def __post_init__(self) -> None:
        positive = ("requests", "seconds", "repeats", "max_tokens", "ttft_ms", "itl_ms", "timeout")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be above 0")
        if not self.rates or not all(math.isfinite(rate) and rate > 0 for rate in self.rates):
            raise ValueError(f"rates={self.rates} must be requests per second, each above 0")
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates={self.rates} must rise")
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise ValueError(f"prompt_tokens={self.prompt_tokens} must be lengths of at least 1")
        if self.repeats > len(T_975) + 1:
            raise ValueError(f"repeats={self.repeats} is above {len(T_975) + 1}, the largest with an interval")
        if self.warmup_seconds < 0 or not 0 < self.knee_share <= 1:
            raise ValueError(
                f"warmup_seconds={self.warmup_seconds} must be at least 0, and knee_share={self.knee_share} above 0 "
                "and at most 1"
            )


# Arrivals and prompts


def arrivals(rate: float, warmup: float, seconds: float, count: int | None, rng: random.Random) -> list[float]:
    """Times of a Poisson process from `-warmup` to `seconds`, rising; with `count`, given so many of them from 0 on.

    Given their number, the arrivals of a Poisson process are independent and uniform over the time.
    """
    times = []
    for begin, end, number in ((-warmup, 0.0, None), (0.0, seconds, count)):
        if number is not None:
            times += sorted(rng.uniform(begin, end) for _ in range(number))
            continue
        at = begin + rng.expovariate(rate)
        while at < end:
            times.append(at)
            at += rng.expovariate(rate)
    return times


class Prompts:
    """Prompts of about so many tokens, by a measured count of tokens per word."""

    def __init__(self, text: str | None) -> None:
        """`text`: prompts are runs of its words from a random one on, around its end; None for random words."""
        self._words = (WORDS if text is None else text).split()
        self._random = text is None
        self.overhead, self.tokens_per_word = 0.0, 1.0

    def words(self, count: int, rng: random.Random) -> str:
        if self._random:
            return " ".join(rng.choices(self._words, k=count))
        start = rng.randrange(len(self._words))
        return " ".join(self._words[(start + i) % len(self._words)] for i in range(count))

    def calibrate(self, measured: Sequence[tuple[int, int]]) -> None:
        """From (words, tokens) of a short and a long prompt."""
        (few, tokens_few), (many, tokens_many) = measured
        if tokens_many <= tokens_few:
            raise ValueError(f"prompts of {few} and {many} words have {tokens_few} and {tokens_many} tokens")
        self.tokens_per_word = (tokens_many - tokens_few) / (many - few)
        self.overhead = tokens_few - few * self.tokens_per_word

    def prompt(self, tokens: int, rng: random.Random) -> str:
        return self.words(max(1, round((tokens - self.overhead) / self.tokens_per_word)), rng)


# Requests


@dataclasses.dataclass
class Record:
    """One request. Times in seconds after the start of the measured time; `pieces` those of each piece of text."""

    due: float
    sent: float = math.nan
    end: float = math.nan
    pieces: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    tokens: int | None = None
    status: int | None = None
    outcome: Literal["ok", "refused", "error", "timeout"] = "error"
    error: str | None = None

    @property
    def measured(self) -> bool:
        return self.due >= 0

    @property
    def ttft(self) -> float:
        """An answer without any text has its end for its first text."""
        return (self.pieces[0] if self.pieces else self.end) - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.pieces)]

    @property
    def time_per_token(self) -> float | None:
        if self.tokens is None or self.tokens < 2 or len(self.pieces) < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)

    def meets(self, ttft: float, itl: float) -> bool:
        """Whether it ended well within the objective, in seconds."""
        return self.outcome == "ok" and self.ttft <= ttft and (self.time_per_token or 0.0) <= itl

    def raw(self) -> dict[str, Any]:
        ok = self.outcome == "ok"
        own = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return own | {"ttft": self.ttft if ok else None, "gaps": self.gaps}


class Client:
    """Sends requests to one server."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.target = settings, Target.parse(settings.url)
        self.model = settings.model
        self._headers = _bearer(settings.api_key_file, "api_key_file")
        self._metrics_headers = _bearer(settings.admin_key_file, "admin_key_file") or self._headers
        self._path = "/v1/completions" if settings.endpoint == "completions" else "/v1/chat/completions"

    def body(self, prompt: str, max_tokens: int, stream: bool = True) -> bytes:
        settings = self.settings
        fields: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": settings.temperature}
        if settings.endpoint == "completions":
            fields["prompt"] = prompt
        else:
            fields["messages"] = [{"role": "user", "content": prompt}]
        if settings.ignore_eos:
            fields["ignore_eos"] = True
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields).encode()

    async def get(self, path: str) -> bytes:
        """Body of a page. Raises ValueError if there is no server, or it answers other than 200."""
        return await self._whole("GET", path, self._metrics_headers if path == "/metrics" else self._headers, b"")

    async def prompt_tokens(self, prompt: str) -> int:
        body = self.body(prompt, max_tokens=1, stream=False)
        answer = await self._whole("POST", self._path, self._headers | {"Content-Type": "application/json"}, body)
        return json.loads(answer)["usage"]["prompt_tokens"]

    async def _whole(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        where = f"{method} {self.settings.url}{path}"
        try:
            async with asyncio.timeout(self.settings.timeout), request(self.target, method, path, headers, body) as got:
                text = b"".join([piece async for piece in got.pieces])
        except (*CONNECTION_ERRORS, ProtocolError) as error:
            raise ValueError(f"{where} failed: {error!r}; start a server there, or set url") from error
        if got.status != 200:
            raise ValueError(f"{where} answers {got.status}: {text[:300].decode(errors='replace')}")
        return text

    async def send(self, record: Record, body: bytes, start: float) -> None:
        """Sends a request now and fills its record; `start` is the loop's time that the record's times count from."""
        clock = asyncio.get_running_loop().time
        record.sent = clock() - start
        headers = self._headers | {"Content-Type": "application/json", "Accept": "text/event-stream"}
        try:
            async with (
                asyncio.timeout(self.settings.timeout),
                request(self.target, "POST", self._path, headers, body) as response,
            ):
                record.status = response.status
                if response.status == 200:
                    await _read_stream(response.pieces, record, lambda: clock() - start)
                else:
                    text = b"".join([piece async for piece in response.pieces])
                    record.error = text[:300].decode(errors="replace")
                    record.outcome = "refused" if response.status == 429 else "error"
        except TimeoutError:
            record.outcome, record.error = "timeout", f"no end after {self.settings.timeout} s"
        except (*CONNECTION_ERRORS, ProtocolError) as error:
            record.outcome, record.error = "error", repr(error)
        record.end = clock() - start


async def _read_stream(pieces, record: Record, now: Callable[[], float]) -> None:
    """Reads an answer to [DONE]. An answer is well only if it got there, and said how many tokens it has."""
    parser, done = EventParser(), False
    async for piece in pieces:
        at = now()
        for data in parser.feed(piece):
            if data == "[DONE]":
                done = True
            else:
                _read_event(data, record, at)
    if record.error is None and not done:
        record.error = "the stream ended without [DONE]"
    elif record.error is None and record.tokens is None:
        record.error = "the stream gave no usage: the server ignores stream_options.include_usage"
    record.outcome = "ok" if record.error is None else "error"


def _read_event(data: str, record: Record, at: float) -> None:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"an event is not JSON: {data[:100]!r}") from error
    if "error" in event:
        record.error = json.dumps(event["error"])[:300]
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        # Models that reason send their thoughts under a name of their own.
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            record.pieces.append(at)
            break
    if event.get("usage"):
        record.tokens = event["usage"]["completion_tokens"]
        record.prompt_tokens = event["usage"]["prompt_tokens"]


def _bearer(path: Path | None, setting: str) -> dict[str, str]:
    return {} if path is None else {"Authorization": f"Bearer {_read(path, setting).strip().splitlines()[0]}"}


def _read(path: Path, setting: str) -> str:
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{setting}={path} can't be read: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"{setting}={path} is empty")
    return text


# Runs


class Run(NamedTuple):
    """One run of one rate: measured seconds, every request, and the server's metrics as the arrivals ended."""

    rate: float
    seed: int
    seconds: float
    records: list[Record]
    metrics: dict[str, float | str | None]


async def run_rate(client: Client, prompts: Prompts, rate: float, seed: int) -> Run:
    settings = client.settings
    rng = random.Random(f"{seed} {rate}")
    seconds = settings.seconds if settings.requests is None else settings.requests / rate
    records = [Record(due) for due in arrivals(rate, settings.warmup_seconds, seconds, settings.requests, rng)]
    # Made before the first is due: making one takes time from the streams.
    lengths = [rng.choice(settings.prompt_tokens) for _ in records]
    bodies = [client.body(prompts.prompt(length, rng), settings.max_tokens) for length in lengths]
    clock = asyncio.get_running_loop().time
    start = clock() + settings.warmup_seconds
    tasks = []
    for record, body in zip(records, bodies, strict=True):
        await asyncio.sleep(start + record.due - clock())
        tasks.append(asyncio.create_task(client.send(record, body, start)))
    await asyncio.sleep(start + seconds - clock())
    metrics = await server_metrics(client)
    await asyncio.gather(*tasks)
    return Run(rate, seed, seconds, records, metrics)


async def server_metrics(client: Client) -> dict[str, float | str | None]:
    """Of /metrics, the ones of `SERVER_METRICS`; None for those it lacks (another server has names of its own), and
    `error` if it can't be had: the load goes on."""
    try:
        text = (await client.get("/metrics")).decode()
    except ValueError as error:
        return {**dict.fromkeys(SERVER_METRICS), "error": str(error)}
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in SERVER_METRICS
    }
    return {name: samples.get(name) for name in SERVER_METRICS}


# Statistics


def percentiles(values: Sequence[float], unit: float = 1e3) -> tuple[float | None, float | None]:
    """p50 and p99 (interpolated between neighbours) times `unit`, None of nothing."""
    if not values:
        return None, None
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return p50 * unit, p99 * unit


def describe(run: Run, ttft: float, itl: float) -> dict[str, float | None]:
    """Figures of one run. Rates are per second of the measured time; percentiles are of measured requests that ended
    well, `itl` of all their gaps together. `completed_rate` and tokens count what came within the measured time, of
    whatever request: the load before it stands for the load after it."""
    measured = [record for record in run.records if record.measured]
    ok = [record for record in measured if record.outcome == "ok"]
    well = [record for record in run.records if record.outcome == "ok"]
    meeting = sum(record.meets(ttft, itl) for record in measured)
    figures: dict[str, float | None] = {
        "offered_rate": len(measured) / run.seconds,
        "completed_rate": sum(0 <= record.end < run.seconds for record in well) / run.seconds,
        "output_tokens_per_second": sum(_tokens_within(record, run.seconds) for record in well) / run.seconds,
        "goodput": meeting / run.seconds,
        "share_within": meeting / len(measured) if measured else None,
    }
    for name, values in (
        ("ttft_ms", [record.ttft for record in ok]),
        ("itl_ms", [gap for record in ok for gap in record.gaps]),
        ("time_per_token_ms", [t for record in ok if (t := record.time_per_token) is not None]),
        ("e2e_ms", [record.end - record.sent for record in ok]),
        # The client's own lateness: its other times are late by as much.
        ("late_send_ms", [record.sent - record.due for record in measured]),
    ):
        figures[f"{name}_p50"], figures[f"{name}_p99"] = percentiles(values)
    return figures


def _tokens_within(record: Record, seconds: float) -> float:
    """Tokens that came in [0, seconds): the pieces of an answer hold equal shares of its tokens."""
    if not record.pieces or not record.tokens:
        return 0.0
    inside = bisect.bisect_left(record.pieces, seconds) - bisect.bisect_left(record.pieces, 0.0)
    return record.tokens * inside / len(record.pieces)


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over the repeats that have a value, and its 95% interval by Student's t; no interval of fewer than two."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    low = high = None
    if mean is not None and len(known) > 1:
        half = T_975[len(known) - 2] * statistics.stdev(known) / math.sqrt(len(known))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "repeats": list(values)}


def summarise(runs: Sequence[Run], ttft: float, itl: float) -> dict[str, Any]:
    """All repeats of one rate."""
    described = [describe(run, ttft, itl) for run in runs]
    measured = [record for run in runs for record in run.records if record.measured]
    outcomes = Counter(record.outcome for record in measured)
    lengths = [record.prompt_tokens for record in measured if record.prompt_tokens is not None]
    answers = [record.tokens for record in measured if record.tokens is not None]
    return {
        "rate": runs[0].rate,
        "measured_seconds": [run.seconds for run in runs],
        "requests": len(measured),
        **{outcome: outcomes[outcome] for outcome in ("ok", "refused", "error", "timeout")},
        "errors": [text for text, _ in Counter(r.error for r in measured if r.outcome == "error").most_common(3)],
        "share_within": sum(record.meets(ttft, itl) for record in measured) / len(measured) if measured else None,
        "prompt_tokens_mean": statistics.fmean(lengths) if lengths else None,
        "completion_tokens_mean": statistics.fmean(answers) if answers else None,
        **{name: interval([figures[name] for figures in described]) for name in described[0] if name != "share_within"},
        "server_metrics": [run.metrics for run in runs],
    }


def knee(rates: Sequence[dict[str, Any]], share: float) -> float | None:
    """The highest rate at which so large a share of the requests met the objective; None if there is none."""
    return max((each["rate"] for each in rates if (each["share_within"] or 0.0) >= share), default=None)


# Report


def table(rates: Sequence[dict[str, Any]], settings: Settings) -> rich.table.Table:
    title = (
        f"Objective: TTFT <= {settings.ttft_ms:g} ms, time per token <= {settings.itl_ms:g} ms. "
        "Times in ms, p50 / p99, means over the repeats; goodput with half of its 95% interval"
    )
    shown = rich.table.Table(title=title)
    counts = ("rate", "requests", "429", "failed")
    for heading in (*counts, "done/s", "tokens/s", "TTFT", "ITL", "per token", "e2e", "goodput/s", "within"):
        shown.add_column(heading, justify="right")
    for each in rates:
        numbers = (each["rate"], each["requests"], each["refused"], each["error"] + each["timeout"])
        share = "-" if each["share_within"] is None else f"{each['share_within']:.1%}"
        shown.add_row(
            *(f"{number:g}" for number in numbers),
            *(_number(each[name]["mean"]) for name in ("completed_rate", "output_tokens_per_second")),
            *(_pair(each, name) for name in ("ttft_ms", "itl_ms", "time_per_token_ms", "e2e_ms")),
            _with_interval(each["goodput"]),
            share,
        )
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _pair(each: dict[str, Any], name: str) -> str:
    return " / ".join(_number(each[f"{name}_{which}"]["mean"]) for which in ("p50", "p99"))


def _with_interval(figure: dict[str, Any]) -> str:
    half = "" if figure["high"] is None else f" ± {figure['high'] - figure['mean']:.2g}"
    return _number(figure["mean"]) + half


async def measure(settings: Settings) -> dict[str, Any]:
    """The whole report, with every request under `raw`. Raises ValueError if the server does not answer."""
    client = Client(settings)
    prompts = Prompts(None if settings.prompt_file is None else _read(settings.prompt_file, "prompt_file"))
    models = json.loads(await client.get("/v1/models"))["data"]
    client.model = client.model or models[0]["id"]
    rng = random.Random(settings.seed)
    counts = (8, 8 + max(8, min(settings.prompt_tokens) // 2))
    prompts.calibrate([(n, await client.prompt_tokens(prompts.words(n, rng))) for n in counts])
    ttft, itl = settings.ttft_ms / 1e3, settings.itl_ms / 1e3
    # A log file has no width: the table needs about 130 columns.
    console = rich.console.Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    rates: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "benchmark": "serving",
        "date": datetime.date.today().isoformat(),
        "settings": {name: _plain(value) for name, value in dataclasses.asdict(settings).items()},
        "client": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
        "server": {"models": models, "model": client.model},
        "tokens_per_word": prompts.tokens_per_word,
        "rates": rates,
    }
    for rate in settings.rates:
        runs = [await run_rate(client, prompts, rate, settings.seed + i) for i in range(settings.repeats)]
        rates.append(summarise(runs, ttft, itl))
        raw += [{"rate": rate, "seed": run.seed, "requests": [r.raw() for r in run.records]} for run in runs]
        report["knee"] = knee(rates, settings.knee_share)
        if settings.output is not None:
            settings.output.write_text(json.dumps(report | {"raw": raw}) + "\n")
        done = rates[-1]
        console.print(f"rate {rate:g}: {done['ok']} of {done['requests']} ended well", highlight=False)
        if (late := done["late_send_ms_p99"]["mean"] or 0.0) > LATE_SEND_MS:
            console.print(
                f"this client sent late (p99 {late:.0f} ms): its own limit shows in these figures", style="red"
            )
    report["server_metrics"] = await server_metrics(client)
    if settings.output is not None:
        settings.output.write_text(json.dumps(report | {"raw": raw}) + "\n")
    console.print(table(rates, settings))
    return report


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        settings = tyro.cli(Settings, prog="python -m benchmarks.serving", description=__doc__, args=arguments)
        report = asyncio.run(measure(settings))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
