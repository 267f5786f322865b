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


def roofline_svg(roofs: Sequence[Roof], points: Iterable[Point], chosen: str) -> str:
    """Log-log: the most FLOP/s that a chip gives at each intensity, the smaller of peak and intensity × bandwidth.
    Points lie below the roof of the chip `chosen` by their launch overhead."""
    shown = [point for point in points if point.intensity > 0]

    def draw(axes: Any) -> None:
        reach = [point.intensity for point in shown] + [roof.peak / roof.bandwidth for roof in roofs]
        left, right = min(reach) / 3, max(reach) * 5
        for roof in roofs:
            ridge = roof.peak / roof.bandwidth
            is_chosen = roof.name == chosen
            axes.plot(
                [left, ridge, right],
                [left * roof.bandwidth, roof.peak, roof.peak],
                label=f"{roof.name} (ridge {ridge:.0f})",
                linewidth=2.6 if is_chosen else 0.9,
                color="black" if is_chosen else None,
                zorder=3 if is_chosen else 2,
            )
        for number, point in enumerate(shown):
            axes.plot(point.intensity, point.rate, "o", color="crimson", markersize=4, zorder=4)
            # Neighbours alternate sides, so that equal intensities stay readable.
            offset = (4, 5) if number % 2 else (4, -10)
            axes.annotate(point.name, (point.intensity, point.rate), offset, textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="FLOPs per byte", ylabel="FLOP/s of one device")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=7, loc="lower right", ncols=2)

    return draw_svg("roofline", draw)
