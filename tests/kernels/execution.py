"""Where tests run a Hopper kernel: in Pallas's interpreter on the CPU, or compiled on a GPU (pytest --device gpu)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from tests.host import OPTIMIZED


@dataclasses.dataclass(frozen=True)
class Execution:
    """`gpu`: the device that has compiled kernels; None where kernels are interpreted.

    Whatever else a test computes stays on the CPU: what it expects, and what XLA makes of the same.
    """

    gpu: jax.Device | None

    @property
    def compiled(self) -> bool:
        return self.gpu is not None

    @property
    def float8_error(self) -> float:
        """Of the GPU's sums of float8 products, relative to the sum of magnitudes: they keep about 14 bits
        (arXiv 2412.19437, section 3.3.2); 2**-14.2 was seen on an H100. The interpreter adds in float32."""
        return 2**-13 if self.compiled else 0.0

    def interpret(self, races: bool = True) -> Any:
        """What a kernel gets as its argument `interpret`; `races`: whether they are looked for."""
        if self.compiled:
            return None
        import jax.experimental.pallas.mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=races)

    def kernel(self, kernel: Callable, *arguments, races: bool = True, **named) -> Any:
        """`run` of a kernel. The interpreter looks for races; a GPU gives the same bits again."""
        results = self.run(kernel, *arguments, **named, interpret=self.interpret(races))
        if races:
            self.assert_no_races()
        self.assert_same_again(results, kernel, *arguments, **named)
        return results

    def run(self, function: Callable, *arguments, **named) -> Any:
        """function(*arguments, **named); on a GPU as one program, with arrays brought there and results back."""
        if not self.compiled:
            return function(*arguments, **named)
        leaves, tree = jax.tree.flatten((arguments, named))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
        statics = tuple(None if i in arrays else leaf for i, leaf in enumerate(leaves))
        with jax.default_device(self.gpu):
            results = _program(function, tree, statics, jax.device_put(arrays, self.gpu))
        return jax.device_put(results, jax.devices("cpu")[0])

    def assert_no_races(self) -> None:
        """Of what was interpreted last."""
        if not self.compiled:
            # Private, and what the interpreter's own documentation points to.
            from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

            assert not gpu_callbacks.get_races().races_found

    def assert_same_again(self, results, kernel: Callable, *arguments, **named) -> None:
        """A compiled kernel gives these bits a second time; the interpreter has one order of things alone."""
        if self.compiled:
            again = self.run(kernel, *arguments, **named, interpret=None)
            for first, second in zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=True):
                assert np.asarray(first).tobytes() == np.asarray(second).tobytes(), "a second run gave other bits"

    def put_plainly(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable) -> None:
        """Puts what the interpreter knows in the place of what it doesn't. A compiled kernel keeps its own."""
        if not self.compiled:
            for name, function in functions.items():
                monkeypatch.setattr(module, name, function)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=OPTIMIZED)
def _program(function, tree, statics, arrays):
    leaves = [arrays.get(i, static) for i, static in enumerate(statics)]
    arguments, named = jax.tree.unflatten(tree, leaves)
    return function(*arguments, **named)
