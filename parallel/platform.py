"""Which of JAX's platforms a program on this machine looks for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax

_OTHER_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU that is not there. Call it before anything touches a device.

    Where libtpu is installed (for ahead-of-time compilation), JAX asks the cloud's metadata server for a TPU at every
    start: half a second, and errors on the screen. Nothing changes if platforms were chosen already, if a TPU's device
    files exist, or if a GPU plugin is installed.
    """
    if jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
        return
    dev = Path("/dev")
    if list(dev.glob("accel*")) or list(dev.glob("vfio/[0-9]*")):
        return
    if not any(importlib.util.find_spec(plugin) for plugin in _OTHER_PLUGINS):
        jax.config.update("jax_platforms", "cpu")
