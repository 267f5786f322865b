"""How to run a config on devices that are not here: meshes, microbatches and recomputation, compiled and compared.

For a TPU slice the real step is compiled ahead of time, here: what fits is what TPU's own compiler says, and times are
predicted from the program that it made. For GPUs they come from an analytic model. Nothing runs: all of it is a
prediction.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable

from jax.sharding import AbstractMesh

from parallel.mesh import MESH_AXES, MeshConfig
from parallel.sharding import Placement
from parallel.topology import tpu_devices
from perf.chips import Chip
from perf.commands.plan_compile import Job, answer, chip_of, run_jobs
from perf.commands.plan_decode import decode_groups
from perf.commands.plan_settings import Settings, check, gpu_named
from perf.commands.roofline import HOPPER, find_config, train_state
from perf.formats import CACHE
from perf.operations import Work, train_weights
from perf.plan import (
    REMATS,
    Answer,
    Candidate,
    Entry,
    Group,
    Ranked,
    command_line,
    enumerate_candidates,
    next_smaller,
    rank,
    shortlist,
)
from perf.plan_report import plan_report
from perf.report import Report
from perf.step_model import Program, estimate
from perf.step_rates import step_rates
from training.config import TrainRun
from training.resolve import check_placement

# Compiles as one product, after its gather, what XLA would else cut into the parts of a gather: predicted 31% faster on
# v5e:4x4 for a 1.1 B model, whose products in 16 parts read and write their sums again and again.
NO_WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
# More is tried only by name: a step with so many microbatches is rarely the fastest that fits.
MICROBATCHES = (1, 2, 4, 8)


def report(settings: Settings) -> Report:
    """Raises ValueError for settings that can't be, with what can; OSError if a compiling process dies."""
    module = find_config(settings.name)
    check(settings)
    if settings.mode == "decode":
        return plan_report(str(settings.name), "decode", decode_groups(settings, module))
    if not hasattr(module, "train"):
        raise ValueError(f"config {settings.name!r} can be served and not trained; set --mode decode")
    run = with_length(module.train(), settings.seq)
    name = str(settings.name)
    if settings.chip is not None:
        group = gpu_group(settings, run)
        return plan_report(name, settings.mode, [group])
    slices = [slice_space(settings, run, one) for one in settings.topology.split(",")]
    return plan_report(name, settings.mode, compile_spaces(settings, run, slices))


def with_length(run: TrainRun, length: int | None) -> TrainRun:
    return (
        run if length is None else dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=length))
    )


@dataclasses.dataclass(frozen=True)
class Space:
    """Candidates of one set of devices, best first. `run` is the config with the rows of a step settled."""

    name: str
    run: TrainRun
    num_slices: int
    chip: Chip
    num_devices: int
    ranked: tuple[Ranked, ...]
    notes: tuple[str, ...]


def slice_space(settings: Settings, run: TrainRun, topology: str) -> Space:
    devices = tpu_devices(topology, settings.slices)
    chip = chip_of(devices[0].device_kind)
    # A scan compiles one layer, whatever their number.
    return make_space(settings, run, topology, chip, len(devices), scans=(True,))


def make_space(
    settings: Settings, run: TrainRun, name: str, chip: Chip, num_devices: int, scans: Iterable[bool]
) -> Space:
    """Raises ValueError if the run's settings refuse every mesh over so many devices."""
    run, accepted, notes = settle(settings, run, num_devices, scans)
    rates = step_rates(chip, run.precision.compute)
    usable = (chip.usable_bytes or chip.memory_bytes) / chip.devices_per_chip
    ranked = rank(accepted, lambda one: estimate(run.model, program(run, one, chip), one.layout, rates), usable)
    return Space(name, run, settings.slices, chip, num_devices, tuple(ranked), (*notes, f"ranked by: {rates.source}"))


def settle(
    settings: Settings, run: TrainRun, num_devices: int, scans: Iterable[bool]
) -> tuple[TrainRun, list[Candidate], list[str]]:
    """(the run with the rows of its step, the candidates that it accepts, what to say about them)."""
    accumulations = sorted({*MICROBATCHES, run.accumulation})
    candidates = list(enumerate_candidates(num_devices, accumulations, REMATS, scans, settings.slices))
    rows, spread = run.data.batch_size, run.data.batch_size * num_devices
    given = settings.batch
    if settings.batch_per_device is not None:
        given = settings.batch_per_device * num_devices
    reason = None
    for tried in [rows, spread] if given is None else [given]:
        changed = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=tried), accumulation=1)
        reasons = {one: refusal(changed, one, num_devices) for one in candidates}
        accepted = [one for one, refused in reasons.items() if refused is None]
        if accepted:
            notes = [] if given or tried == rows else [f"no mesh takes the config's {rows} rows; {rows} on each device"]
            return changed, accepted, notes
        reason = reasons[candidates[0]]
    raise ValueError(f"no mesh over {num_devices} devices can run {settings.name}; the first of them: {reason}")


def refusal(run: TrainRun, candidate: Candidate, num_devices: int) -> str | None:
    """Why the run's own checks refuse a candidate; None if they do not."""
    try:
        changed = apply(run, candidate)
        sizes = changed.mesh.shape(num_devices)
        check_placement(changed, Placement(AbstractMesh(sizes, MESH_AXES), changed.rules))
    except ValueError as error:
        return str(error)
    return None


def apply(run: TrainRun, candidate: Candidate) -> TrainRun:
    """The run as a candidate has it. Raises ValueError as TrainRun does."""
    layers = dataclasses.replace(run.layers, scan=candidate.scan, remat=candidate.remat)
    return dataclasses.replace(
        run,
        mesh=MeshConfig(**dataclasses.asdict(candidate.layout)),
        accumulation=candidate.accumulation,
        layers=layers,
        xla_options=(*run.xla_options, *candidate.options),
    )


def program(run: TrainRun, candidate: Candidate, chip: Chip) -> Program:
    """What the analytic model takes. Kernels that are "auto" are those that such a chip gets."""
    is_tpu = chip.name.startswith("TPU")
    activation_bytes = 4 if run.precision.compute == "float32" else 2
    attention, grouped = run.kernels.attention, run.kernels.grouped_matmul
    work = Work(
        mode="train",
        batch=run.data.batch_size,
        length=run.data.sequence_length,
        weights=train_weights(activation_bytes),
        cache=CACHE["bf16"],
        activation_bytes=activation_bytes,
        attention="unfused" if attention in ("xla", "reference") or (is_tpu and attention == "auto") else "fused",
        remat=candidate.remat,
        state=train_state(run, chip, candidate.accumulation),
    )
    if grouped == "auto":
        grouped = "ragged_dot" if is_tpu else "pallas" if chip.name.startswith(HOPPER) else "batched"
    return Program(work, candidate.accumulation, candidate.scan, grouped, run.loss.chunk_tokens)


def gpu_group(settings: Settings, run: TrainRun) -> Group:
    """By the analytic model alone."""
    chip = gpu_named(settings.chip)
    space = make_space(settings, run, chip.name, chip, settings.devices, scans=(True, False))
    shown = space.ranked[: max(settings.candidates, 8)]
    return as_group(settings, run, space, f"{settings.devices} × {chip.name}", [(one, None) for one in shown])


def compile_spaces(settings: Settings, run: TrainRun, spaces: list[Space]) -> list[Group]:
    """Compiles the shortlist of each, then what follows from its answers."""
    folder = (settings.cache_dir or run.cache_dir) / "plan"
    tasks: list[tuple[Space, Ranked]] = []
    follow_ups = dict.fromkeys((space.name for space in spaces), 0)
    answers: dict[int, Answer] = {}

    def add(space: Space, ranked: Ranked) -> Job:
        tasks.append((space, ranked))
        changed = apply(space.run, ranked.candidate)
        return Job(changed, space.name, space.num_slices, ranked.estimate.model_flops, folder)

    def follow(index: int, found: Answer) -> list[Job]:
        answers[index] = found
        space, ranked = tasks[index]
        print(f"{space.name}: {ranked.candidate}: {found}", file=sys.stderr, flush=True)
        # A refusal for memory takes seconds, a program a minute or more.
        if follow_ups[space.name] >= settings.candidates * (3 if found.fits is False else 1):
            return []
        more = next_candidate(space, ranked, found, [one.candidate for other, one in tasks if other is space])
        follow_ups[space.name] += more is not None
        return [] if more is None else [add(space, more)]

    jobs = [add(space, one) for space in spaces for one in shortlist(space.ranked, settings.candidates)]
    run_jobs(answer, jobs, min(settings.workers, len(jobs)), follow)
    return [slice_group(settings, run, space, tasks, answers) for space in spaces]


def next_candidate(space: Space, ranked: Ranked, found: Answer, tried: list[Candidate]) -> Ranked | None:
    """What an answer asks for: less memory where it doesn't fit, whole products where they were cut in parts."""
    candidate = ranked.candidate
    if found.fits is False:
        # Where the compiler names no bytes, what is tried next is half as large by the estimate: a step of the search,
        # and no figure that is shown.
        need, limit = (2.0, 1.0) if found.need_bytes is None else (found.need_bytes, found.limit_bytes)
        assert limit is not None, found
        return next_smaller(space.ranked, candidate, need, limit, tried)
    if found.windowed and not candidate.options:
        return dataclasses.replace(ranked, candidate=dataclasses.replace(candidate, options=(NO_WINDOWS,)))
    return None


def slice_group(
    settings: Settings, run: TrainRun, space: Space, tasks: list[tuple[Space, Ranked]], answers: dict[int, Answer]
) -> Group:
    mine = [(one, answers[index]) for index, (other, one) in enumerate(tasks) if other is space]
    name = space.name if space.num_slices == 1 else f"{space.num_slices} × {space.name}"
    return as_group(settings, run, space, name, mine)


def as_group(
    settings: Settings, run: TrainRun, space: Space, name: str, found: list[tuple[Ranked, Answer | None]]
) -> Group:
    return Group(
        name=name,
        chip=space.chip,
        num_devices=space.num_devices,
        rows=space.run.data.batch_size,
        length=space.run.data.sequence_length,
        dtype=space.run.precision.compute,
        entries=tuple(
            Entry(
                one,
                answer,
                command_line("train.py", str(settings.name), run, apply(space.run, one.candidate)),
            )
            for one, answer in found
        ),
        num_candidates=len(space.ranked),
        notes=space.notes,
    )
