"""`python -m perf fleet`: statistics at their stated rates, reports, the gate, and what runs leave in a store."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf import baseline
from perf.baseline import MAX_RECORDS, MIN_RECORDS, judge, limit_factor, median, qn_scale
from perf.command import main
from perf.fleet import budget, check, gate_metrics, goodput_shares, groups, scaling_tax, work_of
from perf.fleet_store import FolderStore, open_store
from perf.records import RunRecord, config_hash
from serving.bench import Bench
from serving.config import BenchConfig
from serving.fleet import FleetRecorder
from serving.request import SamplingParams
from tests.perf.fleet_records import COMMITS, record, runs, summary
from tests.serving.engines import SHAPES, generate, start_tiny
from tests.training.runs import DENSE, main_here, prepare, run_dir, run_of
from training.fleet import work_settings

# Statistics


@pytest.mark.parametrize(
    ("count", "rank"),
    # Ranks of 95% intervals for the median, as nonparametric tables have them.
    [(5, None), (6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (17, 5), (20, 6), (25, 8), (30, 10)],
)
def test_the_interval_of_a_median_has_the_ranks_of_the_tables(count, rank):
    found = median([float(n) for n in range(count, 0, -1)])
    assert found.value == (count + 1) / 2
    if rank is None:
        assert (found.low, found.high) == (None, None) and "needs 6" in found.reason
    else:
        assert (found.low, found.high) == (rank, count + 1 - rank)


@settings(max_examples=10, deadline=None)
@given(count=st.integers(6, 40), seed=st.integers(0, 2**32 - 1))
def test_the_interval_holds_the_median_as_often_as_it_says(count, seed):
    """Of a distribution with a long tail, too: the ranks know of none."""
    drawn = np.random.default_rng(seed).exponential(size=(600, count))
    found = [median(list(row)) for row in drawn]
    held = np.mean([one.low <= math.log(2) <= one.high for one in found])
    # Five standard deviations of a share of 600.
    assert held > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 600)


@settings(max_examples=50)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), shift=st.floats(-10, 10))
def test_qn_is_an_order_statistic_of_the_distances(values, shift):
    distances = sorted(abs(a - b) for place, a in enumerate(values) for b in values[:place])
    expected = 2.2219 * distances[math.comb(len(values) // 2 + 1, 2) - 1]
    assert float(qn_scale(np.array(values))) == pytest.approx(expected)
    assert float(qn_scale(-3 * np.array(values) + shift)) == pytest.approx(3 * expected, abs=1e-9)


def false_alarms(count: int, rate: float, checks: int, seed: int, scale: float = 0.01) -> int:
    """Of so many runs held against baselines of their own distribution."""
    drawn = np.random.default_rng(seed).normal(0.5, 0.5 * scale, size=(checks, count + 1))
    verdicts = [judge("mfu", row[0], list(row[1:]), rate=rate, threshold=0.0).verdict for row in drawn]
    return verdicts.count("regression")


@settings(max_examples=8, deadline=None)
@given(
    count=st.sampled_from([MIN_RECORDS, 12, 20, MAX_RECORDS]),
    rate=st.sampled_from([0.01, 0.02, 0.05]),
    scale=st.floats(1e-4, 0.1),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_more_false_alarms_than_stated(count, rate, scale, seed):
    # The factor is simulated: 15% for that, and five standard deviations of the number of alarms.
    expected = 1.15 * rate * 800
    assert false_alarms(count, rate, 800, seed, scale) <= expected + 5 * math.sqrt(expected)


def test_the_rate_is_not_far_below_what_is_stated_either():
    assert 4000 * 0.05 * 0.8 < false_alarms(12, 0.05, 4000, seed=1) < 4000 * 0.05 * 1.2


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), level=st.floats(0.05, 0.8))
def test_a_loss_of_5_percent_is_caught_with_12_records_of_1_percent_noise(seed, level):
    drawn = level * (1 + 0.01 * np.random.default_rng(seed).standard_normal((300, 13)))
    judged = [judge("mfu", 0.95 * row[0], list(row[1:]), rate=0.02, threshold=0.02) for row in drawn]
    caught = np.mean([one.verdict == "regression" for one in judged])
    # 97% in 20,000 of them; the bound is five standard deviations of a share of 300 lower.
    assert caught > 0.92
    assert np.mean([one.change for one in judged]) == pytest.approx(-0.05, abs=0.005)


def test_a_loss_within_the_margin_is_none():
    tight = [0.5 + 1e-5 * n for n in range(12)]
    assert judge("mfu", 0.492, tight, rate=0.02, threshold=0.02).verdict == "pass"
    assert judge("mfu", 0.492, tight, rate=0.02, threshold=0.01).verdict == "regression"
    assert judge("mfu", 0.51, tight, rate=0.02, threshold=0.0).verdict == "pass"


def test_one_crippled_run_does_not_hide_the_next():
    values = [0.5 * (1 + 0.01 * z) for z in statistics.NormalDist().samples(11, seed=3)]
    with_outlier = judge("mfu", 0.475, [*values, 0.1], rate=0.02, threshold=0.02)
    assert with_outlier.verdict == "regression"
    # Mean and standard deviation would have let it pass.
    sample = [*values, 0.1]
    assert statistics.mean(sample) - 2.3 * statistics.stdev(sample) < 0.475


def test_a_time_regresses_upwards():
    times = [100 + 0.1 * n for n in range(12)]
    worse, better = (judge("t_ms", t, times, rate=0.02, threshold=0.02, larger_is_better=False) for t in (106.0, 90.0))
    assert (worse.verdict, better.verdict) == ("regression", "pass")
    assert worse.limit > worse.baseline.value and worse.change == pytest.approx(106 / 100.55 - 1)


def test_the_factor_for_one_value_against_one_other_spread():
    """With many values median and Qn are the distribution's own, and K is a quantile of the normal distribution."""
    assert limit_factor(400, 0.02) == pytest.approx(-statistics.NormalDist().inv_cdf(0.02), rel=0.02)
    assert limit_factor(8, 0.01) > limit_factor(8, 0.02) > limit_factor(8, 0.05)


# The fleet


def test_sizes_and_their_tax():
    members = [*runs(0.54, 7), *runs(0.50, 7, size=64, hour=10), *runs(0.9, 3, hour=20, profiled=True)]
    small, large = groups(members, "size")
    assert (small.label, small.size, len(small.records)) == ("8 devices", 8, 7)
    assert small.middle.value == statistics.median(one.mfu for one in members[:7])
    assert small.best == max(one.mfu for one in members[:7]) and small.tax == 0
    assert large.tax == pytest.approx(1 - large.middle.value / small.middle.value)
    assert large.fleet_value == pytest.approx(large.middle.value * 0.8)


def test_versions_are_compared_within_a_size():
    after = {"versions": {"jax": "0.11.2", "commit": COMMITS[1] + "+changes"}, "hour": 10}
    members = [*runs(0.54, 7), *runs(0.27, 7, **after), *runs(0.50, 7, size=64), *runs(0.50, 7, size=64, **after)]
    found = groups(members, "version")
    assert [one.label for one in found] == [
        "8 devices, jax 0.11.2, aaaaaaaaa",
        "8 devices, jax 0.11.2, bbbbbbbbb+changes",
        "64 devices, jax 0.11.2, aaaaaaaaa",
        "64 devices, jax 0.11.2, bbbbbbbbb+changes",
    ]
    assert [round(one.tax, 3) for one in found] == [0, 0.5, 0, 0]


@settings(max_examples=50)
@given(
    values=st.lists(st.tuples(st.floats(0.01, 0.9), st.sampled_from([8, 16])), min_size=1, max_size=8),
    seconds=st.tuples(*[st.floats(0, 1e4)] * 3).filter(any),
)
def test_the_reality_tax_adds_up(values, seconds):
    parts = dict(
        zip(("goodput_step_seconds", "goodput_compile_seconds", "goodput_lost_work_seconds"), seconds, strict=True)
    )
    members = [record(mfu=mfu, size=size, hour=hour, **parts) for hour, (mfu, size) in enumerate(values)]
    found = budget(members)
    assert found.hero_value == max(mfu for mfu, _ in values) == found.hero.mfu
    assert found.hero_value - sum(lost for _, lost in found.lines) == pytest.approx(found.fleet_value)
    assert all(lost >= -1e-12 for what, lost in found.lines if not what.startswith("other sizes"))


def test_a_reality_tax_by_hand():
    found = budget([record(mfu=mfu, hour=hour) for hour, mfu in enumerate((0.4, 0.5, 0.6))])
    assert dict(found.lines) == pytest.approx(
        {
            "other runs on 8 devices: best to median": 0.1,
            # 480 of 600 s were steps, 90 compilation, 30 waiting for input, nothing lost.
            "not in a step: compile": 0.5 * 90 / 600,
            "not in a step: input_wait": 0.5 * 30 / 600,
            "not in a step: lost_work": 0.0,
        }
    )
    assert found.fleet_value == pytest.approx(0.5 * 0.8)


def test_a_resumed_run_counts_once_and_every_device_hour_alike():
    whole = {"first_started": 1.0, "goodput_step_seconds": 0.0, "goodput_compile_seconds": 100.0}
    attempts = [record(hour=hour, goodput_lost_work_seconds=lost, **whole) for hour, lost in enumerate((0.0, 300.0))]
    other = record(size=16, hour=5)
    shares = goodput_shares([attempts[1], other, attempts[0]])
    waited, lost, compiled, steps = 30 * 8 + 30 * 16, 300 * 8, 100 * 8 + 90 * 16, 480 * 16
    total = waited + lost + compiled + steps
    expected = {"input_wait": waited, "lost_work": lost, "compile": compiled, "step": steps}
    assert shares == pytest.approx({name: seconds / total for name, seconds in expected.items()})


# The gate


def verdict(records: list[RunRecord], run: RunRecord, **changes):
    return check([*records, run], run, **{"rate": 0.02, "threshold": 0.02, **changes})


def test_the_baseline_is_of_the_same_work_and_size_before_the_run():
    run = record(mfu=0.47, hour=100)
    before = runs(0.5, 12)
    other = [
        *runs(0.1, 3, hour=20, config_hash="another"),
        *runs(0.1, 3, hour=30, chip="A100"),
        *runs(0.1, 3, hour=40, size=16),
        *runs(0.1, 3, hour=50, profiled=True),
        *runs(0.1, 3, hour=60, workload="traffic"),
        *runs(0.1, 3, hour=101),
    ]
    found = verdict([*other, *before], run)
    assert list(found.baseline) == before and found.status == 1
    many = runs(0.5, MAX_RECORDS + 5)
    assert list(verdict(many, run).baseline) == many[5:]


def test_a_rate_is_shared_by_the_metrics():
    before = runs(0.5, 12)
    alone = verdict(before, record(hour=100), metrics=("mfu",)).judgements[0]
    shared = verdict(before, record(hour=100), metrics=("mfu", "hfu")).judgements
    assert shared[0].limit < alone.limit
    assert shared[0].limit == verdict(before, record(hour=100), metrics=("mfu",), rate=0.01).judgements[0].limit


def test_a_metric_that_is_not_known_is_not_passed():
    found = verdict(runs(0.5, 12), record(hour=100), metrics=("mfu", "decode_mbu"))
    assert [one.verdict for one in found.judgements] == ["pass", "unknown"] and found.status == 2
    assert "train" in found.judgements[1].reason
    # A regression elsewhere is one all the same.
    assert verdict(runs(0.5, 12), record(mfu=0.4, hour=100), metrics=("mfu", "decode_mbu")).status == 1


def test_without_a_peak_the_rate_is_judged():
    assert gate_metrics(record(mfu=None)) == ("tokens_per_second_per_device",)
    assert verdict(runs(0.5, 12), record(mfu=None, hour=100, tokens_per_second_per_device=4e4)).status == 1


def test_canaries_are_judged_against_their_own_size():
    small, middle = runs(0.54, 12), runs(0.52, 12, size=32)
    sick = [record(mfu=0.5, hour=50), record(mfu=0.52, size=32, hour=51)]
    found = verdict([*small, *middle, *runs(0.5, 12, size=64), *sick], record(mfu=0.46, size=64, hour=100))
    assert [(one.run.num_devices, one.verdict) for one in found.canaries] == [(8, "regression"), (32, "pass")]
    assert [one.run for one in found.canaries] == sick


# The commands


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = main(["fleet", *map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def filled(path: Path, *records: RunRecord) -> Path:
    store = open_store(path, create=True)
    for one in records:
        store.append(one)
    return path


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Twelve healthy runs on 8 and on 64 devices. A folder: an insert into a file waits for the disk."""
    return filled(tmp_path / "fleet", *runs(0.54, 12), *runs(0.5, 12, size=64))


def test_report_prints_draws_and_saves(fleet: Path, command, tmp_path: Path):
    page = tmp_path / "page.html"
    status, out, err = command("report", "--store", fleet, "--html", page)
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    assert "24 records of 1 work" in out and "8 devices" in out and "64 devices" in out and "Reality tax" in out
    text = page.read_text()
    assert text.count("<svg") == 1 and "median and interval" in text
    found = json.loads(command("report", "--store", fleet, "--json", "-")[1])
    [work] = found["works"]
    assert [size["num_devices"] for size in work["sizes"]] == [8, 64]
    assert work["sizes"][0]["median"]["value"] == statistics.median(one.mfu for one in runs(0.54, 12))
    assert work["sizes"][1]["tax"] == pytest.approx(0.074, abs=0.01)
    assert work["reality_tax"]["hero"] == max(one.mfu for one in runs(0.54, 12))
    assert work["goodput_shares"]["compile"] == pytest.approx(90 / 600)


def test_report_by_version_and_of_what_has_no_utilisation(command, tmp_path: Path):
    store = filled(tmp_path / "f.sqlite", *runs(0.54, 7), record(mfu=None, chip="cpu"))
    page = tmp_path / "page.html"
    status, out, _ = command("report", "--store", store, "--by", "version", "--html", page)
    assert status == 0 and "aaaaaaaaa" in out and "No MFU" in out and "no peak is known" in out
    assert page.read_text().count("<svg") == 1
    assert len(json.loads(command("report", "--store", store, "--chip", "h100 sxm", "--json", "-")[1])["works"]) == 1


def test_report_says_what_it_left_out(command, tmp_path: Path):
    store = filled(tmp_path / "fleet", *runs(0.54, 7), record(hour=50, profiled=True))
    (store / "torn.parquet").write_bytes(b"PAR1")
    out = command("report", "--store", store)[1]
    assert "1 profiled run left out" in out and "not read: torn.parquet" in out
    found = json.loads(command("report", "--store", store, "--json", "-")[1])
    assert found["works"][0]["profiled_left_out"] == 1 and "torn.parquet" in found["refused"][0]


@pytest.mark.parametrize(("mfu", "status", "said"), [(0.5, 0, "pass: run"), (0.47, 1, "REGRESSION: run")])
def test_check_is_a_gate(fleet: Path, command, tmp_path: Path, mfu, status, said):
    filled(fleet, record(mfu=mfu, size=64, hour=100))
    page = tmp_path / "page.html"
    found, out, err = command("check", "--store", fleet, "--html", page)
    assert (found, err) == (status, "") and out.startswith(said) and max(map(len, out.splitlines())) <= 120
    assert "mfu" in out and "Canaries" in out and "8 devices" in out
    assert page.read_text().count("<svg") == 1
    result = json.loads(command("check", "--store", fleet, "--json", "-")[1])
    [metric] = result["metrics"]
    assert (metric["metric"], metric["value"], metric["baseline"]["count"]) == ("mfu", mfu, 12)
    low, high = metric["change_interval"]
    assert low < metric["change"] < high
    assert [one["num_devices"] for one in result["canaries"]] == [8]
    if status:
        assert "mfu changed by -6." in out and "no smaller slice shows it" in out


def test_a_baseline_that_scatters_says_what_it_can_not_show(command, tmp_path: Path):
    store = filled(tmp_path / "fleet", *runs(0.5, 12, noise=0.2), record(mfu=0.45, hour=100))
    status, out, _ = command("check", "--store", store)
    found = json.loads(command("check", "--store", store, "--json", "-")[1])["metrics"][0]
    assert status == 0 and found["blind"] == pytest.approx(1 - found["limit"] / found["baseline"]["value"])
    assert f"a change under {100 * found['blind']:.1f}% passes" in " ".join(out.split())
    quiet = filled(tmp_path / "quiet", *runs(0.5, 12, noise=1e-4), record(mfu=0.5, hour=100))
    assert "passes" not in command("check", "--store", quiet)[1]


def test_a_run_of_another_name_is_held_to_the_same_settings(fleet: Path, command):
    filled(fleet, record(mfu=0.46, size=64, hour=100, config="books"))
    for name in ("books", "dense-1b", record().config_hash):
        status, out, _ = command("check", "--store", fleet, "--config", name)
        assert status == 1 and "12 runs of the same work" in out
    assert "books, dense-1b, train on H100 SXM" in command("report", "--store", fleet)[1]


def test_a_sick_canary_is_named(fleet: Path, command):
    filled(fleet, sick := record(mfu=0.5, hour=99), record(mfu=0.46, size=64, hour=100))
    status, out, _ = command("check", "--store", fleet)
    assert status == 1 and f"8 devices show a regression too (run {sick.id})" in " ".join(out.split())


def test_too_few_records(command, tmp_path: Path):
    """From a file, as all that follows a read is the same."""
    store = filled(tmp_path / "f.sqlite", *runs(0.5, 8))
    status, out, _ = command("check", "--store", store)
    assert status == 2 and "7 runs to compare with; 8 are needed" in out and out.startswith("not judged")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"profiled": True}, "the run was profiled"), ({"workload": "traffic"}, "depend on its load; name --metrics")],
)
def test_what_is_not_judged(fleet: Path, command, changes, said):
    filled(fleet, record(mfu=0.1, hour=200, **changes))
    status, out, _ = command("check", "--store", fleet)
    assert status == 2 and said in out


def test_a_run_is_found_by_config_and_by_its_id(fleet: Path, command):
    named = record(mfu=0.4, hour=50)
    filled(fleet, named, record(hour=60, config="other", config_hash="other"))
    assert command("check", "--store", fleet)[0] == 2
    assert command("check", "--store", fleet, "--config", "dense-1b")[0] == 1
    assert command("check", "--store", fleet, "--run", named.id[-8:])[0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "--config", "nothing"), "--config nothing: no record of it; configs recorded: dense-1b"),
        (("report", "--chip", "v5e"), "--chip v5e: no record of it; chips recorded: H100 SXM"),
        (("check", "--run", "nothing"), "--run nothing: no record is called so; the latest: 2026"),
        (("check", "--run", "2026"), "--run 2026: 24 records are called so"),
        (("check", "--metrics", "mfx"), "--metrics mfx: not a metric of these runs; known: mfu, "),
        (("check", "--false-alarms", "0.7"), "--false-alarms 0.7 must be above 0"),
        (("check", "--threshold", "-1"), "--threshold -1.0 in 0..1"),
    ],
)
def test_a_wrong_setting_is_one_line(fleet: Path, command, arguments, said):
    status, out, err = command(*arguments, "--store", fleet)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_wrong_or_empty_store_is_one_line(fleet: Path, command, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("gone", f"stores in {tmp_path}: {fleet.name}"),
        ("empty", "has no records; a run with --fleet"),
    ):
        for which in ("report", "check"):
            status, out, err = command(which, "--store", tmp_path / name)
            assert (status, out) == (2, "") and err.count("\n") == 1 and said in err


def test_record_takes_a_folder_a_summary_and_a_line_of_a_bench(command, tmp_path: Path):
    folder = tmp_path / "runs" / "dense"
    folder.mkdir(parents=True)
    events = [{"event": "train", "step": 1}, summary(mfu=0.3), {"event": "train", "step": 2}, summary(mfu=0.4, hour=1)]
    lines = "".join(json.dumps({**event, "attempt": 1, "time": 0.0}) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines + '{"event": "tr')
    (tmp_path / "bench.json").write_text("a remark\n" + json.dumps({"name": "x", "fleet": summary(mfu=0.5, hour=2)}))
    (tmp_path / "line.json").write_text(json.dumps(summary(mfu=0.6, hour=3), indent=1))
    store = tmp_path / "fleet.sqlite"
    for path in (folder, tmp_path / "bench.json", tmp_path / "line.json"):
        status, out, err = command("record", path, "--store", store)
        assert (status, err) == (0, "") and "added to" in out
    assert [one.mfu for one in open_store(store).read().records] == [0.4, 0.5, 0.6]
    assert "is already in" in command("record", folder, "--store", store)[1]
    assert len(open_store(store).read().records) == 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone", "no run at"),
        (".", "is no folder of a training run (no metrics.jsonl); runs inside it: half"),
        ("half", "has no summary: the run has not ended"),
        ("text.json", "holds no JSON object"),
        ("old.json", "it has no mode, workload, config_hash"),
    ],
)
def test_record_says_what_is_no_run(command, tmp_path: Path, path, said):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text('{"event": "train"}\n')
    (tmp_path / "text.json").write_text("[1, 2]")
    old = {name: value for name, value in summary().items() if name not in ("mode", "workload", "config_hash")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    status, out, err = command("record", tmp_path / path, "--store", tmp_path / "f.sqlite")
    assert (status, out) == (2, "") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "f.sqlite").exists()


# What runs leave


def hash_of(num_devices: int = 8, **changes) -> str:
    return config_hash(work_settings(run_of({**DENSE, "data.source": "random", **changes}), num_devices))


def test_settings_that_change_no_work_have_one_hash():
    same = {"name": "other", "steps": 99, "seed": 3, "optimizer.schedule.peak_lr": 0.5, "optimizer.weight_decay": 0.0}
    same |= {"data.seed": 5, "checkpoint.every": 2, "fleet": Path("x"), "runs_dir": Path("y"), "tensorboard": False}
    for name, value in same.items():
        assert hash_of(**{name: value}) == hash_of(), name
    assert hash_of(16, **{"data.batch_size": 16}) == hash_of()


def test_settings_that_change_the_work_change_the_hash():
    others = {
        "model.num_layers": 3,
        "data.sequence_length": 16,
        "data.batch_size": 16,
        "precision.compute": "bfloat16",
        "layers.scan": False,
        "kernels.attention": "xla",
        "mesh.tensor": 2,
        "accumulation": 2,
        "optimizer.kind": "muon",
        "optimizer.moment_dtype": "bfloat16",
        "optimizer.clip_norm": None,
        "xla_options": ("xla_x=1",),
    }
    hashes = {hash_of(**{name: value}) for name, value in others.items()} | {hash_of(), hash_of(16)}
    assert len(hashes) == len(others) + 2


def test_a_training_run_leaves_its_record(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    base = {**DENSE, "data.source": "random", "data.heldout_fraction": 0.0, "steps": 8, "checkpoint.every": 8}
    plan = prepare(tmp_path, {**base, "tensorboard": False, "fleet": tmp_path / "fleet.sqlite"})
    assert main_here(plan) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    [found] = open_store(plan["fleet"]).read().records
    for name in ("config", "mfu", "hfu", "mfu_palm", "goodput", "tokens_per_second", "num_devices", "chip"):
        assert getattr(found, name) == printed[name], name
    assert (found.chip, found.workload, found.mesh) == ("cpu", "train", {"fsdp": 8})
    assert found.versions["jax"] == jax.__version__
    [host] = found.step_times
    assert host.count == printed["measured_steps"] and host.p50 == printed["step_seconds_p50"]
    assert found.config_hash == config_hash(work_settings(run_of(plan), 8))
    assert sum(found.goodput_seconds.values()) == pytest.approx(found.ended - found.started, abs=0.5)
    # By hand it is the same record, which is there already.
    assert main(["fleet", "record", str(run_dir(plan)), "--store", str(plan["fleet"])]) == 0
    assert "is already in" in capsys.readouterr().out

    # Another attempt, with nothing left to do, is one more record of the same run.
    assert main_here(plan) == 0
    capsys.readouterr()
    records = open_store(plan["fleet"]).read().records
    assert len(records) == 2 and len({one.first_started for one in records}) == 1 < len(
        {one.started for one in records}
    )
    assert records[1].mfu is None and "no step was measured" in records[1].reasons["step_times"]

    # A store that can't be is refused before anything is made; one that fails at the end is said with what to do.
    assert main_here({**plan, "name": "other", "fleet": tmp_path / "x.json"}) == 2
    assert "is neither" in capsys.readouterr().err and not (plan["runs_dir"] / "other").exists()

    def full(store: FolderStore, record: RunRecord) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FolderStore, "append", full)
    assert main_here({**plan, "fleet": tmp_path / "folder"}) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["event"] == "summary"
    assert f"python -m perf fleet record {run_dir(plan)} --store {tmp_path / 'folder'}" in captured.err


def test_a_server_leaves_a_record_of_its_bench_and_of_its_traffic(tmp_path: Path):
    store, bench = tmp_path / "fleet", BenchConfig(batches=(1, 4), prompts=(8,), decode_prompt=8, decode_tokens=24)
    recorder = FleetRecorder(store)
    shapes = dataclasses.replace(SHAPES, batch_sizes=(4,), widths=(64,), tile_counts=(1,))
    server = start_tiny(shapes=shapes, benchmark=bench)
    try:
        with recorder.traffic(server.resolved, server.started):
            generate(server.engine, "one", (1, 2, 3), SamplingParams(max_tokens=12, temperature=0))
        measured = Bench(server.resolved, server.started, lambda line: None).run()
        recorder.bench(server.resolved, server.started, measured)
    finally:
        server.engine.stop()
        server.started.compilations.stop()
    traffic, found = open_store(store).read().records
    assert (found.mode, found.workload, found.config, found.chip, found.compiles) == (
        "serve",
        "bench",
        "tiny",
        "cpu",
        0,
    )
    assert found.measures["ttft_8_ms"] == measured["prefill"]["8"]["ttft_ms"]
    assert found.tokens_per_second == measured["decode"]["4"]["tokens_per_second"]
    assert found.decode_mbu == measured["decode"]["4"]["mbu"]
    assert (found.decode_mbu is None) == ("decode_mbu" in found.reasons)
    assert {name for name in gate_metrics(found) if name.startswith("ttft")} == {"ttft_8_ms"}
    assert len(gate_metrics(found)) == 3
    assert (traffic.workload, traffic.measures["requests"]) == ("traffic", 1)
    assert traffic.tokens_per_second == pytest.approx(12 / traffic.measures["serving_seconds"])
    assert work_of(traffic).config_hash != work_of(found).config_hash
    assert gate_metrics(traffic) == ()


def test_a_server_refuses_a_store_that_can_not_be_before_it_starts(tmp_path: Path):
    with pytest.raises(ValueError, match="is neither"):
        FleetRecorder(tmp_path / "x.json")
    assert baseline.MIN_RECORDS >= 6


def test_the_scaling_tax_is_against_the_smallest_size_of_the_same_work():
    records = [
        *runs(0.5, 3, noise=0.0, size=8),
        *runs(0.4, 3, noise=0.0, size=16, hour=9),
        *runs(0.9, 1, size=4, chip="H200"),
        record(mfu=0.1, size=4, profiled=True),
        record(mfu=None, size=2),
    ]
    work = work_of(records[0])
    found = scaling_tax(records, work, 32, 0.3)
    assert found == {
        "scaling_tax": pytest.approx(0.4),
        "scaling_tax_base_devices": 8,
        "scaling_tax_base_mfu": pytest.approx(0.5),
        "scaling_tax_base_runs": 3,
    }
    # A run that is faster than its base has a tax below zero; one of the smallest size, or of other work, has none.
    assert scaling_tax(records, work, 16, 0.6)["scaling_tax"] == pytest.approx(-0.2)
    assert scaling_tax(records, work, 8, 0.5) is None
    assert scaling_tax(records, dataclasses.replace(work, config_hash="other"), 32, 0.3) is None
