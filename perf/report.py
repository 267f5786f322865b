"""A report in three forms: tables in a terminal, JSON, and one self-contained HTML page with plots.

A command describes its result once, as tables, notes and plots beside the figures themselves; nothing here computes.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

# A terminal narrower than its tables wraps cells; where there is no terminal (a pipe, a log) nothing has to wrap.
PIPE_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are printed, one tuple per row. The first `left` columns are text, the others right-aligned.

    The last `totals` rows are set apart.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    totals: int = 0

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


@dataclasses.dataclass(frozen=True)
class Notes:
    """Sentences: assumptions, and the reasons of what is missing."""

    title: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Drawn for the page only. `draw` returns one <svg> element."""

    title: str
    draw: Callable[[], str]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command found. `record` is its JSON: plain values, None where one can't be known, with a reason beside it.

    `status` is the exit status of the process.
    """

    title: str
    record: Mapping[str, Any]
    parts: Sequence[Table | Notes | Plot]
    status: int = 0


def json_text(report: Report) -> str:
    """NaN and infinity are bugs: a figure that is not known is null."""
    return json.dumps(report.record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def print_report(report: Report, console: Console | None = None) -> None:
    """Tables and notes, without the plots."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(Text(report.title, style="bold"))
    for part in report.parts:
        if isinstance(part, Table):
            console.print()
            console.print(Text(part.title, style="bold"))
            console.print(_rich_table(part))
        elif isinstance(part, Notes):
            console.print()
            console.print(Text(part.title, style="bold"))
            for line in part.lines:
                console.print(Text(f"- {line}"))


def _rich_table(table: Table) -> RichTable:
    # One space between columns: a table of ops has thirteen.
    rich = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(table.columns):
        rich.add_column(Text(name), justify="left" if index < table.left else "right")
    for index, row in enumerate(table.rows):
        if table.totals and index == len(table.rows) - table.totals:
            rich.add_section()
        rich.add_row(*(Text(cell) for cell in row))
    return rich


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #888; }
.text { text-align: left; }
.total td { font-weight: 600; background: #f6f6f6; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
"""


def html_page(report: Report) -> str:
    """A page that loads nothing: styles, plots and the record itself are inside."""
    body = "\n".join(_html_part(part) for part in report.parts)
    title = html.escape(report.title)
    record = html.escape(json_text(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n"
        f"<details>\n<summary>Figures as JSON</summary>\n<pre>{record}</pre>\n</details>\n</body>\n</html>\n"
    )


def _html_part(part: Table | Notes | Plot) -> str:
    heading = f"<h2>{html.escape(part.title)}</h2>"
    if isinstance(part, Plot):
        return f"{heading}\n{part.draw()}"
    if isinstance(part, Notes):
        return heading + "\n<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in part.lines) + "\n</ul>"
    lines = [_html_row("th", part.columns, part.left)]
    for index, row in enumerate(part.rows):
        is_total = index >= len(part.rows) - part.totals
        lines.append(_html_row("td", row, part.left, ' class="total"' if is_total else ""))
    return f'{heading}\n<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _html_row(tag: str, cells: Sequence[str], left: int, attributes: str = "") -> str:
    text = f'<{tag} class="text">', f"<{tag}>"
    texts = [f"{text[index >= left]}{html.escape(cell)}</{tag}>" for index, cell in enumerate(cells)]
    return f"<tr{attributes}>{''.join(texts)}</tr>"


def quantity(value: float | None, unit: str = "", digits: int = 3) -> str:
    """17.4 G and the unit: `digits` significant digits and a decimal prefix; "n/a" for None."""
    if value is None:
        return "n/a"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Rounded first: 999.6 M is 1.00 G with three digits.
        if abs(float(f"{value:.{digits}g}")) >= factor:
            return f"{_digits(value / factor, digits)} {prefix}{unit}"
    return f"{_digits(value, digits)} {unit}".rstrip()


def duration(seconds: float | None, digits: int = 3) -> str:
    """5.24 ms: `digits` significant digits in s, ms or µs; "n/a" for None."""
    if seconds is None:
        return "n/a"
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(float(f"{seconds:.{digits}g}")) >= factor:
            return f"{_digits(seconds / factor, digits)} {unit}"
    return f"{_digits(seconds / 1e-6, digits)} µs"


def number(value: float | None) -> str:
    """1,432 or 5.24: whole from 100 on, three significant digits below; "n/a" for None."""
    if value is None:
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 99.95 else _digits(value, 3)


def _digits(value: float, digits: int) -> str:
    """Without an exponent: large values in full, small ones to as many places as digits."""
    text = f"{value:.{digits}g}"
    if "e+" in text:
        return f"{float(text):.0f}"
    return f"{value:.{digits}f}" if "e-" in text else text
