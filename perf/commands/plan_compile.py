"""Compiles a step for a TPU slice in a process of its own, keeps what the compiler said, and predicts from it.

What is kept is found again by the program before it is compiled, its devices, options and the compiler's version, so
that a second plan compiles nothing that the first one did, and a better prediction reads the same programs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from parallel.compilation import Options, compile_program
from parallel.topology import tpu_devices
from perf.chips import Chip, find_chip
from perf.hlo import parse
from perf.interconnect import places_of, torus
from perf.plan import Answer
from perf.prediction import Prediction, predict
from training.config import TrainRun
from training.loop import lower_step
from training.resolve import resolve

# Of the files that are kept. A change of what they hold changes it.
FORMAT = 1


# XLA may cut a product that waits for a gather into one for each part, which devices pass on in a ring: permutes in the
# place of gathers. Of all bytes of collectives, those of permutes from which on a program counts as such.
_WINDOWED_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A train step for a slice. `model_flops`: of the step, all devices together; `folder` keeps what was compiled."""

    run: TrainRun
    topology: str
    num_slices: int
    model_flops: int
    folder: Path


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program. `need_bytes` of `limit_bytes`: memory of a device; where it fits the peak of
    the compiler's own plan, else what it said is needed (None, with `reason`, where it gave no figure; at least so much
    if `is_least`). `text`: the optimised program, where it fits."""

    fits: bool
    need_bytes: float | None
    is_least: bool
    limit_bytes: float | None
    reason: str | None
    compile_seconds: float
    text: str | None = None
    kept: bool = False
    """Found, and not compiled again."""


def start_process() -> None:
    """In a process that compiles for devices that are not there: it must look for none of its own."""
    jax.config.update("jax_platforms", "cpu")
    # JAX 0.11.2 can't read a TPU's program back from its own cache.
    jax.config.update("jax_enable_compilation_cache", False)


def answer(job: Job) -> Answer:
    """Traces the step, compiles it unless that was done before, and predicts."""
    try:
        resolved = resolve(job.run, tpu_devices(job.topology, job.num_slices))
    except ValueError as error:
        # A length doesn't divide over the mesh, or a kernel can't run there.
        return Answer(refused=str(error))
    mesh = resolved.placement.mesh
    compiled = compile_lowered(lower_step(resolved), job.topology, mesh, resolved.compiler_options, job.folder)
    return judge(compiled, mesh, job.run.precision.compute, job.model_flops)


def judge(compiled: Compiled, mesh: Mesh, dtype: str, model_flops: int) -> Answer:
    """What a program promises, of `model_flops` on all devices of `mesh` together."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    assert chip.usable_bytes is not None, chip.name
    facts = Answer(
        fits=compiled.fits,
        need_bytes=compiled.need_bytes,
        is_least=compiled.is_least,
        limit_bytes=compiled.limit_bytes or chip.usable_bytes / chip.devices_per_chip,
        reason=compiled.reason,
        compile_seconds=compiled.compile_seconds,
        kept=compiled.kept,
    )
    if compiled.text is None:
        return facts
    prediction = predict_compiled(compiled.text, mesh, dtype)
    moved = prediction.collective_bytes
    return dataclasses.replace(
        facts,
        windowed=moved.get("collective-permute", 0.0) > _WINDOWED_SHARE * sum(moved.values()),
        prediction=prediction.to_json(),
        mfu=prediction.mfu(model_flops / mesh.size),
    )


def chip_of(kind: str) -> Chip:
    """Of devices to compile for, by their kind: all of them are in the table."""
    chip = find_chip(kind)
    assert chip is not None, kind
    return chip


def predict_compiled(text: str, mesh: Mesh, dtype: str) -> Prediction:
    """From the optimised text of a program for the devices of `mesh`, that multiplies in `dtype`."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    network = torus(chip, places_of(mesh.devices.flatten()))
    return predict(parse(text), chip=chip, mesh=dict(mesh.shape), network=network, dtype=dtype)


def compile_lowered(lowered: jax.stages.Lowered, topology: str, mesh: Mesh, options: Options, folder: Path) -> Compiled:
    where = folder / key(lowered.as_text(), topology, options, [device.id for device in mesh.devices.flat])
    found = read(where)
    if found is not None:
        return found
    began = time.monotonic()
    try:
        compiled = compile_program(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        need, is_least, limit, reason = exhausted(str(error))
        made = Compiled(False, need, is_least, limit, reason, time.monotonic() - began)
    else:
        peak = compiled.memory_analysis().peak_memory_in_bytes
        made = Compiled(True, peak, False, None, None, time.monotonic() - began, compiled.as_text())
    write(where, made)
    return made


_SIZES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)i?B?"
# Of a whole plan; and of one that was given up when the temporaries alone were too much.
_WHOLE = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"memory required for [^()]*\({_SIZE}\) exceeds available [^()]*\({_SIZE}\)")


def exhausted(message: str) -> tuple[float | None, bool, float | None, str]:
    """(bytes needed, whether more may be, bytes there are, what was said) of a refusal for memory."""
    said = message.splitlines()[0]
    for form in (_WHOLE, _TEMPORARIES):
        if match := form.search(message):
            need, limit = (float(match[i]) * _SIZES[match[i + 1]] for i in (1, 3))
            return need, form is _TEMPORARIES, limit, said
    return None, False, None, f"the compiler names no bytes: {said}"


def key(program: str, topology: str, options: Options, devices: list[int]) -> str:
    """All that an answer of the compiler depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    rest = json.dumps([FORMAT, topology, options, devices, versions], sort_keys=True)
    return hashlib.sha256((rest + program).encode()).hexdigest()[:32]


def read(where: Path) -> Compiled | None:
    """None where nothing is kept. The JSON file is written last: without it there is nothing.

    Raises ValueError for what can't be read.
    """
    facts = where.with_suffix(".json")
    if not facts.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(facts.read_text())
        text = gzip.decompress(where.with_suffix(".hlo.gz").read_bytes()).decode() if fields["fits"] else None
        return Compiled(**fields, text=text, kept=True)
    except (ValueError, OSError, EOFError, zlib.error, KeyError, TypeError) as error:
        raise ValueError(f"{facts} and what is beside it can't be read ({error}); delete them") from error


def write(where: Path, made: Compiled) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    if made.text is not None:
        replace(where.with_suffix(".hlo.gz"), gzip.compress(made.text.encode(), mtime=0))
    fields = dataclasses.asdict(made)
    del fields["text"], fields["kept"]
    replace(where.with_suffix(".json"), json.dumps(fields).encode())


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all: several processes write one folder."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def run_jobs(
    work: Callable[[Any], Any], jobs: list[Any], workers: int, follow: Callable[[int, Any], list[Any]]
) -> list[Any]:
    """Answers to jobs, in their order, each made in one of `workers` processes of their own. `follow(index, answer)`
    gives the jobs to add after one: they are numbered on.

    Raises OSError if a process dies.
    """
    answers: dict[int, Any] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_process) as pool:
        running = {pool.submit(work, job): index for index, job in enumerate(jobs)}
        total = len(jobs)
        while running:
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                try:
                    answers[index] = future.result()
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise OSError(
                        f"a process that compiled ended early, likely for lack of this machine's memory: {error}; "
                        "set --workers to 1"
                    ) from error
                for job in follow(index, answers[index]):
                    running[pool.submit(work, job)] = total
                    total += 1
    return [answers[index] for index in range(len(answers))]
