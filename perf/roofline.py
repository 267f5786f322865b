"""Time floors of ops and steps on a chip, and the batch from which decode is bound by compute: predictions, all of it.

The iron law of an op: it takes at least as long as its FLOPs at the chip's peak (compute), at least as long as its
bytes at the memory's bandwidth (data), and each of its kernels has to be started (overhead):

    seconds = max(FLOPs / peak, bytes / bandwidth) + kernels × launch

Its arithmetic intensity is FLOPs over bytes; above the chip's ridge, peak over bandwidth, compute is the longer term.
All FLOPs and bytes are divided evenly over the devices, whatever the mesh, and communication takes no time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Literal

from model.config import ModelConfig
from perf.chips import CHIPS, Chip
from perf.operations import Op, Work, operations, totals

Side = Literal["compute", "memory"]

# What the command line calls the dtypes of perf/chips.py.
COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8", "int8": "int8"}

LAUNCH_SECONDS = 2e-6
LAUNCH_SOURCE = "measured: NVIDIA H100, jax 0.11.2, 2026-11-22: 4 µs a pair of dependent tiny kernels in one program"
# The chips that have the die it was measured on.
_LAUNCH_CHIPS = ("H100 SXM", "H100 PCIe", "H100 NVL", "H200")

# Beyond any batch that is served: a step that is not bound by compute here never is.
_MAX_BATCH = 2**24


def chip_named(name: str) -> Chip:
    """The chip of the table that a user means: its name, its first words or a TPU's without "TPU", in any case.

    "h100" is the first of its forms in the table, the SXM module. Raises ValueError for another, listing the known.
    """
    wanted = _words(name)
    for chip in CHIPS:
        words = _words(chip.name)
        if wanted and (words[: len(wanted)] == wanted or "".join(words) in ("".join(wanted), "tpu" + "".join(wanted))):
            return chip
    known = ", ".join("-".join(_words(chip.name)) for chip in CHIPS)
    raise ValueError(f"unknown chip {name!r}; chips: {known}")


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


@dataclasses.dataclass(frozen=True)
class Machine:
    """`num_devices` JAX devices of a chip that multiply in `dtype` (a name of `Chip.peaks`).

    `launch_seconds`: of one kernel; None where it was not measured, with the reason in `launch_source`, and then it
    is left out of every sum. Raises ValueError for a dtype whose peak is not published.
    """

    chip: Chip
    num_devices: int
    dtype: str
    launch_seconds: float | None
    launch_source: str

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ValueError(f"--devices {self.num_devices} must be at least 1")
        if self.chip.device_peak(self.dtype) is None:
            names = ", ".join(name for name, dtype in COMPUTE_DTYPES.items() if dtype in self.chip.peaks)
            raise ValueError(
                f"no dense {self.dtype} peak is published for {self.chip.name}; set --compute to one of: {names}"
            )

    def peak(self, dtype: str) -> float:
        """FLOP/s of all devices."""
        peak = self.chip.device_peak(dtype)
        assert peak is not None, f"{self.chip.name} has no {dtype}"
        return peak * self.num_devices

    @property
    def bandwidth(self) -> float:
        """Bytes/s of all devices."""
        return self.chip.memory_bandwidth / self.chip.devices_per_chip * self.num_devices

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which both terms are equal."""
        return self.peak(self.dtype) / self.bandwidth

    @property
    def published_memory(self) -> float:
        """Bytes of all devices by the data sheet."""
        return self.chip.memory_bytes / self.chip.devices_per_chip * self.num_devices

    @property
    def usable_memory(self) -> float | None:
        """Bytes of all devices that a program can have, None where no source gives it."""
        usable = self.chip.usable_bytes
        return None if usable is None else usable / self.chip.devices_per_chip * self.num_devices


def machine(chip: Chip, num_devices: int, dtype: str, launch_seconds: float | None = None) -> Machine:
    """With the launch overhead that was measured for the chip, unless one is given."""
    if launch_seconds is not None:
        if not (math.isfinite(launch_seconds) and launch_seconds >= 0):
            raise ValueError(f"--launch-us {launch_seconds * 1e6:g} must be a number of microseconds, at least 0")
        return Machine(chip, num_devices, dtype, launch_seconds, "given by --launch-us")
    if chip.name in _LAUNCH_CHIPS:
        return Machine(chip, num_devices, dtype, LAUNCH_SECONDS, LAUNCH_SOURCE)
    reason = f"not measured on {chip.name}, and left out; give it by --launch-us"
    return Machine(chip, num_devices, dtype, None, reason)


@dataclasses.dataclass(frozen=True)
class Floor:
    """The iron law's terms for one op, in seconds. FLOPs that run count, recomputation included."""

    op: Op
    compute_seconds: float
    data_seconds: float
    overhead_seconds: float
    ridge: float
    """Of the op's dtype, in FLOPs per byte."""

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.data_seconds) + self.overhead_seconds

    @property
    def intensity(self) -> float:
        return self.op.hardware_flops / self.op.num_bytes

    @property
    def side(self) -> Side:
        return "compute" if self.intensity >= self.ridge else "memory"

    @property
    def longest(self) -> str:
        """The term that takes longest: compute, data or overhead."""
        terms = {"compute": self.compute_seconds, "data": self.data_seconds, "overhead": self.overhead_seconds}
        return max(terms, key=terms.__getitem__)


def op_floor(op: Op, on: Machine) -> Floor:
    # Ops that the model keeps in float32 run at that rate, whatever the rest computes in.
    peak = on.peak("float32" if op.dtype == "float32" else on.dtype)
    launches = op.kernels * (on.launch_seconds or 0.0)
    return Floor(op, op.hardware_flops / peak, op.num_bytes / on.bandwidth, launches, peak / on.bandwidth)


@dataclasses.dataclass(frozen=True)
class StepFloor:
    """A step on a machine.

    `bound_seconds`: what no program can beat: the model's FLOPs at the peak, or the bytes that must move (weights, the
    cache and the optimizer's update; `required_bytes`) at full bandwidth, the longer of the two. `op_seconds`: the sum
    over ops, each at its floor, one after the other.
    """

    on: Machine
    floors: tuple[Floor, ...]
    model_flops: int
    required_bytes: int
    model_compute_seconds: float

    @property
    def required_seconds(self) -> float:
        return self.required_bytes / self.on.bandwidth

    @property
    def bound_seconds(self) -> float:
        return max(self.model_compute_seconds, self.required_seconds)

    @property
    def compute_seconds(self) -> float:
        return sum(floor.compute_seconds for floor in self.floors)

    @property
    def data_seconds(self) -> float:
        return sum(floor.data_seconds for floor in self.floors)

    @property
    def overhead_seconds(self) -> float:
        return sum(floor.overhead_seconds for floor in self.floors)

    @property
    def op_seconds(self) -> float:
        return sum(floor.seconds for floor in self.floors)

    @property
    def side(self) -> Side:
        """Of the bound."""
        return "compute" if self.model_compute_seconds >= self.required_seconds else "memory"


def step_floor(config: ModelConfig, work: Work, on: Machine) -> StepFloor:
    ops = operations(config, work)
    total = totals(operations(config, dataclasses.replace(work, remat="none")))
    required = total["weights_bytes"] + total["cache_bytes"]
    # Gradients between products might stay on the chip; the update of every parameter can't.
    required += sum(op.bytes.state for op in ops if op.name == "optimizer")
    compute = sum(op.model_flops / on.peak("float32" if op.dtype == "float32" else on.dtype) for op in ops)
    floors = tuple(op_floor(op, on) for op in ops)
    return StepFloor(on, floors, total["model_flops"], required, compute)


def formula_intensity(
    parameters: float, batch: float, width: int, weight_bytes: float, activation_bytes: float
) -> float:
    """I(B) = 2PB / (P·b + B·d·b): FLOPs per byte of decode for a dense model of P parameters, all read once, and d
    activations per token (`width`, the model's `embed_dim`); b in bytes, of weights and of activations."""
    return 2 * parameters * batch / (parameters * weight_bytes + batch * width * activation_bytes)


def formula_crossing(
    parameters: float, width: int, weight_bytes: float, activation_bytes: float, ridge: float
) -> float | None:
    """The batch B at which I(B) is the ridge; None if I(B), which tends to 2P / (d·b), stays below it."""
    slope = 2 * parameters - ridge * width * activation_bytes
    return ridge * parameters * weight_bytes / slope if slope > 0 else None


def step_crossing(
    config: ModelConfig, work: Work, on: Machine, *, products_only: bool = False
) -> tuple[int | None, float]:
    """(batch, intensity): the smallest decode batch whose FLOPs take as long as its bytes, at the context of `work`,
    and the intensity that the step tends to as the batch grows. The batch is None if there is none.

    All bytes of the step count: weights, cache, activations. `products_only`: of products with weights alone, which is
    where the batch shares bytes: each row's cache is its own.
    """

    @functools.cache
    def sums(batch: int) -> tuple[float, float, float]:
        ops = operations(config, dataclasses.replace(work, batch=batch))
        floors = [op_floor(op, on) for op in ops if not products_only or (op.hardware_flops and op.bytes.weights)]
        intensity = sum(f.op.hardware_flops for f in floors) / sum(f.op.num_bytes for f in floors)
        return sum(f.compute_seconds for f in floors), sum(f.data_seconds for f in floors), intensity

    def bound_by_compute(batch: int) -> bool:
        compute, data, _ = sums(batch)
        return compute >= data

    assert work.mode == "decode"
    limit = sums(_MAX_BATCH)[2]
    # FLOPs grow in proportion to the batch, bytes by less and less per row: once above the bytes, always above.
    return _first(bound_by_compute, _MAX_BATCH), limit


def _first(holds: Callable[[int], bool], last: int) -> int | None:
    """The smallest of 1..last for which it holds, if it holds from there on; None if it holds for none."""
    if not holds(last):
        return None
    low, high = 0, 1
    while not holds(high):
        low, high = high, min(2 * high, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
