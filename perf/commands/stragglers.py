"""Which host or device a run waits for, and when its step time changed, from what the run left in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from perf.change_point import Change, changes
from perf.command import Output
from perf.host_steps import FILE_NAME, HostSteps, read_hosts
from perf.report import Report
from perf.run_facts import METRICS_FILE, WARMUP, is_run, read_lines, runs_in
from perf.straggler_report import Findings, straggler_report
from perf.straggler_traces import TracedRun, read_window
from perf.stragglers import Straggler, StragglerJudge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Reads hosts.jsonl (runs of two processes or more), the step times, and traces of all processes (--profile)."""

    run: tyro.conf.Positional[str]
    """Folder of a training run, or its name under --runs-dir."""
    runs_dir: Path = Path("runs")
    """Where runs are looked for by name."""


def find_run(settings: Settings) -> Path:
    """Raises ValueError for what is no run's folder or name, with the runs that there are."""
    folders = (Path(settings.run), settings.runs_dir / settings.run)
    for folder in folders:
        if is_run(folder):
            return folder
    known = "; ".join(f"runs inside {folder}: {runs_in(folder)}" for folder in (folders[0], settings.runs_dir))
    raise ValueError(f"{settings.run} is no training run (no {METRICS_FILE}); {known}")


def report(settings: Settings) -> Report:
    """Raises ValueError for what is no run's folder or name."""
    folder = find_run(settings)
    steps, seconds = step_times(folder / METRICS_FILE)
    attempts, hosts_reason = host_steps(folder / FILE_NAME)
    traced, traced_reason = traces(folder / "profiles")
    return straggler_report(
        Findings(
            run=str(folder),
            hosts=attempts[-1] if attempts else None,
            hosts_reason=hosts_reason,
            stragglers=tuple(one for attempt in attempts for one in judged(attempt)),
            attempts=len(attempts),
            steps=steps,
            step_seconds=seconds,
            changes=step_changes(steps, seconds),
            traced=traced,
            traced_reason=traced_reason,
        )
    )


def step_times(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Numbers and seconds of the steps of the last attempt that were measured."""
    records = [one for one in read_lines(path) if one.get("event") == "train" and one.get("step_seconds") is not None]
    last = max((one["attempt"] for one in records), default=0)
    kept = [one for one in records if one["attempt"] == last and measured(one)][WARMUP:]
    return tuple(one["step"] for one in kept), tuple(one["step_seconds"] for one in kept)


def measured(record: dict) -> bool:
    """Whether nothing but steps ran during its interval."""
    return not record.get("profiled") and "something other" not in str(record.get("tokens_per_second_reason", ""))


def step_changes(steps: tuple[int, ...], seconds: tuple[float, ...]) -> tuple[Change, ...]:
    return tuple(dataclasses.replace(one, index=steps[one.index]) for one in changes(seconds))


def host_steps(path: Path) -> tuple[list[HostSteps], str | None]:
    """Of every attempt; empty with a reason."""
    if not path.is_file():
        return [], f"the run has no {path.name}: it had one process, or stragglers.every was 0"
    try:
        return read_hosts(path), None
    except ValueError as error:
        return [], str(error)


def judged(attempt: HostSteps) -> tuple[Straggler, ...]:
    """As the run itself would have it with everything that is now in the file."""
    return StragglerJudge(attempt.num_hosts).update(attempt)


def traces(folder: Path) -> tuple[TracedRun | None, str | None]:
    """The newest profiled window; None with a reason."""
    try:
        found = read_window(folder)
    except ValueError as error:
        return None, str(error)
    reason = (
        "no window was profiled on two devices or more; train.py --profile FIRST:LAST captures one on every process"
    )
    return found, None if found is not None else reason
