"""The scaling tax: its interval, its split, and the command with runs that are made up."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import configs
from perf.breakdown import CATEGORIES, Breakdown, DeviceTime
from perf.chips import CHIPS
from perf.command import main
from perf.commands import scaling
from perf.scaling import (
    PARTS,
    REST,
    Repeat,
    Shares,
    Size,
    common_peak,
    geometric_mean,
    mfus,
    scaling_tax,
    shares_of,
    split,
)

PEAK = 989e12


def repeat_of(flops: float, *, mean: float = 0.3, median: float = 0.3, peak: float | None = PEAK, own: bool = False):
    reason = None if peak else "not known"
    return Repeat(flops, flops / 1e10, peak, "somewhere", reason, own, mean, median)


def size_of(devices: int, flops: list[float], shares: Shares | None = None, **settings) -> Size:
    repeats = tuple(repeat_of(one, **settings) for one in flops)
    return Size(devices, 8 * devices, repeats, shares, None if shares else "not profiled")


# The tax and its interval.


def test_the_tax_is_what_a_device_lost():
    tax = scaling_tax([0.5, 0.5, 0.5], [0.45, 0.45, 0.45])
    assert (tax.value, tax.low, tax.high) == (pytest.approx(0.1),) * 3
    assert scaling_tax([0.4], [0.5]).value == pytest.approx(-0.25)
    assert scaling_tax([0.4], [0.5, 0.5]).low is None and "two runs" in scaling_tax([0.4], [0.5]).reason


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (3, 6)])
def test_the_interval_holds_the_tax_as_often_as_it_says(counts):
    draw, held = np.random.default_rng(0), 0
    for _ in range(2000):
        base = 0.5 * np.exp(0.01 * draw.standard_normal(counts[0]))
        many = 0.46 * np.exp(0.02 * draw.standard_normal(counts[1]))
        tax = scaling_tax(base, many)
        held += tax.low <= 1 - 0.46 / 0.5 <= tax.high
    assert 0.93 <= held / 2000 <= 0.995


def test_a_mean_of_one_run_has_no_interval():
    assert geometric_mean([2.0, 8.0]).value == pytest.approx(4.0)
    one = geometric_mean([3.0])
    assert (one.value, one.low) == (pytest.approx(3.0), None) and "--repeats" in one.reason
    assert geometric_mean([2.0, 8.0]).low < 4 < geometric_mean([2.0, 8.0]).high


def test_a_peak_that_runs_measure_is_one_for_all_of_them():
    # Two virtual devices have half of the machine each: every run measured it a little differently.
    sizes = (
        size_of(1, [100e9, 100e9], peak=400e9, own=True),
        size_of(2, [45e9, 45e9], peak=220e9, own=True),
    )
    peak = common_peak(sizes)
    assert peak == pytest.approx(420e9)
    assert mfus(sizes[0], peak) == [pytest.approx(100 / 420)] * 2
    assert mfus(sizes[1], peak) == [pytest.approx(90 / 420)] * 2
    assert common_peak((size_of(1, [1e12]),)) is None
    assert mfus(size_of(1, [PEAK / 2]), None) == [0.5]
    assert mfus(size_of(1, [PEAK / 2], peak=None), None) is None


# The split.


def shares(communication: float, wait: float | None, taking: float, host: float) -> Shares:
    values = dict(zip(PARTS, (communication, wait, taking, host), strict=False))
    return Shares(values, {} if wait is not None else {"imbalance": "one device in the trace"})


def test_the_parts_are_what_was_added_to_the_base_and_sum_to_the_tax():
    # A step of 100 ms, of which 10 are input, becomes one of 125 with 20 of communication and 5 more of jitter.
    base = size_of(1, [0.5, 0.5], shares(0.0, 0.0, 0.1, 0.0), mean=0.100, median=0.100)
    many = size_of(2, [0.4, 0.4], shares(20 / 125, 0.0, 10 / 125, 0.0), mean=0.125, median=0.120)
    tax = scaling_tax([0.5, 0.5], [0.4, 0.4])
    parts, reasons = split(base, many, tax)
    assert reasons == {}
    assert parts["exposed communication"] == pytest.approx(0.16)
    assert parts["input"] == pytest.approx(0)
    assert parts["jitter"] == pytest.approx(0.04)
    assert parts[REST] == pytest.approx(0, abs=1e-9)
    assert sum(parts.values()) == pytest.approx(tax.value) == 0.2


def test_a_part_that_is_not_known_has_a_reason_and_the_rest_takes_it():
    base = size_of(1, [0.5], shares(0.0, 0.0, 0.1, 0.0))
    many = size_of(2, [0.4], shares(0.2, None, 0.1, 0.0))
    parts, reasons = split(base, many, scaling_tax([0.5], [0.4]))
    assert parts["imbalance"] is None and reasons == {"imbalance": "one device in the trace"}
    assert sum(part for part in parts.values() if part is not None) == pytest.approx(0.2)
    parts, reasons = split(
        base, dataclasses.replace(many, shares=None, shares_reason="no trace"), scaling_tax([1], [1])
    )
    assert parts["host"] is None and set(reasons.values()) == {"no trace"} and parts["jitter"] is not None


def traced(wait: float | None, **nanoseconds: int) -> Breakdown:
    spent = {**dict.fromkeys(CATEGORIES, 0), **nanoseconds}
    device = DeviceTime(
        ordinal=0,
        steps=2,
        window=(0, sum(spent.values())),
        nanoseconds=spent,
        periods=(),
        collective=spent["collective"],
        hidden=0,
        lengths=(),
        ops=(),
        instances={},
    )
    return Breakdown("gpu", "jit_step", (device,), (), wait, {}, True, True)


def test_shares_of_a_trace():
    found = shares_of(traced(10.0, matmul=140, collective=40, input=6, host=4, launch=10))
    # Nanoseconds of two steps; the wait is of one.
    assert found.values == {
        "exposed communication": pytest.approx(0.1),
        "imbalance": pytest.approx(0.1),
        "input": pytest.approx(0.03),
        "host": pytest.approx(0.07),
    }
    assert shares_of(traced(None, matmul=200)).values["imbalance"] == 0
    alone = shares_of(traced(None, matmul=160, collective=40))
    assert alone.values["imbalance"] is None and "one device" in alone.reasons["imbalance"]
    assert alone.values["exposed communication"] == pytest.approx(0.2)


# The command.


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch):
    """Runs that take no time: `made_up(rate)` gives model FLOP/s of a device by its size and the number of the run."""
    started: list[list[str]] = []

    def install(rate: Callable[[int, int], float], chip: str = "H100 SXM") -> list[list[str]]:
        def run(command: list[str], **_) -> subprocess.CompletedProcess[str]:
            started.append(command)
            name = command[command.index("--name") + 1]
            devices, number = name.split("-")[-2:]
            flops = 1.0 if number == "profiled" else rate(int(devices), int(number))
            return subprocess.CompletedProcess(command, 0, "chatter\n" + json.dumps(summary(int(devices), flops)), "")

        def summary(devices: int, flops: float) -> dict:
            return {
                "event": "summary",
                "config": "x",
                "num_devices": devices,
                "chip": chip,
                "mfu_flops_per_second_per_device": flops,
                "tokens_per_second_per_device": flops / 1e10,
                "peak_flops_per_device": PEAK if chip == "H100 SXM" else 4e11 / devices,
                "peak_source": "table",
                "measured_steps": 28,
                "measured_seconds": 28 * 0.3,
                "step_seconds_median": 0.297,
            }

        monkeypatch.setattr(subprocess, "run", run)
        return started

    return install


def value_after(command: list[str], word: str) -> str:
    """The last one counts."""
    return command[len(command) - 1 - command[::-1].index(word) + 1]


def test_runs_are_repeated_until_the_interval_is_tight(made_up, tmp_path, capsys):
    noise = np.random.default_rng(0).standard_normal((9, 9))
    started = made_up(
        lambda devices, number: PEAK * (0.5 if devices == 1 else 0.45) * math.exp(0.01 * noise[devices, number])
    )
    arguments = ["scaling", "dense-1b", "--sizes", "2,1", "--no-profile", "--platform", "gpu", "--max-repeats", "8"]
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    assert main([*arguments, "--json", str(record), "--html", str(page)]) == 0
    found = json.loads(record.read_text())
    counts = [len(size["runs"]) for size in found["sizes"]]
    assert counts[0] == counts[1] == len(started) / 2 and 3 < counts[0] < 8
    tax = found["sizes"][1]["tax"]
    assert tax["high"] - tax["low"] <= 2 * 0.02 and tax["low"] < 0.1 < tax["high"]
    assert found["sizes"][1]["tax_parts_reasons"]["input"] == "no run was profiled: --no-profile"
    assert "<svg" in page.read_text() and "95% interval" in capsys.readouterr().out
    # Sizes take turns: what changes on the machine meanwhile changes all of them.
    assert [command[1] for command in started[:4]] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=0,1"] * 2


def test_an_interval_that_stays_wide_is_said(made_up, capsys):
    started = made_up(lambda devices, number: PEAK * (0.2 + 0.1 * (number % 2)))
    arguments = ["scaling", "dense-1b", "--sizes", "1,2", "--no-profile", "--platform", "gpu", "--max-repeats", "4"]
    assert main(arguments) == 0
    assert len(started) == 8
    assert "the interval is wider than ±2.0%" in capsys.readouterr().out


def test_a_prediction_stands_beside_what_was_measured(made_up, capsys):
    made_up(lambda devices, number: PEAK * 0.5)
    arguments = ["scaling", "dense-1b", "--sizes", "1,8", "--no-profile", "--platform", "gpu", "--json", "-"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    one, eight = found["sizes"]
    assert found["predicted_reason"] is None and one["predicted_tax"] is None
    expected = 1 - one["predicted"]["step_seconds"] / eight["predicted"]["step_seconds"]
    # It may be below 0: each device has an eighth of the optimizer's state to move.
    assert eight["predicted_tax"] == pytest.approx(expected) and abs(expected) < 0.2
    assert 0 < eight["predicted_exposed_communication"] < 0.2
    assert eight["batch_size"] == 64


def test_a_chip_that_the_model_does_not_know_has_no_prediction():
    run = configs.load("dense-1b").train()
    unlinked = next(chip.name for chip in CHIPS if chip.scale_up_bandwidth is None)
    for chip, words in ((unlinked, "no links"), ("cpu", "table of chips")):
        found, reason = scaling.predictions(run, chip, [(1, 8), (2, 16)])
        assert found == {} and words in reason


def test_virtual_devices_are_called_so_and_predicted_by_nobody(made_up, capsys):
    started = made_up(lambda devices, number: 1e11 / devices, chip="cpu")
    arguments = [
        "scaling",
        "quickstart",
        "--sizes",
        "1,4",
        "--strong",
        "--no-profile",
        "--platform",
        "cpu",
        "--json",
        "-",
    ]
    assert main([*arguments, "--fleet", "store.sqlite", "--", "--layers.no-scan", "--data.batch-size", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["virtual_devices"] and found["scaling"] == "strong" and "table of chips" in found["predicted_reason"]
    assert found["machine_peak_flops"] == 4e11
    assert [size["mfu"]["value"] for size in found["sizes"]] == [pytest.approx(0.25)] * 2
    assert started[1][:3] == ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"]
    assert {value_after(command, "--data.batch-size") for command in started} == {"16"}
    assert all("--layers.no-scan" in command for command in started)
    assert value_after(started[0], "--checkpoint.every") == "0"
    assert value_after(started[0], "--fleet") == str(Path("store.sqlite").absolute())


def test_a_launcher_starts_the_runs(made_up):
    started = made_up(lambda devices, number: PEAK * 0.5)
    arguments = ["scaling", "dense-1b", "--sizes", "8,16", "--no-profile", "--launcher", "srun --ntasks={devices} -l"]
    assert main([*arguments, "--", "--distributed.mode", "slurm"]) == 0
    assert started[0][:4] == ["srun", "--ntasks=8", "-l", sys.executable]
    assert [value_after(command, "--data.batch-size") for command in started[:2]] == ["8", "16"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--sizes", "1,2"], "unknown config 'nothing'"),
        (["dense-1b", "--sizes", "2"], "two or more different numbers"),
        (["dense-1b", "--sizes", "1,0"], "two or more different numbers"),
        (["dense-1b", "--sizes", "1,1"], "two or more different numbers"),
        (["dense-1b", "--sizes", "1,2", "--steps", "4"], "--steps 4 must be at least 10"),
        (["dense-1b", "--sizes", "1,2", "--repeats", "7"], "--max-repeats 6"),
        (["dense-1b", "--sizes", "1,2", "--target", "0"], "--target 0.0 must be above 0"),
        (["dense-1b", "--sizes", "3,4"], "set --data.batch-size after the -- to a multiple of 3"),
        (["dense-1b", "--sizes", "1,2", "--", "--mesh.fsdp", "2"], "2 devices, and 1 are available"),
        (["dense-1b", "--sizes", "1,2", "--", "--distributed.mode", "slurm"], "needs --launcher"),
    ],
)
def test_settings_that_can_t_work_start_no_run(made_up, capsys, arguments, words):
    started = made_up(lambda devices, number: 1.0)
    assert main(["scaling", *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.split()) and not started


def test_a_run_that_fails_says_what_it_said(monkeypatch, capsys):
    # Its steps were done, and its record could not be written.
    failed = subprocess.CompletedProcess([], 2, '{"event": "summary"}', "line\nerror: out of something\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert main(["scaling", "dense-1b", "--sizes", "1,2", "--no-profile", "--platform", "gpu"]) == 2
    err = capsys.readouterr().err
    assert "the run on 1 device ended with status 2" in err and "out of something" in err


def test_fewer_devices_than_asked_for_is_an_error(made_up, monkeypatch, capsys):
    made_up(lambda devices, number: 1.0)
    run = subprocess.run

    def on_one(command: list[str], **_) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 0, run(command).stdout.replace('"num_devices": 2', '"num_devices": 1'), ""
        )

    monkeypatch.setattr(subprocess, "run", on_one)
    assert main(["scaling", "dense-1b", "--sizes", "1,2", "--no-profile", "--platform", "gpu"]) == 2
    assert "the run on 2 devices had 1" in capsys.readouterr().err


def test_the_last_summary_is_found_among_other_lines():
    text = 'x\n{"event": "train"}\n{"event": "summary", "a": 1}\n{"event": "summary", "a": 2}\n{broken\n[Gloo] bye\n'
    assert scaling.last_summary(text)["a"] == 2
    assert scaling.last_summary("nothing\n") is None


# Two shared cores: two minutes.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_virtual_devices_for_real(tmp_path, capsys):
    arguments = ["scaling", "quickstart", "--sizes", "1,2", "--steps", "10", "--repeats", "2", "--max-repeats", "2"]
    folders = ["--runs-dir", str(tmp_path / "runs"), "--fleet", str(tmp_path / "fleet.sqlite"), "--platform", "cpu"]
    small = ["--model.num-layers", "2", "--data.source", "random", "--data.batch-size", "4"]
    assert main([*arguments, *folders, "--json", "-", "--", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["sizes"]
    assert one["shares"]["exposed communication"] == 0 < two["shares"]["exposed communication"]
    assert sum(two["tax_parts"].values()) == pytest.approx(two["tax"]["value"])
    assert not list((tmp_path / "runs").glob("*/checkpoints/step*"))
    summaries = [
        json.loads(path.read_text().splitlines()[-1]) for path in (tmp_path / "runs").glob("*-2-*/metrics.jsonl")
    ]
    # What train.py says of itself, against the same store.
    taxes = [one["scaling_tax"] for one in summaries if not one["profiled"]]
    assert len(taxes) == 2 and statistics.mean(taxes) < 1
