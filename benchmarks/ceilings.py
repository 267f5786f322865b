"""What this device reaches at its best, to measure others against: a large product and a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def median_seconds(fn: Callable[[], jax.Array], *, repeats: int, inner: int) -> float:
    """Median over `repeats` of the mean time of `inner` calls in a row, waited for at the end of each row."""
    fn().block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = fn()
        out.block_until_ready()
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def matmul_flops_per_second(size: int = 8192, dtype: str = "bfloat16") -> float:
    """FLOP/s of a size³ product of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    matmul = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds(lambda: matmul(a, b), repeats=5, inner=10)


def copy_bytes_per_second(num_bytes: int = 2 * 2**30) -> float:
    """Bytes read plus written per second by a negation of a bfloat16 array of `num_bytes`."""
    x = jax.random.normal(jax.random.key(0), (num_bytes // 2,), jnp.bfloat16)
    negate = jax.jit(jnp.negative)
    return 2 * num_bytes / median_seconds(lambda: negate(x), repeats=5, inner=10)
