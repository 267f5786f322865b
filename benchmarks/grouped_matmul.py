"""Grouped products side by side on one GPU: `python -m benchmarks.grouped_matmul --out FILE`.

Ours (Pallas), `jax.lax.ragged_dot`, the batched product, JAX's Mosaic GPU example and torch's `_grouped_mm` where they
are installed, and one dense product of the same FLOPs, which no grouped one can beat. The product, its gradient of the
rows (dx) and its gradient of the weights (dw), each alone; and the experts' feed-forward (three products with SwiGLU
between; "apart" is ours with XLA's elementwise steps between), without and with its gradients. Errors are relative, in
norms, to float32 of the same inputs, over the first, the largest and the last group that is not empty. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from kernels.grouped_matmul import GroupedCase, grouped_matmul, supports
from kernels.grouped_matmul.swiglu import grouped_swiglu
from kernels.target import Target, default_target

PASSES = ("forward", "dx", "dw")
OURS = ("pallas", "batched", "ragged_dot")
IMPLS = ("dense", *OURS, "jax_mosaic", "torch")
# What rivals, each of its own library, say no with: of ours, and of the dense product, every one is an error.
_REFUSALS = (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)
FEED_FORWARD_WORKS = ("moe-1b up, even", "moe-1b up, uneven")


@dataclasses.dataclass(frozen=True)
class Work:
    """`even`: groups of one size; else as uneven as a router leaves them, and one of them empty."""

    name: str
    rows: int
    in_dim: int
    out_dim: int
    groups: int
    even: bool = True
    dtype: str = "bfloat16"

    def case(self) -> GroupedCase:
        return GroupedCase(self.dtype, self.rows, self.groups, self.in_dim, self.out_dim)

    def sizes(self) -> np.ndarray:
        if self.even:
            return np.full(self.groups, self.rows // self.groups, np.int32)
        rng = np.random.default_rng(0)
        share = rng.dirichlet(np.full(self.groups - 1, 4.0))
        return np.insert(rng.multinomial(self.rows, share), self.groups // 2, 0).astype(np.int32)

    def flops(self) -> float:
        """Of each of the three products."""
        return 2 * self.rows * self.in_dim * self.out_dim


WORKS = (
    Work("16384 x 4096 x 14336, 8 groups", 16384, 4096, 14336, 8),
    Work("moe-1b up, even", 32768, 1024, 3584, 8),
    Work("moe-1b up, uneven", 32768, 1024, 3584, 8, even=False),
    Work("moe-1b down, even", 32768, 3584, 1024, 8),
    Work("moe-1b down, uneven", 32768, 3584, 1024, 8, even=False),
    Work("131072 x 7168 x 2048, 128 groups", 131072, 7168, 2048, 128),
    Work("131072 x 7168 x 2048, 128 groups, uneven", 131072, 7168, 2048, 128, even=False),
    Work("1024 x 2048 x 1024, 64 groups, uneven", 1024, 2048, 1024, 64, even=False),
)


def operands(work: Work) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x [M, K], w [E, K, N], dy [M, N] and the group sizes."""
    shapes = ((work.rows, work.in_dim), (work.groups, work.in_dim, work.out_dim), (work.rows, work.out_dim))
    arrays = [jax.random.normal(jax.random.key(i), shape, work.dtype) for i, shape in enumerate(shapes)]
    return *arrays, jnp.asarray(work.sizes())


def lacking(impl: str, work: Work, target: Target) -> str | None:
    """Why `impl` isn't measured on this work; None where it is."""
    match impl:
        case "dense":
            return None
        case "torch":
            return None if importlib.util.find_spec("torch") else "not installed"
        case "jax_mosaic":
            if importlib.util.find_spec("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu") is None:
                return "not installed"
            return None if work.groups <= 64 else "unrolls its search over the groups"
        case _:
            if impl == "ragged_dot" and work.flops() * work.groups > 2e14:
                return "multiplies every row by every matrix"
            return supports(impl, work.case(), target)


def function(impl: str, which: str) -> Callable[..., Any]:
    """The result of (x, w, dy, sizes)."""
    match impl, which:
        case "dense", "forward":
            return lambda x, w, dy, sizes: x @ w[0]
        case "dense", "dx":
            return lambda x, w, dy, sizes: dy @ w[0].T
        case "dense", "dw":
            return lambda x, w, dy, sizes: x.T @ dy
        case "jax_mosaic", _:
            return _jax_mosaic(which)
        case _, "forward":
            return lambda x, w, dy, sizes: grouped_matmul(x, w, sizes, impl=impl)
        case _, "dx":
            return lambda x, w, dy, sizes: jax.vjp(lambda x: grouped_matmul(x, w, sizes, impl=impl), x)[1](dy)[0]
        case _:
            return lambda x, w, dy, sizes: jax.vjp(lambda w: grouped_matmul(x, w, sizes, impl=impl), w)[1](dy)[0]


def _jax_mosaic(which: str) -> Callable[..., Any]:
    package = "jax.experimental.pallas.ops.gpu"
    tiles = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 4}
    if which == "dw":
        module = importlib.import_module(f"{package}.transposed_ragged_dot_mgpu")
        return lambda x, w, dy, sizes: module.transposed_ragged_dot(x, dy, group_sizes=sizes, **tiles)
    module = importlib.import_module(f"{package}.ragged_dot_mgpu")
    if which == "forward":
        return lambda x, w, dy, sizes: module.ragged_dot(x, w, group_sizes=sizes, **tiles)
    return lambda x, w, dy, sizes: module.ragged_dot(dy, w, group_sizes=sizes, transpose_rhs=True, **tiles)


def _torch(which: str, given) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(call, wait and convert) on the same arrays."""
    torch = importlib.import_module("torch")
    x, w, dy, sizes = (torch.from_dlpack(array) for array in given)
    ends = torch.cumsum(sizes, 0).to(torch.int32)
    # Of the layouts that it takes, those of our arrays.
    calls = {
        "forward": lambda: torch._grouped_mm(x, w, offs=ends),
        "dx": lambda: torch._grouped_mm(dy, w.transpose(1, 2), offs=ends),
        "dw": lambda: torch._grouped_mm(x.T, dy, offs=ends),
    }

    def wait(result):
        torch.cuda.synchronize()
        return jnp.from_dlpack(result.contiguous())

    return calls[which], wait


def median_seconds(call, wait, *, repeats: int, inner: int) -> float:
    """Median over `repeats` of the mean time of `inner` calls in a row, waited for at the end of each row."""
    wait(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = call()
        wait(out)
        times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def relative_error(which: str, result, x, w, dy, sizes, group) -> jax.Array:
    """Of one group's part of a result."""
    product = functools.partial(jnp.matmul, precision="highest")
    end = jnp.cumsum(sizes)[group]
    rows = jnp.arange(x.shape[0])[:, None]
    mine = (rows >= end - sizes[group]) & (rows < end)
    x, dy, w = (array.astype(jnp.float32) for array in (jnp.where(mine, x, 0), jnp.where(mine, dy, 0), w[group]))
    true = {"forward": lambda: product(x, w), "dx": lambda: product(dy, w.T), "dw": lambda: product(x.T, dy)}[which]()
    result = (result[group] if which == "dw" else jnp.where(mine, result, 0)).astype(jnp.float32)
    return jnp.linalg.norm(result - true) / jnp.linalg.norm(true)


class Programs(NamedTuple):
    """Compiled for one pass of one work; `error`: of (result, operands, group)."""

    call: jax.stages.Compiled | None
    """None for torch."""
    error: jax.stages.Compiled


def build(impl: str, work: Work, which: str) -> Programs:
    """Compiles what `measure` runs."""
    given = jax.eval_shape(functools.partial(operands, work))
    results = {"forward": given[2], "dx": given[0], "dw": given[1]}
    group = jax.ShapeDtypeStruct((), jnp.int32)
    error = jax.jit(functools.partial(relative_error, which)).lower(results[which], *given, group)
    call = None if impl == "torch" else jax.jit(function(impl, which)).lower(*given).compile()
    return Programs(call, error.compile())


def measure(impl: str, work: Work, which: str, programs: Programs, given, repeats: int) -> dict[str, Any]:
    if programs.call is None:
        call, wait = _torch(which, given)
    else:
        call, wait = functools.partial(programs.call, *given), jax.block_until_ready
    error = None if impl == "dense" else _largest_error(programs.error, wait(call()), given)
    inner = max(2, min(20, int(4e13 / work.flops())))
    seconds = median_seconds(call, wait, repeats=repeats, inner=inner)
    return {"tflops": work.flops() / seconds / 1e12, "milliseconds": 1e3 * seconds, "relative_error": error}


def _largest_error(error: Callable[..., jax.Array], result, given) -> float:
    sizes = np.asarray(given[-1])
    filled = np.flatnonzero(sizes)
    groups = {int(filled[0]), int(np.argmax(sizes)), int(filled[-1])}
    return max(float(error(result, *given, np.int32(group))) for group in groups)


def feed_forward(impl: str, sizes: jax.Array) -> Callable[..., jax.Array]:
    """Of x, gate, up and down."""
    if impl != "apart":
        return lambda x, gate, up, down: grouped_swiglu(x, gate, up, down, sizes, impl=impl)

    def apart(x, gate, up, down):
        gate, up = (grouped_matmul(x, w, sizes, impl="pallas") for w in (gate, up))
        return grouped_matmul(jax.nn.silu(gate) * up, down, sizes, impl="pallas")

    return apart


def feed_forward_operands(work: Work) -> tuple[jax.Array, ...]:
    """x, gate, up and down, and the group sizes: of `work.in_dim`, and `work.out_dim` inside."""
    x, up, _, sizes = operands(work)
    gate, down = (jax.random.normal(jax.random.key(i), up.shape, up.dtype) for i in (3, 4))
    return x, *(array * work.in_dim**-0.5 for array in (gate, up, down.swapaxes(1, 2))), sizes


def build_feed_forward(impl: str, work: Work, backward: bool) -> jax.stages.Compiled:
    """Compiles what `measure_feed_forward` runs."""

    def both(x, gate, up, down, sizes):
        y, pullback = jax.vjp(feed_forward(impl, sizes), x, gate, up, down)
        return y, pullback(x)

    def forward(x, gate, up, down, sizes):
        return feed_forward(impl, sizes)(x, gate, up, down)

    run = both if backward else forward
    return jax.jit(run).lower(*jax.eval_shape(functools.partial(feed_forward_operands, work))).compile()


def measure_feed_forward(
    work: Work, backward: bool, run: jax.stages.Compiled, given: tuple[jax.Array, ...], repeats: int
) -> dict[str, Any]:
    """With gradients, nine products."""
    flops = (9 if backward else 3) * work.flops()
    inner = max(2, min(20, int(4e13 / flops)))
    seconds = median_seconds(functools.partial(run, *given), jax.block_until_ready, repeats=repeats, inner=inner)
    return {"tflops": flops / seconds / 1e12, "milliseconds": 1e3 * seconds, "relative_error": None}


def measure_feed_forwards(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    target = default_target()
    for work in works:
        reasons = {impl: supports("pallas" if impl == "apart" else impl, work.case(), target) for impl in impls}
        cases = [(impl, backward) for impl in impls for backward in (False, True)]
        builds = {
            (impl, backward): functools.partial(build_feed_forward, impl, work, backward)
            for impl, backward in cases
            if reasons[impl] is None
        }
        programs = side_by_side.compile_all(builds)
        given = jax.jit(functools.partial(feed_forward_operands, work))()
        for impl, backward in cases:
            name = "feed-forward and gradients" if backward else "feed-forward"
            row: dict[str, Any] = {"work": work.name, "impl": impl, "pass": name}
            if reasons[impl] is not None:
                row["lacking"] = reasons[impl]
            else:
                row |= measure_feed_forward(work, backward, programs[impl, backward].result(), given, repeats)
            print(_line(row), flush=True)
            yield row


def measure_all(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    target = default_target()
    for work in works:
        reasons = {impl: lacking(impl, work, target) for impl in impls}
        builds = {
            (impl, which): functools.partial(build, impl, work, which)
            for impl, which in itertools.product(impls, PASSES)
            if reasons[impl] is None
        }
        programs = side_by_side.compile_all(builds)
        given = jax.jit(functools.partial(operands, work))()
        for impl, which in itertools.product(impls, PASSES):
            row: dict[str, Any] = {"work": work.name, "impl": impl, "pass": which}
            if (reason := reasons[impl]) is None:
                try:
                    row |= measure(impl, work, which, programs[impl, which].result(), given, repeats)
                except _REFUSALS as error:
                    if impl in ("dense", *OURS):
                        raise
                    reason = f"{type(error).__name__}: {error}"[:300]
            row |= {"lacking": reason} if reason else {}
            print(_line(row), flush=True)
            yield row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['work']:<44}{row['impl']:<14}{row['pass']:<28}"
    if "lacking" in row:
        return f"{head}{row['lacking']}"
    error = "" if row["relative_error"] is None else f"   error {row['relative_error']:.1e}"
    return f"{head}{row['tflops']:7.0f} TFLOP/s{row['milliseconds']:9.3f} ms{error}"


def measure_both(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """The products, then the feed-forwards that some of their shapes belong to."""
    yield from measure_all(works, impls, repeats)
    feed_forwards = [work for work in works if work.name in FEED_FORWARD_WORKS]
    yield from measure_feed_forwards(feed_forwards, ["batched", "apart", "pallas"], repeats)


def main(arguments: list[str] | None = None) -> None:
    side_by_side.run("grouped_matmul", __doc__.splitlines()[0], WORKS, IMPLS, measure_both, {}, arguments)


if __name__ == "__main__":
    main()
