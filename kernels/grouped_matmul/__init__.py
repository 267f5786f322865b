"""Matrix product in which each group of consecutive rows has a matrix of its own (the experts of an MoE)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.choice import by_name
from kernels.debug import check_group_sizes
from kernels.grouped_matmul import batched, loop, ragged_dot, reference, tiles, tpu_tiles
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "ragged_dot", "loop", "batched", "pallas"]

_IMPLEMENTATIONS = {"ragged_dot": ragged_dot, "loop": loop, "batched": batched}


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """The static facts of one call: shapes (of one shard, where sharded) and dtype."""

    dtype: str
    num_rows: int
    num_groups: int
    in_dim: int
    out_dim: int

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32", "float64"):
            raise ValueError(f"grouped_matmul of {self.dtype}: use bfloat16, float16 or float32")


def supports(impl: Impl, case: GroupedCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    if impl == "auto" or impl not in get_args(Impl):
        raise ValueError(f"grouped_matmul impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")
    match impl:
        case "pallas":
            return (tpu_tiles if target.platform == "tpu" else tiles).unsupported(case, target)
        case _:
            return None


def choose(impl: Impl, case: GroupedCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it; "auto" is decided here.

    Raises ValueError for an unknown name and, with the reason, for a named implementation that can't run.
    """
    if impl != "auto":
        remedy = "impl (of a run: kernels.grouped_matmul) to 'auto'"
        return by_name("grouped_matmul", impl, supports(impl, case, target), remedy)
    match target.platform:
        case "tpu":
            return "ragged_dot", "native on TPU; pallas has been compiled for TPU, and not measured there"
        case "cpu":
            return "loop", "about 80% of a dense product's speed on two cores; batched 53%, ragged_dot 11%"
        case "gpu":
            reason = tiles.unsupported(case, target)
            if reason is None:
                return "pallas", "fastest measured on an H100: 0.33 to 0.40 ms a product of moe-1b, batched 2.7"
            return "batched", f"of XLA's the fastest measured on an H100; pallas can't run: {reason}"


def grouped_matmul(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """y_MN: the first group_sizes[0] rows of x are multiplied by w[0], the next group_sizes[1] by w[1], and so on.

    Rows past the sum of the group sizes give zeros, and take and give no gradient. Groups may be empty. Products
    accumulate in float32; the result and both gradients are rounded once, to the dtype of the inputs.

    Args:
      x_MK, w_EKN: one dtype: bfloat16, float16 or float32.
      group_sizes_E: int32 [E], none negative, with a sum of at most M (checked in debug mode: see `kernels.debug`).
      impl: "auto" chooses for `target`, as `choose` does; a named one that can't run raises.
      target: device kind; None for the default device. Read only where `impl` depends on it.

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that is unknown or can't run.
    """
    case = _case(x_MK, w_EKN, group_sizes_E)
    check_group_sizes("grouped_matmul", group_sizes_E, case.num_rows)
    if impl in ("auto", "pallas"):
        target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    if case.num_rows == 0:
        return jnp.zeros((0, case.out_dim), x_MK.dtype)
    with jax.named_scope("grouped_matmul"):
        if impl == "reference":
            return reference.grouped_matmul(x_MK, w_EKN, group_sizes_E)
        on_tpu = impl == "pallas" and target.platform == "tpu"
        return _grouped_matmul("tpu" if on_tpu else impl, x_MK, w_EKN, group_sizes_E)


def _case(x, w, group_sizes) -> GroupedCase:
    given = f"x {x.dtype}{list(x.shape)}, w {w.dtype}{list(w.shape)}, group_sizes {list(group_sizes.shape)}"
    if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
        raise ValueError(f"grouped_matmul of {given}: needs x [M,K], w [E,K,N] and group_sizes [E]")
    if x.dtype != w.dtype:
        raise ValueError(f"grouped_matmul of {given}: x and w need one dtype")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes are {group_sizes.dtype}; they need int32")
    return GroupedCase(
        dtype=jnp.dtype(x.dtype).name,
        num_rows=x.shape[0],
        num_groups=w.shape[0],
        in_dim=w.shape[1],
        out_dim=w.shape[2],
    )


def _implementation(name: str):
    """A module with `product` and `weight_gradient`: that of an impl, or of Pallas's kernels on "tpu"."""
    # Not at import: Pallas's modules take half a second.
    match name:
        case "pallas":
            from kernels.grouped_matmul import gpu

            return gpu
        case "tpu":
            from kernels.grouped_matmul import tpu

            return tpu
        case _:
            return _IMPLEMENTATIONS[name]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(name: str, x, w, group_sizes):
    return _implementation(name).product(x, w, group_sizes)


def _grouped_matmul_fwd(name: str, x, w, group_sizes):
    return _grouped_matmul(name, x, w, group_sizes), (x, w, group_sizes)


def _grouped_matmul_bwd(name: str, saved, dy):
    x, w, group_sizes = saved
    implementation = _implementation(name)
    dx = implementation.product(dy, w, group_sizes, transpose=True)
    return dx, implementation.weight_gradient(x, dy, group_sizes), None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)
