"""Grouped products beside one dense product of the same FLOPs, on the default device.

    python -m benchmarks.grouped_matmul_quick --rows 32768 --embed 1024 --mlp 3584 --dtype bfloat16

Two products in a row, [M, K] x [K, N] x [N, K], as in an expert's MLP, with uneven groups. The best of several calls.
"""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kernels.grouped_matmul import GroupedCase, choose, grouped_matmul
from kernels.target import default_target


@dataclasses.dataclass(frozen=True)
class Options:
    rows: int = 8192
    """Rows of all groups together (M)."""
    embed: int = 256
    """Width outside the experts (K)."""
    mlp: int = 512
    """Width inside the experts (N)."""
    groups: int = 8
    dtype: str = "float32"
    impls: tuple[str, ...] = ("loop", "batched", "ragged_dot")
    calls: int = 10


def best_seconds(function, arguments, calls: int) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def measure(product, arguments, flops: int, calls: int) -> dict[str, float]:
    """FLOP/s of the forward pass and of forward and backward together (three times the FLOPs)."""

    def twice(x, up, down):
        return product(product(x, up), down)

    def loss(x, up, down):
        return jnp.sum(twice(x, up, down).astype(jnp.float32) ** 2)

    forward = best_seconds(jax.jit(twice), arguments, calls)
    both = best_seconds(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), arguments, calls)
    return {"forward": flops / forward, "forward_backward": 3 * flops / both}


def main(options: Options) -> None:
    rng = np.random.default_rng(0)
    M, K, N, E = options.rows, options.embed, options.mlp, options.groups
    sizes = jnp.asarray(rng.multinomial(M, rng.dirichlet(np.full(E, 3.0))), jnp.int32)
    shapes = ((M, K), (E, K, N), (E, N, K))
    x, up, down = (jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, options.dtype) for shape in shapes)
    flops = 2 * 2 * M * K * N
    results = {"dense": measure(jnp.matmul, (x, up[0], down[0]), flops, options.calls)}
    for impl in options.impls:
        grouped = lambda x, w, impl=impl: grouped_matmul(x, w, sizes, impl=impl)  # noqa: E731
        results[impl] = measure(grouped, (x, up, down), flops, options.calls)
    for name, result in results.items():
        forward, both = result["forward"] / 1e9, result["forward_backward"] / 1e9
        print(f"{name:12s} forward {forward:10.1f} GFLOP/s, with backward {both:10.1f}")
    chosen, reason = choose("auto", GroupedCase(options.dtype, M, E, K, N), default_target())
    record = {"event": "grouped_matmul_quick", "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    record |= {"auto": chosen, "reason": reason, "group_sizes": sizes.tolist(), "flops_per_second": results}
    print(json.dumps(record | dataclasses.asdict(options)))


if __name__ == "__main__":
    main(tyro.cli(Options))
