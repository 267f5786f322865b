"""Training steps of whole models, variants side by side in one process: `python -m benchmarks.train --out FILE`.

Every variant is compiled first, in parallel; then each is initialised, warmed up and timed alone on the device, the
next step handed over before the last one is waited for, as `train.py` does. MFU is causal-exact over the chip's dense
peak, from `perf.flops`. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np

import configs
from benchmarks.ceilings import copy_bytes_per_second, matmul_flops_per_second
from data import RandomRows
from perf.chips import peak_flops
from perf.flops import count_params, ledger
from perf.plan import with_setting
from training.config import TrainRun
from training.feed import to_device
from training.loop import compile_program, lower_step
from training.resolve import Resolved, resolve
from training.state import init_state


@dataclasses.dataclass(frozen=True)
class Variant:
    """A config with changes: settings by dotted path."""

    name: str
    config: str
    settings: tuple[tuple[str, Any], ...] = ()


def variants() -> list[Variant]:
    scan = ("layers.scan", True)
    return [
        Variant("dense-1b", "dense-1b"),
        Variant("dense-1b chunk 2048", "dense-1b", (("loss.chunk_tokens", 2048),)),
        Variant("dense-1b chunk 16384", "dense-1b", (("loss.chunk_tokens", 16384),)),
        Variant("dense-1b scan remat dots", "dense-1b", (scan, ("layers.remat", "dots"))),
        Variant("dense-1b attention cudnn", "dense-1b", (("kernels.attention", "cudnn"),)),
        Variant("dense-1b documents apart", "dense-1b", (("layers.document_mask", True),)),
        Variant("dense-1b attention xla", "dense-1b", (("kernels.attention", "xla"), scan, ("layers.remat", "full"))),
        Variant("dense-1b with Triton products", "dense-1b", (("xla_options", ()),)),
        Variant("moe-1b", "moe-1b"),
        Variant("moe-1b balanced", "moe-1b", (("model.moe.force_balance", True),)),
        Variant("moe-1b ragged_dot", "moe-1b", (("kernels.grouped_matmul", "ragged_dot"),)),
        Variant("moe-1b loop", "moe-1b", (("kernels.grouped_matmul", "loop"),)),
        Variant("moe-1b capacity 1.25", "moe-1b", (("model.moe.dispatch", "capacity"),)),
    ]


@dataclasses.dataclass
class Program:
    variant: Variant
    resolved: Resolved
    compiled: jax.stages.Compiled
    compile_seconds: float


def build(variant: Variant) -> Program:
    run: TrainRun = configs.load(variant.config).train()
    for path, value in variant.settings:
        run = with_setting(run, path, value)
    resolved = resolve(run, jax.devices())
    began = time.monotonic()
    compiled = compile_program(lower_step(resolved), resolved.compiler_options)
    return Program(variant, resolved, compiled, time.monotonic() - began)


def measure(program: Program, steps: int) -> dict[str, Any]:
    """Step time over `steps` steps after three of warm-up, and what follows from it.

    A step's time is from the end of the one before to its own end, both as the host sees them. Handing a step over
    takes the host 6 ms with moe-1b's 1,800 launches, which the step before hides.
    """
    resolved, config = program.resolved, program.resolved.run
    definition, optimizer = resolved.spec.definition, resolved.optimizer
    state = init_state(definition, optimizer, 0, resolved.placement, resolved.spec.halves.paths)
    rows = RandomRows(config.data.sequence_length, config.model.vocab_size, 0)
    batches = []
    for number in range(4):
        picked = [rows[number * config.data.batch_size + i] for i in range(config.data.batch_size)]
        host = {name: np.stack([row[name] for row in picked]) for name in picked[0]}
        batches.append(to_device(host, resolved.placement, config.layers.document_mask))
    ends, loss, pending = [], [], None
    for number in range(steps + 4):
        state, metrics = program.compiled(state, batches[number % len(batches)])
        if pending is not None:
            loss.append(float(pending["loss"]))
            ends.append(time.perf_counter())
        pending = metrics
    times = np.diff(ends)
    seconds = statistics.median(times[2:])
    book = ledger(
        config.model,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        remat=config.layers.remat,
        fused_attention=True,
    )
    peak = peak_flops(jax.devices()[0], config.precision.compute, local_devices=1)
    whole = None if peak.value is None else seconds * peak.value * resolved.num_devices
    memory = program.compiled.memory_analysis()
    return {
        "variant": program.variant.name,
        "settings": dict(program.variant.settings),
        "choices": list(resolved.choices),
        "compile_seconds": round(program.compile_seconds, 1),
        "step_ms_median": seconds * 1e3,
        "step_ms_mean": statistics.fmean(times[2:]) * 1e3,
        "step_ms_min": min(times[2:]) * 1e3,
        "step_ms_max": max(times[2:]) * 1e3,
        "tokens_per_second": book.tokens / seconds,
        "mfu": None if whole is None else book.model_flops / whole,
        "mfu_palm": None if whole is None else book.palm_flops / whole,
        "hfu": None if whole is None else book.hardware_flops / whole,
        "params": count_params(config.model).total,
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "loss_first": loss[0],
        "loss_last": loss[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="names of variants to run; all by default")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    arguments = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((arguments.cache / "xla").absolute()))
    chosen = [v for v in variants() if not arguments.only or v.name in arguments.only]
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "benchmark": "train",
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__},
        "ceilings": {"bf16_matmul_8192": matmul_flops_per_second(), "copy_2gib": copy_bytes_per_second()},
        "peak": dataclasses.asdict(peak_flops(device, "bfloat16", local_devices=1)),
        "variants": [],
    }
    # Compilation leaves the interpreter lock: variants compile side by side.
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(chosen)) as pool:
        programs = {variant.name: pool.submit(build, variant) for variant in chosen}
        for variant in chosen:
            try:
                program = programs.pop(variant.name).result()
                result = measure(program, arguments.steps)
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                result = {"variant": variant.name, "error": str(error)[:500]}
            program = None
            gc.collect()
            report["variants"].append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
