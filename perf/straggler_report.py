"""The tables, the JSON record and the plots of `python -m perf stragglers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from perf.change_point import Change
from perf.host_steps import HostSteps
from perf.plot import draw_svg
from perf.report import Notes, Plot, Report, Table, duration
from perf.straggler_traces import TracedRun
from perf.stragglers import THRESHOLD, Straggler, behind, peer_median, steps_to_alarm

# Means of a plot's line: of so many steps each, so that a long run stays readable.
_PLOTTED = 200


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a run's folder says. `hosts` None for `hosts_reason`, `traced` None for `traced_reason`; a change's index is
    the number of the first step after it."""

    run: str
    hosts: HostSteps | None
    hosts_reason: str | None
    stragglers: tuple[Straggler, ...]
    attempts: int
    steps: tuple[int, ...]
    step_seconds: tuple[float, ...]
    changes: tuple[Change, ...]
    traced: TracedRun | None
    traced_reason: str | None


def straggler_report(found: Findings) -> Report:
    parts: list[Table | Notes | Plot] = [Notes("Verdict", _verdict(found))]
    if found.hosts is not None:
        parts.append(_host_table(found.hosts))
    if found.traced is not None:
        parts.append(_trace_table(found.traced))
    if found.changes:
        rows = tuple(
            (str(one.index), duration(one.before), duration(one.after), f"{one.ratio - 1:+.1%}")
            for one in found.changes
        )
        parts.append(Table("Changes of the step time", ("from step", "before", "after", "change"), rows, left=0))
    parts.append(Notes("Notes", _notes(found)))
    if found.hosts is not None:
        hosts = found.hosts
        parts.append(Plot("How far each host is behind the others' median", lambda: _hosts_svg(hosts)))
    if found.step_seconds:
        parts.append(Plot("Step time", lambda: _steps_svg(found)))
    return Report(f"Stragglers of {found.run}", _record(found), parts)


def _verdict(found: Findings) -> tuple[str, ...]:
    lines = [f"{one.sentence()} (named at step {one.named_step})" for one in found.stragglers]
    if found.traced is not None and found.traced.culprit is not None:
        one = found.traced.devices[found.traced.culprit]
        lines.append(
            f"straggler: device {one.device} of host {one.host}; in the traced {found.traced.window} it waits least in "
            f"collectives, and computes {found.traced.ratios[found.traced.culprit]:.3g} times as long as the others"
        )
    if not lines:
        if found.hosts is None and found.traced is None:
            lines.append("not judged: no host was measured beside another")
        else:
            lines.append("no straggler")
    lines += [
        f"the step time changed from step {one.index} on: {duration(one.before)} to {duration(one.after)} "
        f"({one.ratio - 1:+.1%})"
        for one in found.changes
    ]
    return tuple(lines)


def _median(values: np.ndarray) -> list[float | None]:
    """Of each host; None where nothing was measured."""
    known = ~np.isnan(values)
    return [float(np.median(row[here])) if here.any() else None for row, here in zip(values, known, strict=True)]


def _host_table(data: HostSteps) -> Table:
    columns = ("host", "step", "input", "host", "result", "barrier", "others wait", "ratio", "probe", "probe ratio")
    rows = zip(*_columns(data).values(), strict=True)
    texts = tuple(
        (
            str(host),
            *(duration(value) for value in (step, taking, own, result, barrier)),
            _percent(wait),
            _ratio(ratio),
            duration(probe),
            _ratio(probe_ratio),
        )
        for host, (step, taking, own, result, barrier, wait, ratio, probe, probe_ratio) in enumerate(rows)
    )
    return Table(f"Hosts: medians of {len(data.steps)} steps", columns, texts, left=0)


def others_wait(data: HostSteps) -> np.ndarray:
    """Share of a step that the others lose to each host, [hosts, steps]."""
    return np.maximum(behind(data, "barrier"), 0)


def _columns(data: HostSteps) -> dict[str, list[float | None]]:
    return {
        "step_seconds": _median(data.seconds),
        "input_seconds": _median(data.input),
        "host_seconds": _median(data.host),
        "result_seconds": _median(data.result),
        "barrier_seconds": _median(data.barrier),
        "others_wait_share": _median(others_wait(data)),
        "ratio_to_peers": _median(data.busy / peer_median(data.busy)),
        "probe_seconds": _median(data.probe),
        "probe_ratio_to_peers": _median(data.probe / peer_median(data.probe)),
    }


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _trace_table(traced: TracedRun) -> Table:
    columns = ("host", "device", "step", "compute", "collectives", "ratio of compute")
    rows = tuple(
        (
            str(one.host),
            str(one.device),
            *(duration(value) for value in (one.step, one.compute, one.collectives)),
            _ratio(ratio),
        )
        for one, ratio in zip(traced.devices, traced.ratios, strict=True)
    )
    return Table(f"Devices in the trace of {traced.window}", columns, rows, left=0)


def _notes(found: Findings) -> tuple[str, ...]:
    notes = []
    if found.hosts is None:
        notes.append(f"Hosts: {found.hosts_reason}.")
    else:
        notes += [
            "Step: the same on all hosts of a synchronous run. Input, result, barrier: waiting for a batch, for the "
            "end of the step before, for the last host. Host: the rest, with what a full launch queue holds back. "
            "Others wait: the others' median at the barrier beyond its own and beyond its wait for its devices, of a "
            "step. Ratio: the step without the barrier, to the others' median.",
            "A device that is slow inside a step makes the others wait in collectives, which a host can't see: the "
            "probe (a fixed computation without a collective) and a trace of every process can.",
            f"{found.hosts.num_hosts} hosts: one that is last by {THRESHOLD:.0%} in every step is named after "
            f"{steps_to_alarm(found.hosts.num_hosts)} of them.",
        ]
        if np.isnan(found.hosts.probe).all():
            notes.append(
                "No probe was timed: steps had always ended before the host asked, or stragglers.probe is off."
            )
    if found.attempts > 1:
        notes.append(
            f"The run has {found.attempts} attempts: each is judged by itself, and the table is of the last one."
        )
    if found.traced is None:
        notes.append(f"Traces: {found.traced_reason}.")
    else:
        notes.append(
            "A trace is of a few steps, without the statistics that guard the hosts' verdict from a false alarm: take "
            "another one before a machine is blamed by it."
        )
    return tuple(notes)


def _record(found: Findings) -> dict[str, Any]:
    hosts = None
    if found.hosts is not None:
        columns = _columns(found.hosts)
        hosts = [
            {"host": host, **{name: values[host] for name, values in columns.items()}}
            for host in range(found.hosts.num_hosts)
        ]
    traced = found.traced
    return {
        "run": found.run,
        "hosts": hosts,
        "hosts_reason": found.hosts_reason,
        "stragglers": [dataclasses.asdict(one) for one in found.stragglers],
        "measured_steps": len(found.step_seconds),
        "step_time_changes": [
            {"step": one.index, "before_seconds": one.before, "after_seconds": one.after} for one in found.changes
        ],
        "trace": None
        if traced is None
        else {
            "window": traced.window,
            "culprit": traced.culprit,
            "devices": [
                {**dataclasses.asdict(one), "ratio_to_peers": ratio}
                for one, ratio in zip(traced.devices, traced.ratios, strict=True)
            ],
        },
        "trace_reason": found.traced_reason,
    }


def _thin(xs: Sequence[int], values: np.ndarray) -> tuple[list[int], list[float]]:
    """Medians of consecutive steps."""
    groups = np.array_split(np.arange(len(xs)), min(len(xs), _PLOTTED))
    return [xs[group[0]] for group in groups], [float(np.median(values[group])) for group in groups]


def _hosts_svg(data: HostSteps) -> str:
    share = others_wait(data)

    def draw(axes: Any) -> None:
        for host in range(data.num_hosts):
            xs, ys = _thin(data.steps, 100 * share[host])
            axes.plot(xs, ys, linewidth=1.2, label=f"host {host}")
        axes.axhline(100 * THRESHOLD, linestyle=":", color="black", label="threshold")
        axes.set(xlabel="step", ylabel="% of a step that the others wait for it")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw_svg("hosts", draw)


def _steps_svg(found: Findings) -> str:
    def draw(axes: Any) -> None:
        xs, ys = _thin(found.steps, 1e3 * np.array(found.step_seconds))
        axes.plot(xs, ys, linewidth=1.2, label="step")
        for one in found.changes:
            axes.axvline(one.index, linestyle="--", color="firebrick", linewidth=0.9)
        axes.set(xlabel="step", ylabel="ms", ylim=(0, 1.3 * max(ys)))

    return draw_svg("steps", draw)
