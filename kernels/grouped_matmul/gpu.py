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
from kernels.grouped_matmul.persistent import Tile, rows_from
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT, WIDTH, Tiles, choose_tiles


class Product(persistent.Kernel):
    """x [M, K] and w [E, K, N]; `TransposedProduct`: w [E, N, K]."""

    name = "grouped_matmul"

    @property
    def cluster(self) -> int:
        return self.tiles.cluster

    @property
    def shapes(self):
        return (self.tiles.rows, WIDTH), (WIDTH, self.tiles.columns)

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        x, *weights = inputs
        depth = pl.ds(step * WIDTH, WIDTH)
        plgpu.copy_gmem_to_smem(x.at[rows_from(tile.row, self.tiles.rows), depth], buffers[0], arrived)
        for w, smem in zip(weights, buffers[1:], strict=True):
            plgpu.copy_gmem_to_smem(self.part(w, tile, depth), smem, arrived, **self.for_cluster)

    def part(self, w, tile: Tile, depth):
        """A step's operand."""
        return w.at[tile.group, depth, pl.ds(tile.column, self.tiles.columns)]

    def multiply(self, sums, buffers, warpgroup) -> None:
        x, *weights = buffers
        rows, columns = self.tiles.piece
        for acc, w in zip(sums, weights, strict=True):
            if self.tiles.split == "rows":
                plgpu.wgmma(acc, x.at[pl.ds(warpgroup * rows, rows)], self.right(w, slice(None)))
            else:
                plgpu.wgmma(acc, x, self.right(w, pl.ds(warpgroup * columns, columns)))

    def right(self, w_smem, columns):
        """The product's second operand: some columns of a step's."""
        return w_smem.at[:, columns]


class TransposedProduct(Product):
    name = "grouped_matmul_transposed"

    @property
    def shapes(self):
        return (self.tiles.rows, WIDTH), (self.tiles.columns, WIDTH)

    def part(self, w, tile: Tile, depth):
        return w.at[tile.group, pl.ds(tile.column, self.tiles.columns), depth]

    def right(self, w_smem, columns):
        return w_smem.at[columns].T


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("transpose", "tiles", "interpret"))
def product(x, w, group_sizes, transpose: bool = False, *, tiles: Tiles | None = None, interpret=None) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; with `transpose`, [M, K] of x [M, N] and the same w.

    `tiles`: None for the choice of `choose_tiles`. `interpret`: parameters of Pallas's interpreter, which tests give.
    """
    num_rows, in_dim = x.shape
    kind, out_dim = (TransposedProduct, w.shape[1]) if transpose else (Product, w.shape[2])
    tiles = choose_tiles(out_dim, transpose) if tiles is None else tiles
    # Copies fill shared memory by eight rows.
    x = jnp.pad(x, ((0, -num_rows % ROW_ALIGNMENT), (0, 0))) if num_rows % ROW_ALIGNMENT else x
    kernel = kind(w.shape[0], x.shape[0], in_dim, out_dim, tiles)
    out_type = jax.ShapeDtypeStruct((x.shape[0], out_dim), x.dtype)
    (y,) = persistent.call(kernel, (x, w), group_sizes, [out_type], interpret)
    return y[:num_rows]
