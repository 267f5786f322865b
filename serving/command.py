"""What `serve.py` does with its settings: an HTTP server, one answer, or measurements."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading

import jax

from checkpoint import CheckpointError
from parallel.compilation import use_compilation_cache
from serving.bench import Bench
from serving.config import ServeRun, settle_engine
from serving.fleet import FleetRecorder
from serving.request import Delta, Request, SamplingParams
from serving.resolve import resolve
from serving.server import serve_http
from serving.startup import Started, start

# What ends a server that was rightly started from; anything else that escapes is a bug.
FAILURES = (ValueError, CheckpointError, OSError)


def run(settings: ServeRun) -> int:
    """Exit status. Raises ValueError for settings and files that can't work."""
    recorder = FleetRecorder(settings.fleet)
    use_compilation_cache(settings.cache_dir)
    devices = jax.devices()
    if settings.prompt is not None:
        settings = for_one_answer(settings, devices[0].platform)
    resolved = resolve(settings, devices)
    for choice in resolved.choices:
        say(choice)
    started = start(resolved, say)
    say(f"ready after {started.seconds:.1f} s")
    # What was traced and loaded stays. To look through all of it for garbage now and then takes 100 ms and more, for
    # which no round is started.
    gc.collect()
    gc.freeze()
    try:
        if settings.bench:
            recorder.bench(resolved, started, Bench(resolved, started, say).run())
            return 0
        if settings.prompt is not None:
            return answer(started, settings)
        with recorder.traffic(resolved, started):
            return serve_http(started.engine, settings.api, say)
    finally:
        started.engine.stop()
        started.compilations.stop()


def say(line: str) -> None:
    """Progress goes to stderr: stdout is for what was asked."""
    print(line, file=sys.stderr, flush=True)


def for_one_answer(settings: ServeRun, platform: str) -> ServeRun:
    """The same with as few programs as one sequence needs."""
    engine = settle_engine(settings.engine, platform)
    smallest = dataclasses.replace(
        engine,
        max_sequences=1,
        batch_sizes=engine.batch_sizes[:1],
        tile_counts=engine.tile_counts[-1:],
        widths=engine.widths[-1:],
    )
    return dataclasses.replace(settings, engine=smallest)


def answer(started: Started, settings: ServeRun) -> int:
    """Prints the answer to `settings.prompt` as it comes: to a message where the model has a chat template, else the
    continuation of a text."""
    engine, ended, failed = started.engine, threading.Event(), []
    assert settings.prompt is not None
    if engine.chat is not None:
        text = engine.chat.render([{"role": "user", "content": settings.prompt}], tools=None)
        prompt = engine.tokenizer.encode(text, special=False)
    else:
        prompt = engine.tokenizer.encode(settings.prompt)
        print(settings.prompt, end="")

    def show(delta: Delta) -> None:
        print(delta.text, end="", flush=True)
        if delta.finish is not None:
            failed.extend([delta.error or delta.finish] if delta.finish not in ("stop", "length") else [])
            ended.set()

    params = SamplingParams(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        stop_ids=engine.tokenizer.end_ids,
    )
    engine.submit(Request(id="prompt", prompt=tuple(prompt), params=params, on_delta=show))
    ended.wait()
    print()
    for reason in failed:
        say(f"error: {reason}")
    return 1 if failed else 0
