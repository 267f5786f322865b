"""What fits in memory: bytes of weights and of a request's keys and values, and how many requests there is room for."""

from __future__ import annotations

import dataclasses

from model.config import ModelConfig
from perf.flops import layer_linears
from perf.formats import Format, cache_token_bytes, stored_weight_bytes
from perf.operations import Work, step_ledger


def request_bytes(config: ModelConfig, length: int, cache: Format) -> int:
    """Keys and values of `length` tokens in every layer. Layers with a window keep all of them too, as the server's
    pages do."""
    return config.num_layers * length * cache_token_bytes(config, cache)


def largest_batch(memory: float, weight_bytes: float, bytes_per_request: float) -> int:
    """Requests whose keys and values fit beside the weights; 0 if not even the weights fit."""
    return max(int((memory - weight_bytes) // bytes_per_request), 0)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a step keeps in all devices together. Scratch of the compiled program is not among them.

    `activations`: what the backward pass keeps at least, 0 when serving.
    """

    weights: int
    cache: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.state + self.activations


def memory_need(config: ModelConfig, work: Work) -> Need:
    if work.mode == "train":
        return Need(0, 0, work.state.kept(config), kept_activations(config, work))
    length = work.length + (1 if work.mode == "decode" else 0)
    cache = work.batch * request_bytes(config, length, work.cache)
    return Need(stored_weight_bytes(config, work.weights), cache, 0, 0)


def kept_activations(config: ModelConfig, work: Work) -> int:
    """Bytes that the backward pass of a train step needs of the forward pass, at least: the input of each layer, and
    the results of products that are not recomputed. (That of the last is the next layer's input but for an addition.)
    """
    recomputed = step_ledger(config, work).recomputed
    elements = config.num_layers * config.embed_dim
    for layer in range(config.num_layers):
        for op in layer_linears(config, layer):
            if op.op not in recomputed and not op.op.endswith("down"):
                elements += op.uses * op.outputs
    return elements * work.tokens * work.activation_bytes
