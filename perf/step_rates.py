"""Rates of train steps for perf/step_model.py: measured on an H100, assumed elsewhere, and said which."""

from __future__ import annotations

from types import MappingProxyType

from perf.chips import Chip
from perf.roofline import LAUNCH_SECONDS
from perf.step_model import Rates

MEASURED_CHIP, MEASURED_DTYPE = "H100 SXM", "bfloat16"

_H100_PEAK = 989.4e12
_H100_BANDWIDTH = 3350e9

# From a trace of dense-1b's step, unrolled, nothing recomputed, 8 rows of 2048 tokens (NVIDIA H100 80GB HBM3, jax
# 0.11.2, 2026-11-23, four steps): 177.1 ms in kernels of products (95% of what a product of 8192³ reached alone), 28.2
# in those of attention, 48.7 in fused elementwise kernels, which are taken to move what perf/operations.py counts.
_H100_PRODUCTS, _H100_ATTENTION, _H100_MEMORY = 711e12, 341e12, 2.6e12
# Each on one row of benchmarks/results/train_h100.json; what else is in that file, dense-1b's own step too, is held
# out: see tests/perf/test_perf_gpu_step.py. That of pallas by the kernels alone, with moe-1b's sizes: 371 us for each
# of its three products, on average. Steps measured since (benchmarks/results/moe_1b_h100.json): 93.8 ms where 93 was
# predicted, 90.3 with SwiGLU in the kernels, 84.3 of them on the device, which spends 40.4 (643 TFLOP/s) in these.
_H100_GROUPED = MappingProxyType({"pallas": 648e12, "capacity": 475e12, "ragged_dot": 75e12, "loop": 48e12})
# That file's copy of 2 GiB.
_H100_COPY = 2.92e12

# Of the links' rate, in large collectives inside of a host, and of the time of parameters' collectives that runs beside
# compute: assumed, since no step on several devices has been measured here.
_LINK_SHARE = 0.8
_OVERLAP = 0.7

# Of 23.5 k such values of a token and layer of dense-1b, of 2 or 4 bytes: fitted on the 41.5 GiB of its unrolled step.
_H100_KEPT = 0.35
# TPU's compiler keeps all of them in float32: dense-1b, scanned, v5e:2x2, 143 kB a token and layer with the products'
# results (libtpu 0.0.42.1: 5.5 GiB of temporaries for each row of 2048 tokens).
_TPU_KEPT = 4.0

# A TPU's shares of its peaks, to choose what is compiled: products as the compiler prices one of 8192³ on v5e (88%),
# less for the others; an elementwise sum's share of the bandwidth on v5e and v6e (81%). Attention in XLA: assumed.
_TPU_PRODUCTS, _TPU_ATTENTION, _TPU_MEMORY = 0.8, 0.35, 0.81
# A mesh axis has one of the torus axes: both directions of it are half of the links of a 2-dimensional torus.
_TPU_LINK = 0.5
# As predicted from programs of dense-1b over 64 and 256 chips of v5e: 65% of their gathers and reductions are exposed.
_TPU_OVERLAP = 0.35


def step_rates(chip: Chip, dtype: str) -> Rates:
    """Rates of one JAX device that multiplies in `dtype`. Raises ValueError where the chip has no peak in it."""
    peak = chip.device_peak(dtype)
    if peak is None:
        raise ValueError(
            f"no dense {dtype} peak is published for {chip.name}; set precision.compute to one of: "
            f"{', '.join(sorted(chip.peaks))}"
        )
    link, network = (
        0.0 if rate is None else rate / chip.devices_per_chip
        for rate in (chip.scale_up_bandwidth, chip.scale_out_bandwidth)
    )
    bandwidth = chip.memory_bandwidth / chip.devices_per_chip
    if chip.name.startswith("TPU"):
        return Rates(
            products=_TPU_PRODUCTS * peak,
            attention=_TPU_ATTENTION * peak,
            memory=_TPU_MEMORY * bandwidth,
            copy=_TPU_MEMORY * bandwidth,
            link=_TPU_LINK * link,
            between_slices=network,
            overlap=_TPU_OVERLAP,
            launch=0.0,
            kept_elementwise_bytes=_TPU_KEPT,
            grouped=MappingProxyType({"ragged_dot": _TPU_PRODUCTS * peak, "capacity": _TPU_PRODUCTS * peak}),
            source=f"assumed shares of {chip.name}'s peaks: they choose what is compiled, and give no figure",
        )
    scale = peak / _H100_PEAK
    measured = chip.name == MEASURED_CHIP and dtype == MEASURED_DTYPE
    return Rates(
        products=_H100_PRODUCTS * scale,
        attention=_H100_ATTENTION * scale,
        memory=_H100_MEMORY * bandwidth / _H100_BANDWIDTH,
        copy=_H100_COPY * bandwidth / _H100_BANDWIDTH,
        link=_LINK_SHARE * link,
        between_slices=network,
        overlap=_OVERLAP,
        launch=LAUNCH_SECONDS,
        kept_elementwise_bytes=_H100_KEPT,
        grouped=MappingProxyType({name: rate * scale for name, rate in _H100_GROUPED.items()}),
        source=(
            "measured on one H100 SXM in bfloat16: kernels in a trace of dense-1b's step, and steps of "
            "benchmarks/results/train_h100.json"
            if measured
            else f"shares of the peaks that an H100 SXM reaches in bfloat16, applied to {chip.name} in {dtype}, where "
            "nothing was measured"
        ),
    )
