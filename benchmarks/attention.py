"""Attention's implementations side by side on one GPU: `python -m benchmarks.attention --out FILE`.

Ours (Pallas), cuDNN through JAX, tokamax where it is installed, and XLA; forward, and forward with backward. TFLOP/s
count two products over the pairs of query and key that are seen (causal as half of all) forward, and 2.5 times that
backward. Errors are relative to float32 of the same inputs, over the first kv head of the first row; memory
is what the compiler takes beside arguments and results. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.ceilings import median_seconds
from kernels.attention import AttentionCase, attention, float8, reference, supports
from kernels.target import Target, default_target

IMPLS = ("pallas", "cudnn", "tokamax", "xla")
SCALES = ("q_scale", "k_scale", "v_scale")
# A backward pass has five products of the size of the forward pass's two.
BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class Work:
    """`document`: length of the packed documents, which become segments; `features`: a window that hides nothing, a
    soft cap and sinks, so that the work is that of the plain mask."""

    name: str
    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    key_dim: int = 128
    value_dim: int = 128
    causal: bool = True
    document: int | None = None
    window: int | None = None
    features: bool = False
    dtype: str = "bfloat16"

    def case(self) -> AttentionCase:
        heads = (self.heads, self.kv_heads, self.key_dim, self.value_dim)
        segments, window = self.document is not None, self.reach
        sizes = (self.dtype, self.length, self.length, *heads)
        return AttentionCase(*sizes, self.causal, window, segments, soft_cap=self.features, sinks=self.features)

    @property
    def reach(self) -> int | None:
        """The window that is asked for."""
        return self.length if self.features else self.window

    def flops(self) -> float:
        """Of the forward pass."""
        seen = self.length * (self.length if self.document is None else self.document) * (0.5 if self.causal else 1)
        if self.window is not None:
            seen = self.window * (self.length - self.window / 2)
        return 2 * self.batch * self.heads * seen * (self.key_dim + self.value_dim)


WORKS = (
    Work("causal 512", 16, 512),
    Work("causal 512, one row", 1, 512),
    Work("causal 1024", 16, 1024),
    Work("causal 2048", 8, 2048),
    Work("causal 4096", 4, 4096),
    Work("causal 8192", 2, 8192),
    Work("causal 16384", 1, 16384),
    Work("full 8192", 2, 8192, causal=False),
    Work("window of 1024", 2, 8192, window=1024),
    Work("heads of 64", 2, 8192, 64, 8, 64, 64),
    Work("heads of 80", 2, 8192, 32, 32, 80, 80),
    Work("heads of 96", 2, 8192, 32, 32, 96, 96),
    Work("heads of 256", 2, 8192, 16, 4, 256, 256),
    Work("keys of 192, values of 128", 2, 8192, 32, 32, 192, 128),
    Work("segments, window, soft cap, sinks; all is seen", 2, 8192, document=8192, features=True),
    Work("heads of 256, all of those", 2, 8192, 16, 4, 256, 256, document=8192, features=True),
    Work("documents of 1024", 2, 8192, document=1024),
    Work("float8, causal 1024", 16, 1024, dtype=float8.DTYPE),
    Work("float8, causal 8192", 2, 8192, dtype=float8.DTYPE),
    Work("float8, full 8192", 2, 8192, causal=False, dtype=float8.DTYPE),
    Work("float8, full 16384", 1, 16384, causal=False, dtype=float8.DTYPE),
    Work("float8, heads of 64, full 8192", 2, 8192, 64, 8, 64, 64, causal=False, dtype=float8.DTYPE),
    Work("float8, heads of 256, full 8192", 2, 8192, 16, 4, 256, 256, causal=False, dtype=float8.DTYPE),
)


@dataclasses.dataclass(frozen=True)
class Operands:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    arguments: dict[str, Any]

    def first_group(self) -> Operands:
        """Of one kv head of one row, in float32: what float8 operands stand for."""
        group = self.q.shape[2] // self.k.shape[2]
        arguments = {name: value for name, value in self.arguments.items() if name not in SCALES}
        given = {"q": self.q, "k": self.k, "v": self.v}
        if self.q.dtype == float8.DTYPE:
            given = {
                name: float8.dequantize_heads(x, self.arguments[f"{name}_scale"], jnp.float32)
                for name, x in given.items()
            }
        heads = ((given["q"], group), (given["k"], 1), (given["v"], 1), (self.d_out, group))
        if arguments["sinks"] is not None:
            arguments["sinks"] = arguments["sinks"][:group]
        for name in ("q_segments", "kv_segments"):
            arguments[name] = None if arguments[name] is None else arguments[name][:1]
        return Operands(*(x[:1, :, :count].astype(jnp.float32) for x, count in heads), arguments)


def operands(work: Work) -> Operands:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = ((work.heads, work.key_dim), (work.kv_heads, work.key_dim), (work.kv_heads, work.value_dim))
    shapes = (*shapes, (work.heads, work.value_dim))
    wide = "bfloat16" if work.dtype == float8.DTYPE else work.dtype
    q, k, v, d_out = (jax.random.normal(next(keys), (work.batch, work.length, *shape), wide) for shape in shapes)
    scales = {}
    if work.dtype == float8.DTYPE:
        (q, k, v), scales = zip(*(float8.quantize_heads(x) for x in (q, k, v)), strict=True)
        scales = dict(zip(SCALES, scales, strict=True))
    segments = None
    if work.document is not None:
        segments = jnp.broadcast_to(jnp.arange(work.length) // work.document + 1, (work.batch, work.length))
        segments = segments.astype(jnp.int32)
    arguments = {
        "scale": work.key_dim**-0.5,
        "causal": work.causal,
        "window": work.reach,
        "q_segments": segments,
        "kv_segments": segments,
        "q_positions": None,
        "kv_positions": None,
        "soft_cap": 30.0 if work.features else None,
        "sinks": jax.random.normal(next(keys), (work.heads,)) if work.features else None,
        **scales,
    }
    return Operands(q, k, v, d_out, arguments)


def lacking(impl: str, work: Work, target: Target) -> str | None:
    """Why `impl` isn't measured on this work; None where it is."""
    if impl != "tokamax":
        return supports(impl, work.case(), target)
    if importlib.util.find_spec("tokamax") is None:
        return "not installed"
    if work.dtype == float8.DTYPE:
        return "has no float8 attention"
    return "is measured without masks" if work.document is not None or work.reach is not None else None


def function(impl: str, given: Operands) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    arguments = given.arguments
    if impl != "tokamax":
        return lambda q, k, v: attention(q, k, v, **arguments, impl=impl)
    tokamax = importlib.import_module("tokamax")
    options = {"scale": arguments["scale"], "is_causal": arguments["causal"], "implementation": "mosaic"}
    return lambda q, k, v: tokamax.dot_product_attention(q, k, v, **options)


def gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """(out, dq, dk, dv) from (q, k, v, d_out)."""

    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return both


def exact(given: Operands) -> list[np.ndarray]:
    """(out, dq, dk, dv) of the first group."""
    group = given.first_group()

    def attend(q, k, v):
        return reference.attention(q, k, v, **group.arguments)[0]

    return [np.asarray(x, np.float64) for x in jax.jit(gradients(attend))(group.q, group.k, group.v, group.d_out)]


def measure(impl: str, work: Work, given: Operands, true: list[np.ndarray], repeats: int) -> dict[str, Any]:
    """A row of the table; of the forward pass alone where the implementation refuses to differentiate."""
    inputs = (given.q, given.k, given.v)
    attend = function(impl, given)
    forward = jax.jit(attend).lower(*inputs).compile()
    seconds = median_seconds(lambda: forward(*inputs), repeats=repeats, inner=10)
    row = {
        "forward_tflops": work.flops() / seconds / 1e12,
        "forward_mib": forward.memory_analysis().temp_size_in_bytes / 2**20,
    }
    try:
        both = jax.jit(gradients(attend)).lower(*inputs, given.d_out).compile()
    except ValueError as error:
        return row | {"relative_errors": relative_errors([forward(*inputs)], true[:1]), "backward_lacking": str(error)}
    seconds_both = median_seconds(lambda: both(*inputs, given.d_out)[0], repeats=repeats, inner=5)
    return row | {
        "forward_backward_tflops": (1 + BACKWARD) * work.flops() / seconds_both / 1e12,
        "backward_tflops": BACKWARD * work.flops() / (seconds_both - seconds) / 1e12,
        "forward_backward_mib": both.memory_analysis().temp_size_in_bytes / 2**20,
        "relative_errors": relative_errors(both(*inputs, given.d_out), true),
    }


def relative_errors(results: Sequence[jax.Array], true: list[np.ndarray]) -> dict[str, float]:
    """Of the first group's share of each result, in norms."""
    errors = {}
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, true, strict=False):
        errors[name] = float(np.linalg.norm(np.asarray(x[:1, :, : y.shape[2]], np.float64) - y) / np.linalg.norm(y))
    return errors


def measure_all(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    target = default_target()
    print(f"{'work':<48}{'impl':<9}{'fwd':>7}{'bwd':>7}{'both':>7} TFLOP/s{'err out':>10}{'MiB':>9}", flush=True)
    for work in works:
        given = operands(work)
        true = exact(given)
        for impl in impls:
            row: dict[str, Any] = {"work": work.name, "impl": impl}
            reason = lacking(impl, work, target)
            row |= {"lacking": reason} if reason else measure(impl, work, given, true, repeats)
            print(_line(row), flush=True)
            yield row


def _line(row: dict[str, Any]) -> str:
    head = f"{row['work']:<48}{row['impl']:<9}"
    if "lacking" in row:
        return f"{head}{row['lacking']}"
    names = ("forward", "backward", "forward_backward")
    speeds = "".join(f"{row[f'{name}_tflops']:7.0f}" if f"{name}_tflops" in row else f"{'-':>7}" for name in names)
    mib = row["forward_mib"] if "backward_lacking" in row else row["forward_backward_mib"]
    return f"{head}{speeds}{'':8}{row['relative_errors']['out']:10.1e}{mib:9.0f}"


def main(arguments: list[str] | None = None) -> None:
    side_by_side.run("attention", __doc__.splitlines()[0], WORKS, IMPLS, measure_all, {}, arguments)


if __name__ == "__main__":
    main()
