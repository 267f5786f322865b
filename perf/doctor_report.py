"""A diagnosis as tables, a record and a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from perf.breakdown import CATEGORIES, LENGTH_BOUNDS, Breakdown
from perf.doctor import Diagnosis
from perf.findings import Evidence, Finding
from perf.memory_use import AllocatorUse, memory_use
from perf.op_kind import KINDS, plain_scope, program_ops
from perf.plot import draw_svg
from perf.program_view import by_scope
from perf.report import Notes, Plot, Report, Table, duration
from perf.run_facts import RunFacts

_WORDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise and reductions",
    "other": "other ops",
    "copy": "copies",
    "collective": "collectives, exposed",
    "launch": "gaps within programs",
    "input": "idle, host takes input",
    "host": "idle, host does other things",
}
assert set(_WORDS) == set(CATEGORIES)
_COLORS = {
    "matmul": "#4477aa",
    "attention": "#66ccee",
    "elementwise": "#228833",
    "other": "#bbbbbb",
    "copy": "#ccbb44",
    "collective": "#ee6677",
    "launch": "#aa3377",
    "input": "#882255",
    "host": "#555555",
}


def doctor_report(diagnosis: Diagnosis) -> Report:
    parts: list[Table | Notes | Plot] = [findings_table(diagnosis)]
    parts += [finding_notes(number, one) for number, one in enumerate(diagnosis.findings, 1)]
    times = diagnosis.evidence.breakdown
    if times is not None:
        parts += [breakdown_table(times), ops_table(times), lengths_table(times)]
        parts.append(Plot("Time of a step by device", lambda: breakdown_svg(times)))
    if diagnosis.evidence.predicted:
        parts += predicted_tables(diagnosis.evidence)
    if diagnosis.evidence.timeline is not None and (used := memory_use(diagnosis.evidence.timeline.memory)):
        parts.append(memory_table(used))
    if diagnosis.evidence.run is not None:
        parts.append(run_table(diagnosis.evidence.run))
    if diagnosis.unjudged:
        parts.append(Notes("Not judged", diagnosis.unjudged))
    parts.append(Notes("Notes", diagnosis.notes))
    return Report(f"doctor: {diagnosis.target}", record(diagnosis), parts)


def findings_table(diagnosis: Diagnosis) -> Table:
    if not diagnosis.findings:
        return Table("Findings", ("what",), (("nothing that is worth a change",),))
    step = diagnosis.evidence.step_ns
    rows = tuple(
        (f"{number}. {one.name}", one.domain, _milliseconds(one), _share(one, step), _gain(one))
        for number, one in enumerate(diagnosis.findings, 1)
    )
    title = "Findings, in the order to look at them" + (" (predictions: nothing ran)" if _predicted(diagnosis) else "")
    return Table(title, ("what", "domain", "ms at stake", "of the step", "predicted gain"), rows, left=2)


def _predicted(diagnosis: Diagnosis) -> bool:
    return any(one.is_prediction for one in diagnosis.findings)


def _milliseconds(one: Finding) -> str:
    return "n/a" if one.milliseconds is None else f"{one.milliseconds:.2f}"


def _share(one: Finding, step: float | None) -> str:
    return "n/a" if one.milliseconds is None or not step else f"{one.milliseconds * 1e6 / step:.1%}"


def _gain(one: Finding) -> str:
    if one.verified is None:
        return "not verified"
    return "n/a" if one.verified.gain is None else f"{one.verified.gain:.2f} ms"


def finding_notes(number: int, one: Finding) -> Notes:
    lines = [one.sentence, *one.evidence, f"change: {one.setting}"]
    if one.reason is not None:
        lines.append(f"milliseconds at stake are not known: {one.reason}")
    if one.verified is not None:
        lines.append(verified_line(one))
    return Notes(f"{number}. {one.name}", tuple(lines))


def verified_line(one: Finding) -> str:
    assert one.verified is not None
    made = f"compiled again with {one.verified.option}"
    if one.verified.gain is None:
        return f"{made}: {one.verified.reason}"
    verdict = "a gain" if one.verified.gain > 0 else "no gain: leave it as it is"
    return (
        f"{made}: a predicted step of {one.verified.after:.2f} ms instead of {one.verified.before:.2f} ms, "
        f"{one.verified.gain:+.2f} ms, {verdict}"
    )


def breakdown_table(times: Breakdown) -> Table:
    rows = [(_WORDS[name], f"{times.per_step(name) / 1e6:.3f}", f"{times.share(name):.1%}") for name in CATEGORIES]
    rows.append(("step", f"{times.step / 1e6:.3f}", "100.0%"))
    rows.append(
        ("collectives, hidden behind other work", f"{times.hidden / 1e6:.3f}", f"{times.hidden / times.step:.1%}")
    )
    return Table(
        f"Time of a step, mean of {len(times.devices)} devices and {times.steps} steps",
        ("category", "ms", "share"),
        tuple(rows),
        totals=2,
    )


def predicted_tables(evidence: Evidence, count: int = 12) -> list[Table]:
    """Of a program that was compiled and not run: its time by kind of op, and the ops that take most."""
    assert evidence.program is not None and evidence.costs is not None and evidence.step_ns is not None
    ops, step = program_ops(evidence.program), evidence.step_ns
    known = [(ops[name].kind, cost.exposed) for name, cost in evidence.costs.items() if name in ops]
    kinds = [(kind, sum(time for other, time in known if other == kind)) for kind in KINDS]
    rows = [(_WORDS[kind], f"{time / 1e6:.3f}", f"{time / step:.1%}") for kind, time in kinds]
    # Waiting for asynchronous copies is the step's, and of no op that runs.
    rest = max(step - sum(time for _, time in kinds), 0.0)
    rows.append(("waiting for copies", f"{rest / 1e6:.3f}", f"{rest / step:.1%}"))
    rows.append(("step", f"{step / 1e6:.3f}", "100.0%"))
    longest = tuple(
        (plain_scope(scope)[-70:], f"{number}", f"{time / 1e6:.3f}", f"{time / step:.1%}")
        for scope, time, number in by_scope(evidence)[:count]
    )
    return [
        Table("Predicted time of a step", ("category", "ms", "share"), tuple(rows), totals=1),
        Table("Where in the model, predicted", ("scope", "ops", "ms", "share"), longest),
    ]


def ops_table(times: Breakdown, count: int = 12) -> Table:
    rows = tuple(
        (
            op.op[:48],
            op.kind,
            op.scope[-44:],
            f"{op.count:.0f}",
            f"{op.exposed / 1e6:.3f}",
            f"{op.exposed / times.step:.1%}",
        )
        for op in times.devices[0].ops[:count]
    )
    return Table(
        f"Longest ops of device {times.devices[0].ordinal}",
        ("op", "kind", "scope", "count", "ms", "share"),
        rows,
        left=3,
    )


def length_labels() -> tuple[str, ...]:
    bounds = [duration(bound / 1e9) for bound in LENGTH_BOUNDS]
    return (*(f"up to {bound}" for bound in bounds), f"over {bounds[-1]}")


def lengths_table(times: Breakdown) -> Table:
    counts = times.devices[0].lengths
    rows = tuple(
        (label, f"{count / times.steps:,.1f}") for label, count in zip(length_labels(), counts, strict=True) if count
    )
    return Table(f"Ops of a step by length, device {times.devices[0].ordinal}", ("length", "ops"), rows)


def memory_table(used: Sequence[AllocatorUse]) -> Table:
    """What is in use all the time, at most, and the blocks that come and go."""
    rows = []
    for one in used:
        rows.append((one.name, "in use at least", gib(one.low), "", ""))
        rows.append(("", "in use at most", gib(one.peak), "", f"first at {duration(one.peak_time / 1e9)}"))
        for spike in one.spikes:
            held = "stays" if spike.seconds is None else f"held for {duration(spike.seconds)}"
            rows.append(("", "block", gib(spike.size), f"{spike.count}", held))
    return Table("Device memory, and its spikes", ("allocator", "what", "GiB", "times", "when"), tuple(rows), left=2)


def gib(size: int) -> str:
    return f"{size / 2**30:.3f}"


def run_table(run: RunFacts) -> Table:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.2%}"

    rows = [
        ("step, median", duration(run.step_seconds)),
        ("input wait of a step", duration(run.input_seconds)),
        ("mfu", percent(run.mfu)),
        ("hfu", percent(run.hfu)),
    ]
    if run.expert_load_max is not None:
        rows += [("busiest expert over the mean", f"{run.expert_load_max:.2f}"), ("dropped", percent(run.dropped))]
    return Table("The run's own figures", ("figure", "value"), tuple(rows))


def breakdown_svg(times: Breakdown) -> str:
    """One bar for each device, cut by category."""

    def draw(axes: Any) -> None:
        names = [str(device.ordinal) for device in times.devices]
        left = [0.0] * len(names)
        for category in CATEGORIES:
            values = [device.nanoseconds[category] / device.steps / 1e6 for device in times.devices]
            if any(values):
                axes.barh(names, values, left=left, color=_COLORS[category], label=_WORDS[category])
            left = [before + value for before, value in zip(left, values, strict=True)]
        axes.set(xlabel="ms of a step", ylabel="device")
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw_svg("doctor", draw)


def record(diagnosis: Diagnosis) -> dict[str, Any]:
    evidence = diagnosis.evidence
    return {
        "target": diagnosis.target,
        "kind": diagnosis.kind,
        "platform": evidence.platform,
        "step_ms": None if evidence.step_ns is None else evidence.step_ns / 1e6,
        **({"step_ms_reason": "no trace and no prediction"} if evidence.step_ns is None else {}),
        "is_prediction": evidence.predicted,
        "findings": [finding_record(one) for one in diagnosis.findings],
        "breakdown": None if evidence.breakdown is None else breakdown_record(evidence.breakdown),
        **({"breakdown_reason": "no trace"} if evidence.breakdown is None else {}),
        "memory": memory_record(evidence),
        **({"memory_reason": "no trace with allocations"} if memory_record(evidence) is None else {}),
        "run": None if evidence.run is None else run_record(evidence.run),
        **({"run_reason": "no metrics of a training run"} if evidence.run is None else {}),
        "unjudged": list(diagnosis.unjudged),
        "notes": list(diagnosis.notes),
    }


def memory_record(evidence: Evidence) -> list[dict[str, Any]] | None:
    used = () if evidence.timeline is None else memory_use(evidence.timeline.memory)
    return [dataclasses.asdict(one) for one in used] or None


def finding_record(one: Finding) -> dict[str, Any]:
    fields = {
        "name": one.name,
        "domain": one.domain,
        "sentence": one.sentence,
        "evidence": list(one.evidence),
        "milliseconds": one.milliseconds,
        "setting": one.setting,
        "is_prediction": one.is_prediction,
        "verified": None if one.verified is None else dataclasses.asdict(one.verified) | {"gain": one.verified.gain},
    }
    if one.reason is not None:
        fields["milliseconds_reason"] = one.reason
    if one.verified is None:
        fields["verified_reason"] = "nothing was compiled again"
    return fields


def breakdown_record(times: Breakdown) -> dict[str, Any]:
    return {
        "program": times.program,
        "steps": times.steps,
        "step_ms": times.step / 1e6,
        "categories_ms": {name: times.per_step(name) / 1e6 for name in CATEGORIES},
        "collective_ms": times.collective / 1e6,
        "collective_hidden_ms": times.hidden / 1e6,
        "overlap": times.overlap,
        **({"overlap_reason": "no collectives"} if times.overlap is None else {}),
        "collective_wait_ms": None if times.collective_wait is None else times.collective_wait / 1e6,
        **({"collective_wait_ms_reason": "one device"} if times.collective_wait is None else {}),
        "device_spread": times.spread,
        **({"device_spread_reason": "one device"} if times.spread is None else {}),
        "step_times_ms": [time / 1e6 for time in times.step_times],
        "lengths": dict(zip(length_labels(), times.devices[0].lengths, strict=True)),
        "devices": [
            {
                "ordinal": device.ordinal,
                "step_ms": device.step / 1e6,
                "categories_ms": {name: device.nanoseconds[name] / device.steps / 1e6 for name in CATEGORIES},
                "compute_ms": device.compute / device.steps / 1e6,
            }
            for device in times.devices
        ],
        "ops": [dataclasses.asdict(op) for op in times.devices[0].ops[:40]],
    }


def run_record(run: RunFacts) -> dict[str, Any]:
    fields = {
        field.name: getattr(run, field.name)
        for field in dataclasses.fields(run)
        if field.name not in ("folder", "summary", "mfu_reason")
    }
    for name in [name for name, value in fields.items() if value is None]:
        fields[f"{name}_reason"] = run.mfu_reason if name in ("mfu", "hfu") and run.mfu_reason else "not in the metrics"
    return fields


assert set(KINDS) < set(CATEGORIES)
