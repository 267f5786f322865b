"""An array of few-bit values with scales: one type for weights, activations, checkpoints and kernels."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Layout = Literal["rows", "columns", "fragments"]
"""How `values` lie in memory: "rows" in the array's own order, "columns" with the last two axes exchanged, so that the
elements of a column are neighbours (what FP8 tensor cores need of a product's second operand), "fragments" as the
registers of Hopper's tensor cores take them (what weight-only products need; see `to_fragments`)."""

TILE = 64
"""Rows and columns of one tile of the layout "fragments"."""

LARGEST = {"int4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""Magnitude that the largest element of a block becomes. Integers keep clear of -8 and -128, so that -x is a value."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """(values - zero_points) · scales, each scale for a block of elements.

    `scales` has an entry for each block: the array's rank, and each of its axes divides the array's; the quotient is
    the length of a block along that axis. One scale for all of a [K, N] is [1, 1], one for each column [1, N], groups
    of 128 along K [K/128, N], blocks of 128 × 128 [K/128, N/128]. A leading axis of layers or of experts is divided
    into blocks of one: a slice along it of each field is the QArray of the slice, so scans and maps over it work.

    Attributes:
      values: int4, int8, float8_e4m3fn or float8_e5m2; in fragments uint32 where they are int4.
      scales: float32, in the order of the array's axes whatever the layout.
      zero_points: float32 of the scales' shape, in units of `values`; None for zeros (symmetric).
      layout: static.
    """

    values: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None = None
    layout: Layout = dataclasses.field(default="rows", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        shape = tuple(self.values.shape)
        if self.layout == "fragments":
            return (*shape[:-3], TILE * shape[-2], TILE * shape[-3])
        return shape if self.layout == "rows" else (*shape[:-2], shape[-1], shape[-2])

    @property
    def dtype(self) -> jnp.dtype:
        """Of an element."""
        return jnp.dtype(
            jnp.int4 if self.layout == "fragments" and self.values.dtype == jnp.uint32 else self.values.dtype
        )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def block(self) -> tuple[int, ...]:
        """Elements that share a scale, along each axis."""
        return _lengths(self.shape, self.scales.shape)

    def check(self) -> QArray:
        """Itself. Raises ValueError where its fields disagree.

        Not done when it is made: JAX makes trees of placeholders too.
        """
        if self.layout not in get_args(Layout):
            raise ValueError(f"QArray layout={self.layout!r} is unknown; choose one of {', '.join(get_args(Layout))}")
        name = self.dtype.name
        if name not in LARGEST:
            raise ValueError(f"QArray of {name} values: they can be {', '.join(LARGEST)}")
        if self.layout == "fragments":
            _check_fragments(self.values, name)
        shape, scales = self.shape, tuple(self.scales.shape)
        divide = len(scales) == len(shape) and all(
            size % n == 0 if n else size == 0 for size, n in zip(shape, scales, strict=True)
        )
        if not divide:
            raise ValueError(f"QArray of shape {list(shape)} with scales {list(scales)}: each axis must divide its own")
        if self.scales.dtype != jnp.float32:
            raise ValueError(f"QArray with {self.scales.dtype} scales: they must be float32")
        zeros = self.zero_points
        if zeros is not None and (tuple(zeros.shape) != scales or zeros.dtype != jnp.float32):
            raise ValueError(
                f"QArray with zero points {zeros.dtype}{list(zeros.shape)}: they must be float32{list(scales)}, "
                "as the scales are"
            )
        return self

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """The array that it stands for, computed in float32 and rounded once."""
        match self.layout:
            case "fragments":
                values = _from_fragments(self.values)
            case "columns":
                values = jnp.swapaxes(self.values, -1, -2)
            case _:
                values = self.values
        wide = _split(values.astype(jnp.float32), self.scales.shape)
        if self.zero_points is not None:
            wide = wide - _between(self.zero_points)
        return (wide * _between(self.scales)).reshape(self.shape).astype(dtype)


def quantize(
    x: jax.Array, dtype: str, block: tuple[int | None, ...], *, layout: Layout = "rows", asymmetric: bool = False
) -> QArray:
    """`x` with a scale for each block of `block[i]` elements along axis i (None: all of the axis), by its extremes.

    A block's largest magnitude becomes `LARGEST[dtype]`; with `asymmetric` (integers only) its least and largest
    elements, or zero if that is, become the ends of the range, by a zero point in it, and zeros stay zeros. Rounds to
    nearest, ties to even. A block of zeros has scale 1; one with a NaN or an infinity dequantises to NaN.

    Raises ValueError for an unknown dtype and for a block that does not divide its axis.
    """
    if dtype not in LARGEST:
        raise ValueError(f"quantize to {dtype!r}: choose one of {', '.join(LARGEST)}")
    if asymmetric and not dtype.startswith("int"):
        raise ValueError(f"quantize to {dtype} with zero points: only int4 and int8 have them")
    if len(block) != x.ndim:
        raise ValueError(f"quantize an array of shape {list(x.shape)} in blocks {block}: one length for each axis")
    sizes = [max(size, 1) if length is None else length for size, length in zip(x.shape, block, strict=True)]
    if any(length < 1 or size % length for size, length in zip(x.shape, sizes, strict=True)):
        raise ValueError(f"quantize an array of shape {list(x.shape)} in blocks {block}: each must divide its axis")
    counts = tuple(size // length for size, length in zip(x.shape, sizes, strict=True))
    wide = _split(x.astype(jnp.float32), counts)
    inside = tuple(range(1, wide.ndim, 2))
    if asymmetric:
        # With zero inside, a zero point is one of the values: it could be any size for a block far from zero.
        low = wide.min(inside, keepdims=True, initial=0)
        high = _or_nan(wide.max(inside, keepdims=True, initial=0), wide, inside)
        scale = _positive(high / (2 * LARGEST[dtype]) - low / (2 * LARGEST[dtype]), (low == 0) & (high == 0))
        zero = jnp.round(-LARGEST[dtype] - low / scale)
    else:
        largest = largest_magnitude(wide, inside)
        scale = _positive(largest / LARGEST[dtype], largest == 0)
        zero = None
    scaled = (wide / scale if zero is None else wide / scale + zero).reshape(x.shape)
    values = round_to(scaled, dtype)
    values = values if layout == "rows" else jnp.swapaxes(values, -1, -2)
    zero_points = None if zero is None else zero.reshape(counts)
    return QArray(values, scale.reshape(counts), zero_points, layout).check()


def largest_magnitude(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """Of the elements along `axes`, which stay with a length of 1; NaN where one of them is."""
    return _or_nan(jnp.abs(x).max(axes, keepdims=True), x, axes)


def _or_nan(extreme: jax.Array, x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """`extreme` of x along `axes`, NaN where there is one. XLA's CPU library leaves NaNs out of a maximum of some
    thousand elements (JAX 0.10.2 and 0.11.2), and an int8 cannot say it."""
    return jnp.where(jnp.isnan(x).any(axes, keepdims=True), jnp.nan, extreme)


def to_fragments(w: QArray) -> QArray:
    """`w` [..., K, N] in the layout "fragments", its scales one for each column: [..., K / block, N].

    `values` becomes [..., N/64, K/64, tile], a tile being 64 columns × 64 rows of `w`: uint32 [512], with eight int4 in
    each word, or 4096 elements of a byte. Four warps load a tile with 16 bytes to a thread at a time and multiply it as
    the first operand of wgmma (its m64k16 fragment), so that no thread needs another's elements. An int4 is stored as
    what it exceeds -8 by.

    Raises ValueError where K or N is not a multiple of 64, and for a `w` that has another layout than rows or columns.
    """
    if w.check().layout == "fragments":
        raise ValueError("to_fragments of a QArray that is in fragments already")
    K, N = w.shape[-2:]
    if K % TILE or N % TILE:
        raise ValueError(f"to_fragments of {list(w.shape)}: its last two axes must be multiples of {TILE}")
    values = w.values if w.layout == "columns" else jnp.swapaxes(w.values, -1, -2)
    values = values.astype(jnp.int8) + 8 if w.dtype == jnp.int4 else values
    # Column 16·warp + 8·half + group, row 16·step + 8·part + 2·lane + element of a tile.
    split = values.reshape(*values.shape[:-2], N // TILE, 4, 2, 8, K // TILE, 4, 2, 4, 2)
    lead = tuple(range(split.ndim - 9))
    order = (0, 4, 1, 3, 7, 5, 8, 6, 2) if w.dtype == jnp.int4 else (0, 4, 5, 1, 3, 7, 6, 2, 8)
    split = split.transpose(*lead, *(len(lead) + axis for axis in order))
    if w.dtype == jnp.int4:
        nibbles = split.reshape(*split.shape[: len(lead) + 2], 512, 8).astype(jnp.uint32)
        tiles = sum(nibbles[..., i] << jnp.uint32(4 * i) for i in range(8))
    else:
        # Two steps to a thread's 16 bytes.
        split = split.reshape(*split.shape[: len(lead) + 2], 2, 2, 4, 8, 4, 8)
        tiles = jnp.moveaxis(split, -5, -2).reshape(*split.shape[: len(lead) + 2], TILE * TILE)
    per_column = [None if a is None else jnp.repeat(a, N // a.shape[-1], axis=-1) for a in (w.scales, w.zero_points)]
    return QArray(tiles, *per_column, layout="fragments").check()


def _from_fragments(tiles: jax.Array) -> jax.Array:
    """[..., K, N] of [..., N/64, K/64, tile], int4 as int8."""
    lead, (n_tiles, k_tiles) = tiles.shape[:-3], tiles.shape[-3:-1]
    if tiles.dtype == jnp.uint32:
        nibbles = jnp.stack([(tiles >> jnp.uint32(4 * i)) & jnp.uint32(15) for i in range(8)], axis=-1)
        split = (nibbles.astype(jnp.int8) - 8).reshape(*lead, n_tiles, k_tiles, 4, 8, 4, 4, 2, 2, 2)
        # Tiles, warp, group, lane, step, element, part, half.
        order = (1, 5, 7, 4, 6, 0, 2, 8, 3)
    else:
        split = tiles.reshape(*lead, n_tiles, k_tiles, 2, 4, 8, 4, 2, 2, 2, 2)
        # Tiles, pair of steps, warp, group, lane, step, part, half, element.
        order = (1, 2, 6, 7, 5, 9, 0, 3, 8, 4)
    first = len(lead)
    split = split.transpose(*range(first), *(first + axis for axis in order))
    return split.reshape(*lead, TILE * k_tiles, TILE * n_tiles)


def _check_fragments(values: jax.Array, name: str) -> None:
    words = 512 if name == "int4" else TILE * TILE
    if values.ndim < 3 or values.shape[-1] != words or values.dtype == jnp.int4:
        raise ValueError(
            f"QArray of {name} in fragments with values {values.dtype}{list(values.shape)}: they must be "
            f"[..., N/{TILE}, K/{TILE}, {words}]; see to_fragments"
        )


def round_to(scaled: jax.Array, dtype: str) -> jax.Array:
    """The nearest values of a dtype of `LARGEST`, ties to even, within its range. NaN stays NaN where there is one."""
    limit = LARGEST[dtype]
    # A conversion to e4m3 makes NaN of what is too large, and XLA's to an integer wraps.
    clipped = jnp.clip(scaled, -limit, limit)
    return (jnp.round(clipped) if dtype.startswith("int") else clipped).astype(dtype)


def _positive(scale: jax.Array, nothing: jax.Array) -> jax.Array:
    """1 where a block is `nothing`. Else not zero, nor so small that 1 / scale is infinite: what is subnormal may have
    become zero. An infinity becomes NaN, which integer values cannot say."""
    scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
    return jnp.where(nothing, 1.0, jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))


def _lengths(shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Of a block along each axis; 1 where there is none."""
    return tuple(size // count if count else 1 for size, count in zip(shape, counts, strict=True))


def _split(x: jax.Array, counts: tuple[int, ...]) -> jax.Array:
    """[count, length] in the place of each axis."""
    return x.reshape([n for pair in zip(counts, _lengths(x.shape, counts), strict=True) for n in pair])


def _between(per_block: jax.Array) -> jax.Array:
    """[count, 1] in the place of each axis."""
    return per_block.reshape([n for count in per_block.shape for n in (count, 1)])
