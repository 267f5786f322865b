"""Traces made by hand: the bytes of an XSpace (tsl/profiler/protobuf/xplane.proto), as jax.profiler writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

Value = int | str


@dataclasses.dataclass(frozen=True)
class Op:
    """An event: start and length in nanoseconds."""

    name: str
    start: int
    length: int
    stats: Mapping[str, Value] = dataclasses.field(default_factory=dict)


Lines = Mapping[str, Sequence[Op]]


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while True:
        out.append((value & 127) | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def chunk(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def plane(name: str, lines: Lines) -> bytes:
    events: dict[str, int] = {}
    stats: dict[str, int] = {}
    body = b""
    for index, (line, ops) in enumerate(lines.items()):
        text = number(1, index) + chunk(2, line) + number(3, 0)
        for op in ops:
            event = number(1, events.setdefault(op.name, len(events) + 1))
            event += number(2, op.start * 1000) + number(3, op.length * 1000)
            for key, value in op.stats.items():
                stat = number(1, stats.setdefault(key, len(stats) + 1))
                event += chunk(4, stat + (chunk(5, value) if isinstance(value, str) else number(4, value)))
            text += chunk(4, event)
        body += chunk(3, text)
    metadata = b"".join(chunk(4, number(1, id) + chunk(2, number(1, id) + chunk(2, key))) for key, id in events.items())
    metadata += b"".join(chunk(5, number(1, id) + chunk(2, number(1, id) + chunk(2, key))) for key, id in stats.items())
    return number(1, 0) + chunk(2, name) + body + metadata


def space(planes: Mapping[str, Lines]) -> bytes:
    return b"".join(chunk(1, plane(name, lines)) for name, lines in planes.items())


def write(folder: Path, planes: Mapping[str, Lines]) -> Path:
    """The trace's file, where jax.profiler puts it."""
    path = folder / "plugins" / "profile" / "2026_11_23" / "host.xplane.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(space(planes))
    return path


def gpu_step(start: int, ops: Sequence[tuple[str, str, int, int]], module: str = "jit_step") -> list[Op]:
    """Kernels of one run of a program: (kernel, HLO op, start in it, length)."""
    return [
        Op(kernel, start + at, length, {"hlo_op": op, "hlo_module": module, "program_id": 7})
        for kernel, op, at, length in ops
    ]


def marks(*steps: tuple[int, int, int], inputs: Sequence[tuple[int, int]] = ()) -> list[Op]:
    """A host thread: steps (number, start, length), and when it took its input (start, length)."""
    found = [Op("train", start, length, {"step_num": number, "_r": 1}) for number, start, length in steps]
    return found + [Op("input", start, length) for start, length in inputs]
