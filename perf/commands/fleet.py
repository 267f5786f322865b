"""Records of finished runs: adds one to a store, draws the fleet, and holds a run against those before it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from perf.command import Output
from perf.fleet import By, check, find_run, select
from perf.fleet_report import check_report, fleet_report, record_report
from perf.fleet_store import Contents, open_store
from perf.records import from_summary
from perf.report import Report
from perf.run_facts import METRICS_FILE, is_run, runs_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Output):
    """Adds a finished run to a store. Runs started with --fleet have done so themselves."""

    run: tyro.conf.Positional[str]
    """Folder of a training run, or a JSON file: the last line of train.py or of serve.py --bench."""
    store: str
    """File NAME.sqlite, or a folder (which many hosts may write)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey(Output):
    """Utilisation across slice sizes or versions, and the reality tax: the best run beside what the fleet gets."""

    store: str
    """File NAME.sqlite, or a folder."""
    config: str | None = None
    """Config by name or settings hash; all by default."""
    chip: str | None = None
    """Chip as recorded; all by default."""
    by: By = "size"
    """Rows of a table: numbers of devices, or versions of jax and our own commit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(Output):
    """Regression gate: a run against the runs of its settings, chip and size before it.

    Exit status 0: no regression; 1: regression; 2: not judged (too few records, or an error).
    """

    store: str
    """File NAME.sqlite, or a folder."""
    run: str = "LAST"
    """The run: LAST, or an id as the report's JSON has them (its start or end will do)."""
    config: str | None = None
    """LAST of this config, by name or settings hash."""
    chip: str | None = None
    """LAST on this chip."""
    metrics: tuple[str, ...] | None = None
    """What is judged; by default mfu of a training run, decode_mbu_* and ttft_* of a bench."""
    threshold: float = 0.02
    """Smallest loss that counts, as a share of the baseline's median."""
    false_alarms: float = 0.02
    """Chance that a run like those before it is called a regression, over all metrics."""


Settings = (
    Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Survey, tyro.conf.subcommand("report")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


def report(settings: Record | Survey | Check) -> Report:
    """Raises ValueError for a store, run, config or chip that is not there, with what is; OSError for a full disk."""
    if isinstance(settings, Record):
        record = from_summary(read_summary(Path(settings.run)))
        is_new = open_store(settings.store, create=True).append(record)
        return record_report(record, settings.store, is_new)
    contents = read_store(settings.store)
    records = select(contents.records, config=settings.config, chip=settings.chip)
    if isinstance(settings, Survey):
        return fleet_report(records, settings.store, settings.by, contents.refused)
    result = check(
        records,
        find_run(records, settings.run),
        metrics=settings.metrics,
        rate=settings.false_alarms,
        threshold=settings.threshold,
    )
    return check_report(
        result, settings.store, rate=settings.false_alarms, threshold=settings.threshold, refused=contents.refused
    )


def read_store(path: str) -> Contents:
    """Raises ValueError for a store without a record that can be read."""
    contents = open_store(path).read()
    if not contents.records:
        refused = "".join(f"; not read: {line}" for line in contents.refused)
        raise ValueError(f"store {path} has no records; a run with --fleet {path} adds one{refused}")
    return contents


def read_summary(path: Path) -> dict[str, Any]:
    """The summary that ended a run: the last one of its folder's metrics.jsonl, or a JSON file's.

    Raises ValueError for a path that has none.
    """
    if path.is_dir():
        metrics = path / METRICS_FILE
        if not is_run(path):
            raise ValueError(
                f"{path} is no folder of a training run (no {METRICS_FILE}); runs inside it: {runs_in(path)}"
            )
        summaries = [one for one in map(_object, metrics.read_text().splitlines()) if one.get("event") == "summary"]
        if not summaries:
            raise ValueError(f"{metrics} has no summary: the run has not ended; start it again, and it goes on")
        return summaries[-1]
    if not path.is_file():
        raise ValueError(f"no run at {path}; give a folder under runs/, or a JSON file with a summary")
    lines = path.read_text(errors="replace").strip()
    found = _object(lines) or _object(lines.rpartition("\n")[2])
    if not found:
        raise ValueError(f"{path} holds no JSON object; give a folder under runs/, or a JSON file with a summary")
    # A bench's line has its summary for the fleet as one of its fields.
    return found["fleet"] if isinstance(found.get("fleet"), dict) else found


def _object(text: str) -> dict[str, Any]:
    """A JSON object, empty for anything else: a kill leaves half a line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
