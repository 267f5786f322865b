"""What each host of a run measured of each step, and the file of it: `hosts.jsonl` in the run's folder.

A line holds some consecutive steps of all hosts, as process 0 was told them. Times are whole microseconds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "hosts.jsonl"
FIELDS = ("seconds", "input", "result", "barrier", "probe")


@dataclasses.dataclass(frozen=True)
class HostSteps:
    """Wall seconds of `hosts` processes over the same steps, float64 [hosts, steps]."""

    steps: tuple[int, ...]
    seconds: np.ndarray
    """Between two steps: waiting, input, and what the host does beside them."""
    input: np.ndarray
    """Until the batch was on its way to the devices."""
    result: np.ndarray
    """Until the step before had ended: devices at work, collectives included."""
    barrier: np.ndarray
    """Until the last host had come."""
    probe: np.ndarray
    """Of the probe behind the step; NaN where there was none."""

    def __post_init__(self) -> None:
        for name in FIELDS:
            assert getattr(self, name).shape == (self.num_hosts, len(self.steps)), name

    @property
    def num_hosts(self) -> int:
        return len(self.seconds)

    @property
    def busy(self) -> np.ndarray:
        """From one barrier to the arrival at the next: the host's step without waiting for other hosts."""
        return self.seconds - self.barrier

    @property
    def host(self) -> np.ndarray:
        """Neither waiting nor input: Python, dispatch, logging."""
        return self.busy - self.input - self.result

    def select(self, keep: np.ndarray) -> HostSteps:
        """Steps by a mask or by their places."""
        arrays = {name: getattr(self, name)[:, keep] for name in FIELDS}
        return HostSteps(tuple(np.asarray(self.steps, int)[keep].tolist()), **arrays)


Row = dict[str, float | None]
"""Seconds of one step of one host, by the names in `FIELDS`; None for what was not measured."""


def join(parts: Sequence[HostSteps]) -> HostSteps:
    """Consecutive measurements as one."""
    steps = tuple(step for part in parts for step in part.steps)
    return HostSteps(
        steps, **{name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in FIELDS}
    )


def from_rows(steps: Sequence[int], rows: Sequence[Sequence[Row]]) -> HostSteps:
    """`rows`: of every host, one per step."""
    arrays = {
        name: np.array(
            [[np.nan if row[name] is None else row[name] for row in of_host] for of_host in rows], np.float64
        )
        for name in FIELDS
    }
    return HostSteps(tuple(steps), **arrays)


def to_json(data: HostSteps) -> dict[str, Any]:
    """Plain values, whole microseconds."""
    return {"steps": list(data.steps), **{name: _microseconds(getattr(data, name)) for name in FIELDS}}


def _microseconds(values: np.ndarray) -> list[list[int | None]]:
    return [[None if np.isnan(value) else round(value * 1e6) for value in of_host] for of_host in values.tolist()]


def from_json(line: dict[str, Any]) -> HostSteps:
    """Raises KeyError, TypeError or ValueError for a line that is none."""
    arrays = {name: np.array(line[name], np.float64) / 1e6 for name in FIELDS}
    if any(array.ndim != 2 or array.shape != (len(line["seconds"]), len(line["steps"])) for array in arrays.values()):
        raise ValueError("its arrays are not [hosts, steps]")
    return HostSteps(tuple(line["steps"]), **arrays)


def read_hosts(path: Path) -> list[HostSteps]:
    """A part for each attempt of the run. A line that a kill cut short is left out.

    Raises ValueError for a file without a line of any step.
    """
    attempts: dict[int, list[HostSteps]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            attempts.setdefault(line["attempt"], []).append(from_json(line))
        except (ValueError, KeyError, TypeError):
            continue
    if not attempts:
        raise ValueError(f"{path} has no line that can be read; give the folder of a run of two processes or more")
    # A run may be started again with another number of processes; within an attempt it is the same.
    return [join(parts) for parts in attempts.values()]
