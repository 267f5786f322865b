"""What the tests of single training steps pass around."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax

from model.transformer import Definition
from parallel.sharding import Placement
from tests.model.tiny import packed_batch
from training.state import TrainState
from training.step import StepSpec

# Or XLA may leave out roundings to bfloat16 that are followed by a cast to float32 (which ones, depends on where the
# casts stand), and compute a parameter once for each of its halves.
EXACT = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


@dataclasses.dataclass(frozen=True)
class Training:
    """A step, and the state before the first one."""

    definition: Definition
    spec: StepSpec
    optimizer: optax.GradientTransformation
    placement: Placement
    step: Callable
    state: TrainState


def batch_of(run: Training):
    shardings = run.placement.sharding("batch", "sequence")
    return {name: jax.device_put(x, shardings) for name, x in packed_batch().items()}


def steps(run: Training, number: int, state: TrainState | None = None):
    """The last state, and the metrics of each step."""
    state, metrics = run.state if state is None else state, []
    for _ in range(number):
        state, found = run.step(state, batch_of(run))
        metrics.append(jax.device_get(found))
    return state, metrics


def assert_same(got, want) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)
