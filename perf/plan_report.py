"""What `python -m perf plan` says: the record, tables, notes and plot of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perf.plan import Entry, Group
from perf.plot import draw_svg
from perf.report import Notes, Plot, Report, Table, duration, number, quantity
from perf.step_model import TENSOR

GIB = 2**30
# Of the fusions that lose most.
LOSING = 5


def plan_report(name: str, mode: str, groups: Sequence[Group]) -> Report:
    record = plan_record(name, mode, groups)
    parts: list[Table | Notes | Plot] = [_summary(record)] if len(groups) > 1 else []
    for group in record["groups"]:
        parts += [_candidates(group, mode), *_exposed(group), *_kinds(group), *_losing(group)]
    parts += [
        Notes("Best of each, to copy", tuple(_commands(record))),
        Notes("Assumptions: every figure is a prediction, nothing ran", tuple(_notes(record))),
        Plot("Where a predicted step goes", lambda: _plot(record)),
    ]
    what = "one train step" if mode == "train" else "one decoded token of each row"
    return Report(f"Plan of {name}: {what} (prediction)", record, parts)


# The record


def plan_record(name: str, mode: str, groups: Sequence[Group]) -> dict[str, Any]:
    """Plain values for JSON; a null has a reason beside it."""
    return {
        "command": "plan",
        "is_prediction": True,
        "config": name,
        "mode": mode,
        "groups": [_group(group, mode) for group in groups],
    }


def _group(group: Group, mode: str) -> dict[str, Any]:
    best = group.best
    tokens = group.rows * (group.length if mode == "train" else 1)
    return {
        "name": group.name,
        "chip": group.chip.name,
        "num_devices": group.num_devices,
        "rows": group.rows,
        "length": group.length,
        "tokens": tokens,
        "dtype": group.dtype,
        "num_candidates": group.num_candidates,
        "candidates": [_entry(one, group, tokens) for one in group.entries],
        "best": None if best is None else group.entries.index(best),
        **({} if best is not None else {"best_reason": "no candidate that was tried fits"}),
        "notes": list(group.notes),
    }


def _entry(entry: Entry, group: Group, tokens: int) -> dict[str, Any]:
    candidate = entry.ranked.candidate
    facts: dict[str, Any] = {
        "mesh": candidate.layout.sizes,
        "accumulation": candidate.accumulation,
        "remat": candidate.remat,
        "scan": candidate.scan,
        "xla_options": list(candidate.options),
        "command": entry.command,
        "fits": entry.fits,
        "estimated_seconds": entry.ranked.estimate.seconds,
        "estimated_bytes": entry.ranked.estimate.memory_bytes,
    }
    facts |= _analytic(entry, group) if entry.answer is None else _compiled(entry)
    seconds = entry.seconds
    return facts | {
        "mbu": entry.mbu,
        "step_seconds": seconds,
        "tokens_per_second": None if seconds is None else tokens / seconds,
    }


def _analytic(entry: Entry, group: Group) -> dict[str, Any]:
    """Of the model of perf/step_model.py."""
    estimate, chip = entry.ranked.estimate, group.chip
    limit = chip.usable_bytes or chip.memory_bytes
    peak = chip.device_peak(group.dtype)
    kinds: dict[str, float] = {}
    for axis in estimate.communication.values():
        for kind, moved in axis.bytes.items():
            kinds[kind] = kinds.get(kind, 0.0) + moved
    assert peak is not None
    return {
        "source": "analytic model",
        "need_bytes": estimate.memory_bytes,
        "need_is_least": False,
        "need_source": "estimate: what is kept, and the largest scratch of a layer or of the loss",
        "limit_bytes": limit / chip.devices_per_chip,
        "mfu": estimate.model_flops / group.num_devices / estimate.seconds / peak,
        "parts_seconds": dict(estimate.parts),
        "exposed_seconds_by_axis": {name: one.exposed_seconds for name, one in estimate.communication.items()},
        "hidden_seconds_by_axis": {
            name: one.seconds - one.exposed_seconds for name, one in estimate.communication.items()
        },
        "collective_bytes": kinds,
        "losing": None,
        "losing_reason": "the analytic model knows no fusions; only a program that was compiled has them",
    }


def _compiled(entry: Entry) -> dict[str, Any]:
    answer = entry.answer
    assert answer is not None
    facts: dict[str, Any] = {
        "source": "compiled ahead of time",
        "need_bytes": answer.need_bytes,
        "need_is_least": answer.is_least,
        "need_source": "peak of the compiler's plan" if answer.fits else "the compiler's refusal",
        "limit_bytes": answer.limit_bytes,
        "compile_seconds": answer.compile_seconds,
        "was_kept": answer.kept,
        "mfu": answer.mfu,
    }
    prediction = answer.prediction
    if prediction is None:
        missing = ("parts_seconds", "exposed_seconds_by_axis", "hidden_seconds_by_axis", "collective_bytes", "losing")
        return facts | dict.fromkeys(missing) | {"reason": answer.refused or answer.reason}
    return facts | {
        "parts_seconds": prediction["categories_seconds"],
        "exposed_seconds_by_axis": prediction["exposed_seconds_by_axis"],
        "hidden_seconds_by_axis": prediction["hidden_seconds_by_axis"],
        "collective_bytes": prediction["collective_bytes"],
        "losing": prediction["losing"][:LOSING],
        "hfu": prediction["hfu"],
        "calibration": prediction["calibration"],
        "assumptions": prediction["assumptions"],
    }


# Tables


def _summary(record: dict[str, Any]) -> Table:
    rows = []
    for group in record["groups"]:
        if group["best"] is None:
            rows.append((group["name"], str(group["num_devices"]), group["best_reason"], *("",) * 6))
            continue
        best = group["candidates"][group["best"]]
        rows.append(
            (
                group["name"],
                str(group["num_devices"]),
                _mesh(best),
                f"{group['rows']} × {group['length']}",
                best["remat"],
                _memory(best),
                duration(best["step_seconds"]),
                number(best["tokens_per_second"] / group["num_devices"]),
                _share(best["mfu"] if best["mbu"] is None else best["mbu"]),
            )
        )
    columns = (
        "devices",
        "",
        "mesh",
        "rows × tokens",
        "remat",
        "GiB",
        "step",
        "tokens/s each",
        "MFU" if record["mode"] == "train" else "MBU",
    )
    return Table("Best of each set of devices", columns, tuple(rows), left=3)


def _candidates(group: dict[str, Any], mode: str) -> Table:
    if mode == "decode":
        return _servers(group)
    rows = tuple(
        (
            f"{index}{' ←' if index == group['best'] else ''}",
            _mesh(one),
            str(one["accumulation"]),
            one["remat"] + ("" if one["scan"] else ", unrolled"),
            "none" if not one["xla_options"] else "whole",
            _fits(one),
            _memory(one),
            duration(one["step_seconds"]),
            _share(one["mfu"]),
            *_costs(one),
        )
        for index, one in enumerate(group["candidates"])
    )
    columns = ("", "mesh", "µb", "remat", "XLA", "fits", "GiB", "step", "MFU", "exposed", "compile")
    title = (
        f"{group['name']}: {group['rows']} rows of {group['length']} tokens, {len(rows)} of {group['num_candidates']} "
        "candidates (µb: microbatches; whole: products are not cut into parts of a gather)"
    )
    return Table(title, columns, rows, left=6)


def _servers(group: dict[str, Any]) -> Table:
    rows = tuple(
        (
            f"{index}{' ←' if index == group['best'] else ''}",
            str(one["mesh"].get(TENSOR, 1)),
            str(group["num_devices"] // one["mesh"].get(TENSOR, 1)),
            _fits(one),
            _memory(one),
            duration(one["step_seconds"]),
            number(one["tokens_per_second"]),
            _share(one["mbu"]),
            _share(one["mfu"]),
            *_costs(one),
        )
        for index, one in enumerate(group["candidates"])
    )
    columns = ("", "tensor", "servers", "fits", "GiB", "step", "tokens/s", "MBU", "MFU", "exposed", "compile")
    title = (
        f"{group['name']}: {group['rows']} rows, {group['length']} tokens in the cache of each, {len(rows)} of "
        f"{group['num_candidates']} candidates"
    )
    return Table(title, columns, rows, left=4)


def _costs(one: dict[str, Any]) -> tuple[str, str]:
    """Communication that nothing hides, and what the compile took."""
    took = "" if one.get("compile_seconds") is None else f"{one['compile_seconds']:.0f} s"
    return duration(_total(one["exposed_seconds_by_axis"])), took


def _fits(one: dict[str, Any]) -> str:
    if one["fits"] is None:
        return "refused"
    if one["fits"] or one["need_bytes"] is None:
        return "yes" if one["fits"] else "NO"
    least = "at least " if one["need_is_least"] else ""
    return f"NO, by {least}{(one['need_bytes'] - one['limit_bytes']) / GIB:.1f}"


def _memory(one: dict[str, Any]) -> str:
    need, limit = (("?" if one[key] is None else f"{one[key] / GIB:.2f}") for key in ("need_bytes", "limit_bytes"))
    return f"{need} of {limit}"


def _mesh(one: dict[str, Any]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in one["mesh"].items()) or "one device"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _total(by_axis: dict[str, float] | None) -> float | None:
    return None if by_axis is None else sum(by_axis.values())


def _with_prediction(group: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(index, one) for index, one in enumerate(group["candidates"]) if one["parts_seconds"] is not None]


def _exposed(group: dict[str, Any]) -> list[Table]:
    """Milliseconds of a step in which a device waits for collectives, and in which it has other work meanwhile."""
    found = _with_prediction(group)
    axes = list(dict.fromkeys(axis for _, one in found for axis in one["exposed_seconds_by_axis"]))
    if not axes:
        return []
    rows = tuple(
        (
            str(index),
            *(
                f"{one['exposed_seconds_by_axis'][axis] * 1e3:.1f} + {one['hidden_seconds_by_axis'][axis] * 1e3:.1f}"
                if axis in one["exposed_seconds_by_axis"]
                else ""
                for axis in axes
            ),
        )
        for index, one in found
    )
    return [Table(f"{group['name']}: communication by mesh axis, ms exposed + hidden", ("", *axes), rows)]


def _kinds(group: dict[str, Any]) -> list[Table]:
    found = _with_prediction(group)
    kinds = list(dict.fromkeys(kind for _, one in found for kind in one["collective_bytes"]))
    if not kinds:
        return []
    rows = tuple(
        (
            str(index),
            *(
                quantity(one["collective_bytes"][kind], "B") if kind in one["collective_bytes"] else ""
                for kind in kinds
            ),
        )
        for index, one in found
    )
    return [Table(f"{group['name']}: bytes of collectives in a step, a device", ("", *kinds), rows)]


def _losing(group: dict[str, Any]) -> list[Table]:
    """Of the best, or of the first that was compiled where none is best."""
    found = dict(_with_prediction(group))
    index = group["best"] if group["best"] is not None else next(iter(found), None)
    if index is None or not found[index]["losing"]:
        return []
    rows = tuple(
        (
            one["name"][:34],
            _scope(one["scope"]),
            one["category"],
            str(one["count"]),
            duration(one["seconds"]),
            duration(one["floor_seconds"]),
            duration(one["lost_seconds"]),
        )
        for one in found[index]["losing"]
    )
    columns = ("instruction", "where", "category", "times", "predicted", "floor", "lost")
    return [Table(f"{group['name']}: what loses most in candidate {index}, a step", columns, rows, left=3)]


def _scope(scope: str) -> str:
    """The end of a scope says what it is."""
    return scope if len(scope) <= 36 else "…" + scope[-35:]


def _commands(record: dict[str, Any]) -> list[str]:
    lines = []
    for group in record["groups"]:
        best = group["best"]
        said = group["best_reason"] if best is None else group["candidates"][best]["command"]
        lines.append(f"{group['name']}: {said or 'no entry point serves this config'}")
    return lines


def _notes(record: dict[str, Any]) -> list[str]:
    lines: dict[str, None] = {}
    for group in record["groups"]:
        lines |= dict.fromkeys(f"{group['name']}: {note}" for note in group["notes"])
        for index, one in enumerate(group["candidates"]):
            if one.get("reason") is not None:
                lines[f"{group['name']}, candidate {index}: {one['reason']}"] = None
            lines |= dict.fromkeys(one.get("assumptions", ()))
            if one["losing"] is None and "losing_reason" in one:
                lines[one["losing_reason"]] = None
            if one["source"] == "analytic model":
                lines[f"memory: {one['need_source']}"] = None
    return list(lines)


# Plot


def _plot(record: dict[str, Any]) -> str:
    bars = [
        (f"{group['name']}\n{index}: {_mesh(one)}", one)
        for group in record["groups"]
        for index, one in _with_prediction(group)
    ]

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(part for _, one in bars for part in _stack(one)))
        below = [0.0] * len(bars)
        for name in names:
            heights = [_stack(one).get(name, 0.0) * 1e3 for _, one in bars]
            axes.bar(range(len(bars)), heights, bottom=below, label=name, width=0.7)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        for place, (_, one) in enumerate(bars):
            axes.annotate(f"MFU {_share(one['mfu'])}", (place, below[place]), ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=6, rotation=45, ha="right")
        axes.set(ylabel="predicted ms a step", title="Predicted step by part; communication is what is exposed of it")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw_svg("plan", draw)


def _stack(one: dict[str, Any]) -> dict[str, float]:
    """Parts that add up to the step: a compiled program's have collectives among them."""
    parts = dict(one["parts_seconds"])
    if "collectives" not in parts:
        parts["collectives"] = sum(one["exposed_seconds_by_axis"].values())
    return parts
