"""What a step compiled for a TPU slice will take, and where its time goes: a prediction from its scheduled HLO.

Instructions run one after another on the core, in the compiler's order, loops as often as they turn; asynchronous
copies and collectives run beside them from their start, and what is left of them at their done is exposed. The core's
time is the compiler's own estimate in cycles, times one scalar per TPU generation (perf/calibration.py); collectives
are priced by perf/interconnect.py. Not in it: contention for memory between copies and the core, jitter, the host.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from perf.calibration import Calibration, calibration_of, clock_of
from perf.chips import Chip
from perf.hlo import Module
from perf.interconnect import Network
from perf.schedule import Category, Spent, Transfer, Wait, Walk


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step of one device, predicted. Categories sum to `step_seconds`; `flops` are those of the program, with what
    it recomputes; `assumptions` are sentences to print beside any of it."""

    step_seconds: float
    categories: Mapping[Category, float]
    transfers: tuple[Transfer, ...]
    waits: tuple[Wait, ...]
    spent: tuple[Spent, ...]
    flops: float
    peak: float
    calibration: Calibration
    assumptions: tuple[str, ...]

    @property
    def exposed_seconds(self) -> float:
        return sum(one.exposed_seconds for one in self.transfers)

    @property
    def hidden_seconds(self) -> float:
        return sum(one.hidden_seconds for one in self.transfers)

    @property
    def exposed_by_axis(self) -> dict[str, float]:
        """Exposed seconds by mesh axis; a collective over several counts for "a × b"."""
        return self._by_axis("exposed_seconds")

    @property
    def hidden_by_axis(self) -> dict[str, float]:
        return self._by_axis("hidden_seconds")

    @property
    def collective_bytes(self) -> dict[str, float]:
        """By kind."""
        found: dict[str, float] = collections.defaultdict(float)
        for one in self.transfers:
            found[one.kind] += one.num_bytes
        return dict(sorted(found.items()))

    @property
    def hfu(self) -> float:
        """The program's FLOPs over the peak."""
        return self.flops / self.step_seconds / self.peak

    def mfu(self, model_flops: float) -> float:
        """Of `model_flops`: FLOPs of one device in the step without recomputation. Raises ValueError above 1."""
        share = model_flops / self.step_seconds / self.peak
        if share > 1:
            raise ValueError(
                f"a predicted step of {self.step_seconds:.4g} s would be {share:.0%} MFU: {model_flops:.4g} FLOPs "
                "can't be done in it, so that the prediction is wrong; give the FLOPs of one device, not of all"
            )
        return share

    def losing(self, count: int = 5) -> tuple[Spent, ...]:
        """Instructions that lose most against their own floor."""
        return tuple(sorted(self.spent, key=lambda one: one.lost_seconds, reverse=True)[:count])

    def _by_axis(self, field: str) -> dict[str, float]:
        found: dict[str, float] = collections.defaultdict(float)
        for one in self.transfers:
            found[" × ".join(one.axes) or "none"] += getattr(one, field)
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "prediction: nothing ran",
            "step_seconds": self.step_seconds,
            "categories_seconds": dict(self.categories),
            "exposed_seconds_by_axis": self.exposed_by_axis,
            "hidden_seconds_by_axis": self.hidden_by_axis,
            "collective_bytes": self.collective_bytes,
            "transfers": [dataclasses.asdict(one) for one in self.transfers],
            "losing": [dataclasses.asdict(one) | {"lost_seconds": one.lost_seconds} for one in self.losing()],
            "program_flops": self.flops,
            "hfu": self.hfu,
            "calibration": dataclasses.asdict(self.calibration),
            "assumptions": list(self.assumptions),
        }


def predict(
    module: Module,
    *,
    chip: Chip,
    mesh: Mapping[str, int],
    network: Network,
    dtype: str = "bfloat16",
    calibration: Calibration | None = None,
) -> Prediction:
    """Of one device of a program for TPU, or for several slices. `mesh`: sizes by axis, in the mesh's order; `network`:
    its devices in that order. `calibration`: by default the chip generation's own.

    Raises ValueError for a program without estimates (one for a GPU or a CPU), for a mesh of another size than the
    program's, and for a prediction above the chip's peak.
    """
    slices = len({place.slice for place in network.places})
    sizes = {math.prod(mesh.values()), len(network.places)}
    # A program for several slices has the partitions of one, or of all where none of it is between slices.
    if sizes not in ({module.num_devices}, {module.num_devices * slices}):
        raise ValueError(
            f"mesh {dict(mesh)} and a network of {len(network.places)} devices are given for {module.name}, a program "
            f"of {module.num_devices} devices; give those that it was compiled for"
        )
    if all(one.estimated_cycles is None for _, one in module.instructions()):
        raise ValueError(
            f"program {module.name} has no estimated cycles: only TPU's compiler writes them; "
            "compile it for a TPU slice"
        )
    peak = chip.device_peak(dtype)
    if peak is None:
        raise ValueError(f"no dense {dtype} peak is published for {chip.name}; published: {', '.join(chip.peaks)}")
    calibration = calibration_of(chip) if calibration is None else calibration
    walk = Walk(module, chip, mesh, network, peak, clock_of(chip), calibration.scale)
    seconds = walk.run(module.entry_computation, 1)
    prediction = Prediction(
        step_seconds=seconds,
        categories=walk.categories,
        transfers=tuple(walk.transfers.values()),
        waits=tuple(walk.waits),
        spent=tuple(walk.spent.values()),
        flops=sum(one.flops for one in walk.spent.values()),
        peak=peak,
        calibration=calibration,
        assumptions=_assumptions(walk, seconds, calibration),
    )
    if prediction.hfu > 1:
        raise ValueError(
            f"program {module.name}: {prediction.flops:.4g} FLOPs in a predicted step of {seconds:.4g} s would be "
            f"{prediction.hfu:.0%} of {chip.name}'s peak: something in its text was not understood"
        )
    return prediction


def _assumptions(walk: Walk, seconds: float, calibration: Calibration) -> tuple[str, ...]:
    unpriced = sum(one.seconds for one in walk.spent.values() if not one.priced)
    notes = [
        "a prediction: nothing ran on a TPU",
        calibration.sentence,
        f"collectives: {walk.network.source}; one transfer at a time on each torus axis",
    ]
    if unpriced >= 1e-3 * seconds:
        notes.append(f"{unpriced / seconds:.1%} of the step has no estimate of the compiler's: bytes over bandwidth")
    return (*notes, *walk.notes)
