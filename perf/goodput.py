"""Where the wall time of a run went, over all of its attempts.

Every moment belongs to exactly one bucket: the innermost one that is open, or `other`. So the buckets of an attempt
sum to its wall time exactly (integer nanoseconds). Each attempt appends to `goodput.jsonl` in the run directory; a
later attempt that resumes from a checkpoint turns the steps after it, done in vain, into `lost_work`.

goodput = time of steps that count / wall time, over all attempts. Time between attempts is reported beside it, not
inside: only the scheduler knows what it was. A killed attempt is known up to its last line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

BUCKETS = ("startup", "compile", "restore", "input_wait", "step", "eval", "checkpoint", "lost_work", "other")
FILE_NAME = "goodput.jsonl"
# Buckets of every step: their time is written with the step, not a second time when they close.
_PER_STEP = ("step", "input_wait")


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Time of all attempts. `nanoseconds` has every bucket and sums to `wall_nanoseconds`."""

    nanoseconds: Mapping[str, int]
    attempts: int
    between_attempts_seconds: float
    """From the last line of each attempt to the start of the next: unknown ends of killed attempts, and waiting."""

    @property
    def wall_nanoseconds(self) -> int:
        return sum(self.nanoseconds.values())

    @property
    def goodput(self) -> float | None:
        """Share of wall time in steps that count; None before any time has passed."""
        wall = self.wall_nanoseconds
        return self.nanoseconds["step"] / wall if wall else None

    def record(self) -> dict[str, Any]:
        """Flat record in seconds, for a log. The prefix keeps `step` apart from the time of one step."""
        seconds = {f"goodput_{name}_seconds": self.nanoseconds[name] / 1e9 for name in BUCKETS}
        record = {
            "goodput": self.goodput,
            "goodput_wall_seconds": self.wall_nanoseconds / 1e9,
            **seconds,
            "goodput_attempts": self.attempts,
            "goodput_between_attempts_seconds": self.between_attempts_seconds,
        }
        return record if self.goodput is not None else {**record, "goodput_reason": "no time has passed yet"}


@dataclasses.dataclass
class _Attempt:
    unix_time: float
    resumed_at: int | None = None
    nanoseconds: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(BUCKETS, 0))
    steps: dict[int, int] = dataclasses.field(default_factory=dict)
    """Nanoseconds in the `step` bucket when each step was done."""


class GoodputLedger:
    """Attributes the wall time of one attempt to buckets, and keeps it in `run_dir` with that of earlier attempts.

    To be used from one thread. `run_dir=None` keeps nothing on disk (processes other than the first). `clock` counts
    nanoseconds and never goes back; `started_ns` is its reading when the process started, and the time from then on
    is `startup`. `wall_clock` gives Unix seconds.

    Raises ValueError for a file of an earlier attempt that is damaged elsewhere than at an attempt's end.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        wall_clock: Callable[[], float] = time.time,
        started_ns: int | None = None,
    ) -> None:
        self._clock = clock
        now = clock()
        self._last = now if started_ns is None else started_ns
        self._open: list[str] = []
        self._earlier: tuple[_Attempt, ...] = ()
        self._file: TextIO | None = None
        self._current = _Attempt(wall_clock() - (now - self._last) / 1e9)
        self._current.nanoseconds["startup"] = now - self._last
        self._last = now
        if run_dir is not None:
            path = run_dir / FILE_NAME
            self._earlier = _read(path)
            self._file = _open_lines(path)
            self._write({"event": "attempt", "unix_time": self._current.unix_time})
            self._mark(None)

    @contextlib.contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Time inside belongs to `name`, except for buckets opened within. Raises ValueError for an unknown name."""
        if name not in BUCKETS or name == "lost_work":
            valid = ", ".join(known for known in BUCKETS if known != "lost_work")
            raise ValueError(f"goodput bucket '{name}' is not one of {valid} ('lost_work' is computed on resume)")
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            if not self._open and name not in _PER_STEP:
                self._mark(None)

    def step_done(self, step: int) -> None:
        """Step number `step` is complete: its metrics were read. One line of the file, which a kill does not lose."""
        self._charge()
        self._mark(step)

    def resumed(self, step: int) -> None:
        """This attempt goes on after `step` (0: from the start): later steps of earlier attempts are lost work."""
        self._current.resumed_at = step
        self._write({"event": "resumed", "step": step})

    @property
    def first_started(self) -> float:
        """Unix seconds when the first attempt started: the same for all attempts of a run, where they are kept."""
        return (*self._earlier, self._current)[0].unix_time

    def attempt_nanoseconds(self) -> dict[str, int]:
        """Buckets of this attempt up to now."""
        self._charge()
        return dict(self._current.nanoseconds)

    def summary(self) -> Goodput:
        """All attempts, this one up to now."""
        self._charge()
        return _summarize((*self._earlier, self._current))

    def close(self) -> None:
        """Writes the last line; leaving the ledger's own `with` block does it too. No bucket may be open."""
        assert not self._open, f"goodput buckets {self._open} are still open"
        self._charge()
        self._mark(None)
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> GoodputLedger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _charge(self) -> None:
        now = self._clock()
        assert now >= self._last, "the goodput clock went back"
        self._current.nanoseconds[self._open[-1] if self._open else "other"] += now - self._last
        self._last = now

    def _mark(self, step: int | None) -> None:
        spent = {name: value for name, value in self._current.nanoseconds.items() if value}
        self._write({"event": "mark", "step": step, "nanoseconds": spent})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(
                error.errno,
                f"goodput can't be recorded ({error.strerror}); free space there and start the run again: it goes on "
                "from its last checkpoint",
                self._file.name,
            ) from error


def read_goodput(run_dir: Path) -> Goodput:
    """Goodput of a run directory, from its file alone. Raises ValueError if it is damaged, or has no attempt."""
    attempts = _read(run_dir / FILE_NAME)
    if not attempts:
        raise ValueError(f"{run_dir / FILE_NAME} has no attempts; give the directory of a training run")
    return _summarize(attempts)


def _summarize(attempts: tuple[_Attempt, ...]) -> Goodput:
    totals = dict.fromkeys(BUCKETS, 0)
    kept_until: int | None = None
    between = 0.0
    for index in reversed(range(len(attempts))):
        attempt = attempts[index]
        lost = 0 if kept_until is None else _step_time_after(attempt, kept_until)
        for name, value in attempt.nanoseconds.items():
            totals[name] += value
        totals["step"] -= lost
        totals["lost_work"] += lost
        if attempt.resumed_at is not None:
            kept_until = attempt.resumed_at if kept_until is None else min(kept_until, attempt.resumed_at)
        if index:
            before = attempts[index - 1]
            end = before.unix_time + sum(before.nanoseconds.values()) / 1e9
            between += max(0.0, attempt.unix_time - end)
    return Goodput(totals, len(attempts), between)


def _step_time_after(attempt: _Attempt, step: int) -> int:
    """Nanoseconds of steps after `step`, the unfinished one included."""
    kept = [spent for done, spent in attempt.steps.items() if done <= step]
    return attempt.nanoseconds["step"] - max(kept, default=0)


def _open_lines(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed attempt may have left half a line: the next line must not be glued to it.
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8", buffering=1)
    if torn:
        file.write("\n")
    return file


def _read(path: Path) -> tuple[_Attempt, ...]:
    if not path.exists():
        return ()
    attempts: list[_Attempt] = []
    torn_line: int | None = None
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            torn_line = torn_line or number
            continue
        if line["event"] == "attempt":
            attempts.append(_Attempt(line["unix_time"]))
            torn_line = None
        elif torn_line is not None or not attempts:
            raise ValueError(_damaged(path, torn_line or number))
        else:
            _apply(attempts[-1], line)
    return tuple(attempts)


def _apply(attempt: _Attempt, line: dict[str, Any]) -> None:
    if line["event"] == "resumed":
        attempt.resumed_at = line["step"]
        return
    attempt.nanoseconds.update(line["nanoseconds"])
    if line["step"] is not None:
        attempt.steps[line["step"]] = attempt.nanoseconds["step"]


def _damaged(path: Path, line: int) -> str:
    return (
        f"{path} line {line} is not a line of a goodput ledger, and no attempt ended there; "
        "move the file away to start a new ledger"
    )
