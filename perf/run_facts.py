"""What a training run wrote down about itself: its metrics, its goodput and its settings."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.goodput import FILE_NAME

METRICS_FILE = "metrics.jsonl"

# After a start, the first steps load programs and fill the input's queues.
WARMUP = 2


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """Medians and means over the steps of the last attempt that count; None where the run has no such figure.

    Seconds are of a step. `expert_load_max`: of the busiest expert, over the mean. `dropped`: share of routed tokens.
    """

    folder: Path
    steps: int
    measured: int
    """Steps that the figures are over: neither the first ones nor profiled."""
    step_seconds: float | None
    input_seconds: float | None
    """A step's wait for its batch, with nothing left to do on the device."""
    mfu: float | None
    mfu_reason: str | None
    hfu: float | None
    expert_load_max: float | None
    dropped: float | None
    num_devices: int | None
    chip: str | None
    summary: Mapping[str, Any]
    """The record that ended the run; empty where it has not ended."""


def is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file()


def runs_in(folder: Path) -> str:
    """Names of the runs inside a folder, for an error."""
    return ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{METRICS_FILE}"))) or "none"


def read_run(folder: Path) -> RunFacts:
    """Raises ValueError for a folder without the metrics of a training run, or whose metrics have no step."""
    path = folder / METRICS_FILE
    if not is_run(folder):
        raise ValueError(f"{folder} is no folder of a training run: it has no {METRICS_FILE}")
    records = read_lines(path)
    steps = [record for record in records if record.get("event") == "train"]
    if not steps:
        raise ValueError(f"{path} has no step: the run ended before the first one, or has not come to it")
    attempt = max(record["attempt"] for record in steps)
    last = [record for record in steps if record["attempt"] == attempt]
    counted = [record for record in last[WARMUP:] if record.get("step_seconds") and not record.get("profiled")]
    # A record with a reason in place of a rate had something other than steps in its interval.
    steady = [record for record in counted if not _interrupted(record)]
    summaries = [record for record in records if record.get("event") == "summary"]
    summary = summaries[-1] if summaries else {}
    return RunFacts(
        folder,
        max(record["step"] for record in last),
        len(steady),
        _median(steady, "step_seconds"),
        input_seconds(folder / FILE_NAME, [record["step"] for record in steady]),
        _summarised(summary, steady, "mfu"),
        summary.get("mfu_reason"),
        _summarised(summary, steady, "hfu"),
        _median(steady, "expert_load_max"),
        _median(steady, "dropped"),
        summary.get("num_devices"),
        summary.get("chip"),
        summary,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; a kill may have left half of the last one."""
    found = []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is no JSON: {error}; the lines before it are whole") from error
        if isinstance(record, dict):
            found.append(record)
    return found


def _interrupted(record: Mapping[str, Any]) -> bool:
    return str(record.get("tokens_per_second_reason", "")).startswith("something other")


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


def _summarised(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The summary's, which is over all steps together; else the last step's that has it."""
    if summary.get(name) is not None:
        return summary[name]
    values = [record[name] for record in records if record.get(name) is not None]
    return values[-1] if values else None


def input_seconds(path: Path, steps: Sequence[int]) -> float | None:
    """Mean seconds that each of `steps` waited for its batch, from the ledger of goodput: what its bucket grew by."""
    if not path.is_file():
        return None
    waited: dict[int, float] = {}
    for line in read_lines(path):
        if line.get("event") == "attempt":
            waited = {}
        elif line.get("event") == "mark" and line.get("step") is not None:
            waited[line["step"]] = line["nanoseconds"].get("input_wait", 0) / 1e9
    # A batch is taken before its step is done, and the step's line is written one step late: within a span of steps
    # both ends are.
    known = [waited[step] - waited[step - 1] for step in steps if step in waited and step - 1 in waited]
    return statistics.fmean(known) if known else None


def run_settings(folder: Path) -> Mapping[str, Any] | None:
    """Settings of the run, from its newest checkpoint; None where there is none."""
    found = sorted(folder.glob("checkpoints/step_*/manifest.json"))
    if not found:
        return None
    try:
        manifest = json.loads(found[-1].read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{found[-1]} is damaged: {error}") from error
    return manifest.get("run_config") if isinstance(manifest, dict) else None
