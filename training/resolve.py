"""From a run's settings to what it runs with: every cross-check made, every "auto" decided, once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from kernels import cross_entropy
from kernels.target import Target
from model.execution import Execution
from model.placement import check_model_placement
from model.precision import Precision
from model.selection import Selection, select_kernels
from model.transformer import Definition
from parallel.compilation import compiler_options
from parallel.mesh import make_mesh
from parallel.sharding import Placement
from quantization.rules import ProductRules
from training.config import TrainRun
from training.halves import Halves, choose_halves, describe
from training.optimizer import make_optimizer
from training.schedule import make_schedule
from training.state import named_shardings
from training.step import StepSpec


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run on given devices. `choices` are the decisions taken, one line each, for the log."""

    run: TrainRun
    placement: Placement
    spec: StepSpec
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    selection: Selection
    compiler_options: dict[str, str | bool]
    choices: tuple[str, ...]

    @property
    def num_devices(self) -> int:
        return self.placement.mesh.size


def resolve(run: TrainRun, devices: Sequence[jax.Device]) -> Resolved:
    """Raises ValueError, naming the setting, for whatever can't run on these devices. Computes nothing on them."""
    placement = Placement(make_mesh(run.mesh, devices), run.rules)
    check_placement(run, placement)
    rules, delayed = ProductRules(run.precision.products), run.precision.scaling == "delayed"
    copies = copy_dtype(run.precision)
    definition = Definition(
        run.model, run.layers.scan, run.precision.param, rules=rules, delayed=delayed, copy_dtype=copies
    )
    selection = select_kernels(
        definition,
        attention=run.kernels.attention,
        grouped_matmul=run.kernels.grouped_matmul,
        quantized_matmul=run.kernels.quantized_matmul,
        norm=run.kernels.norm,
        dispatch=run.kernels.dispatch,
        dtype=run.precision.compute,
        rows=run.data.batch_size // run.accumulation,
        sequence_length=run.data.sequence_length,
        segments=run.layers.document_mask,
        placement=placement,
        device=devices[0],
    )
    execution = Execution(
        precision=run.precision,
        placement=placement if placement.mesh.size > 1 else None,
        attention=selection.attention,
        target=selection.target,
        grouped_matmul=selection.grouped_matmul,
        quantized_matmul=selection.quantized_matmul,
        norm=run.kernels.norm,
        dispatch=run.kernels.dispatch,
        remat=run.layers.remat,
    )
    loss, reason = choose_cross_entropy(run, definition, placement, selection.target)
    halves, why = choose_halves(run, definition, placement, selection.target)
    mesh = " × ".join(f"{axis} {size}" for axis, size in placement.mesh.shape.items() if size > 1)
    where = f"mesh: {mesh or 'one device'} ({devices[0].device_kind})"
    return Resolved(
        run=run,
        placement=placement,
        spec=StepSpec(definition, execution, run.loss, run.accumulation, loss, halves),
        optimizer=make_optimizer(run.optimizer, run.steps, definition.logical[0]),
        schedule=make_schedule(run.optimizer.schedule, run.steps),
        selection=selection,
        compiler_options=compiler_options(run.xla_options, devices[0].platform),
        choices=(
            where,
            *describe_copies(definition, placement, halves),
            *selection.reasons,
            f"cross-entropy: {loss}, {reason}",
            describe(halves, definition, why),
        ),
    )


def choose_cross_entropy(
    run: TrainRun, definition: Definition, placement: Placement, target: Target
) -> tuple[cross_entropy.Impl, str]:
    """Implementation of the loss's softmax, and the reason. Raises ValueError for a named one that can't run."""
    shards = placement.size("act_vocab")
    case = cross_entropy.CrossEntropyCase(
        "float32",
        definition.config.vocab_size // shards,
        sharded=shards > 1,
        soft_cap=definition.config.final_soft_cap is not None,
    )
    return cross_entropy.choose(run.kernels.cross_entropy, case, target)


def copy_dtype(precision: Precision) -> str | None:
    """Of the copies of matrices that the optimizer keeps for products; None where a cast would save no bytes.

    No setting: a step needs no more memory with them, since the casts lived from the forward pass to the backward one,
    and scanned layers' gradients are half as wide. Peaks by the compilers, GiB without and with: four layers of moe-1b
    on an H100 10.53 and 10.53, scanned 12.97 and 12.35; llama3-8b on 16 chips of v5e 13.50 and 13.57.
    """
    stored, used = (jnp.dtype(dtype).itemsize for dtype in (precision.param, precision.compute))
    return precision.compute if used < stored else None


def describe_copies(definition: Definition, placement: Placement, halves: Halves) -> list[str]:
    """One line for the log; none where there are no copies beside what they are copies of."""
    abstract, logical = map(traverse_util.flatten_dict, definition.copies)
    shardings = named_shardings({path: axes for path, axes in logical.items() if path not in halves.paths}, placement)
    if not shardings:
        return []
    elements = sum(math.prod(sharding.shard_shape(abstract[path].shape)) for path, sharding in shardings.items())
    size = elements * jnp.dtype(definition.copy_dtype).itemsize
    return [f"weights: the optimizer keeps a copy in {definition.copy_dtype}, {size / 2**30:.2f} GiB on each device"]


def check_placement(run: TrainRun, placement: Placement) -> None:
    """Raises ValueError for the first length that does not divide over its mesh axes."""
    rows = run.data.batch_size // run.accumulation
    placement.check("data.batch_size" if run.accumulation == 1 else "data.batch_size / accumulation", rows, "batch")
    placement.check("data.sequence_length", run.data.sequence_length, "sequence")
    check_model_placement(run.model, placement)
    if placement.size("sequence") > 1 or placement.size("act_embed") > 1:
        raise ValueError(
            f"rules.sequence={placement.rules.sequence} and rules.act_embed={placement.rules.act_embed}: attention and "
            "the loss need whole rows and whole hidden states on a device; set both to None"
        )
