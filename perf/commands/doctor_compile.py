"""Compiles a config's step for a TPU slice, and again with what findings propose; each in a process of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from model.config import ModelConfig
from parallel.compilation import Options
from parallel.topology import tpu_devices
from perf.commands.plan_compile import chip_of, compile_lowered, predict_compiled, run_jobs
from perf.commands.plan_decode import Question, lower_round, utilization
from perf.doctor import Diagnosis, predicted_costs
from perf.findings import Cost, Evidence, Finding, Trial, Verified, examine
from perf.hlo import parse
from perf.plan import with_setting
from perf.serving_facts import DecodePoint, ServingFacts
from perf.step_model import Layout
from serving.config import ServeRun
from training.config import TrainRun
from training.loop import as_json, lower_step
from training.resolve import resolve


@dataclasses.dataclass(frozen=True)
class Job:
    """One step for a slice: of training, or of a server's decoding over all of its devices with `rows` of `context`
    tokens. `folder` keeps what was compiled."""

    run: TrainRun | ServeRun
    topology: str
    num_slices: int
    folder: Path
    model: ModelConfig | None = None
    """That a server decodes with."""
    rows: int = 0
    context: int = 0

    @property
    def is_decode(self) -> bool:
        return isinstance(self.run, ServeRun)


@dataclasses.dataclass(frozen=True)
class Made:
    """What came of a job. `refused`: why there is no program."""

    refused: str | None = None
    text: str | None = None
    costs: Mapping[str, Cost] | None = None
    step_seconds: float | None = None
    device_kind: str | None = None
    mesh: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def milliseconds(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * 1e3


def make(job: Job) -> Made:
    """Traces, compiles unless that was done before, and predicts."""
    devices = tpu_devices(job.topology, job.num_slices)
    try:
        lowered, mesh, options, dtype = (lower_decode if job.is_decode else lower_train)(job, devices)
    except ValueError as error:
        return Made(refused=str(error))
    compiled = compile_lowered(lowered, job.topology, mesh, options, job.folder)
    if compiled.text is None:
        need = "" if compiled.need_bytes is None else f": {compiled.need_bytes / 2**30:.2f} GiB"
        return Made(refused=f"it does not fit in memory{need}")
    prediction = predict_compiled(compiled.text, mesh, dtype)
    return Made(
        None,
        compiled.text,
        predicted_costs(prediction),
        prediction.step_seconds,
        devices[0].device_kind,
        dict(mesh.shape),
        prediction.assumptions,
    )


Lowered = tuple[jax.stages.Lowered, Mesh, Options, str]
"""A program, its devices, the compiler's options and the precision of its products."""


def lower_train(job: Job, devices: Sequence[jax.Device]) -> Lowered:
    assert isinstance(job.run, TrainRun)
    resolved = resolve(job.run, devices)
    return lower_step(resolved), resolved.placement.mesh, resolved.compiler_options, job.run.precision.compute


def lower_decode(job: Job, devices: Sequence[jax.Device]) -> Lowered:
    """The model's pass of a round; drawing the tokens is a program of its own, and small."""
    assert isinstance(job.run, ServeRun) and job.model is not None
    question = Question(job.run, job.model, job.rows, job.context)
    (forward, _), mesh, options = lower_round(question.of_server(Layout(tensor=len(devices))), devices)
    return forward, mesh, options, question.dtype


def diagnose_config(name: str, first: Job, verify: bool, workers: int) -> Diagnosis:
    """Raises ValueError for a step that can't be compiled as it is, saying why."""
    trials: list[tuple[str, Trial]] = []
    found: list[Finding] = []
    evidence: list[Evidence] = []

    def follow(index: int, made: Made) -> list[Job]:
        if index or made.refused is not None:
            return []
        evidence.append(evidence_of(first, made))
        found.extend(examine(evidence[0]))
        if verify:
            trials.extend((one.name, one.trial) for one in found if one.trial is not None)
        return [dataclasses.replace(first, run=apply(first.run, trial)) for _, trial in trials]

    made, *tried = run_jobs(make, [first], workers, follow)
    if made.refused is not None:
        raise ValueError(f"{name} can't be compiled for {first.topology}: {made.refused}")
    verified = {
        key: Verified(trial.option, made.milliseconds, again.milliseconds, again.refused)
        for (key, trial), again in zip(trials, tried, strict=True)
    }
    findings = tuple(dataclasses.replace(one, verified=verified.get(one.name)) for one in found)
    slices = "" if first.num_slices == 1 else f" × {first.num_slices}"
    what = f", decoding {first.rows} rows of {first.context} tokens" if first.is_decode else ""
    return Diagnosis(
        f"{name} on {first.topology}{slices}{what}",
        "config",
        evidence[0],
        findings,
        ("input, host, launches, imbalance: nothing ran; give a run or a trace",),
        (f"a predicted step of {made.milliseconds:.1f} ms over mesh {_mesh(made)}", *made.notes),
    )


def _mesh(made: Made) -> str:
    assert made.mesh is not None
    return " × ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1) or "of one device"


def evidence_of(job: Job, made: Made) -> Evidence:
    assert made.text is not None and made.device_kind is not None and made.step_seconds is not None
    serving_facts = None
    if job.is_decode:
        point = DecodePoint(job.rows, made.step_seconds, decode_share(job, made))
        serving_facts = ServingFacts("prediction", made.device_kind, (point,), None, 0)
    return Evidence(
        program=parse(made.text),
        costs=made.costs,
        step_ns=made.step_seconds * 1e9,
        predicted=True,
        settings=as_json(job.run),
        serving=serving_facts,
        decode=job.is_decode,
        mesh=made.mesh,
        platform="tpu",
    )


def decode_share(job: Job, made: Made) -> float | None:
    """Predicted MBU of a round."""
    assert isinstance(job.run, ServeRun) and job.model is not None
    assert made.device_kind is not None and made.mesh is not None and made.step_seconds is not None
    question = Question(job.run, job.model, job.rows, job.context)
    layout = Layout(tensor=math.prod(made.mesh.values()))
    return utilization(question, layout, chip_of(made.device_kind), made.step_seconds)


def apply(run: TrainRun | ServeRun, trial: Trial) -> TrainRun | ServeRun:
    """The run with a trial's settings: options of the compiler are added, others replaced."""
    for path, value in trial.settings:
        run = (
            dataclasses.replace(run, xla_options=(*run.xla_options, value))
            if path == "xla_options"
            else with_setting(run, path, value)
        )
    return run
