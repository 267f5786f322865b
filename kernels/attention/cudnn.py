"""Attention by cuDNN's fused kernels, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from kernels.target import Target

if TYPE_CHECKING:
    from kernels.attention import AttentionCase


def unsupported(case: AttentionCase, target: Target) -> str | None:
    """Why cuDNN can't compute exactly this; None where it can.

    Segments: JAX's public function takes sequence lengths or a whole mask, which costs more than the kernel saves.
    The packed layout underneath it needs a static bound on documents per row, is private, and in JAX 0.10.2
    offsets keys by query heads, which is wrong for grouped heads.
    Log-sum-exp: JAX rounds it to the dtype of the inputs and drops its gradient.
    """
    capability = target.compute_capability
    if target.platform != "gpu" or capability is None:
        return f"cuDNN needs an NVIDIA GPU, and the target is {target}"
    if capability < (8, 0):
        return f"cuDNN's attention needs compute capability 8.0, and the target is {target}"
    if case.dtype not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16 and float16, not {case.dtype}"
    widest = 256 if capability >= (9, 0) else 128
    if case.key_dim % 8 or case.key_dim > widest:
        return f"cuDNN's attention needs a head width of at most {widest}, a multiple of 8, not {case.key_dim}"
    if case.value_dim != case.key_dim:
        return f"JAX passes cuDNN only equal key and value widths, not {case.key_dim} and {case.value_dim}"
    if case.causal and case.query_length != case.kv_length:
        return f"causal cuDNN attention is used for equal lengths, not {case.query_length} and {case.kv_length}"
    if case.window is not None and not case.causal:
        return "cuDNN's sliding window looks back only, so it needs causal"
    features = {
        "segments": case.segments,
        "positions": case.positions,
        "a soft cap": case.soft_cap,
        "sinks": case.sinks,
        "the log-sum-exp in float32": case.return_lse,
    }
    missing = [name for name, used in features.items() if used]
    return f"cuDNN through JAX has no {' or '.join(missing)}" if missing else None


def attention(q_BTNH, k_BSKH, v_BSKH, *, scale: float, causal: bool, window: int | None) -> jax.Array:
    """out_BTNH; the call must be one that `unsupported` has nothing against."""
    # JAX's left window leaves out the token itself; ours counts it.
    back = None if window is None or window >= k_BSKH.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=causal, local_window_size=back, implementation="cudnn"
    )
