"""A step at the rates that single ops have reached on a chip, where they were measured: nearer to a clock than peaks.

Only what was measured has a figure: one chip so far, products in bfloat16, and weights in three formats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from perf.operations import Op, Work
from perf.roofline import Floor, StepFloor


@dataclasses.dataclass(frozen=True)
class Reached:
    """FLOP/s of products, of experts' grouped products and of attention (recomputation inside of its kernel counted),
    bytes/s of copies and, by format, of the weights of products with few rows."""

    dtype: str
    products: float
    grouped: float
    attention_forward: float
    attention_train: float
    memory: float
    weights: Mapping[str, float]
    source: str


# The best of XLA and cuDNN: 8192³, causal attention of 4 × 4096 tokens, and one row times 8192 × 28672 weights. Ours, a
# day later (benchmarks/results/): experts' products and gradients with moe-1b's sizes, and weights of few bits.
_H100 = Reached(
    dtype="bfloat16",
    products=786e12,
    grouped=684e12,
    attention_forward=548e12,
    attention_train=454e12,
    memory=2.98e12,
    weights=MappingProxyType({"bf16": 3.01e12, "int8": 2.77e12, "int4": 2.49e12}),
    source="measured: NVIDIA H100 80GB HBM3, jax 0.11.2, 2026-11-22 and 23, each op alone",
)
REACHED = MappingProxyType({"H100 SXM": _H100})


@dataclasses.dataclass(frozen=True)
class ReachedStep:
    """A step, op after op, in seconds. Without a value only `reason` is set, else only `source`."""

    seconds: float | None
    compute_seconds: float | None
    data_seconds: float | None
    source: str | None
    reason: str | None


def reached_step(step: StepFloor, work: Work) -> ReachedStep:
    """The sum over ops of max(FLOPs / reached, bytes / reached) + launches."""
    on = step.on
    rates = REACHED.get(on.chip.name)
    reason = None
    if rates is None:
        reason = f"the rates that ops reach were not measured on {on.chip.name}; measured: {', '.join(REACHED)}"
    elif on.dtype != rates.dtype:
        reason = f"the rates that ops reach on {on.chip.name} were measured in {rates.dtype}, not in {on.dtype}"
    elif work.weights.name not in rates.weights:
        reason = (
            f"the rate at which {on.chip.name} reads {work.weights.name} weights was not measured; measured: "
            f"{', '.join(rates.weights)}"
        )
    if rates is None or reason is not None:
        return ReachedStep(None, None, None, None, reason)
    terms = [_op_terms(floor, work, rates, step) for floor in step.floors]
    seconds = sum(max(compute, data) for compute, data in terms) + step.overhead_seconds
    compute, data = (sum(term[index] for term in terms) for index in (0, 1))
    return ReachedStep(seconds, compute, data, rates.source, None)


def _op_terms(floor: Floor, work: Work, rates: Reached, step: StepFloor) -> tuple[float, float]:
    """(compute, data) seconds. A product in float32 reaches the share of its own peak that others do of theirs."""
    op, num_devices = floor.op, step.on.num_devices
    share = _flop_rate(op, work, rates) * num_devices / step.on.peak(rates.dtype)
    weights = op.bytes.weights / rates.weights[work.weights.name]
    others = (op.num_bytes - op.bytes.weights) / rates.memory
    return floor.compute_seconds / share, (weights + others) / num_devices


def _flop_rate(op: Op, work: Work, rates: Reached) -> float:
    if op.name in ("attention", "qk", "pv"):
        return rates.attention_train if work.mode == "train" else rates.attention_forward
    return rates.grouped if op.name.startswith("expert_") else rates.products
