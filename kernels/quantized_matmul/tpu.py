"""Products of few-bit numbers on TPU.

A step multiplies a tile of x with a tile of w. Where w becomes x's dtype first, that goes strip by strip of columns, so
that the vector units prepare one strip while the matrix units have another. By the compiler's count for 4096³ in int8
(an estimate; JAX 0.11.2, libtpu 0.0.48.1) steps of 1024 × 1024 with all of K take 89% of v6e's peak, and 70% with half
of K where a product is added up after it is complete, as a statement of its own.
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

from kernels.quantized_matmul import QuantizedCase, case_of
from kernels.quantized_matmul.tpu_tiles import (
    VMEM_BYTES,
    Tiles,
    block_of,
    check,
    choose_tiles,
    scaling,
    strip_of,
    widened,
)
from quantization.qarray import QArray


class Refs(NamedTuple):
    """Blocks in vector memory. Scales: [rows, blocks] of x, [blocks, columns] of w, and so its zero points. `sums` of
    earlier steps, where there are such."""

    x: Any
    w: Any
    x_scales: Any
    w_scales: Any
    zero_points: Any
    bias: Any
    out: Any
    sums: Any


@dataclasses.dataclass(frozen=True)
class Statics:
    case: QuantizedCase
    tiles: Tiles
    interpret: bool

    @property
    def steps(self) -> int:
        """Along K."""
        return self.case.in_dim // self.tiles.depth

    @property
    def scaling(self) -> str:
        return scaling(self.case, self.tiles)

    @property
    def block(self) -> int:
        """Along K, inside a step."""
        return self.tiles.depth if self.scaling == "outside" else block_of(self.case, self.tiles)

    @property
    def sum_dtype(self):
        """Of what is added up over steps."""
        integers = self.case.x_dtype.startswith("int") and self.scaling == "outside"
        return jnp.int32 if integers else jnp.float32


def quantized_matmul(
    x: jax.Array | QArray,
    w: QArray,
    bias: jax.Array | None,
    out_dtype,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """[M, N] of x [M, K] and w [K, N]; arguments as in `kernels.quantized_matmul.quantized_matmul`.

    `tiles`: None for those that `choose_tiles` gives. `interpret`: on any device, by Pallas's interpreter, for tests.

    Raises ValueError for tiles that a core's memory has no room for.
    """
    case = case_of(x, w, bias, out_dtype)
    if widened(case) != case:
        x = x.dequantize(jnp.bfloat16)
        case = case_of(x, w, bias, out_dtype)
    tiles = choose_tiles(case) if tiles is None else tiles
    check(case, tiles)
    return _call(Statics(case, tiles, interpret), x, w, bias)


# A jit of its own, so that a model's layers are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _call(statics: Statics, x, w: QArray, bias):
    case, tiles = statics.case, statics.tiles
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    blocks, outside = depth // statics.block, statics.scaling == "outside"

    def step(k):
        return 0 if outside else k

    by_column = pl.BlockSpec((None, blocks, columns), lambda i, j, k: (step(k), 0, j))
    w_rows = pl.BlockSpec((depth, columns), lambda i, j, k: (k, j))
    w_columns = pl.BlockSpec((columns, depth), lambda i, j, k: (j, k))
    inputs = {
        "x": (x.values if isinstance(x, QArray) else x, pl.BlockSpec((rows, depth), lambda i, j, k: (i, k))),
        "w": (w.values, w_rows if w.layout == "rows" else w_columns),
        "w_scales": (per_column(statics, w, w.scales), by_column),
    }
    if isinstance(x, QArray):
        by_row = pl.BlockSpec((None, rows, blocks), lambda i, j, k: (step(k), i, 0))
        inputs["x_scales"] = per_row(statics, x), by_row
    if w.zero_points is not None:
        inputs["zero_points"] = per_column(statics, w, w.zero_points), by_column
    if bias is not None:
        inputs["bias"] = bias.astype(jnp.float32)[None], pl.BlockSpec((1, columns), lambda i, j, k: (0, j))
    names = (*inputs, "out", *(["sums"] if statics.steps > 1 else []))

    def body(*refs):
        _body(statics, Refs(**dict.fromkeys(Refs._fields) | dict(zip(names, refs, strict=True))))

    return pl.pallas_call(
        body,
        grid=(pl.cdiv(case.num_rows, rows), pl.cdiv(case.out_dim, columns), statics.steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((case.num_rows, case.out_dim), case.out_dtype),
        scratch_shapes=[pltpu.VMEM((rows, columns), statics.sum_dtype)] if statics.steps > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=statics.interpret,
        name=f"quantized_matmul_{case.x_dtype}_{case.w_dtype}",
    )(*(array for array, _ in inputs.values()))


def per_row(statics: Statics, x: QArray) -> jax.Array:
    """float32 [steps along K, M, blocks of a step], or [1, M, 1]: a scale for each row and block."""
    scales = jnp.repeat(x.scales, x.block[0], axis=0)
    if statics.scaling == "outside":
        return scales[None]
    scales = jnp.repeat(scales, x.block[1] // statics.block, axis=1)
    return scales.reshape(len(scales), statics.steps, -1).swapaxes(0, 1)


def per_column(statics: Statics, w: QArray, per_block: jax.Array) -> jax.Array:
    """float32 [..., steps along K, blocks of a step, N], or [..., 1, 1, N], of a w [..., K, N]: its scales, or zero
    points, for each block."""
    per_block = jnp.repeat(per_block, w.block[-1], axis=-1)
    if statics.scaling == "outside":
        return per_block[..., None, :, :]
    per_block = jnp.repeat(per_block, w.block[-2] // statics.block, axis=-2)
    return per_block.reshape(*per_block.shape[:-2], statics.steps, -1, per_block.shape[-1])


def _body(statics: Statics, refs: Refs):
    """What lies outside of x or w, in tiles that reach over their edges, is multiplied into rows and columns that are
    never stored."""
    width, steps, step = strip_of(statics.case, statics.tiles), statics.steps, pl.program_id(2)
    strips = [pl.ds(first, width) for first in range(0, statics.tiles.columns, width)]
    if steps == 1:
        for strip in strips:
            _finish(refs, strip, statics, strip_product(statics, refs, strip))
        return

    @pl.when(step < steps - 1)
    def _():
        for strip in strips:
            refs.sums[:, strip] = jnp.where(step == 0, 0, refs.sums[:, strip]) + strip_product(statics, refs, strip)

    @pl.when(step == steps - 1)
    def _():
        for strip in strips:
            _finish(refs, strip, statics, refs.sums[:, strip] + strip_product(statics, refs, strip))


def strip_product(statics: Statics, refs: Refs, strip) -> jax.Array:
    """[rows, strip] of a step, in the dtype that sums have."""
    case, block = statics.case, statics.block
    if statics.scaling == "outside":
        return dot(refs.x[...], narrow(_strip(case, refs, strip), case.x_dtype), case.w_layout)
    if statics.scaling == "operands":
        return dot(refs.x[...], _scaled_columns(statics, refs, strip), "rows")
    total = None
    for index in range(statics.tiles.depth // block):
        inside, own = pl.ds(index * block, block), pl.ds(index, 1)
        part = dot(refs.x[:, inside], narrow(_strip(case, refs, strip, inside), case.x_dtype), case.w_layout)
        part = part.astype(jnp.float32) * refs.w_scales[own, strip]
        if refs.x_scales is not None:
            part = part * refs.x_scales[:, own]
        total = part if total is None else total + part
    return total


def _strip(case: QuantizedCase, refs: Refs, strip, inside=slice(None)):
    return refs.w[inside, strip] if case.w_layout == "rows" else refs.w[strip, inside]


def narrow(values, x_dtype: str):
    """Values of w in the dtype that x has, which holds all of them. FP8 kinds stay: they can be multiplied together."""
    both_fp8 = x_dtype.startswith("float8") and values.dtype != jnp.int8
    return values if values.dtype == x_dtype or both_fp8 else _convert(values, x_dtype)


def _convert(values, dtype):
    # The compiler has no step from 4 bits to a float.
    if values.dtype == jnp.int4 and jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        values = values.astype(jnp.int32)
    return values.astype(dtype)


def _scaled_columns(statics: Statics, refs: Refs, strip):
    """Of one strip of w, rounded once to x's dtype."""
    wide = _convert(refs.w[:, strip], jnp.float32)
    wide = wide.reshape(-1, statics.block, wide.shape[1])
    if refs.zero_points is not None:
        wide = wide - refs.zero_points[:, strip][:, None]
    wide = wide * refs.w_scales[:, strip][:, None]
    return wide.reshape(-1, wide.shape[2]).astype(refs.x.dtype)


def dot(x, w, layout: str) -> jax.Array:
    """int32 sums of integers, float32 sums of others; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    dimensions = (((1,), (0 if layout == "rows" else 1,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=sums)


def scaled(statics: Statics, refs: Refs, strip, sums) -> jax.Array:
    """float32 [rows, strip] of the finished sums."""
    wide = sums.astype(jnp.float32)
    if statics.scaling == "outside":
        wide = wide * refs.w_scales[:, strip]
        if refs.x_scales is not None:
            wide = wide * refs.x_scales[...]
    return wide


def _finish(refs: Refs, strip, statics: Statics, sums):
    wide = scaled(statics, refs, strip, sums)
    if refs.bias is not None:
        wide = wide + refs.bias[:, strip]
    refs.out[:, strip] = wide.astype(refs.out.dtype)
