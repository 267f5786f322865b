"""How near the hardware's limit the calls to the device come: memory in decode, arithmetic in prefill."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from model.cache import scale_bytes
from model.products import stored_bytes
from model.transformer import Definition
from perf.chips import Bandwidth, Peak, peak_bandwidth, peak_flops
from perf.meter import ImplausibleMeasurement
from perf.traffic import Traffic, WeightBytes, decode_mbu, prefill_flops
from serving.executor import CallRecord
from serving.metrics import Metrics


@dataclasses.dataclass
class Totals:
    """Work of the calls so far; take the difference of two for that of a span."""

    decode_bytes: int = 0
    decode_rounds: int = 0
    prefill_flops: int = 0


_WINDOW_SECONDS = 0.25
"""A thread of a busy server learns late that a call ended, by 5 ms (what another may keep the interpreter for) and
more; the next call then seems short. Over this time the device's own pace shows."""


@dataclasses.dataclass
class _Window:
    """Work of several calls and its time, until there is enough of them to divide."""

    amount: int = 0
    seconds: float = 0.0
    calls: int = 0

    def add(self, amount: int, seconds: float, calls: int) -> tuple[int, float, int] | None:
        """What came together, once it is enough."""
        self.amount, self.seconds, self.calls = self.amount + amount, self.seconds + seconds, self.calls + calls
        if self.seconds < _WINDOW_SECONDS:
            return None
        whole = self.amount, self.seconds, self.calls
        self.amount, self.seconds, self.calls = 0, 0.0, 0
        return whole


class UtilizationMeter:
    """Model bandwidth utilisation (MBU) of decode calls and model FLOPs utilisation (MFU) of prefill calls.

    MBU: bytes that a round must read (weights that some token uses, once, as they are held; live keys and values) over
    what the devices' memory could deliver in its time. MFU is a share of the peak of the activations' dtype, whatever
    the products are quantised to. Rounds with drafts are left out: what they must read is a choice.
    """

    def __init__(
        self, definition: Definition, dtype: str, kv_dtype: str, devices: Sequence[jax.Device], metrics: Metrics
    ) -> None:
        itemsize, model = jnp.dtype(dtype).itemsize, definition.config
        self._model, self._metrics, self._count = model, metrics, len(devices)
        stored = weight_bytes(definition)
        self._traffic = Traffic(
            model,
            weight_bytes=itemsize,
            cache_bytes=jnp.dtype(kv_dtype).itemsize,
            scale_bytes=scale_bytes(kv_dtype),
            stored=stored,
        )
        self.bandwidth: Bandwidth = peak_bandwidth(devices[0], local_devices=len(devices))
        self.peak: Peak = peak_flops(devices[0], dtype, local_devices=len(devices))
        self.totals = Totals()
        self._decode, self._prefill = _Window(), _Window()

    def observe(self, records: list[CallRecord]) -> None:
        """Takes in the calls of a step. Raises ImplausibleMeasurement for a utilisation above 1."""
        prefills = [record for record in records if record.cell.drafts is None]
        decodes = [record for record in records if record.cell.drafts is not None and not record.drafts]
        moved, flops = sum(map(self._bytes, decodes)), sum(map(self._flops, prefills))
        self.totals.decode_bytes += moved
        self.totals.decode_rounds += sum(record.rounds for record in decodes)
        self.totals.prefill_flops += flops
        # The host learns when the last call of a step ended, and not when the first did: a step of one kind is timed.
        seconds, count = sum(record.seconds for record in records), len(records)
        if moved and len(decodes) == count and (window := self._decode.add(moved, seconds, count)) is not None:
            mbu = self.mbu(*window)
            if mbu is not None:
                self._metrics.set_mbu(mbu)
        if flops and len(prefills) == count and (window := self._prefill.add(flops, seconds, count)) is not None:
            mfu = self.mfu(*window[:2])
            if mfu is not None:
                self._metrics.set_mfu(mfu)

    def _bytes(self, record: CallRecord) -> int:
        traffic = self._traffic
        if not record.rounds:
            return 0
        weights = traffic.weights() if self._model.moe is None else traffic.weights(record.experts)
        # A row's last token is the round's input: it is not in the cache yet.
        lengths = zip(record.lengths, record.live, strict=True)
        return weights + traffic.cache([length - 1 for length, live in lengths if live])

    def _flops(self, record: CallRecord) -> int:
        return prefill_flops(self._model, record.spans, record.draws)

    def mbu(self, moved: int, seconds: float, rounds: int = 1) -> float | None:
        """Share of the bandwidth; None where it is not known (`bandwidth.reason`)."""
        return decode_mbu(moved, seconds, self.bandwidth, steps=rounds, num_devices=self._count).value

    def mfu(self, flops: int, seconds: float) -> float | None:
        """Share of the peak; None where it is not known (`peak.reason`)."""
        return _share("MFU", flops, seconds, self.peak, self._count)


def weight_bytes(definition: Definition) -> WeightBytes:
    """As the weights are held: quantised ones with their scales."""
    params, biases = definition.abstract
    config, flat = definition.config, traverse_util.flatten_dict(params)
    routed = [leaf for path, leaf in flat.items() if "experts" in path]
    table = () if config.tie_embeddings else flat["embedding", "table"]
    dense = stored_bytes((params, biases)) - stored_bytes(routed) - stored_bytes(table)
    if config.moe is None:
        return WeightBytes(dense, 0)
    return WeightBytes(dense, stored_bytes(routed) // (config.num_moe_layers * config.moe.num_experts))


def _share(name: str, amount: int, seconds: float, peak: Peak, devices: int) -> float | None:
    if peak.value is None or seconds <= 0:
        return None
    share = amount / (seconds * peak.value * devices)
    if share > 1:
        raise ImplausibleMeasurement(
            f"{name} {share:.2f} is above 1: {amount} in {seconds:.6f} s on {devices} devices of {peak.value:.3g}/s "
            f"({peak.source}); the count or the peak is wrong"
        )
    return share
