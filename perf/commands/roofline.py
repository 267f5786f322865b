"""FLOPs, bytes and time floor of every op of a step, from a config alone: predictions, nothing runs."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Literal

import tyro

import configs
from perf.chips import Chip
from perf.command import Output
from perf.formats import CACHE, WEIGHTS, Format
from perf.operations import AttentionForm, Mode, TrainState, Work, train_weights
from perf.report import Report
from perf.roofline import COMPUTE_DTYPES, chip_named, machine
from perf.roofline_record import Question
from perf.roofline_report import roofline_report

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]

HOPPER = ("H100", "H200")
"""Chips that kernels are written for which "auto" takes there."""
# Tokens of a request where none are given: a page of text in, a page out.
DEFAULT_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    """What to predict. A length, batch or precision that is not given is the config's in train mode."""

    name: tyro.conf.Positional[str | None] = None
    """Config, as train.py --list and serve.py --list print them."""
    mode: Mode = "decode"
    """Step: one of training, the prefill of a prompt, or one decoded token of each row."""
    chip: str = "h100"
    """Chip of the table in perf/chips.py: h100, a100-40gb, v5e, mi300x, ... An unknown one lists them."""
    devices: int = 1
    """JAX devices over which all work and memory divide evenly."""
    batch: int | None = None
    """Rows of all devices together; by default the config's in train mode, else 1."""
    seq: int | None = None
    """train and prefill: tokens of each row; by default the config's in train mode, else as --context."""
    context: int | None = None
    """decode: tokens in each row's cache; by default 4096, or the model's longest sequence if that is less."""
    weights: Precision | None = None
    """prefill and decode: stored weights; bf16 by default."""
    cache: Precision | None = None
    """prefill and decode: stored keys and values; bf16 by default."""
    compute: Literal["bf16", "fp16", "fp32", "fp8", "int8"] | None = None
    """Precision of matrix products; by default the config's in train mode, else bf16."""
    attention: AttentionForm = "fused"
    """fused: one kernel that keeps scores on the chip; unfused: dense scores in memory."""
    remat: Literal["none", "dots", "full"] | None = None
    """train: what the backward pass recomputes; by default the config's."""
    group: int = 128
    """int4 weights: inputs that share a scale."""
    scales: bool = True
    """Count the scales of quantised weights, keys and values."""
    launch_us: float | None = None
    """Microseconds to start a kernel; by default what was measured for the chip, if it was."""


def report(settings: Settings) -> Report:
    """Raises ValueError for settings that can't be, with what can."""
    module = find_config(settings.name)
    chip = chip_named(settings.chip)
    is_train = settings.mode == "train"
    found = train_question(settings, module, chip) if is_train else serve_question(settings, module)
    config, work, compute, assumptions = found
    launch = None if settings.launch_us is None else settings.launch_us * 1e-6
    on = machine(chip, settings.devices, COMPUTE_DTYPES[compute], launch)
    name = str(settings.name)
    return roofline_report(Question(name, config, work, on, settings.group, settings.scales, tuple(assumptions)))


def find_config(name: str | None) -> ModuleType:
    if name is None:
        raise ValueError(f"name a config; configs: {', '.join(configs.names())}")
    return configs.load(name)


def train_question(settings: Settings, module: ModuleType, chip: Chip):
    """(model, work, compute precision, assumptions) of a train step."""
    refuse(settings, "train", "context", "weights", "cache")
    if not hasattr(module, "train"):
        raise ValueError(f"config {settings.name!r} can be served and not trained; set --mode to prefill or decode")
    run = module.train()
    names = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
    compute = settings.compute or names[run.precision.compute]
    activation_bytes, state = 4 if compute == "fp32" else 2, train_state(run, chip, run.accumulation)
    work = Work(
        mode="train",
        batch=run.data.batch_size if settings.batch is None else settings.batch,
        length=check_length(run.data.sequence_length if settings.seq is None else settings.seq, run.model, "--seq"),
        weights=train_weights(activation_bytes),
        cache=CACHE["bf16"],
        activation_bytes=activation_bytes,
        attention=settings.attention,
        remat=settings.remat or run.layers.remat,
        state=state,
    )
    assumptions = [f"recomputation: {work.remat}; one document per row, no padding"]
    if run.accumulation > 1:
        assumptions.append(f"weights are read once, not for each of the run's {run.accumulation} microbatches")
    if state.muon:
        assumptions.append("the products of Muon's Newton-Schulz iteration are not counted")
    return run.model, work, compute, assumptions


def train_state(run, chip: Chip, accumulation: int) -> TrainState:
    """What the steps of a TrainRun keep and move. The few small matrices that `kernels.adamw` "auto" leaves to XLA
    count as the others do."""
    asked, narrow = run.kernels.adamw, run.precision.compute == "bfloat16"
    chosen = asked == "auto" and chip.name.startswith(HOPPER) and accumulation == 1
    return TrainState(
        parameter=element_bytes(run.precision.param),
        gradient=element_bytes(run.precision.gradient),
        first_moment=element_bytes(run.optimizer.moment_dtype),
        clip=run.optimizer.clip_norm is not None,
        muon=run.optimizer.kind == "muon",
        halves=(asked == "pallas" or chosen) and narrow and run.optimizer.kind == "adamw",
    )


def serve_question(settings: Settings, module: ModuleType):
    """(model, work, compute precision, assumptions) of a prefill or a decode step."""
    is_decode = settings.mode == "decode"
    refuse(settings, settings.mode, "remat", "seq" if is_decode else "context")
    config = served_model(settings.name, module)
    given, option = (settings.context, "--context") if is_decode else (settings.seq, "--seq")
    length = min(DEFAULT_LENGTH, config.max_positions) if given is None else given
    compute = settings.compute or "bf16"
    work = Work(
        mode=settings.mode,
        batch=1 if settings.batch is None else settings.batch,
        length=check_length(length, config, option),
        weights=stored(WEIGHTS[settings.weights or "bf16"], settings),
        cache=stored(CACHE[settings.cache or "bf16"], settings),
        # Narrower products still pass activations on in 16 bits.
        activation_bytes=4 if compute == "fp32" else 2,
        attention=settings.attention,
    )
    return config, work, compute, []


def served_model(name: str | None, module: ModuleType):
    """Architecture that a config states: its server's, else its training run's."""
    served = module.serve().model if hasattr(module, "serve") else None
    if served is None and hasattr(module, "train"):
        return module.train().model
    if served is None:
        known = [other for other in configs.names() if hasattr(configs.load(other), "MODEL")]
        raise ValueError(
            f"config {name!r} has its architecture in its weights, not in the config; configs that state one: "
            f"{', '.join(known)}"
        )
    return served


def stored(item: Format, settings: Settings) -> Format:
    """A format with the scales that are asked for."""
    if settings.group < 1:
        raise ValueError(f"--group {settings.group} must be at least 1; --no-scales leaves scales out")
    if not settings.scales:
        return item.without_scales()
    return dataclasses.replace(item, group=settings.group) if item.group is not None else item


def check_length(length: int, config, option: str) -> int:
    if length > config.max_positions:
        raise ValueError(f"{option} {length} is longer than the model's max_positions={config.max_positions}")
    return length


def refuse(settings: Settings, mode: str, *names: str) -> None:
    """Raises ValueError for a setting that this mode would ignore."""
    given = dataclasses.asdict(settings)
    for name in names:
        if given[name] is not None:
            raise ValueError(f"--{name} {given[name]} has no meaning in --mode {mode}; leave it out")


def element_bytes(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
