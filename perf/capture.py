"""Traces of a window of a run: what `jax.profiler` saw, and a note beside it of what was captured."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import jax

NOTE_FILE = "capture.json"
PROGRAM_FILE = "{name}.hlo.gz"
"""Optimised HLO of a program that ran in the window: what its ops are, which a trace has by name alone."""
SCHEMA = 1


class Capture:
    """One trace, of this process, in a folder of its own. xprof opens the folder, Perfetto its *.json.gz.

    Profiling costs time, so that no absolute number of a run or a window that was profiled counts: whoever captures
    says so in its records.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` with a number after it where it is taken: two traces in one can't be told apart."""
        self.folder, number = folder, 0
        while self.folder.exists():
            number += 1
            self.folder = folder.with_name(f"{folder.name}.{number}")
        self._began: float | None = None

    @property
    def active(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        """Raises RuntimeError if another trace of this process is under way; OSError for a folder that can't be made.

        What runs on the devices already is in the trace: wait for it before, for a window with a clear beginning.
        """
        assert not self.active
        self.folder.mkdir(parents=True)
        jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
        self._began = time.time()

    def stop(self, **facts: Any) -> None:
        """Writes the trace, and `facts` about what was captured beside it."""
        assert self._began is not None
        began, self._began = self._began, None
        seconds = time.time() - began
        jax.profiler.stop_trace()
        devices = jax.local_devices()
        note = {
            "schema": SCHEMA,
            "process": jax.process_index(),
            "device": devices[0].device_kind,
            "local_devices": len(devices),
            "jax": jax.__version__,
            "started": began,
            "seconds": seconds,
            "absolute_numbers_count": False,
            **facts,
        }
        (self.folder / NOTE_FILE).write_text(json.dumps(note, indent=1) + "\n", "utf-8")

    def save_program(self, name: str, text: str) -> None:
        """Keeps the optimised HLO of a program that ran in the window. After `stop`: nothing waits for it."""
        with gzip.open(self.folder / PROGRAM_FILE.format(name=name), "wt", encoding="utf-8") as file:
            file.write(text)


def parse_window(text: str) -> range:
    """Steps of "FIRST:LAST", both counted, from 1. Raises ValueError for another form."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile={text!r} must be FIRST:LAST, two steps counted from 1, such as 10:13")
    return range(int(first), int(last) + 1)
