"""Decode for `python -m perf plan`: servers of every tensor size that the devices hold, compiled and compared.

A server splits its layers over the devices of mesh axis 'tensor'; the devices that are left hold servers of their own,
each with its share of the rows. What is compiled is one server's round: the model up to the draw, and a greedy draw.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
from jax.sharding import AbstractMesh, Mesh

from checkpoint.pretrained import open_pretrained
from model.config import ModelConfig
from model.placement import check_model_placement
from parallel.compilation import Options
from parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from parallel.sharding import Placement
from parallel.topology import tpu_devices
from perf.chips import Bandwidth, Chip
from perf.commands.plan_compile import chip_of, compile_lowered, judge, run_jobs
from perf.commands.plan_settings import Settings, gpu_named
from perf.commands.roofline import DEFAULT_LENGTH
from perf.formats import CACHE, WEIGHTS, cache_token_bytes, stored_weight_bytes
from perf.operations import Work, expected_experts
from perf.plan import Answer, Candidate, Entry, Group, Ranked, command_line, divisors, rank
from perf.reached import reached_step
from perf.roofline import StepFloor, machine, step_floor
from perf.step_model import TENSOR, Communication, Layout, StepEstimate
from perf.traffic import Traffic, decode_mbu
from serving.config import ServeRun
from serving.resolve import resolve
from serving.startup import make_runner

# Rows of each device in decode, where none are given.
DECODE_ROWS = 8
GPU_DECODE = (
    "every op at the rate that it reached alone (perf/reached.py), and two all-reduces a layer among the devices of a "
    "server, 10 µs each and their bytes on the links: assumed, none was measured"
)

# Of an all-reduce of few rows among GPUs of a host, of which each layer has two: assumed, none was measured here.
_REDUCE_SECONDS = 10e-6

FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Question:
    """`rows` of all servers together, each with `context` tokens in its cache. `model`: that of `run`."""

    run: ServeRun
    model: ModelConfig
    rows: int
    context: int

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.run.dtype == "auto" else self.run.dtype

    def work(self, layout: Layout) -> Work:
        """Of one server."""
        kind = FORMATS[self.dtype]
        size = 4 if kind == "fp32" else 2
        return Work("decode", self.rows // layout.data, self.context, WEIGHTS[kind], CACHE[kind], size)

    def of_server(self, layout: Layout) -> ServeRun:
        """Settings of one server, with programs of this one shape."""
        rows, engine = self.rows // layout.data, self.run.engine
        # Room for the token that is decoded.
        width = -(-(self.context + 1) // engine.page_size) * engine.page_size
        engine = dataclasses.replace(
            engine,
            batch_sizes=(rows,),
            max_sequences=rows,
            widths=(width,),
            max_context=width,
            cell_tokens=max(engine.cell_tokens, rows * width),
        )
        mesh = MeshConfig(**{field.name: 1 for field in dataclasses.fields(MeshConfig)} | {TENSOR: layout.tensor})
        return dataclasses.replace(self.run, mesh=mesh, engine=engine)


@dataclasses.dataclass(frozen=True)
class DecodeJob:
    """One server's round on the part of a slice that it has: `topology` is that part."""

    run: ServeRun
    topology: str
    dtype: str
    model_flops: int
    folder: Path


def served(name: str, module: ModuleType) -> tuple[ServeRun, ModelConfig]:
    """(server of a config, its model): one that can only be trained is served with random weights."""
    run = module.serve() if hasattr(module, "serve") else ServeRun(name=name, model=module.train().model)
    model = open_pretrained(run.source).config if run.source else run.model
    assert model is not None
    return run, model


def layouts(question: Question, num_devices: int) -> Iterator[Layout]:
    """Servers of each tensor size that the model divides over and that leaves each server whole rows.

    Raises ValueError if there is none.
    """
    found, refused = False, f"--batch {question.rows} does not divide over servers of fewer devices each"
    for tensor in divisors(num_devices):
        if question.rows % (num_devices // tensor):
            continue
        sizes = tuple(tensor if axis == TENSOR else 1 for axis in MESH_AXES)
        try:
            check_model_placement(question.model, Placement(AbstractMesh(sizes, MESH_AXES), question.run.rules))
        except ValueError as error:
            refused = str(error)
            continue
        found = True
        yield Layout(data=num_devices // tensor, tensor=tensor)
    if not found:
        raise ValueError(f"no servers on {num_devices} devices can decode {question.rows} rows: {refused}")


def part_of(topology: str, num_parts: int) -> str | None:
    """The most compact part of a slice with a `num_parts`-th of its chips: v5e:2x2 of v5e:4x4 in 4; None if a part is
    less than a chip."""
    generation, _, text = topology.partition(":")
    dims = [int(n) for n in text.split("x")]
    chips, remainder = divmod(math.prod(dims), num_parts)
    if remainder:
        return None
    boxes = [box for box in itertools.product(*(divisors(n) for n in dims)) if math.prod(box) == chips]
    if not boxes:
        return None
    return f"{generation}:{'x'.join(map(str, min(boxes, key=lambda box: (max(box), box))))}"


def estimated(question: Question, layout: Layout, chip: Chip) -> StepEstimate:
    """A round of every server: ops at their floors, on GPUs at the rates that they reached, and layers' all-reduces.

    Raises ValueError for a GPU whose rates were not measured.
    """
    work = question.work(layout)
    floor = step_floor(question.model, work, machine(chip, layout.tensor, question.dtype))
    memory = {
        "weights": stored_weight_bytes(question.model, work.weights) / layout.tensor,
        "cache": work.batch
        * (work.length + 1)
        * question.model.num_layers
        * cache_token_bytes(question.model, work.cache)
        / layout.tensor,
    }
    parts = {"ops": floor.op_seconds if chip.name.startswith("TPU") else _reached_seconds(floor, work)}
    return StepEstimate(parts, _all_reduces(question, layout, chip), memory, floor.model_flops * layout.data)


def _reached_seconds(floor: StepFloor, work: Work) -> float:
    reached = reached_step(floor, work)
    if reached.seconds is None:
        raise ValueError(f"decode can't be predicted: {reached.reason}")
    return reached.seconds


def _all_reduces(question: Question, layout: Layout, chip: Chip) -> dict[str, Communication]:
    if layout.tensor == 1:
        return {}
    if chip.scale_up_bandwidth is None:
        raise ValueError(f"{chip.name} has no links between devices; plan for one device")
    work, count = question.work(layout), 2 * question.model.num_layers
    one = 2 * work.batch * question.model.embed_dim * work.activation_bytes * (1 - 1 / layout.tensor)
    seconds = count * (_REDUCE_SECONDS + one / (chip.scale_up_bandwidth / chip.devices_per_chip))
    return {TENSOR: Communication({"all-reduce": count * one}, seconds, seconds)}


def utilization(question: Question, layout: Layout, chip: Chip, seconds: float) -> float | None:
    """MBU of one server's round. Raises ImplausibleMeasurement, a ValueError, above 1."""
    model, work = question.model, question.work(layout)
    size = work.weights.bits // 8
    traffic = Traffic(model, weight_bytes=size, cache_bytes=size)
    experts = None
    if model.moe is not None:
        experts = round(model.num_moe_layers * expected_experts(model, work.batch))
    moved = traffic.step([work.length] * work.batch, experts)
    bandwidth = Bandwidth(chip.memory_bandwidth / chip.devices_per_chip, chip.sources["memory"])
    return decode_mbu(moved, seconds, bandwidth, num_devices=layout.tensor).value


def decode_job(question: Question, ranked: Ranked, topology: str, folder: Path) -> DecodeJob:
    layout = ranked.candidate.layout
    part = part_of(topology, layout.data)
    assert part is not None, (topology, layout)
    return DecodeJob(
        question.of_server(layout), part, question.dtype, ranked.estimate.model_flops // layout.data, folder
    )


def lower_round(
    run: ServeRun, devices: Sequence[jax.Device]
) -> tuple[tuple[jax.stages.Lowered, jax.stages.Lowered], Mesh, Options]:
    """The two programs of a server's round, up to the draw and the draw, for devices present or only described."""
    resolved = resolve(run, devices)
    (cell,) = (one for one in resolved.cells if one.drafts == 0)
    # A page is never anyone's.
    runner = make_runner(resolved, cell.rows * cell.width // run.engine.page_size + 1)
    return runner.lower_round(cell), make_mesh(run.mesh, devices), resolved.options


def answer_decode(job: DecodeJob) -> Answer:
    """Traces both programs of a round, compiles them unless that was done before, and predicts their sum."""
    try:
        programs, mesh, options = lower_round(job.run, tpu_devices(job.topology))
    except ValueError as error:
        return Answer(refused=str(error))
    answers = []
    for lowered, flops in zip(programs, (job.model_flops, 0), strict=True):
        compiled = compile_lowered(lowered, job.topology, mesh, options, job.folder)
        answers.append(judge(compiled, mesh, job.dtype, flops))
        if not compiled.fits:
            return answers[-1]
    return together(*answers, job.model_flops / mesh.size)


def together(first: Answer, second: Answer, model_flops: float) -> Answer:
    """Of two programs that run one after the other; memory is that of the larger."""
    assert first.prediction is not None and second.prediction is not None
    one, other = first.prediction, second.prediction
    total = {name: one[name] + other[name] for name in ("step_seconds", "program_flops")}
    summed = {
        name: _added(one[name], other[name])
        for name in ("categories_seconds", "exposed_seconds_by_axis", "hidden_seconds_by_axis", "collective_bytes")
    }
    losing = sorted(one["losing"] + other["losing"], key=lambda spent: spent["lost_seconds"], reverse=True)
    peak = one["program_flops"] / one["step_seconds"] / one["hfu"] if one["hfu"] else None
    rest = {
        "losing": losing,
        "hfu": None if peak is None else total["program_flops"] / total["step_seconds"] / peak,
        "assumptions": list(dict.fromkeys(one["assumptions"] + other["assumptions"])),
    }
    return dataclasses.replace(
        first,
        need_bytes=max(first.need_bytes or 0.0, second.need_bytes or 0.0),
        compile_seconds=(first.compile_seconds or 0.0) + (second.compile_seconds or 0.0),
        kept=first.kept and second.kept,
        prediction=one | total | summed | rest,
        mfu=None if peak is None else model_flops / total["step_seconds"] / peak,
    )


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def decode_groups(settings: Settings, module: ModuleType) -> list[Group]:
    run, model = served(str(settings.name), module)
    context = min(DEFAULT_LENGTH, model.max_positions - 1) if settings.context is None else settings.context
    if context >= model.max_positions:
        raise ValueError(f"--context {context} leaves no room for a token in max_positions={model.max_positions}")
    spaces = []
    if settings.chip is None:
        for topology in settings.topology.split(","):
            devices = tpu_devices(topology)
            chip = chip_of(devices[0].device_kind)
            spaces.append(server_space(settings, run, model, context, topology, chip, len(devices)))
        answers = compile_servers(settings, spaces, (settings.cache_dir or run.cache_dir) / "plan")
    else:
        chip = gpu_named(settings.chip)
        spaces.append(server_space(settings, run, model, context, chip.name, chip, settings.devices))
        answers = [[(one, None) for one in spaces[0].ranked]]
    return [server_group(settings, module, *pair) for pair in zip(spaces, answers, strict=True)]


@dataclasses.dataclass(frozen=True)
class ServerSpace:
    """Servers on one set of devices, best first."""

    name: str
    question: Question
    chip: Chip
    num_devices: int
    ranked: tuple[Ranked, ...]


def server_space(settings: Settings, run, model, context: int, name: str, chip: Chip, num_devices: int) -> ServerSpace:
    rows = settings.batch or (settings.batch_per_device or DECODE_ROWS) * num_devices
    question = Question(run, model, rows, context)
    found = [one for one in layouts(question, num_devices) if settings.chip or part_of(name, one.data)]
    usable = (chip.usable_bytes or chip.memory_bytes) / chip.devices_per_chip
    ranked = rank(map(Candidate, found), lambda one: estimated(question, one.layout, chip), usable)
    return ServerSpace(name, question, chip, num_devices, tuple(ranked))


def compile_servers(
    settings: Settings, spaces: list[ServerSpace], folder: Path
) -> list[list[tuple[Ranked, Answer | None]]]:
    """(candidate, answer) of each space: the best by the estimate, and where one doesn't fit the next."""
    tasks = [(space, one) for space in spaces for one in space.ranked[: settings.candidates]]
    answers: dict[int, Answer] = {}

    def job(space: ServerSpace, ranked: Ranked) -> DecodeJob:
        return decode_job(space.question, ranked, space.name, folder)

    def follow(index: int, found: Answer) -> list[DecodeJob]:
        answers[index] = found
        space, ranked = tasks[index]
        print(f"{space.name}: {ranked.candidate.layout}: {found}", file=sys.stderr, flush=True)
        tried = [one for other, one in tasks if other is space]
        more = [one for one in space.ranked if one not in tried][:1] if found.fits is False else []
        tasks.extend((space, one) for one in more)
        return [job(space, one) for one in more]

    run_jobs(answer_decode, [job(*task) for task in tasks], min(settings.workers, len(tasks)), follow)
    return [[(one, answers[n]) for n, (other, one) in enumerate(tasks) if other is space] for space in spaces]


def server_group(
    settings: Settings, module: ModuleType, space: ServerSpace, found: list[tuple[Ranked, Answer | None]]
) -> Group:
    question, entries = space.question, []
    for ranked, given in found:
        layout, command = ranked.candidate.layout, None
        if hasattr(module, "serve"):
            command = command_line("serve.py", str(settings.name), question.run, question.of_server(layout))
        entry = Entry(ranked, given, command)
        mbu = None if entry.seconds is None else utilization(question, layout, space.chip, entry.seconds)
        entries.append(dataclasses.replace(entry, mbu=mbu))
    copies = "servers of fewer devices than there are have their share of the rows each, and a command each"
    reached = [] if settings.chip is None else [GPU_DECODE]
    return Group(
        name=space.name if settings.chip is None else f"{space.num_devices} × {space.chip.name}",
        chip=space.chip,
        num_devices=space.num_devices,
        rows=question.rows,
        length=question.context,
        dtype=question.dtype,
        entries=tuple(entries),
        num_candidates=len(space.ranked),
        notes=(copies, *reached),
    )
