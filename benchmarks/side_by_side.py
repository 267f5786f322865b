"""The command of a benchmark that measures implementations side by side on one GPU."""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from benchmarks.ceilings import matmul_flops_per_second
from kernels.target import default_target


class Work(Protocol):
    """What is measured, by a name that the command line can choose."""

    name: str


Measure = Callable[[list, list[str], int], Iterable[dict[str, Any]]]
"""(works, implementations, repeats) to a row of the record for each measurement, as they are made."""


Program = TypeVar("Program")


def compile_all(
    builds: Mapping[Hashable, Callable[[], Program]],
) -> dict[Hashable, concurrent.futures.Future[Program]]:
    """Each of `builds` called, side by side (compilation leaves the interpreter lock); all are done, or have failed.

    Nothing may be measured beside it: XLA tries its own products out on the chip as it compiles them, on operands that
    it makes. So a call is for the programs of one work: with all works' the memory of an H100 did not suffice.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return {key: pool.submit(build) for key, build in builds.items()}


def run(
    name: str,
    description: str,
    works: Sequence[Work],
    impls: Sequence[str],
    measure: Measure,
    ceilings: dict[str, Callable[[], float]],
    arguments: list[str] | None,
) -> None:
    """Measures what the command line asks for, and prints one JSON line at the end.

    `ceilings`: what else of the device is measured first, by its name in the record. Exits with 2 where the default
    device is no GPU.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    names = [work.name for work in works]
    parser.add_argument("--works", nargs="+", choices=names, default=names, metavar="WORK", help=f"of {names}")
    parser.add_argument("--impls", nargs="+", choices=impls, default=list(impls))
    parser.add_argument("--repeats", type=int, default=5, help="rows of calls, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    target = default_target()
    if target.platform != "gpu":
        parser.exit(2, f"python -m benchmarks.{name} measures NVIDIA GPUs, and the default device is a {target}\n")
    record: dict[str, Any] = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        # First, so that the chip's clocks have risen before anything short is timed.
        "matmul_tflops": matmul_flops_per_second() / 1e12,
        **{ceiling: reach() for ceiling, reach in ceilings.items()},
        "rows": [],
    }
    for row in measure([work for work in works if work.name in options.works], options.impls, options.repeats):
        record["rows"].append(row)
        # What is measured is kept, also of a run that is cut off.
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
