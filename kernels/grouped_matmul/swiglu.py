"""The experts' feed-forward whole: three grouped products with SwiGLU between, on Hopper in kernels that do both."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.debug import check_group_sizes
from kernels.grouped_matmul import GroupedCase, Impl, choose, grouped_matmul
from kernels.grouped_matmul.tiles import ROW_ALIGNMENT
from kernels.target import Target, default_target


def grouped_swiglu(
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    *,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """y_MD: (silu(x gate) · (x up)) down, of each group of rows with its own three matrices.

    Rows past the sum of the group sizes give zeros, and take and give no gradient. x gate and x up are rounded to the
    dtype of the inputs, as three calls of `grouped_matmul` would round them, and so is their product with silu, once.
    With "pallas" on Hopper the elementwise steps are part of the products' kernels, forward and backward, and dx is
    summed over gate and up before it is rounded (a step of moe-1b on an H100: 90.3 ms, 93.8 with XLA between); anything
    else is those three calls with XLA between.

    Args:
      x_MD, gate_EDF, up_EDF, down_EFD: one dtype: bfloat16, float16 or float32.
      group_sizes_E, impl, target: as of `grouped_matmul`.

    Raises ValueError for shapes or dtypes that disagree and for an `impl` that is unknown or can't run.
    """
    case = _case(x_MD, gate_EDF, up_EDF, down_EFD, group_sizes_E)
    check_group_sizes("grouped_swiglu", group_sizes_E, case.num_rows)
    target = default_target() if target is None else target
    impl, _ = choose(impl, case, target)
    if impl == "pallas" and target.platform == "gpu" and case.num_rows:
        with jax.named_scope("grouped_swiglu"):
            padding = -case.num_rows % ROW_ALIGNMENT
            x = jnp.pad(x_MD, ((0, padding), (0, 0))) if padding else x_MD
            return _fused(x, gate_EDF, up_EDF, down_EFD, group_sizes_E)[: case.num_rows]

    def product(x, w):
        return grouped_matmul(x, w, group_sizes_E, impl=impl, target=target)

    return product(jax.nn.silu(product(x_MD, gate_EDF)) * product(x_MD, up_EDF), down_EFD)


def _case(x, gate, up, down, group_sizes) -> GroupedCase:
    arrays = {"x": x, "gate": gate, "up": up, "down": down}
    given = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
    shape = gate.shape
    if gate.ndim != 3 or up.shape != shape or down.shape != (shape[0], shape[2], shape[1]) or x.shape[1:] != shape[1:2]:
        raise ValueError(f"grouped_swiglu of {given}: needs x [M,D], gate and up [E,D,F], down [E,F,D]")
    if group_sizes.shape != shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"grouped_swiglu: group_sizes are {group_sizes.dtype}{list(group_sizes.shape)}; int32 [E] needed"
        )
    if len({array.dtype for array in arrays.values()}) > 1:
        raise ValueError(f"grouped_swiglu of {given}: all need one dtype")
    return GroupedCase(jnp.dtype(x.dtype).name, x.shape[0], shape[0], shape[1], shape[2])


@jax.custom_vjp
def _fused(x, gate, up, down, group_sizes):
    from kernels.grouped_matmul import gpu, gpu_gated

    (hidden,) = gpu_gated.hidden(x, gate, up, group_sizes, with_parts=False)
    return gpu.product(hidden, down, group_sizes)


def _fused_fwd(x, gate, up, down, group_sizes):
    from kernels.grouped_matmul import gpu, gpu_gated

    hidden, x_gate, x_up = gpu_gated.hidden(x, gate, up, group_sizes, with_parts=True)
    y = gpu.product(hidden, down, group_sizes)
    return y, (x, gate, up, down, group_sizes, hidden, x_gate, x_up)


def _fused_bwd(saved, dy):
    from kernels.grouped_matmul import gpu, gpu_gated

    x, gate, up, down, group_sizes, hidden, x_gate, x_up = saved
    d_gate, d_up = gpu_gated.hidden_gradient(dy, down, x_gate, x_up, group_sizes)
    dx = gpu_gated.summed_product(d_gate, gate, d_up, up, group_sizes)
    # Gate's and up's in one launch were slower on an H100 (jax 0.11.2): 713 and 732 us beside 660 and 708.
    weights = [(x, d_gate), (x, d_up), (hidden, dy)]
    return dx, *(gpu.weight_gradient(*operands, group_sizes) for operands in weights), None


_fused.defvjp(_fused_fwd, _fused_bwd)
