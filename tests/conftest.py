"""Tests run on eight virtual CPU devices, with one compilation cache for all workers and runs; the longest first."""

import os
from pathlib import Path

from tests.host import xla_flags

# Before the first import of jax: the backend reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "xla-tests"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Whole runs, and a step for a TPU slice: a worker that begins one of them last leaves the other idle meanwhile.
_FIRST = ("tests/training/test_run_", "tests/parity/test_tpu_compile.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
