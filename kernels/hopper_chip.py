"""The chip that the Mosaic GPU kernels are cut for, and who may run them. Imports nothing of Pallas."""

from __future__ import annotations

import jax

from kernels.target import Target

# Mosaic GPU's interface changes with JAX's minor version; the kernels are compiled with 0.11.2.
JAX_VERSION = jax.__version_info__
SHARED_BYTES = 227 * 1024
"""Of shared memory, that one block of threads can have."""
NUM_PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200 SXM."""


def unsupported(target: Target) -> str | None:
    """Why no kernel of Hopper's can run on `target` with this JAX; None where one may."""
    if target.platform != "gpu" or target.compute_capability != (9, 0):
        return f"the kernel is written for NVIDIA GPUs of compute capability 9.0, and the target is {target}"
    if JAX_VERSION < (0, 11):
        return f"the kernel needs JAX 0.11 (Python 3.12), and this is JAX {'.'.join(map(str, JAX_VERSION))}"
    return None
