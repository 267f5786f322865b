"""Runs one config on several numbers of devices, and says what the larger ones lose and to what."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro

import configs
from perf.breakdown import breakdown
from perf.chips import CHIPS, Chip
from perf.command import Output
from perf.fleet_report import plural
from perf.plan import Candidate
from perf.report import Report
from perf.scaling import Repeat, Shares, Size, Tax, common_peak, mfus, rates, scaling_tax, shares_of
from perf.scaling_report import Predicted, Survey, scaling_report
from perf.step_model import Layout, estimate
from perf.step_rates import step_rates
from perf.trace import find_trace, read_trace
from training.config import EvalConfig, SampleConfig, TrainRun
from training.profile import WARMUP_STEPS

ROOT = Path(__file__).resolve().parents[2]

PROFILED_STEPS = 4
# Before the profiled window: more than warm up, so that the host's queues are as they stay.
_BEFORE_PROFILE = WARMUP_STEPS + 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Each run is a `train.py NAME` of its own. Settings of train.py follow after a lone --, as in
    `scaling dense-1b --sizes 1,2 -- --layers.scan`."""

    name: tyro.conf.Positional[str]
    """Config by name."""
    train: tyro.conf.Positional[tuple[str, ...]] = ()
    """Settings of train.py, after --."""
    sizes: str = "1,2,4,8"
    """Numbers of devices; the smallest is the base."""
    strong: bool = False
    """The config's batch at every size; by default each device gets the rows that one of the base gets."""
    steps: int = 30
    """Steps of a run, of which the first two are not measured."""
    repeats: int = 3
    """Runs of each size, at the least."""
    max_repeats: int = 6
    """Runs of each size, at the most."""
    target: float = 0.02
    """Half of a tax's 95% interval below which no more runs are made."""
    profile: bool = True
    """Make one more run of each size first, profiled, for the parts of the tax."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu: virtual devices. auto: gpu where this machine has one and JAX its plugin."""
    gpus: str | None = None
    """Numbers of the GPUs to use, as in 4,5,6,7; the first ones by default."""
    launcher: str | None = None
    """Command that starts the processes of a run, {devices} being its size, as in "srun --ntasks={devices}
    --gpus-per-task=1"; the devices are then the launcher's, and --distributed.mode belongs after the --."""
    fleet: Path | None = None
    """Store that gets a record of every run that is not profiled."""
    runs_dir: Path = Path("runs/scaling")
    """Folder of the runs. Nothing of them is saved but what they measured."""
    cache_dir: Path = Path(".cache")
    """Compiled programs, shared by all runs."""


def report(settings: Settings) -> Report:
    """Raises ValueError for an unknown config, for sizes that can't be and for a run that fails, with what it said."""
    sizes = parse_sizes(settings.sizes)
    run = train_settings(settings)
    check(settings, run, sizes)
    study = Study(settings, run, sizes)
    if settings.profile:
        for devices in sizes:
            study.profile(devices)
    for number in range(1, settings.max_repeats + 1):
        due = [devices for devices in sizes if number <= settings.repeats or devices in study.wide()]
        for devices in due:
            study.repeat(devices, number)
    return scaling_report(study.survey())


def parse_sizes(text: str) -> tuple[int, ...]:
    """Ascending. Raises ValueError for anything but two or more different numbers from 1."""
    words = [word.strip() for word in text.split(",")]
    if (
        not all(word.isdecimal() and int(word) >= 1 for word in words)
        or len(set(words)) < 2
        or len(set(words)) < len(words)
    ):
        raise ValueError(f"--sizes {text!r} must be two or more different numbers of devices, as in 1,2,4,8")
    return tuple(sorted(int(word) for word in words))


def train_settings(settings: Settings) -> TrainRun:
    """The config with what follows the --, as train.py would take it. Raises ValueError as it does."""
    module = configs.load(settings.name)
    if not hasattr(module, "train"):
        raise ValueError(f"config {settings.name!r} can't be trained; see train.py --list")
    return tyro.cli(
        tyro.conf.AvoidSubcommands[TrainRun],
        prog=f"python -m perf scaling {settings.name} --",
        # As the runs are started: a text source and its sample may both be changed.
        default=dataclasses.replace(module.train(), sample=SampleConfig(), evaluation=EvalConfig()),
        args=list(settings.train),
    )


def check(settings: Settings, run: TrainRun, sizes: tuple[int, ...]) -> None:
    """Before the first run, of all of them. Raises ValueError."""
    least = max(_BEFORE_PROFILE + PROFILED_STEPS, WARMUP_STEPS + 8)
    if settings.steps < least:
        raise ValueError(f"--steps {settings.steps} must be at least {least}")
    if not 1 <= settings.repeats <= settings.max_repeats:
        raise ValueError(
            f"--repeats {settings.repeats} must be at least 1 and at most --max-repeats {settings.max_repeats}"
        )
    if not settings.target > 0:
        raise ValueError(f"--target {settings.target} must be above 0: a share of the base's MFU")
    if settings.launcher is None and run.distributed.mode != "none":
        raise ValueError(
            f"--distributed.mode {run.distributed.mode} needs --launcher, the command that starts processes"
        )
    for devices in sizes:
        run.mesh.shape(devices)
        batch_size(settings, run, sizes, devices)


def batch_size(settings: Settings, run: TrainRun, sizes: tuple[int, ...], devices: int) -> int:
    """Rows of a step. Raises ValueError where a device's rows are no whole number of the base's."""
    rows = run.data.batch_size
    if settings.strong:
        return rows
    if rows * devices % sizes[0]:
        raise ValueError(
            f"data.batch_size={rows} on {sizes[0]} devices are no whole number of rows on {devices}; set "
            f"--data.batch-size after the -- to a multiple of {sizes[0]}"
        )
    return rows * devices // sizes[0]


class Study:
    """Starts the runs, one after the other, and keeps what they measured."""

    def __init__(self, settings: Settings, run: TrainRun, sizes: tuple[int, ...]) -> None:
        self.settings, self.run, self.sizes = settings, run, sizes
        self.on_gpu = settings.platform == "gpu" or (settings.platform == "auto" and has_gpu())
        self.repeats: dict[int, list[Repeat]] = {devices: [] for devices in sizes}
        self.shares: dict[int, Shares] = {}
        self.shares_reason = {devices: "no run was profiled: --no-profile" for devices in sizes}
        self.summary: dict[str, Any] = {}
        self.began = time.monotonic()

    def batch(self, devices: int) -> int:
        return batch_size(self.settings, self.run, self.sizes, devices)

    def profile(self, devices: int) -> None:
        """A run that compiles what the others take from the cache, and whose trace says where a step's time goes."""
        first = _BEFORE_PROFILE + 1
        last = first + PROFILED_STEPS - 1
        name = f"{self.settings.name}-{devices}-profiled"
        self.start(devices, name, steps=last, words=["--profile", f"{first}:{last}"])
        folder = self.settings.runs_dir / name / "profiles"
        try:
            self.shares[devices] = shares_of(breakdown(read_trace(find_trace(folder))))
        except ValueError as error:
            self.shares_reason[devices] = f"its trace can't be read: {error}"

    def repeat(self, devices: int, number: int) -> None:
        words = [] if self.settings.fleet is None else ["--fleet", str(self.settings.fleet.absolute())]
        name = f"{self.settings.name}-{devices}-{number}"
        self.summary = self.start(devices, name, steps=self.settings.steps, words=words)
        repeat = repeat_of(self.summary)
        self.repeats[devices].append(repeat)
        say(
            f"{plural(devices, 'device')}, run {number}: {repeat.tokens_per_second_per_device:,.0f} tokens/s per "
            f"device, step {repeat.step_mean * 1e3:.1f} ms ({time.monotonic() - self.began:.0f} s since the start)"
        )

    def start(self, devices: int, name: str, *, steps: int, words: list[str]) -> dict[str, Any]:
        """The summary of a run. Raises ValueError, with the end of what it printed, for one that fails."""
        say(f"{plural(devices, 'device')}: {name}, {steps} steps")
        command = [*self.prefix(devices), sys.executable, str(ROOT / "train.py"), self.settings.name]
        command += [*self.settings.train, *self.words(devices, name, steps), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        summary = last_summary(done.stdout)
        if done.returncode or summary is None:
            said = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise ValueError(
                f"the run on {plural(devices, 'device')} ended with status {done.returncode}; it said:\n{said}"
            )
        if summary["num_devices"] != devices:
            raise ValueError(
                f"the run on {plural(devices, 'device')} had {summary['num_devices']}: so many are there; lower "
                "--sizes, or set --platform, --gpus or --launcher"
            )
        return summary

    def prefix(self, devices: int) -> list[str]:
        """What comes before Python: the launcher, or `env` with what makes so many devices visible."""
        if self.settings.launcher is not None:
            return self.settings.launcher.replace("{devices}", str(devices)).split()
        if not self.on_gpu:
            return ["env", "JAX_PLATFORMS=cpu", f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"]
        numbers = [str(number) for number in range(devices)]
        if self.settings.gpus is not None:
            numbers = self.settings.gpus.split(",")[:devices]
        return ["env", f"CUDA_VISIBLE_DEVICES={','.join(numbers)}"]

    def words(self, devices: int, name: str, steps: int) -> list[str]:
        """Settings of a run that is there to be measured. The last of two equal ones counts."""
        settings = self.settings
        return [
            *("--name", name, "--runs-dir", str(settings.runs_dir), "--cache-dir", str(settings.cache_dir), "--fresh"),
            *("--steps", str(steps), "--data.batch-size", str(self.batch(devices)), "--no-tensorboard"),
            *("--checkpoint.every", "0", "--evaluation.every", "0", "--sample.tokens", "0"),
            *("--data.heldout-fraction", "0"),
            # A warm-up may be longer than the run, and a rate without one is too high: this one changes nothing.
            *("--optimizer.schedule.kind", "constant", "--optimizer.schedule.warmup-steps", "0"),
            *("--optimizer.schedule.peak-lr", "1e-6"),
        ]

    def sizes_so_far(self) -> tuple[Size, ...]:
        return tuple(
            Size(
                devices,
                self.batch(devices),
                tuple(repeats),
                self.shares.get(devices),
                None if devices in self.shares else self.shares_reason[devices],
            )
            for devices, repeats in self.repeats.items()
        )

    def wide(self) -> set[int]:
        """Sizes that need more runs: those whose tax is not known well enough, and with any of them the base."""
        base, *others = self.sizes_so_far()
        found = {size.devices for size in others if tax_so_far(base, size).half_width > self.settings.target}
        return found | {base.devices} if found else found

    def survey(self) -> Survey:
        run = self.run
        predicted, reason = predictions(run, self.summary["chip"], [(n, self.batch(n)) for n in self.sizes])
        return Survey(
            config=self.settings.name,
            strong=self.settings.strong,
            chip=self.summary["chip"],
            virtual=self.settings.launcher is None and not self.on_gpu,
            sizes=self.sizes_so_far(),
            target=self.settings.target,
            predicted=predicted,
            predicted_reason=reason,
        )


def tax_so_far(base: Size, size: Size) -> Tax:
    peak = common_peak((base, size))
    first, second = mfus(base, peak), mfus(size, peak)
    return scaling_tax(rates(base), rates(size)) if first is None or second is None else scaling_tax(first, second)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has_gpu() -> bool:
    """Without touching one: a process that does takes most of its memory, and the runs need it."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return any(map(importlib.util.find_spec, plugins)) and any(Path("/dev").glob("nvidia[0-9]*"))


def last_summary(stdout: str) -> dict[str, Any] | None:
    """Of a run, from what its processes printed: the last line that is one."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if found.get("event") == "summary":
                return found
    return None


def table_chip(name: str) -> Chip | None:
    """As a summary names it; None for one that the table does not have."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def repeat_of(summary: dict[str, Any]) -> Repeat:
    """Raises ValueError for a run that measured no steps."""
    if not summary["measured_steps"]:
        raise ValueError(f"the run {summary['config']} measured no step: {summary.get('tokens_per_second_reason')}")
    return Repeat(
        flops_per_second_per_device=summary["mfu_flops_per_second_per_device"],
        tokens_per_second_per_device=summary["tokens_per_second_per_device"],
        peak=summary["peak_flops_per_device"],
        peak_source=summary["peak_source"],
        peak_reason=summary.get("peak_reason"),
        is_peak_measured=table_chip(summary["chip"]) is None,
        step_mean=summary["measured_seconds"] / summary["measured_steps"],
        step_median=summary["step_seconds_median"],
    )


def predictions(run: TrainRun, chip_name: str, sizes: list[tuple[int, int]]) -> tuple[dict[int, Predicted], str | None]:
    """By devices, of (devices, rows of a step), for the run's own mesh; empty with a reason."""
    from perf.commands.plan import program

    chip = table_chip(chip_name)
    if chip is None:
        return {}, f"{chip_name} is not in the table of chips"
    found = {}
    for devices, rows in sizes:
        shape = dict(zip((field.name for field in dataclasses.fields(run.mesh)), run.mesh.shape(devices), strict=True))
        layout = Layout(**{field.name: shape[field.name] for field in dataclasses.fields(Layout)})
        candidate = Candidate(layout, run.accumulation, run.layers.remat, run.layers.scan)
        sized = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=rows))
        try:
            step = estimate(run.model, program(sized, candidate, chip), layout, step_rates(chip, run.precision.compute))
        # Everything was measured by now: no reason to lose it.
        except ValueError as error:
            return {}, str(error)
        found[devices] = Predicted(step.seconds, step.exposed_seconds)
    return found, None
