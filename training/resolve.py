"""From a run's settings to what it runs with: every cross-check made, every "auto" decided, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import optax

from model.execution import Execution
from model.selection import Selection, select_kernels
from model.transformer import Definition
from parallel.mesh import make_mesh
from parallel.sharding import Placement
from training.config import TrainRun
from training.optimizer import make_optimizer
from training.schedule import make_schedule
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
    selection = select_kernels(
        run.model,
        attention=run.kernels.attention,
        grouped_matmul=run.kernels.grouped_matmul,
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
        grouped_matmul=selection.grouped_matmul,
        remat=run.layers.remat,
    )
    definition = Definition(run.model, run.layers.scan, run.precision.param)
    mesh = " × ".join(f"{axis} {size}" for axis, size in placement.mesh.shape.items() if size > 1)
    where = f"mesh: {mesh or 'one device'} ({devices[0].device_kind})"
    return Resolved(
        run=run,
        placement=placement,
        spec=StepSpec(definition, execution, run.loss, run.accumulation),
        optimizer=make_optimizer(run.optimizer, run.steps, definition.logical[0]),
        schedule=make_schedule(run.optimizer.schedule, run.steps),
        selection=selection,
        compiler_options=compiler_options(run.xla_options, devices[0].platform),
        choices=(where, *selection.reasons),
    )


def check_placement(run: TrainRun, placement: Placement) -> None:
    """Raises ValueError for the first length that does not divide over its mesh axes."""
    model, rules = run.model, placement
    rows = run.data.batch_size // run.accumulation
    setting = "data.batch_size" if run.accumulation == 1 else "data.batch_size / accumulation"
    rules.check(setting, rows, "batch")
    lengths = [
        ("model.num_heads", model.num_heads, ("heads", "act_heads")),
        ("model.num_kv_heads", model.num_kv_heads, ("kv_heads", "act_heads")),
        ("model.vocab_size", model.vocab_size, ("vocab", "act_vocab")),
        ("model.embed_dim", model.embed_dim, ("embed", "act_embed")),
        ("model.head_dim", model.head_dim, ("head_dim",)),
        ("data.sequence_length", run.data.sequence_length, ("sequence",)),
    ]
    moe = model.moe
    if moe is None or moe.num_dense_layers:
        lengths.append(("model.mlp_dim", model.mlp_dim, ("mlp", "act_mlp")))
    if moe is not None:
        lengths.append(("model.moe.num_experts", moe.num_experts, ("experts",)))
        lengths.append(("model.moe.mlp_dim", moe.mlp_dim, ("expert_mlp", "act_mlp")))
        lengths.append(("model.embed_dim", model.embed_dim, ("expert_embed",)))
        if moe.shared_mlp_dim:
            lengths.append(("model.moe.shared_mlp_dim", moe.shared_mlp_dim, ("mlp", "act_mlp")))
    for setting, length, logical in lengths:
        for axis in logical:
            rules.check(setting, length, axis)
    if rules.size("sequence") > 1 or rules.size("act_embed") > 1:
        raise ValueError(
            f"rules.sequence={rules.rules.sequence} and rules.act_embed={rules.rules.act_embed}: attention and the "
            "loss need whole rows and whole hidden states on a device; set both to None"
        )
    if moe is None and placement.size("experts") > 1:
        raise ValueError(
            f"mesh axis {placement.axes('experts')} of {placement.size('experts')} devices holds experts, and the "
            "model has none; set mesh.expert to 1 or model.moe"
        )


def compiler_options(settings: Sequence[str], platform: str) -> dict[str, str | bool]:
    """XLA options of "name=value" settings. One that names another platform (xla_gpu_..., xla_tpu_...) is left out:
    a config says once what each platform needs. Raises ValueError for a setting of another form."""
    options: dict[str, str | bool] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.startswith("xla_") or not value:
            raise ValueError(f"xla_options={setting!r} must be xla_NAME=VALUE")
        # xla_jf_: the TPU compiler's older names.
        kinds = {"xla_cpu": "cpu", "xla_gpu": "gpu", "xla_tpu": "tpu", "xla_jf_": "tpu"}
        if kinds.get(name[:7], platform) == platform:
            # XLA takes numbers as text, and booleans only as booleans.
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options
