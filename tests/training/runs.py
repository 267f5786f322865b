"""Whole runs for the tests: tiny settings, in this process or in one of their own, with every batch written down.

`python -m tests.training.runs RECORD [--hold-save STEP] NAME --...` is `train.py NAME --...` that also appends a line
for each batch to RECORD, takes its time over each, and stops dead in the middle of the save of STEP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import checkpoint.store
import configs
import train
from data import Loader, combine_hashes, row_hashes
from training import loop
from training.config import TrainRun

ROOT = Path(__file__).resolve().parents[2]
Settings = dict[str, Any]

# Unless it is "none", the cache's path is part of each program's key, and no two folders share a program.
PATH_IN_KEYS = "jax_persistent_cache_enable_xla_caches"

DENSE: Settings = {
    "model.vocab_size": 288,
    "model.embed_dim": 32,
    "model.mlp_dim": 64,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.max_positions": 64,
    "data.source": "text",
    "data.sequence_length": 32,
    "data.batch_size": 8,
    "data.heldout_fraction": 0.2,
    "steps": 12,
    "optimizer.kind": "adamw",
    "optimizer.schedule.kind": "cosine",
    "optimizer.schedule.warmup_steps": 2,
    "optimizer.schedule.peak_lr": 0.01,
    "precision.compute": "float32",
    "layers.scan": True,
    "layers.document_mask": True,
    "checkpoint.every": 4,
    "sample.tokens": 0,
}
MOE: Settings = {**DENSE, "model.moe.num_experts": 4, "model.moe.mlp_dim": 32, "mesh.expert": 2}


def base_of(settings: Settings) -> str:
    """Config that the settings are changes of."""
    return "quickstart" if "model.moe.num_experts" in settings else "dense-1b"


COMPILATIONS: list[str] = []
"""One entry for each program that this process has compiled, or taken from the cache."""


def _listen(name: str, seconds: float, **_: Any) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(name)


jax.monitoring.register_event_duration_secs_listener(_listen)


def write_corpus(folder: Path, num_documents: int = 40) -> Path:
    """Small files of sentences over few words, the same ones every time."""
    folder.mkdir(parents=True)
    words = (
        "the",
        "a",
        "cat",
        "dog",
        "house",
        "tree",
        "red",
        "blue",
        "runs",
        "sleeps",
        "sings",
        "over",
        "under",
        "and",
    )
    draw = random.Random(0)
    for number in range(num_documents):
        lines = (" ".join(draw.choice(words) for _ in range(8)) for _ in range(draw.randint(2, 9)))
        (folder / f"{number:02}.txt").write_text("".join(f"{line}.\n" for line in lines))
    return folder


def prepare(folder: Path, settings: Settings) -> Settings:
    """`settings` with a corpus and all that a run writes below `folder`, but compiled programs with the tests' own."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    shared = ROOT / ".cache" / "xla-tests"
    shared.mkdir(parents=True, exist_ok=True)
    (cache / "xla").symlink_to(shared)
    corpus = (str(write_corpus(folder / "corpus")),) if settings["data.source"] == "text" else ()
    return {**settings, "name": "tiny", "runs_dir": folder / "runs", "cache_dir": cache, "data.paths": corpus}


def run_of(settings: Settings) -> TrainRun:
    return _changed(configs.load(base_of(settings)).train(), settings)


def _changed(config: Any, settings: Mapping[str, Any]) -> Any:
    """Nested dataclasses with dotted fields replaced."""
    groups: dict[str, Any] = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if rest:
            groups.setdefault(head, {})[rest] = value
        else:
            groups[head] = value
    nested = {
        name: _changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **nested)


def arguments(settings: Settings) -> list[str]:
    """`settings` as the command line of train.py spells them, the config's name first."""
    words = [base_of(settings)]
    for name, value in settings.items():
        *groups, field = name.replace("_", "-").split(".")
        if isinstance(value, bool):
            words.append("--" + ".".join([*groups, field if value else f"no-{field}"]))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + ".".join([*groups, field]), *map(str, values)]
    return words


@contextlib.contextmanager
def jax_settings_kept() -> Iterator[None]:
    """A run chooses its compilation cache for the whole process: here it goes back to the tests' own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_platforms", PATH_IN_KEYS)
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(PATH_IN_KEYS, "none")
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def train_here(settings: Settings, record: Path | None = None) -> dict[str, Any]:
    """Summary of a run in this process; its batches go to `record`."""
    with jax_settings_kept(), recording(record):
        return loop.run(run_of(settings), console="plain")


def main_here(settings: Settings) -> int:
    """Exit status of `train.py` with these settings, in this process."""
    with jax_settings_kept():
        return train.main(arguments(settings))


@contextlib.contextmanager
def recording(path: Path | None, pause: float = 0.0) -> Iterator[None]:
    """Each batch that a run takes is a line of `path`: its step and the hashes of this process's rows.

    `pause`: seconds before each batch, so that a signal sent from outside meets a run that still goes on.
    """

    class RecordingLoader(Loader):
        def __next__(self):
            time.sleep(pause)
            step, batch = super().__next__()
            with path.open("a") as lines:
                lines.write(json.dumps({"step": step, "rows": row_hashes(batch).tolist()}) + "\n")
            return step, batch

    before = loop.Loader
    if path is not None:
        loop.Loader = RecordingLoader
    try:
        yield
    finally:
        loop.Loader = before


def batches_of(*records: Path) -> list[tuple[int, str]]:
    """(step, hash of the global batch) of each batch, from the records of a run's processes in their order."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in records]
    together = zip(*lines, strict=True)
    return [(parts[0]["step"], combine_hashes(np.concatenate([_rows(part) for part in parts]))) for parts in together]


def _rows(line: dict[str, Any]) -> np.ndarray:
    return np.asarray(line["rows"], np.uint64)


def run_dir(settings: Settings) -> Path:
    return settings["runs_dir"] / settings["name"]


def records_of(settings: Settings, event: str = "train") -> list[dict[str, Any]]:
    """Records of metrics.jsonl; a last line that a kill cut short is left out."""
    text = (run_dir(settings) / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [record for record in records if record["event"] == event]


def losses_of(settings: Settings) -> dict[int, float]:
    """Loss after each step, as the last attempt that made the step reported it."""
    return {record["step"]: record["loss"] for record in records_of(settings)}


def summary_in(stdout: str) -> dict[str, Any]:
    """The JSON object on the last line."""
    return json.loads(stdout.splitlines()[-1])


def wait_until(condition: Callable[[], bool], process: Any, timeout: float = 120) -> None:
    """Polls every millisecond; fails if `process` ends or the time is over first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"exited {process.returncode}: {process.stderr.read()[-4000:]}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def hold_save(step: int) -> None:
    """Makes the save of `step` stand still once its arrays are written and its manifest is not."""
    write = checkpoint.store.write_manifest

    def stand_still(directory: Path, manifest: checkpoint.store.Manifest, **options: Any) -> None:
        if manifest.step == step:
            time.sleep(600)
        write(directory, manifest, **options)

    checkpoint.store.write_manifest = stand_still


def main(words: Sequence[str]) -> int:
    record, *words = words
    if words[0] == "--hold-save":
        hold_save(int(words[1]))
        words = words[2:]
    with jax_settings_kept(), recording(Path(record), pause=0.1):
        return train.main(list(words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
