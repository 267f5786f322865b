"""Softmax, its logsumexp and its gradient on Hopper, of logits that are read from memory once.

A warpgroup takes a row: it reads it in chunks with a running maximum and sum, and then again to write the gradient.
What all rows in flight hold (132 processors, a few rows each, of 128 KB with 32,000 words) lies in the second-level
cache of 50 MB meanwhile. XLA reads the logits three times, for the maximum, the sum and the gradient.
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

THREADS = 128
_CHUNK = 4096
"""Logits of a row that are in registers at a time: 32 of each thread."""


@functools.partial(jax.jit, static_argnames=("z_loss_coef", "dtype", "chunk", "interpret"))
def rows_and_gradient(
    logits_CV, targets_C, weights_C, *, z_loss_coef: float, dtype, chunk: int = _CHUNK, interpret: Any = None
) -> tuple[Rows, jax.Array]:
    """Float32 logits, V a multiple of 128; as `cross_entropy_rows` describes it. `interpret`: parameters of Pallas's
    interpreter."""
    num_rows, length = logits_CV.shape
    full, rest = divmod(length, chunk)

    def body(logits_ref, targets_ref, weights_ref, gradient_ref, lse_ref, target_logit_ref, max_ref):
        row = lax.axis_index("row")

        def load(start, size):
            layout = plgpu.Layout.WG_STRIDED((size,), vec_size=_vector(size))
            return plgpu.load(logits_ref.at[row, pl.ds(start, size)], layout=layout, optimized=False)

        def in_chunks(step, carry):
            carry = lax.fori_loop(0, full, lambda i, carry: step(i * chunk, chunk, carry), carry) if full else carry
            return step(full * chunk, rest, carry) if rest else carry

        def gather(start, size, carry):
            highest, total = carry
            x = load(start, size)
            new = jnp.maximum(highest, jnp.max(x))
            shrink = jnp.exp2((highest - new) * hopper.LOG2_E)
            return new, total * shrink + jnp.sum(jnp.exp2((x - new) * hopper.LOG2_E))

        highest, total = in_chunks(gather, (jnp.float32(hopper.LOWEST), jnp.float32(0)))
        lse = highest + jnp.log(total)
        weight, target = weights_ref[row], targets_ref[row]
        factor = weight * (1 + 2 * z_loss_coef * lse)

        def scatter(start, size, carry):
            softmax = jnp.exp2((load(start, size) - lse) * hopper.LOG2_E)
            gradient_ref[row, pl.ds(start, size)] = (softmax * factor).astype(dtype)
            return carry

        in_chunks(scatter, ())
        here = (target >= 0) & (target < length)
        target_logit = logits_ref[row, jnp.clip(target, 0, length - 1)]

        @pl.when(here)
        def _():
            softmax = jnp.exp2((target_logit - lse) * hopper.LOG2_E)
            gradient_ref[row, target] = (softmax * factor - weight).astype(dtype)

        lse_ref[row], max_ref[row] = lse, highest
        target_logit_ref[row] = jnp.where(here, target_logit, 0.0)

    one = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((num_rows, length), jnp.dtype(dtype)), one, one, one],
        kernel_name="cross_entropy_rows",
        grid=(num_rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    gradient, *statistics = run(logits_CV, targets_C.astype(jnp.int32), weights_C)
    return Rows(*statistics), gradient


def _vector(size: int) -> int:
    """Logits that a thread reads at a time: 16 bytes where a chunk's length allows it."""
    return next(width for width in (4, 2, 1) if size % (width * THREADS) == 0)
