"""Host memory that loading weights takes, on a machine whose device memory is host memory too."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from checkpoint import stream


def peak_while(load: Callable[[], Any], monkeypatch) -> tuple[int, Any]:
    """(peak bytes of NumPy arrays and Python objects, result). Not in it: the arrays on the device."""
    read = stream._read_shard
    monkeypatch.setattr(stream, "_read_shard", lambda *arguments: misaligned(read(*arguments)))
    tracemalloc.start()
    try:
        result = load()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def misaligned(x: np.ndarray) -> np.ndarray:
    """A copy that the CPU backend cannot take for a device array as it lies: it takes those at multiples of 64."""
    raw = np.empty(x.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + x.itemsize
    copy = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy
