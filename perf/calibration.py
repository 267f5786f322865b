"""The core's clock by TPU generation, and one scalar each that brings predictions to published steps."""

from __future__ import annotations

import dataclasses

from perf.chips import Chip


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`scale`: seconds that the core takes, over those that the compiler's cycles are at its clock."""

    scale: float
    source: str

    @property
    def sentence(self) -> str:
        return f"core time: the compiler's cycles × {self.scale:.3f} ({self.source})"


# Peak over the FLOPs of a cycle: 4 matrix units of 128 × 128 multiply-adds on each core of v4 (two cores) and v5e, 8 on
# v5p's two cores, 4 of 256 × 256 on v6e. TPU7x's is inferred from what its matrix products are priced at.
_CLOCKS = {"TPU v4": 1.05e9, "TPU v5e": 1.503e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9, "TPU7x": 2.2e9}

_CALIBRATIONS: dict[str, Calibration] = {}


def clock_of(chip: Chip) -> float:
    """Cycles per second of the core. Raises ValueError for a chip without one in the table."""
    if chip.name not in _CLOCKS:
        raise ValueError(f"no clock is known for {chip.name}: predictions from cycles are for {', '.join(_CLOCKS)}")
    return _CLOCKS[chip.name]


def calibration_of(chip: Chip) -> Calibration:
    """The generation's, or none: scale 1, which says so."""
    return _CALIBRATIONS.get(
        chip.name, Calibration(1.0, f"not calibrated on {chip.name}: no published step was compiled")
    )
