"""Two processes of one run, four devices each: the batches and losses of one process with eight."""

import signal
from pathlib import Path

import pytest

from tests.parallel.two_processes import coordinator_address, finish, start
from tests.training import runs

# The expert axis spans both processes: tokens cross from one to the other in every layer.
SETTINGS: runs.Settings = {
    **runs.MOE,
    "model.moe.num_experts": 8,
    "mesh.expert": 8,
    "steps": 16,
    "checkpoint.every": 3,
    "evaluation.every": 2,
}


def start_both(settings: runs.Settings, records: list[Path]):
    address = coordinator_address()
    settings = {
        **settings,
        "distributed.mode": "coordinator",
        "distributed.coordinator_address": address,
        "distributed.num_processes": 2,
    }
    return [
        start(["-m", "tests.training.runs", str(record), *runs.arguments({**settings, "distributed.process_id": i})])
        for i, record in enumerate(records)
    ]


def test_two_processes_stop_together_and_one_goes_on(tmp_path: Path) -> None:
    whole = runs.prepare(tmp_path / "whole", SETTINGS)
    uninterrupted = runs.train_here(whole, record=tmp_path / "batches")
    batches, losses = runs.batches_of(tmp_path / "batches"), runs.losses_of(whole)

    settings = runs.prepare(tmp_path / "both", SETTINGS)
    records = [tmp_path / f"record{i}" for i in range(2)]
    processes = start_both(settings, records)
    try:
        runs.wait_until(lambda: runs.lines_in(records[1]) >= 5, processes[1], timeout=200)
    finally:
        # One process alone is told; both must stop, after the same step.
        processes[1].send_signal(signal.SIGTERM)
        results = finish(processes)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    stopped_at = runs.lines_in(records[0])
    assert 5 <= stopped_at == runs.lines_in(records[1]) < SETTINGS["steps"]
    assert runs.batches_of(*records) == batches[:stopped_at]
    assert runs.losses_of(settings) == pytest.approx(
        {step: losses[step] for step in range(1, stopped_at + 1)}, rel=1e-5
    )
    summary = runs.summary_in(results[0].stdout)
    assert (summary["stopped"], summary["steps"], summary["num_devices"]) == ("SIGTERM", stopped_at, 8)
    assert '"event"' not in results[1].stdout  # Gloo's own lines are all that it prints.
    mine, theirs = (runs.records_of(each, "eval") for each in (whole, settings))
    assert len(theirs) == stopped_at // SETTINGS["evaluation.every"]
    for ours, other in zip(mine, theirs, strict=False):
        assert other["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)

    summary = runs.train_here(settings, record=tmp_path / "alone")
    assert runs.batches_of(tmp_path / "alone") == batches[stopped_at:]
    assert runs.losses_of(settings) == pytest.approx(losses, rel=1e-5)
    assert summary["eval_loss"] == pytest.approx(uninterrupted["eval_loss"], rel=1e-5)
