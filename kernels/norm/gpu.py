"""A residual sum and its RMSNorm on Hopper, forward and backward, each in one pass over device memory.

A block of threads is one warpgroup, which takes every P-th row of P blocks. Rows come to a ring in shared memory, a few
ahead of the one that is computed: what is on its way does not depend on what registers hold. A row is read from there
once for its sum, and again for its values where registers do not hold it. XLA makes two passes of either direction,
since all of a row is needed before any of it.

The normed rows' product with a matrix of few columns, as a router's, is made on the way. A thread has the same columns
of every row, and so a few lines of that matrix in registers, and back those of its gradient.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import hopper
from kernels.hopper_rows import Rows
from kernels.norm.tiles import MAX_NARROW, choose_tiles
from kernels.row_tiles import LINE, Tiles


# A jit of its own each, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("epsilon", "offset", "tiles", "interpret"))
def forward(
    x, residual, scale, narrow=None, *, epsilon: float, offset: float, tiles: Tiles | None = None, interpret=None
):
    """(sum, normed, rstd, products): x and `residual` [M, D] added; the norm of the sum; 1 / rms, float32 [M]; and
    normed · narrow, float32 [M, C], or None without `narrow`, float32 [D, C].

    `tiles`: None for the choice of `choose_tiles`. `interpret`: parameters of Pallas's interpreter, of tests.
    """
    num_rows, width = x.shape
    num_columns = 0 if narrow is None else narrow.shape[1]
    tiles = choose_tiles(num_rows, width, 2, x.dtype.itemsize, num_columns) if tiles is None else tiles
    kernel = Rows(width, num_rows, tiles)

    def body(scale_ref, *refs):
        narrow_ref, refs = (refs[0], refs[1:]) if num_columns else (None, refs)
        x_ref, residual_ref, sum_ref, normed_ref, rstd_ref, *refs = refs
        products_ref, ring, arrived, parts_smem = refs if num_columns else (None, *refs, None)
        gain = kernel.read(scale_ref, offset)
        columns = kernel.narrow(narrow_ref, num_columns) if num_columns else []

        def compute(row, buffers, turn, released):
            x_pieces, residual_pieces = map(kernel.read, buffers)

            def summed(i):
                # As if it had been written and read again.
                return (x_pieces[i]() + residual_pieces[i]()).astype(x.dtype).astype(jnp.float32)

            if tiles.in_registers:
                released()
            squares = kernel.zero()
            for i, lines in enumerate(kernel.lines):
                wide = summed(i)
                squares = squares + wide * wide
                sum_ref[row, lines] = wide.astype(x.dtype)
            rstd = lax.rsqrt(jnp.sum(squares) * (1 / width) + epsilon)
            for i, lines in enumerate(kernel.lines):
                normed = (summed(i) * rstd * gain[i]()).astype(x.dtype)
                normed_ref[row, lines] = normed
            rstd_ref[row] = rstd
            if not tiles.in_registers:
                released()
            if num_columns:
                parts_smem[turn] = column_sums(normed.astype(jnp.float32), columns, kernel.layout)
                # One wait a row: by the next one but one, which has this place again, all have read it.
                plgpu.commit_smem()
                products_ref[row] = functools.reduce(jnp.add, [warp_sums(parts_smem, turn, i) for i in range(4)])
            return 1 - turn

        kernel.walk((x_ref, residual_ref), ring, arrived, compute, jnp.int32(0))

    whole = jax.ShapeDtypeStruct((num_rows, width // LINE, LINE), x.dtype)
    outs = [whole, whole, jax.ShapeDtypeStruct((num_rows,), jnp.float32)]
    rows, inputs, scratch = [kernel.lined(x), kernel.lined(residual)], [kernel.lined(scale)], []
    if num_columns:
        inputs.append(kernel.lined(narrow.T))
        outs.append(jax.ShapeDtypeStruct((num_rows, MAX_NARROW), jnp.float32))
        scratch.append(plgpu.SMEM((2, 128), jnp.float32))
    total, normed, rstd, *products = kernel.call(body, inputs, rows, outs, "add_rms_norm", interpret, scratch)
    products = products[0][:, :num_columns] if num_columns else None
    return total.reshape(num_rows, width), normed.reshape(num_rows, width), rstd, products


def warp_sums(parts_smem, turn, warp: int) -> jax.Array:
    """What a warp has of `column_sums`, float32 [8]."""
    return plgpu.load(parts_smem.at[turn, pl.ds(32 * warp, MAX_NARROW)], layout=hopper.COLUMNS, optimized=False)


def column_sums(row, columns, layout) -> jax.Array:
    """float32 [128], a thread's own each: of thread t the product of what its warp has of `row` and of column t % 8, 0
    where there is none. Up to 8 columns; `row` and they are one piece of a row."""
    count = len(columns)

    @plgpu.inline_mgpu(
        arg_types=(layout,) * (1 + count),
        return_type=plgpu.ShapeDtypeStruct((128,), jnp.float32, layout=plgpu.Layout.WG_STRIDED((128,), vec_size=1)),
    )
    def multiply(ctx, row, *columns):
        del ctx
        return _column_sums(row, columns)

    return multiply(row, *columns)


def _column_sums(row, columns):
    """A Mosaic GPU array of `column_sums`. Eight sums over 32 threads in nine shuffles: a thread keeps half of its sums
    and gives its neighbour the other half, three times over, until it has one."""
    from jax.experimental.mosaic.gpu import fragmented_array, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, math, vector

    float32, word = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def elements(array):
        (vector_register,) = array.registers.flat
        (size,) = ir.VectorType(vector_register.type).shape
        return [vector.extract(vector_register, dynamic_position=[], static_position=[i]) for i in range(size)]

    own, sums = elements(row), []
    for column in columns:
        total, *rest = zip(own, elements(column), strict=True)
        total = arith.mulf(*total)
        for a, b in rest:
            total = math.fma(a, b, total)
        sums.append(total)
    sums += [arith.constant(float32, ir.FloatAttr.get(float32, 0.0))] * (MAX_NARROW - len(sums))
    thread = utils.thread_idx()
    for distance in (4, 2, 1):
        bit = arith.andi(thread, utils.c(distance, word))
        upper = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, word))
        pairs = list(zip(sums[:distance], sums[distance:], strict=True))
        kept = [arith.select(upper, high, low) for low, high in pairs]
        given = [arith.select(upper, low, high) for low, high in pairs]
        sums = [arith.addf(a, utils.shfl_bfly(b, distance)) for a, b in zip(kept, given, strict=True)]
    (total,) = sums
    for distance in (8, 16):
        total = arith.addf(total, utils.shfl_bfly(total, distance))
    register = vector.broadcast(ir.VectorType.get((1,), float32), total)
    layout = fragmented_array.WGStridedFragLayout((128,), 1)
    return fragmented_array.FragmentedArray(
        _registers=np.array([register], dtype=object), _layout=layout, _is_signed=None
    )


@functools.partial(jax.jit, static_argnames=("offset", "tiles", "interpret"))
def backward(
    x,
    rstd,
    scale,
    d_normed,
    d_sum,
    narrow=None,
    d_products=None,
    *,
    offset: float,
    tiles: Tiles | None = None,
    interpret=None,
):
    """(dx, dscale, dnarrow): of the sum x [M, D] that was normed, its `rstd` [M], the gradients of the normed rows, a
    tuple of [M, D] that are added up, that of the sum, and float32 [M, C] that of the products with `narrow`. dscale is
    float32 [D], dnarrow float32 [D, C], or None; other arguments as of `forward`."""
    num_rows, width = x.shape
    num_columns = 0 if narrow is None else narrow.shape[1]
    num_wide = 2 + len(d_normed)
    tiles = choose_tiles(num_rows, width, num_wide, x.dtype.itemsize, num_columns) if tiles is None else tiles
    kernel = Rows(width, num_rows, tiles)

    def body(scale_ref, rstd_ref, *refs):
        narrow_ref, refs = (refs[0], refs[1:]) if num_columns else (None, refs)
        inputs, (dx_ref, parts_ref, ring, arrived) = refs[:-4], refs[-4:]
        gain = kernel.read(scale_ref, offset)
        columns = kernel.narrow(narrow_ref, num_columns) if num_columns else []

        def compute(row, buffers, carry, released):
            # Of the next row, which would wait for it.
            (rstd, *totals), following = carry, rstd_ref[jnp.minimum(row + tiles.num_programs, num_rows - 1)]
            pieces = [kernel.read(buffer) for buffer in buffers[:num_wide]]
            x, dy = pieces[0], pieces[1:-1]
            d_products = [buffers[-1][i] for i in range(num_columns)]

            def gradient(i):
                terms = [one[i]() for one in dy]
                terms += [one * column for one, column in zip(d_products, columns, strict=True)]
                return functools.reduce(jnp.add, terms)

            if tiles.in_registers:
                released()
            products = kernel.zero()
            for i in range(len(kernel.lines)):
                products = products + gradient(i) * gain[i]() * x[i]()
            mean = jnp.sum(products) * (1 / width) * rstd
            for i, lines in enumerate(kernel.lines):
                normed, dy_piece = x[i]() * rstd, gradient(i)
                totals[i] = totals[i] + dy_piece * normed
                dx = (dy_piece * gain[i]() - normed * mean) * rstd + pieces[-1][i]()
                dx_ref[row, lines] = dx.astype(dx_ref.dtype)
            for i, one in enumerate(d_products, len(kernel.lines)):
                totals[i] = totals[i] + one * normed
            if not tiles.in_registers:
                released()
            return following, *totals

        first = rstd_ref[jnp.minimum(lax.axis_index("program"), num_rows - 1)]
        zeros = [kernel.zero() for _ in range(len(kernel.lines) + num_columns)]
        _, *totals = kernel.walk(inputs, ring, arrived, compute, (first, *zeros))
        places = [(0, lines) for lines in kernel.lines] + [(1 + i, kernel.lines[0]) for i in range(num_columns)]
        for total, (line, lines) in zip(totals, places, strict=True):
            parts_ref[lax.axis_index("program"), line, lines] = total

    outs = [
        jax.ShapeDtypeStruct((num_rows, width // LINE, LINE), x.dtype),
        jax.ShapeDtypeStruct((tiles.num_programs, 1 + num_columns, width // LINE, LINE), jnp.float32),
    ]
    rows = [kernel.lined(array) for array in (x, *d_normed, d_sum)]
    inputs = [kernel.lined(scale), rstd]
    if num_columns:
        # Sixteen bytes are the least that a copy moves.
        rows.append(jnp.pad(d_products, ((0, 0), (0, MAX_NARROW - num_columns))))
        inputs.append(kernel.lined(narrow.T))
    dx, parts = kernel.call(body, inputs, rows, outs, "add_rms_norm_gradient", interpret)
    sums = parts.reshape(tiles.num_programs, -1, width).sum(axis=0)
    # Of rows before their factors, which are the same in all of them.
    d_narrow = (sums[1:] * (scale.astype(jnp.float32) + offset)).T if num_columns else None
    return dx.reshape(num_rows, width), sums[0], d_narrow
