"""The device kind that an implementation is chosen for."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """What `supports` and `choose` need to know of a device; a plain value, so a program can be built for absent chips.

    `compute_capability` is NVIDIA's (major, minor); None on anything else.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    compute_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.platform
        return f"{self.platform} of compute capability {self.compute_capability[0]}.{self.compute_capability[1]}"


def target_of(device: jax.Device) -> Target:
    """Target of a device, described (compile-only) devices included. Raises ValueError for an unknown platform."""
    match device.platform:
        case "cpu" | "tpu":
            return Target(device.platform)
        case "gpu" | "cuda" | "rocm":
            # AMD devices have a name like "gfx942" here.
            version = re.fullmatch(r"(\d+)\.(\d+)", device.compute_capability)
            return Target("gpu", (int(version[1]), int(version[2])) if version else None)
        case platform:
            raise ValueError(f"device {device} is of platform {platform!r}; kernels know cpu, gpu and tpu")


def default_target() -> Target:
    """Target of the default device. Starts the backend: for use when a program is traced, never at import."""
    return target_of(jax.devices()[0])
