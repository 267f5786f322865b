"""What the tests of single training steps pass around."""

import dataclasses
from collections.abc import Callable

import optax

from model.transformer import Definition
from parallel.sharding import Placement
from training.state import TrainState
from training.step import StepSpec


@dataclasses.dataclass(frozen=True)
class Training:
    """A step, and the state before the first one."""

    definition: Definition
    spec: StepSpec
    optimizer: optax.GradientTransformation
    placement: Placement
    step: Callable
    state: TrainState
