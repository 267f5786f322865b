"""Activations that a norm or a gate quantises as it makes them, for the products that read nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.quantized_matmul.activations import rms_norm_quantized, swiglu_quantized
from model.config import ModelConfig
from model.execution import Execution
from parallel.sharding import Placement, map_shards
from quantization.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """An activation [B, T, K] in few bits: a scale for each row, or for each device's part of one where K is split.

    `dtype` is that of the activation before, and of what products of it give.
    """

    quantized: QArray
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.quantized.shape


Activations = jax.Array | Rounded
"""What a projection takes: [B, T, K]."""

_ROWS = ("batch", "sequence")


def readers(x: Activations | tuple[jax.Array, ...], count: int) -> tuple[Activations, ...]:
    """What each of `count` products reads: one activation, or copies of it whose gradients are to come apart."""
    assert not isinstance(x, tuple) or len(x) == count, f"{len(x)} copies for {count} readers"
    return x if isinstance(x, tuple) else (x,) * count


def rows_format(kernel: nnx.Param) -> str | None:
    """Dtype that the product with a kernel rounds its rows to as they come; None where it rounds none of them so."""
    return kernel.get_metadata("format").activation if isinstance(kernel.get_value(), QArray) else None


def made_by(name: str, config: ModelConfig, placement: Placement) -> Literal["norm", "gate"] | None:
    """What quantises the rows that a matrix is multiplied with, by the matrix's name (see `ProductRules.keep`), where
    they are quantised; None for the product itself, in a pass of its own."""
    kind = name.rsplit("/", 1)[-1]
    if kind == "down":
        return "gate" if config.gated_mlp and config.activation == "silu" else None
    if kind not in ("qkv", "gate_up") or config.norm_placement == "post" or placement.axes("act_embed"):
        return None
    # Experts, shared or not, read what the router does, as it is.
    return None if "/shared/" in name or "/experts/" in name else "norm"


def norm_rounded(
    x_BTD: jax.Array, gain_D: jax.Array, *, epsilon: float, offset: float, dtype: str, execution: Execution
) -> Rounded:
    """x / rms(x) · (gain + offset) in x's dtype, and then in `dtype`. Rows must be whole on a device."""
    op = functools.partial(rms_norm_quantized, epsilon=epsilon, offset=offset)
    return _on_shards(op, (x_BTD, gain_D), ((*_ROWS, "act_embed"), ("norm",)), dtype, execution)


def gate_rounded(operands: tuple[jax.Array, ...], *, dtype: str, execution: Execution) -> Rounded:
    """silu(gate) · up in their dtype, and then in `dtype`, of gate and up [B, T, F], or of one array of both."""
    return _on_shards(swiglu_quantized, operands, ((*_ROWS, "act_mlp"),) * len(operands), dtype, execution)


def _on_shards(op: Callable[..., QArray], arrays, axes, dtype: str, execution: Execution) -> Rounded:
    """`op` of each device's part of the arrays, the first of which has the result's logical axes."""

    def local(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        made, rows = op(*parts, dtype=dtype, impl=impl, target=execution.target), parts[0].shape[:-1]
        return made.values.reshape(*rows, made.shape[1]), made.scales.reshape(*rows, 1)

    impl = execution.quantized_activations
    values, scales = map_shards(local, execution.placement, axes, (axes[0], axes[0]))(*arrays)
    return Rounded(QArray(values, scales), arrays[0].dtype)


def flat_rows(x: QArray) -> QArray:
    """[M, K] of [B, T, K]."""
    return QArray(*(field.reshape(-1, field.shape[-1]) for field in (x.values, x.scales)))
