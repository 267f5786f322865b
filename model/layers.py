"""Norm, embedding and dense feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import Activation, ModelConfig
from model.execution import Execution
from model.parameter import Creator, normal, ones, zeros
from model.products import multiply, multiply_rounded
from parallel.sharding import constrain
from quantization.qarray import QArray


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, or · (1 + scale) when zero-centered."""

    def __init__(self, width: int, config: ModelConfig, create: Creator):
        self.epsilon = config.norm_epsilon
        self.zero_centered = config.norm_zero_centered
        self.scale = create("scale", (width,), ("norm",), zeros if self.zero_centered else ones)

    @jax.named_scope("rms_norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        # fp32: a bfloat16 sum of squares loses the small terms, and this error multiplies the whole residual stream.
        # XLA's own launches: a Hopper kernel of the residual sum and its norm in one launch gained nothing (8
        # layers of llama3-8b on an H100, ms of decode with it and without: 1.662 and 1.661 for 1 row, 1.699 and 1.691
        # for 8, 2.403 and 2.401 for 128, 3.142 and 3.125 for 256). The factor taken after the product slows that.
        wide = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32) + (1.0 if self.zero_centered else 0.0)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype)


class Embedding(nnx.Module):
    """Token table [V, D]; also the LM head where embeddings are tied."""

    def __init__(self, config: ModelConfig, create: Creator):
        shape = (config.vocab_size, config.embed_dim)
        self.scale = config.embedding_scale
        self.table = create("table", shape, ("vocab", "embed"), normal(config.init_stddev))

    @jax.named_scope("embed")
    def __call__(self, tokens_BT: jax.Array, execution: Execution) -> jax.Array:
        # The table is gathered over its embed axis first: a lookup in a table split over the axis that splits the
        # batch makes GSPMD replicate the activations instead.
        table_VD = self.table[...].astype(execution.precision.compute)
        table_VD = constrain(table_VD, execution.placement, "vocab", None)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        if self.scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.scale, x_BTD.dtype)
        return constrain(x_BTD, execution.placement, "batch", "sequence", "act_embed")


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    if activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


class MLP(nnx.Module):
    """Feed-forward [D] -> [F] -> [D], gated (SwiGLU, GeGLU) or plain."""

    def __init__(self, mlp_dim: int, config: ModelConfig, create: Creator):
        embed_dim, stddev = config.embed_dim, config.init_stddev
        self.activation = config.activation
        gated, bias = config.gated_mlp, config.mlp_bias
        self.joined = create.joined and gated
        if self.joined:
            self.gate_up = create("gate_up", (embed_dim, 2 * mlp_dim), ("embed", "mlp"), normal(stddev))
            self.gate_up_bias = create("gate_up_bias", (2 * mlp_dim,), ("mlp",), zeros) if bias else None
        else:
            self.up = create("up", (embed_dim, mlp_dim), ("embed", "mlp"), normal(stddev))
            self.gate = create("gate", (embed_dim, mlp_dim), ("embed", "mlp"), normal(stddev)) if gated else None
            self.up_bias = create("up_bias", (mlp_dim,), ("mlp",), zeros) if bias else None
            self.gate_bias = create("gate_bias", (mlp_dim,), ("mlp",), zeros) if bias and gated else None
        self.down = create("down", (mlp_dim, embed_dim), ("mlp", "embed"), normal(residual_stddev(config)))
        self.down_bias = create("down_bias", (embed_dim,), ("norm",), zeros) if bias else None

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: jax.Array, execution: Execution) -> jax.Array:
        gate_BTF, up_BTF = self._project(x_BTD, execution)
        if gate_BTF is None:
            hidden_BTF = activate(up_BTF, self.activation)
        else:
            hidden_BTF = activate(gate_BTF, self.activation) * up_BTF
        hidden_BTF = constrain(hidden_BTF, execution.placement, "batch", "sequence", "act_mlp")
        y_BTD = project("btf,fd->btd", hidden_BTF, self.down, self.down_bias, execution)
        return constrain(y_BTD, execution.placement, "batch", "sequence", "act_embed")

    def _project(self, x_BTD: jax.Array, execution: Execution) -> tuple[jax.Array | None, jax.Array]:
        """Gate, None where there is none, and up."""
        if self.joined:
            both_BTF = project("btd,df->btf", x_BTD, self.gate_up, self.gate_up_bias, execution)
            gate_BTF, up_BTF = jnp.split(both_BTF, 2, axis=-1)
            return gate_BTF, up_BTF
        up_BTF = project("btd,df->btf", x_BTD, self.up, self.up_bias, execution)
        gate_BTF = None if self.gate is None else project("btd,df->btf", x_BTD, self.gate, self.gate_bias, execution)
        return gate_BTF, up_BTF


def project(equation: str, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None, execution: Execution) -> jax.Array:
    """Product of x with a kernel, in x's dtype; the unit accumulates in float32.

    `equation` is that of an einsum which contracts the last axes of x with the first ones of the kernel, several of
    the kernel's perhaps as one. The result of a kernel that is held quantised has one axis for all outputs.
    """
    operands, result = equation.split("->")
    kernel_axes = operands.split(",")[1]
    inputs = sum(axis not in result for axis in kernel_axes)
    if isinstance(kernel.get_value(), QArray):
        flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
        return multiply(flat, kernel, None if bias is None else bias[...], execution)
    weight = kernel[...].astype(x.dtype)
    if weight.ndim > len(kernel_axes):
        weight = weight.reshape(*x.shape[-inputs:], -1)
    if kernel.get_metadata("format") is None:
        y = jnp.einsum(equation, x, weight)
    else:
        y = multiply_rounded(x, weight, inputs, execution)
    return y if bias is None else y + bias[...].astype(x.dtype)


def residual_stddev(config: ModelConfig) -> float:
    """Projections that write to the residual stream start smaller, so that its variance does not grow with depth
    (GPT-2: 1/sqrt of the number of additions)."""
    return config.init_stddev * (2 * config.num_layers) ** -0.5
