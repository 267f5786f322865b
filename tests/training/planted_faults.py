"""Runs with one fault each, and a healthy one, on two virtual CPU devices: `python -m tests.training.planted_faults
FOLDER NAME ...` makes them, `... --examine FOLDER NAME ...` prints what the doctor finds in each, as one JSON object.

Two processes: with JAX 0.11.2 one that has captured a trace can't read one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from perf.capture import Capture
from perf.chips import Peak
from perf.doctor import diagnose_run, diagnose_trace
from perf.doctor_report import record
from perf.marks import STEP_MARK
from tests.training import runs
from training import loop


def outlast(running: Any) -> None:
    """Takes until what runs on the devices is done, and twice as long again: long against a step on any machine."""
    began = time.monotonic()
    jax.block_until_ready(running)
    time.sleep(max(2 * (time.monotonic() - began), 0.15))


# Steps of some length on a device of its own data each: little to communicate, and little host beside it.
HEALTHY: runs.Settings = {
    **runs.DENSE,
    "model.embed_dim": 128,
    "model.mlp_dim": 512,
    "model.head_dim": 32,
    "data.source": "random",
    "data.sequence_length": 64,
    "data.batch_size": 16,
    "mesh.data": 2,
    "mesh.fsdp": 1,
    "steps": 6,
    "profile": "3:6",
    "checkpoint.every": 0,
    "tensorboard": False,
}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class SlowLoader:
    """A run's loader that needs more time than the devices do."""

    def __init__(self, trainer: loop.Trainer, loader: loop.Loader) -> None:
        self.trainer, self.loader = trainer, loader

    def __next__(self):
        outlast(self.trainer.pending and self.trainer.pending.metrics)
        return next(self.loader)

    def state(self):
        return self.loader.state()

    def close(self) -> None:
        self.loader.close()


def slowed(open_loader: Callable[..., Any]) -> Callable[..., Any]:
    return lambda trainer, start: SlowLoader(trainer, open_loader(trainer, start))


def waiting(read: Callable[..., None]) -> Callable[..., None]:
    """A host that waits for the step that runs already, and then does something slow, before it starts the next."""

    def wait(trainer, pending, state):
        read(trainer, pending, state)
        outlast(state.params)

    return wait


def skewed(init: Callable[..., Any]) -> Callable[..., Any]:
    """Routers that send every token to the first experts."""

    def make(*arguments):
        state = init(*arguments)
        biases = jax.tree.map(lambda bias: bias.at[..., :2].add(10.0), state.biases)
        return dataclasses.replace(state, biases=biases)

    return make


def train(folder: Path, changes: runs.Settings) -> None:
    # Measuring a CPU's peak takes seconds, and the runs are too short for an MFU.
    peak = Peak(1e12, "float32", "a test's")
    with runs.jax_settings_kept(), replaced(loop, "peak_flops", lambda *_, **__: peak):
        loop.run(runs.run_of(runs.prepare(folder, {**HEALTHY, **changes})), console="quiet")


def healthy(folder: Path) -> None:
    train(folder, {})


def slow_loader(folder: Path) -> None:
    with replaced(loop.Trainer, "open_loader", slowed(loop.Trainer.open_loader)):
        train(folder, {})


def host_sync(folder: Path) -> None:
    with replaced(loop.Trainer, "read", waiting(loop.Trainer.read)):
        train(folder, {})


def bad_mesh(folder: Path) -> None:
    """A tiny model split over both devices in every layer: nothing but communication."""
    tiny = {"model.embed_dim": 16, "model.mlp_dim": 32, "model.head_dim": 8, "model.num_layers": 40}
    train(folder, {**tiny, "mesh.data": 1, "mesh.tensor": 2, "data.batch_size": 2, "data.sequence_length": 16})


def skewed_router(folder: Path) -> None:
    experts = {"model.moe.num_experts": 8, "model.moe.mlp_dim": 64, "model.moe.router_bias": True, "profile": None}
    with replaced(loop, "init_state", skewed(loop.init_state)):
        train(folder, {**experts, "mesh.data": 1, "mesh.expert": 2})


def changing_shape(folder: Path) -> None:
    """A jitted step that is called with another length each time."""

    @jax.jit
    def step(x):
        return jnp.tanh(x @ x).sum()

    lengths = [jnp.ones((size, size)) for size in (320, 328, 336, 344)]
    step(lengths[0]).block_until_ready()
    capture = Capture(folder)
    capture.start()
    for number, x in enumerate(lengths):
        with jax.profiler.StepTraceAnnotation(STEP_MARK, step_num=number):
            step(x).block_until_ready()
    capture.stop(kind="train")


MAKERS = {maker.__name__: maker for maker in (healthy, slow_loader, host_sync, bad_mesh, skewed_router, changing_shape)}


def examine(folder: Path) -> dict[str, Any]:
    run = folder / "runs" / "tiny"
    return record(diagnose_run(run) if run.is_dir() else diagnose_trace(folder))


def main(arguments: list[str]) -> None:
    reading = arguments[0] == "--examine"
    folder, *names = arguments[reading:]
    if reading:
        print(json.dumps({name: examine(Path(folder) / name) for name in names}))
        return
    for name in names:
        MAKERS[name](Path(folder) / name)


if __name__ == "__main__":
    main(sys.argv[1:])
