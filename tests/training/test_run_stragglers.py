"""The watch over a run's hosts: what it measures, tells the other hosts, writes down and says, and what it costs."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import distributed
from perf.host_steps import FILE_NAME, read_hosts
from tests.parallel.two_processes import coordinator_address, finish, start
from tests.training import runs
from training.config import StragglerConfig
from training.report import Reporter
from training.stragglers import PROBE_SHARE, HostWatch, Probe

STEP = 0.3


@pytest.fixture
def reporter(tmp_path: Path):
    with Reporter(tmp_path, console="plain", tensorboard=False, total_steps=100) as one:
        yield one


def others(monkeypatch: pytest.MonkeyPatch, count: int, change: Callable[[int, dict], None]) -> None:
    """Makes this the first of `count` hosts; `change(host, row)` makes a host's row of this one's."""
    monkeypatch.setattr(distributed, "process_info", lambda: distributed.ProcessInfo(0, count, 1, count))

    def gather(text: str) -> list[str]:
        told = [json.loads(text) for _ in range(count)]
        for host, rows in enumerate(told):
            for row in rows:
                change(host, row)
        return [json.dumps(rows) for rows in told]

    monkeypatch.setattr(distributed, "gather", gather)


def late_host(slow: int, since: int = 0, amount: float = 0.1) -> Callable[[int, dict], None]:
    """Rows as hosts have them that wait for host `slow`: in all steps after the first `since`."""
    seen: dict[int, int] = {}
    draw = np.random.default_rng(0)

    def change(host: int, row: dict) -> None:
        seen[host] = seen.get(host, 0) + 1
        row["barrier"] = 1e-3 * draw.random()
        if seen[host] > since and host != slow:
            row["barrier"] += amount * STEP

    return change


def drive(watch: HostWatch, steps: int, probe: float | None = None) -> None:
    draw = np.random.default_rng(1)
    for step in range(1, steps + 1):
        watch.done(step, STEP + 0.002 * draw.standard_normal(), probe, measured=True)


def test_a_late_host_is_named_once_within_twenty_steps(tmp_path, monkeypatch, reporter):
    others(monkeypatch, 8, late_host(6, since=40))
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    said = []
    monkeypatch.setattr(reporter, "say", said.append)
    named = []
    for step in range(1, 101):
        watch.done(step, STEP, None, measured=True)
        named += [step] * (len(said) - len(named))
    # Two steps warm up, and are not among the rows.
    assert len(named) == 1 and 42 < named[0] <= 62
    assert len(said) == 1 and "host 6" in said[0] and "since step 43" in said[0]
    summary = watch.summary()
    assert [one["host"] for one in summary["stragglers"]] == [6]
    assert json.loads(json.dumps(summary)) == summary
    data = read_hosts(tmp_path / FILE_NAME)
    assert [len(one.steps) for one in data] == [98] and data[0].num_hosts == 8


def test_two_hundred_clean_steps_of_eight_hosts_say_nothing(tmp_path, monkeypatch, reporter):
    others(monkeypatch, 8, late_host(-1, since=10**6))
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    monkeypatch.setattr(reporter, "say", pytest.fail)
    drive(watch, 200)
    assert watch.summary()["stragglers"] == [] and watch.summary()["step_time_changes"] == []


def test_steps_that_are_not_measured_are_left_out_on_all_hosts_alike(tmp_path, monkeypatch, reporter):
    others(monkeypatch, 2, late_host(-1, since=10**6))
    watch = HostWatch(StragglerConfig(every=4), tmp_path, reporter)
    for step in range(1, 17):
        watch.done(step, None if step == 1 else STEP, None, measured=step % 4 != 0)
    assert read_hosts(tmp_path / FILE_NAME)[0].steps == (3, 5, 6, 7, 9, 10, 11, 13, 14, 15)


def test_a_change_of_the_step_time_is_said(tmp_path, monkeypatch, reporter):
    said = []
    monkeypatch.setattr(reporter, "say", said.append)
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    drive(watch, 60)
    for step in range(61, 91):
        watch.done(step, 1.1 * STEP, None, measured=True)
    assert len(said) == 1 and "step time changed after step 60: from 300" in said[0]
    assert watch.summary()["step_time_changes"][0]["step"] == 61
    # One process: nobody to tell, and nobody to hold it against.
    assert "stragglers" not in watch.summary() and not (tmp_path / FILE_NAME).exists()


def test_waits_are_those_since_the_step_before(tmp_path, reporter):
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    with watch.span("input"):
        time.sleep(0.02)
    record = watch.done(1, STEP, None, measured=True)
    assert record["input_seconds"] >= 0.02 and record["result_seconds"] == 0 and "barrier_seconds" not in record
    assert watch.done(2, STEP, None, measured=True)["input_seconds"] == 0


def test_a_probe_follows_its_step_on_every_device(tmp_path, reporter):
    devices = jax.local_devices()
    probe = Probe(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loss = jax.device_put(jnp.float32(1.5), replicated)
    results = probe(loss)
    assert {next(iter(one.devices())) for one in results} == set(devices)
    # A permutation's row; its sign shows that the step's loss was there.
    assert [float(one) for one in results] == [1.0] * len(devices)
    assert {float(one) for one in probe(jax.device_put(jnp.float32(np.nan), replicated))} == {-1.0}
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    # The step had ended before: when the probe began, nobody saw.
    assert watch.wait(jax.block_until_ready(loss), results) is None


@dataclasses.dataclass
class Result:
    """Ready when it has been waited for as long as it takes."""

    seconds: float

    def block_until_ready(self) -> None:
        time.sleep(self.seconds)


def test_a_probe_is_timed_from_the_end_of_its_step(tmp_path, reporter):
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    seconds = watch.wait(Result(0.05), [Result(0.02), Result(0.01)])
    assert 0.03 <= seconds < 0.3 and watch.cost_seconds == seconds
    assert watch.wait(Result(0.05), []) is None
    assert watch.done(1, STEP, seconds, measured=True)["result_seconds"] >= 0.1


def test_probes_are_as_rare_as_their_cost_asks(tmp_path, monkeypatch, reporter):
    others(monkeypatch, 2, lambda host, row: None)
    watch = HostWatch(StragglerConfig(every=5), tmp_path, reporter)
    watch._probe = lambda loss: [loss]
    asked = [bool(watch.queue_probe(None)) for _ in range(10)]
    assert asked == [False] * 4 + [True] + [False] * 4 + [True]
    drive(watch, 10, probe=2.5 * PROBE_SHARE * STEP)
    asked = [bool(watch.queue_probe(None)) for _ in range(9)]
    assert sum(asked) == 3


def test_the_judgement_costs_little(tmp_path, monkeypatch, reporter):
    others(monkeypatch, 8, late_host(-1, since=10**6))
    watch = HostWatch(StragglerConfig(), tmp_path, reporter)
    drive(watch, 400)
    # Measured on two shared cores: 0.3 ms a step with 8 hosts, most of it for the line of the file. The bound is of
    # a step of 1 s, loosely: the suite shares its cores.
    assert watch.summary()["watch_seconds_per_step"] < 5e-3


def test_a_line_that_a_kill_cut_short_is_alone(tmp_path, monkeypatch, reporter):
    (tmp_path / FILE_NAME).write_text('{"attempt": 1, "st')
    others(monkeypatch, 2, lambda host, row: None)
    drive(HostWatch(StragglerConfig(), tmp_path, reporter), 10)
    assert read_hosts(tmp_path / FILE_NAME)[0].steps == tuple(range(3, 11))


def test_a_run_of_one_process_measures_its_waits(tmp_path):
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 4, "checkpoint.every": 0, "data.source": "random"})
    summary = runs.train_here(settings)
    records = runs.records_of(settings)
    for record in records[1:-1]:
        assert record["input_seconds"] > 0 and record["result_seconds"] > 0
        assert record["input_seconds"] + record["result_seconds"] <= record["step_seconds"]
    assert summary["step_time_changes"] == [] and summary["watch_seconds_per_step"] >= 0
    # checkpoint.every=0: of a run that is only measured, nothing is kept.
    assert summary["checkpoint"] is None and summary["checkpoint_reason"] == "checkpoint.every=0"
    assert not list((runs.run_dir(settings) / "checkpoints").glob("step*"))


def test_settings_that_no_run_can_have():
    with pytest.raises(ValueError, match=r"stragglers\.every=-1 must be at least 0"):
        runs.run_of({**runs.DENSE, "data.source": "random", "stragglers.every": -1})


def train_with_eight_processes(folder: Path, pauses: list[float], steps: int) -> runs.Settings:
    """A run whose steps are mostly each host's sleep over its batch: eight processes on few cores have no other time of
    their own."""
    settings = runs.prepare(
        folder,
        {
            **runs.DENSE,
            "model.num_layers": 1,
            "data.source": "random",
            "steps": steps,
            "checkpoint.every": 0,
            "mesh.fsdp": 1,
            "mesh.data": 8,
            "tensorboard": False,
            "distributed.mode": "coordinator",
            "distributed.coordinator_address": coordinator_address(),
            "distributed.num_processes": 8,
        },
    )
    processes = [
        start(
            ["-m", "tests.training.slow_host", str(pause), *runs.arguments({**settings, "distributed.process_id": i})],
            devices=1,
        )
        for i, pause in enumerate(pauses)
    ]
    results = finish(processes, timeout=800)
    assert [result.returncode for result in results] == [0] * 8, results[0].stderr[-3000:]
    return settings


# Two shared cores: 150 s and 230 s.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_processes_wait_for_the_one_that_is_a_tenth_slower(tmp_path):
    settings = train_with_eight_processes(tmp_path, [1.1 if host == 5 else 1.0 for host in range(8)], 30)
    found = runs.records_of(settings, "summary")[0]["stragglers"]
    assert [(one["host"], one["signal"]) for one in found] == [(5, "barrier")]
    assert found[0]["named_step"] <= 20 and found[0]["where"] == "its input"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_steps_of_eight_equal_processes_raise_no_alarm(tmp_path):
    settings = train_with_eight_processes(tmp_path, [0.3] * 8, 200)
    assert runs.records_of(settings, "summary")[0]["stragglers"] == []
