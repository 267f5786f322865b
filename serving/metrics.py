"""What a server measures, in Prometheus's terms."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from serving.request import Usage

# Seconds. A decode step of a small model takes a millisecond, a long queue a minute.
STEP_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
WAIT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

PAGE_STATES = ("free", "cached", "live")


class WeightedHistogram:
    """A histogram that takes many equal observations at once, which prometheus_client's own does one by one.

    A decode call of 128 rows and 8 rounds is one gap observed 1,024 times: 1 µs here, 1.2 ms there (on the CPU that
    this was written on). Safe to use from several threads.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        label: str | None = None,
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._bounds = tuple(buckets)
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if label is None:
            self._series("")
        registry.register(self)

    def _series(self, label_value: str) -> list[int]:
        self._sums.setdefault(label_value, 0.0)
        return self._counts.setdefault(label_value, [0] * (len(self._bounds) + 1))

    def observe(self, value: float, count: int = 1, label_value: str = "") -> None:
        assert (self._label is None) == (label_value == ""), (self._name, label_value)
        with self._lock:
            self._series(label_value)[bisect.bisect_left(self._bounds, value)] += count
            self._sums[label_value] += value * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        labels = None if self._label is None else [self._label]
        family = HistogramMetricFamily(self._name, self._documentation, labels=labels)
        with self._lock:
            for label_value, counts in self._counts.items():
                total, buckets = 0, []
                for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
                    total += count
                    buckets.append((floatToGoString(bound), total))
                family.add_metric([label_value] if labels else [], buckets, self._sums[label_value])
        yield family


class Metrics:
    """Counters, gauges and histograms of one engine and its HTTP server, in a registry of their own.

    Every method may be called from any thread and costs microseconds.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests_and_tokens()
        self._batch_and_pages()
        self._speculation_and_hardware()

    def _requests_and_tokens(self) -> None:
        r = self.registry
        self._first_token = WeightedHistogram(
            "time_to_first_token_seconds", "Arrival to first token of a request", WAIT_BUCKETS, r
        )
        self._gap = WeightedHistogram("inter_token_latency_seconds", "Between tokens of a request", STEP_BUCKETS, r)
        self._total = WeightedHistogram("e2e_request_latency_seconds", "Arrival to last token", REQUEST_BUCKETS, r)
        self._queue = WeightedHistogram("queue_time_seconds", "Arrival to a row in the batch", WAIT_BUCKETS, r)
        self._requests = Counter("requests", "Requests ended, by why", ["outcome"], registry=r)
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", registry=r)
        self._generated_tokens = Counter("generation_tokens", "Tokens generated", registry=r)
        self._cached_tokens = Counter("cached_prompt_tokens", "Prompt tokens found in the prefix cache", registry=r)
        self._http = Counter("http_requests", "HTTP requests answered", ["route", "status"], registry=r)

    def _batch_and_pages(self) -> None:
        r = self.registry
        self._running = Gauge("running", "Sequences with a row in the batch", registry=r)
        self._waiting = Gauge("waiting", "Sequences in the queue", registry=r)
        self._preemptions = Counter("preemptions", "Sequences sent back to the queue for their pages", registry=r)
        self._batch_size = Gauge("batch_size", "Rows of the last step", registry=r)
        self._pages = Gauge("kv_pages", "Pages of keys and values, by state", ["state"], registry=r)
        self._steps = WeightedHistogram(
            "step_seconds", "Time of a step on the device, by kind", STEP_BUCKETS, r, label="kind"
        )

    def _speculation_and_hardware(self) -> None:
        r = self.registry
        self._drafted = Counter("draft_tokens", "Tokens that a draft proposed", registry=r)
        self._accepted = Counter("draft_accepted_tokens", "Proposed tokens that were accepted", registry=r)
        self._rounds = Counter("draft_rounds", "Verifications of one sequence's draft", registry=r)
        self._emitted = Counter("draft_emitted_tokens", "Tokens that verifications gave", registry=r)
        self._acceptance = Gauge("acceptance_rate", "Accepted over proposed tokens since the start", registry=r)
        self._round = Gauge("draft_tokens_per_round", "Tokens that a verification gave, since the start", registry=r)
        self._expected_round = Gauge(
            "draft_expected_tokens_per_round", "The same as the acceptance predicts: (1-p^(k+1))/(1-p)", registry=r
        )
        self._speculated = [0, 0]
        self._speculated_lock = threading.Lock()
        self._mbu = Gauge("decode_mbu", "Bytes a decode step must read over what the bandwidth allows", registry=r)
        self._mfu = Gauge("prefill_mfu", "FLOPs a prefill needs over what the chip's peak allows", registry=r)
        self._profiles = Counter("profiles", "Traces captured; the times of those seconds do not count", registry=r)
        self.profiled = False
        """Whether a trace was captured."""
        self._compiles = Counter("compiles_after_ready", "Compilations while serving; meant to stay 0", registry=r)

    def observe_step(self, kind: str, seconds: float, batch_size: int) -> None:
        """A step of a kind ("prefill", "decode", ...): its duration and the rows in it."""
        self._steps.observe(seconds, label_value=kind)
        self._batch_size.set(batch_size)

    def observe_queue(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def observe_profile(self) -> None:
        """A trace is captured from now on."""
        self._profiles.inc()
        self.profiled = True

    def observe_preemption(self, count: int = 1) -> None:
        self._preemptions.inc(count)

    def observe_pages(self, free: int, cached: int, live: int) -> None:
        for state, count in zip(PAGE_STATES, (free, cached, live), strict=True):
            self._pages.labels(state).set(count)

    def observe_request(self, usage: Usage, outcome: str) -> None:
        """A request that ended; `outcome` is its finish reason."""
        self._requests.labels(outcome).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._generated_tokens.inc(usage.completion_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._queue.observe(usage.queue_seconds)
        self._total.observe(usage.total_seconds)
        if usage.first_token_seconds is not None:
            self._first_token.observe(usage.first_token_seconds)

    def observe_token_gap(self, seconds: float, count: int = 1) -> None:
        """`count` tokens that each came `seconds` after the one before them in their sequence."""
        self._gap.observe(seconds, count)

    def observe_speculation(self, drafted: int, accepted: int, emitted: int, rounds: int) -> None:
        """Since the last call: tokens proposed, accepted and given out, and verifications (one a sequence)."""
        assert 0 <= accepted <= drafted and accepted <= emitted, (drafted, accepted, emitted)
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
        self._emitted.inc(emitted)
        self._rounds.inc(rounds)
        with self._speculated_lock:
            self._speculated[0] += drafted
            self._speculated[1] += accepted
            if self._speculated[0]:
                self._acceptance.set(self._speculated[1] / self._speculated[0])

    def set_tokens_per_round(self, observed: float, expected: float) -> None:
        """Of verifications since the start, beside what draft lengths and acceptance give by the formula."""
        self._round.set(observed)
        self._expected_round.set(expected)

    def set_mbu(self, utilisation: float) -> None:
        """Raises ValueError outside 0 to 1: bytes were counted that no step can have read."""
        self._mbu.set(_utilisation("decode_mbu", utilisation))

    def set_mfu(self, utilisation: float) -> None:
        """Raises ValueError outside 0 to 1: FLOPs were counted that no chip of this peak can have done."""
        self._mfu.set(_utilisation("prefill_mfu", utilisation))

    def observe_compile(self) -> None:
        self._compiles.inc()

    def observe_http(self, route: str, status: int) -> None:
        """`route` is one of the server's own, never a client's text: each value is a series for ever."""
        self._http.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus's text format 0.0.4."""
        return generate_latest(self.registry)


def _utilisation(name: str, value: float) -> float:
    # Also refuses NaN, for which no comparison holds.
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name}={value} must be between 0 and 1; the count of the step's work or the chip's peak in perf.chips "
            "is wrong"
        )
    return value
