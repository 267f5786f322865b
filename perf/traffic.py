"""Bytes that a serving step must move, and FLOPs that a prefill needs, from the configuration and the batch alone.

A decode step multiplies few tokens by all weights: memory bandwidth bounds it, and `decode_mbu` says how near it came.
Its numerator is what no implementation can avoid: each weight that some token of the batch uses, read once; the live
keys and values of each row; the keys and values of the new tokens, written. Activations and logits are left out, and so
are the rows of the embedding table that are looked up: `embed_dim` elements per token, beside billions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from model.config import ModelConfig
from perf.chips import Bandwidth
from perf.flops import causal_pairs, layer_linears, layer_vectors, matmul_parameters, pair_flops
from perf.meter import ImplausibleMeasurement


class WeightBytes(NamedTuple):
    """Bytes of the weights that a step must read, where their elements are of several sizes."""

    dense: int
    """Of all that every step reads: without routed experts, and without the embedding unless it is the head too."""
    expert: int
    """Of one routed expert of one layer; 0 without experts."""


class Traffic:
    """Bytes that a forward step over a paged cache must move, over all devices together.

    `weight_bytes`, `cache_bytes`, `router_bytes`: bytes per element of the weights, of the keys and values, and of the
    router, which the model keeps in float32. `scale_bytes`: of the scale beside each head's key and value, where those
    are quantised. `stored` takes the place of what follows from the bytes of an element where the weights are
    quantised. Made once per model; every call is arithmetic on a few integers.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        weight_bytes: int,
        cache_bytes: int,
        router_bytes: int = 4,
        scale_bytes: int = 0,
        stored: WeightBytes | None = None,
    ) -> None:
        for name, value in (
            ("weight_bytes", weight_bytes),
            ("cache_bytes", cache_bytes),
            ("router_bytes", router_bytes),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1, the bytes of one element")
        if stored is None:
            expert = 0 if config.moe is None else _expert_elements(config) * weight_bytes
            stored = WeightBytes(_dense_bytes(config, weight_bytes, router_bytes), expert)
        self._dense, self._expert = stored
        self._num_experts = 0 if config.moe is None else config.num_moe_layers * config.moe.num_experts
        self._token = 2 * config.num_kv_heads * (config.head_dim * cache_bytes + scale_bytes)
        windows = Counter(config.window(layer) for layer in range(config.num_layers))
        self._full_layers = windows.pop(None, 0)
        self._local_layers = tuple((window, layers) for window, layers in windows.items() if window is not None)
        self._num_layers = config.num_layers

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self._num_layers * self._token

    def weights(self, experts: int | None = None) -> int:
        """Bytes of the weights that a step must read: every layer's, the final norm and the LM head, tied or not.

        `experts`: pairs (layer, expert) that at least one token of the batch was sent to; None for a model without
        experts. The router and the shared expert are always read.
        """
        assert (experts is not None or not self._num_experts) and 0 <= (experts or 0) <= self._num_experts, (
            f"{experts} pairs of layer and expert, of {self._num_experts}"
        )
        return self._dense + (experts or 0) * self._expert

    def cache(self, lengths: Iterable[int], new: int = 1) -> int:
        """Bytes of keys and values that a step moves for rows with `lengths` tokens in the cache before it.

        The cached tokens that a new one attends to are read: all, or in a layer with window W the last W - 1, since
        the new token is one of the W. Each row's `new` tokens (1, or with drafts to verify more) are written.
        """
        rows = tuple(lengths)
        tokens = self._full_layers * sum(rows) + self._num_layers * new * len(rows)
        for window, layers in self._local_layers:
            tokens += layers * sum([min(length, window - 1) for length in rows])
        return tokens * self._token

    def step(self, lengths: Iterable[int], experts: int | None = None, new: int = 1) -> int:
        """Bytes of one step: `weights` and `cache`."""
        return self.weights(experts) + self.cache(lengths, new)


def _dense_bytes(config: ModelConfig, weight_bytes: int, router_bytes: int) -> int:
    """What every step reads: all but the routed experts and the embedding look-up."""
    weights = config.embed_dim * (config.vocab_size + 1)
    router = 0
    for layer in range(config.num_layers):
        weights += layer_vectors(config, layer)
        for op in layer_linears(config, layer):
            if op.op == "router":
                router += op.inputs * op.outputs
            elif not op.is_routed:
                weights += op.inputs * op.outputs * op.copies
    if config.moe is not None and config.moe.router_bias:
        router += config.num_moe_layers * config.moe.num_experts
    return weights * weight_bytes + router * router_bytes


def _expert_elements(config: ModelConfig) -> int:
    """Weights of one routed expert of one layer."""
    layer = config.num_layers - 1
    return sum(op.inputs * op.outputs for op in layer_linears(config, layer) if op.is_routed)


@dataclasses.dataclass(frozen=True)
class BandwidthUtilization:
    """Share of the memory bandwidth that a step used, and what it is made of. `value` is None exactly if `reason` says
    why. `num_bytes` is the numerator, of all devices during `seconds`."""

    name: str
    value: float | None
    reason: str | None
    num_bytes: int
    seconds: float
    num_devices: int
    bandwidth: Bandwidth


def decode_mbu(
    num_bytes: int, seconds: float, bandwidth: Bandwidth, *, steps: int = 1, num_devices: int = 1
) -> BandwidthUtilization:
    """Bytes of `steps` decode steps (`Traffic.step`, summed) over what `num_devices` devices move in `seconds`.

    No value where the bandwidth is unknown, and where bytes may have come from caches on the chip, which keep up to
    `bandwidth.cache_bytes` from step to step: if all of them fit, or if they exceed the bandwidth by no more than that.

    Raises ValueError for a time or count that is not positive, ImplausibleMeasurement for a share above 1.
    """
    if not (math.isfinite(seconds) and seconds > 0) or min(num_bytes, steps, num_devices) < 1:
        raise ValueError(
            f"{num_bytes} bytes in {seconds} s for {steps} steps on {num_devices} devices; give the bytes and the wall "
            "seconds of one decode step or more, all above 0"
        )
    result = functools.partial(
        BandwidthUtilization,
        "decode_mbu",
        num_bytes=num_bytes,
        seconds=seconds,
        num_devices=num_devices,
        bandwidth=bandwidth,
    )
    if bandwidth.value is None:
        return result(value=None, reason=bandwidth.reason)
    possible = seconds * num_devices * bandwidth.value
    cached = steps * num_devices * (bandwidth.cache_bytes or 0)
    if num_bytes <= cached:
        return result(
            value=None,
            reason=f"the {num_bytes:,} bytes of {steps} steps need not come from memory: caches can keep {cached:,}",
        )
    if num_bytes <= possible:
        return result(value=num_bytes / possible, reason=None)
    if num_bytes - cached <= possible:
        return result(
            value=None,
            reason=f"{num_bytes / possible:.3g} of the bandwidth: up to {cached:,} of the {num_bytes:,} bytes came "
            "from caches, and not from memory",
        )
    raise ImplausibleMeasurement(
        f"decode_mbu={num_bytes / possible:.4g} is above 1: {num_bytes:,} bytes in {seconds:.4g} s on {num_devices} "
        f"devices of {bandwidth.value:.4g} bytes/s ({bandwidth.source}); check that a step is timed until the device "
        "has finished, the device count, and the bytes per element of weights and cache"
    )


class _PrefillWork(NamedTuple):
    """FLOPs of a token outside attention and LM head, of a token in the LM head, of a pair in attention of one layer;
    and the windows with the number of layers that have them."""

    token: int
    sampled: int
    pair: int
    windows: tuple[tuple[int | None, int], ...]


@functools.lru_cache(maxsize=8)
def _prefill_work(config: ModelConfig) -> _PrefillWork:
    head = config.embed_dim * config.vocab_size
    windows = Counter(config.window(layer) for layer in range(config.num_layers))
    # Two products: q·k and p·v.
    pair = 2 * pair_flops(config)
    return _PrefillWork(2 * (matmul_parameters(config) - head), 2 * head, pair, tuple(windows.items()))


def prefill_flops(config: ModelConfig, spans: Iterable[tuple[int, int]], sampled: int) -> int:
    """Model FLOPs of computing tokens [start, start + count) of sequences, given as pairs (start, count).

    Each token attends to all earlier ones of its sequence and itself, windows exactly. `sampled` counts the positions
    whose logits are wanted: the LM head runs for those alone. Capacity dispatch counts as if it dropped nothing.
    """
    work = _prefill_work(config)
    flops = work.sampled * sampled
    for start, count in spans:
        flops += work.token * count
        for window, layers in work.windows:
            pairs = causal_pairs(start + count, window) - causal_pairs(start, window)
            flops += work.pair * layers * pairs
    return flops
