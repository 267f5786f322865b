"""Step meter: rates by hand, warm-up, windows, implausible values, unknown chips."""

import json

import pytest

from model.config import ModelConfig
from perf import flops
from perf.chips import Peak
from perf.meter import ImplausibleMeasurement, StepMeter

CONFIG = ModelConfig(
    vocab_size=50, embed_dim=12, mlp_dim=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64
)
BOOK = flops.ledger(CONFIG, sequence_length=16, batch_size=4, remat="full")


def peak(value):
    return Peak(value, "bfloat16", "a datasheet")


def meter(share=0.5, seconds=2.0, num_devices=8, **settings):
    """A meter on which steps of `seconds` have hfu = `share`."""
    value = BOOK.hardware_flops / seconds / num_devices / share
    return StepMeter(BOOK, num_devices=num_devices, peak=peak(value), **settings)


def test_rates_by_hand():
    one = meter(warmup_steps=1, window=4)
    records = [one.record(seconds) for seconds in (50.0, 1.0, 3.0, 2.5, 1.5)]
    last = records[-1]
    # The four measured steps took 8 s, two each: hfu is 0.5 as built.
    assert last["tokens_per_second"] == pytest.approx(4 * 64 / 8)
    assert last["tokens_per_second_per_device"] == pytest.approx(4 * 64 / 8 / 8)
    assert last["hfu"] == pytest.approx(0.5)
    assert last["mfu"] == pytest.approx(0.5 * BOOK.model_flops / BOOK.hardware_flops)
    assert last["mfu_palm"] == pytest.approx(0.5 * BOOK.palm_flops / BOOK.hardware_flops)
    assert last["step_seconds"] == 1.5 and last["tokens"] == 64
    assert not any(key.endswith("_reason") for key in last)

    summary = one.summary()
    assert summary["measured_steps"] == 4
    assert summary["step_seconds_median"] == summary["step_seconds_p50"] == 2.0
    assert summary["step_seconds_p90"] == pytest.approx(2.85)
    assert summary["hfu"] == pytest.approx(0.5) and summary["num_devices"] == 8
    json.dumps(summary)


def test_a_value_can_be_recomputed_from_its_record():
    one = meter(warmup_steps=0)
    steps = [one.record(2.0) for _ in range(5)]
    for record, count in ((steps[-1], 5), (one.summary(), 5), (steps[-2], 4)):
        for name, numerator in (("mfu", BOOK.model_flops), ("mfu_palm", BOOK.palm_flops), ("hfu", BOOK.hardware_flops)):
            assert record[f"{name}_numerator_flops"] == count * numerator
            denominator = record["measured_seconds"] * record["num_devices"] * record["peak_flops_per_device"]
            assert record[name] == pytest.approx(record[f"{name}_numerator_flops"] / denominator)
            per_device = record[f"{name}_flops_per_second_per_device"]
            assert record[name] == pytest.approx(per_device / record["peak_flops_per_device"])
        assert record["peak_dtype"] == "bfloat16" and record["peak_source"] == "a datasheet"


def test_warm_up_and_interrupted_intervals_are_not_measured():
    one = meter(warmup_steps=2, window=4)
    for step in (1, 2):
        record = one.record(0.001)  # Would be far above 1.
        assert record["mfu"] is None and f"step {step} of 2" in record["mfu_reason"]
        assert record["tokens_per_second"] is None and "warm-up" in record["tokens_per_second_reason"]
    assert one.summary()["mfu"] is None and "no step was measured: 2 ran" in one.summary()["mfu_reason"]
    assert one.summary()["step_seconds_median"] is None
    for _ in range(3):
        assert "needs 4 measured steps" in one.record(2.0)["hfu_reason"]
    assert one.record(2.0)["hfu"] == pytest.approx(0.5)
    assert "something other than steps" in one.record(0.001, measured=False)["hfu_reason"]
    # The run of steps starts again after the interruption.
    assert "has 1" in one.record(2.0)["hfu_reason"]
    assert one.summary()["measured_steps"] == 5


def test_one_late_reading_is_not_implausible():
    one = meter(share=0.6, warmup_steps=0)
    for _ in range(6):
        one.record(2.0)
    one.record(3.9)
    record = one.record(0.1)  # Alone it would be 12 times the peak.
    assert record["hfu"] == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["mfu", "hfu"])
def test_above_one_raises_with_everything_needed_to_find_out_why(name):
    book = BOOK if name == "hfu" else flops.ledger(CONFIG, sequence_length=16, batch_size=4)
    one = StepMeter(book, num_devices=2, peak=peak(0.9 * book.hardware_flops / 2), warmup_steps=0)
    for _ in range(3):
        one.record(1.0)
    with pytest.raises(ImplausibleMeasurement, match=r"=1\.111 is above 1: .* 2 devices of .*a datasheet"):
        one.record(1.0)
    with pytest.raises(ImplausibleMeasurement):
        one.summary()
    assert issubclass(ImplausibleMeasurement, ValueError)


def test_palm_above_one_is_null_when_it_counts_more_than_was_executed():
    config = ModelConfig(vocab_size=50, embed_dim=12, mlp_dim=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6)
    book = flops.ledger(config, sequence_length=4096)
    assert book.palm_flops > 1.5 * book.hardware_flops
    one = StepMeter(book, num_devices=1, peak=peak(book.hardware_flops / 0.8), warmup_steps=0, window=1)
    record = one.record(1.0)
    assert record["mfu"] == pytest.approx(0.8)
    assert record["mfu_palm"] is None and "not a utilisation" in record["mfu_palm_reason"]


def test_unknown_chip_gives_rates_and_null_utilisation_with_the_reason():
    unknown = Peak(None, "bfloat16", None, "no peak is known for device kind 'Abacus'")
    one = StepMeter(BOOK, num_devices=1, peak=unknown, warmup_steps=0, window=1)
    for record in (one.record(2.0), one.summary()):
        assert record["tokens_per_second"] == 32
        for name in ("mfu", "mfu_palm", "hfu"):
            assert record[name] is None and "Abacus" in record[f"{name}_reason"]
    assert one.summary()["peak_flops_per_device"] is None and "Abacus" in one.summary()["peak_reason"]
    # What was achieved is known without a peak.
    assert one.summary()["mfu_flops_per_second_per_device"] == BOOK.model_flops / 2


def test_padding_and_documents_change_the_numerators():
    one = meter(warmup_steps=0, window=1)
    full, padded, packed = one.record(2.0), one.record(2.0, tokens=48), one.record(2.0, documents=[16, 16, 8, 8])
    assert padded["tokens"] == packed["tokens"] == 48
    assert padded["mfu"] == pytest.approx(0.75 * full["mfu"])
    assert padded["hfu"] == pytest.approx(full["hfu"])
    # Two documents of 8 have fewer pairs than one of 16.
    assert packed["mfu"] < padded["mfu"]
    book = BOOK.for_documents([16, 16, 8, 8])
    assert packed["mfu"] == pytest.approx(full["mfu"] * book.model_flops / BOOK.model_flops)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(seconds):
    with pytest.raises(ValueError, match="above 0"):
        meter().record(seconds)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="num_devices=0"):
        StepMeter(BOOK, num_devices=0, peak=peak(1.0))
    with pytest.raises(ValueError, match="tokens=0"):
        meter().record(1.0, tokens=0)
