"""The grouped product's gradient of the weights on Hopper: for each group, xᵀ dy over its rows.

The rows are what is summed over, in steps of 64 from a group's first row on, or up to seven before it, since copies
begin at multiples of eight. Rows of other groups in a group's first and last step are made zeros, in both operands:
whatever they hold, zero times it would be NaN if that is not finite.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class _WeightGradients(persistent.Kernel):
    """x [M, K] and `count` dy [M, N]; tiles of as many [E, K, N]. Both warpgroups mask a tile's first step together."""

    count: int

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
    def columns_each(self) -> int:
        """Tiles side by side in one of the results."""
        return super().num_columns

    @property
    def num_columns(self) -> int:
        return self.count * self.columns_each

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
        (x, *dys), (x_smem, dy_smem) = inputs, buffers
        plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(tile.row, self.tiles.rows)], x_smem, arrived)
        for i, dy in enumerate(dys):

            @self.when_of(i, tile)
            def _(own: Tile, dy=dy):
                columns = pl.ds(own.column, self.tiles.columns)
                plgpu.copy_gmem_to_smem(dy.at[rows, columns], dy_smem, arrived, **self.for_cluster)

    def when_of(self, i: int, tile: Tile):
        """Runs what it decorates where a tile is of the i-th result, with the tile as it lies there."""
        if self.count == 1:
            return lambda body: body(tile)
        width = self.columns_each * self.tiles.columns
        mine = (tile.column >= i * width) & (tile.column < (i + 1) * width)
        own = tile._replace(column=pl.multiple_of(tile.column - i * width, WIDTH))
        return lambda body: pl.when(mine)(lambda: body(own))

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared) -> None:
        del start
        values = sums[0].astype(outs[0].dtype)
        for i, out in enumerate(outs):

            @self.when_of(i, tile)
            def _(own: Tile, out=out):
                persistent.store(self, warpgroup, out, shared, own, values)

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


def weight_gradient(x, dy, group_sizes, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[E, K, N]: xᵀ dy over each group's rows, of x [M, K] and dy [M, N].

    `tiles`: None for the choice of `choose_gradient_tiles`. `interpret`: parameters of Pallas's interpreter, which
    tests give.
    """
    (dw,) = weight_gradients(x, (dy,), group_sizes, tiles=tiles, interpret=interpret)
    return dw


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def weight_gradients(x, dys, group_sizes, *, tiles: Tiles | None = None, interpret=None) -> list[jax.Array]:
    """`weight_gradient` of one x and each of several dy of one width, in one launch."""
    num_groups, num_rows, in_dim, out_dim = group_sizes.shape[0], *x.shape, dys[0].shape[1]
    tiles = choose_gradient_tiles(out_dim) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    padding = -num_rows % ROW_ALIGNMENT
    x, *dys = (jnp.pad(array, ((0, padding), (0, 0))) if padding else array for array in (x, *dys))
    kernel = _WeightGradients(num_groups, num_rows + padding, in_dim, out_dim, tiles, len(dys))
    out_type = jax.ShapeDtypeStruct((num_groups, in_dim, out_dim), x.dtype)
    return persistent.call(kernel, (x, *dys), group_sizes, [out_type] * len(dys), interpret)
