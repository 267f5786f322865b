"""Dispatch of tokens to rows that are sorted by expert, and the weighted sums of what comes back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.choice import by_name
from kernels.dispatch import reference, tiles
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class DispatchCase:
    """The static facts of one call: dtype, tokens (of one shard, where sharded), length of their rows, how many
    places a token has, and whether its sum is rounded to their dtype."""

    dtype: str
    num_tokens: int
    width: int
    per_token: int
    rounded: bool = True


def supports(impl: Impl, case: DispatchCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return tiles.unsupported(case, target)
        case _:
            raise ValueError(f"dispatch impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def choose(impl: Impl, case: DispatchCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it. Raises ValueError for a named one that can't run."""
    if impl == "auto":
        if target.platform != "gpu":
            return "xla", f"the only implementation for {target.platform}"
        if (reason := tiles.unsupported(case, target)) is not None:
            return "xla", f"pallas can't: {reason}"
        if not tiles.beats_xla(case):
            return "xla", "pallas was measured for 16384 tokens and more with 2 rows of 1024"
        return "pallas", "fastest measured on an H100 (16384 tokens, 2 rows of 1024: 40 us, back 65; XLA 53 and 85)"
    return by_name("dispatch", impl, supports(impl, case, target))


def expand(
    x_ND: jax.Array,
    sorted_M: jax.Array,
    place_M: jax.Array,
    *,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Row of each sorted assignment [M, D]; assignment n · A + a is of token n. Its gradient adds up a token's rows in
    float32.

    Args:
      x_ND: [N, D], float. sorted_M: int32, the assignment at each sorted place. place_M: its inverse permutation, the
        place of each assignment; M is A · N.
      impl: "auto", "xla" (as "reference") or "pallas" (Hopper); a named one that can't run raises.
      target: device kind; None for the default device.

    Raises ValueError for shapes that disagree and for an `impl` that is unknown or can't run.
    """
    per_token = _check("expand", x_ND.shape, sorted_M, place_M)
    return _expand((_chosen(x_ND, per_token, impl, target), per_token), x_ND, sorted_M, place_M)


def combine(
    y_MD: jax.Array,
    weights_NA: jax.Array,
    sorted_M: jax.Array,
    place_M: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Weighted sum of each token's rows [N, D], added up in float32 and rounded once to `out_dtype`. "pallas" is of its
    gradients, for sums in y's dtype; other arguments as of `expand`."""
    shape = (weights_NA.shape[0], y_MD.shape[-1])
    _check("combine", shape, sorted_M, place_M)
    if y_MD.shape[:1] != place_M.shape or weights_NA.ndim != 2 or weights_NA.size != place_M.size:
        given = f"y {list(y_MD.shape)}, weights {list(weights_NA.shape)} and {place_M.size} places"
        raise ValueError(f"combine of {given}: needs y [A · N, D] and weights [N, A]")
    rounded = jnp.dtype(out_dtype) == y_MD.dtype
    impl = _chosen(jax.ShapeDtypeStruct(shape, y_MD.dtype), weights_NA.shape[1], impl, target, rounded)
    return _combine((impl, jnp.dtype(out_dtype)), y_MD, weights_NA, sorted_M, place_M)


def _check(name: str, shape: tuple[int, ...], sorted_M: jax.Array, place_M: jax.Array) -> int:
    """Places of a token, 1 where there are no tokens."""
    if len(shape) != 2 or sorted_M.shape != place_M.shape or place_M.ndim != 1 or place_M.size % max(shape[0], 1):
        given = f"{list(shape)} with {list(sorted_M.shape)} sorted assignments and {list(place_M.shape)} places"
        raise ValueError(f"{name} of {given}: needs [N, D] and A · N of both")
    return place_M.size // shape[0] if shape[0] else 1


def _chosen(x_ND, per_token: int, impl: Impl, target: Target | None, rounded: bool = True) -> Impl:
    case = DispatchCase(jnp.dtype(x_ND.dtype).name, *x_ND.shape, per_token, rounded)
    if impl in ("auto", "pallas"):
        target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    return impl if case.num_tokens and per_token else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(statics: tuple[Impl, int], x_ND: jax.Array, sorted_M: jax.Array, place_M: jax.Array) -> jax.Array:
    impl, per_token = statics
    if impl == "pallas":
        # Not at import: Pallas's modules take half a second.
        from kernels.dispatch import gpu

        return gpu.expand(x_ND, place_M)
    return reference.expand(x_ND, sorted_M, per_token)


def _expand_forward(statics, x_ND, sorted_M, place_M):
    return _expand(statics, x_ND, sorted_M, place_M), place_M


def _expand_backward(statics, place_M, dy_MD):
    # XLA's at 3.05 TB/s on an H100.
    return reference.expand_gradient(dy_MD, place_M, statics[1]), None, None


_expand.defvjp(_expand_forward, _expand_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(statics: tuple[Impl, jnp.dtype], y_MD, weights_NA, sorted_M, place_M) -> jax.Array:
    # XLA adds a residual and takes the next norm's squares on the way, at 3.07 TB/s on an H100.
    return reference.combine(y_MD, weights_NA, place_M).astype(statics[1])


def _combine_forward(statics, y_MD, weights_NA, sorted_M, place_M):
    return _combine(statics, y_MD, weights_NA, sorted_M, place_M), (y_MD, weights_NA, sorted_M, place_M)


def _combine_backward(statics, saved, dy_ND):
    y_MD, weights_NA, sorted_M, place_M = saved
    if statics[0] == "pallas":
        from kernels.dispatch import gpu

        wide_NA = weights_NA.astype(jnp.float32)
        dy_MD, d_weights_NA = gpu.combine_gradients(dy_ND, y_MD, wide_NA, place_M)
        d_weights_NA = d_weights_NA.astype(weights_NA.dtype)
    else:
        dy_MD, d_weights_NA = reference.combine_gradients(dy_ND, y_MD, weights_NA, sorted_M, place_M)
    return dy_MD, d_weights_NA, None, None


_combine.defvjp(_combine_forward, _combine_backward)
