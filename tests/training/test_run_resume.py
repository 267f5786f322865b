"""A run that is killed, stopped or moved goes on as if nothing had happened: the same batches, the same losses."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.store import CheckpointReader
from tests.parallel.two_processes import finish, start
from tests.training import runs

SETTINGS: runs.Settings = {**runs.MOE, "steps": 16, "checkpoint.every": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, str]], dict[int, float], dict[str, Any]]:
    """Batches, losses and summary of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    settings = runs.prepare(folder, SETTINGS)
    summary = runs.train_here(settings, record=folder / "batches")
    return runs.batches_of(folder / "batches"), runs.losses_of(settings), summary


@contextlib.contextmanager
def started(settings: runs.Settings, record: Path, *words: str, devices: int = 8) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which does not outlive the block."""
    process = start(["-m", "tests.training.runs", str(record), *words, *runs.arguments(settings)], devices=devices)
    with process:
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(number)
    (result,) = finish([process])
    return result.returncode, result.stdout, result.stderr


def newest(settings: runs.Settings) -> int:
    """Step of the newest complete checkpoint, 0 for none."""
    folder = runs.run_dir(settings) / "checkpoints"
    return max(CheckpointReader(folder, architecture=None, on_note=pytest.fail).list_steps(), default=0)


def test_kill_at_any_moment_and_resume(whole, tmp_path: Path) -> None:
    """Killed in the middle of a save, then at a random moment; finished on 8 devices, and on 4."""
    batches, losses, _ = whole
    settings = runs.prepare(tmp_path, SETTINGS)
    checkpoints = runs.run_dir(settings) / "checkpoints"

    record = tmp_path / "mid-save"
    with started(settings, record, "--hold-save", "6") as process:
        runs.wait_until(lambda: any(checkpoints.glob("step_*6.orbax-checkpoint-tmp*/d")), process)
        assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert any(checkpoints.glob("step_*6.orbax-checkpoint-tmp*"))
    assert newest(settings) == 3
    assert runs.batches_of(record) == batches[: runs.lines_in(record)]
    assert runs.losses_of(settings).items() <= losses.items()

    record = tmp_path / "random"
    draw = random.Random()
    wanted, pause = draw.randint(1, 10), draw.uniform(0, 0.1)
    with started(settings, record) as process:
        runs.wait_until(lambda: runs.lines_in(record) >= wanted, process)
        time.sleep(pause)
        assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    seen = runs.batches_of(record)
    assert seen == batches[3 : 3 + len(seen)], f"killed {pause} s after batch {wanted}"
    assert runs.losses_of(settings).items() <= losses.items()

    after = newest(settings)
    elsewhere = {**settings, "runs_dir": tmp_path / "elsewhere"}
    shutil.copytree(settings["runs_dir"], elsewhere["runs_dir"])
    with started(elsewhere, tmp_path / "four", devices=4) as process:
        summary = runs.train_here(settings, record=tmp_path / "eight")
        assert runs.batches_of(tmp_path / "eight") == batches[after:]
        assert runs.losses_of(settings) == losses
        check_summary_of_attempts(summary, whole[2], attempts=3)
        (result,) = finish([process])
    assert result.returncode == 0, result.stderr
    assert runs.batches_of(tmp_path / "four") == batches[after:]
    on_four = runs.losses_of(elsewhere)
    assert on_four == pytest.approx(losses, rel=1e-4)
    summary = runs.summary_in(result.stdout)
    assert summary["num_devices"] == 4
    assert summary["eval_loss"] == pytest.approx(whole[2]["eval_loss"], rel=1e-4)


def check_summary_of_attempts(summary: dict[str, Any], uninterrupted: dict[str, Any], attempts: int) -> None:
    for name in ("steps", "loss_last", "eval_loss", "bits_per_byte"):
        assert summary[name] == uninterrupted[name], name
    assert summary["goodput_attempts"] == attempts
    assert summary["goodput_restore_seconds"] > 0
    assert summary["goodput_lost_work_seconds"] > 0


def test_sigterm_saves_and_the_run_goes_on(whole, tmp_path: Path) -> None:
    batches, losses, uninterrupted = whole
    settings = runs.prepare(tmp_path, {**SETTINGS, "checkpoint.every": 1000})
    with started(settings, tmp_path / "first") as process:
        runs.wait_until(lambda: runs.lines_in(tmp_path / "first") >= 4, process)
        status, stdout, stderr = end(process, signal.SIGTERM)
    assert status == 0, stderr
    summary = runs.summary_in(stdout)
    stopped_at = summary["steps"]
    assert 4 <= stopped_at < SETTINGS["steps"]
    assert summary["stopped"] == "SIGTERM"
    assert summary["eval_loss"] is None and "SIGTERM" in summary["eval_loss_reason"]
    assert summary["checkpoint"].endswith(f"step_{stopped_at:010d}")
    assert f"SIGTERM: saving after step {stopped_at}" in stderr
    assert newest(settings) == stopped_at

    summary = runs.train_here(settings, record=tmp_path / "second")
    assert runs.batches_of(tmp_path / "first") == batches[:stopped_at]
    assert runs.batches_of(tmp_path / "second") == batches[stopped_at:]
    assert runs.losses_of(settings) == losses
    assert "stopped" not in summary
    assert (summary["loss_last"], summary["eval_loss"]) == (uninterrupted["loss_last"], uninterrupted["eval_loss"])
    # Nothing was lost, and everything was done once.
    assert summary["goodput_lost_work_seconds"] == pytest.approx(0, abs=0.2)


def test_fresh_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    settings = runs.prepare(tmp_path, {**runs.DENSE, "data.source": "random", "steps": 4, "fresh": True})
    first = runs.train_here(settings)
    again = runs.train_here(settings)
    assert again["loss_first"] == first["loss_first"] and again["goodput_attempts"] == 1
    assert sorted(path.name for path in settings["runs_dir"].iterdir()) == ["tiny", "tiny.1"]
    assert runs.losses_of(settings) == runs.losses_of({**settings, "name": "tiny.1"})
    # Random tokens have no held-out documents, and the summary says so.
    assert again["eval_loss"] is None and again["eval_loss_reason"] == "the data has no held-out documents"
