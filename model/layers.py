"""Norm, embedding and dense feed-forward."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.norm import NormCase, add_rms_norm, choose, supports
from kernels.target import default_target
from model.config import Activation, ModelConfig
from model.execution import Execution
from model.parameter import Creator, Magnitudes, normal, ones, zeros
from model.products import magnitudes_of, multiply, multiply_rounded
from model.rounded import Activations, Rounded, gate_rounded, norm_rounded, readers, rows_format
from parallel.sharding import constrain, map_shards
from quantization.qarray import QArray

_ROWS = ("batch", "sequence", "act_embed")


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, or · (1 + scale) when zero-centered."""

    def __init__(self, width: int, config: ModelConfig, create: Creator):
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_zero_centered else 0.0
        self.scale = create("scale", (width,), ("norm",), zeros if config.norm_zero_centered else ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        return add_rms_norm(x, None, self.scale[...], **self._how, impl="xla")[1]

    def add(
        self,
        x_BTD: jax.Array,
        residual_BTD: jax.Array | None,
        uses: int,
        execution: Execution,
        narrow_DE: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """x + residual, or x without one, and its norm once for each of its readers, as `add_rms_norm` has them. What
        reads x later should read this sum. The norm's product with a narrow matrix besides, where a kernel makes it on
        the way; None where who needs it multiplies."""
        impl, fused = self._choose(x_BTD, residual_BTD, uses, execution, narrow_DE)
        op = functools.partial(add_rms_norm, **self._how, uses=uses, impl=impl, target=execution.target)
        # XLA spreads its own steps over the mesh.
        placement = execution.placement if impl == "pallas" else None
        narrow = narrow_DE if fused else None
        products = ((*_ROWS[:2], None),) if fused else ()
        run = map_shards(op, placement, (_ROWS, _ROWS, ("norm",), (None, None)), (*(_ROWS,) * (1 + uses), *products))
        total_BTD, *results = run(x_BTD, residual_BTD, self.scale[...], narrow)
        return total_BTD, tuple(results[:uses]), results[-1] if fused else None

    def _choose(
        self,
        x_BTD: jax.Array,
        residual_BTD: jax.Array | None,
        uses: int,
        execution: Execution,
        narrow_DE: jax.Array | None,
    ) -> tuple[str, bool]:
        """Concrete implementation for what a device has of the rows, and whether it takes the narrow matrix."""
        placement, num_rows = execution.placement, x_BTD.shape[0] * x_BTD.shape[1]
        if placement is not None:
            if placement.axes("act_embed"):
                if execution.norm == "pallas":
                    axes = placement.rules.act_embed
                    raise ValueError(
                        f"kernels.norm='pallas' needs whole rows, and rules.act_embed={axes} splits them; set it to "
                        "None, or kernels.norm to 'auto'"
                    )
                return "xla", False
            num_rows //= placement.size("batch") * placement.size("sequence")
        case = NormCase(x_BTD.dtype.name, num_rows, x_BTD.shape[-1], residual_BTD is not None, uses)
        target = default_target() if execution.target is None else execution.target
        impl, _ = choose(execution.norm, case, target)
        if impl != "pallas" or narrow_DE is None:
            return impl, False
        case = dataclasses.replace(case, num_columns=narrow_DE.shape[1])
        if execution.norm == "pallas":
            return impl, supports(impl, case, target) is None
        return impl, choose(execution.norm, case, target)[0] == impl

    @property
    def _how(self) -> dict[str, float]:
        return {"epsilon": self.epsilon, "offset": self.offset}

    @jax.named_scope("rms_norm")
    def into(self, x_BTD: jax.Array, dtype: str | None, execution: Execution) -> Activations:
        """As a call, and then in a few-bit `dtype` if there is one and rows are whole on a device."""
        if dtype is None or (execution.placement is not None and execution.placement.axes("act_embed")):
            return self(x_BTD)
        # The gain as it is held: to widen it would be a launch of its own before the kernel's.
        return norm_rounded(x_BTD, self.scale[...], **self._how, dtype=dtype, execution=execution)


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
        x_BTD = _rows(self.table.shape[0], table_VD, tokens_BT)
        if self.scale is not None:
            x_BTD = x_BTD * jnp.asarray(self.scale, x_BTD.dtype)
        return constrain(x_BTD, execution.placement, "batch", "sequence", "act_embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(vocab_size: int, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the table [B, T, D], whose gradient is added up in float32 and rounded once.

    Sums in bfloat16 stop growing where a token is frequent, and a GPU has no addition to one in memory: the gradient of
    16384 tokens as frequent as words takes an H100 10.4 ms in bfloat16, 2% off, and 0.15 ms so; of tokens that are all
    as frequent 0.27 and 0.16 ms.
    """
    return jnp.take(table_VD, tokens_BT, axis=0)


def _rows_forward(vocab_size, table_VD, tokens_BT):
    return _rows(vocab_size, table_VD, tokens_BT), tokens_BT


def _rows_backward(vocab_size, tokens_BT, dx_BTD):
    table_VD = jax.ShapeDtypeStruct((vocab_size, dx_BTD.shape[-1]), jnp.float32)
    (dtable_VD,) = jax.linear_transpose(lambda table: jnp.take(table, tokens_BT, axis=0), table_VD)(
        dx_BTD.astype(jnp.float32)
    )
    return dtable_VD.astype(dx_BTD.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    if activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


class MLP(nnx.Module):
    """Feed-forward [D] -> [F] -> [D], gated (SwiGLU, GeGLU) or plain."""

    def __init__(self, mlp_dim: int, config: ModelConfig, create: Creator):
        embed_dim, stddev = config.embed_dim, config.init_stddev
        self.activation = config.activation
        self.gated, bias = config.gated_mlp, config.mlp_bias
        self.joined = create.joined and self.gated
        if self.joined:
            self.gate_up = create("gate_up", (embed_dim, 2 * mlp_dim), ("embed", "mlp"), normal(stddev))
            self.gate_up_bias = create("gate_up_bias", (2 * mlp_dim,), ("mlp",), zeros) if bias else None
        else:
            self.up = create("up", (embed_dim, mlp_dim), ("embed", "mlp"), normal(stddev))
            self.gate = create("gate", (embed_dim, mlp_dim), ("embed", "mlp"), normal(stddev)) if self.gated else None
            self.up_bias = create("up_bias", (mlp_dim,), ("mlp",), zeros) if bias else None
            self.gate_bias = create("gate_bias", (mlp_dim,), ("mlp",), zeros) if bias and self.gated else None
        self.down = create("down", (mlp_dim, embed_dim), ("mlp", "embed"), normal(residual_stddev(config)))
        self.down_bias = create("down_bias", (embed_dim,), ("norm",), zeros) if bias else None

        projections = ("gate_up",) if self.joined else ("up", "gate") if self.gated else ("up",)
        self.magnitudes = magnitudes_of(create, *projections, "down")

    @property
    def rows_format(self) -> str | None:
        """Dtype that what is read may be quantised to already."""
        return rows_format(self.gate_up if self.joined else self.up)

    @property
    def num_reads(self) -> int:
        """How many products read what comes."""
        return 2 if self.gated and not self.joined else 1

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Activations | tuple[jax.Array, ...], execution: Execution) -> jax.Array:
        hidden_BTF = self._hidden(self._project(x_BTD, execution), execution)
        magnitudes = self.magnitudes.get("down")
        y_BTD = project("btf,fd->btd", hidden_BTF, self.down, self.down_bias, execution, magnitudes)
        return constrain(y_BTD, execution.placement, "batch", "sequence", "act_embed")

    def _project(self, x_BTD: Activations | tuple[jax.Array, ...], execution: Execution) -> tuple[jax.Array, ...]:
        """Gate and up, both in one array where they are joined; up alone where there is no gate."""
        reads = iter(readers(x_BTD, self.num_reads))

        def product(name: str, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            return project("btd,df->btf", next(reads), kernel, bias, execution, self.magnitudes.get(name))

        if self.joined:
            return (product("gate_up", self.gate_up, self.gate_up_bias),)
        up_BTF = product("up", self.up, self.up_bias)
        return (product("gate", self.gate, self.gate_bias), up_BTF) if self.gated else (up_BTF,)

    def _hidden(self, projected: tuple[jax.Array, ...], execution: Execution) -> Activations:
        """[B, T, F] of what `_project` gives, quantised where `down` takes it so and the op has the activation."""
        dtype = rows_format(self.down)
        if dtype is not None and self.gated and self.activation == "silu":
            return gate_rounded(projected, dtype=dtype, execution=execution)
        if self.gated:
            gate_BTF, up_BTF = jnp.split(projected[0], 2, axis=-1) if self.joined else projected
            hidden_BTF = activate(gate_BTF, self.activation) * up_BTF
        else:
            hidden_BTF = activate(projected[0], self.activation)
        return constrain(hidden_BTF, execution.placement, "batch", "sequence", "act_mlp")


def project(
    equation: str,
    x: Activations,
    kernel: nnx.Param,
    bias: nnx.Param | None,
    execution: Execution,
    magnitudes: Magnitudes | None = None,
) -> jax.Array:
    """Product of x with a kernel, in x's dtype; the unit accumulates in float32.

    `equation` is that of an einsum which contracts the last axes of x with the first ones of the kernel, several of
    the kernel's perhaps as one. The result of a kernel that is held quantised has one axis for all outputs.
    """
    operands, result = equation.split("->")
    kernel_axes = operands.split(",")[1]
    inputs = sum(axis not in result for axis in kernel_axes)
    if isinstance(kernel.get_value(), QArray):
        flat = x if isinstance(x, Rounded) else x.reshape(*x.shape[: x.ndim - inputs], -1)
        return multiply(flat, kernel, None if bias is None else bias[...], execution)
    weight = kernel[...].astype(x.dtype)
    if weight.ndim > len(kernel_axes):
        weight = weight.reshape(*x.shape[-inputs:], -1)
    if kernel.get_metadata("format") is None:
        y = jnp.einsum(equation, x, weight)
    else:
        y = multiply_rounded(x, weight, inputs, execution, magnitudes)
    return y if bias is None else y + bias[...].astype(x.dtype)


def residual_stddev(config: ModelConfig) -> float:
    """Projections that write to the residual stream start smaller, so that its variance does not grow with depth
    (GPT-2: 1/sqrt of the number of additions)."""
    return config.init_stddev * (2 * config.num_layers) ** -0.5
