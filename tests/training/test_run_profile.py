"""`train.py --profile FIRST:LAST`: the trace of a window, and what its run says of it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

from tests.training import runs
from training.profile import ProfiledWindow

READ = """
import sys
from jax.profiler import ProfileData

data = ProfileData.from_file(sys.argv[1])
for plane in data.planes:
    for line in plane.lines:
        for event in line.events:
            if event.name == "train":
                print(dict(event.stats)["step_num"])
"""


def steps_of(trace: Path) -> set[int]:
    """Numbers of the steps on the trace's timeline. By a process of its own: one that has captured a trace aborts where
    it reads one with JAX 0.11.2."""
    command = ["env", "JAX_PLATFORMS=cpu", sys.executable, "-c", READ, str(trace)]
    return {int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}


def test_a_window_is_captured_and_does_not_count(tmp_path):
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 8, "profile": "4:6", "checkpoint.every": 20})
    summary = runs.train_here(settings)
    folder = runs.run_dir(settings) / "profiles" / "steps-4-6"
    note = json.loads((folder / "capture.json").read_text())
    assert (note["kind"], note["first_step"], note["last_step"]) == ("train", 4, 6)
    assert note["mesh"]["fsdp"] == 8 and note["settings"]["layers"]["scan"] is True
    # What the ops on its timeline are.
    assert gzip.decompress((folder / "step.hlo.gz").read_bytes()).startswith(b"HloModule jit_step")
    traces = list(folder.rglob("*.xplane.pb"))
    assert len(traces) == 1 and steps_of(traces[0]) == {4, 5, 6}
    assert list(folder.rglob("perfetto_trace.json.gz"))
    records = {record["step"]: record for record in runs.records_of(settings)}
    assert [step for step, record in records.items() if record.get("profiled")] == [4, 5, 6]
    # Two warm up; the profiler's time is in those of the window, and that of writing the trace in the next one's.
    assert summary["profiled"] is True and summary["measured_steps"] == 1
    # A window of steps that were done before is not captured by halves.
    again = runs.train_here({**settings, "steps": 9})
    assert again["profiled"] is False and again["steps"] == 9


def test_a_window_opens_once_and_after_the_steps_that_warm_up(tmp_path):
    window = ProfiledWindow("4:6", tmp_path)
    assert [step for step in range(1, 9) if window.opens(step, start=0)] == [4]
    # Attempts that went on after a step.
    assert window.opens(4, start=1) and not window.opens(4, start=2)
    assert not any(ProfiledWindow(None, tmp_path).opens(step, start=0) for step in range(9))


def test_a_run_that_is_not_profiled_says_so(tmp_path):
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 4, "data.source": "random"})
    assert runs.train_here(settings)["profiled"] is False
    assert not (runs.run_dir(settings) / "profiles").exists()
