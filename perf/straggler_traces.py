"""Who waits least, from a trace of every process over the same steps: compute without collectives, and waiting in them.

In a synchronous step every device leaves a collective together with the last to arrive. So all steps are equally long,
and a slow device shows by more time in compute and less in collectives than the others have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perf.breakdown import breakdown
from perf.stragglers import THRESHOLD, peer_median
from perf.trace import find_trace, read_trace

_FOLDER = re.compile(r"(?P<window>.+?)(-process-(?P<process>\d+))?(\.\d+)?")


@dataclasses.dataclass(frozen=True)
class TracedDevice:
    """Seconds of a step: in its program without collectives (also between two of its ops: a host that launches them
    slowly is slow), in collectives that nothing hides, and the whole step."""

    host: int
    device: int
    """Among those of its host."""
    compute: float
    collectives: float
    step: float


@dataclasses.dataclass(frozen=True)
class TracedRun:
    """One window of steps. `ratios`: compute of each device over the median of the others'."""

    window: str
    devices: tuple[TracedDevice, ...]
    ratios: tuple[float, ...]

    @property
    def culprit(self) -> int | None:
        """Place of the device that computes longest, by the threshold more than the others, if it also waits least;
        None where no device does both."""
        slowest = max(range(len(self.devices)), key=self.ratios.__getitem__)
        least = min(range(len(self.devices)), key=lambda place: self.devices[place].collectives)
        return slowest if slowest == least and self.ratios[slowest] >= 1 + THRESHOLD else None


def read_window(profiles: Path) -> TracedRun | None:
    """The newest window in a run's folder of profiles; None without one, or with one device only.

    Raises ValueError for a trace that can't be read.
    """
    windows: dict[str, dict[int, Path]] = {}
    for folder in sorted(profiles.glob("*"), key=lambda one: one.stat().st_mtime):
        found = _FOLDER.fullmatch(folder.name)
        if folder.is_dir() and found is not None:
            windows.setdefault(found["window"], {})[int(found["process"] or 0)] = folder
    if not windows:
        return None
    window = max(windows, key=lambda name: max(folder.stat().st_mtime for folder in windows[name].values()))
    devices = [one for host, folder in sorted(windows[window].items()) for one in traced_devices(host, folder)]
    return None if len(devices) < 2 else TracedRun(window, tuple(devices), compute_ratios(devices))


def traced_devices(host: int, folder: Path) -> list[TracedDevice]:
    found = breakdown(read_trace(find_trace(folder)))
    return [
        TracedDevice(
            host,
            place,
            (device.compute + device.nanoseconds["launch"]) / device.steps / 1e9,
            device.nanoseconds["collective"] / device.steps / 1e9,
            device.step / 1e9,
        )
        for place, device in enumerate(found.devices)
    ]


def compute_ratios(devices: Sequence[TracedDevice]) -> tuple[float, ...]:
    times = np.array([[one.compute] for one in devices])
    return tuple((times / peer_median(times))[:, 0].tolist())
