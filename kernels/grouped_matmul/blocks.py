"""How groups of rows fall into blocks of one fixed size, each with rows of one group."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """Per block: its group, its first row and the row its group ends before. The first `count` blocks hold all rows.

    Groups end in a block that is partly theirs: rows [start, min(start + block, stop)) belong to the block.
    """

    group: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array


def split(group_sizes: jax.Array, num_rows: int, block: int) -> Blocks:
    """Blocks of `block` rows that cover every group; ceil(num_rows / block) + E of them, enough for any group sizes."""
    num_groups = group_sizes.shape[0]
    num_blocks = -(-num_rows // block) + num_groups
    per_group = -(-group_sizes // block)
    last = jnp.cumsum(per_group)
    stop = jnp.cumsum(group_sizes)
    index = jnp.arange(num_blocks, dtype=group_sizes.dtype)
    group = jnp.minimum(jnp.searchsorted(last, index, side="right"), num_groups - 1)
    start = (stop - group_sizes)[group] + (index - (last - per_group)[group]) * block
    return Blocks(group, start, stop[group], last[-1])
