"""Memory over time, of the allocators that a trace has."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from perf.trace import Memory

# Blocks of less of an allocator's peak are no spike.
SPIKE_SHARE = 0.02


@dataclasses.dataclass(frozen=True)
class Spike:
    """Blocks of one size that come and go. `seconds`: how long one is held, the median; None for one that stays."""

    size: int
    count: int
    first: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class AllocatorUse:
    """Bytes in use of one allocator during the trace, and its largest temporary blocks, largest first."""

    name: str
    low: int
    peak: int
    peak_time: int
    spikes: tuple[Spike, ...]


def memory_use(memory: Sequence[Memory], count: int = 4) -> tuple[AllocatorUse, ...]:
    """Of each allocator of devices; the host's staging buffers are left out."""
    names = sorted({one.allocator for one in memory if "host" not in one.allocator})
    return tuple(_use(name, [one for one in memory if one.allocator == name], count) for name in names)


def _use(name: str, memory: Sequence[Memory], count: int) -> AllocatorUse:
    peak = max(memory, key=lambda one: one.bytes_in_use)
    held: dict[int, list[int]] = {}
    lasted: dict[int, list[int]] = {}
    begun: dict[int, list[int]] = {}
    for one in memory:
        if not one.is_release:
            begun.setdefault(one.size, []).append(one.time)
            held.setdefault(one.size, []).append(one.time)
        elif held.get(one.size):
            # Blocks of one size are not told apart: the last one taken is taken to be given back first.
            lasted.setdefault(one.size, []).append(one.time - held[one.size].pop())
    large = sorted((size for size in begun if size >= SPIKE_SHARE * peak.bytes_in_use), reverse=True)
    spikes = tuple(
        Spike(
            size,
            len(begun[size]),
            begun[size][0],
            statistics.median(lasted[size]) / 1e9 if size in lasted else None,
        )
        for size in large[:count]
    )
    return AllocatorUse(name, min(one.bytes_in_use for one in memory), peak.bytes_in_use, peak.time, spikes)
