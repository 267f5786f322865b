"""The frame of `python -m perf`: finds a command, parses its settings, and prints, saves and draws its report.

A command is a module with `Settings`, a dataclass that extends `Output` (or a union of such, which become subcommands),
and `report(settings) -> Report`. It is named in `COMMANDS`, and imported only when it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """What is typed, what it is for in a line, and the module that does it."""

    name: str
    summary: str
    module: str


COMMANDS = (
    # One line a command, in the order of the usage text.
    Command("roofline", "FLOPs, bytes and time floor of every op, from a config alone", "perf.commands.roofline"),
    Command("plan", "meshes and memory policies of a run, compiled for slices that are not here", "perf.commands.plan"),
    Command("doctor", "what holds a run back, from its metrics, a trace or its program", "perf.commands.doctor"),
    Command("scaling", "what a device loses because it is one of several, and to what", "perf.commands.scaling"),
    Command("fleet", "what runs reached across sizes and versions, and a gate for regressions", "perf.commands.fleet"),
    Command("stragglers", "the host that a run waits for, and when its step time changed", "perf.commands.stragglers"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where a report goes beside the terminal: settings of every command."""

    json: str | None = None
    """Write the figures as JSON to this file; - prints them instead of the tables."""
    html: str | None = None
    """Write one self-contained page, with the plots, to this file."""


def usage() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: python -m perf COMMAND [--setting value ...]",
            "       python -m perf COMMAND --help     every setting, with its default",
            "",
            *lines,
            "",
            "Each takes --json PATH (- for the terminal) and --html PATH.",
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Exit status: 0, 2 for settings that can't work, or what the command's report says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    try:
        return run(find(arguments[0]), arguments[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def find(name: str) -> Command:
    """Raises ValueError for an unknown name, listing the known ones."""
    for command in COMMANDS:
        if command.name == name:
            return command
    known = ", ".join(command.name for command in COMMANDS)
    raise ValueError(f"unknown command {name!r}; commands: {known}")


def run(command: Command, arguments: list[str]) -> int:
    """Exit status of the report. Raises ValueError and OSError for what a user can cause, SystemExit as tyro does."""
    # Imported late: the usage text needs none of it.
    import tyro

    module = importlib.import_module(command.module)
    settings = tyro.cli(
        module.Settings, prog=f"python -m perf {command.name}", description=module.__doc__, args=arguments
    )
    check_output(settings)
    report = module.report(settings)
    write(report, settings)
    return report.status


def check_output(output: Output) -> None:
    """Before the work: a command may take minutes. Raises ValueError for a path that can't be written to."""
    for name, path in (("json", output.json), ("html", output.html)):
        if path is None or (path == "-" and name == "json"):
            continue
        if path == "-" or Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name} {path} is not a file that can be written; give one in a folder that exists")


def write(report, output: Output) -> None:
    """Tables to the terminal, or the JSON in their place; files for the rest."""
    from perf.report import html_page, json_text, print_report

    if output.json != "-":
        print_report(report)
    if output.json == "-":
        print(json_text(report), end="")
    elif output.json is not None:
        Path(output.json).write_text(json_text(report), encoding="utf-8")
    if output.html is not None:
        Path(output.html).write_text(html_page(report), encoding="utf-8")
