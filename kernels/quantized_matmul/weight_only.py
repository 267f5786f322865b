"""Product with a weight of few bits on Hopper: the weight is read once and widened in registers.

yᵀ [N, M] = wᵀ · xᵀ: the weight's columns are the 64 rows of a warpgroup's product and come from registers, where they
are widened to x's dtype; x's few rows are its columns and come from shared memory. So one row of x costs what eight do.
The weight lies in memory as the registers want it (`quantization.qarray.to_fragments`): a thread's 16 bytes are its own
elements of the next products, and no thread needs another's.

A warpgroup walks down some columns of the weight, while the copies of the next rows are under way. Several warpgroups
share a processor, so that one widens while another multiplies or waits. They are blocks of threads of their own; where
there are too few columns for that, they are of one block, share its rows out among them and add up their sums in order.
Of still fewer columns the rows are cut into parts, which a second program adds up, in order too. Of many rows of x the
weight is widened in device memory first (`widening`), and XLA multiplies it.

A group's scale multiplies its sums, in float32, and not the weight, which stays exact. A zero point is taken away there
as well: times the sum of x's elements, which is one more product, with ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.quantized_matmul import widening
from kernels.quantized_matmul.weight_only_fragments import fragment
from kernels.quantized_matmul.weight_only_tiles import TILE, Tiles, choose_tiles, widened_first
from quantization.qarray import QArray

# Without the barriers that Pallas would put around every load, store and copy: `commit_smem` in each step lies between
# the last read of a buffer and the copy that fills it again, and no buffer is another warpgroup's.
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


@dataclasses.dataclass(frozen=True)
class Statics:
    """What is fixed when the kernel is traced; `group`: rows of the weight that share a scale, None for all."""

    shape: tuple[int, int, int]
    dtype: Any
    w_dtype: Any
    out_dtype: Any
    group: int | None
    zero_points: bool
    bias: bool
    tiles: Tiles

    @property
    def blocks(self) -> int:
        return self.tiles.columns // TILE

    @property
    def lines(self) -> int:
        """Rows of 256 in one buffer of 64 columns of the weight."""
        return self.tiles.depth * TILE // (8 if self.w_dtype == jnp.int4 else 1) // 256

    @property
    def span(self) -> int:
        """Rows of the weight in one term of a sum: a group, or what registers hold."""
        return min(self.tiles.depth, 128) if self.group is None else self.group

    @property
    def num_steps(self) -> int:
        return -(-self.shape[2] // self.tiles.depth)

    @property
    def num_parts(self) -> int:
        return self.tiles.num_parts


class Inputs(NamedTuple):
    """Arrays in device memory, or None: x [M, K], the weight [N/64, lines, 256], scales and zero points [K/group, N],
    bias [N]."""

    x: Any
    w: Any
    scales: Any
    zeros: Any
    bias: Any


class Shared(NamedTuple):
    """Shared memory of a block of threads: each warpgroup's buffers, and all but the first's sums in the end; and the
    barriers at which a buffer's copies, and those sums, arrive."""

    x: Any
    w: Any
    scales: Any
    zeros: Any
    sums: Any
    out: Any
    arrived: Any
    summed: Any


class Operands(NamedTuple):
    """One buffer of shared memory: x [rows, depth], the weight [columns/64, lines, 256], scales and zero points
    [depth/group, columns], or None."""

    x: Any
    w: Any
    scales: Any
    zeros: Any


def quantized_matmul(x: jax.Array, w: QArray, bias: jax.Array | None, out_dtype) -> jax.Array:
    """[M, N] of x [M, K] and w [K, N] in fragments, as `kernels.quantized_matmul.quantized_matmul` has it."""
    from kernels.quantized_matmul import case_of

    case = case_of(x, w, bias, out_dtype)
    if widened_first(case):
        return widening.product(x, w, bias, jnp.dtype(out_dtype))
    return product(x, w, bias, out_dtype=jnp.dtype(out_dtype), tiles=choose_tiles(case))


# A jit of its own, so that a model's layers are built once.
@functools.partial(jax.jit, static_argnames=("out_dtype", "tiles", "interpret"))
def product(x, w: QArray, bias, *, out_dtype, tiles: Tiles, interpret=None) -> jax.Array:
    """As `quantized_matmul`, with its tiles. `interpret`: parameters of Pallas's interpreter, which tests give."""
    (M, K), N = x.shape, w.shape[1]
    group = None if w.scales.shape[0] == 1 and w.zero_points is None else w.block[0]
    assert group is None or tiles.depth % group == 0, f"groups of {group} in buffers of {tiles.depth}"
    if M > 8 and M % 8:
        # Copies divide the rows into eights; of fewer than eight they fill up the rest with zeros themselves.
        x = jnp.pad(x, ((0, -M % 8), (0, 0)))
    shape = (M if tiles.rows >= M else x.shape[0], N, K)
    statics = Statics(shape, x.dtype, w.dtype, out_dtype, group, w.zero_points is not None, bias is not None, tiles)
    in_fragments = w.values.reshape(N // TILE, -1, 256)
    y = _call(statics, Inputs(x, in_fragments, w.scales, w.zero_points, bias), interpret)
    if statics.num_parts > 1:
        y = functools.reduce(jnp.add, [y[part] for part in range(statics.num_parts)])
        y = y if group is not None else y * w.scales
        y = (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)
    return y[:M]


def _call(statics: Statics, inputs: Inputs, interpret) -> jax.Array:
    """[M, N] in `out_dtype`; or in parts [parts, M, N] in float32, without what multiplies or is added in the end."""
    (M, N, _), tiles = statics.shape, statics.tiles
    out = jax.ShapeDtypeStruct((M, N), statics.out_dtype)
    if statics.num_parts > 1:
        out = jax.ShapeDtypeStruct((statics.num_parts, M, N), jnp.float32)
    # The last axis runs fastest: a weight's columns are in L2 when the next rows of x want them.
    grid = {"part": statics.num_parts, "column": N // tiles.columns, "row": -(-M // tiles.rows)}
    body = functools.partial(_body, statics)
    return call(body, statics, inputs, (), out, name="weight_only_matmul", grid=grid, interpret=interpret)


def call(body, statics: Statics, inputs: Inputs, others: tuple, out, *, name: str, grid: dict[str, int], interpret):
    """What `body(inputs, *others, out, shared)` writes to `out`, a program for each point of a grid."""
    given = [name for name, array in inputs._asdict().items() if array is not None]
    shared = {name: scratch for name, scratch in _scratch(statics, out.dtype)._asdict().items() if scratch is not None}

    def unpacked(*refs):
        arrays, rest, memory = refs[: len(given)], refs[len(given) : -len(shared)], refs[-len(shared) :]
        arrays = dict.fromkeys(Inputs._fields) | dict(zip(given, arrays, strict=True))
        memory = dict.fromkeys(Shared._fields) | dict(zip(shared, memory, strict=True))
        body(Inputs(**arrays), *rest, Shared(**memory))

    run = plgpu.kernel(
        unpacked,
        out_type=out,
        kernel_name=name,
        scratch_types=list(shared.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=statics.tiles.num_warpgroups,
        thread_name="warpgroup",
        compiler_params=COMPILER,
        interpret=interpret,
    )
    return run(*(array for array in inputs if array is not None), *others)


def _scratch(statics: Statics, out_dtype) -> Shared:
    tiles, others = statics.tiles, statics.tiles.num_warpgroups - 1
    buffers = tiles.num_warpgroups * tiles.num_buffers
    scales = None
    if statics.group is not None:
        scales = plgpu.SMEM((buffers, tiles.depth // statics.group, tiles.columns), jnp.float32)
    container = jnp.uint32 if statics.w_dtype == jnp.int4 else statics.w_dtype
    return Shared(
        x=plgpu.SMEM((buffers, tiles.rows, tiles.depth), statics.dtype, transforms=tiled(statics)),
        w=plgpu.SMEM((buffers, statics.blocks, statics.lines, 256), container),
        scales=scales,
        zeros=scales if statics.zero_points else None,
        sums=plgpu.SMEM((others, tiles.columns, tiles.rows), jnp.float32) if others else None,
        out=plgpu.SMEM((tiles.rows, tiles.columns), out_dtype),
        arrived=plgpu.Barrier(num_arrivals=2 + (scales is not None) * (1 + statics.zero_points), num_barriers=buffers),
        summed=plgpu.Barrier(num_arrivals=others, num_barriers=1) if others else None,
    )


def tiled(statics: Statics) -> tuple[Any, ...]:
    """How x lies in shared memory."""
    # Matrix products take whole rows of a swizzle.
    swizzle = 128 if statics.span % 64 == 0 else 64
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def _body(statics: Statics, inputs: Inputs, out_ref, shared: Shared) -> None:
    part, row, column = (lax.axis_index(name) for name in ("part", "row", "column"))
    rows = pl.ds(row * statics.tiles.rows, statics.tiles.rows)
    store = functools.partial(_store, statics, inputs, shared, part, row, column, out_ref)
    reduce(statics, shared, multiply(statics, inputs, shared, rows, column, part), store)


def multiply(statics: Statics, inputs: Inputs, shared: Shared, rows, column, part=0) -> tuple[jax.Array, ...]:
    """A warpgroup's sums [64, rows] of each 64 columns of the weight, of its share of a part of the weight's rows.

    `rows`: a slice of x's. `column`: of those that a block of threads has, which ones.
    """
    tiles, ahead, warpgroup = statics.tiles, statics.tiles.num_buffers - 1, lax.axis_index("warpgroup")
    share = -(-statics.num_steps // (tiles.num_parts * tiles.num_warpgroups))
    first = (part * tiles.num_warpgroups + warpgroup) * share
    end = jnp.minimum(first + share, statics.num_steps)

    def buffer_of(number):
        return warpgroup * tiles.num_buffers + hopper.remainder(number - first, tiles.num_buffers)

    def fetch(number):
        _fetch(statics, inputs, shared, rows, column, number, buffer_of(number))

    for i in range(ahead):
        pl.when(first + i < end)(functools.partial(fetch, first + i))

    def step(number, totals):
        buffer = buffer_of(number)
        plgpu.barrier_wait(shared.arrived.at[buffer])
        # All four warps are done with the buffer before this one.
        plgpu.commit_smem()
        pl.when(number + ahead < end)(functools.partial(fetch, number + ahead))
        arrays = (shared.x, shared.w, shared.scales, shared.zeros)
        return add(statics, Operands(*(None if ref is None else ref.at[buffer] for ref in arrays)), totals)

    zero = jnp.zeros((TILE, tiles.rows), jnp.float32)
    zeros = tuple(plgpu.layout_cast(zero, hopper.MATRIX) for _ in range(statics.blocks))
    return lax.fori_loop(first, end, step, zeros)


def reduce(statics: Statics, shared: Shared, totals: tuple[jax.Array, ...], then: Callable[[Any], None]) -> None:
    """Calls `then` with the sums of all warpgroups of a block of threads, in the first of them."""
    warpgroup = lax.axis_index("warpgroup")
    if statics.tiles.num_warpgroups == 1:
        then(totals)
        return

    @pl.when(warpgroup > 0)
    def _():
        for block, total in enumerate(totals):
            shared.sums[warpgroup - 1, pl.ds(block * TILE, TILE)] = total
        plgpu.barrier_arrive(shared.summed.at[0])

    @pl.when(warpgroup == 0)
    def _():
        then(_with_others(statics, shared, totals))


def _with_others(statics: Statics, shared: Shared, totals):
    """The first warpgroup's sums and those of the others, added in order."""
    plgpu.barrier_wait(shared.summed.at[0])
    for other in range(statics.tiles.num_warpgroups - 1):
        places = [(other, pl.ds(block * TILE, TILE)) for block in range(statics.blocks)]
        sums = [plgpu.load(shared.sums.at[place], layout=hopper.MATRIX, optimized=False) for place in places]
        totals = [total + more for total, more in zip(totals, sums, strict=True)]
    return totals


def _fetch(statics: Statics, inputs: Inputs, shared: Shared, rows, column, number, buffer) -> None:
    """Starts the copies of one step into its buffer. What lies past the weight's last row becomes zeros."""
    tiles, arrived = statics.tiles, shared.arrived.at[buffer]
    lines = pl.ds(number * statics.lines, statics.lines)
    plgpu.copy_gmem_to_smem(
        inputs.w.at[pl.ds(column * statics.blocks, statics.blocks), lines], shared.w.at[buffer], arrived
    )
    depth = pl.ds(number * tiles.depth, tiles.depth)
    plgpu.copy_gmem_to_smem(inputs.x.at[rows, depth], shared.x.at[buffer], arrived)
    if statics.group is not None:
        count = tiles.depth // statics.group
        place = pl.ds(number * count, count), pl.ds(column * tiles.columns, tiles.columns)
        plgpu.copy_gmem_to_smem(inputs.scales.at[place], shared.scales.at[buffer], arrived)
        if statics.zero_points:
            plgpu.copy_gmem_to_smem(inputs.zeros.at[place], shared.zeros.at[buffer], arrived)


def add(statics: Statics, operands: Operands, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sums [64, rows of x] of each 64 columns, with one buffer's products more."""
    x_smem, w_smem, span = operands.x, operands.w, statics.span
    totals = list(totals)
    zero = plgpu.layout_cast(jnp.zeros(totals[0].shape, jnp.float32), hopper.MATRIX)

    def term(block, i):
        place = {"block": block, "start": i * span, "size": span}
        widened = functools.partial(fragment, w_smem, **place, w_dtype=statics.w_dtype, dtype=statics.dtype)
        return widened, x_smem.at[:, pl.ds(i * span, span)]

    keys = [(block, i) for i in range(statics.tiles.depth // span) for block in range(statics.blocks)]
    # Two at a time: one is widened while the other is multiplied, and registers hold no more.
    for batch in (keys[i : i + 2] for i in range(0, len(keys), 2)):
        if statics.group is None:
            blocks = sorted({block for block, _ in batch})
            terms = [[term(*key) for key in batch if key[0] == block] for block in blocks]
            for block, total in zip(blocks, products([totals[block] for block in blocks], terms), strict=True):
                totals[block] = total
            continue
        terms = [[term(*key)] for key in batch]
        groups = sorted({i for _, i in batch}) if statics.zero_points else []
        terms += [[(functools.partial(_ones, statics), term(0, i)[1])] for i in groups]
        sums = products([zero] * len(terms), terms)
        of_rows = dict(zip(groups, sums[len(batch) :], strict=True))
        for (block, i), total in zip(batch, sums[: len(batch)], strict=True):
            scale, offset = _scales(operands, block, i)
            if statics.zero_points:
                # Plus: a minus would be taken of the product's registers, before it is known to be done.
                total = total + hopper.along(-offset, total.shape, 0) * of_rows[i]
            totals[block] = totals[block] + hopper.along(scale, total.shape, 0) * total
    return tuple(totals)


def _ones(statics: Statics) -> jax.Array:
    """Of a product that sums rows of x."""
    return plgpu.layout_cast(jnp.ones((TILE, statics.span), statics.dtype), hopper.MATRIX)


def _scales(operands: Operands, block: int, i: int) -> tuple[jax.Array, jax.Array | None]:
    """(scales, zero points or None) of 64 columns in the i-th group of a buffer."""
    place = (i, pl.ds(block * TILE, TILE))
    scale, zero = (
        None if ref is None else plgpu.load(ref.at[place], layout=hopper.ROWS, optimized=False)
        for ref in (operands.scales, operands.zeros)
    )
    return scale, zero


def products(sums, terms) -> tuple[jax.Array, ...]:
    """Each sum + the products of its terms (a function that gives the first operand [64, k], x [rows, k] in shared
    memory), which run while the next operand is widened. The interpreter knows neither `run_state` nor a product of
    what is in registers."""

    def issue(refs):
        for acc, pairs in zip(refs, terms, strict=True):
            for operand, x_smem in pairs:
                plgpu.wgmma(acc, operand(), x_smem.T)

    return tuple(pl.run_state(issue)(tuple(plgpu.ACC.init(total) for total in sums)))


def _store(statics: Statics, inputs: Inputs, shared: Shared, part, row, column, out_ref, totals) -> None:
    tiles, (M, _, _) = statics.tiles, statics.shape
    stage(shared.out, scaled(statics, inputs, column * tiles.columns, totals))
    out_ref = out_ref.at[part] if statics.num_parts > 1 else out_ref
    columns = pl.ds(column * tiles.columns, tiles.columns)
    if tiles.rows > M:
        plgpu.copy_smem_to_gmem(shared.out.at[pl.ds(0, M)], out_ref.at[:, columns])
    else:
        plgpu.copy_smem_to_gmem(shared.out, out_ref.at[pl.ds(row * tiles.rows, tiles.rows), columns])
    plgpu.wait_smem_to_gmem(0)


def scaled(statics: Statics, inputs: Inputs, first, totals) -> list[jax.Array]:
    """Sums with what multiplies, or is added to, whole columns of the weight, which begin at column `first`."""
    if statics.num_parts > 1:
        return list(totals)
    results = []
    for block, total in enumerate(totals):
        columns = pl.ds(first + block * TILE, TILE)
        if statics.group is None:
            scale = plgpu.load(inputs.scales.at[0, columns], layout=hopper.ROWS, optimized=False)
            total = total * hopper.along(scale, total.shape, 0)
        if statics.bias:
            bias = plgpu.load(inputs.bias.at[columns], layout=hopper.ROWS, optimized=False)
            total = total + hopper.along(bias.astype(jnp.float32), total.shape, 0)
        results.append(total)
    return results


def stage(smem, outputs) -> None:
    """Outputs [64, rows] of each 64 columns to shared memory [rows, columns], rounded, from where copies take them."""
    for block, values in enumerate(outputs):
        place = smem.at[:, pl.ds(block * TILE, TILE)]
        place.T[...] = plgpu.layout_cast(values.astype(smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
