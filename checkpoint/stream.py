"""Tensors of a file to our parameters: one shard at a time from the disk to its device."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np
from flax import traverse_util

from model.families.names import Names, Piece, Stored, pieces
from model.transformer import Convert, Definition, Tree

# Bytes of the file's array that are held besides the shard being filled: bounds what dequantisation multiplies.
BLOCK_BYTES = 4 << 20
# Shards that are read at once. Each may be as large as a leaf's share of a device.
READERS = 8
_LISTED = 10

LeafPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and the file's name for its type. `problem` says why its values cannot be read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    problem: str | None = None


class TensorSource(Protocol):
    """A set of named tensors on disk."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Elements of a tensor, floating point; a slice with bounds and step 1 for each axis."""
        ...


class _Match(NamedTuple):
    """A piece of a leaf and the tensor that holds it."""

    piece: Piece
    name: str
    index: tuple[int, ...]


def load_tensors(
    source: TensorSource,
    names: Names,
    definition: Definition,
    shardings: tuple[Tree, Tree],
    *,
    ignored: Collection[str] = (),
    convert: Convert | None = None,
) -> tuple[Tree, Tree]:
    """(params, biases) of `definition`, each leaf in its dtype and on its sharding, parameters as `convert` makes them.

    Everything is checked before anything is read: ValueError that names file and tensor for those without a place
    (but for `ignored`), missing ones, and ones of another shape or type. Host memory: at most `READERS` shards.
    """
    abstract = _flatten(definition.abstract)
    matches = _match(source, names, definition, abstract, ignored)
    placed = _flatten(shardings)
    assert placed.keys() == abstract.keys(), f"shardings of {placed.keys() ^ abstract.keys()}"

    def place(path: tuple[int, LeafPath]) -> jax.Array:
        array = _place(source, matches[path], abstract[path], placed[path])
        return array if convert is None or path[0] else convert(path[1], array)

    # Copying, converting and dequantising release the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(max_workers=READERS) as pool:
        futures = {path: pool.submit(place, path) for path in abstract}
        try:
            arrays = {path: future.result() for path, future in futures.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    trees = [{path: x for (tree, path), x in arrays.items() if tree == number} for number in (0, 1)]
    return traverse_util.unflatten_dict(trees[0]), traverse_util.unflatten_dict(trees[1])


def _flatten(trees: tuple[Tree, Tree]) -> dict[tuple[int, LeafPath], object]:
    """Leaves of params (0) and biases (1) by path."""
    return {(n, path): leaf for n, tree in enumerate(trees) for path, leaf in traverse_util.flatten_dict(tree).items()}


def _match(source, names, definition, abstract, ignored) -> dict[tuple[int, LeafPath], list[_Match]]:
    """The tensor of each piece of each leaf. ValueError that lists what does not fit."""
    tensors = source.tensors
    found: dict[tuple[int, LeafPath], list[_Match]] = {}
    missing, wrong, used = [], [], set(ignored)
    for key, leaf in abstract.items():
        found[key] = []
        for piece in pieces(definition, key[1], names):
            spellings = piece.stored.spellings
            spelling = next((each for each in spellings if each.name in tensors), None)
            if spelling is None:
                missing.append(" or ".join(each.name for each in spellings))
                continue
            used.add(spelling.name)
            tensor = tensors[spelling.name]
            shape = (*spelling.lead, *piece.stored.shape(leaf.shape[len(piece.prefix) :]))
            if tensor.shape != shape:
                wrong.append(
                    f"{tensor.file}: {spelling.name} has shape {list(tensor.shape)}, {list(shape)} is required"
                )
            elif tensor.problem is not None:
                wrong.append(f"{tensor.file}: {spelling.name}: {tensor.problem}")
            found[key].append(_Match(piece, spelling.name, spelling.index))
    extra = [f"{tensors[name].file}: {name}" for name in tensors if name not in used]
    problems = {"missing tensors": missing, "tensors without a place": extra, "tensors that do not fit": wrong}
    if missing or extra or wrong:
        lines = [_lines(what, list(dict.fromkeys(items))) for what, items in problems.items() if items]
        raise ValueError(f"{source.path} does not hold the weights of this architecture\n" + "\n".join(lines))
    return found


def _lines(what: str, items: list[str]) -> str:
    more = [f"  and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return "\n".join([f"{what}:", *(f"  {item}" for item in items[:_LISTED]), *more])


def _place(
    source: TensorSource, matches: list[_Match], leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    """One leaf on its devices, shard by shard: a buffer is gone before the next is filled."""
    # `jax.make_array_from_callback` would hold the shards of all devices at once, and read replicas again.
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, holders in devices.items():
        buffer = _read_shard(source, matches, leaf, tuple(slice(*bound) for bound in bounds))
        for device in holders:
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            shards.append(jax.device_put(buffer, place))
        jax.block_until_ready(shards)
        del buffer
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _read_shard(
    source: TensorSource, matches: list[_Match], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    buffer = np.empty([part.stop - part.start for part in index], leaf.dtype)
    for match in matches:
        prefix = match.piece.prefix
        outer, inner = index[: len(prefix)], index[len(prefix) :]
        if all(part.start <= place < part.stop for place, part in zip(prefix, outer, strict=True)):
            place = tuple(place - part.start for place, part in zip(prefix, outer, strict=True))
            _read_piece(source, match, leaf.shape[len(prefix) :], inner, buffer[place] if place else buffer)
    return buffer


def _read_piece(
    source: TensorSource, match: _Match, shape: tuple[int, ...], wanted: tuple[slice, ...], out: np.ndarray
) -> None:
    """Fills `out` with the elements `wanted` of our array of this shape, a block of the file's rows at a time."""
    stored = match.piece.stored
    axis = stored.axes[0][0]
    per_step = 4 * int(np.prod(shape)) // shape[axis]
    step = max(BLOCK_BYTES // max(per_step, 1), 1)
    first, last = wanted[axis].start, wanted[axis].stop
    for start in range(first, last, step):
        part = slice(start, min(start + step, last))
        block = _read_block(source, match, shape, (*wanted[:axis], part, *wanted[axis + 1 :]))
        # Converted in the file's order: on the way into ours, each element would be a step of its own.
        with np.errstate(over="ignore"):
            block = block.astype(out.dtype, copy=False)
        if out.dtype == np.float16 and not np.isfinite(block).all():
            raise ValueError(
                f"{source.tensors[match.name].file}: {match.name} has values beyond float16's range; "
                "load the parameters as bfloat16 or float32"
            )
        target = out[(slice(None),) * axis + (slice(start - first, part.stop - first),)]
        bits = np.dtype(f"u{out.dtype.itemsize}")  # NumPy copies the elements of its own types faster.
        _copy(target.view(bits).transpose(stored.order), block.view(bits), depth=len(stored.axes[0]))


def _copy(target: np.ndarray, source: np.ndarray, *, depth: int) -> None:
    """target[...] = source, of arrays in the file's order whose first `depth` axes are its rows.

    16 rows at a time: their columns become runs that share cache lines. A transposition of bfloat16 takes 1.7 GB/s
    this way and 0.45 GB/s in one go (one core of a shared CPU machine).
    """
    if depth > 1:
        for inner, part in zip(target, source, strict=True):
            _copy(inner, part, depth=depth - 1)
        return
    for start in range(0, len(source), 16):
        target[start : start + 16] = source[start : start + 16]


def _read_block(source: TensorSource, match: _Match, shape: tuple[int, ...], wanted: tuple[slice, ...]) -> np.ndarray:
    """Elements `wanted` of our array of this shape, axes in the file's order, in the source's dtype or float32."""
    stored, head = match.piece.stored, len(shape) - 1
    rows = list(wanted)
    if stored.interleaved:
        rows[head] = slice(0, shape[head])
    index, sizes, rest = [slice(place, place + 1) for place in match.index], [], [slice(None)] * len(shape)
    for group in stored.axes:
        major, *minor = group
        inner = int(np.prod([shape[axis] for axis in minor]))
        if all(rows[axis] == slice(0, shape[axis]) for axis in minor):
            index.append(slice(rows[major].start * inner, rows[major].stop * inner))
            sizes.append(rows[major].stop - rows[major].start)
        else:
            # No one range of the file's axis: all of it is read, and the part taken.
            index.append(slice(0, shape[major] * inner))
            sizes.append(shape[major])
            for axis in group:
                rest[axis] = rows[axis]
        sizes.extend(shape[axis] for axis in minor)
    block = source.read(match.name, tuple(index)).reshape(sizes)[tuple(rest[axis] for axis in stored.order)]
    if stored.interleaved:
        block = block.take(halves(shape[head])[wanted[head]], axis=stored.order.index(head))
    return block if stored.offset == 0 else block.astype(np.float32) + np.float32(stored.offset)


def halves(width: int) -> np.ndarray:
    """Places of the elements of neighbouring pairs, first ones first: what turns their order into ours."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def to_file(stored: Stored, ours: np.ndarray) -> np.ndarray:
    """Our array as a file holds it, without leading axes: what `load_tensors` reads back."""
    assert stored.offset == 0, "no format that we write shifts values"
    if stored.interleaved:
        ours = ours[..., np.argsort(halves(ours.shape[-1]))]
    return ours.transpose(stored.order).reshape(stored.shape(ours.shape))
