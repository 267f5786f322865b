"""Compiles a config's step for a TPU slice, and again with what findings propose; each in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.topology import tpu_devices
from perf.chips import Chip, find_chip
from perf.commands.plan_compile import compile_lowered, run_jobs
from perf.doctor import Diagnosis, predicted_costs
from perf.findings import Cost, Evidence, Finding, Trial, Verified, examine
from perf.hlo import parse
from perf.interconnect import places_of, torus
from perf.prediction import predict
from training.config import TrainRun
from training.loop import as_json, lower_step
from training.resolve import resolve


@dataclasses.dataclass(frozen=True)
class Job:
    """One step for a slice. `folder` keeps what was compiled."""

    run: TrainRun
    topology: str
    num_slices: int
    folder: Path


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
    try:
        resolved = resolve(job.run, tpu_devices(job.topology, job.num_slices))
        mesh = resolved.placement.mesh
        options = resolved.compiler_options
        compiled = compile_lowered(lower_step(resolved), job.topology, mesh, options, job.folder)
    except (ValueError, NotImplementedError) as error:
        return Made(refused=str(error))
    if compiled.text is None:
        need = "" if compiled.need_bytes is None else f": {compiled.need_bytes / 2**30:.2f} GiB"
        return Made(refused=f"it does not fit in memory{need}")
    devices = mesh.devices.flatten()
    kind = devices[0].device_kind
    prediction = predict(
        parse(compiled.text),
        chip=_chip(kind),
        mesh=dict(mesh.shape),
        network=torus(_chip(kind), places_of(devices)),
        dtype=job.run.precision.compute,
    )
    return Made(
        None,
        compiled.text,
        predicted_costs(prediction),
        prediction.step_seconds,
        kind,
        dict(mesh.shape),
        prediction.assumptions,
    )


def _chip(kind: str) -> Chip:
    chip = find_chip(kind)
    assert chip is not None, kind
    return chip


def diagnose_config(name: str, run: TrainRun, topology: str, num_slices: int, folder: Path, verify: bool, workers: int):
    """Raises ValueError for a step that can't be compiled as it is, saying why."""
    first = Job(run, topology, num_slices, folder)
    trials: list[tuple[str, Trial]] = []
    found: list[Finding] = []
    evidence: list[Evidence] = []

    def follow(index: int, made: Made) -> list[Job]:
        if index or made.refused is not None:
            return []
        evidence.append(evidence_of(run, made))
        found.extend(examine(evidence[0]))
        if verify:
            trials.extend((one.name, one.trial) for one in found if one.trial is not None)
        return [dataclasses.replace(first, run=apply(run, trial)) for _, trial in trials]

    made, *tried = run_jobs(make, [first], workers, follow)
    if made.refused is not None:
        raise ValueError(f"{name} can't be compiled for {topology}: {made.refused}")
    verified = {
        key: Verified(trial.option, made.milliseconds, again.milliseconds, again.refused)
        for (key, trial), again in zip(trials, tried, strict=True)
    }
    findings = tuple(dataclasses.replace(one, verified=verified.get(one.name)) for one in found)
    slices = "" if num_slices == 1 else f" × {num_slices}"
    return Diagnosis(
        f"{name} on {topology}{slices}",
        "config",
        evidence[0],
        findings,
        ("input, host, launches, imbalance: nothing ran; give a run or a trace",),
        (f"a predicted step of {made.milliseconds:.1f} ms over mesh {_mesh(made)}", *made.notes),
    )


def _mesh(made: Made) -> str:
    assert made.mesh is not None
    return " × ".join(f"{axis} {size}" for axis, size in made.mesh.items() if size > 1) or "of one device"


def evidence_of(run: TrainRun, made: Made) -> Evidence:
    assert made.text is not None and made.device_kind is not None and made.step_seconds is not None
    return Evidence(
        program=parse(made.text),
        costs=made.costs,
        step_ns=made.step_seconds * 1e9,
        predicted=True,
        settings=as_json(run),
        mesh=made.mesh,
        platform="tpu",
    )


def apply(run: TrainRun, trial: Trial) -> TrainRun:
    """The run with a trial's settings: options of the compiler are added, others replaced."""
    for path, value in trial.settings:
        run = (
            dataclasses.replace(run, xla_options=(*run.xla_options, value))
            if path == "xla_options"
            else _set(run, path, value)
        )
    return run


def _set(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: _set(getattr(config, name), rest, value) if rest else value})
