"""How the Hopper kernel of few-bit rows and weights cuts a grouped product into tiles, and what it can take."""

from __future__ import annotations

import dataclasses

SHARED_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class ScaledTiles:
    """rows, columns: of the output, of one block of threads, whose two warpgroups have half of the rows each;
    num_buffers: steps of 128 in shared memory; panel: as in `tiles.Tiles`; chain: as in
    `kernels.quantized_matmul.tiles.Tiles`."""

    rows: int
    columns: int
    num_buffers: int
    panel: int
    chain: int = 4

    split = "rows"


def choose_scaled_tiles(num_rows: int, num_groups: int, in_dim: int, out_dim: int, outside: bool) -> ScaledTiles:
    """Of x [num_rows, in_dim] by as many matrices [in_dim, out_dim] as there are groups."""
    return ScaledTiles(128, 256, 4, 16) if outside else ScaledTiles(128, 128, 6, 16)
