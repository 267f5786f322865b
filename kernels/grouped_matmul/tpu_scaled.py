"""The grouped product of few-bit numbers on TPU: as `tpu`, with a scale for each row of x and each column of a w."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kernels.grouped_matmul.quantized import QuantizedGroupedCase, case_of
from kernels.grouped_matmul.tpu import rows_between
from kernels.grouped_matmul.tpu_scaled_tiles import VMEM_BYTES, check, choose_tiles
from kernels.grouped_matmul.tpu_tiles import Shape, Tiles, num_visits, strip_of
from kernels.grouped_matmul.tpu_visits import begins, visits_of
from kernels.quantized_matmul.tpu import dot, narrow
from quantization.qarray import QArray


@dataclasses.dataclass(frozen=True)
class _Statics:
    case: QuantizedGroupedCase
    tiles: Tiles
    interpret: bool

    @property
    def steps(self) -> int:
        return self.case.in_dim // self.tiles.depth

    @property
    def visits(self) -> int:
        case = self.case
        return num_visits(Shape(case.num_rows, case.num_groups, case.in_dim, case.out_dim, 2), self.tiles)

    @property
    def sum_dtype(self):
        return jnp.int32 if self.case.x_dtype == "int8" else jnp.float32


def product(
    x: jax.Array | QArray, w: QArray, group_sizes, out_dtype, *, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """[M, N] of x [M, K] and w [E, K, N]; arguments as in `kernels.grouped_matmul.quantized`, `tiles` and `interpret`
    as in `tpu.product`.

    Raises ValueError for tiles that a core's memories have no room for.
    """
    case = case_of(x, w, out_dtype)
    tiles = choose_tiles(case) if tiles is None else tiles
    check(case, tiles)
    return _call(_Statics(case, tiles, interpret), x, w, group_sizes)


# A jit of its own, so that a model's layers are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _call(statics: _Statics, x, w: QArray, group_sizes) -> jax.Array:
    case, tiles = statics.case, statics.tiles
    visits = visits_of(group_sizes, case.num_rows, tiles.rows, statics.visits, every="tile")
    if w.layout == "rows":
        w_spec = pl.BlockSpec((None, tiles.depth, tiles.columns), lambda n, v, k, group, *_: (group[v], k, n))
    else:
        w_spec = pl.BlockSpec((None, tiles.columns, tiles.depth), lambda n, v, k, group, *_: (group[v], n, k))
    arrays = [x.values if isinstance(x, QArray) else x, w.values, jnp.repeat(w.scales, w.block[2], axis=2)]
    specs = [
        pl.BlockSpec((tiles.rows, tiles.depth), lambda n, v, k, _, tile, *__: (tile[v], k)),
        w_spec,
        pl.BlockSpec((None, 1, tiles.columns), lambda n, v, k, group, *_: (group[v], 0, n)),
    ]
    if isinstance(x, QArray):
        arrays.append(jnp.repeat(x.scales, x.block[0], axis=0))
        specs.append(pl.BlockSpec((tiles.rows, 1), lambda n, v, k, _, tile, *__: (tile[v], 0)))
    return pl.pallas_call(
        functools.partial(_body, statics),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(case.out_dim, tiles.columns), statics.visits, statics.steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, v, k, _, tile, *__: (tile[v], n)),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), statics.sum_dtype)] if statics.steps > 1 else [],
        ),
        out_shape=jax.ShapeDtypeStruct((case.num_rows, case.out_dim), case.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=statics.interpret,
        name=f"grouped_matmul_{case.x_dtype}_{case.w_dtype}",
    )(*visits, *arrays)


def _body(statics: _Statics, group, tile, start, stop, x, w, w_scales, *rest):
    case, visit, step = statics.case, pl.program_id(1), pl.program_id(2)
    x_scales, rest = (rest[0], rest[1:]) if case.x_block is not None else (None, rest)
    out, sums = rest if statics.steps > 1 else (*rest, None)
    low, high = start[visit], stop[visit]

    @pl.when(begins(tile, visit) & (step == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(low < high)
    def _():
        own = rows_between(low, high, statics.tiles.rows)
        width = strip_of(statics.tiles.columns)
        for first in range(0, statics.tiles.columns, width):
            strip = pl.ds(first, width)
            values = narrow(w[:, strip] if case.w_layout == "rows" else w[strip, :], case.x_dtype)
            total = dot(x[...], values, case.w_layout)
            if sums is not None:
                total = total + jnp.where(step == 0, 0, sums[:, strip])
                sums[:, strip] = total
            y = total.astype(jnp.float32) * w_scales[:, strip]
            if x_scales is not None:
                y = y * x_scales[...]
            out[:, strip] = jnp.where(own, y.astype(out.dtype), out[:, strip])
