"""A training run from its settings to its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import data
from checkpoint.store import Checkpoint, CheckpointError, CheckpointStore
from data import Corpus, Loader
from parallel import distributed
from parallel.compilation import compile_program, use_compilation_cache
from perf.chips import peak_flops
from perf.flops import ledger
from perf.goodput import GoodputLedger
from perf.meter import StepMeter
from training.config import TrainRun
from training.diagnose import NonFiniteError, find_non_finite
from training.evaluate import Evaluation, Evaluator
from training.feed import batch_names, document_lengths, to_device
from training.fleet import append_run, check_store
from training.profile import WARMUP_STEPS, ProfiledWindow
from training.report import ConsoleMode, Reporter
from training.resolve import Resolved, resolve
from training.sample import encode_prompt, sample_text
from training.state import TrainState, abstract_state, init_state, place_copies, state_shardings
from training.step import Batch, make_train_step
from training.stragglers import HostWatch
from training.summary import summarize

# What ends a run that was rightly set up; anything else that escapes is a bug or a ValueError about the settings.
FAILURES = (CheckpointError, NonFiniteError, OSError)


def run(run: TrainRun, *, console: ConsoleMode = "auto", started_ns: int | None = None) -> dict[str, Any]:
    """Trains, evaluates and samples as `run` says, resuming what an earlier attempt left, and returns the summary.

    The summary is also the last line on stdout. SIGTERM saves and returns early. `started_ns`: `time.monotonic_ns` at
    the start of the process, from which goodput counts.

    Raises ValueError for settings or inputs that can't work, CheckpointError and OSError for a disk that can't be
    written (the last checkpoint stays intact), NonFiniteError for a loss or gradient that is NaN or infinite.
    """
    distributed.initialize(run.distributed)
    resolved = resolve(run, jax.devices())
    if run.fleet is not None:
        check_store(run.fleet)
    use_compilation_cache(run.cache_dir)
    if run.fresh:
        set_aside(run)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(
            Reporter(run.run_dir, console=console, tensorboard=run.tensorboard, total_steps=run.steps)
        )
        primary = distributed.is_primary()
        goodput = GoodputLedger(run.run_dir if primary else None, started_ns=started_ns)
        stack.callback(goodput.close)
        with goodput.bucket("startup"):
            for line in resolved.choices:
                reporter.say(line)
            corpus = data.prepare(run.data, vocab_size=run.model.vocab_size, cache_dir=run.cache_dir)
            reporter.say(corpus.summary())
            if primary and corpus.tokenizer is not None:
                # With the weights: they are worth nothing without it.
                corpus.tokenizer.save(run.run_dir / "tokenizer.json")
            if run.sample.tokens:
                encode_prompt(run, corpus.tokenizer)
            directory = run.checkpoint.directory or run.run_dir / "checkpoints"
            store = stack.enter_context(
                CheckpointStore(
                    directory,
                    run.checkpoint,
                    architecture=architecture(run),
                    run_config=as_json(run),
                    on_note=reporter.say,
                )
            )
            stop = stack.enter_context(stop_signal())
        trainer = Trainer(resolved, corpus, store, reporter, goodput, stop)
        stack.callback(trainer.close)
        summary = trainer.run()
        if primary and run.fleet is not None:
            append_run(run.fleet, summary, run.run_dir)
    # Not after an error: the other processes would be waited for, and they wait for this one.
    distributed.shutdown()
    return summary


def set_aside(run: TrainRun) -> None:
    """Renames the folder of an earlier run of this name to the first free NAME.1, NAME.2, ..."""
    if distributed.is_primary() and run.run_dir.exists():
        number = 1
        while (aside := run.run_dir.with_name(f"{run.run_dir.name}.{number}")).exists():
            number += 1
        run.run_dir.rename(aside)
    distributed.barrier("set_aside")


# Of a model's settings, those that its arrays do not depend on: a resumed run may change them.
_FREE = ("max_positions", "init_stddev")
_FREE_MOE = ("dispatch", "capacity_factor", "load_balance_coef", "router_z_coef", "bias_update_rate")


def architecture(run: TrainRun) -> dict[str, Any]:
    """What a checkpoint's arrays depend on: one of another architecture or layout can't be resumed from."""
    model = {name: value for name, value in as_json(run.model).items() if name not in _FREE}
    if model["moe"] is not None:
        model["moe"] = {name: value for name, value in model["moe"].items() if name not in _FREE_MOE}
    found = {"model": model, "scan": run.layers.scan, "optimizer": run.optimizer.kind}
    # Not where it is the default: checkpoints of before there was a choice have none.
    return found if run.precision.scaling == "current" else found | {"scaling": run.precision.scaling}


def as_json(config: Any) -> Any:
    """Nested dataclasses as JSON values; paths as strings."""
    if dataclasses.is_dataclass(config):
        return {field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [as_json(item) for item in config]
    return config if config is None or isinstance(config, bool | int | float | str) else str(config)


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. The handler of before is put back at the end."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass
class Pending:
    """A step that the device may still be running."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch
    documents: np.ndarray | None
    probe: list[jax.Array]
    """Queued behind it; empty for none."""


class Trainer:
    """The loop and what it holds. Metrics are read one step late, so that the host never keeps the device waiting."""

    def __init__(
        self,
        resolved: Resolved,
        corpus: Corpus,
        store: CheckpointStore,
        reporter: Reporter,
        goodput: GoodputLedger,
        stop: threading.Event,
    ):
        self.resolved, self.corpus, self.store = resolved, corpus, store
        self.reporter, self.goodput, self.stop = reporter, goodput, stop
        self.config = resolved.run
        self.evaluator = Evaluator(resolved, corpus) if corpus.heldout is not None else None
        self.loader: Loader | None = None
        self.pending: Pending | None = None
        self.read_at: float | None = None
        self.interrupted = True
        self.losses: dict[int, float] = {}
        self.evaluation: Evaluation | None = None
        self.evaluated_at: int | None = None
        self.profile = ProfiledWindow(self.config.profile, self.config.run_dir)
        self.watch = HostWatch(self.config.stragglers, self.config.run_dir, reporter)

    def run(self) -> dict[str, Any]:
        # What can be wrong with the inputs is found here, before anything is compiled.
        found = self.find_checkpoint()
        with self.goodput.bucket("startup"):
            self.loader = self.open_loader(found.step if found is not None else 0)
            self.meter = make_meter(self.resolved)
        state, start = self.start(found)
        stopped = False
        if start < self.config.steps:
            with self.goodput.bucket("compile"):
                self.step = self.compile()
                self.watch.compile()
            state, stopped = self.train(state, start)
        text = None
        if not stopped:
            if self.evaluator is not None:
                self.evaluate(state)
            if self.config.sample.tokens:
                with self.goodput.bucket("eval"):
                    text = sample_text(self.resolved, state, self.corpus.tokenizer)
        with self.goodput.bucket("checkpoint"):
            self.save(state)
            self.store.wait()
        if text is not None:
            self.reporter.say(text, results=True)
        summary = summarize(self, stopped="SIGTERM" if stopped else None)
        self.reporter.summary(summary)
        return summary

    def find_checkpoint(self) -> Checkpoint | None:
        """Newest complete checkpoint, or None: a fresh start. Raises ValueError if it is later than the run's end."""
        with self.goodput.bucket("restore"):
            found = self.store.latest()
        if found is not None and found.step > self.config.steps:
            raise ValueError(
                f"the checkpoint {found.path} is after steps={self.config.steps}; raise steps, choose another name, "
                "or start over with --fresh"
            )
        return found

    def open_loader(self, start: int) -> Loader:
        """Batches from step `start` on. Raises ValueError if they end before the run does."""
        config, process = self.config, distributed.process_info()
        loader = Loader(
            self.corpus.train,
            config.data,
            start_step=start,
            process_index=process.index,
            process_count=process.count,
        )
        if loader.num_steps is not None and loader.num_steps < config.steps:
            loader.close()
            raise ValueError(
                f"the data ends after step {loader.num_steps} (data.epochs={config.data.epochs}), before "
                f"steps={config.steps}; raise data.epochs or lower steps"
            )
        return loader

    def start(self, found: Checkpoint | None) -> tuple[TrainState, int]:
        """Restored or initial state, and the number of steps it has behind it."""
        resolved = self.resolved
        definition, optimizer = resolved.spec.definition, resolved.optimizer
        if found is not None:
            with self.goodput.bucket("restore"):
                shardings = state_shardings(definition, optimizer, resolved.placement)
                abstract = abstract_state(definition, optimizer, shardings)
                state, manifest = self.store.restore(abstract.saved, step=found.step)
                start = data.step_of_state(manifest.data_state, self.corpus.train, self.config.data)
                assert start == found.step, f"data at step {start} in the checkpoint of step {found.step}"
                self.reporter.say(f"resumed from {found.path} after step {start}")
                self.reporter.resume(start)
                self.goodput.resumed(start)
                return place_copies(definition, state, shardings, resolved.spec.halves.paths), start
        with self.goodput.bucket("compile"):
            self.goodput.resumed(0)
            halves = resolved.spec.halves.paths
            state = init_state(definition, optimizer, self.config.seed, resolved.placement, halves)
            return jax.block_until_ready(state), 0

    def compile(self) -> jax.stages.Compiled:
        """The train step, ahead of its first use: a batch of another shape would be an error, never a recompilation."""
        resolved, config = self.resolved, self.config
        began = time.monotonic()
        compiled = compile_program(lower_step(resolved), resolved.compiler_options)
        memory = compiled.memory_analysis()
        peak = "" if memory is None else f", {memory.peak_memory_in_bytes / 2**30:.2f} GiB at its peak on each device"
        self.reporter.say(f"compiled the train step of {config.name} in {time.monotonic() - began:.1f} s{peak}")
        return compiled

    def train(self, state: TrainState, start: int) -> tuple[TrainState, bool]:
        """Steps until the last, or until SIGTERM on any host; True if stopped by it."""
        config = self.config
        if self.profile.steps and start + WARMUP_STEPS >= self.profile.steps.start:
            self.reporter.say(f"profile={config.profile}: not captured, the run goes on after step {start}")
        for step in range(start, config.steps):
            with self.watch.span("barrier"):
                stopped = distributed.any_process(self.stop.is_set())
            if stopped:
                state = self.drain(state)
                self.profile.close(**self.captured_facts())
                saving = "saving after" if config.checkpoint.every else "checkpoint.every=0: nothing is saved of"
                self.reporter.say(f"SIGTERM: {saving} step {step} and stopping")
                return state, True
            if self.profile.opens(step + 1, start=start):
                state = self.drain(state)
                self.profile.open()
            batch, documents = self.next_batch()
            with self.goodput.bucket("step"), self.profile.annotation(step + 1):
                state, metrics = self.step(state, batch)
                probe = self.watch.queue_probe(metrics["loss"])
                previous, self.pending = self.pending, Pending(step + 1, metrics, batch, documents, probe)
                if previous is not None:
                    self.read(previous, state)
            done = step + 1
            if self.profile.closes(done):
                state = self.drain(state)
                self.profile.close({"step": self.step}, **self.captured_facts())
                self.interrupted = True
                self.reporter.say(f"profiled steps {config.profile}: {self.profile.captured}")
            if config.evaluation.every and done % config.evaluation.every == 0 and done < config.steps:
                state = self.drain(state)
                self.evaluate(state, config.evaluation.batches)
            if config.checkpoint.every and done % config.checkpoint.every == 0 and done < config.steps:
                state = self.drain(state)
                with self.goodput.bucket("checkpoint"):
                    self.save(state)
                self.interrupted = True
        return self.drain(state), False

    def captured_facts(self) -> dict[str, Any]:
        """What the note beside a trace says of the run."""
        mesh = self.resolved.placement.mesh
        return {"config": self.config.name, "mesh": dict(mesh.shape), "settings": as_json(self.config)}

    def next_batch(self) -> tuple[Batch, np.ndarray | None]:
        """Next batch on the devices. Waiting counts as input wait only if the device has nothing left to do."""
        assert self.loader is not None
        began = self.pending.metrics["loss"].is_ready() if self.pending is not None else True
        bucket = self.goodput.bucket("input_wait" if began else "step")
        with bucket, self.profile.input(), self.watch.span("input"):
            _, host = next(self.loader)
            documents = document_lengths(host) if self.config.layers.document_mask else None
            batch = to_device(host, self.resolved.placement, self.config.layers.document_mask)
        # Other hosts' rows are taken to be cut like this host's: reading theirs would cost a collective a step.
        return batch, documents if documents is None else np.tile(documents, distributed.process_info().count)

    def drain(self, state: TrainState) -> TrainState:
        """Reads the metrics of the last step."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with self.goodput.bucket("step"):
                self.read(pending, state)
        return state

    def read(self, pending: Pending, state: TrainState) -> None:
        """Waits for a step and reports it. Raises NonFiniteError if its loss or gradient was not finite."""
        probe = self.watch.wait(pending.metrics["loss"], pending.probe)
        metrics = jax.device_get(pending.metrics)
        now = time.perf_counter()
        if metrics.pop("bad_step") >= 0:
            where = find_non_finite(self.resolved.spec, state, pending.batch)
            raise NonFiniteError(
                f"step {pending.step}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; {where}. "
                "The weights of the step before are unharmed; the last checkpoint is intact. Lower "
                "optimizer.schedule.peak_lr, or look at the data of this step"
            )
        self.losses[pending.step] = float(metrics["loss"])
        self.goodput.step_done(pending.step)
        record: dict[str, Any] = {name: value for name, value in metrics.items() if not name.endswith("_LE")}
        profiled = self.profile.covers(pending.step)
        measured = not (self.interrupted or profiled)
        seconds = None if self.read_at is None else now - self.read_at
        record |= self.watch.done(pending.step, seconds, probe, measured=measured)
        if seconds is not None:
            record |= self.meter.record(seconds, documents=pending.documents, measured=measured)
            if profiled:
                record["profiled"] = True
        self.read_at, self.interrupted = now, False
        self.reporter.log(pending.step, record)

    def evaluate(self, state: TrainState, batches: int | None = None) -> None:
        assert self.evaluator is not None
        if not self.evaluator.compiled:
            with self.goodput.bucket("compile"):
                self.evaluator.compile()
        with self.goodput.bucket("eval"):
            self.evaluation = self.evaluator(state, batches)
        self.interrupted = True
        self.evaluated_at = int(state.step)
        self.reporter.log(
            self.evaluated_at,
            {"loss": self.evaluation.loss, "bits_per_byte": self.evaluation.bits_per_byte},
            event="eval",
        )

    def save(self, state: TrainState) -> None:
        assert self.loader is not None
        step = int(state.step)
        if step == 0 or not self.config.checkpoint.every or step in self.store.list_steps():
            return
        metrics = {"loss": self.losses[step]}
        if self.evaluation is not None and self.evaluated_at == step:
            metrics["eval_loss"] = self.evaluation.loss
        self.store.save(step, state.saved, data_state=self.loader.state(), metrics=metrics)

    def close(self) -> None:
        self.profile.close(**self.captured_facts())
        if self.loader is not None:
            self.loader.close()


def abstract_batch(resolved: Resolved) -> Batch:
    """Shapes and shardings of a step's batch."""
    config = resolved.run
    shape = (config.data.batch_size, config.data.sequence_length)
    sharding = resolved.placement.sharding("batch", "sequence")
    dtypes = {"weights": np.float32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, np.int32), sharding=sharding)
        for name in batch_names(config.layers.document_mask)
    }


def lower_step(resolved: Resolved) -> jax.stages.Lowered:
    """The train step traced from shapes alone, for the devices of `resolved`, present or only described."""
    shardings = state_shardings(resolved.spec.definition, resolved.optimizer, resolved.placement)
    halves = resolved.spec.halves.paths
    state = abstract_state(resolved.spec.definition, resolved.optimizer, shardings, halves)
    step = make_train_step(resolved.spec, resolved.optimizer, resolved.schedule)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, resolved.placement.sharding()))
    return jitted.lower(state, abstract_batch(resolved))


def make_meter(resolved: Resolved) -> StepMeter:
    """Meter of the run's steps, over the peak of its first device."""
    config = resolved.run
    devices = resolved.placement.mesh.devices
    query_block = resolved.selection.query_block(config.data.sequence_length)
    impls = set(resolved.selection.attention)
    book = ledger(
        config.model,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        attention="full" if "reference" in impls else "exact" if query_block is None else "blocks",
        query_block=query_block if "reference" not in impls else None,
        remat=config.layers.remat,
        # cuDNN's and our own XLA attention multiply q·k again in the backward pass.
        fused_attention="reference" not in impls,
    )
    local = [device for device in devices.flat if device.process_index == jax.process_index()]
    peak = peak_flops(local[0], config.precision.compute, local_devices=len(local))
    return StepMeter(book, num_devices=resolved.num_devices, peak=peak, warmup_steps=2)
