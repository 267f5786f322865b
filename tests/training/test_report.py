"""Reports are complete, machine-readable, survive kills and full disks, and leave the terminal as it was."""

import io
import json
import math
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from parallel import distributed
from training import report
from training.report import Reporter

ROOT = Path(__file__).resolve().parents[2]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir: Path) -> list[Event]:
    """Every event under the run's TensorBoard directory; TFRecord framing: u64 length, u32 crc, data, u32 crc."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        stream = io.BytesIO(path.read_bytes())
        while header := stream.read(12):
            found.append(Event.FromString(stream.read(int.from_bytes(header[:8], "little"))))
            stream.read(4)
    return found


def quiet(run_dir: Path, **options) -> Reporter:
    return Reporter(run_dir, console="quiet", total_steps=10, **options)


def test_a_record_is_in_the_file_at_once_and_in_tensorboard_at_close(tmp_path):
    with quiet(tmp_path / "run") as reporter:
        reporter.log(1, {"loss": 2.5, "note": "warm", "load": np.array([1, 2])})
        (record,) = records(tmp_path / "run")
        assert record.pop("time") > 1.7e9
        assert record == {"event": "train", "step": 1, "attempt": 1, "loss": 2.5, "note": "warm", "load": [1, 2]}
        reporter.log(2, {"loss": jnp.bfloat16(1.5)}, event="eval")
    scalars = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events(tmp_path / "run")[1:]]
    assert scalars == [(1, "train/loss", 2.5), (2, "eval/loss", 1.5)]


def test_tensorboard_can_be_left_out(tmp_path):
    with quiet(tmp_path, tensorboard=False) as reporter:
        reporter.log(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_appends_under_the_next_attempt_and_drops_a_torn_line(tmp_path):
    with quiet(tmp_path) as reporter:
        reporter.log(1, {"loss": 3.0})
        reporter.log(2, {"loss": 2.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    with quiet(tmp_path) as reporter:
        assert reporter.attempt == 2
        reporter.resume(1)
        reporter.log(2, {"loss": 2.1})
    assert [(r["step"], r["attempt"], r["loss"]) for r in records(tmp_path)] == [(1, 1, 3.0), (2, 1, 2.0), (2, 2, 2.1)]
    restarts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert restarts == [2], "TensorBoard hides what the first attempt wrote from step 2 on"


def test_a_file_that_is_only_a_torn_line_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event"')
    with quiet(tmp_path) as reporter:
        reporter.log(1, {"loss": 3.0})
    assert [(r["attempt"], r["step"]) for r in records(tmp_path)] == [(1, 1)]


@pytest.mark.parametrize("content", ["loss,step\n1,2\n", '{"step": 1}\n', "[1]\n", "x" * (report.LONGEST_RECORD + 1)])
def test_a_foreign_metrics_file_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not end in a record of a run"):
        quiet(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_long_file_is_resumed_from_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LONGEST_RECORD", 200)
    for attempt in (1, 2):
        with quiet(tmp_path) as reporter:
            for step in range(20):
                reporter.log(step, {"loss": 1.0})
            assert reporter.attempt == attempt
    assert len(records(tmp_path)) == 40


def test_full_disk_is_named_and_the_file_stays_readable(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"metrics can't be written .* goes on from its last checkpoint"
    with pytest.raises(OSError, match=message) as failure, quiet(tmp_path) as reporter:
        reporter.log(1, {"loss": 3.0})
        limit = (tmp_path / "metrics.jsonl").stat().st_size + 30
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            reporter.log(2, {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure.value.filename == str(tmp_path / "metrics.jsonl")
    with quiet(tmp_path) as reporter:
        assert reporter.attempt == 2
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_run_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"run directory .*run can't be written"):
        quiet(tmp_path / "run")


def test_summary_is_the_last_line_of_stdout_and_strict_json(tmp_path, capsys):
    with Reporter(tmp_path, console="plain", total_steps=10) as reporter:
        reporter.say("def f():", results=True)
        reporter.say("a remark")
        reporter.log(1, {"loss": 3.0})
        reporter.summary(
            {"loss_last": math.nan, "mfu": None, "mfu_reason": "unknown chip", "hfu": None, "steps": np.int64(1)}
        )
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "def f():"
    assert len(out.splitlines()) == 2
    summary = json.loads(out.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} in the summary"))
    assert summary == {
        "event": "summary",
        "loss_last": None,
        "loss_last_reason": "not finite: nan",
        "mfu": None,
        "mfu_reason": "unknown chip",
        "hfu": None,
        "hfu_reason": "not measured in this run",
        "steps": 1,
    }
    assert err.splitlines()[0] == "a remark"
    assert records(tmp_path)[-1]["event"] == "summary"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_any_record_becomes_strict_json_with_the_finite_part_unchanged(record):
    clean = report.finite(record)
    json.dumps(clean, allow_nan=False)
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            assert clean[name] is None
            assert clean[f"{name}_reason"] == f"not finite: {value}" or f"{name}_reason" in record
        elif not isinstance(value, list | dict):
            assert clean[name] == value


def test_close_twice_and_then_silence(tmp_path, capsys):
    reporter = quiet(tmp_path)
    reporter.close()
    reporter.close()
    reporter.log(1, {"loss": 1.0})
    reporter.summary({"steps": 1})
    assert records(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    with Reporter(tmp_path / "run", console="plain", total_steps=10) as reporter:
        reporter.resume(3)
        reporter.log(1, {"loss": 1.0})
        reporter.say("text", results=True)
        reporter.summary({"steps": 1})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_plain_lines_are_aligned(tmp_path, capsys):
    with Reporter(tmp_path, console="auto", total_steps=1000) as reporter:
        reporter.log(5, {"loss": 10.25, "tokens_per_second": 1234.0, "mfu": 0.5123, "learning_rate": 3e-4})
        reporter.log(10, {"loss": math.nan, "tokens_per_second": 2.5e6, "mfu": None, "learning_rate": 1e-5})
        reporter.log(10, {"loss": 2.5, "documents": 7}, event="eval")
    first, second, evaluation = capsys.readouterr().err.splitlines()
    assert first == "step    5/1000 | loss  10.2500 |  1.23k tok/s | mfu  51.2% | lr 3.00e-04 | eta        -"
    assert second.startswith("step   10/1000 | loss        - |   2.5M tok/s | mfu      - | lr 1.00e-05 | eta  0:00:")
    assert len(first) == len(second)
    assert evaluation == "eval   10/1000 | loss 2.5 | documents 7"


def test_eta_is_the_pace_since_the_first_record(monkeypatch):
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    display = report.Display("quiet", total_steps=20)
    assert [display._eta(step) for step in (1, 6, 11)] == [None, 10 / 5 * 14, 30 / 10 * 9]


def test_numbers_for_people():
    assert [report.si(n) for n in (0, 12.34, 999.4, 999.96, 12345, 2.5e6, 989.4e12)] == [
        "0",
        "12.3",
        "999",
        "1k",
        "12.3k",
        "2.5M",
        "989T",
    ]
    assert [report.clock(s) for s in (0.4, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]


TERMINAL = """
import sys, pathlib
from training.report import Reporter
with Reporter(pathlib.Path(sys.argv[1]), total_steps=10, tensorboard=False) as reporter:
    for step in range(1, 5):
        reporter.log(step, {"loss": 1.0 / step})
    reporter.say("[bold]kept as it is[/bold]")
    print("from elsewhere")
    reporter.say("a result", results=True)
    reporter.log(4, {"loss": 0.5}, event="eval")
    raise KeyboardInterrupt
"""


def test_a_terminal_gets_a_live_display_and_is_given_back_on_an_exception(tmp_path):
    """stderr is a pseudo-terminal, stdout a pipe: nothing for people reaches stdout."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        cwd=ROOT,
    )
    os.close(theirs)
    screen = b""
    while chunk := read_terminal(ours):
        screen += chunk
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert out == b"from elsewhere\na result\n"
    text = screen.decode()
    assert "[bold]kept as it is[/bold]" in text
    assert "eval  4/10 | loss 0.5" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0, "the cursor is shown again"
    after = text[text.rindex("\x1b[?25h") :]
    assert "step  4/10 | loss   0.2500" in after, "the last line stays"
    assert "KeyboardInterrupt" in after


def read_terminal(descriptor: int) -> bytes:
    """What the other side wrote, b"" once it is closed (Linux reports that as EIO)."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
