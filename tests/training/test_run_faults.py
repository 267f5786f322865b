"""What goes wrong during a run ends it with exit status 1 and a reason; the last checkpoint is there to go on from."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

import checkpoint.store
from tests.training import runs
from training import loop

SETTINGS: runs.Settings = {**runs.DENSE, "steps": 10, "checkpoint.every": 2, "data.heldout_fraction": 0.0}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of a run in which nothing goes wrong."""
    settings = runs.prepare(tmp_path_factory.mktemp("whole"), SETTINGS)
    runs.train_here(settings)
    return runs.losses_of(settings)


def failed(settings: runs.Settings, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a run that ends with status 1 and no summary."""
    capsys.readouterr()
    status = runs.main_here(settings)
    out, err = capsys.readouterr()
    assert (status, out) == (1, ""), err
    assert "Traceback" not in err
    return err[err.index("error: ") :]


def goes_on(settings: runs.Settings, losses: dict[int, float], after: int, capsys) -> None:
    """The run, started again, resumes after step `after` and ends as if nothing had happened."""
    capsys.readouterr()
    assert runs.main_here(settings) == 0
    out, err = capsys.readouterr()
    assert f"step_{after:010d} after step {after}\n" in err
    assert runs.summary_in(out)["steps"] == settings["steps"]
    assert runs.losses_of(settings) == losses


def at_step(patch: pytest.MonkeyPatch, step: int, action) -> None:
    """`action(trainer, batch) -> batch` with the batch of `step`, counted from 1."""
    next_batch = loop.Trainer.next_batch

    def patched(trainer: loop.Trainer):
        batch, documents = next_batch(trainer)
        if trainer.loader.next_step == step:
            batch = action(trainer, batch)
        return batch, documents

    patch.setattr(loop.Trainer, "next_batch", patched)


def test_bad_batch_stops_the_run(losses, tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, SETTINGS)

    def poison(trainer, batch):
        return {**batch, "weights": batch["weights"] * jnp.nan}

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, poison)
        error = failed(settings, capsys)
    assert error.startswith("error: step 6: loss nan, gradient norm nan; every layer's output is finite, and the loss")
    assert "the last checkpoint is intact" in error
    # Step 6 was not counted, and nothing after it was reported.
    assert list(runs.losses_of(settings)) == [1, 2, 3, 4, 5]
    goes_on(settings, losses, 4, capsys)


def test_bad_parameter_is_named(losses, tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, SETTINGS)

    def poison(trainer, batch):
        compiled = trainer.step

        def step(state, batch):
            state.params["blocks"][0]["mlp"]["up"] *= jnp.nan
            trainer.step = compiled
            return compiled(state, batch)

        trainer.step = step
        return batch

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, poison)
        error = failed(settings, capsys)
    assert re.match(r"error: step 5: .* parameter blocks/0/mlp/up is not finite before the step\.", error)
    goes_on(settings, losses, 4, capsys)


def test_absurd_learning_rate_names_a_layer(tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, {**SETTINGS, "optimizer.schedule.peak_lr": 1e30})
    error = failed(settings, capsys)
    assert re.match(r"error: step \d: .* nan.*; .*(output of layer \d|parameter \w+|gradient of \w+)", error), error
    assert "Lower optimizer.schedule.peak_lr" in error


def test_torn_checkpoint_is_passed_over(losses, tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, SETTINGS)
    runs.train_here(settings)
    newest = runs.run_dir(settings) / "checkpoints" / "step_0000000010"
    arrays = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-1])
    capsys.readouterr()
    summary = runs.train_here(settings)
    err = capsys.readouterr().err
    assert re.search(
        r"checkpoint of step 10 is torn and is not used: .* bytes.*; using the previous one, of step 8", err
    )
    assert runs.losses_of(settings) == losses
    assert [record["step"] for record in runs.records_of(settings) if record["attempt"] == 2] == [9, 10]
    # What was torn has been replaced.
    assert summary["checkpoint"] == str(newest)
    assert runs.train_here(settings)["loss_first_reason"].startswith("the run was already complete")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    # Lazily: a test that failed may still hold files open, and the mount must not outlive it.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_full_disk_stops_the_checkpoints(losses, small_disk: Path, tmp_path: Path, capsys) -> None:
    settings = {**runs.prepare(tmp_path / "run", SETTINGS), "checkpoint.directory": small_disk / "checkpoints"}

    def fill_disk(trainer, batch):
        trainer.store.wait()
        fill(small_disk)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, fill_disk)
        error = failed(settings, capsys)
    assert re.match(r"error: checkpoint of step 6 was not saved: .* of step 4, is intact", error), error
    (small_disk / "filler").unlink()
    goes_on(settings, losses, 4, capsys)


def test_full_disk_stops_the_metrics(losses, small_disk: Path, tmp_path: Path, capsys) -> None:
    settings = {**runs.prepare(tmp_path / "run", SETTINGS), "runs_dir": small_disk, "tensorboard": False}

    def fill_disk(trainer, batch):
        trainer.store.wait()
        fill(small_disk)
        while True:  # The file's last page is still its own.
            trainer.reporter.log(0, {}, event="filler")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, fill_disk)
        error = failed(settings, capsys)
    assert re.match(r"error: .*metrics can't be written \(No space left on device\); free space there", error), error
    assert "metrics.jsonl" in error
    (small_disk / "filler").unlink()
    goes_on(settings, losses, 4, capsys)


def test_checkpoint_that_does_not_fit_stops_the_run(losses, tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, SETTINGS)

    def fill_disk(trainer, batch):
        patch.setattr(checkpoint.store.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 6, fill_disk)
        error = failed(settings, capsys)
    assert re.match(r"error: checkpoint of step 6 was not saved: .* less is free; .* of step 4, is intact", error)
    goes_on(settings, losses, 4, capsys)
