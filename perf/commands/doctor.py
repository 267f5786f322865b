"""What holds a run back: input, host, communication, then compute, memory and launches; with evidence, the time at
stake and the setting to change.

RUN is a folder of a training run, or its name under --runs-dir. TRACE is a folder or file that jax.profiler wrote
(train.py NAME --profile 10:13, or POST /admin/profile of a server). CONFIG is a config's name with --topology: its step
is compiled for that TPU slice, here, and what findings propose is compiled too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import tyro

import configs
from parallel.topology import tpu_devices
from perf.command import Output
from perf.commands.roofline import DEFAULT_LENGTH, find_config
from perf.doctor import Diagnosis, diagnose_run, diagnose_trace, has_trace
from perf.doctor_report import doctor_report
from perf.report import Report
from perf.run_facts import is_run, runs_in
from perf.serving_facts import read_serving

if TYPE_CHECKING:
    from perf.commands.doctor_compile import Job


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    """What to look at."""

    target: tyro.conf.Positional[str | None] = None
    """RUN, TRACE or CONFIG."""
    topology: str | None = None
    """CONFIG: a TPU slice, as in v5e:4x4."""
    slices: int = 1
    """CONFIG: TPU slices joined by the data-centre network."""
    batch: int | None = None
    """CONFIG: rows of a step, all devices together; by default the config's, in decode 8 for each device."""
    mode: Literal["train", "decode"] = "train"
    """CONFIG: its train step, or a round of decoding of a server over all devices."""
    context: int | None = None
    """CONFIG, decode: tokens in each row's cache; by default 4096, or the model's longest sequence if that is less."""
    scan: bool = False
    """CONFIG: compile one layer and loop over it, whatever the config says; compiles in a tenth of the time."""
    remat: Literal["none", "dots", "full"] | None = None
    """CONFIG: what the backward pass recomputes; by default the config's."""
    verify: bool = True
    """CONFIG: compile again with what findings propose. Each takes as long as the first."""
    workers: int = 2
    """CONFIG: processes that compile at once: each takes a core and about 3 GB."""
    metrics: Path | None = None
    """A server's figures: the JSON line of serve.py --bench, or the text of its /metrics."""
    runs_dir: Path = Path("runs")
    """Where runs are looked for by name."""


def report(settings: Settings) -> Report:
    """Raises ValueError for a target that is not there, with those that are, and for one that can't be read."""
    return doctor_report(diagnose(settings))


def diagnose(settings: Settings) -> Diagnosis:
    if settings.target is None:
        raise ValueError(f"name a run, a trace or a config; {known(settings)}")
    if settings.topology is not None:
        return compile_config(settings)
    serving = None if settings.metrics is None else read_serving(settings.metrics)
    path = Path(settings.target)
    for folder in (path, settings.runs_dir / settings.target):
        if is_run(folder):
            return diagnose_run(folder, serving)
        if has_trace(folder):
            return diagnose_trace(folder, serving)
    if path.exists():
        # Says what is in it.
        return diagnose_trace(path, serving)
    if settings.target in configs.names():
        raise ValueError(
            f"{settings.target!r} is a config, and no run of that name is in {settings.runs_dir}; to compile it, say "
            "for what: --topology v5e:4x4"
        )
    raise ValueError(f"no run, trace or config {settings.target!r}; {known(settings)}")


def known(settings: Settings) -> str:
    return f"runs in {settings.runs_dir}: {runs_in(settings.runs_dir)}; configs: {', '.join(configs.names())}"


def compile_config(settings: Settings) -> Diagnosis:
    # Here: a trace is read without what compiling needs.
    from perf.commands.doctor_compile import diagnose_config

    for name in ("slices", "workers", "batch", "context"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    module = find_config(settings.target)
    job = (decode_job if settings.mode == "decode" else train_job)(settings, module)
    return diagnose_config(str(settings.target), job, settings.verify, settings.workers)


def train_job(settings: Settings, module: ModuleType) -> Job:
    from perf.commands.doctor_compile import Job

    if not hasattr(module, "train"):
        raise ValueError(f"config {settings.target!r} can be served and not trained; set --mode decode")
    if settings.context is not None:
        raise ValueError("--context is of --mode decode; a train step has the config's rows")
    run = module.train()
    if settings.batch is not None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=settings.batch))
    if settings.scan:
        run = dataclasses.replace(run, layers=dataclasses.replace(run.layers, scan=True))
    if settings.remat is not None:
        run = dataclasses.replace(run, layers=dataclasses.replace(run.layers, remat=settings.remat))
    assert settings.topology is not None
    return Job(run, settings.topology, settings.slices, run.cache_dir / "plan")


def decode_job(settings: Settings, module: ModuleType) -> Job:
    from perf.commands.doctor_compile import Job
    from perf.commands.plan_decode import DECODE_ROWS, served

    for name, given in (("scan", settings.scan), ("remat", settings.remat), ("slices", settings.slices > 1)):
        if given:
            raise ValueError(f"--{name} is of --mode train: a server has its layers one by one, on one slice")
    run, model = served(str(settings.target), module)
    longest = model.max_positions - 1
    context = min(DEFAULT_LENGTH, longest) if settings.context is None else settings.context
    if context > longest:
        raise ValueError(f"--context {context} leaves no room for a token in max_positions={model.max_positions}")
    assert settings.topology is not None
    rows = settings.batch or DECODE_ROWS * len(tpu_devices(settings.topology))
    return Job(run, settings.topology, 1, run.cache_dir / "plan", model, rows, context)
