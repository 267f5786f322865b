"""The grouped product on TPU, and its gradients.

A core walks over tiles of rows, once for each group with rows in the tile. A tile of the result stays in vector memory
while its groups follow each other, and a matrix while its tiles do. A visit multiplies the whole tile, and keeps the
rows of its group: the matrix units take about as long to load a matrix as to multiply 300 rows with it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul.tpu_tiles import (
    VMEM_BYTES,
    Pass,
    Shape,
    Tiles,
    check,
    choose_tiles,
    num_visits,
    strip_of,
)
from kernels.grouped_matmul.tpu_visits import begins, ends, visits_of


@dataclasses.dataclass(frozen=True)
class Statics:
    shape: Shape
    tiles: Tiles
    which: Pass
    interpret: bool

    @property
    def steps(self) -> int:
        """Along what a product sums over."""
        return self.shape.depth // self.tiles.depth

    @property
    def visits(self) -> int:
        return num_visits(self.shape, self.tiles)

    @property
    def strips(self) -> list[Any]:
        width = strip_of(self.tiles.columns)
        return [pl.ds(first, width) for first in range(0, self.tiles.columns, width)]


def product(
    x, w, group_sizes, transpose: bool = False, *, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; with `transpose`, [M, K] of x [M, N] and the same w, as it lies.

    `tiles`: None for those that `choose_tiles` gives. `interpret`: on any device, by Pallas's interpreter, for tests.

    Raises ValueError for tiles that a core's memories have no room for.
    """
    (M, depth), columns = x.shape, w.shape[1 if transpose else 2]
    shape = Shape(M, len(w), depth, columns, x.dtype.itemsize)
    return _product(_statics(shape, tiles, "transposed" if transpose else "product", interpret), x, w, group_sizes)


def weight_gradient(x, dy, group_sizes, *, tiles: Tiles | None = None, interpret: bool = False) -> jax.Array:
    """[E, K, N]: x^T dy over each group's rows, of x [M, K] and dy [M, N]; the rest as in `product`."""
    shape = Shape(x.shape[0], len(group_sizes), x.shape[1], dy.shape[1], x.dtype.itemsize)
    return _weight_gradient(_statics(shape, tiles, "weight_gradient", interpret), x, dy, group_sizes)


def _statics(shape: Shape, tiles: Tiles | None, which: Pass, interpret: bool) -> Statics:
    tiles = choose_tiles(shape, which) if tiles is None else tiles
    check(shape, tiles, which)
    return Statics(shape, tiles, which, interpret)


class _Refs(NamedTuple):
    """Blocks in vector memory; `sums` None where a step has the whole depth."""

    x: Any
    w: Any
    out: Any
    sums: Any = None


# Jits of their own, so that a model's layers are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _product(statics: Statics, x, w, group_sizes) -> jax.Array:
    shape, tiles = statics.shape, statics.tiles
    visits = visits_of(group_sizes, shape.rows, tiles.rows, statics.visits, every="tile")
    if statics.which == "transposed":
        w_spec = pl.BlockSpec((None, tiles.columns, tiles.depth), lambda n, v, k, group, *_: (group[v], n, k))
    else:
        w_spec = pl.BlockSpec((None, tiles.depth, tiles.columns), lambda n, v, k, group, *_: (group[v], k, n))
    sums = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] if statics.steps > 1 else []
    return pl.pallas_call(
        functools.partial(product_body, statics),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(shape.columns, tiles.columns), statics.visits, statics.steps),
            in_specs=[pl.BlockSpec((tiles.rows, tiles.depth), lambda n, v, k, _, tile, *__: (tile[v], k)), w_spec],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, v, k, _, tile, *__: (tile[v], n)),
            scratch_shapes=sums,
        ),
        out_shape=jax.ShapeDtypeStruct((shape.rows, shape.columns), x.dtype),
        compiler_params=_parameters(("parallel", "arbitrary", "arbitrary")),
        interpret=statics.interpret,
        name=f"grouped_matmul_{statics.which}",
    )(*visits, x, w)


def product_body(statics: Statics, group, tile, start, stop, *blocks):
    refs, visit, step = _Refs(*blocks), pl.program_id(1), pl.program_id(2)
    low, high = start[visit], stop[visit]

    @pl.when(begins(tile, visit) & (step == 0))
    def _():
        refs.out[...] = jnp.zeros_like(refs.out)

    @pl.when(low < high)
    def _():
        own = rows_between(low, high, statics.tiles.rows)
        for strip in statics.strips:
            if statics.which == "transposed":
                total = _dot(refs.x[...], refs.w[strip, :], (1, 1))
            else:
                total = _dot(refs.x[...], refs.w[:, strip], (1, 0))
            if statics.steps > 1:
                total = total + jnp.where(step == 0, 0.0, refs.sums[:, strip])
                refs.sums[:, strip] = total
            # Every step stores, and the last one's stays: that costs less than a branch of its own, since the matrix
            # units are what a step waits for.
            refs.out[:, strip] = jnp.where(own, total.astype(refs.out.dtype), refs.out[:, strip])


def rows_between(low, high, rows: int):
    """bool [rows, 1]."""
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= low) & (row < high)


@functools.partial(jax.jit, static_argnums=0)
def _weight_gradient(statics: Statics, x, dy, group_sizes) -> jax.Array:
    shape, tiles = statics.shape, statics.tiles
    visits = visits_of(group_sizes, shape.rows, tiles.rows, statics.visits, every="group")
    return pl.pallas_call(
        functools.partial(weight_gradient_body, statics),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(shape.depth, tiles.depth), pl.cdiv(shape.columns, tiles.columns), statics.visits),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.depth), lambda k, n, v, _, tile, *__: (tile[v], k)),
                pl.BlockSpec((tiles.rows, tiles.columns), lambda k, n, v, _, tile, *__: (tile[v], n)),
            ],
            out_specs=pl.BlockSpec((None, tiles.depth, tiles.columns), lambda k, n, v, group, *_: (group[v], k, n)),
            scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((shape.groups, shape.depth, shape.columns), x.dtype),
        compiler_params=_parameters(("parallel", "parallel", "arbitrary")),
        interpret=statics.interpret,
        name="grouped_matmul_weight_gradient",
    )(*visits, x, dy)


def weight_gradient_body(statics: Statics, group, tile, start, stop, x, dy, out, sums):
    visit = pl.program_id(2)
    low, high = start[visit], stop[visit]

    @pl.when(begins(group, visit))
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(low < high)
    def _():
        own = rows_between(low, high, statics.tiles.rows)
        # Both sides: a row of another group, or of none, may hold anything, and 0 · NaN is NaN.
        mine = jnp.where(own, x[...], 0)
        for strip in statics.strips:
            sums[:, strip] += _dot(mine, jnp.where(own, dy[:, strip], 0), (0, 0))

    @pl.when(ends(group, visit, statics.visits))
    def _():
        out[...] = sums[...].astype(out.dtype)


def _dot(a, b, over: tuple[int, int]) -> jax.Array:
    """float32 sums of products over an axis of each; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _parameters(semantics: tuple[str, ...]):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)
