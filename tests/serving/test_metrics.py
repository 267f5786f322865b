"""What the server measures, as Prometheus reads it."""

import math
import threading

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import STEP_BUCKETS, WAIT_BUCKETS, Metrics, WeightedHistogram
from serving.request import Usage


def samples(metrics: Metrics) -> dict[str, float]:
    """Value by name and labels, of what a scrape returns."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = "".join(f"{{{name}={value}}}" for name, value in sorted(sample.labels.items()))
            found[sample.name + labels] = sample.value
    return found


def test_every_series_is_there_from_the_start():
    found = samples(Metrics())
    for name in (
        "running",
        "waiting",
        "preemptions_total",
        "batch_size",
        "prompt_tokens_total",
        "generation_tokens_total",
        "cached_prompt_tokens_total",
        "draft_tokens_total",
        "draft_accepted_tokens_total",
        "draft_rounds_total",
        "draft_emitted_tokens_total",
        "acceptance_rate",
        "decode_mbu",
        "prefill_mfu",
        "compiles_after_ready_total",
        "profiles_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "queue_time_seconds_count",
    ):
        assert found[name] == 0, name


def test_requests():
    metrics = Metrics()
    metrics.observe_request(Usage(10, 5, 4, 0.1, 0.4, 2.5), "stop")
    metrics.observe_request(Usage(7, 0, 0, 3.0, None, 3.0), "cancelled")
    found = samples(metrics)
    assert found["requests_total{outcome=stop}"] == found["requests_total{outcome=cancelled}"] == 1
    assert (found["prompt_tokens_total"], found["generation_tokens_total"]) == (17, 5)
    assert found["cached_prompt_tokens_total"] == 4
    # A request that never got a token has no time to one.
    assert (found["time_to_first_token_seconds_count"], found["time_to_first_token_seconds_sum"]) == (1, 0.4)
    assert (found["queue_time_seconds_count"], found["queue_time_seconds_sum"]) == (2, 3.1)
    assert found["e2e_request_latency_seconds_sum"] == 5.5
    assert found["time_to_first_token_seconds_bucket{le=0.3}"] == 0
    assert found["time_to_first_token_seconds_bucket{le=0.5}"] == 1


def test_steps_batch_queue_and_pages():
    metrics = Metrics()
    metrics.observe_step("prefill", 0.05, 3)
    metrics.observe_step("decode", 0.004, 8)
    metrics.observe_queue(8, 2)
    metrics.observe_preemption()
    metrics.observe_pages(free=5, cached=3, live=2)
    metrics.observe_compile()
    found = samples(metrics)
    assert found["step_seconds_count{kind=prefill}"] == found["step_seconds_count{kind=decode}"] == 1
    assert found["step_seconds_bucket{kind=decode}{le=0.004}"] == 1
    assert found["step_seconds_bucket{kind=prefill}{le=0.004}"] == 0
    assert (found["batch_size"], found["running"], found["waiting"]) == (8, 8, 2)
    assert [found[f"kv_pages{{state={state}}}"] for state in ("free", "cached", "live")] == [5, 3, 2]
    assert found["preemptions_total"] == found["compiles_after_ready_total"] == 1


def test_speculation():
    metrics = Metrics()
    metrics.observe_speculation(drafted=0, accepted=0, emitted=0, rounds=0)
    metrics.observe_speculation(drafted=8, accepted=2, emitted=4, rounds=2)
    metrics.observe_speculation(drafted=2, accepted=1, emitted=2, rounds=1)
    found = samples(metrics)
    assert (found["draft_tokens_total"], found["draft_accepted_tokens_total"]) == (10, 3)
    assert (found["draft_emitted_tokens_total"], found["draft_rounds_total"]) == (6, 3)
    assert found["acceptance_rate"] == 0.3


@pytest.mark.parametrize("name", ["decode_mbu", "prefill_mfu"])
def test_a_utilisation_above_one_is_an_error(name: str):
    metrics = Metrics()
    observe = {"decode_mbu": metrics.set_mbu, "prefill_mfu": metrics.set_mfu}[name]
    observe(1.0)
    observe(0.75)
    for wrong in (1.0001, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=name):
            observe(wrong)
    assert samples(metrics)[name] == 0.75


def test_the_histogram_is_prometheus_own_with_weights():
    """Value by value the same text as prometheus_client's histogram, and n at once is n times one."""
    values = [0.0, 0.001, 0.0011, 0.004, 0.3, 7.0, 0.02, 0.02]
    ours, theirs = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    histogram = WeightedHistogram("h", "what", STEP_BUCKETS, ours)
    reference = prometheus_client.Histogram("h", "what", buckets=STEP_BUCKETS, registry=theirs)
    for value in values:
        histogram.observe(value, 3)
        for _ in range(3):
            reference.observe(value)

    def lines(registry: prometheus_client.CollectorRegistry) -> list[str]:
        text = prometheus_client.generate_latest(registry).decode()
        kept = sorted(line for line in text.splitlines() if "_created" not in line and "_sum" not in line)
        [total] = [line.split()[1] for line in text.splitlines() if line.startswith("h_sum")]
        return [*kept, f"{float(total):.9f}"]

    assert lines(ours) == lines(theirs)


def test_threads_lose_nothing():
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.observe_token_gap(0.01, 2)
            metrics.observe_http("/v1/models", 200)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics)
    assert found["inter_token_latency_seconds_count"] == 8000
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(80)
    assert found["http_requests_total{route=/v1/models}{status=200}"] == 4000


def test_two_engines_measure_apart():
    first, second = Metrics(), Metrics()
    first.observe_compile()
    assert samples(second)["compiles_after_ready_total"] == 0


def test_buckets_rise():
    for buckets in (STEP_BUCKETS, WAIT_BUCKETS):
        assert list(buckets) == sorted(set(buckets))
