"""What `python -m perf fleet` prints: tables, notes and plots of a store's records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from perf.baseline import CONFIDENCE, Judgement, Median
from perf.fleet import Budget, By, Check, Group, Work, budget, countable, goodput_shares, groups, headline, work_of
from perf.plot import draw_svg
from perf.records import RunRecord
from perf.report import Notes, Plot, Report, Table, duration, number

NAMES = {"mfu": "MFU", "decode_mbu": "decode MBU"}


def share(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}%"


def interval(middle: Median | None) -> str:
    if middle is None:
        return "n/a"
    return f"{100 * middle.low:.1f} to {100 * middle.high:.1f}%" if middle.low and middle.high else "n/a"


def day(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M")


def plural(count: int, one: str) -> str:
    return f"{count} {one}{'s' * (count != 1)}"


# A run that was recorded.


def record_report(record: RunRecord, store: str, is_new: bool) -> Report:
    facts = [
        ("config", f"{record.config} ({record.config_hash})"),
        ("ran", f"{record.workload} on {plural(record.num_devices, 'device')} of {record.chip}, {day(record.ended)}"),
        *((name.upper() if name in ("mfu", "hfu") else name, _known(record, name)) for name in _SHOWN),
        *((f"step, host {one.host}", f"{duration(one.p50)} (p99 {duration(one.p99)})") for one in record.step_times),
    ]
    title = f"{record.id} {'added to' if is_new else 'is already in'} {store}"
    table = Table("Record", ("field", "value"), tuple(facts), left=2)
    return Report(
        title, {"command": "fleet record", "store": store, "is_new": is_new, "record": record.to_json()}, [table]
    )


_SHOWN = ("mfu", "hfu", "decode_mbu", "goodput", "tokens_per_second")


def _known(record: RunRecord, name: str) -> str:
    value = record.metric(name)
    if value is None:
        return f"n/a: {record.reasons[name]}"
    return number(value) if name.startswith("tokens") else share(value)


# The fleet.


def fleet_report(records: Sequence[RunRecord], store: str, by: By, refused: Sequence[str]) -> Report:
    """One table for each work, its sizes or versions in rows, and its reality tax."""
    parts: list[Table | Notes | Plot] = []
    works: dict[Work, list[RunRecord]] = {}
    for record in records:
        works.setdefault(work_of(record), []).append(record)
    entries = []
    for number_, (work, members) in enumerate(sorted(works.items(), key=lambda item: dataclasses.astuple(item[0]))):
        rows, tax = groups(members, by), budget(members)
        entries.append(_entry(work, members, rows, tax, by))
        parts += _work_parts(number_, work, members, rows, tax, by)
    notes = _notes(records, works, refused)
    title = f"{plural(len(records), 'record')} of {plural(len(works), 'work')} in {store}"
    record = {"command": "fleet report", "store": store, "by": by, "works": entries, "refused": list(refused)}
    return Report(title, record, [*parts, Notes("How to read this", tuple(notes))])


def _notes(records: Sequence[RunRecord], works: dict[Work, list[RunRecord]], refused: Sequence[str]) -> list[str]:
    profiled = len(records) - len(countable(records))
    lines = [
        "tax: 1 − median / median of the smallest size; loss: against the first version on that size",
        f"interval: order statistics of the median, at least {CONFIDENCE:.0%} (n/a below 6 runs)",
        "fleet: median × goodput, the share of the peak over wall time; time outside steps costs what steps reach",
        *([f"{plural(profiled, 'profiled run')} left out: their absolute numbers do not count"] if profiled else []),
        *(f"not read: {line}" for line in refused),
    ]
    if len(works) > 1:
        lines.append("runs stand together whose settings (the hash), chip and workload agree, whatever their names")
    return lines


def names(records: Sequence[RunRecord]) -> str:
    """The latest first; runs of the same settings may have several."""
    found = list(dict.fromkeys(record.config for record in reversed(records)))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _entry(
    work: Work, members: Sequence[RunRecord], rows: Sequence[Group], tax: Budget | None, by: By
) -> dict[str, Any]:
    metric = headline(work.workload)
    return {
        **dataclasses.asdict(work),
        "configs": sorted({record.config for record in members}),
        "metric": metric,
        "profiled_left_out": len(members) - len(countable(members)),
        by + "s": [
            {
                by: group.label,
                "num_devices": group.size,
                "runs": len(group.records),
                "median": None if group.middle is None else dataclasses.asdict(group.middle),
                "median_reason": None if group.middle else group.records[-1].reasons[metric],
                "best": group.best,
                "goodput": group.goodput,
                "fleet": group.fleet_value,
                "tax": group.tax,
                "records": [record.id for record in group.records],
            }
            for group in rows
        ],
        "goodput_shares": goodput_shares(countable(members)),
        "reality_tax": None if tax is None else _tax_record(tax),
        "reality_tax_reason": f"no run has {metric}" if tax is None else None,
    }


def _tax_record(tax: Budget) -> dict[str, Any]:
    return {
        "hero": tax.hero_value,
        "hero_record": tax.hero.id,
        "hero_devices": tax.hero.num_devices,
        "lost": dict(tax.lines),
        "fleet": tax.fleet_value,
        "reason": tax.reason,
    }


def _work_parts(
    place: int, work: Work, members: Sequence[RunRecord], rows: Sequence[Group], tax: Budget | None, by: By
) -> list[Table | Notes | Plot]:
    name, metric = f"{names(members)}, {work.workload} on {work.chip}", headline(work.workload)
    label = NAMES[metric]
    cells = tuple(
        (
            group.label,
            str(len(group.records)),
            share(group.middle and group.middle.value),
            interval(group.middle),
            share(group.best),
            share(group.tax),
            share(group.goodput),
            share(group.fleet_value),
        )
        for group in rows
    )
    columns = (
        by,
        "runs",
        f"{label}, median",
        "interval",
        "best",
        "tax" if by == "size" else "loss",
        "goodput",
        "fleet",
    )
    parts: list[Table | Notes | Plot] = [Table(f"{name} ({work.config_hash})", columns, cells)]
    if tax is not None:
        lines = [(f"hero: run {tax.hero.id}", share(tax.hero_value, 2))]
        lines += [(what, f"-{100 * lost:.2f}") for what, lost in tax.lines]
        lines += [("what the fleet gets of its peak, over wall time", share(tax.fleet_value, 2))]
        parts.append(Table(f"Reality tax of {name}", ("", f"{label}, points"), tuple(lines), totals=1))
        if tax.reason is not None:
            parts.append(Notes("Reality tax", (tax.reason,)))
    else:
        reasons = sorted({record.reasons[metric] for record in members if metric in record.reasons})
        parts.append(Notes(f"No {label}", tuple(reasons) or ("every run was profiled",)))
    shown = [group for group in rows if group.middle is not None]
    if shown:
        parts.append(Plot(name, lambda: _fleet_svg(place, shown, label, by)))
    return parts


def _fleet_svg(place: int, rows: Sequence[Group], label: str, by: By) -> str:
    """Every run as a point, medians as a line with their intervals."""

    def draw(axes: Any) -> None:
        xs = [group.size for group in rows] if by == "size" else list(range(len(rows)))
        for x, group in zip(xs, rows, strict=True):
            points = [record.metric(group.metric) for record in group.records]
            known = [100 * value for value in points if value is not None]
            axes.plot([x] * len(known), known, "o", color="#7aa6d6", markersize=4, alpha=0.6)
            if group.middle is not None and group.middle.low and group.middle.high:
                axes.plot([x, x], [100 * group.middle.low, 100 * group.middle.high], color="black", linewidth=2)
        medians = [100 * group.middle.value for group in rows if group.middle is not None]
        axes.plot(xs, medians, "-_", color="black", linewidth=1.2, markersize=14, label="median and interval")
        best = max(group.best for group in rows if group.best is not None)
        axes.axhline(100 * best, color="#c0392b", linewidth=0.9, linestyle="--", label=f"hero {100 * best:.1f}%")
        if by == "size":
            axes.set_xscale("log", base=2)
            axes.set_xlabel("devices")
        axes.set_xticks(xs, [str(group.size) if by == "size" else group.label.replace(", ", "\n") for group in rows])
        axes.minorticks_off()
        axes.set_ylabel(f"{label}, % of peak")
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8)

    return draw_svg(f"fleet{place}", draw)


# The gate.

_VERDICTS = {0: "pass", 1: "REGRESSION", 2: "not judged"}


def check_report(result: Check, store: str, *, rate: float, threshold: float, refused: Sequence[str]) -> Report:
    run, parts = result.run, []
    if result.judgements:
        rows = tuple(_judgement_row(one) for one in result.judgements)
        columns = ("metric", "run", "median of before", "runs", "change", "its interval", "limit", "verdict")
        parts.append(Table(f"{plural(len(result.baseline), 'run')} of the same work and size before it", columns, rows))
    canaries = tuple(
        (
            f"{canary.run.id}, {plural(canary.run.num_devices, 'device')}",
            "; ".join(f"{one.metric} {_percent(one.change)}" for one in canary.judgements),
            canary.verdict,
        )
        for canary in result.canaries
    )
    if canaries:
        columns = ("latest run of the same work on a smaller slice", "change", "verdict")
        parts.append(Table("Canaries", columns, canaries, left=3))
    parts.append(Notes("What this says", tuple(_check_notes(result, rate, threshold, refused))))
    if result.judgements and result.baseline:
        parts.append(Plot("The run and those before it", lambda: _check_svg(result)))
    record = {
        "command": "fleet check",
        "store": store,
        "run": run.id,
        "config": run.config,
        "config_hash": run.config_hash,
        "chip": run.chip,
        "num_devices": run.num_devices,
        "verdict": _VERDICTS[result.status].lower(),
        "reason": result.reason,
        "false_alarms": rate,
        "threshold": threshold,
        "baseline": [one.id for one in result.baseline],
        "metrics": [_judgement_record(one) for one in result.judgements],
        "canaries": [
            {
                "run": canary.run.id,
                "num_devices": canary.run.num_devices,
                "verdict": canary.verdict,
                "metrics": [_judgement_record(one) for one in canary.judgements],
            }
            for canary in result.canaries
        ],
        "refused": list(refused),
    }
    on = f"{run.config} on {plural(run.num_devices, 'device')} of {run.chip}"
    return Report(f"{_VERDICTS[result.status]}: run {run.id}, {on}", record, parts, result.status)


def _judgement_record(one: Judgement) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one),
        "change": one.change,
        "change_interval": one.change_interval,
        "blind": one.blind,
    }


def _percent(change: float | None) -> str:
    return "n/a" if change is None else f"{100 * change:+.1f}%"


def _judgement_row(one: Judgement) -> tuple[str, ...]:
    spread = one.change_interval
    return (
        one.metric,
        _figure(one.metric, one.value),
        _figure(one.metric, one.baseline and one.baseline.value),
        str(one.baseline.count if one.baseline else 0),
        _percent(one.change),
        "n/a" if spread is None else f"{_percent(spread[0])} to {_percent(spread[1])}",
        _figure(one.metric, one.limit),
        one.verdict,
    )


def _figure(metric: str, value: float | None) -> str:
    is_share = metric in ("mfu", "mfu_palm", "hfu", "goodput", "scaling_tax") or "mbu" in metric or "mfu" in metric
    return share(value, 2) if is_share else number(value)


def _check_notes(result: Check, rate: float, threshold: float, refused: Sequence[str]) -> list[str]:
    lines = [] if result.reason is None else [result.reason]
    for one in result.judgements:
        if one.verdict == "regression":
            lines.append(
                f"{one.metric} changed by {_percent(one.change)}: beyond the limit and the {threshold:.0%} margin"
            )
        elif one.verdict in ("too few", "unknown"):
            lines.append(f"{one.metric} was not judged: {one.reason}")
        if one.blind is not None and one.blind > threshold:
            lines.append(f"{one.metric}: the runs before scatter so much that a change under {share(one.blind)} passes")
    sick = [canary for canary in result.canaries if canary.verdict == "regression"]
    if sick:
        least = min(sick, key=lambda canary: canary.run.num_devices).run
        lines.append(
            f"canary: {plural(least.num_devices, 'device')} show a regression too (run {least.id}); look there first"
        )
    elif result.status == 1 and result.canaries:
        lines.append("canaries: no smaller slice shows it; look at what grows with the size (links, stragglers, input)")
    if result.judgements:
        lines.append(
            f"limit: median − K·Qn; one more run like those before is beyond it with a chance of {rate:.1%}, all "
            "metrics together (perf/baseline.py); interval: order statistics of the median, 95%"
        )
    return [*lines, *(f"not read: {line}" for line in refused)]


def _check_svg(result: Check) -> str:
    """The first metric, run by run."""
    one = result.judgements[0]
    shown = [record for record in (*result.baseline, result.run) if record.metric(one.metric) is not None]

    def draw(axes: Any) -> None:
        points = [record.metric(one.metric) for record in shown]
        axes.plot(range(len(points)), points, "o", color="#7aa6d6")
        if shown[-1] is result.run:
            axes.plot([len(points) - 1], [one.value], "D", color="#c0392b", label="this run")
        if one.baseline is not None:
            axes.axhline(one.baseline.value, color="black", linewidth=1.0, label="median before it")
        if one.limit is not None:
            axes.axhline(one.limit, color="#c0392b", linewidth=0.9, linestyle="--", label="limit")
        axes.set(xlabel="runs, by when they ended", ylabel=one.metric)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8)

    return draw_svg("check", draw)
