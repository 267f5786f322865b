"""Tests run on eight virtual CPU devices, with one compilation cache for all workers and runs; the longest first.

`pytest --device gpu` runs those of the Hopper kernels, compiled, on a GPU, and no others.
"""

import os
from pathlib import Path

from tests.host import xla_flags

# Before the first import of jax: the backend reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import pytest

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "xla-tests"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Whole runs, and a step for a TPU slice: a worker that begins one of them last leaves the other idle meanwhile.
_FIRST = ("tests/training/test_run_", "tests/parity/test_tpu_compile.py")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: the tests of the Hopper kernels alone, compiled, on the GPU of this machine",
    )


def pytest_configure(config):
    if config.option.device == "gpu":
        _begin_on_a_gpu()


def _begin_on_a_gpu():
    """Adds the GPU to the CPU, which stays JAX's default. Before anything asks JAX for devices, in each worker."""
    from kernels import hopper_chip
    from kernels.target import target_of

    # Every worker would take most of its memory for itself.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_platforms", "cpu,cuda")
    try:
        gpu, *_ = jax.devices("cuda")
    except RuntimeError as error:
        raise pytest.UsageError(f"--device gpu: no GPU: {error}") from error
    lacking = hopper_chip.unsupported(target_of(gpu))
    if lacking is not None:
        raise pytest.UsageError(f"--device gpu: {lacking}")


def pytest_collection_modifyitems(config, items):
    if config.option.device == "gpu":
        others = [item for item in items if "execution" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "execution" in item.fixturenames]
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
