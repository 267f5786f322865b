"""A whole run: what it prints, what it leaves on disk, and what its numbers have to agree with."""

import contextlib
import dataclasses
import gzip
import io
import math
import time
from typing import Any

import numpy as np
import pytest

from checkpoint.store import CheckpointReader
from data import load_tokenizer
from data.sources import is_heldout
from perf.fleet_store import open_store
from perf.flops import count_params
from perf.goodput import BUCKETS, read_goodput
from tests.training import runs
from training import loop

# What the last line of stdout always has.
KEYS = {
    *("event", "config", "steps", "num_devices", "params", "active_params", "checkpoint", "goodput", "scaling_tax"),
    *("tokens_per_second", "tokens_per_second_per_device", "mfu", "mfu_palm", "hfu", "peak_flops_per_device"),
    *("peak_source", "loss_first", "loss_last", "eval_loss", "bits_per_byte", "gzip_bits_per_byte"),
}


@dataclasses.dataclass
class Finished:
    settings: runs.Settings
    summary: dict[str, Any]
    stdout: str
    stderr: str
    wall: float
    """Seconds of the run, by the test's clock."""
    compilations: list[int]
    """How many there had been when each batch was asked for."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    changes = {"checkpoint.every": 5, "steps": 14, "evaluation.every": 6, "evaluation.batches": 1, "sample.tokens": 4}
    settings = runs.prepare(tmp_path_factory.mktemp("run"), {**runs.MOE, **changes})
    compilations = []
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        count_compilations(patch, compilations)
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        began = time.monotonic()
        summary = runs.train_here(settings)
        wall = time.monotonic() - began
    return Finished(settings, summary, out.getvalue(), err.getvalue(), wall, compilations)


def count_compilations(patch: pytest.MonkeyPatch, counts: list[int]) -> None:
    next_batch = loop.Trainer.next_batch

    def counted(trainer: loop.Trainer):
        counts.append(len(runs.COMPILATIONS))
        return next_batch(trainer)

    patch.setattr(loop.Trainer, "next_batch", counted)


def test_the_last_line_is_the_summary(finished: Finished) -> None:
    printed = runs.summary_in(finished.stdout)
    assert printed == {"event": "summary", **finished.summary}
    assert printed.keys() >= KEYS
    unknown = [name for name, value in printed.items() if value is None]
    assert unknown == ["scaling_tax"]
    assert printed["scaling_tax_reason"]


def test_every_number_is_of_this_run(finished: Finished) -> None:
    summary, settings = finished.summary, finished.settings
    params = count_params(runs.run_of(settings).model)
    assert (summary["config"], summary["steps"], summary["num_devices"]) == ("tiny", settings["steps"], 8)
    assert (summary["params"], summary["active_params"]) == params
    assert summary["tokens_per_second_per_device"] == pytest.approx(summary["tokens_per_second"] / 8)
    for name in ("mfu", "mfu_palm", "hfu"):
        flops = summary[f"{name}_numerator_flops"]
        peak = summary["peak_flops_per_device"]
        assert summary[name] == pytest.approx(flops / summary["measured_seconds"] / 8 / peak)
        assert 0 < summary[name] < 1
    assert "measured" in summary["peak_source"] and summary["peak_dtype"] == "float32"
    assert 0 < summary["goodput"] < 1


def test_each_step_is_reported_once_and_the_last_one_too(finished: Finished) -> None:
    records = runs.records_of(finished.settings)
    assert [record["step"] for record in records] == list(range(1, finished.settings["steps"] + 1))
    assert finished.summary["loss_first"] == records[0]["loss"]
    assert finished.summary["loss_last"] == records[-1]["loss"]
    assert finished.stderr.count("\nstep ") == len(records)


def test_the_model_learns(finished: Finished) -> None:
    losses = list(runs.losses_of(finished.settings).values())
    assert losses[0] == pytest.approx(math.log(288), abs=0.1)  # A uniform guess over the vocabulary.
    assert losses[-1] < losses[0] - 1
    assert finished.summary["eval_loss"] < losses[0] - 1
    *partial, whole = runs.records_of(finished.settings, "eval")
    assert [record["step"] for record in (*partial, whole)] == [6, 12, finished.settings["steps"]]
    # One batch is not all of the held-out text.
    assert [record["bits_per_byte"] for record in partial] == [None, None]
    assert whole["bits_per_byte"] == finished.summary["bits_per_byte"]


def test_bits_per_byte_counts_every_held_out_token_and_byte(finished: Finished) -> None:
    tokenizer = load_tokenizer(runs.run_dir(finished.settings) / "tokenizer.json", "<|end|>")
    texts = [path.read_text() for path in sorted((finished.settings["cache_dir"].parent / "corpus").iterdir())]
    heldout = [text for text in texts if is_heldout(text, finished.settings["data.heldout_fraction"])]
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in heldout)
    content = "".join(heldout).encode()
    expected = finished.summary["eval_loss"] / math.log(2) * tokens / len(content)
    assert finished.summary["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    gzipped = 8 * len(gzip.compress(content, 9)) / len(content)
    assert finished.summary["gzip_bits_per_byte"] == pytest.approx(gzipped, rel=1e-6)


def test_goodput_buckets_sum_to_wall_time(finished: Finished) -> None:
    summary = finished.summary
    parts = [summary[f"goodput_{name}_seconds"] for name in BUCKETS]
    wall = summary["goodput_wall_seconds"]
    assert sum(parts) == pytest.approx(wall)
    assert wall == pytest.approx(finished.wall, abs=2.0)
    assert summary["goodput"] == pytest.approx(summary["goodput_step_seconds"] / wall)
    assert summary["goodput_lost_work_seconds"] == 0
    for name in ("startup", "compile", "step", "eval", "checkpoint"):
        assert summary[f"goodput_{name}_seconds"] > 0
    # What no bucket claims must stay small, or the ledger explains nothing.
    assert summary["goodput_other_seconds"] < 0.5 * wall
    on_disk = read_goodput(runs.run_dir(finished.settings))
    assert on_disk.attempts == 1
    assert on_disk.wall_nanoseconds / 1e9 >= wall


def test_what_a_run_leaves_on_disk(finished: Finished) -> None:
    folder = runs.run_dir(finished.settings)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.jsonl",
        "goodput.jsonl",
        "tokenizer.json",
        "tensorboard",
        "checkpoints",
    }
    assert all(path.stat().st_size > 1000 for path in (folder / "tensorboard").iterdir())
    reader = CheckpointReader(folder / "checkpoints", architecture=None, on_note=pytest.fail)
    assert reader.list_steps() == [5, 10, 14]
    assert str(reader.latest().path) == finished.summary["checkpoint"]
    manifest = reader.latest().manifest
    assert manifest.data_state["next_step"] == 14
    assert manifest.metrics["eval_loss"] == finished.summary["eval_loss"]
    assert manifest.run_config["data"]["batch_size"] == 8


def test_nothing_compiles_after_the_first_step(finished: Finished) -> None:
    """But the first checkpoint and the first evaluation: neither the second ones, nor any step."""
    counts = np.asarray(finished.compilations)
    assert counts[0] > 0  # The listener hears.
    # Batches asked for right after the checkpoint of step 5 and the evaluation of step 6.
    more = set(np.flatnonzero(np.diff(counts)) + 1)
    assert more <= {5, 6}


def test_a_finished_run_is_complete_and_says_so(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    summary = runs.train_here(finished.settings)
    assert summary["steps"] == finished.settings["steps"]
    assert (summary["loss_first"], summary["tokens_per_second"]) == (None, None)
    assert "already complete" in summary["loss_first_reason"]
    assert summary["eval_loss"] == finished.summary["eval_loss"]
    printed = runs.summary_in(capsys.readouterr().out)
    assert all(f"{name}_reason" in printed for name, value in printed.items() if value is None)


def test_the_scaling_tax_comes_from_the_store_of_the_fleet(tmp_path):
    store = tmp_path / "fleet.sqlite"
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 6, "data.source": "random", "fleet": store})
    alone = runs.train_here(settings)
    assert alone["scaling_tax"] is None and "no run of this config on fewer devices" in alone["scaling_tax_reason"]
    (made,) = open_store(store).read().records
    open_store(store).append(dataclasses.replace(made, id="smaller", num_devices=4, mfu=0.5))
    taxed = runs.train_here({**settings, "name": "again"})
    assert taxed["scaling_tax"] == pytest.approx(1 - taxed["mfu"] / 0.5)
    assert (taxed["scaling_tax_base_devices"], taxed["scaling_tax_base_runs"]) == (4, 1)
    assert [record.scaling_tax for record in open_store(store).read().records if record.config == "again"] == [
        pytest.approx(taxed["scaling_tax"])
    ]
