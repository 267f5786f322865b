"""How near the limit a server says it comes, from records of calls."""

import dataclasses

import jax
import pytest

from model.transformer import Definition
from perf.chips import Bandwidth
from perf.meter import ImplausibleMeasurement
from perf.traffic import Traffic
from serving.executor import CallRecord
from serving.metrics import Metrics
from serving.runner import Cell
from serving.utilization import UtilizationMeter
from tests.model.tiny import dense

MODEL = dense()
LENGTHS = (9, 17, 33)


def round_bytes(live: tuple[bool, ...] = (True,) * 3) -> int:
    traffic = Traffic(MODEL, weight_bytes=4, cache_bytes=4)
    return traffic.weights() + traffic.cache([n - 1 for n, alive in zip(LENGTHS, live, strict=True) if alive])


def a_round(seconds: float, live: tuple[bool, ...] = (True,) * 3, drafts: int = 0) -> CallRecord:
    return CallRecord(
        Cell(4, 64, 0), 3, int(any(live)), seconds, drafts, LENGTHS, live, (), 3, 3, 0, (0,) * 3, (0,) * 3
    )


def a_prefill(seconds: float) -> CallRecord:
    return CallRecord(Cell(1, 64, None), 1, 0, seconds, 0, (8,), (True,), ((0, 8),), 1, 1, 0, (0,), (0,))


@pytest.fixture
def meter() -> UtilizationMeter:
    """On a device that moves the bytes of a round in 4 ms."""
    meter = UtilizationMeter(Definition(MODEL, False, "float32"), "float32", "float32", jax.devices()[:1], Metrics())
    meter.bandwidth = Bandwidth(round_bytes() / 4e-3, "a test")
    return meter


def shown(meter: UtilizationMeter) -> float:
    return meter._metrics.registry.get_sample_value("decode_mbu")


def test_what_a_late_host_takes_for_short_calls_evens_out(meter):
    """Every second call seems to take 3 ms: less than its bytes need."""
    for _ in range(40):
        meter.observe([a_round(0.007)])
        meter.observe([a_round(0.003)])
    assert shown(meter) == pytest.approx(0.8, rel=0.05)
    assert meter.totals.decode_rounds == 80 and meter.totals.decode_bytes == 80 * round_bytes()


def test_a_pace_above_the_limit_is_an_error(meter):
    with pytest.raises(ImplausibleMeasurement, match="above 1"):
        for _ in range(200):
            meter.observe([a_round(0.003)])


def test_rows_that_took_no_part_and_rounds_that_did_not_run_move_nothing(meter):
    meter.observe([a_round(0.005, (True, False, True))])
    meter.observe([a_round(0.005, (False,) * 3)])
    assert (meter.totals.decode_bytes, meter.totals.decode_rounds) == (round_bytes((True, False, True)), 1)


def test_steps_of_two_kinds_and_drafts_are_not_timed(meter):
    for _ in range(100):
        meter.observe([a_prefill(0.001), a_round(0.001)])
        meter.observe([a_round(0.001, drafts=2)])
    assert shown(meter) == 0
    assert meter.totals.decode_rounds == 100 and meter.totals.prefill_flops > 0


def test_what_stays_in_the_chips_caches_has_no_share_of_the_memory(meter):
    """However many rounds are timed together."""
    meter.bandwidth = dataclasses.replace(meter.bandwidth, cache_bytes=2 * round_bytes())
    for _ in range(40):
        meter.observe([a_round(0.007)] * 4)
    assert shown(meter) == 0
