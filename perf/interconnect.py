"""Seconds that collectives take between chips: TPU's torus (ICI), slices over the data-centre network, and NVLink.

Bandwidth and latency alone, every link free of other traffic and both directions used, as the best algorithm for each
kind would: predictions. Rates are the reached ones where a source has them, else the nominal ones of perf/chips.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from perf.chips import Chip

HOP_SECONDS = 1e-6
"""From a chip to its neighbour (How to Scale Your Model, chapter "TPUs": about 1 µs a hop)."""

LINK_SHARE = 0.9
"""Of a TPU link's nominal rate that transfers reach (the same book: 45 of 50 GB/s on v5e, 90 of 100 on v5p, v6e)."""

# perf/chips.py has the reached rate of v4 already.
_REACHED_IN_TABLE = ("TPU v4",)

# Slices of these have two torus axes, 16 chips long at most; the others have three.
_TWO_AXES = ("TPU v5e", "TPU v6e")

SWITCH_SECONDS = 5e-6
"""A collective over NVLink's switch, before its first byte: an assumption, of the order that NCCL's small ones take."""

SLICE_SECONDS = 100e-6
"""A transfer between slices, before its first byte: an assumption, a round trip within a data centre."""


class Place(NamedTuple):
    """Where a device is: its slice, its chip's coordinates on the torus, and its core on the chip."""

    slice: int
    coords: tuple[int, ...]
    core: int = 0


@dataclasses.dataclass(frozen=True)
class Network:
    """Devices of a program, partition by partition (the mesh's devices, row-major), and what joins them.

    `dims` and `wraps`: chips along each torus axis of a slice, and whether its ends are joined; empty where a switch
    joins all devices. Rates are bytes/s in one direction: `link` of one torus link or of a device's share of the
    switch, `between_slices` of one device on the data-centre network, None where unknown.
    """

    places: tuple[Place, ...]
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]
    link: float
    between_slices: float | None
    source: str

    @property
    def is_switched(self) -> bool:
        return not self.dims

    def seconds(self, kind: str, num_bytes: float, group: Sequence[int], *, one_ring: bool = False) -> float:
        """Of one collective among the partitions of `group`, every other group of it at the same time.

        `one_ring`: the compiler chose a single ring through all of them, whatever the axes.

        `num_bytes`: the whole array of the group for all-gather and reduce-scatter, the array that each device has for
        the others. Raises ValueError for a kind that it doesn't know, or over slices without a known rate.
        """
        if len(group) < 2 or not num_bytes:
            return 0.0
        slices: dict[int, list[int]] = {}
        for partition in group:
            slices.setdefault(self.places[partition].slice, []).append(partition)
        if len(slices) == 1:
            return self._within(kind, num_bytes, group, one_ring)
        # In three steps, as the compiler does it: within a slice, then each chip its part between slices.
        inner = min(slices.values(), key=len)
        within = self._within(kind, num_bytes, inner, one_ring) if len(inner) > 1 else 0.0
        return within + self.between(kind, num_bytes / len(inner), len(slices))

    def permute_seconds(self, num_bytes: float, pairs: Sequence[tuple[int, int]]) -> float:
        """Of a permute in which each source sends `num_bytes` to its target, all at once."""
        apart = [(a, b) for a, b in pairs if self.places[a] != self.places[b]]
        if not apart or not num_bytes:
            return 0.0
        if any(self.places[a].slice != self.places[b].slice for a, b in apart):
            return self.between("collective-permute", num_bytes, 2)
        if self.is_switched:
            return num_bytes / self.link + SWITCH_SECONDS
        # Messages of a shift by k share each link k at a time.
        hops = max(sum(map(abs, self.displacement(a, b))) for a, b in apart)
        return max(hops, 1) * (num_bytes / self.link + HOP_SECONDS)

    def displacement(self, source: int, target: int) -> tuple[int, ...]:
        """Hops along each torus axis, the shorter way around."""
        steps = []
        ends = zip(self.places[source].coords, self.places[target].coords, strict=True)
        for (a, b), size, wraps in zip(ends, self.dims, self.wraps, strict=True):
            step = b - a
            steps.append((step + size // 2) % size - size // 2 if wraps else step)
        return tuple(steps)

    def lanes(self, group: Sequence[int], is_permute: bool = False) -> tuple[str, ...]:
        """Names of what a transfer holds while it runs: a torus axis, for a permute one direction of it; the switch;
        the network between slices."""
        places = [self.places[partition] for partition in group]
        if len({place.slice for place in places}) > 1:
            return ("between slices",)
        if self.is_switched:
            return ("switch",)
        if is_permute:
            steps = enumerate(self.displacement(*group[:2])) if len(group) > 1 else ()
            return tuple(f"axis {axis} {'+' if step > 0 else '-'}" for axis, step in steps if step)
        return tuple(
            f"axis {axis} {sign}"
            for axis in range(len(self.dims))
            if len({place.coords[axis] for place in places}) > 1
            for sign in "+-"
        )

    def between(self, kind: str, num_bytes: float, num_slices: int) -> float:
        """Of `num_bytes` of each device, exchanged with the devices at its place in the other slices."""
        if self.between_slices is None:
            raise ValueError(f"the rate between slices is not known: {self.source}")
        return _ring_volume(kind, num_bytes, num_slices) / self.between_slices + SLICE_SECONDS

    def _within(self, kind: str, num_bytes: float, group: Sequence[int], one_ring: bool = False) -> float:
        if self.is_switched:
            return _ring_volume(kind, num_bytes, len(group)) / self.link + SWITCH_SECONDS
        spans = self.spans(group)
        if not spans:
            # Cores of one chip: no link between them, and no rate of what there is instead.
            return HOP_SECONDS
        hops = sum(span.hops for span in spans) * HOP_SECONDS
        rate = sum(span.lanes for span in spans) * self.link
        if one_ring and len(spans) > 1:
            # Through every device of a box of even size and back, both ways around.
            hops, rate = len(group) // 2 * HOP_SECONDS, 2 * self.link
        if kind in ("all-to-all", "ragged-all-to-all"):
            return max(span.all_to_all(num_bytes) for span in spans) / self.link + hops
        # Axes work at the same time, each on its part of the array.
        rounds = 2 if kind == "all-reduce" else 1
        return _ring_volume(kind, num_bytes, len(group)) / rate + rounds * hops

    def spans(self, group: Sequence[int]) -> tuple[_Span, ...]:
        """Torus axes along which a group is spread out, those that it doesn't touch left out."""
        found = []
        for axis, (size, wraps) in enumerate(zip(self.dims, self.wraps, strict=True)):
            along = sorted({self.places[partition].coords[axis] for partition in group})
            if len(along) > 1:
                # Every second chip of an axis shares its links with the group of the others.
                stride = max(1, (along[-1] - along[0]) // (len(along) - 1))
                found.append(_Span(len(along), stride, wraps and len(along) * stride == size))
        return tuple(found)


class _Span(NamedTuple):
    count: int
    stride: int
    ring: bool

    @property
    def hops(self) -> int:
        return self.stride * (self.count // 2 if self.ring else self.count - 1)

    @property
    def lanes(self) -> float:
        """Links that bytes come in by, at each device: two on a ring; at the end of a line one."""
        return (2 if self.ring else 1) / self.stride

    def all_to_all(self, num_bytes: float) -> float:
        """Bytes over the busiest link when each device sends an equal part of its array to each of the others.

        On a line of n the middle link carries (n/2)² parts each way; on a ring paths are half as long, two ways.
        """
        n = self.count
        return num_bytes / n * (n * n / 8 if self.ring else n * n / 4) * self.stride


def _ring_volume(kind: str, num_bytes: float, n: int) -> float:
    """Bytes that each device must receive (and send) among n."""
    match kind:
        case "all-gather" | "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return num_bytes * (n - 1) / n
        case "all-reduce":
            return 2 * num_bytes * (n - 1) / n
        case "collective-permute" | "collective-broadcast":
            return num_bytes
    raise ValueError(f"unknown kind of collective {kind!r}")


def torus(chip: Chip, places: Sequence[Place]) -> Network:
    """The ICI of TPU slices with these devices. Its size is the smallest box that holds all of them.

    An axis is a ring if it is 16 long on v5e and v6e (a whole pod's side), or a multiple of 4 where there are three
    (blocks of 4 × 4 × 4 chips are joined by optical switches, smaller slices are not).
    """
    if chip.scale_up_bandwidth is None or not chip.name.startswith("TPU"):
        raise ValueError(f"{chip.name} has no ICI torus")
    axes = 2 if chip.name in _TWO_AXES else 3
    dims = tuple(1 + max(place.coords[axis] for place in places) for axis in range(axes))
    if axes == 2:
        wraps = tuple(size == 16 for size in dims)
    else:
        wraps = tuple(size % 4 == 0 for size in dims) if all(size >= 4 for size in dims) else (False,) * 3
    nominal = chip.scale_up_bandwidth / (2 * axes)
    share = 1.0 if chip.name in _REACHED_IN_TABLE else LINK_SHARE
    between = chip.scale_out_bandwidth
    return Network(
        tuple(place._replace(coords=tuple(place.coords[:axes])) for place in places),
        dims,
        wraps,
        nominal * share,
        None if between is None else between / chip.devices_per_chip,
        f"{chip.name}: {chip.sources['links']}; {share:.0%} of the nominal rate of a link",
    )


def switch(chip: Chip, num_devices: int) -> Network:
    """GPUs of one host, or of one NVLink domain, each with its full rate to any other."""
    if chip.scale_up_bandwidth is None:
        raise ValueError(f"no rate between {chip.name}s is known: {chip.sources['links']}")
    places = tuple(Place(0, (index,)) for index in range(num_devices))
    return Network(
        places, (), (), chip.scale_up_bandwidth, chip.scale_out_bandwidth, f"{chip.name}: {chip.sources['links']}"
    )


def places_of(devices: Sequence) -> tuple[Place, ...]:
    """Of TPU devices, real or described, in the order of the mesh (`mesh.devices.flat`)."""
    return tuple(
        # Devices of a single slice have no slice_index.
        Place(device.slice_index if hasattr(device, "slice_index") else 0, tuple(device.coords), device.core_on_chip)
        for device in devices
    )


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the partitions of a group differ. `mesh`: sizes by axis, in the mesh's order."""
    sizes = list(mesh.values())
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return tuple(
        name
        for name, size, stride in zip(mesh, sizes, strides, strict=True)
        if len({partition // stride % size for partition in group}) > 1
    )
