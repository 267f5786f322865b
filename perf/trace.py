"""A trace of `jax.profiler` as a timeline: what each device ran when, the steps, and what the host did meanwhile.

Read by `jax.profiler.ProfileData` alone. In a process that has captured no trace itself: with JAX 0.11.2 reading one
there aborts the process.

Times are integer nanoseconds from the start of the trace.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.capture import NOTE_FILE, PROGRAM_FILE
from perf.intervals import Piece, Span, innermost
from perf.marks import INPUT_MARK, STEP_MARK


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Event:
    """One op or kernel on a device. `line`: the stream, queue or thread; `op` and `module`: the HLO instruction and
    program that it is of, None where the trace doesn't say."""

    name: str
    start: int
    end: int
    line: str
    op: str | None = None
    module: str | None = None
    program: str | None = None
    run: str | None = None


@dataclasses.dataclass(frozen=True)
class Execution:
    """One run of one program on one device: from its first event to its last."""

    module: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Device:
    """`pieces` are the self times of its events, by thread or stream: what an event leaves to those nested in it is
    not its own. `executions` are in order of time."""

    ordinal: int
    pieces: tuple[Piece[Event], ...]
    executions: tuple[Execution, ...]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in use of an allocator after an allocation or a release. `size`: of that block."""

    time: int
    allocator: str
    bytes_in_use: int
    size: int
    is_release: bool


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One process's trace. `platform`: gpu, tpu or cpu. `steps`: (number, when the host had it under way)."""

    source: Path
    platform: str
    devices: tuple[Device, ...]
    steps: tuple[tuple[int, Span], ...]
    marks: Mapping[str, tuple[Span, ...]]
    compiles: tuple[tuple[str, Span], ...]
    memory: tuple[Memory, ...]
    remarks: tuple[str, ...]


def find_trace(path: Path) -> Path:
    """The *.xplane.pb that `path` is or has below it, the newest capture's. Raises ValueError if there is none."""
    if path.is_file():
        return path
    found = sorted(path.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else "no such folder"
        raise ValueError(
            f"{path} has no trace (*.xplane.pb); it has: {inside or 'nothing'}. Capture one with `train.py NAME "
            "--profile 10:13`, or with POST /admin/profile of a server"
        )
    return found[-1]


def capture_folder(trace: Path) -> Path:
    """The folder that was captured into: where the note and the programs are."""
    # jax.profiler puts a trace under plugins/profile/<time>/.
    for parent in trace.parents:
        if (parent / NOTE_FILE).is_file():
            return parent
        if parent.name not in ("plugins", "profile") and parent.parent.name != "profile":
            break
    return trace.parent


def read_note(trace: Path) -> dict[str, Any]:
    """What was captured, as the capture's note says; empty for a trace without one."""
    path = capture_folder(trace) / NOTE_FILE
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no note of a capture: {error}; move it away to read the trace without it"
        ) from error
    if not isinstance(note, dict):
        raise ValueError(f"{path} is no note of a capture; move it away to read the trace without it")
    return note


def program_files(trace: Path) -> tuple[Path, ...]:
    """HLO texts of the programs, beside the trace."""
    return tuple(sorted(capture_folder(trace).glob(PROGRAM_FILE.format(name="*"))))


def read_trace(path: Path) -> Timeline:
    """Raises ValueError for a file that is no trace, that is cut short, or that no device is in, with what could be
    read of it."""
    profile = _profile(path)
    planes = [_Plane(plane.name, plane) for plane in profile.planes]
    reader = _Reader(path)
    for plane in planes:
        reader.take(plane)
    return reader.timeline([plane.name for plane in planes])


class _Plane:
    def __init__(self, name: str, plane: Any):
        self.name, self.plane = name, plane


def _profile(path: Path):
    from jax.profiler import ProfileData

    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: the capture did not end; capture again")
    try:
        return ProfileData.from_serialized_xspace(data)
    except RuntimeError as error:
        whole, names = _whole_planes(data, ProfileData)
        readable = (
            f"readable: {whole} planes ({', '.join(names)}), and not the rest" if whole else "nothing is readable"
        )
        raise ValueError(
            f"{path} ({len(data):,} bytes) is no whole trace of jax.profiler: {readable}. A capture that was killed or "
            "copied in part looks like this; capture again"
        ) from error


def _whole_planes(data: bytes, reader) -> tuple[int, list[str]]:
    """Planes before the place where a file was cut, and their names: an XSpace is a row of fields of (key, length,
    bytes), of which planes are number 1."""
    position = end = 0
    while position < len(data):
        key, position = _varint(data, position)
        size, position = _varint(data, position)
        if key & 7 != 2 or position + size > len(data) or size < 0:
            break
        position += size
        end = position
    try:
        names = [plane.name for plane in reader.from_serialized_xspace(data[:end]).planes]
    except RuntimeError:
        return 0, []
    return len(names), names


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    return -1, position


_GPU_PLANE = re.compile(r"^/device:GPU:(\d+)")
_TPU_PLANE = re.compile(r"^/device:TPU:(\d+)$")
_TPU_OPS, _TPU_ASYNC, _TPU_MODULES = "XLA Ops", "Async XLA Ops", "XLA Modules"
# Lines that a converter derives from the streams: the same time once more.
_DERIVED = ("Steps", "XLA Modules", "XLA Ops", "XLA TraceMe", "Framework Ops", "Framework Name Scope", "Source code")
# JAX's annotations around tracing to HLO and compiling; the second of them is missing where a cache had the program.
_COMPILE = ("lower_sharding_computation", "backend_compile_and_load", "backend_compile")
_MEMORY = ("MemoryAllocation", "MemoryDeallocation")


def _stats(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        # Python 3.12 about a type of JAX's own.
        warnings.filterwarnings("ignore", message="builtin type event_stats", category=DeprecationWarning)
        return dict(event.stats)


def _span(event: Any) -> Span:
    start = round(event.start_ns)
    return start, start + round(event.duration_ns)


class _Reader:
    """Sorts the events of a trace's planes."""

    def __init__(self, source: Path):
        self.source = source
        self.platforms: set[str] = set()
        self.events: dict[int, list[Event]] = {}
        self.modules: dict[int, list[Execution]] = {}
        self.marks: dict[str, list[Span]] = {STEP_MARK: [], INPUT_MARK: []}
        self.steps: list[tuple[int, Span]] = []
        self.compiles: list[tuple[str, Span]] = []
        self.memory: list[Memory] = []

    def take(self, plane: _Plane) -> None:
        if match := _GPU_PLANE.match(plane.name):
            self.platforms.add("gpu")
            for line in plane.plane.lines:
                if not line.name.startswith(_DERIVED):
                    self._device(int(match[1]), line)
        elif match := _TPU_PLANE.match(plane.name):
            self.platforms.add("tpu")
            for line in plane.plane.lines:
                if line.name in (_TPU_OPS, _TPU_ASYNC):
                    self._device(int(match[1]), line)
                elif line.name == _TPU_MODULES:
                    runs = [Execution(module_name(event.name), *_span(event)) for event in line.events]
                    self.modules.setdefault(int(match[1]), []).extend(runs)
        elif plane.name.startswith("/host:CPU"):
            for line in plane.plane.lines:
                self._host(line)

    def _device(self, ordinal: int, line: Any) -> None:
        """A stream or queue of an accelerator: every event is work."""
        events = self.events.setdefault(ordinal, [])
        for event in line.events:
            start, end = _span(event)
            stats = _stats(event)
            # TPU's events are named by the whole instruction.
            named = re.match(r"%?([\w.\-]+)(?: = |$)", event.name)
            op = stats.get("hlo_op") or (named[1] if named and line.name in (_TPU_OPS, _TPU_ASYNC) else None)
            name = op if named and " = " in event.name else event.name
            events.append(
                Event(name, start, end, line.name, op, stats.get("hlo_module"), _text(stats.get("program_id")))
            )

    def _host(self, line: Any) -> None:
        """A thread: on CPU devices their work, else marks, compilations and allocations."""
        for event in line.events:
            name = event.name
            if name.startswith("$"):
                # Python calls, by far the most events of a thread.
                continue
            if name == STEP_MARK:
                span, number = _span(event), _stats(event).get("step_num")
                self.marks[STEP_MARK].append(span)
                if number is not None:
                    self.steps.append((int(number), span))
            elif name in self.marks:
                self.marks[name].append(_span(event))
            elif name in _COMPILE:
                self.compiles.append((name, _span(event)))
            elif name in _MEMORY:
                self._memory(event)
            elif line.name.startswith("tf_XLA") or line.name.startswith("tf_"):
                self._cpu_device(line.name, event)

    def _cpu_device(self, line: str, event: Any) -> None:
        # Most events of a pool's thread are its own book-keeping: the stats of those are not read.
        if event.name.startswith(("end: ", "Wait", "Threadpool", "Rendezvous", "InvokeRendezvous", "ThunkExecutor")):
            return
        stats = _stats(event)
        if "device_ordinal" not in stats or "hlo_op" not in stats:
            return
        start, end = _span(event)
        self.events.setdefault(int(stats["device_ordinal"]), []).append(
            Event(
                event.name,
                start,
                end,
                line,
                stats["hlo_op"],
                stats.get("hlo_module"),
                _text(stats.get("program_id")),
                _text(stats.get("run_id")),
            )
        )

    def _memory(self, event: Any) -> None:
        stats = _stats(event)
        if "bytes_allocated" in stats and "allocation_bytes" in stats:
            sizes = int(stats["bytes_allocated"]), int(stats["allocation_bytes"])
            name = str(stats.get("allocator_name", "unnamed"))
            self.memory.append(Memory(_span(event)[0], name, *sizes, event.name == "MemoryDeallocation"))

    def timeline(self, planes: list[str]) -> Timeline:
        devices = {ordinal: events for ordinal, events in self.events.items() if events}
        if not devices:
            raise ValueError(
                f"{self.source} has no ops of a device: its planes are {', '.join(planes) or 'none'}; those read are "
                "/device:GPU:n, /device:TPU:n and threads of /host:CPU with device_ordinal. Nothing ran on a device "
                "in the window, or another tool wrote the file"
            )
        platform = "gpu" if "gpu" in self.platforms else "tpu" if "tpu" in self.platforms else "cpu"
        steps = sorted(self.steps, key=lambda step: step[1])
        return Timeline(
            self.source,
            platform,
            tuple(self._one(ordinal, devices[ordinal], len(steps)) for ordinal in sorted(devices)),
            tuple(steps),
            {name: tuple(sorted(spans)) for name, spans in self.marks.items()},
            tuple(sorted(self.compiles, key=lambda compile: compile[1])),
            tuple(sorted(self.memory, key=lambda memory: memory.time)),
            (),
        )

    def _one(self, ordinal: int, events: Sequence[Event], steps: int) -> Device:
        lines: dict[str, list[Event]] = {}
        for event in events:
            lines.setdefault(event.line, []).append(event)
        pieces = [piece for line in lines.values() for piece in innermost([(one.start, one.end, one) for one in line])]
        runs = self.modules.get(ordinal) or executions(events, steps)
        return Device(
            ordinal, tuple(sorted(pieces, key=lambda piece: piece[:2])), tuple(sorted(runs, key=lambda run: run.start))
        )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def module_name(name: str) -> str:
    """jit_step(1234567) is jit_step."""
    return re.sub(r"\(\d+\)$", "", name)


def executions(events: Iterable[Event], steps: int) -> list[Execution]:
    """Runs of each program on a device, from its events.

    By the number that the trace has for each run. Where it has none (GPU), by an op that a run does once: the earliest
    of those that occur as often as the program ran, which is how often its rarest op occurs, or `steps` (marks of
    steps in the trace) if some op occurs that often.
    """
    found: list[Execution] = []
    by_run: dict[tuple[str, str], list[Event]] = collections.defaultdict(list)
    by_program: dict[tuple[str, str | None], list[Event]] = collections.defaultdict(list)
    for event in events:
        if event.module is None:
            continue
        if event.run is not None:
            by_run[event.module, event.run].append(event)
        else:
            by_program[event.module, event.program].append(event)
    for (module, _), group in by_run.items():
        found.append(Execution(module, min(one.start for one in group), max(one.end for one in group)))
    for (module, _), group in by_program.items():
        found.extend(_repeated(module, sorted(group, key=lambda event: event.start), steps))
    return found


def _repeated(module: str, events: Sequence[Event], steps: int) -> list[Execution]:
    counts = collections.Counter((event.op, event.name) for event in events)
    often = steps if steps in counts.values() else min(counts.values())
    first = next((event.op, event.name) for event in events if counts[event.op, event.name] == often)
    begins = [index for index, event in enumerate(events) if (event.op, event.name) == first]
    # What stands before the first one belongs to the run that it is of.
    begins[0] = 0
    ends = [*begins[1:], len(events)]
    return [
        Execution(module, events[begin].start, max(event.end for event in events[begin:end]))
        for begin, end in zip(begins, ends, strict=True)
    ]
