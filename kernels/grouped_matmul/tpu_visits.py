"""Which tiles of rows the TPU kernels visit for which groups: a table in scalar memory, read one step ahead."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """int32 [visits]. Rows [start, stop) of a tile, counted from its first, belong to the visit's group.

    All visits of a tile follow each other, and so do all of a group. Where nothing is left to do, the last visit's
    group and tile are repeated without rows, so that nothing is copied.
    """

    group: jax.Array
    tile: jax.Array
    start: jax.Array
    stop: jax.Array


def visits_of(group_sizes, num_rows: int, tile: int, number: int, *, every: str) -> Visits:
    """`number` visits to tiles of `tile` rows. `every` "tile": tiles without a row of any group have a visit too, which
    writes their zeros; `every` "group": groups without rows have one."""
    sizes = group_sizes.astype(jnp.int32)
    stops = jnp.cumsum(sizes)
    if every == "tile":
        # Rows of no group are those of one more.
        sizes = jnp.concatenate([sizes, num_rows - stops[-1:]])
        stops = jnp.concatenate([stops, jnp.full(1, num_rows, jnp.int32)])
    starts = stops - sizes
    first = starts // tile
    counts = jnp.where(sizes > 0, (stops - 1) // tile - first + 1, 0 if every == "tile" else 1)
    ends = jnp.cumsum(counts)
    visit = jnp.minimum(jnp.arange(number, dtype=jnp.int32), ends[-1] - 1)
    owner = jnp.searchsorted(ends, visit, side="right").astype(jnp.int32)
    # A group without rows at the end has no tile of its own.
    place = jnp.minimum(first[owner] + visit - (ends - counts)[owner], (num_rows - 1) // tile)
    start = jnp.clip(starts[owner] - place * tile, 0, tile)
    stop = jnp.clip(stops[owner] - place * tile, 0, tile)
    idle = (jnp.arange(number) >= ends[-1]) | (owner == len(group_sizes))
    start, stop = jnp.where(idle, 0, start), jnp.where(idle, 0, jnp.maximum(stop, start))
    group = jnp.minimum(owner, len(group_sizes) - 1)
    if every == "tile":
        # The matrix that is there already: that of the last group with rows.
        group = jnp.minimum(group, jnp.max(jnp.where(group_sizes > 0, jnp.arange(len(group_sizes)), 0)))
    return Visits(group.astype(jnp.int32), place.astype(jnp.int32), start.astype(jnp.int32), stop.astype(jnp.int32))


def begins(numbers, visit):
    """Whether a visit is the first with its number of `numbers`, a reference to a field of the table."""
    return (visit == 0) | (numbers[visit] != numbers[jnp.maximum(visit - 1, 0)])


def ends(numbers, visit, number: int):
    """Whether a visit is the last with its number."""
    return (visit == number - 1) | (numbers[visit] != numbers[jnp.minimum(visit + 1, number - 1)])
