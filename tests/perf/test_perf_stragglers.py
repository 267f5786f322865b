"""Who a synchronous run waits for: simulated hosts with noise of every kind, and the command on a run's folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from perf import straggler_traces
from perf.breakdown import CATEGORIES, Breakdown, DeviceTime
from perf.command import main
from perf.host_steps import FILE_NAME, HostSteps, from_json, from_rows, join, read_hosts, to_json
from perf.straggler_traces import TracedDevice, TracedRun, compute_ratios, read_window
from perf.stragglers import (
    STEPS_BETWEEN_ALARMS,
    StragglerJudge,
    alarm_limit,
    behind,
    evidence,
    hits,
    num_last,
    peer_median,
    steps_to_alarm,
)

STEP = 0.3
NOISES = {
    "normal": lambda draw, shape: np.abs(draw.standard_normal(shape)),
    "student": lambda draw, shape: np.abs(draw.standard_t(2, shape)),
    "cauchy": lambda draw, shape: np.minimum(np.abs(draw.standard_cauchy(shape)), 1e4),
}


def simulate(
    hosts: int,
    steps: int,
    *,
    seed: int = 0,
    noise: str = "normal",
    spread: float = 0.02,
    slow: int | None = None,
    amount: float = 0.1,
    since: int = 0,
    signal: str = "barrier",
) -> HostSteps:
    """Hosts that arrive at a barrier when their work is done, and leave it together.

    `spread`: noise of a host's work, as a share of a step. `slow`: a host whose own time (or probe) is longer by
    `amount`, of a step (or of itself), from step `since` + 1 on.
    """
    draw = np.random.default_rng(seed)
    shape = (hosts, steps)
    own = STEP * (0.9 + spread * NOISES[noise](draw, shape))
    probe = 1e-3 * (1 + spread * NOISES[noise](draw, shape))
    if slow is not None and signal == "barrier":
        own[slow, since:] += amount * STEP
    elif slow is not None:
        probe[slow, since:] *= 1 + amount
    barrier = own.max(axis=0) - own + 2e-4
    result = np.full(shape, 1e-5)
    return HostSteps(tuple(range(1, steps + 1)), own + barrier + result, own / 2, result, barrier, probe)


def told(data: HostSteps, every: int = 5) -> list:
    """What a run hears that exchanges `every` so many steps."""
    judge, found = StragglerJudge(data.num_hosts), []
    for begin in range(0, len(data.steps), every):
        found += judge.update(data.select(np.arange(begin, min(begin + every, len(data.steps)))))
    return found


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("hosts", [2, 8, 64])
def test_clean_steps_raise_no_alarm(noise, hosts):
    for seed in range(25):
        # The spread is such that single steps are far above the threshold.
        assert told(simulate(hosts, 200, seed=seed, noise=noise, spread=0.1)) == []


@pytest.mark.parametrize("signal", ["barrier", "probe"])
def test_one_of_eight_that_is_a_tenth_slower_is_named_within_twenty_steps(signal):
    for seed in range(40):
        slow = seed % 8
        found = told(simulate(8, 80, seed=seed, slow=slow, since=40, signal=signal))
        assert [(one.host, one.signal) for one in found] == [(slow, signal)], seed
        # Told with the exchange that ends the steps it was named at.
        assert found[0].named_step <= 60 - 5
        assert abs(found[0].first_step - 41) <= 3
        assert found[0].behind == pytest.approx(0.1, abs=0.03)


def test_heavy_tails_hide_a_straggler_for_longer_and_accuse_nobody_else():
    found = [told(simulate(8, 140, seed=seed, noise="student", slow=3, since=40)) for seed in range(40)]
    assert {one.host for of_run in found for one in of_run} == {3}
    assert sum(len(of_run) == 1 for of_run in found) >= 38


def test_among_many_hosts_with_heavy_tails_it_need_not_be_the_last():
    for seed in range(10):
        found = told(simulate(64, 80, seed=seed, noise="student", spread=0.03, slow=9, since=40))
        assert [one.host for one in found] == [9] and found[0].named_step <= 60


@pytest.mark.parametrize("hosts", [2, 3, 16, 64])
def test_a_straggler_is_named_among_any_number_of_hosts(hosts):
    needed = steps_to_alarm(hosts)
    found = told(simulate(hosts, 4 * needed, slow=hosts - 1, spread=0.005))
    assert [one.host for one in found] == [hosts - 1]
    assert found[0].named_step == needed


def test_who_is_last_by_less_than_the_threshold_is_not_named():
    assert told(simulate(8, 400, slow=2, amount=0.03, spread=0.001)) == []


@pytest.mark.parametrize(("wait", "named"), [(0.3, []), (0.11, []), (0.03, [5])])
def test_who_is_late_in_time_for_its_devices_is_not_named(wait, named):
    # It is the last at the barrier, by a tenth of a step, and then still waits for its devices.
    data = simulate(8, 200, slow=5, spread=0.001)
    data.result[5] = wait * STEP
    assert [one.host for one in told(data)] == named


def test_a_host_is_named_once_and_again_after_it_was_well():
    sick, well = simulate(8, 120, slow=1), simulate(8, 40, seed=1)
    data = join([sick, well, sick])
    data = HostSteps(
        tuple(range(1, len(data.steps) + 1)), data.seconds, data.input, data.result, data.barrier, data.probe
    )
    found = told(data)
    assert [one.host for one in found] == [1, 1]
    assert found[0].named_step < 20 and 160 < found[1].named_step < 180


def test_two_stragglers_are_both_named():
    data = simulate(8, 400, slow=1)
    data.barrier[6] = data.barrier[1] + 1e-3 * np.random.default_rng(0).standard_normal(400)
    assert {one.host for one in told(data)} == {1, 6}


@pytest.mark.parametrize(("part", "words"), [("input", "input"), ("host", "Python")])
def test_what_takes_it_longer_is_said(part, words):
    data = simulate(8, 60, slow=4)
    data.input[:] = 0.01
    if part != "host":
        getattr(data, part)[4] += 0.1 * STEP
    found = told(data)
    assert words in found[0].sentence() and "host 4" in found[0].sentence()
    busy = np.median(data.busy, axis=1)
    assert found[0].ratio == pytest.approx(busy[4] / np.median(np.delete(busy, 4)), rel=0.1)


def test_steps_without_a_probe_are_passed_over():
    data = simulate(8, 240, slow=2, signal="probe", spread=0.005)
    data.probe[:, np.arange(240) % 4 != 0] = np.nan
    # Of one host alone it says nothing.
    data.probe[3, :100] = np.nan
    found = told(data)
    assert [(one.host, one.signal) for one in found] == [(2, "probe")]
    assert 100 <= found[0].named_step <= 100 + 4 * steps_to_alarm(8)


def test_one_host_has_no_peers():
    with pytest.raises(ValueError, match="num_hosts=1"):
        StragglerJudge(1)


@pytest.mark.parametrize("hosts", [2, 3, 8, 9, 64, 100])
def test_the_evidence_is_a_likelihood_ratio_and_the_limit_keeps_its_promise(hosts):
    gain, loss = evidence(hosts)
    chance = num_last(hosts) / hosts
    # Under equal hosts its mean is 1: the condition of Ville's inequality.
    assert chance * np.exp(gain) + (1 - chance) * np.exp(loss) == pytest.approx(1)
    assert 2 * hosts * np.exp(-alarm_limit(hosts)) * STEPS_BETWEEN_ALARMS == pytest.approx(1)


@pytest.mark.parametrize("hosts", [2, 3, 8, 20])
def test_the_median_of_the_others(hosts):
    values = np.random.default_rng(hosts).integers(0, 6, (hosts, 50)).astype(float)
    expected = [np.median(np.delete(values, host, axis=0), axis=0) for host in range(hosts)]
    np.testing.assert_allclose(peer_median(values), expected)


@pytest.mark.parametrize("hosts", [2, 8, 20])
def test_no_more_hosts_are_hit_than_may_be(hosts):
    data = simulate(hosts, 300, noise="cauchy", spread=0.3)
    counts = hits(data, "barrier").sum(axis=0)
    assert counts.max() == num_last(hosts)
    equal = simulate(hosts, 5, spread=0)
    equal.barrier[:], equal.result[:] = 1e-3, 0
    assert hits(equal, "barrier", threshold=0).sum() == 0
    assert (behind(equal, "barrier") == 0).all()


# The file of a run.


def test_a_line_gives_back_what_was_measured(tmp_path: Path):
    data = simulate(3, 7)
    data.probe[:, 2] = np.nan
    again = from_json(json.loads(json.dumps(to_json(data))))
    assert again.steps == data.steps
    for name in ("seconds", "input", "result", "barrier", "probe"):
        np.testing.assert_allclose(getattr(again, name), getattr(data, name), atol=6e-7)
    rows = [[{"seconds": 1.0, "input": 0.1, "result": 0.5, "barrier": 0.2, "probe": None}]]
    assert from_rows([4], rows).host[0, 0] == pytest.approx(0.2)


def write_run(folder: Path, attempts: list[HostSteps], seconds: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    with (folder / FILE_NAME).open("w") as file:
        for number, data in enumerate(attempts, 1):
            for begin in range(0, len(data.steps), 5):
                part = data.select(np.arange(begin, begin + 5))
                file.write(json.dumps({"attempt": number, "time": 0.0, **to_json(part)}) + "\n")
            file.write('{"attempt": 1, "ste\n')
    records = [
        {"event": "train", "step": step, "attempt": 1, "step_seconds": value} for step, value in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_command_names_the_host_and_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seconds = STEP + 0.002 * np.random.default_rng(0).standard_normal(120)
    seconds[60:] *= 1.1
    run = write_run(tmp_path / "run", [simulate(8, 40), simulate(8, 120, slow=5, since=60)], seconds)
    assert [len(attempt.steps) for attempt in read_hosts(run / FILE_NAME)] == [40, 120]
    page, record = tmp_path / "page.html", tmp_path / "record.json"
    assert main(["stragglers", str(run), "--html", str(page), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    assert "straggler: host 5; the others wait for it 10" in out and "since step 61" in out
    found = json.loads(record.read_text())
    assert [one["host"] for one in found["stragglers"]] == [5]
    assert found["hosts"][5]["barrier_seconds"] == min(one["barrier_seconds"] for one in found["hosts"])
    assert [one["step"] for one in found["step_time_changes"]] == [pytest.approx(61, abs=3)]
    assert found["trace"] is None and "--profile" in found["trace_reason"]
    assert page.read_text().count("<svg") == 2


def test_a_clean_run_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seconds = STEP + 0.002 * np.random.default_rng(0).standard_normal(200)
    assert main(["stragglers", str(write_run(tmp_path / "run", [simulate(8, 200)], seconds)), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stragglers"] == [] and found["step_time_changes"] == [] and len(found["hosts"]) == 8


def test_what_is_no_run_is_an_error_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "good", [simulate(2, 10)], np.full(10, STEP))
    assert main(["stragglers", str(tmp_path)]) == 2
    assert f"runs inside {tmp_path}: good" in capsys.readouterr().err
    assert main(["stragglers", "good", "--runs-dir", str(tmp_path)]) == 0
    (tmp_path / "good" / FILE_NAME).write_text("nothing\n")
    assert main(["stragglers", str(tmp_path / "good")]) == 0
    assert "not judged" in capsys.readouterr().out


def test_in_a_trace_the_slow_device_computes_longest_and_waits_least():
    devices = tuple(TracedDevice(host, 0, 0.2, 0.1, 0.3) for host in range(8))
    slow = TracedDevice(8, 0, 0.22, 0.08, 0.3)
    run = TracedRun("steps-4-6", (*devices, slow), compute_ratios((*devices, slow)))
    assert run.culprit == 8 and run.ratios[8] == pytest.approx(1.1)
    # More work is not slowness where the others do not wait for it.
    patient = TracedDevice(8, 0, 0.22, 0.11, 0.33)
    assert TracedRun("steps-4-6", (*devices, patient), compute_ratios((*devices, patient))).culprit is None


def traced_process(matmul: int, collective: int) -> Breakdown:
    """Two steps of one device that is number 2048 of its host, of 300 ms."""
    spent = {**dict.fromkeys(CATEGORIES, 0), "matmul": 2 * matmul, "collective": 2 * collective, "launch": 20_000_000}
    spent["host"] = 600_000_000 - sum(spent.values())
    device = DeviceTime(
        ordinal=2048,
        steps=2,
        window=(0, 600_000_000),
        nanoseconds=spent,
        periods=(),
        collective=2 * collective,
        hidden=0,
        lengths=(),
        ops=(),
        instances={},
    )
    return Breakdown("gpu", "jit_step", (device,), (), None, {}, True, True)


def test_the_newest_window_is_read_of_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = {0: (200, 80), 1: (200, 82), 2: (225, 55)}
    traces = {
        tmp_path / f"steps-4-6-process-{host}": traced_process(compute * 10**6, wait * 10**6)
        for host, (compute, wait) in times.items()
    }
    (tmp_path / "steps-2-3").mkdir()
    for folder in traces:
        folder.mkdir()
    monkeypatch.setattr(straggler_traces, "find_trace", lambda folder: folder)
    monkeypatch.setattr(straggler_traces, "read_trace", lambda folder: folder)
    monkeypatch.setattr(straggler_traces, "breakdown", traces.__getitem__)
    found = read_window(tmp_path)
    assert found.window == "steps-4-6" and found.culprit == 2
    assert [(one.host, one.device, one.compute, one.collectives, one.step) for one in found.devices] == [
        (host, 0, pytest.approx((compute + 10) / 1e3), pytest.approx(wait / 1e3), pytest.approx(0.3))
        for host, (compute, wait) in times.items()
    ]
    assert found.ratios[2] == pytest.approx(235 / 210)
    assert read_window(tmp_path / "nothing") is None
