"""Gathers what is known of a run, a trace or a compiled config, and examines it."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Literal

from perf.breakdown import Breakdown, breakdown
from perf.findings import Cost, Evidence, Finding, examine
from perf.hlo import Module, parse
from perf.op_kind import Ops, program_ops
from perf.prediction import Prediction
from perf.run_facts import read_run, run_settings
from perf.serving_facts import METRICS_FILE as SERVER_METRICS
from perf.serving_facts import ServingFacts, read_serving
from perf.trace import Timeline, capture_folder, find_trace, program_files, read_note, read_trace

Kind = Literal["run", "trace", "config"]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """`findings` in order. `unjudged`: what could not be looked at, and why. `notes`: what to know beside it."""

    target: str
    kind: Kind
    evidence: Evidence
    findings: tuple[Finding, ...]
    unjudged: tuple[str, ...]
    notes: tuple[str, ...]


def has_trace(path: Path) -> bool:
    return path.suffix == ".pb" or (path.is_dir() and any(path.rglob("*.xplane.pb")))


def diagnose_run(folder: Path, serving: ServingFacts | None = None) -> Diagnosis:
    """A training run's folder: its metrics, and the newest trace of it if there is one.

    Raises ValueError for a folder without metrics, and for a trace that can't be read.
    """
    facts = read_run(folder)
    evidence = Evidence(run=facts, settings=run_settings(folder), serving=serving)
    unjudged, notes = [], [f"{facts.measured} steps of {facts.steps} counted: neither the first ones nor profiled"]
    if facts.mfu is None and facts.mfu_reason:
        unjudged.append(f"mfu: {facts.mfu_reason}")
    if has_trace(folder / "profiles"):
        evidence, missing, more = with_trace(evidence, find_trace(folder / "profiles"))
        unjudged, notes = [*unjudged, *missing], [*notes, *more]
        if facts.step_seconds is not None and evidence.step_ns is not None:
            change = evidence.step_ns / 1e9 / facts.step_seconds - 1
            notes.append(
                f"the traced steps took {change:+.1%} against the run's median, {facts.step_seconds * 1e3:.1f} ms"
            )
    else:
        unjudged.append(
            "host, launches, communication, recompilation: the run has no trace; add --profile 10:13 to train.py"
        )
        evidence = dataclasses.replace(evidence, platform="cpu" if facts.chip == "cpu" else None)
    return Diagnosis(str(folder), "run", evidence, examine(evidence), tuple(unjudged), tuple(notes))


def diagnose_trace(path: Path, serving: ServingFacts | None = None) -> Diagnosis:
    """A trace alone, with what was kept beside it. Raises ValueError for one that can't be read."""
    evidence, unjudged, notes = with_trace(Evidence(serving=serving), find_trace(path))
    unjudged = ["mfu, experts, the run's own input wait: a trace alone has no metrics of a run", *unjudged]
    return Diagnosis(str(path), "trace", evidence, examine(evidence), tuple(unjudged), tuple(notes))


def with_trace(evidence: Evidence, trace: Path) -> tuple[Evidence, list[str], list[str]]:
    """Evidence with a trace's, what it leaves unjudged, and notes."""
    note = read_note(trace)
    timeline = read_trace(trace)
    programs = [read_program(path) for path in program_files(trace)]
    times = breakdown(timeline, _facts(programs, timeline))
    program = next((one for one in programs if one.name == times.program), None)
    unjudged = []
    if program is None:
        unjudged.append(
            f"kinds of collectives, fused norms, alignment: no HLO of {times.program} is beside the trace; ops are "
            "sorted by their names alone"
        )
    beside = capture_folder(trace) / SERVER_METRICS
    serving = evidence.serving
    if serving is None and beside.is_file():
        serving = read_serving(beside)
    evidence = dataclasses.replace(
        evidence,
        timeline=timeline,
        breakdown=times,
        program=program,
        costs=measured_costs(times),
        step_ns=times.step,
        serving=serving,
        settings=note.get("settings", evidence.settings),
        mesh=note.get("mesh"),
        platform=timeline.platform,
        decode=note.get("kind") == "serve",
    )
    return evidence, unjudged, trace_notes(timeline, times)


def read_program(path: Path) -> Module:
    """Raises ValueError for a text that is not whole."""
    try:
        return parse(gzip.decompress(path.read_bytes()).decode())
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no whole HLO text: {error}; move it away to read the trace without it") from error


def _facts(programs: list[Module], timeline: Timeline) -> Ops:
    """Of the ops of the programs that ran: those of another name are of no use."""
    ran = {run.module for device in timeline.devices for run in device.executions}
    return program_ops(*(one for one in programs if one.name in ran))


def measured_costs(times: Breakdown) -> dict[str, Cost]:
    """Of the first device's ops; of collectives what the transfer itself took, without the wait for other devices."""
    costs = {op.op: Cost(op.exposed, op.exposed) for op in times.devices[0].ops if op.kind != "collective"}
    return costs | {op: Cost(time, time) for op, time in times.transfers.items()}


def predicted_costs(prediction: Prediction) -> dict[str, Cost]:
    costs = {one.name: Cost(one.seconds * 1e9, one.seconds * 1e9) for one in prediction.spent}
    for wait in prediction.waits:
        name, before = wait.collective.name, costs.get(wait.collective.name, Cost(0.0, 0.0))
        costs[name] = Cost(before.nanoseconds + wait.seconds * 1e9, before.exposed + wait.exposed_seconds * 1e9)
    return costs


def trace_notes(timeline: Timeline, times: Breakdown) -> list[str]:
    whole = "" if times.whole else "; one step alone: what follows it is not known"
    notes = [
        f"{times.steps} steps of {times.program} on {len(times.devices)} {times.platform} devices, from the start of "
        f"one to the start of the next{whole}",
        "a profiled step is slower than one that isn't: shares count, absolute times do not",
    ]
    if not times.has_marks:
        notes.append("the trace does not mark when the host takes its input: input wait is counted as host")
    if times.platform == "cpu" and len(times.devices) > 1:
        notes.append("the devices share this machine's cores: waiting for each other is no communication")
    if times.collective and len(times.devices) == 1:
        notes.append("one device of the run is in the trace: waiting for others can't be told from transfers")
    if not timeline.memory:
        notes.append("the trace has no allocations: memory over time is not known")
    return notes
