"""The device mesh: the one place that builds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("slice", "data", "fsdp", "expert", "context", "tensor", "stage")
RESERVED_AXES = ("context", "stage")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, for all devices that the others leave.

    `context` and `stage` are reserved: they must be 1.
    """

    slice: int = 1
    """Slices joined by the data-centre network: each has the whole state, and its part of the batch."""
    data: int = 1
    """Copies of the whole state, each with its part of the batch."""
    fsdp: int = -1
    """Parts of the batch and of every dense parameter and its optimizer state."""
    expert: int = 1
    """Parts of the batch and of the experts: tokens travel to the experts they chose."""
    context: int = 1
    """Parts of a sequence. Reserved."""
    tensor: int = 1
    """Parts of attention heads, feed-forward widths and the vocabulary."""
    stage: int = 1
    """Pipeline stages. Reserved."""

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes in `MESH_AXES` order for `num_devices`.

        Raises ValueError if an axis is reserved or below 1, or if the sizes do not multiply to `num_devices`.
        """
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name in RESERVED_AXES:
            if sizes[name] != 1:
                raise ValueError(
                    f"mesh.{name}={sizes[name]}: axis '{name}' is reserved and not implemented; set mesh.{name} to 1"
                )
        free = [name for name, size in sizes.items() if size == -1]
        wrong = {name: size for name, size in sizes.items() if size < 1 and size != -1}
        if wrong or len(free) > 1:
            raise ValueError(f"mesh sizes {sizes}: each must be at least 1, and at most one may be -1")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free:
            if num_devices % fixed:
                raise ValueError(
                    f"mesh {_named(sizes)} needs a multiple of {fixed} devices, and {num_devices} are available; "
                    f"set mesh axes whose product divides {num_devices}"
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise ValueError(
                f"mesh {_named(sizes)} is {fixed} devices, and {num_devices} are available; "
                "change the mesh axes, or set one of them to -1 to use every device"
            )
        return tuple(sizes.values())


def _named(sizes: dict[str, int]) -> str:
    return " × ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "of one device"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh over `devices` with every axis of `MESH_AXES`, all of them Auto (GSPMD decides what is not constrained).

    Inner axes (tensor) get the closest devices. Raises ValueError as `MeshConfig.shape` does, and where `slice` is not
    the number of TPU slices that the devices are of: all other axes stay within one.
    """
    shape = config.shape(len(devices))
    if devices[0].platform != "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    # Devices of a single slice may not say so.
    slices = {device.slice_index if hasattr(device, "slice_index") else 0 for device in devices}
    if len(slices) != shape[0]:
        raise ValueError(
            f"mesh.slice={shape[0]}, and the {len(devices)} devices are of {len(slices)} TPU slices; "
            f"set mesh.slice to {len(slices)}"
        )
    # A TPU slice's torus rarely factors into the mesh exactly: allow an axis to span parts of two torus axes.
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within, between = (1, *shape[1:]), (shape[0], *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
