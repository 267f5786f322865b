"""`train.py --profile FIRST:LAST`: the trace of a window, and what its run says of it."""

import json
from pathlib import Path

from jax.profiler import ProfileData

from tests.training import runs


def steps_of(trace: Path) -> set[int]:
    """Numbers of the steps on the trace's timeline."""
    events = (e for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines for e in line.events)
    return {int(value) for e in events if e.name == "train" for name, value in e.stats if name == "step_num"}


def test_a_window_is_captured_and_does_not_count(tmp_path):
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 8, "profile": "4:6", "checkpoint.every": 20})
    summary = runs.train_here(settings)
    folder = runs.run_dir(settings) / "profiles" / "steps-4-6"
    note = json.loads((folder / "capture.json").read_text())
    assert (note["kind"], note["first_step"], note["last_step"]) == ("train", 4, 6)
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


def test_a_run_that_is_not_profiled_says_so(tmp_path):
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 4, "data.source": "random"})
    assert runs.train_here(settings)["profiled"] is False
    assert not (runs.run_dir(settings) / "profiles").exists()
