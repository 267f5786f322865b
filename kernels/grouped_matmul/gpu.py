"""The grouped product on Hopper: y = x w and, with the same weights as they lie, x = y wᵀ.

Tiles of rows start at a group's first row, or up to seven before it, since copies begin at multiples of eight: rows of
other groups in a group's first and last tile are multiplied too, but not written. Rows of no group are tiles of no
steps.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from kernels.grouped_matmul import persistent
from kernels.grouped_matmul.gpu_weight_gradient import weight_gradient as weight_gradient
from kernels.grouped_matmul.persistent import Tile, aligned, rows_from, tiles_of
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT, WIDTH, Tiles, choose_tiles


class Product(persistent.Kernel):
    """x [M, K] and w [E, K, N]; `TransposedProduct`: w [E, N, K]."""

    name = "grouped_matmul"

    @property
    def shapes(self):
        return (self.tiles.rows, WIDTH), (WIDTH, self.tiles.columns)

    @property
    def num_columns(self) -> int:
        return -(-self.out_dim // self.tiles.columns)

    @property
    def max_tiles(self) -> int:
        # Each group, and the rows of none, may have a tile that is not full.
        return (-(-self.num_rows // self.tiles.rows) + self.num_groups + 1) * self.num_columns

    @property
    def num_visits(self) -> int:
        return self.num_groups + 1

    def extent(self, group, begin, size):
        steps = jnp.where(group < self.num_groups, -(-self.in_dim // WIDTH), 0)
        return tiles_of(begin, size, self.tiles.rows), steps

    def first_row(self, begin):
        return aligned(begin)

    def copy(self, tile: Tile, step, a_ref, b_ref, a_smem, b_smem, arrived) -> None:
        rows, depth = rows_from(tile.row, self.tiles.rows), pl.ds(step * WIDTH, WIDTH)
        plgpu.copy_gmem_to_smem(a_ref.at[rows, depth], a_smem, arrived)
        plgpu.copy_gmem_to_smem(self.weights(b_ref, tile, depth), b_smem, arrived)

    def weights(self, ref, tile: Tile, depth):
        return ref.at[tile.group, depth, pl.ds(tile.column, self.tiles.columns)]

    def operands(self, a_smem, b_smem, warpgroup):
        rows, columns = self.tiles.piece
        if self.tiles.split == "rows":
            return a_smem.at[pl.ds(warpgroup * rows, rows)], b_smem
        return a_smem, b_smem.at[:, pl.ds(warpgroup * columns, columns)]

    def place(self, out_ref, tile: Tile, rows, columns):
        return out_ref.at[rows, columns]

    def owned(self, tile: Tile):
        return tile.begin, tile.end


class TransposedProduct(Product):
    name = "grouped_matmul_transposed"

    @property
    def shapes(self):
        return (self.tiles.rows, WIDTH), (self.tiles.columns, WIDTH)

    def weights(self, ref, tile: Tile, depth):
        return ref.at[tile.group, pl.ds(tile.column, self.tiles.columns), depth]

    def operands(self, a_smem, b_smem, warpgroup):
        rows, columns = self.tiles.piece
        if self.tiles.split == "rows":
            return a_smem.at[pl.ds(warpgroup * rows, rows)], b_smem.T
        return a_smem, b_smem.at[pl.ds(warpgroup * columns, columns)].T


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("transpose", "tiles", "interpret"))
def product(x, w, group_sizes, transpose: bool = False, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; with `transpose`, [M, K] of x [M, N] and the same w.

    `tiles`: None for the choice of `choose_tiles`. `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    num_rows, in_dim = x.shape
    kind, out_dim = (TransposedProduct, w.shape[1]) if transpose else (Product, w.shape[2])
    tiles = choose_tiles(num_rows, w.shape[0], in_dim, out_dim) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    x = jnp.pad(x, ((0, -num_rows % ROW_ALIGNMENT), (0, 0))) if num_rows % ROW_ALIGNMENT else x
    kernel = kind(w.shape[0], x.shape[0], in_dim, out_dim, tiles)
    y = persistent.call(kernel, x, w, group_sizes, jax.ShapeDtypeStruct((x.shape[0], out_dim), x.dtype), interpret)
    return y[:num_rows]
