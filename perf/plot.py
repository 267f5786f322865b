"""Plots as one <svg> element, for pages that load nothing. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

WIDTH_INCHES, HEIGHT_INCHES = 9.0, 5.4


def draw_svg(name: str, draw: Callable[[Any], None]) -> str:
    """What `draw` puts on the axes it is given. `name` keeps the ids of several plots of one page apart."""
    import matplotlib
    from matplotlib.figure import Figure

    # A salt of our own makes the same plot the same text.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


class Roof(NamedTuple):
    """One chip: FLOP/s and bytes/s of a device."""

    name: str
    peak: float
    bandwidth: float


class Point(NamedTuple):
    """One op: FLOPs per byte, and FLOP/s of a device if it takes no longer than its floor."""

    name: str
    intensity: float
    rate: float


class Series(NamedTuple):
    """Points of one kind: what they are, and how they are marked."""

    label: str
    marker: str
    color: str
    points: tuple[Point, ...]


def together(points: Iterable[Point]) -> list[Point]:
    """Points in order of intensity, those whose marks would cover each other as one with all their names."""
    merged: list[Point] = []
    for point in sorted(points, key=lambda point: point.intensity):
        last = merged[-1] if merged else None
        if last and point.intensity < 1.2 * last.intensity and 0.6 < point.rate / last.rate < 1.6:
            merged[-1] = last._replace(name=f"{last.name}, {point.name}")
        else:
            merged.append(point)
    return merged


def roofline_svg(roofs: Sequence[Roof], series: Sequence[Series], chosen: str) -> str:
    """Log-log: the most FLOP/s that a chip gives at each intensity, the smaller of peak and intensity × bandwidth.
    Points lie below the roof of the chip `chosen` by their launch overhead."""

    def draw(axes: Any) -> None:
        shown = [point for one in series for point in one.points]
        reach = [point.intensity for point in shown] + [roof.peak / roof.bandwidth for roof in roofs]
        left, right = min(reach) / 3, max(reach) * 5
        for number, roof in enumerate(roofs):
            _draw_roof(axes, roof, left, right, None if roof.name == chosen else number)
        for one in series:
            _draw_series(axes, one)
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs per byte", ylabel="FLOP/s of one device")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw_svg("roofline", draw)


def _draw_roof(axes: Any, roof: Roof, left: float, right: float, number: int | None) -> None:
    """`number` None: the chip that was asked for."""
    import matplotlib

    ridge = roof.peak / roof.bandwidth
    axes.plot(
        [left, ridge, right],
        [left * roof.bandwidth, roof.peak, roof.peak],
        label=f"{roof.name} (ridge {ridge:.0f})",
        linewidth=2.6 if number is None else 0.9,
        color="black" if number is None else matplotlib.colormaps["tab20"](number % 20),
        zorder=3 if number is None else 2,
    )


def _draw_series(axes: Any, series: Series) -> None:
    xs, ys = [point.intensity for point in series.points], [point.rate for point in series.points]
    axes.plot(xs, ys, series.marker, color=series.color, markersize=4, linestyle="none", label=series.label, zorder=4)
    for number, point in enumerate(together(series.points)):
        # Neighbours alternate sides, so that near ones stay readable.
        offset = (4, 6) if number % 2 else (4, -11)
        where = (point.intensity, point.rate)
        axes.annotate(point.name, where, offset, textcoords="offset points", fontsize=7, color=series.color, zorder=5)
