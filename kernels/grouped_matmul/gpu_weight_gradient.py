"""The grouped product's gradient of the weights on Hopper: for each group, xᵀ dy over its rows.

The rows are what is summed over, in steps of 64 from a group's first row on, or up to seven before it, since copies
begin at multiples of eight. Rows of other groups in a group's first and last step are made zeros, in both operands:
whatever they hold, zero times it would be NaN if that is not finite.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from kernels import hopper
from kernels.grouped_matmul import persistent
from kernels.grouped_matmul.persistent import Tile, aligned, rows_from, tiles_of
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT, WIDTH, Tiles, choose_gradient_tiles

_SORTED_GROUPS = 16


class _WeightGradient(persistent.Kernel):
    """x [M, K] and dy [M, N]; tiles of [E, K, N]. Both warpgroups mask a tile's first step together."""

    name = "grouped_matmul_weight_gradient"

    @property
    def shapes(self):
        return (WIDTH, self.tiles.rows), (WIDTH, self.tiles.columns)

    @property
    def cluster(self) -> int:
        return self.tiles.cluster

    @property
    def num_row_tiles(self) -> int:
        return -(-self.in_dim // self.rows)

    @property
    def max_tiles(self) -> int:
        return self.num_groups * self.num_row_tiles * self.num_columns

    @property
    def num_visits(self) -> int:
        return self.num_groups

    @property
    def largest_first(self) -> bool:
        # A search for the next group looks at all of them: of many, it would take longer than it saves.
        return self.num_groups <= _SORTED_GROUPS

    def extent(self, group, begin, size):
        return jnp.int32(self.num_row_tiles), tiles_of(begin, size, WIDTH)

    def first_row(self, begin):
        return 0

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        rows = rows_from(aligned(tile.begin) + step * WIDTH, WIDTH)
        (x, dy), (x_smem, dy_smem) = inputs, buffers
        plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(tile.row, self.tiles.rows)], x_smem, arrived)
        columns = pl.ds(tile.column, self.tiles.columns)
        plgpu.copy_gmem_to_smem(dy.at[rows, columns], dy_smem, arrived, **self.for_cluster)

    def prepare(self, tile: Tile, step, buffers, warpgroup, masked) -> None:
        row = aligned(tile.begin) + step * WIDTH

        @pl.when((row < tile.begin) | (row + WIDTH > tile.end))
        def _():
            for smem in buffers:
                share = smem.shape[1] // 2
                _keep_rows(smem.at[:, pl.ds(warpgroup * share, share)], tile.begin - row, tile.end - row)
            plgpu.commit_smem()
            plgpu.barrier_arrive(masked)
            plgpu.barrier_wait(masked)

    def multiply(self, sums, buffers, warpgroup) -> None:
        (x, dy), (rows, columns) = buffers, self.tiles.piece
        if self.tiles.split == "rows":
            plgpu.wgmma(sums[0], x.at[:, pl.ds(warpgroup * rows, rows)].T, dy)
        else:
            plgpu.wgmma(sums[0], x.T, dy.at[:, pl.ds(warpgroup * columns, columns)])

    def place(self, out_ref, tile: Tile, rows, columns):
        return out_ref.at[tile.group, rows, columns]

    def owned(self, tile: Tile):
        return None


def _keep_rows(smem, first, last) -> None:
    """Makes zeros of all rows but [first, last)."""
    for i in range(smem.shape[1] // WIDTH):
        part = smem.at[:, pl.ds(i * WIDTH, WIDTH)]
        row = plgpu.broadcasted_iota(jnp.int32, (WIDTH, WIDTH), 0, layout=hopper.MATRIX)
        values = plgpu.load(part, layout=hopper.MATRIX)
        part[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def weight_gradient(x, dy, group_sizes, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[E, K, N]: xᵀ dy over each group's rows, of x [M, K] and dy [M, N].

    `tiles`: None for the choice of `choose_gradient_tiles`. `interpret`: parameters of Pallas's interpreter, which
    tests give.
    """
    num_groups, num_rows, in_dim, out_dim = group_sizes.shape[0], *x.shape, dy.shape[1]
    tiles = choose_gradient_tiles(out_dim) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    padding = -num_rows % ROW_ALIGNMENT
    x, dy = (jnp.pad(array, ((0, padding), (0, 0))) if padding else array for array in (x, dy))
    kernel = _WeightGradient(num_groups, num_rows + padding, in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((num_groups, in_dim, out_dim), x.dtype)
    (dw,) = persistent.call(kernel, (x, dy), group_sizes, [out_type], interpret)
    return dw
