"""What `python -m perf plan` is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from perf.chips import Chip
from perf.command import Output
from perf.roofline import chip_named


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    """What to plan. Give --topology for TPU slices, or --chip with --devices for GPUs of one host."""

    name: tyro.conf.Positional[str | None] = None
    """Config, as train.py --list and serve.py --list print them."""
    topology: str | None = None
    """TPU slices, with commas between: v5e:4x4 or v5e:2x2,v5e:4x4,v5p:4x4x4."""
    slices: int = 1
    """TPU slices joined by the data-centre network."""
    chip: str | None = None
    """GPU of the table in perf/chips.py: h100, a100-40gb, ... An unknown one lists them."""
    devices: int | None = None
    """With --chip: how many."""
    mode: Literal["train", "decode"] = "train"
    """The step: one of training, or one decoded token of each row."""
    batch: int | None = None
    """Rows of a step, all devices together; by default the config's where some mesh takes them, else as many on each
    device; in decode 8 on each device."""
    batch_per_device: int | None = None
    """The same for one device, in the place of --batch."""
    seq: int | None = None
    """train: tokens of a row; by default the config's."""
    context: int | None = None
    """decode: tokens in each row's cache; by default 4096, or the model's longest sequence if that is less."""
    candidates: int = 2
    """Meshes to compile for each slice, beside those that follow from what they show; or rows to print with --chip."""
    workers: int = 2
    """Processes that compile at once: each takes a core and about 3 GB."""
    cache_dir: Path | None = None
    """Where compiled programs are kept; by default the run's cache_dir."""


def check(settings: Settings) -> None:
    """Raises ValueError for settings that do not go together."""
    if (settings.topology is None) == (settings.chip is None):
        raise ValueError("give either --topology (TPU slices, as in v5e:4x4) or --chip with --devices (GPUs)")
    if settings.chip is not None and settings.devices is None:
        raise ValueError(f"--chip {settings.chip} needs --devices, the number of them")
    if settings.topology is not None and settings.devices is not None:
        raise ValueError(f"--devices {settings.devices} goes with --chip; a topology has its own number of devices")
    if settings.batch is not None and settings.batch_per_device is not None:
        raise ValueError("give --batch or --batch-per-device, not both")
    foreign = "context" if settings.mode == "train" else "seq"
    if getattr(settings, foreign) is not None:
        raise ValueError(f"--{foreign} has no meaning in --mode {settings.mode}; leave it out")
    if settings.mode == "decode" and settings.slices > 1:
        raise ValueError(f"--slices {settings.slices}: a server is on one slice; leave it out")
    for option in ("slices", "devices", "batch", "batch_per_device", "seq", "context", "candidates", "workers"):
        value = getattr(settings, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")


def gpu_named(name: str) -> Chip:
    chip = chip_named(name)
    if chip.name.startswith("TPU"):
        raise ValueError(f"{chip.name} has slices to compile for; give --topology, as in v5e:4x4")
    return chip
