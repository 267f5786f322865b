"""The tables, the JSON record and the plot of `python -m perf scaling`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from perf.plot import draw_svg
from perf.report import Notes, Plot, Report, Table, duration, quantity
from perf.scaling import PARTS, REST, Mean, Size, Tax, common_peak, geometric_mean, mfus, rates, scaling_tax, split


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Of one size, from the configuration and the chip alone. Seconds are of a step."""

    step_seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was asked for, and what was measured. `predicted` by devices; empty for `predicted_reason`."""

    config: str
    strong: bool
    chip: str
    virtual: bool
    """CPU devices of one machine, which share its cores."""
    sizes: tuple[Size, ...]
    """In the order of devices: the first is the base."""
    target: float
    """Half of the interval of a tax that was asked for."""
    predicted: Mapping[int, Predicted]
    predicted_reason: str | None


def scaling_report(survey: Survey) -> Report:
    lines = [_Line(survey, size) for size in survey.sizes]
    kind = "strong" if survey.strong else "weak"
    title = f"Scaling of {survey.config} on {survey.chip}, {kind}: {_sizes(survey.sizes)} devices"
    parts: list[Table | Notes | Plot] = [_table(lines), _split_table(lines), Notes("Notes", _notes(survey, lines))]
    parts.append(Plot("MFU and tax by devices", lambda: _svg(survey, lines)))
    return Report(title, _record(survey, lines), parts)


class _Line:
    """One size against the first."""

    def __init__(self, survey: Survey, size: Size) -> None:
        base = survey.sizes[0]
        self.size, self.is_base = size, size is base
        peak = common_peak(survey.sizes)
        own, first = mfus(size, peak), mfus(base, peak)
        self.mfu = None if own is None else geometric_mean(own)
        self.rate = geometric_mean(rates(size))
        self.step = geometric_mean([repeat.step_mean for repeat in size.repeats])
        self.tax: Tax | None = None
        self.parts: dict[str, float | None] = {}
        self.reasons: dict[str, str] = {}
        if not self.is_base:
            self.tax = (
                scaling_tax(rates(base), rates(size)) if own is None or first is None else scaling_tax(first, own)
            )
            self.parts, self.reasons = split(base, size, self.tax)
        self.predicted = survey.predicted.get(size.devices)
        self.predicted_tax: float | None = None
        self.predicted_exposed: float | None = None
        first_step = survey.predicted.get(base.devices)
        if self.predicted is not None and first_step is not None and not self.is_base:
            work = size.batch_size / size.devices, base.batch_size / base.devices
            self.predicted_tax = 1 - work[0] / self.predicted.step_seconds * first_step.step_seconds / work[1]
            share = (one.exposed_seconds / one.step_seconds for one in (self.predicted, first_step))
            self.predicted_exposed = next(share) - next(share) * (1 - self.predicted_tax)


def _sizes(sizes: Sequence[Size]) -> str:
    return ", ".join(str(size.devices) for size in sizes)


def percent(value: float | None) -> str:
    # Rounded first, and 0 added: what is left of a tax may be -0.00001.
    return "n/a" if value is None else f"{round(value, 3) + 0.0:.1%}"


def _interval(low: float | None, high: float | None) -> str:
    return "n/a" if low is None or high is None else f"{low:.1%} to {high:.1%}"


def _table(lines: Sequence[_Line]) -> Table:
    columns = ("devices", "batch", "runs", "step", "tokens/s per device", "MFU", "tax", "95% interval", "predicted tax")
    return Table("Scaling tax", columns, tuple(_row(line) for line in lines), left=0)


def _row(line: _Line) -> tuple[str, ...]:
    predicted = "n/a" if line.predicted_tax is None else percent(line.predicted_tax)
    taxed = (
        ("base", "", "base")
        if line.tax is None
        else (
            percent(line.tax.value),
            _interval(line.tax.low, line.tax.high),
            predicted,
        )
    )
    return (
        str(line.size.devices),
        str(line.size.batch_size),
        str(len(line.size.repeats)),
        duration(line.step.value),
        quantity(line.rate.value),
        percent(None if line.mfu is None else line.mfu.value),
        *taxed,
    )


def _split_table(lines: Sequence[_Line]) -> Table:
    rows = []
    for line in lines:
        if line.tax is None:
            continue
        rows.append(
            (f"{line.size.devices}", *(percent(line.parts[part]) for part in (*PARTS, REST)), percent(line.tax.value))
        )
        if line.predicted_tax is not None and line.predicted_exposed is not None:
            rest = percent(line.predicted_tax - line.predicted_exposed)
            exposed = percent(line.predicted_exposed)
            rows.append(
                (
                    f"{line.size.devices} predicted",
                    exposed,
                    *("n/a",) * (len(PARTS) - 1),
                    rest,
                    percent(line.predicted_tax),
                )
            )
    return Table("Where the tax goes, in points of it", ("devices", *PARTS, REST, "tax"), tuple(rows))


def _notes(survey: Survey, lines: Sequence[_Line]) -> tuple[str, ...]:
    base = survey.sizes[0]
    notes = [
        f"tax = 1 - MFU(n) / MFU({base.devices}), of means over runs; interval: Student's, over runs, not steps.",
        "Strong: the same batch on every size."
        if survey.strong
        else "Weak: the same rows on each device at every size.",
    ]
    if any(line.mfu is None for line in lines):
        reason = next(repeat.peak_reason for line in lines for repeat in line.size.repeats if repeat.peak is None)
        notes.append(f"No MFU ({reason}): the tax is of tokens/s per device.")
    elif (peak := common_peak(survey.sizes)) is not None:
        notes.append(
            f"The peak is measured: {quantity(peak, 'FLOP/s')} for the machine, the median of what the runs found, "
            "over the number of devices."
        )
    if survey.virtual:
        notes.append(
            "Virtual CPU devices share the cores of one machine: tokens/s per device falls with their number by "
            "construction, and what they wait for each other is the machine's scheduling. This tests the method, and "
            "says nothing of a network."
        )
    wide = [line for line in lines if line.tax is not None and line.tax.half_width > survey.target]
    for line in wide:
        assert line.tax is not None
        reached = line.tax.reason or f"±{line.tax.half_width:.1%} after {len(line.size.repeats)} runs"
        notes.append(f"{line.size.devices} devices: the interval is wider than ±{survey.target:.1%}: {reached}.")
    seen: dict[str, list[str]] = {}
    for line in lines:
        for part, reason in line.reasons.items():
            seen.setdefault(reason, []).append(f"{part} on {line.size.devices}")
    notes += [f"n/a, {', '.join(places)}: {reason}." for reason, places in seen.items()]
    notes.append(f"No prediction: {survey.predicted_reason}." if survey.predicted_reason else _PREDICTED)
    notes.append(
        "Communication, imbalance (waiting for the last device in a collective), input and host are shares of a few "
        "profiled steps, in a run that is not among those counted; jitter is mean over median of the steps that are."
    )
    return tuple(notes)


_PREDICTED = (
    "Predicted: by the model of a step that `perf plan` ranks with, for the mesh of each size; it knows no jitter, "
    "input or imbalance."
)


def _record(survey: Survey, lines: Sequence[_Line]) -> dict[str, Any]:
    return {
        "config": survey.config,
        "chip": survey.chip,
        "scaling": "strong" if survey.strong else "weak",
        "virtual_devices": survey.virtual,
        "base_devices": survey.sizes[0].devices,
        "target_half_width": survey.target,
        "tax_of": "tokens_per_second_per_device" if any(line.mfu is None for line in lines) else "mfu",
        "machine_peak_flops": common_peak(survey.sizes),
        "machine_peak_flops_reason": None
        if common_peak(survey.sizes)
        else "no run measured its peak: the chip's is used",
        "predicted_reason": survey.predicted_reason,
        "sizes": [_size_record(line) for line in lines],
    }


def _size_record(line: _Line) -> dict[str, Any]:
    size = line.size
    record: dict[str, Any] = {
        "devices": size.devices,
        "batch_size": size.batch_size,
        "tokens_per_second_per_device": _mean_record(line.rate),
        "step_seconds": _mean_record(line.step),
        "mfu": None if line.mfu is None else _mean_record(line.mfu),
        "runs": [dataclasses.asdict(repeat) for repeat in size.repeats],
        "shares": None if size.shares is None else dict(size.shares.values),
        "shares_reason": size.shares_reason,
        "predicted": None if line.predicted is None else dataclasses.asdict(line.predicted),
        "predicted_tax": line.predicted_tax,
        "tax": None if line.tax is None else dataclasses.asdict(line.tax),
        "tax_parts": line.parts or None,
        "tax_parts_reasons": line.reasons,
        "predicted_exposed_communication": line.predicted_exposed,
    }
    if line.mfu is None:
        record["mfu_reason"] = next(repeat.peak_reason for repeat in size.repeats if repeat.peak is None)
    if line.tax is None:
        record["tax_reason"] = "the base"
    return record


def _mean_record(mean: Mean) -> dict[str, Any]:
    return dataclasses.asdict(mean)


def _svg(survey: Survey, lines: Sequence[_Line]) -> str:
    figure = [line.mfu or line.rate for line in lines]
    label = "MFU" if all(line.mfu for line in lines) else "tokens/s per device"
    devices = [line.size.devices for line in lines]

    def draw(axes: Any) -> None:
        below = [one.value - (one.value if one.low is None else one.low) for one in figure]
        above = [(one.value if one.high is None else one.high) - one.value for one in figure]
        values = [one.value for one in figure]
        axes.errorbar(devices, values, yerr=[below, above], marker="o", capsize=4, label="measured, 95% interval")
        axes.plot(devices, [values[0]] * len(values), linestyle=":", color="#888888", label="no tax")
        known = [(line.size.devices, line.predicted_tax) for line in lines if line.predicted_tax is not None]
        if known:
            xs, taxes = zip(*known, strict=True)
            axes.plot(
                [devices[0], *xs], [values[0]] + [values[0] * (1 - tax) for tax in taxes], "s--", label="predicted"
            )
        for line, value in zip(lines, values, strict=True):
            if line.tax is not None:
                axes.annotate(
                    f"tax {line.tax.value:.1%}", (line.size.devices, value), (4, -16), textcoords="offset points"
                )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="devices", ylabel=label, ylim=(0, 1.2 * max(values)), title=survey.config)
        axes.set_xticks(devices, [str(one) for one in devices])
        axes.legend(fontsize=8, loc="lower left")

    return draw_svg("scaling", draw)
