"""Matrices that AdamW's kernel updates: held in halves, the bfloat16 that products read and the rest of the float32.

The first halves are the state's copies, and the rests stand in the place of its parameters. So a copy takes no memory
beside them, and the update moves two bytes a parameter less. Checkpoints have float32 parameters as ever.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kernels import adamw
from kernels.adamw import AdamWCase, Hyperparameters
from kernels.target import Target
from model.execution import Execution
from model.transformer import Definition, Tree
from parallel.sharding import Placement, map_shards
from training.config import TrainRun
from training.optimizer import adamw_settings

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Halves:
    """Which parameters, by their paths, with AdamW's settings of each; and what of the run their update depends on."""

    settings: tuple[tuple[Path, Hyperparameters], ...] = ()
    clip_norm: float | None = None
    impl: adamw.Impl = "pallas"

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(path for path, _ in self.settings)


NO_HALVES = Halves()


def choose_halves(run: TrainRun, definition: Definition, placement: Placement, target: Target) -> tuple[Halves, str]:
    """Those that `kernels.adamw` is for, and the reason. Raises ValueError for a named kernel that can't run."""
    asked, precision = run.kernels.adamw, run.precision
    if asked == "xla":
        return NO_HALVES, "asked for by name"
    copies, logical = (traverse_util.flatten_dict(tree) for tree in (definition.copies[0], definition.logical[0]))
    # Of a single microbatch as products give it: in the dtype of what they read.
    gradient = precision.compute if run.accumulation == 1 else precision.gradient
    settings, reasons = [], {}
    for path, copy in copies.items():
        how = adamw_settings(run.optimizer, logical[path])
        if how is None or (copy.dtype, jnp.dtype(precision.param)) != (jnp.bfloat16, jnp.float32):
            continue
        shard = placement.sharding(*logical[path]).shard_shape(copy.shape)
        case = AdamWCase(gradient, run.optimizer.moment_dtype, math.prod(shard))
        impl, reason = adamw.choose(asked, case, target)
        reasons.setdefault(impl, reason)
        if impl == "pallas":
            settings.append((path, how))
    if not reasons and asked == "pallas":
        raise ValueError(
            f"kernels.adamw='pallas' can't run: it updates float32 matrices that AdamW takes and products read in "
            f"bfloat16, and here are none (precision.param={precision.param}, precision.compute={precision.compute}, "
            f"optimizer.kind={run.optimizer.kind}); set it to 'auto' or 'xla'"
        )
    if not settings:
        return NO_HALVES, reasons.get("xla", "the only implementation for these parameters")
    return Halves(tuple(settings), run.optimizer.clip_norm), reasons["pallas"]


def describe(halves: Halves, definition: Definition, reason: str) -> str:
    """A line for the log."""
    if not halves.settings:
        return f"adamw: xla, {reason}"
    held, copies = len(halves.settings), len(traverse_util.flatten_dict(definition.copies[0]))
    return f"adamw: {halves.impl}, {reason}; {held} of {copies} copies are halves of what they are copies of"


def update(
    halves: Halves,
    gradient: Tree,
    params: Tree,
    copies: Tree,
    moments: dict[tuple[str, Path], jax.Array],
    factors: dict[str, Any],
    logical: Tree,
    execution: Execution,
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array], dict[tuple[str, Path], jax.Array]]:
    """(rests, first halves, moments) of the parameters in halves after an update, each by its path.

    moments: by ("mu" or "nu", path). factors: the arguments of `kernels.adamw.step_factors` but the last. logical: axes
    of all parameters.
    """
    gradient, params, copies, logical = map(traverse_util.flatten_dict, (gradient, params, copies, logical))
    rests, rounded, moved = {}, {}, {}
    # Those of all: they differ in their decay alone.
    shared = adamw.step_factors(**factors, how=halves.settings[0][1])
    for path, how in halves.settings:

        def one(*arrays, how=how):
            return adamw.adamw(*arrays, how, impl=halves.impl, target=execution.target)

        own = logical[path]
        run = map_shards(one, execution.placement, (*(own,) * 5, ()), (own,) * 4)
        given = (gradient[path], copies[path], params[path], moments["mu", path], moments["nu", path])
        results = run(*given, shared)
        rounded[path], rests[path], moved["mu", path], moved["nu", path] = results
    return rests, rounded, moved


def clip_factor(halves: Halves, gradient_norm: jax.Array) -> jax.Array:
    """What gradients of this norm are multiplied by."""
    if halves.clip_norm is None:
        return jnp.float32(1)
    return jnp.where(gradient_norm < halves.clip_norm, 1.0, halves.clip_norm / gradient_norm)
