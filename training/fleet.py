"""What a training run tells a fleet's store: the facts by which runs are compared, and the record at its end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.provenance import code_version
from parallel import distributed
from perf.chips import chip_name
from perf.fleet import Work, scaling_tax
from perf.fleet_store import open_store
from perf.records import config_hash, distribution, from_summary, software_versions, work_per_device
from training.config import TrainRun

if TYPE_CHECKING:
    from training.loop import Trainer

# Settings that no step's work depends on. All others are hashed: one that is new makes runs differ rather than agree.
_FREE = (
    *("name", "steps", "checkpoint", "evaluation", "sample", "distributed", "seed"),
    *("runs_dir", "cache_dir", "fresh", "tensorboard", "fleet", "profile", "stragglers"),
)
# Where the corpus is, on this machine, and its order.
_FREE_DATA = ("paths", "text_field", "tokenizer", "tokenizer_bytes", "end_token", "heldout_fraction", "seed", "epochs")
# Numbers that an update is computed from, all in the same time.
_FREE_OPTIMIZER = ("schedule", "b1", "b2", "eps", "weight_decay")
_FREE_MUON = ("momentum", "scaling", "lr_scale")
_FREE_LOSS = ("z_loss_coef",)


def work_settings(run: TrainRun, num_devices: int) -> dict[str, Any]:
    """The settings that define a step's work for a device, as they were asked for: equal at every size for a run whose
    batch grows with its devices and whose mesh leaves an axis to them (-1)."""
    settings = dataclasses.asdict(run)
    for free, group in (
        (_FREE, settings),
        (("batch_size", *_FREE_DATA), settings["data"]),
        (_FREE_OPTIMIZER, settings["optimizer"]),
        (_FREE_MUON, settings["optimizer"]["muon"]),
        (_FREE_LOSS, settings["loss"]),
    ):
        for name in free:
            del group[name]
    return {**settings, "rows_per_device": work_per_device(run.data.batch_size, num_devices)}


def run_facts(trainer: Trainer) -> dict[str, Any]:
    """What the summary says about the run itself. Every process calls it: the hosts' step times are gathered."""
    run, mesh, ended = trainer.config, trainer.resolved.placement.mesh, time.time()
    device = mesh.devices.flat[0]
    process = distributed.process_info()
    of_hosts = [
        json.loads(text)
        for text in distributed.gather(json.dumps(distribution(process.index, trainer.meter.step_seconds)))
    ]
    times = [one for one in of_hosts if one is not None]
    return {
        "mode": "train",
        "workload": "train",
        "config_hash": config_hash(work_settings(run, mesh.size)),
        "chip": chip_name(device.device_kind),
        "num_processes": process.count,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "versions": software_versions(device.platform, code_version()),
        "first_started": trainer.goodput.first_started,
        "started": ended - sum(trainer.goodput.attempt_nanoseconds().values()) / 1e9,
        "ended": ended,
        "profiled": trainer.profile.captured is not None,
        "step_times": times,
    }


def scaling_facts(path: Path | None, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The run's scaling tax against what the store at `path` has of the same work on fewer devices of the chip; None,
    with the reason, where there is nothing to compare."""
    if path is None:
        return _no_tax("no store of runs is named: --fleet")
    if not distributed.is_primary():
        return _no_tax("the first process alone reads the store")
    if summary["mfu"] is None:
        return _no_tax("the run has no mfu")
    try:
        # A new store is made when its first record is written.
        records = open_store(path).read().records if path.exists() else ()
    # The run itself is complete: that its baseline can't be read is no reason to lose its figures.
    except (OSError, ValueError) as error:
        return _no_tax(f"{path} can't be read: {error}")
    work = Work(summary["workload"], summary["config_hash"], summary["chip"])
    found = scaling_tax(records, work, summary["num_devices"], summary["mfu"])
    return found or _no_tax(f"{path} has no run of this config on fewer devices of this chip")


def _no_tax(reason: str) -> dict[str, Any]:
    return {"scaling_tax": None, "scaling_tax_reason": reason}


def check_store(path: Path) -> None:
    """Before the run, which may take days. Raises ValueError for a path that is, and can become, no store."""
    open_store(path, create=True)


def append_run(path: Path, summary: dict[str, Any], run_dir: Path) -> None:
    """Raises OSError, with the command that makes good for it, if the store can't be written."""
    try:
        open_store(path, create=True).append(from_summary(summary))
    except (OSError, ValueError) as error:
        raise OSError(
            f"the run is complete, but has no record in {path} ({error}); once that is mended: "
            f"python -m perf fleet record {run_dir} --store {path}"
        ) from error
