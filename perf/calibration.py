"""The core's clock by TPU generation, and one scalar each that brings predictions to published training steps.

The rows are made by benchmarks/prediction.py, which says how; nothing here ran on a TPU but the published steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from perf.chips import Chip

# Peak over the FLOPs of a cycle: 4 matrix units of 128 × 128 multiply-adds on each core of v4 (two cores) and v5e, 8 on
# v5p's two cores, 4 of 256 × 256 on v6e. TPU7x's is inferred from what its matrix products are priced at.
_CLOCKS = {"TPU v4": 1.05e9, "TPU v5e": 1.503e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9, "TPU7x": 2.2e9}


@dataclasses.dataclass(frozen=True)
class Row:
    """A published step beside its parts as predicted before calibration.

    `seconds`: published. `product_seconds`: of products that compute bounds, by the compiler's estimate;
    `other_seconds`: the rest of what the core does, and its waiting for collectives and copies; `attention_seconds`: of
    Pallas kernels, at an assumed share of the peak. `fitted`: it sets the generation's scalar, and is not held out.
    """

    chip: str
    name: str
    source: str
    seconds: float
    product_seconds: float
    other_seconds: float
    attention_seconds: float
    fitted: bool

    def predicted(self, scale: float) -> float:
        return self.product_seconds * scale + self.other_seconds + self.attention_seconds

    def error(self, scale: float) -> float:
        """Of the prediction, as a share of the published step."""
        return self.predicted(scale) / self.seconds - 1


def fit(rows: Sequence[Row]) -> float:
    """The scale of the products' time at which predictions are neither longer nor shorter than published on average:
    the mean logarithm of their ratio is 0."""
    low, high = 0.1, 10.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        longer = sum(math.log(row.predicted(middle) / row.seconds) for row in rows) > 0
        low, high = (low, middle) if longer else (middle, high)
    return math.sqrt(low * high)


_V4, _V5E, _V5P = (
    f"AI-Hypercomputer/maxtext@e591f30 src/maxtext/configs/tpu/{generation}/README.md"
    for generation in ("v4", "v5e", "v5p")
)
_V6E = "AI-Hypercomputer/tpu-recipes@c8cfe2f training/trillium/{}/README.md"
_8B, _70B = _V6E.format("Llama3.1-8B-MaxText/v6e-256"), _V6E.format("Llama2-70B-MaxText")

# Of jax 0.10.2 with libtpu 0.0.42.1, 2026-11-23. On v6e the published 70B step hid its reductions by options that its
# row was compiled without: 2.5 s of its `other_seconds` are waiting for collectives.
# fmt: off
ROWS = (
    Row("TPU v5e", "16B, v5e:16x16, 6 × 2048 a chip", _V5E, 10.275, 9.686, 1.147, 0.614, True),
    Row("TPU v5e", "32B, v5e:16x16, 4 × 2048 a chip", _V5E, 12.119, 13.206, 1.48, 0.409, True),
    Row("TPU v5e", "64B, v5e:16x16, 2 × 2048 a chip", _V5E, 13.472, 12.068, 2.378, 0.409, False),
    Row("TPU v4", "22B, v4:4x4x4, 13 × 2048 a chip", _V4, 23.715, 17.807, 2.757, 1.072, True),
    Row("TPU v4", "52B, v4:4x4x12, 7 × 2048 a chip", _V4, 29.607, 22.057, 4.09, 0.513, False),
    Row("TPU v5p", "32B, v5p:4x4x4, 6 × 2048 a chip", _V5P, 7.299, 6.036, 0.785, 0.263, True),
    Row("TPU v5p", "64B, v5p:4x4x4, 3 × 2048 a chip", _V5P, 7.389, 6.135, 1.297, 0.263, False),
    Row("TPU v6e", "Llama 3.1 8B, v6e:16x16, 4 × 8192 a chip", _8B, 4.546, 3.432, 0.763, 0.703, True),
    Row("TPU v6e", "Llama 2 70B, v6e:16x16, 2 × 4096 a chip", _70B, 9.052, 7.81, 3.136, 0.439, False),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`scale`: seconds that products take, over those that the compiler's cycles are at the core's clock."""

    scale: float
    source: str

    @property
    def sentence(self) -> str:
        return f"products bound by compute: the compiler's cycles × {self.scale:.3f} ({self.source})"


def clock_of(chip: Chip) -> float:
    """Cycles per second of the core. Raises ValueError for a chip without one in the table."""
    if chip.name not in _CLOCKS:
        raise ValueError(f"no clock is known for {chip.name}: predictions from cycles are for {', '.join(_CLOCKS)}")
    return _CLOCKS[chip.name]


@functools.cache
def rows_of(chip: str) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if row.chip == chip)


def calibration_of(chip: Chip) -> Calibration:
    """The generation's, or none: scale 1, which says so."""
    fitted = [row for row in rows_of(chip.name) if row.fitted]
    if not fitted:
        return Calibration(1.0, f"not calibrated on {chip.name}: no published step of it was compiled")
    scale = fit(fitted)
    held = [row.error(scale) for row in rows_of(chip.name) if not row.fitted]
    errors = (
        f"off by {' and '.join(f'{error:+.0%}' for error in held)} on {len(held)} held out" if held else "none held out"
    )
    return Calibration(scale, f"fitted on {len(fitted)} published training step{'s'[: len(fitted) > 1]}, {errors}")
