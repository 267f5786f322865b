"""What the Hopper kernels of the grouped product share: programs that stay, a ring of buffers, the way out.

A tile of the output is a sum over steps. One warpgroup copies the operands of each step into a ring of buffers, and two
multiply, half of the tile each, with the sums in registers. Each processor of the chip takes tile after tile,
and copies for the next one before it has finished one. Which tile that is it finds itself, from the group sizes: they
are data, and a table of tiles would take several launches to make.

Where much is computed of a tile's sums, they are rounded and kept, and make their way out beside the first steps of the
next tile. Two processors can take two tiles one below the other, as a cluster: each brings both of them half of the
operand that these share.
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
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT, WIDTH, Tiles
from kernels.hopper_chip import NUM_PROCESSORS

_COPIER = 2
_CLUSTER = "cluster"
NUM_WARPGROUPS = 3
# Registers of a thread: three warpgroups start with 168 each, and share them out anew.
_REGISTERS, _FEW_REGISTERS = 240, 24
# Without the barriers that Pallas would put around every load and store: all threads of a warpgroup arrive at the
# barriers below, and what a warpgroup writes to shared memory lies between two `commit_smem`. Powers of two are an
# instruction of the chip.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


class Tile(NamedTuple):
    """One tile of the output, int32 each: its group, that group's rows [begin, end) of all rows, the tile's first row
    and column in the output (of the group, where each has one), and the number of steps that it is a sum of."""

    group: jax.Array
    begin: jax.Array
    end: jax.Array
    row: jax.Array
    column: jax.Array
    steps: jax.Array


class _Group(NamedTuple):
    """Number (the number of groups for what comes after the last), first row and number of rows, int32 each."""

    index: jax.Array
    begin: jax.Array
    size: jax.Array


class Shared(NamedTuple):
    """Shared memory of a block of threads: the group sizes, the ring with a step's operands, two places [64, 64] for
    outputs of each warpgroup, swizzled and (for single rows, in the same memory) plain; and the barriers.
    `arrived`: the copies are there. `free`: both warpgroups, of each block of a cluster, are done with them. `masked`:
    both have masked their share.
    """

    sizes: Any
    ring: tuple[Any, ...]
    out: Any
    sizes_arrived: Any
    arrived: Any
    free: Any
    masked: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is fixed when a kernel is traced, and what distinguishes one from another. As it stands: a tile is rows of
    one group times columns of its matrix [in_dim, out_dim]; rows of no group are tiles of no steps, which are zeros."""

    num_groups: int
    num_rows: int
    in_dim: int
    out_dim: int
    tiles: Tiles

    name = ""
    depth = WIDTH
    """Of a step, along what is summed over."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of a step's operands, as they lie in memory."""
        raise NotImplementedError

    @property
    def sums(self) -> tuple[tuple[int, int], ...]:
        """Shapes of what a warpgroup sums up."""
        return (self.tiles.piece,)

    @property
    def extra(self) -> int:
        """How many of a tile's steps, the last, bring what `emit` reads, and are not multiplied."""
        return 0

    @property
    def num_parts(self) -> int:
        """In how many parts a tile's results make their way out beside the first steps of the next one (`emit_part`),
        an even number of them, since places for outputs are used in turn; 0: whole, before the next one (`emit`)."""
        return 0

    @property
    def num_columns(self) -> int:
        """Tiles side by side."""
        return -(-self.out_dim // self.tiles.columns)

    @property
    def max_tiles(self) -> int:
        """At least as many as there are for any group sizes: each group, and the rows of none, may have one that is not
        full."""
        return (-(-self.num_rows // self.rows) + self.num_groups + 1) * self.num_columns

    @property
    def cluster(self) -> int:
        """Blocks of threads that take tiles one below the other, and bring each other the operand that these share."""
        return 1

    @property
    def rows(self) -> int:
        """Of the tiles that a cluster takes at a time."""
        return self.tiles.rows * self.cluster

    @property
    def for_cluster(self) -> dict[str, Any]:
        """What marks a copy to all blocks of a cluster, of which each brings its part."""
        return {"collective_axes": (_CLUSTER,)} if self.cluster > 1 else {}

    @property
    def num_programs(self) -> int:
        """Clusters, each of which walks through tiles as one."""
        return min(self.max_tiles, NUM_PROCESSORS // self.cluster)

    @property
    def num_visits(self) -> int:
        """Groups, and with them whatever else has tiles."""
        return self.num_groups + 1

    @property
    def largest_first(self) -> bool:
        """Whether the tiles of larger groups come before those of smaller ones, and programs take them in turns that
        reverse: for tiles that have more steps where their group has more rows, so that programs end together."""
        return False

    def extent(self, group, begin, size) -> tuple[Any, Any]:
        """(tiles of rows, those of a cluster as one; steps of each) of a group."""
        steps = jnp.where(group < self.num_groups, -(-self.in_dim // self.depth), 0)
        return tiles_of(begin, size, self.rows), steps

    def first_row(self, begin):
        """Of a group's first tile, in the output."""
        return aligned(begin)

    def copy(self, tile: Tile, step, inputs, buffers, arrived) -> None:
        """Starts the copies of a step, as many as it has operands, to its buffers."""
        raise NotImplementedError

    def prepare(self, tile: Tile, step, buffers, warpgroup, masked) -> None:
        """What is to be done to a step's operands before they are multiplied."""

    def multiply(self, sums, buffers, warpgroup) -> None:
        """Starts a warpgroup's products of a step, one for each of `sums`."""
        raise NotImplementedError

    def emit(self, tile: Tile, start, warpgroup, sums, outs, shared: Shared) -> None:
        """A warpgroup's part of a tile on its way out."""
        store(self, warpgroup, outs[0], shared, tile, sums[0].astype(outs[0].dtype))

    def emit_part(self, part: int, tile: Tile, warpgroup, kept, outs, shared: Shared) -> None:
        """A part of it. `kept`: a warpgroup's sums, rounded to the dtype of the outputs."""
        raise NotImplementedError

    def place(self, out_ref, tile: Tile, rows, columns):
        """Where rows and columns (of the output, of the tile's group) lie."""
        return out_ref.at[rows, columns]

    def owned(self, tile: Tile) -> tuple[Any, Any] | None:
        """Rows [first, last) of the output that are the tile's own; None where all of them are."""
        return tile.begin, tile.end

    def idle(self, tile: Tile, warpgroup):
        """Whether a warpgroup's part of a tile has none of its rows: nothing of it is multiplied or written. None where
        that can't be."""
        by_rows, owned = self.tiles.split == "rows", self.owned(tile)
        if owned is None or not (by_rows or self.cluster > 1):
            return None
        first = tile.row + warpgroup * self.tiles.piece[0] if by_rows else tile.row
        return first >= owned[1]


def call(kernel: Kernel, inputs, group_sizes, out_types, interpret) -> list[jax.Array]:
    """The outputs of `out_types`."""
    # Copies are in units of 16 bytes.
    sizes = jnp.pad(group_sizes.astype(jnp.int32), (0, -kernel.num_groups % 4))
    clusters = {"cluster": (kernel.cluster,), "cluster_names": (_CLUSTER,)} if kernel.cluster > 1 else {}
    run = plgpu.kernel(
        functools.partial(_body, kernel, len(inputs), len(out_types)),
        out_type=out_types,
        kernel_name=kernel.name,
        scratch_types=list(_scratch(kernel, inputs[0].dtype, sizes.shape)),
        grid=(kernel.num_programs,),
        grid_names=("program",),
        num_threads=NUM_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=_COMPILER,
        interpret=interpret,
        **clusters,
    )
    return run(*inputs, sizes)


def _scratch(kernel: Kernel, dtype, sizes_shape) -> Shared:
    tiled = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))
    buffers, outputs = kernel.tiles.num_buffers, (2, 2, WIDTH, WIDTH)
    free = {"num_arrivals": 2, "num_barriers": buffers}
    return Shared(
        sizes=plgpu.SMEM(sizes_shape, jnp.int32),
        ring=tuple(plgpu.SMEM((buffers, *shape), dtype, transforms=tiled) for shape in kernel.shapes),
        out=in_one_place(plgpu.SMEM(outputs, dtype, transforms=tiled), plgpu.SMEM(outputs, dtype)),
        sizes_arrived=plgpu.Barrier(num_barriers=1),
        arrived=plgpu.Barrier(num_arrivals=len(kernel.shapes), num_barriers=buffers),
        free=plgpu.ClusterBarrier(**kernel.for_cluster, **free) if kernel.cluster > 1 else plgpu.Barrier(**free),
        masked=plgpu.Barrier(num_arrivals=2, num_barriers=1),
    )


def in_one_place(*arrays):
    """The interpreter takes two warpgroups' parts of what shares memory for one; tests put them side by side."""
    return plgpu.RefUnion(*arrays)


def _body(kernel: Kernel, num_inputs: int, num_outs: int, *refs):
    inputs, sizes_ref, refs = refs[:num_inputs], refs[num_inputs], refs[num_inputs + 1 :]
    outs, shared = refs[:num_outs], Shared(*refs[num_outs:])
    if kernel.num_parts:
        compute_all = functools.partial(_compute_beside, kernel, outs, shared)
        _share_out(kernel, inputs, sizes_ref, shared, compute_all)
    else:
        share_out(kernel, inputs, sizes_ref, shared, functools.partial(_compute, kernel, outs, shared))


def share_out(kernel: Kernel, inputs, sizes_ref, shared, compute: Callable[[Tile, Any], None]) -> None:
    """One warpgroup copies the steps of all tiles of a program, and two call `compute(tile, start)` for each: see
    `_walk_steps`. Of `shared` only what the copies go through is used."""
    compute_all = functools.partial(_walk_steps, kernel, shared, compute)
    _share_out(kernel, inputs, sizes_ref, shared, compute_all)


def _share_out(kernel: Kernel, inputs, sizes_ref, shared, compute_all: Callable[[], Any]) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COPIER)
    def _():
        plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
        plgpu.copy_gmem_to_smem(sizes_ref, shared.sizes, shared.sizes_arrived.at[0])
        plgpu.barrier_wait(shared.sizes_arrived.at[0])
        total = _walk_steps(kernel, shared, functools.partial(copy_steps, kernel, inputs, shared))
        # Every completion of a barrier is waited for, so that all is free at the end (the interpreter asks it), and no
        # block of a cluster ends before another has arrived at its barriers.
        for buffer in range(kernel.tiles.num_buffers):
            pl.when(buffer < total)(functools.partial(plgpu.barrier_wait, shared.free.at[buffer]))

    @pl.when(warpgroup < _COPIER)
    def _():
        plgpu.set_max_registers(_REGISTERS, action="increase")
        plgpu.barrier_wait(shared.sizes_arrived.at[0])
        compute_all()
        plgpu.wait_smem_to_gmem(0)


def _walk_steps(kernel: Kernel, shared, visit: Callable[[Tile, Any], None]):
    """Calls `visit(tile, start)` for each tile of this program, in order; `start`: steps of its tiles before this one.
    Returns how many steps all have."""

    def count(tile: Tile, start):
        visit(tile, start)
        return start + tile.steps

    return _walk(kernel, shared, count, jnp.int32(0))


def _walk(kernel: Kernel, shared, visit: Callable[[Tile, Any], Any], carry):
    """`visit(tile, carry)` of each tile of this program, in order, gives the next one's `carry`; returns the last one.
    All programs together take every tile once."""
    programs = kernel.num_programs

    def in_group(_, state):
        before, turn, group, carry = state
        group = _next_largest(kernel, shared, group) if kernel.largest_first else _next_group(kernel, shared, group)
        num_rows, steps = kernel.extent(*group)
        count = num_rows * kernel.num_columns
        # The program takes one tile of each turn, which are as many as there are programs.
        turns = hopper.floor(before + count, programs)
        own = before + count - turns * programs > _place_in_turn(kernel, turns)
        end = turns + own.astype(jnp.int32)

        def in_turn(turn, carry):
            number = turn * programs + _place_in_turn(kernel, turn) - before
            row, column = _position(kernel, number, num_rows)
            row = kernel.first_row(group.begin) + row * kernel.rows
            if kernel.cluster > 1:
                # May lie past the group's last row: of such a tile nothing is written.
                row = row + lax.axis_index(_CLUSTER) * kernel.tiles.rows
            tile = Tile(group.index, group.begin, group.begin + group.size, row, column * kernel.tiles.columns, steps)
            return visit(tile, carry)

        return before + count, end, group, lax.fori_loop(turn, end, in_turn, carry)

    zero = jnp.int32(0)
    none = _Group(jnp.int32(-1), zero, jnp.int32(jnp.iinfo(jnp.int32).max if kernel.largest_first else 0))
    return lax.fori_loop(0, kernel.num_visits, in_group, (zero, zero, none, carry))[3]


def _place_in_turn(kernel: Kernel, turn):
    """Which of a turn's tiles is the program's."""
    program = lax.axis_index("program")
    if not kernel.largest_first:
        return program
    # Who had the largest tile of a turn has the smallest of the next.
    return jnp.where(hopper.remainder(turn, 2) == 0, program, kernel.num_programs - 1 - program)


def _next_group(kernel: Kernel, shared, last: _Group) -> _Group:
    index, begin = last.index + 1, last.begin + last.size
    # What comes after the last group are rows of none.
    inside = index < kernel.num_groups
    size = jnp.where(inside, shared.sizes[jnp.minimum(index, kernel.num_groups - 1)], kernel.num_rows - begin)
    return _Group(index, begin, size)


def _next_largest(kernel: Kernel, shared, last: _Group) -> _Group:
    """The largest group after `last`, of groups of one size the first one."""
    begin, found = jnp.int32(0), _Group(jnp.int32(0), jnp.int32(0), jnp.int32(-1))
    for index in range(kernel.num_groups):
        size = shared.sizes[index]
        after = (size < last.size) | ((size == last.size) & (index > last.index))
        this = _Group(jnp.int32(index), begin, size)
        chosen = after & (size > found.size)
        found = _Group(*(jnp.where(chosen, new, old) for new, old in zip(this, found, strict=True)))
        begin = begin + size
    return found


def _position(kernel: Kernel, index, num_rows):
    """(row, column) of a group's tile: panel after panel, and in each column after column."""
    panel = kernel.tiles.panel
    number = hopper.floor(index, panel * kernel.num_columns)
    rest = index - number * (panel * kernel.num_columns)
    height = jnp.minimum(num_rows - number * panel, panel)
    column = lax.div(rest, height)
    return number * panel + (rest - column * height), column


def copy_steps(kernel: Kernel, inputs, shared: Shared, tile: Tile, start) -> None:
    """The operands of every step of a tile to their buffers, as soon as those are free."""
    buffers = kernel.tiles.num_buffers

    @pl.loop(0, tile.steps)
    def _(step):
        buffer = hopper.remainder(start + step, buffers)
        pl.when(start + step >= buffers)(lambda: plgpu.barrier_wait(shared.free.at[buffer]))
        kernel.copy(tile, step, inputs, _operands(shared, buffer), shared.arrived.at[buffer])


def _operands(shared: Shared, buffer) -> list[Any]:
    return [ring.at[buffer] for ring in shared.ring]


def _compute(kernel: Kernel, outs, shared: Shared, tile: Tile, start) -> None:
    """A warpgroup's part of a tile, multiplied and on its way out."""
    warpgroup = lax.axis_index("warpgroup")
    idle = kernel.idle(tile, warpgroup)

    def compute():
        multiply = functools.partial(_multiply, kernel, warpgroup, shared, tile, start, ())
        sums = pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in kernel.sums))
        kernel.emit(tile, start, warpgroup, sums, outs, shared)

    if idle is None:
        compute()
    else:
        pl.when(idle)(functools.partial(_pass_over, kernel, shared, tile, start))
        pl.when(~idle)(compute)


def _pass_over(kernel: Kernel, shared: Shared, tile: Tile, start) -> None:
    """A tile's steps, of which a warpgroup has nothing to do."""

    @pl.loop(0, tile.steps)
    def _(step):
        buffer = hopper.remainder(start + step, kernel.tiles.num_buffers)
        plgpu.barrier_wait(shared.arrived.at[buffer])
        plgpu.barrier_arrive(shared.free.at[buffer])


class _Before(NamedTuple):
    """start: steps of a program's tiles before this one. tile: the last of them, at first one of no rows; kept: a
    warpgroup's share of it, which is not yet on its way out."""

    start: jax.Array
    tile: Tile
    kept: tuple[jax.Array, ...]


def _compute_beside(kernel: Kernel, outs, shared: Shared) -> None:
    """As `_compute` of all tiles, with the results of one on their way out while the next one is multiplied: what is
    computed of them, and the waits for their copies, would leave the tensor cores idle."""
    warpgroup, dtype = lax.axis_index("warpgroup"), outs[0].dtype
    assert kernel.num_parts % 2 == 0, kernel
    at_once = -(-kernel.in_dim // kernel.depth) >= kernel.num_parts

    def emit(before: _Before, part: int) -> None:
        # What the compiler no longer knows of a number that went from one turn of a loop to the next.
        tile = before.tile._replace(column=pl.multiple_of(before.tile.column, WIDTH))
        kernel.emit_part(part, tile, warpgroup, before.kept, outs, shared)

    def visit(tile: Tile, before: _Before) -> _Before:
        parts = [functools.partial(emit, before, part) for part in range(kernel.num_parts)]

        def multiply(beside):
            run = functools.partial(_multiply, kernel, warpgroup, shared, tile, before.start, beside)
            sums = pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in kernel.sums))
            return tuple(x.astype(dtype) for x in sums)

        def emit_all():
            for part in parts:
                part()

        def pass_over():
            emit_all()
            _pass_over(kernel, shared, tile, before.start)
            return zeros

        def compute():
            if at_once:
                return multiply(parts)
            emit_all()
            return multiply(())

        idle = kernel.idle(tile, warpgroup)
        # Of two branches that multiply, ptxas (CUDA 13) would wait for each product before it starts the next one.
        kept = lax.cond(tile.steps == 0 if idle is None else idle | (tile.steps == 0), pass_over, compute)
        return _Before(before.start + tile.steps, tile, kept)

    zeros = tuple(plgpu.layout_cast(jnp.zeros(shape, dtype), hopper.MATRIX) for shape in kernel.sums)
    none = Tile(*(jnp.int32(0),) * len(Tile._fields))
    last = _walk(kernel, shared, visit, _Before(jnp.int32(0), none, zeros))
    for part in range(kernel.num_parts):
        emit(last, part)


def _multiply(kernel: Kernel, warpgroup, shared: Shared, tile: Tile, start, beside, *sums):
    """A warpgroup's sums. `beside`: what is done beside its first steps, one for each, of which it has so many."""
    buffers, steps = kernel.tiles.num_buffers, tile.steps - kernel.extra

    def release(step) -> None:
        plgpu.barrier_arrive(shared.free.at[hopper.remainder(start + step, buffers)])

    def multiply(step) -> None:
        buffer = hopper.remainder(start + step, buffers)
        plgpu.barrier_wait(shared.arrived.at[buffer])
        operands = _operands(shared, buffer)
        kernel.prepare(tile, step, operands, warpgroup, shared.masked.at[0])
        kernel.multiply(sums, operands, warpgroup)
        # The products of the step before are complete, and these go on.
        plgpu.wgmma_wait(len(sums))
        pl.when(step > 0)(lambda: release(step - 1))

    for step, meanwhile in enumerate(beside):
        multiply(jnp.int32(step))
        meanwhile()

    pl.loop(len(beside), steps)(multiply)
    plgpu.wgmma_wait(0)
    pl.when(steps > 0)(lambda: release(steps - 1))
    return tuple(sum_of[...] for sum_of in sums)


def store(kernel: Kernel, warpgroup, out_ref, shared: Shared, tile: Tile, values, *, offset: int = 0, turn: int = 0):
    """Starts the copies of a warpgroup's outputs, 64 rows at a time; or of some of them, from column `offset` on, when
    so many copies of 64 columns have started before (mod 2): their places are used in turn, in all a tile's copies."""
    by_rows = kernel.tiles.split == "rows"
    first_row = tile.row + (warpgroup * values.shape[0] if by_rows else 0)
    first_column = tile.column + (offset if by_rows else warpgroup * values.shape[1])
    owned = kernel.owned(tile)
    swizzled, plain = shared.out
    chunks = values.shape[1] // WIDTH
    for i in range(values.shape[0] // WIDTH):
        row, block, at = first_row + i * WIDTH, values[i * WIDTH : (i + 1) * WIDTH], turn + i * chunks
        to = (kernel, out_ref, tile, row, first_column)
        store = functools.partial(_store_whole, *to, swizzled.at[warpgroup], block, at)
        if owned is None:
            store()
            continue
        first, last = jnp.maximum(owned[0] - row, 0), jnp.minimum(owned[1] - row, WIDTH)
        whole = (first == 0) & (last == WIDTH)
        pl.when(whole)(store)
        some = functools.partial(_store_some, *to, plain.at[warpgroup], block, at, first, last)
        pl.when(~whole & (first < last))(some)


def _store_whole(kernel: Kernel, out_ref, tile: Tile, row, column, places, block, turn: int) -> None:
    """64 rows."""
    for i in range(block.shape[1] // WIDTH):

        @_within(kernel, column + i * WIDTH)
        def _(i=i):
            smem = places.at[(turn + i) % 2]
            # Of a single copy's columns every second one is left out: its place is not the last one's.
            plgpu.wait_smem_to_gmem(0 if kernel.out_dim == WIDTH else 1, wait_read_only=True)
            smem[...] = block[:, i * WIDTH : (i + 1) * WIDTH]
            plgpu.commit_smem()
            target = kernel.place(out_ref, tile, rows_from(row, WIDTH), pl.ds(column + i * WIDTH, WIDTH))
            plgpu.copy_smem_to_gmem(smem, target)


def _store_some(kernel: Kernel, out_ref, tile: Tile, row, column, places, block, turn: int, first, last) -> None:
    """Rows [first, last) of 64, not all of them, by copies of 32, 16, .. rows, whose number is fixed for each."""
    for i in range(block.shape[1] // WIDTH):

        @_within(kernel, column + i * WIDTH)
        def _(i=i):
            smem = places.at[(turn + i) % 2]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem[...] = block[:, i * WIDTH : (i + 1) * WIDTH]
            plgpu.commit_smem()
            columns = pl.ds(column + i * WIDTH, WIDTH)
            store_rows(lambda rows: kernel.place(out_ref, tile, rows, columns), row, smem, first, last)

    # `_store_whole` counts its own copies, one to a place, and here are several.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _within(kernel: Kernel, column):
    """Runs what it decorates where a copy's columns are the output's. Copies past the last column write nothing by
    themselves, except where the output has the columns of one copy: of an axis of one such stretch Mosaic GPU (JAX
    0.11.2) forgets the coordinate, and what lies past it would be written over the columns that there are."""
    if kernel.out_dim == WIDTH:
        return pl.when(column < WIDTH)
    return lambda copy: copy()


def store_rows(place: Callable[[Any], Any], row, smem, first, last) -> None:
    """Starts the copies of rows [first, last) of `smem`, whose own first one is row `row` of what `place` slices."""
    offset, count = first, last - first
    for size in [1 << bit for bit in reversed(range(smem.shape[0].bit_length()))]:

        @pl.when((count & size) != 0)
        def _(size=size, offset=offset):
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(offset, size)], place(pl.ds(row + offset, size)))

        offset = offset + (count & size)


def aligned(row):
    """The last row at or before `row` that copies may begin at."""
    return hopper.floor(row, ROW_ALIGNMENT) * ROW_ALIGNMENT


def rows_from(row, count: int):
    """`count` rows from an aligned one on, which the compiler is told that it is."""
    return pl.ds(pl.multiple_of(row, ROW_ALIGNMENT), count)


def tiles_of(begin, size, length: int):
    """Stretches of `length` rows, the first from an aligned row on, that hold a group's rows."""
    return jnp.where(size > 0, hopper.floor(begin - aligned(begin) + size + (length - 1), length), 0)
