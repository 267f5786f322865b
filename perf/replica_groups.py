"""Which partitions of a program take part in a collective together, in the forms in which HLO text writes it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence


def replica_groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...] | None:
    """Of the three forms: {{0,1},{2,3}}, [groups,size]<=[dims]T(order), mesh['a'=4,'b'=2], device_ids=(...) {'a'}."""
    found = re.search(r"replica_groups=(.*)", attributes)
    if found is None:
        return None
    text = found[1]
    if text.startswith("{}"):
        return (tuple(range(num_devices)),)
    if match := re.match(r"\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", text):
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        rows = _numbers(match[1])
        return _rows(_iota(match[2]), rows[-1])
    if match := re.match(r"mesh\[([^\]]*)\](?:, ?device_ids=\(([^()]*(?:\([\d,]*\))?)\))? ?\{([^}]*)\}", text):
        return _mesh_groups(match[1], match[2], match[3])
    raise ValueError(f"replica groups in an unknown form: {text[:80]!r}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> list[int]:
    """Of [2,4]T(1,0): 0..7 as an array of 2 × 4, transposed, flattened."""
    shape, _, order = text.partition("T")
    dims = _numbers(shape)
    axes = _numbers(order) or list(range(len(dims)))
    return _transposed(list(range(math.prod(dims))), dims, axes)


def _transposed(values: Sequence[int], dims: Sequence[int], axes: Sequence[int]) -> list[int]:
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    return [
        values[sum(index * strides[axis] for index, axis in zip(place, axes, strict=True))]
        for place in itertools.product(*(range(dims[axis]) for axis in axes))
    ]


def _rows(values: Sequence[int], length: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values[i : i + length]) for i in range(0, len(values), length))


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> tuple[tuple[int, ...], ...]:
    """Groups along the named axes of a mesh; 'a':(2)4 is the part of axis a of 4, with 2 before it."""
    names = re.findall(r"'(\w+)'=(\d+)", axes)
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", grouped):
        parts.setdefault(name, []).append((int(before or 1), int(size or dict(names)[name])))
    dims, chosen = [], []
    for name, size in names:
        done = 1
        for before, width in sorted(parts.get(name, [])):
            dims += [before // done, width]
            chosen.append(len(dims) - 1)
            done = before * width
        dims.append(int(size) // done)
    total = math.prod(dims)
    values = _iota(ids) if ids else list(range(total))
    order = [axis for axis in range(len(dims)) if axis not in chosen] + chosen
    return _rows(_transposed(values, dims, order), math.prod(dims[axis] for axis in chosen))
