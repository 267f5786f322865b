"""Where a run's metrics go: a JSONL file, TensorBoard, the terminal, and one summary line on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from parallel import distributed

ConsoleMode = Literal["auto", "rich", "plain", "quiet"]

# An fsync of the event file costs milliseconds: at most one in this many seconds.
TENSORBOARD_FLUSH_SECONDS = 10.0

# Bytes; how far back from its end a metrics file is read when a run is resumed.
LONGEST_RECORD = 1 << 20


class MetricsFile:
    """`metrics.jsonl`, append-only: one JSON object a line, each in the file as soon as `append` returns.

    A line that a kill cut short is removed when the file is opened again. `attempt` is 1 in a new file, and one more
    than the last record's in a file that has records.
    """

    def __init__(self, path: Path):
        self.path = path
        # Unbuffered, so that nothing is left to fail in close() after a full disk has been reported.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        self.attempt = self._repair() + 1

    def _repair(self) -> int:
        """Cuts off a torn last line; returns the last record's attempt, 0 if there is none."""
        size = self._file.seek(0, os.SEEK_END)
        start = self._file.seek(max(0, size - LONGEST_RECORD))
        whole, newline, torn = self._file.read().rpartition(b"\n")
        try:
            if start and not newline:
                raise ValueError(f"no line ends within the last {LONGEST_RECORD} bytes")
            if torn:
                self._file.truncate(size - len(torn))
            return json.loads(whole.rpartition(b"\n")[2])["attempt"] if whole else 0
        except (ValueError, KeyError, TypeError) as error:
            self._file.close()
            raise ValueError(
                f"{self.path} does not end in a record of a run ({error}); move it away or choose another run name"
            ) from error

    def append(self, record: Mapping[str, object]) -> None:
        """Raises OSError with the path and what to do if the disk is full."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with explain_write_error(self.path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def explain_write_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"metrics can't be written ({error.strerror}); free space there and start the run again: "
            "it goes on from its last checkpoint",
            str(path),
        ) from error


class Reporter:
    """Reports one run under `run_dir`; only process 0 writes or prints, on the others every method does nothing.

    stdout carries results: `say(..., results=True)` and, as the last line, `summary`. Progress and remarks go to
    stderr, `console` saying how: "rich" (a live display), "plain" (a line per record), "quiet", or "auto" (rich on a
    terminal, else plain).
    Use it as a context manager: it gives the terminal back also when the run fails. Call after multi-host start-up.

    Raises ValueError if `run_dir` can't be written.
    """

    def __init__(self, run_dir: Path, *, console: ConsoleMode = "auto", tensorboard: bool = True, total_steps: int):
        self.total_steps = total_steps
        self._metrics: MetricsFile | None = None
        self._events: EventsWriter | None = None
        self._display: Display | None = None
        self._tensorboard_dir = run_dir / "tensorboard"
        if not distributed.is_primary():
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = MetricsFile(run_dir / "metrics.jsonl")
            if tensorboard:
                self._tensorboard_dir.mkdir(exist_ok=True)
                # The name holds the time in seconds only: the attempt keeps a quick restart from overwriting.
                prefix, suffix = str(self._tensorboard_dir / "events"), f".{self._metrics.attempt}"
                self._events = EventsWriter(prefix, suffix)
        except OSError as error:
            self.close()
            raise ValueError(f"run directory {run_dir} can't be written: {error}; choose another one") from error
        self._flushed = time.monotonic()
        self._display = Display(console, total_steps)

    @property
    def attempt(self) -> int:
        """How often the run was started, this time included; 0 on a process that writes nothing."""
        return self._metrics.attempt if self._metrics is not None else 0

    def resume(self, step: int) -> None:
        """Goes on after `step`. Older records of later steps stay in the JSONL, marked by their attempt; TensorBoard
        hides them."""
        if self._display is not None:
            self._display.start_step = step
        if self._events is not None:
            self._events.write_event(
                Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def log(self, step: int, record: Mapping[str, object], *, event: str = "train") -> None:
        """Writes one record. Numbers also become TensorBoard scalars `event/name`; NaN and infinities become null.

        The progress line of event "train" shows `loss` (nats per token), `tokens_per_second`, `mfu` (0 to 1) and
        `learning_rate`; other events show all their numbers. Raises OSError if the disk is full.
        """
        if self._metrics is None:
            return
        clean = finite(record)
        self._metrics.append({"event": event, "step": step, "attempt": self.attempt, "time": time.time(), **clean})
        self._write_scalars(step, clean, event)
        self._display.show(step, clean, event)

    def _write_scalars(self, step: int, record: Mapping[str, object], event: str) -> None:
        if self._events is None:
            return
        now = time.time()
        # Not tensorboardX's own queue: its thread dies silently on a full disk, and the queue then blocks the run.
        with explain_write_error(self._tensorboard_dir):
            for name, value in record.items():
                if isinstance(value, int | float):
                    summary = scalar(f"{event}/{name}", float(value))
                    self._events.write_event(Event(wall_time=now, step=step, summary=summary))
            if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()

    def say(self, text: str, *, results: bool = False) -> None:
        """Prints text to stderr, or to stdout if it is a result of the run."""
        if self._display is not None:
            self._display.say(text, results=results)

    def summary(self, record: Mapping[str, object]) -> None:
        """Prints the one line of JSON that ends stdout, and keeps it in the JSONL. Ends the progress display.

        Every null has a `<name>_reason` beside it: the caller's, or what the value was if it was not finite.
        """
        if self._metrics is None:
            return
        clean = {"event": "summary", **finite(record)}
        for name in [name for name, value in clean.items() if value is None and not name.endswith("_reason")]:
            clean.setdefault(f"{name}_reason", "not measured in this run")
        self._metrics.append({**clean, "attempt": self.attempt, "time": time.time()})
        self._display.close()
        print(json.dumps(clean, allow_nan=False), flush=True)

    def close(self) -> None:
        """Closes the files and gives the terminal back. Calling it again does nothing."""
        if self._display is not None:
            self._display.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            events, self._events = self._events, None
            with explain_write_error(self._tensorboard_dir):
                events.close()
        self._metrics = self._display = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # After a full disk, flushing the event file fails once more: the first error is the one to show.
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.close()


def finite(record: Mapping[str, object]) -> dict[str, object]:
    """`record` as plain Python values that JSON can hold.

    Arrays become numbers or lists. A value that is or contains NaN or an infinity keeps null in its place, and
    `<name>_reason` says which it was unless the record has one.
    """
    clean: dict[str, object] = {}
    reasons: dict[str, str] = {}
    for name, value in record.items():
        bad: list[float] = []
        clean[name] = _finite_value(value, bad)
        if bad:
            reasons[f"{name}_reason"] = f"not finite: {', '.join(dict.fromkeys(map(str, bad)))}"
    return {**clean, **{name: reason for name, reason in reasons.items() if clean.get(name) is None}}


def _finite_value(value: object, bad: list[float]) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        bad.append(value)
        return None
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite_value(item, bad) for item in value]
    if isinstance(value, os.PathLike):
        return str(value)
    array = np.asarray(value)
    assert array.dtype != object, f"not a metric: {value!r}"
    if array.dtype.kind not in "biu":  # bfloat16 and its like have no Python number of their own.
        array = array.astype(np.float64)
    return _finite_value(array.tolist(), bad)


class Display:
    """What a person sees on stderr while the run goes on."""

    def __init__(self, mode: ConsoleMode, total_steps: int):
        self.total_steps = total_steps
        self.start_step = 0
        self._console = Console(stderr=True, highlight=False)
        self._mode = mode if mode != "auto" else ("rich" if self._console.is_terminal else "plain")
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._first: tuple[int, float] | None = None
        self._line = ""

    def show(self, step: int, record: Mapping[str, object], event: str) -> None:
        if event != "train":
            self.say(event_line(event, step, self.total_steps, record))
            return
        self._line = train_line(step, self.total_steps, record, self._eta(step))
        if self._mode == "rich":
            self._start()
            self._progress.update(self._task, completed=step, line=self._line)
        elif self._mode == "plain":
            print(self._line, file=sys.stderr, flush=True)

    def _start(self) -> None:
        if self._progress is not None:
            return
        # stdout is left alone: rich would send what others print there to stderr.
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            console=self._console,
            redirect_stdout=False,
            transient=True,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("train", total=self.total_steps, completed=self.start_step, line="")
        self._progress.start()

    def _eta(self, step: int) -> float | None:
        """Seconds to the last step at the pace since the first record, which itself holds compilation."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self.total_steps - step)

    def say(self, text: str, *, results: bool = False) -> None:
        if results:
            with self._paused():
                print(text, flush=True)
        elif self._progress is not None:
            self._console.print(text, markup=False, soft_wrap=True)
        elif self._mode != "quiet":
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Takes the live display off the screen, which stdout may share."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def close(self) -> None:
        """Ends the live display; its last line stays on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            print(self._line, file=sys.stderr, flush=True)


def train_line(step: int, total: int, record: Mapping[str, object], eta: float | None) -> str:
    """One aligned line; "-" for what is not known."""
    loss, speed = record.get("loss"), record.get("tokens_per_second")
    mfu, rate = record.get("mfu"), record.get("learning_rate")
    return " | ".join(
        (
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {'-' if loss is None else f'{loss:.4f}':>8}",
            f"{'-' if speed is None else si(speed):>6} tok/s",
            f"mfu {'-' if mfu is None else f'{mfu:.1%}':>6}",
            f"lr {'-' if rate is None else f'{rate:.2e}':>8}",
            f"eta {'-' if eta is None else clock(eta):>8}",
        )
    )


def event_line(event: str, step: int, total: int, record: Mapping[str, object]) -> str:
    numbers = [(name, value) for name, value in record.items() if isinstance(value, int | float | str)]
    shown = [f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers]
    return " | ".join([f"{event} {step:>{len(str(total))}}/{total}", *shown])


def si(number: float) -> str:
    """Three significant digits and a unit prefix: 12345 is 12.3k."""
    for divisor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.95 and above would print as four digits of the smaller prefix.
        if abs(number) >= divisor * 0.9995:
            return f"{number / divisor:.3g}{prefix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
