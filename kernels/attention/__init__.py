"""Scaled dot-product attention with grouped heads, masks, soft cap and sinks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.attention import cudnn, float8, reference, tiles, tpu_tiles, xla
from kernels.choice import by_name
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "xla", "cudnn", "pallas"]

# What "auto" takes on a GPU: the first of these that can compute the case, and else xla. Each with its measurement, on
# an H100: benchmarks/results/attention_h100.json.
_PREFERRED: tuple[tuple[Impl, str], ...] = (
    (
        "pallas",
        "fastest measured on an H100 (TFLOP/s of heads of 128: causal forward, T 1024 to 4096, 468 to 598, cuDNN 366 "
        "to 519; with gradients, T 8192, causal 550, cuDNN 497, full 591, cuDNN 527)",
    ),
    ("cudnn", "fastest measured on an H100 of what takes the case"),
)
# (of keys, of values), where pallas is that, forward alone and with the backward pass. Elsewhere cuDNN is: at 256 with
# 627 TFLOP/s forward and 423 with the backward pass (pallas 593 and 418), at 80 and 96 with 337 and 380 with the
# backward pass (pallas 306 and 353; at 80 another time 339 and 340).
_FORWARD_FASTEST = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128))
_BOTH_FASTEST = ((64, 64), (128, 128), (192, 128))


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """The static facts of one call: shapes (of one shard, where sharded), dtype, and which features it uses."""

    dtype: str
    query_length: int
    kv_length: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool = True
    window: int | None = None
    segments: bool = False
    positions: bool = False
    soft_cap: bool = False
    sinks: bool = False
    return_lse: bool = False
    gradient: bool = False
    """Its backward pass is asked for too."""

    @property
    def float8(self) -> bool:
        return self.dtype == float8.DTYPE

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32", "float64", float8.DTYPE):
            raise ValueError(f"attention of {self.dtype}: use bfloat16, float16, float32 or {float8.DTYPE}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"attention of {self.num_heads} query heads and {self.num_kv_heads} kv heads: "
                "the number of query heads must be a multiple of the number of kv heads"
            )
        if self.float8 and self.gradient:
            raise ValueError(float8.NO_GRADIENT)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 (a token sees itself), or None for no window")


def supports(impl: Impl, case: AttentionCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "cudnn":
            return cudnn.unsupported(case, target)
        case "pallas":
            return (tpu_tiles if target.platform == "tpu" else tiles).unsupported(case, target)
        case _:
            raise ValueError(f"attention impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def choose(impl: Impl, case: AttentionCase, target: Target) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it; "auto" is decided here.

    Raises ValueError, with the reason, for a named implementation that can't run.
    """
    if impl != "auto":
        return by_name("attention", impl, supports(impl, case, target))
    if target.platform == "tpu":
        return "xla", "pallas has been compiled for TPU, and not measured there"
    if target.platform != "gpu":
        return "xla", f"the only fast implementation for {target.platform}"
    if case.float8:
        reason = supports("pallas", case, target)
        if reason is None:
            return "pallas", "nothing else multiplies float8 operands; 824-870 TFLOP/s on an H100 (heads of 128)"
        return "xla", f"of the dequantised operands; pallas can't: {reason}"
    reasons = []
    for preferred, measured in _PREFERRED if _pallas_is_fastest(case) else _PREFERRED[::-1]:
        reason = supports(preferred, case, target)
        if reason is None:
            return preferred, measured
        reasons.append(f"{preferred} can't: {reason}")
    return "xla", "; ".join(reasons)


def _pallas_is_fastest(case: AttentionCase) -> bool:
    """Of two that take the case. Without a causal mask pallas is faster with the backward pass, where that was measured
    (heads of 128, T 8192: 591 TFLOP/s, cuDNN 527), and cuDNN's forward is as fast or faster (599-674, pallas 601-627).
    With a window of 1,024 of 8,192 tokens cuDNN's backward pass is faster (302, pallas 235)."""
    widths = (case.key_dim, case.value_dim)
    windowed = case.gradient and case.window is not None and case.window < case.kv_length
    fastest = _BOTH_FASTEST if case.gradient else _FORWARD_FASTEST
    masked = case.causal or (case.gradient and widths == (128, 128))
    return widths in fastest and masked and not windowed


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_scale: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    impl: Impl = "auto",
    target: Target | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale · q·k, over the keys a query sees) · v, for N query heads sharing K kv heads (N a multiple of K).

    A query sees a key unless one of these forbids it:
      - causal: the key's position is after the query's;
      - window W: their positions are W or more apart (so causal: itself and the W - 1 before it);
      - segments: their segment numbers differ, or either is 0 (padding).
    A query that sees nothing gives zeros, and zero gradients.

    Args:
      q_BTNH, k_BSKH, v_BSKH: one dtype: bfloat16, float16, float32 or float8_e4m3fn. The last width of v may differ
        from H.
      scale: factor on q·k.
      q_segments, kv_segments: int32 [B, T] and [B, S]; kv_segments may be left out where T = S, and equals q_segments.
      q_positions, kv_positions: int32 [B, T] and [B, S], for causal and window; left out, the index in the row.
        Packed documents need none: within a segment, index and position order tokens alike. Giving them costs the
        static knowledge of which keys lie in the future, so those are computed and masked.
      soft_cap: positive; scores become soft_cap · tanh(score / soft_cap), before masking. On Hopper the tanh is one
        instruction of the hardware, off by up to 2**-11 of itself.
      sinks: float32 [N], a logit per head that joins every softmax of the head and carries no value (gpt-oss).
      q_scale, k_scale, v_scale: of float8 operands, and of those alone: float32 [B, N], [B, K] and [B, K], as
        `float8.quantize_heads` gives with them. The result is bfloat16, and has no gradient.
      impl: "auto" chooses for `target`, as `choose` does; a named one that can't run raises.
      target: device kind; None for the default device. Read only where `impl` depends on it.
      return_lse: also return the log of the softmax's normaliser (sinks included), float32 [B, T, N], -inf for a
        query that sees nothing and has no sink. It is differentiable.

    Returns out_BTNH in q's dtype (v's width), with lse_BTN if asked.

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that can't run.
    """
    case = _case(q_BTNH, k_BSKH, v_BSKH, causal, window, q_segments, q_positions, soft_cap, sinks, return_lse)
    # Whether a caller differentiates can't be known here: what "auto" chooses can be.
    case = dataclasses.replace(case, gradient=impl == "auto" and not case.float8)
    scales = _scales(case, q_BTNH.shape[0], q_scale, k_scale, v_scale)
    q_segments, kv_segments = _pair("segments", q_segments, kv_segments, q_BTNH, k_BSKH)
    q_positions, kv_positions = _pair("positions", q_positions, kv_positions, q_BTNH, k_BSKH)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive, or None for no cap")
    if sinks is not None and sinks.shape != (case.num_heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; it needs one logit per query head, ({case.num_heads},)")
    if impl in ("auto", "cudnn", "pallas"):
        target = default_target() if target is None else target
        impl, _ = choose(impl, case, target)
    with jax.named_scope("attention"):
        match impl:
            case "cudnn":
                return cudnn.attention(q_BTNH, k_BSKH, v_BSKH, scale=scale, causal=causal, window=window)
            case "reference" | "xla" | "pallas":
                arguments = {"scale": scale, "causal": causal, "window": window, "soft_cap": soft_cap}
                marks = {
                    "q_segments": q_segments,
                    "kv_segments": kv_segments,
                    "q_positions": q_positions,
                    "kv_positions": kv_positions,
                    "sinks": sinks,
                }
                run = functools.partial(_implementation(impl, case, target), **arguments)
                if case.float8:
                    out, lse = float8.without_gradient(run, q_BTNH, k_BSKH, v_BSKH, scales, marks)
                else:
                    out, lse = run(q_BTNH, k_BSKH, v_BSKH, **marks)
                return (out, lse) if return_lse else out
            case _:
                raise ValueError(f"attention impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def _implementation(
    impl: Impl, call: AttentionCase, target: Target | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """What gives (out, lse)."""
    match impl:
        case "reference":
            return float8.dequantized(reference.attention, jnp.float32) if call.float8 else reference.attention
        case "xla":
            return float8.dequantized(xla.attention, jnp.bfloat16) if call.float8 else xla.attention
    # Not at import: Pallas's modules take half a second, and only Hopper or a TPU needs its own.
    if target is not None and target.platform == "tpu":
        from kernels.attention import tpu

        return tpu.attention
    from kernels.attention import gpu

    return functools.partial(gpu.forward if call.float8 else gpu.attention, tiles=tiles.choose_tiles(call))


def _scales(case: AttentionCase, batch: int, *scales):
    """All three, or None where the operands are not float8. ValueError for others."""
    names = ("q_scale", "k_scale", "v_scale")
    given = [name for name, scale in zip(names, scales, strict=True) if scale is not None]
    if not case.float8:
        if given:
            raise ValueError(f"{given[0]} was given with {case.dtype} operands; scales belong to {float8.DTYPE} ones")
        return None
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"attention of {case.dtype} was given no {missing[0]}; it needs {', '.join(names)}")
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    for name, scale, count in zip(names, scales, heads, strict=True):
        if scale.shape != (batch, count) or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {scale.dtype}{list(scale.shape)}; it needs a float32 number for each row and head, "
                f"[{batch}, {count}]"
            )
    return scales


def _case(q, k, v, causal, window, q_segments, q_positions, soft_cap, sinks, return_lse) -> AttentionCase:
    given = f"q {q.dtype}{list(q.shape)}, k {k.dtype}{list(k.shape)}, v {v.dtype}{list(v.shape)}"
    if any(array.ndim != 4 for array in (q, k, v)):
        raise ValueError(f"attention of {given}: each needs four axes, [batch, tokens, heads, width]")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of {given}: all three need one dtype")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention of {given}: needs q [B,T,N,H], k [B,S,K,H], v [B,S,K,any width]")
    return AttentionCase(
        dtype=jnp.dtype(q.dtype).name,
        query_length=q.shape[1],
        kv_length=k.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        causal=causal,
        window=window,
        segments=q_segments is not None,
        positions=q_positions is not None,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
        return_lse=return_lse,
    )


def _pair(name: str, q_side, kv_side, q, k):
    """Both sides of segments or positions, the second defaulting to the first. ValueError unless [B, T] and [B, S]."""
    if q_side is None:
        if kv_side is not None:
            raise ValueError(f"kv_{name} was given without q_{name}; give both")
        return None, None
    if kv_side is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"q_{name} was given without kv_{name}, and {q.shape[1]} queries are not {k.shape[1]} keys; "
                f"give kv_{name}"
            )
        kv_side = q_side
    if q_side.shape != q.shape[:2] or kv_side.shape != k.shape[:2]:
        raise ValueError(
            f"q_{name} {list(q_side.shape)} and kv_{name} {list(kv_side.shape)}: "
            f"they need [batch, tokens] of q and k, {list(q.shape[:2])} and {list(k.shape[:2])}"
        )
    return q_side, kv_side
