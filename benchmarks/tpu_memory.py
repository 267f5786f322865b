"""What training steps need on TPU slices, from TPU's own compiler on a machine without a TPU: `python -m
benchmarks.tpu_memory`.

Every number here is a compile-time estimate: nothing runs. Memory is the compiler's own plan, which is exact (a program
that does not fit does not compile); collectives are those of the optimised program, a loop's body counted once.

A table on stderr, one line of JSON on stdout. Each case takes one to two minutes of a core.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

import configs
from parallel.compilation import compile_program
from parallel.topology import tpu_devices
from perf.chips import find_chip
from perf.flops import count_params
from perf.hlo import parse
from perf.hlo_cost import Collective, collectives
from perf.plan import with_setting
from training.config import TrainRun
from training.loop import lower_step
from training.resolve import Resolved, resolve
from training.state import abstract_state, state_shardings

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a TPU slice, with changes: settings by dotted path."""

    config: str
    topology: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.config}@{self.topology}"


# The 1B configs are written for one GPU: here their 8 rows are on each chip, and their layers are scanned and
# recomputed. llama3-8b has one row of 8192 tokens on each chip: on v5e that is what fits, on v5p it is its own batch.
_SCANNED = (("layers.scan", True), ("layers.remat", "full"))
_EXPERTS = ("mesh.expert", 8)
# Parameters are split over a plane of the v5p torus, and copied along its third axis: over all 64 chips the compiler
# turns every all-gather and reduce-scatter into an all-reduce of twice the bytes.
_PLANE = ("mesh.data", 4)
_SMALL = (("layers.remat", "full"), ("optimizer.kind", "adamw"))
CASES = (
    Case("dense-1b", "v5e:4x4", (*_SCANNED, ("data.batch_size", 8 * 16))),
    Case("dense-1b", "v5p:4x4x4", (*_SCANNED, _PLANE, ("data.batch_size", 8 * 64))),
    Case("moe-1b", "v5e:4x4", (*_SCANNED, _EXPERTS, ("data.batch_size", 8 * 16))),
    Case("moe-1b", "v5p:4x4x4", (*_SCANNED, _EXPERTS, _PLANE, ("data.batch_size", 8 * 64))),
    # Small enough to be compiled in every test run, with every kind of collective of the large ones.
    Case("quickstart", "v5e:4x4", (*_SMALL, ("mesh.data", 2), ("mesh.expert", 4), ("data.batch_size", 64))),
    Case("llama3-8b", "v5e:4x4", (("data.batch_size", 16),)),
    Case("llama3-8b", "v5p:4x4x4", (_PLANE,)),
)


@dataclasses.dataclass
class Program:
    """A case compiled."""

    case: Case
    resolved: Resolved
    compiled: jax.stages.Compiled
    trace_seconds: float
    compile_seconds: float

    @property
    def state_bytes(self) -> int:
        """Of a device: its shards of parameters and optimizer moments."""
        definition, optimizer = self.resolved.spec.definition, self.resolved.optimizer
        shardings = state_shardings(definition, optimizer, self.resolved.placement)
        leaves = jax.tree.leaves(abstract_state(definition, optimizer, shardings))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def build(case: Case) -> Program:
    run: TrainRun = configs.load(case.config).train()
    for path, value in case.settings:
        run = with_setting(run, path, value)
    resolved = resolve(run, tpu_devices(case.topology))
    began = time.monotonic()
    lowered = lower_step(resolved)
    traced = time.monotonic()
    compiled = compile_program(lowered, resolved.compiler_options)
    return Program(case, resolved, compiled, traced - began, time.monotonic() - traced)


def describe(program: Program) -> dict[str, Any]:
    resolved, memory = program.resolved, program.compiled.memory_analysis()
    run, mesh = resolved.run, resolved.placement.mesh
    chip = find_chip(mesh.devices.flat[0].device_kind)
    found = collectives(parse(program.compiled.as_text()))
    return {
        "config": program.case.config,
        "topology": program.case.topology,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch_size": run.data.batch_size,
        "sequence_length": run.data.sequence_length,
        "remat": run.layers.remat,
        "scan": run.layers.scan,
        "choices": list(resolved.choices),
        "params": count_params(run.model).total,
        "peak_gib": round(memory.peak_memory_in_bytes / GIB, 4),
        "state_gib": round(program.state_bytes / GIB, 4),
        "usable_gib": round(chip.usable_bytes / GIB, 2),
        "trace_seconds": round(program.trace_seconds, 1),
        "compile_seconds": round(program.compile_seconds, 1),
        "collectives": dict(sorted(collections.Counter(c.kind for c in found).items())),
        "collective_list": [describe_collective(c) for c in found],
    }


def describe_collective(found: Collective) -> dict[str, Any]:
    """Its kind, the devices that take part together (None for a permute), its results and JAX's name for it."""
    return {
        "kind": found.kind,
        "group_size": found.group_size,
        "shapes": [(array.dtype, array.dims) for array in found.shapes],
        "scope": found.scope,
    }


def line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['config']:<10} {result['topology']:<10} {result['error']}"
    mesh = " × ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["collectives"].items())
    return (
        f"{result['config']:<10} {result['topology']:<10} {mesh:<28} {result['batch_size']:>5} × "
        f"{result['sequence_length']:<5} {result['state_gib']:>8.2f} {result['peak_gib']:>8.2f} "
        f"{result['usable_gib']:>8.2f} {result['compile_seconds']:>8.1f}  {kinds}"
    )


HEADER = (
    f"{'config':<10} {'slice':<10} {'mesh':<28} {'rows × tokens':<13} {'state':>8} {'peak':>8} {'usable':>8} "
    f"{'compile':>8}  collectives\n{'':<64}{'GiB':>8} {'GiB':>8} {'GiB':>8} {'s':>8}  (compile-time estimates)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases to compile, CONFIG@TOPOLOGY; all by default")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, without the list of collectives")
    arguments = parser.parse_args()
    names = [case.name for case in CASES]
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        parser.error(f"unknown cases {unknown}; known: {', '.join(names)}")
    # Compiling needs no device; and where libtpu is installed JAX would look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    results = []
    print(HEADER, file=sys.stderr, flush=True)
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        try:
            results.append(describe(build(case)))
        except jax.errors.JaxRuntimeError as error:
            results.append({"config": case.config, "topology": case.topology, "error": str(error)[:2000]})
        print(line(results[-1]), file=sys.stderr, flush=True)
    report = {
        "benchmark": "tpu_memory",
        "kind": "compile-time estimate: no TPU ran",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "cases": results,
    }
    if arguments.out:
        short = [{key: value for key, value in r.items() if key != "collective_list"} for r in results]
        arguments.out.write_text(json.dumps(report | {"cases": short}, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
