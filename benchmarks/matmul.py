"""Products of few-bit numbers side by side on one GPU: `python -m benchmarks.matmul --out FILE`.

Ours (Pallas), XLA, and torch's own where it is installed, beside 16-bit products of the same shape. TFLOP/s count
2·M·K·N (training: three such products); TB/s count the bytes of the weight and its scales, which is what a product of
few rows waits for. Errors are those of the product, relative to float32 of the same quantised numbers in norms, over
the first rows; what rounding to few bits itself costs is not in them. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.ceilings import copy_bytes_per_second, median_seconds
from kernels.quantized_matmul import case_of, quantized_matmul, reference, supports
from kernels.quantized_matmul.training import fp8_matmul
from kernels.target import Target, default_target
from quantization.qarray import QArray, quantize, to_fragments

IMPLS = ("pallas", "xla", "torch")
_FP8 = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True)
class Format:
    """Dtypes and scales of both operands, as `quantize` takes them. `x` None: bfloat16; `w` None: that too."""

    x: str | None
    x_block: tuple[int | None, int | None] | None
    w: str | None
    w_block: tuple[int | None, int | None] | None


FORMATS = {
    "bf16": Format(None, None, None, None),
    "fp8, one scale": Format(_FP8, (None, None), _FP8, (None, None)),
    "fp8, scales of rows": Format(_FP8, (1, None), _FP8, (None, 1)),
    "fp8, scales of blocks": Format(_FP8, (1, 128), _FP8, (128, 128)),
    "int8, scales of rows": Format("int8", (1, None), "int8", (None, 1)),
    "weights of int8": Format(None, None, "int8", (None, 1)),
    "weights of fp8": Format(None, None, _FP8, (None, 1)),
    "weights of int4": Format(None, None, "int4", (128, 1)),
    "training in bf16": Format(None, None, None, None),
    "training in fp8": Format(None, None, None, None),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """y [M, N] = x [M, K] · w [K, N]."""

    format: str
    num_rows: int
    in_dim: int
    out_dim: int

    @property
    def name(self) -> str:
        return f"{self.format}, {self.num_rows}x{self.in_dim}x{self.out_dim}"

    @property
    def training(self) -> bool:
        return self.format.startswith("training")

    @property
    def num_copies(self) -> int:
        """Products of one timed program. Of few rows, several with weights of their own: more than caches hold, and
        longer than the host takes to call the program (four of 16 rows of int4 took 72 us each on one H100, sixteen 52
        on another)."""
        return 1 if self.flops() > 1e11 else max(16, -(-(2**29) // (self.in_dim * self.out_dim)))

    def weight_bytes(self) -> float:
        """Of values and scales."""
        form = FORMATS[self.format]
        if form.w is None:
            return 2 * self.in_dim * self.out_dim
        lengths = [
            whole if n is None else n for n, whole in zip(form.w_block, (self.in_dim, self.out_dim), strict=True)
        ]
        bits = 4 if form.w == "int4" else 8
        return self.in_dim * self.out_dim * (bits / 8 + 4 / (lengths[0] * lengths[1]))

    def flops(self) -> float:
        return (3 if self.training else 1) * 2 * self.num_rows * self.in_dim * self.out_dim


_LARGE = ((8192, 8192, 8192), (4096, 14336, 4096))
_WEIGHT_ONLY = ("bf16", "weights of int8", "weights of fp8", "weights of int4")
# llama3-8b's four products of a layer: queries with keys and values, their output, gate with up, down.
_LLAMA = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
WORKS = (
    *(Work(name, *shape) for shape in _LARGE for name in FORMATS if name not in _WEIGHT_ONLY[1:]),
    *(Work(name, rows, 8192, 28672) for rows in (1, 8, 16, 64) for name in _WEIGHT_ONLY),
    *(Work(name, rows, *shape) for shape in _LLAMA for rows in (1, 64) for name in _WEIGHT_ONLY),
    # Where a product of few rows becomes a large one.
    *(Work(name, rows, 4096, 28672) for rows in (128, 256) for name in _WEIGHT_ONLY),
    *(Work("fp8, scales of rows", rows, 4096, 28672) for rows in (64, 256)),
)


def operands(work: Work, impl: str, seed: int = 0) -> tuple[Any, Any]:
    """(x, w), random normal numbers, in the layout that the implementation reads."""
    form = FORMATS[work.format]
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (work.num_rows, work.in_dim), jnp.bfloat16)
    w = jax.random.normal(keys[1], (work.in_dim, work.out_dim), jnp.bfloat16)
    if form.x is not None:
        x = quantize(x, form.x, form.x_block)
    if form.w is None:
        return x, w
    w = quantize(w, form.w, form.w_block, layout="rows" if form.x is None else "columns")
    return x, (to_fragments(w) if form.x is None and impl == "pallas" else w)


def lacking(impl: str, work: Work, target: Target) -> str | None:
    """Why `impl` isn't measured on this work; None where it is."""
    form = FORMATS[work.format]
    if impl == "torch":
        if importlib.util.find_spec("torch") is None:
            return "not installed"
        return None if form.x is not None and form.x_block[1] is None else "has no such product"
    if form.w is None:
        # Training in FP8 has products of ours, and those in 16 bits have none.
        return "has no such product" if impl == "pallas" and work.format != "training in fp8" else None
    x, w = jax.eval_shape(lambda: operands(work, impl))
    return supports(impl, case_of(x, w, None, jnp.bfloat16), target)


def function(impl: str, work: Work) -> Callable[[Any, Any], Any]:
    """y from (x, w), or for training (y, dx, dw) with y for its gradient."""
    if not work.training:
        if FORMATS[work.format].w is None:
            return jnp.matmul
        return functools.partial(quantized_matmul, out_dtype=jnp.bfloat16, impl=impl)
    multiply = jnp.matmul if work.format == "training in bf16" else functools.partial(fp8_matmul, impl=impl)

    def both(x, w):
        y, pull = jax.vjp(multiply, x, w)
        return y, *pull(y)

    return both


class Programs(NamedTuple):
    """`operands`: (x, w) of a seed. `multiply`: results of a list of pairs. `relative_error`: of a pair; None where
    nothing is rounded to few bits."""

    operands: jax.stages.Compiled
    multiply: jax.stages.Compiled
    relative_error: jax.stages.Compiled | None


def build(impl: str, work: Work) -> Programs:
    """Compiles what `measure` runs."""
    make, multiply = jax.jit(functools.partial(operands, work, impl)), function(impl, work)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    pair = jax.eval_shape(make, seed)
    many = jax.jit(lambda pairs: [multiply(x, w) for x, w in pairs]).lower([pair] * work.num_copies)
    error = jax.jit(functools.partial(_relative_error, multiply))
    rounded = FORMATS[work.format].w is not None
    return Programs(make.lower(seed).compile(), many.compile(), error.lower(*pair).compile() if rounded else None)


def measure(work: Work, programs: Programs, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    pairs = [programs.operands(np.int32(seed)) for seed in range(work.num_copies)]
    run = programs.multiply
    seconds = median_seconds(lambda: jax.tree.leaves(run(pairs))[-1], repeats=repeats, inner=10) / work.num_copies
    row = _speeds(work, seconds) | {"mib": run.memory_analysis().temp_size_in_bytes / 2**20}
    if programs.relative_error is None:
        return row
    return row | {"relative_error": float(programs.relative_error(*pairs[0]))}


def _speeds(work: Work, seconds: float) -> dict[str, Any]:
    bandwidth = work.weight_bytes() / seconds / 1e12
    return {"microseconds": seconds * 1e6, "tflops": work.flops() / seconds / 1e12, "weight_tb_per_second": bandwidth}


def _relative_error(multiply: Callable[[Any, Any], Any], x, w: QArray) -> jax.Array:
    x = jax.tree.map(lambda leaf: leaf[: min(128, leaf.shape[0])], x)
    true = reference.quantized_matmul(x, w, bias=None, out_dtype=jnp.float32)
    y = multiply(x, w).astype(jnp.float32)
    return jnp.linalg.norm(y - true) / jnp.linalg.norm(true)


def _torch_seconds(work: Work, repeats: int) -> float:
    torch = importlib.import_module("torch")
    x, w = (torch.randn(shape, device="cuda") for shape in ((work.num_rows, work.in_dim), (work.out_dim, work.in_dim)))
    form = FORMATS[work.format]
    if form.x == "int8":
        x, w = ((a * 30).clamp(-127, 127).to(torch.int8) for a in (x, w))
        calls = functools.partial(torch._int_mm, x, w.T)
    else:
        x, w = (a.to(torch.float8_e4m3fn) for a in (x, w))
        by_row = form.x_block[0] == 1
        scales = [torch.ones(shape if by_row else (), device="cuda") for shape in ((len(x), 1), (1, len(w)))]
        calls = functools.partial(torch._scaled_mm, x, w.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    class Result:
        """Waits as JAX's arrays do."""

        def block_until_ready(self):
            torch.cuda.synchronize()

    def call():
        calls()
        return Result()

    return median_seconds(call, repeats=repeats, inner=10)


def measure_all(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    target = default_target()
    print(f"{'work':<44}{'impl':<8}{'us':>9}{'TFLOP/s':>9}{'TB/s':>7}{'error':>10}", flush=True)
    for work in works:
        reasons = {impl: lacking(impl, work, target) for impl in impls}
        compiled = [impl for impl, reason in reasons.items() if reason is None and impl != "torch"]
        programs = side_by_side.compile_all({impl: functools.partial(build, impl, work) for impl in compiled})
        for impl, reason in reasons.items():
            row: dict[str, Any] = {"work": work.name, "impl": impl}
            if reason is not None:
                row["lacking"] = reason
            elif impl == "torch":
                row |= _speeds(work, _torch_seconds(work, repeats))
            else:
                row |= measure(work, programs[impl].result(), repeats)
            print(_line(row), flush=True)
            yield row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['work']:<44}{row['impl']:<8}"
    if "lacking" in row:
        return f"{head}{row['lacking']}"
    error = f"{row['relative_error']:10.1e}" if "relative_error" in row else f"{'-':>10}"
    return f"{head}{row['microseconds']:9.1f}{row['tflops']:9.0f}{row['weight_tb_per_second']:7.2f}{error}"


def main(arguments: list[str] | None = None) -> None:
    ceilings = {"copy_tb_per_second": lambda: copy_bytes_per_second() / 1e12}
    side_by_side.run("matmul", __doc__.splitlines()[0], WORKS, IMPLS, measure_all, ceilings, arguments)


if __name__ == "__main__":
    main()
