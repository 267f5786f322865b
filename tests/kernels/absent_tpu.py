"""Compiles functions for one chip of a TPU slice that is not there."""

import contextlib
import importlib.util
import math
from collections.abc import Iterator

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallel.topology import tpu_devices

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def needs_libtpu(test):
    absent = importlib.util.find_spec("libtpu") is None
    return pytest.mark.skipif(absent, reason="libtpu, TPU's compiler, is not installed")(test)


def compiled_for(chip: str, function, *arguments, donated: tuple[int, ...] = ()):
    """`function` of arrays, of which the trees `arguments` give shapes and dtypes; those numbered in `donated` may be
    written to."""
    mesh = Mesh(tpu_devices(SLICES[chip])[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)
    # Mosaic asks the mesh which chip it is for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nothing_cached():
        return jax.jit(function, donate_argnums=donated).lower(*described).compile()


@contextlib.contextmanager
def nothing_cached() -> Iterator[None]:
    """JAX stores a program for a chip that is not there, and fails where it reads one back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)
