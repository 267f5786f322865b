"""The profiled window of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from parallel import distributed
from perf.capture import Capture, parse_window
from perf.marks import INPUT_MARK, STEP_MARK

WARMUP_STEPS = 2
"""After a start: the first steps load what was compiled, and fill the input's queues."""


class ProfiledWindow:
    """Captures the steps of `TrainRun.profile`, once, and knows which steps its cost falls on."""

    def __init__(self, profile: str | None, run_dir: Path) -> None:
        self.steps = range(0) if profile is None else parse_window(profile)
        self._folder = run_dir / "profiles"
        self._capture: Capture | None = None
        self.captured: Path | None = None
        """Where the trace is, once there is one."""

    def opens(self, step: int, *, start: int) -> bool:
        """Whether the capture begins before `step`, in an attempt that began after `start` steps. A window that an
        earlier attempt was in is not captured again by halves."""
        return bool(self.steps) and step == self.steps.start and step > start + WARMUP_STEPS and not self.captured

    def open(self) -> None:
        process, name = distributed.process_info(), f"steps-{self.steps.start}-{self.steps.stop - 1}"
        self._capture = Capture(self._folder / (name if process.count == 1 else f"{name}-process-{process.index}"))
        self._capture.start()

    def closes(self, step: int) -> bool:
        """Whether the capture ends after `step`."""
        return self._capture is not None and step == self.steps.stop - 1

    def close(self, programs: Mapping[str, jax.stages.Compiled] | None = None, **facts: Any) -> None:
        """Ends a capture that is under way, of the whole window or of what came of it. The text of `programs` is kept
        beside the trace."""
        if self._capture is not None:
            window = {"first_step": self.steps.start, "last_step": self.steps.stop - 1}
            self._capture.stop(kind="train", **window, **facts)
            for name, compiled in (programs or {}).items():
                self._capture.save_program(name, compiled.as_text())
            self.captured, self._capture = self._capture.folder, None

    def covers(self, step: int) -> bool:
        """Whether the time of `step` is one with the profiler's own."""
        return step in self.steps and (self._capture is not None or self.captured is not None)

    def annotation(self, step: int) -> contextlib.AbstractContextManager:
        """Marks a step on the trace's timeline."""
        if self._capture is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation(STEP_MARK, step_num=step)

    def input(self) -> contextlib.AbstractContextManager:
        """Marks the time in which the host takes a batch."""
        return contextlib.nullcontext() if self._capture is None else jax.profiler.TraceAnnotation(INPUT_MARK)
