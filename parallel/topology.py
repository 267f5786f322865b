"""TPU slices that are not there: devices to compile for, ahead of time, on a machine without a TPU."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

# Generation and torus dimensions. Axes of the torus are counted in chips.
_GENERATIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_FORMS = "v4:XxYxZ, v5e:XxY, v5p:XxYxZ, v6e:XxY, tpu7x:XxYxZ (chips along each axis of the torus, as in v5e:4x4)"

# libtpu reads these when it is loaded: which slice it is part of, and not to ask the cloud's metadata server (seconds,
# and errors on the screen); and not to insist on being the machine's only process with libtpu in it.
_WITHOUT_A_TPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """Devices of a TPU slice, or of several, that programs can be compiled for and not run on.

    `topology` is a generation and the chips along each axis of its torus: `v5e:4x4`, `v5p:4x4x4`. A device is a chip;
    on tpu7x it is one of a chip's two cores, so there are twice as many. Several slices differ in `slice_index`.

    For a process that computes on no TPU itself: libtpu is told, for the life of the process, that there is none.
    Raises ValueError for a topology that does not exist, and if libtpu is not installed.
    """
    generation, layout = _parse(topology)
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"compiling for {topology} needs libtpu, which is not installed; use `uv run --group tpu ...`, "
            "or install jax[tpu]"
        )
    for name, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(name, value)
    # A host has up to 2 × 2 chips.
    options = {"num_slices": num_slices, "chips_per_host_bounds": [*(min(2, n) for n in layout[:2]), 1]}
    if generation == "v4":
        # Both cores of a chip as one device, as TPU v4 is always run; by default they are two with the same place.
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"TPU topology {topology!r} is refused by libtpu: {error}; known forms: {_FORMS}") from error


def _parse(topology: str) -> tuple[str, tuple[int, ...]]:
    generation, _, layout = topology.partition(":")
    dimensions = _GENERATIONS.get(generation)
    # libtpu takes a third axis for v5e too, which no slice has.
    if dimensions is None or not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), layout):
        raise ValueError(f"unknown TPU topology {topology!r}; known forms: {_FORMS}")
    return generation, tuple(int(n) for n in layout.split("x"))
