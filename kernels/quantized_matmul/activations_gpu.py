"""A norm or a gate and its quantisation on Hopper in one pass: each row is read once, by four warps that keep it.

XLA's fusions read a row twice, once for its scale and once for its values, since both are results.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from quantization.qarray import LARGEST, QArray

_THREADS = 128


@functools.partial(jax.jit, static_argnames=("dtype", "epsilon", "offset", "interpret"))
def quantized_rows(
    arrays, gain, *, dtype: str, epsilon: float | None, offset: float = 0.0, interpret: Any = None
) -> QArray:
    """Of one array [M, D] with its gain [D], the norm; of two, or of one [M, 2D], the gate. As `activations` describes
    them."""
    M, D = arrays[0].shape
    joined = gain is None and len(arrays) == 1
    D = D // 2 if joined else D
    # Up to 16 bytes to a thread at a time, side by side.
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=8 if D % (8 * _THREADS) == 0 else 4)

    def body(*refs):
        *inputs, values_ref, scales_ref = refs
        row = lax.axis_index("row")

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        if gain is None:
            refs = [inputs[0].at[row, pl.ds(half * D, D)] for half in (0, 1)] if joined else [x.at[row] for x in inputs]
            gate, up = map(load, refs)
            y = gate / (1 + jnp.exp(-gate)) * up
        else:
            x, factors = load(inputs[0].at[row]), load(inputs[1]) + offset
            y = x * lax.rsqrt(jnp.sum(x * x) * (1 / D) + epsilon) * factors
        # As if it had been written and read again.
        y = y.astype(arrays[0].dtype).astype(jnp.float32)
        largest = jnp.max(jnp.abs(y))
        scale = jnp.maximum(largest * (1 / LARGEST[dtype]), jnp.finfo(jnp.float32).tiny)
        scale = jnp.where(largest == 0, 1.0, jnp.where(largest == jnp.inf, jnp.nan, scale))
        scaled = y * (1 / scale)
        if dtype == "int8":
            scaled = lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN)
        values_ref[row] = scaled.astype(dtype)
        scales_ref[row] = scale

    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((M, D), jnp.dtype(dtype)), jax.ShapeDtypeStruct((M,), jnp.float32)],
        kernel_name="quantized_rows",
        grid=(M,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    values, scales = run(*arrays, *([] if gain is None else [gain]))
    return QArray(values, scales[:, None])
