"""Attention's implementations side by side on one GPU: `python -m benchmarks.attention --out FILE`.

Ours (Pallas), cuDNN through JAX, tokamax where it is installed, and XLA; forward, and forward with backward. TFLOP/s
count two products over the pairs of query and key that are seen (causal as half of all) forward, and 2.5 times that
backward. Errors are relative to float32 of the same inputs, over the first kv head of the first row; memory
is what the compiler takes beside arguments and results. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


class Operands(NamedTuple):
    """`rest`: the other arrays of attention's arguments, by name."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    rest: dict[str, jax.Array]

    def first_group(self) -> Operands:
        """Of one kv head of one row, in float32: what float8 operands stand for."""
        group = self.q.shape[2] // self.k.shape[2]
        rest = {name: array for name, array in self.rest.items() if name not in SCALES}
        given = {"q": self.q, "k": self.k, "v": self.v}
        if self.q.dtype == float8.DTYPE:
            given = {
                name: float8.dequantize_heads(x, self.rest[f"{name}_scale"], jnp.float32) for name, x in given.items()
            }
        heads = ((given["q"], group), (given["k"], 1), (given["v"], 1), (self.d_out, group))
        parts = {name: array[:group] if name == "sinks" else array[:1] for name, array in rest.items()}
        return Operands(*(x[:1, :, :count].astype(jnp.float32) for x, count in heads), parts)


def operands(work: Work) -> Operands:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    shapes = ((work.heads, work.key_dim), (work.kv_heads, work.key_dim), (work.kv_heads, work.value_dim))
    shapes = (*shapes, (work.heads, work.value_dim))
    wide = "bfloat16" if work.dtype == float8.DTYPE else work.dtype
    q, k, v, d_out = (jax.random.normal(next(keys), (work.batch, work.length, *shape), wide) for shape in shapes)
    rest = {}
    if work.dtype == float8.DTYPE:
        (q, k, v), scales = zip(*(float8.quantize_heads(x) for x in (q, k, v)), strict=True)
        rest = dict(zip(SCALES, scales, strict=True))
    if work.document is not None:
        segments = jnp.broadcast_to(jnp.arange(work.length) // work.document + 1, (work.batch, work.length))
        rest |= dict.fromkeys(("q_segments", "kv_segments"), segments.astype(jnp.int32))
    if work.features:
        rest["sinks"] = jax.random.normal(next(keys), (work.heads,))
    return Operands(q, k, v, d_out, rest)


def settings(work: Work) -> dict[str, Any]:
    """Attention's other arguments."""
    soft_cap = 30.0 if work.features else None
    return {"scale": work.key_dim**-0.5, "causal": work.causal, "window": work.reach, "soft_cap": soft_cap}


def lacking(impl: str, work: Work, target: Target) -> str | None:
    """Why `impl` isn't measured on this work; None where it is."""
    if impl != "tokamax":
        return supports(impl, work.case(), target)
    if importlib.util.find_spec("tokamax") is None:
        return "not installed"
    if work.dtype == float8.DTYPE:
        return "has no float8 attention"
    return "is measured without masks" if work.document is not None or work.reach is not None else None


def function(impl: str, work: Work) -> Callable[[Operands], jax.Array]:
    given = settings(work)
    if impl != "tokamax":
        return lambda x: attention(x.q, x.k, x.v, **given, **x.rest, impl=impl)
    tokamax = importlib.import_module("tokamax")
    options = {"scale": given["scale"], "is_causal": given["causal"], "implementation": "mosaic"}
    return lambda x: tokamax.dot_product_attention(x.q, x.k, x.v, **options)


def gradients(attend: Callable[[Operands], jax.Array]) -> Callable[[Operands], tuple[jax.Array, ...]]:
    """(out, dq, dk, dv)."""

    def both(x):
        out, pull = jax.vjp(lambda q, k, v: attend(x._replace(q=q, k=k, v=v)), x.q, x.k, x.v)
        return out, *pull(x.d_out)

    return both


def exact(work: Work, given: Operands) -> tuple[jax.Array, ...]:
    """(out, dq, dk, dv) of the first group."""
    absent = dict.fromkeys(("q_segments", "kv_segments", "q_positions", "kv_positions", "sinks"))

    def attend(x):
        return reference.attention(x.q, x.k, x.v, **settings(work), **absent | x.rest)[0]

    return gradients(attend)(given.first_group())


class Programs(NamedTuple):
    """Compiled for one work. `both`: forward and backward, or why the implementation refuses to differentiate.
    `errors`: of (results, what `exact` gives)."""

    forward: jax.stages.Compiled
    both: jax.stages.Compiled | str
    errors: jax.stages.Compiled


def build(impl: str, work: Work) -> Programs:
    """Compiles what `measure` runs."""
    given, attend = jax.eval_shape(functools.partial(operands, work)), function(impl, work)
    forward = jax.jit(attend).lower(given)
    try:
        both = jax.jit(gradients(attend)).lower(given)
    except ValueError as error:
        results, both = (forward.out_info,), str(error)
    else:
        results, both = both.out_info, both.compile()
    true = jax.eval_shape(functools.partial(exact, work), given)
    return Programs(forward.compile(), both, jax.jit(relative_errors).lower(results, true).compile())


def measure(work: Work, programs: Programs, given: Operands, true: tuple[jax.Array, ...], repeats: int) -> dict:
    """A row of the table; of the forward pass alone where the implementation refuses to differentiate."""
    forward, both, errors = programs
    seconds = median_seconds(lambda: forward(given), repeats=repeats, inner=10)
    row = {
        "forward_tflops": work.flops() / seconds / 1e12,
        "forward_mib": forward.memory_analysis().temp_size_in_bytes / 2**20,
    }
    if isinstance(both, str):
        found = errors((forward(given),), true)
        return row | {
            "relative_errors": {name: float(error) for name, error in found.items()},
            "backward_lacking": both,
        }
    seconds_both = median_seconds(lambda: both(given)[0], repeats=repeats, inner=5)
    return row | {
        "forward_backward_tflops": (1 + BACKWARD) * work.flops() / seconds_both / 1e12,
        "backward_tflops": BACKWARD * work.flops() / (seconds_both - seconds) / 1e12,
        "forward_backward_mib": both.memory_analysis().temp_size_in_bytes / 2**20,
        "relative_errors": {name: float(error) for name, error in errors(both(given), true).items()},
    }


def relative_errors(results: Sequence[jax.Array], true: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Of the first group's share of each result, in norms."""
    errors = {}
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, true, strict=False):
        mine = x[:1, :, : y.shape[2]].astype(jnp.float32)
        errors[name] = jnp.linalg.norm((mine - y).ravel()) / jnp.linalg.norm(y.ravel())
    return errors


def measure_all(works: list[Work], impls: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    target = default_target()
    print(f"{'work':<48}{'impl':<9}{'fwd':>7}{'bwd':>7}{'both':>7} TFLOP/s{'err out':>10}{'MiB':>9}", flush=True)
    for work in works:
        reasons = {impl: lacking(impl, work, target) for impl in impls}
        builds = {impl: functools.partial(build, impl, work) for impl, reason in reasons.items() if reason is None}
        programs = side_by_side.compile_all(builds)
        make, true = _build_operands(work)
        given = make()
        true = true(given)
        for impl, reason in reasons.items():
            row: dict[str, Any] = {"work": work.name, "impl": impl}
            row |= {"lacking": reason} if reason else measure(work, programs[impl].result(), given, true, repeats)
            print(_line(row), flush=True)
            yield row


def _build_operands(work: Work) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """What gives the operands, and what gives `exact` of them."""
    make = jax.jit(functools.partial(operands, work)).lower()
    return make.compile(), jax.jit(functools.partial(exact, work)).lower(make.out_info).compile()


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
