"""Softmax, its logsumexp and its gradient on Hopper, of logits that are read from memory once, or twice.

XLA reads them three times: for the maximum, for the sum, and for the gradient. Here a row that fits stays in shared
memory, where the copies of the next one arrive as its parts become free. A longer one is read twice, with a running
maximum and sum first.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.cross_entropy.reference import Rows
from kernels.hopper_chip import NUM_PROCESSORS, SHARED_BYTES

LANES = 128
"""Threads of a warpgroup; and logits of a line of shared memory, since copies are of at most 256 numbers along an
axis."""
_LINES = 32
"""Of a chunk of a row: 32 logits of each thread. With 16 or 50 the same (4096 rows of 32,000 words, H100, jax 0.11.2:
298 to 301 us; read twice 451, by XLA 657; a copy of so many bytes 275)."""
_OTHER_BYTES = 4096
"""Of shared memory, for reductions and barriers."""
_COMPILER = plgpu.CompilerParams(approx_math=True)


def cut(length: int, lines: int = _LINES) -> tuple[list[tuple[int, int]], int]:
    """Chunks of a row of `length` logits, (first line, how many) each, and for how many there is shared memory; 0 where
    a row does not fit."""
    whole, rest = divmod(length // LANES, lines)
    chunks = [(i * lines, lines) for i in range(whole)] + ([(whole * lines, rest)] if rest else [])
    fitting = (SHARED_BYTES - _OTHER_BYTES) // (lines * LANES * 4)
    # More than a row has: some of the next one's arrive while this one is read.
    return chunks, min(fitting, 2 * len(chunks)) if len(chunks) < fitting else 0


def shared_bytes(length: int) -> int:
    """Shared memory of a block of threads."""
    return cut(length)[1] * _LINES * LANES * 4 + _OTHER_BYTES


@functools.partial(jax.jit, static_argnames=("z_loss_coef", "dtype", "lines", "resident", "interpret"))
def rows_and_gradient(
    logits_CV,
    targets_C,
    weights_C,
    *,
    z_loss_coef: float,
    dtype,
    lines: int = _LINES,
    resident: bool | None = None,
    interpret: Any = None,
) -> tuple[Rows, jax.Array]:
    """Float32 logits, V a multiple of 128; as `cross_entropy_rows` describes it.

    `lines`: of a chunk. `resident`: rows stay in shared memory; None where they fit. `interpret`: parameters of
    Pallas's interpreter.
    """
    num_rows, length = logits_CV.shape
    chunks, buffers = cut(length, lines)
    resident = buffers > 0 if resident is None else resident
    one = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    shape = (num_rows, length // LANES, LANES)
    run = plgpu.kernel(
        functools.partial(_resident if resident else _streamed, chunks, z_loss_coef),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), one, one, one],
        scratch_types=[
            plgpu.SMEM((buffers, lines, LANES), jnp.float32),
            plgpu.Barrier(num_barriers=buffers),
        ]
        if resident
        else [],
        kernel_name="cross_entropy_rows",
        grid=(min(num_rows, NUM_PROCESSORS) if resident else num_rows,),
        grid_names=("program",),
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    gradient, *statistics = run(logits_CV.reshape(shape), targets_C.astype(jnp.int32), weights_C)
    return Rows(*statistics), gradient.reshape(num_rows, length)


def _resident(chunks, z_loss_coef, logits_ref, targets_ref, weights_ref, gradient_ref, *refs) -> None:
    """Rows of a program, each in shared memory while it is read three times there."""
    *statistics_refs, ring, arrived = refs
    program, num_rows = lax.axis_index("program"), logits_ref.shape[0]
    programs, buffers = min(num_rows, NUM_PROCESSORS), ring.shape[0]
    mine = hopper.floor(num_rows - program + programs - 1, programs)

    def fetch(turn, i, ahead):
        """Starts the copy of what is `ahead` chunks after chunk i of row `turn`, if the program has so many rows."""
        later, i = turn + (i + ahead) // len(chunks), (i + ahead) % len(chunks)
        first, count = chunks[i]

        @pl.when(later < mine)
        def _():
            buffer = hopper.remainder(later * len(chunks) + i, buffers)
            source = logits_ref.at[program + later * programs, pl.ds(first, count)]
            plgpu.copy_gmem_to_smem(source, ring.at[buffer, pl.ds(0, count)], arrived.at[buffer])

    for i in range(buffers):
        fetch(0, 0, i)

    @pl.loop(0, mine)
    def _(turn):
        row = program + turn * programs

        def read(i):
            buffer, (_, count) = hopper.remainder(turn * len(chunks) + i, buffers), chunks[i]
            return _load(ring.at[buffer, pl.ds(0, count)])

        # By places within a chunk until the end, where threads meet; the last chunk, which may be shorter, apart.
        highest = None
        for i in range(len(chunks)):
            plgpu.barrier_wait(arrived.at[hopper.remainder(turn * len(chunks) + i, buffers)])
            if i < len(chunks) - 1:
                highest = read(i) if highest is None else jnp.maximum(highest, read(i))
        last = jnp.max(read(len(chunks) - 1))
        highest = last if highest is None else jnp.maximum(last, jnp.max(highest))
        total = None
        for i in range(len(chunks) - 1):
            terms = _powers(read(i), highest)
            total = terms if total is None else total + terms
        last = jnp.sum(_powers(read(len(chunks) - 1), highest))
        total = last if total is None else last + jnp.sum(total)

        def write(put):
            for i, lines in enumerate(chunks):
                put(pl.ds(*lines), read(i))
                # All threads have read what the copy writes over.
                plgpu.commit_smem()
                fetch(turn, i, buffers)

        refs = (logits_ref, targets_ref, weights_ref, gradient_ref, *statistics_refs)
        _finish(z_loss_coef, row, highest, total, write, *refs)


def _streamed(chunks, z_loss_coef, logits_ref, targets_ref, weights_ref, gradient_ref, *statistics_refs) -> None:
    """One row, read twice."""
    row, (_, lines) = lax.axis_index("program"), chunks[0]
    whole = sum(count == lines for _, count in chunks)

    def read(first, count):
        return _load(logits_ref.at[row, pl.ds(first, count)])

    def in_chunks(step, carry):
        carry = lax.fori_loop(0, whole, lambda i, carry: step(i * lines, lines, carry), carry)
        return step(*chunks[-1], carry) if whole < len(chunks) else carry

    def gather(first, count, carry):
        highest, total = carry
        x = read(first, count)
        new = jnp.maximum(highest, jnp.max(x))
        return new, total * _powers(highest, new) + jnp.sum(_powers(x, new))

    highest, total = in_chunks(gather, (jnp.float32(hopper.LOWEST), jnp.float32(0)))

    def write(put):
        in_chunks(lambda first, count, _: put(pl.ds(first, count), read(first, count)), None)

    refs = (logits_ref, targets_ref, weights_ref, gradient_ref, *statistics_refs)
    _finish(z_loss_coef, row, highest, total, write, *refs)


def _finish(
    z_loss_coef, row, highest, total, write, logits_ref, targets_ref, weights_ref, gradient_ref, lse_ref, *others
) -> None:
    """`write(put)` calls put(lines, logits) for all chunks of the row."""
    target_logit_ref, max_ref = others
    lse = highest + jnp.log(total)
    weight, target = weights_ref[row], targets_ref[row]
    factor = weight * (1 + 2 * z_loss_coef * lse)

    def put(lines, logits):
        gradient_ref[row, lines] = (_powers(logits, lse) * factor).astype(gradient_ref.dtype)

    write(put)
    length = logits_ref.shape[1] * LANES
    here = (target >= 0) & (target < length)
    target = jnp.clip(target, 0, length - 1)
    line, lane = hopper.floor(target, LANES), hopper.remainder(target, LANES)
    target_logit = logits_ref[row, line, lane]

    # After the row, between barriers of the warpgroup.
    @pl.when(here)
    def _():
        gradient_ref[row, line, lane] = (_powers(target_logit, lse) * factor - weight).astype(gradient_ref.dtype)

    lse_ref[row], max_ref[row] = lse, highest
    target_logit_ref[row] = jnp.where(here, target_logit, 0.0)


def _load(ref) -> jax.Array:
    """[lines, 128], 16 bytes to a thread at a time where their number allows it."""
    per_thread = ref.shape[0]
    vector = next(width for width in (4, 2, 1) if per_thread % width == 0)
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=vector), optimized=False)


def _powers(x, highest) -> jax.Array:
    return jnp.exp2((x - highest) * hopper.LOG2_E)
