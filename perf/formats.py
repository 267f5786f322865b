"""Number formats of weights and of cached keys and values, and the bytes that tensors take in them, scales included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from model.config import ModelConfig
from perf.flops import layer_linears, layer_vectors

SCALE_BITS = 16


@dataclasses.dataclass(frozen=True)
class Format:
    """`bits` per element; a scale of `scale_bits` for each `group` elements of the axis that a product sums over.

    `group` None: one scale for the whole of that axis. `scale_bits` 0: no scales.
    """

    name: str
    bits: int
    scale_bits: int = 0
    group: int | None = None

    @property
    def vector_bytes(self) -> int:
        """Bytes per element of norms, biases and sinks, which stay at 16 bits or more."""
        return max(self.bits, 16) // 8

    def matrix(self, inputs: int, outputs: int) -> int:
        """Bytes of a weight [inputs, outputs]."""
        return outputs * self.vector(inputs)

    def vector(self, width: int) -> int:
        """Bytes of `width` elements that share scales among themselves only: a column, or a head of a cached key."""
        groups = 1 if self.group is None else math.ceil(width / self.group)
        return math.ceil((width * self.bits + groups * self.scale_bits) / 8)

    def without_scales(self) -> Format:
        return dataclasses.replace(self, scale_bits=0, group=None)


def _formats(*formats: Format) -> Mapping[str, Format]:
    return MappingProxyType({item.name: item for item in formats})


# int8 and fp8: a scale per output channel. int4: per 128 inputs of each output (AWQ, arXiv 2306.00978, and GPTQ).
WEIGHTS = _formats(
    Format("fp32", 32),
    Format("bf16", 16),
    Format("fp8", 8, SCALE_BITS),
    Format("int8", 8, SCALE_BITS),
    Format("int4", 4, SCALE_BITS, 128),
)
# A scale per token and head, in float32 where the server has the format (kernels.paged_attention.quantize).
CACHE = _formats(
    Format("fp32", 32),
    Format("bf16", 16),
    Format("fp8", 8, 32),
    Format("int8", 8, 32),
    Format("int4", 4, SCALE_BITS),
)


def cache_token_bytes(config: ModelConfig, cache: Format) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * config.num_kv_heads * cache.vector(config.head_dim)


def stored_weight_bytes(config: ModelConfig, weights: Format, router_bytes: int = 4) -> int:
    """Bytes of every parameter at rest: all experts, a tied embedding once, the router in float32."""
    tables = 1 if config.tie_embeddings else 2
    total = tables * weights.matrix(config.embed_dim, config.vocab_size) + config.embed_dim * weights.vector_bytes
    for layer in range(config.num_layers):
        total += layer_vectors(config, layer) * weights.vector_bytes
        for op in layer_linears(config, layer):
            size = op.inputs * op.outputs * router_bytes if op.op == "router" else weights.matrix(op.inputs, op.outputs)
            total += size * op.copies
    if config.moe is not None and config.moe.router_bias:
        total += config.num_moe_layers * config.moe.num_experts * router_bytes
    return total
