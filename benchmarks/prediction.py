"""Predicted steps beside published ones, and from them the scalar of each TPU generation: `python -m
benchmarks.prediction`.

Each case is a published training step, built with our model at its sizes and compiled for its slice on a machine
without a TPU. Published steps ran Pallas attention, which has no estimate: its products at an assumed share of the peak
stand in for our XLA attention. Some kept activations that our step computes again: that time is left out.

A table on stderr, one line of JSON on stdout: the rows of perf/calibration.py. A case takes two to four minutes of a
core; `--keep FOLDER` stores the compiled texts, and reads those that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
from pathlib import Path
from typing import Literal

import jax

from data.config import DataConfig
from model.config import ModelConfig, RopeConfig
from parallel.compilation import compile_program
from parallel.mesh import MeshConfig
from parallel.topology import tpu_devices
from perf.calibration import Calibration, Row, fit
from perf.chips import Chip, find_chip
from perf.flops import ledger
from perf.hlo import parse
from perf.interconnect import places_of, torus
from perf.kernel_cost import PALLAS_SHARE
from perf.prediction import Prediction, predict
from perf.schedule import Spent
from training.config import LayerConfig, TrainRun
from training.loop import lower_step
from training.resolve import Resolved, resolve

V4, V5E, V5P = (f"AI-Hypercomputer/maxtext@e591f30 src/maxtext/configs/tpu/{g}/README.md" for g in ("v4", "v5e", "v5p"))
RECIPES = "AI-Hypercomputer/tpu-recipes@c8cfe2f training/trillium/{}/README.md"

# What a published step kept, and ours computes again in the backward pass.
Kept = Literal["nothing", "projections", "products"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A published step: its MFU by 6 N + 12 L H Q T FLOPs a token (both repositories' formula then), or its seconds.

    `rows`: sequences of `length` tokens on each chip. `fitted`: it sets the scalar, and is not held out.
    """

    name: str
    topology: str
    model: ModelConfig
    rows: int
    length: int
    source: str
    fitted: bool
    mfu: float | None = None
    seconds: float | None = None
    kept: Kept = "nothing"
    data: int = 1
    """Copies of the state, each split over the other chips."""
    options: tuple[str, ...] = ()
    """XLA's, as published, without those that this compiler no longer has."""

    def run(self, num_devices: int) -> TrainRun:
        return TrainRun(
            name="published",
            model=self.model,
            data=DataConfig(source="random", sequence_length=self.length, batch_size=self.rows * num_devices),
            steps=200,
            layers=LayerConfig(scan=True, remat="full", document_mask=False),
            mesh=MeshConfig(data=self.data),
            xla_options=self.options,
        )


def gpt(embed: int, mlp: int, heads: int, layers: int, *, head: int = 128, gated: bool = True) -> ModelConfig:
    """MaxText's own model, by its global_parameter_scale or by hand (TPU v4, before gated feed-forwards)."""
    return ModelConfig(
        vocab_size=32_000,
        embed_dim=embed,
        mlp_dim=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head,
        gated_mlp=gated,
    )


LLAMA2_70B = dataclasses.replace(gpt(8192, 28672, 64, 80), num_kv_heads=8)
LLAMA3_8B = dataclasses.replace(
    gpt(4096, 14336, 32, 32), num_kv_heads=8, vocab_size=128_256, rope=RopeConfig(theta=500_000.0)
)
B16, B32, B64 = gpt(4096, 28672, 64, 32), gpt(8192, 28672, 64, 32), gpt(8192, 28672, 64, 64)
B22, B52 = gpt(6144, 24576, 24, 48, head=256, gated=False), gpt(12288, 49152, 32, 32, head=256, gated=False)

# Gathers go on beside the core, in fusions with its work.
FUSED = (
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
    "xla_enable_async_all_gather=true",
)
DATA_PARALLEL = (
    "xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "xla_tpu_data_parallel_opt_different_sized_ops=true",
)
PIPELINED = (
    *FUSED,
    *DATA_PARALLEL,
    "xla_tpu_megacore_fusion_allow_ags=false",
    "xla_enable_async_collective_permute=true",
    "xla_tpu_enable_ag_backward_pipelining=true",
)

# The published v5p steps split parameters over 16 chips and layers over 4, and keep all products; ours has 4 copies:
# over all 64 chips the compiler turns gathers into all-reduces (benchmarks/tpu_memory.py). Those on v6e ran with
# options that let SparseCore do reductions while the core goes on, which ours is compiled without: they wait less.
CASES = (
    Case("16B", "v5e:16x16", B16, 6, 2048, V5E, True, mfu=0.6110),
    Case("32B", "v5e:16x16", B32, 4, 2048, V5E, True, mfu=0.6686),
    Case("64B", "v5e:16x16", B64, 2, 2048, V5E, False, mfu=0.5990),
    Case("22B", "v4:4x4x4", B22, 13, 2048, V4, True, mfu=0.567),
    Case("52B", "v4:4x4x12", B52, 7, 2048, V4, False, mfu=0.560),
    Case("32B", "v5p:4x4x4", B32, 6, 2048, V5P, True, mfu=0.7147, kept="products", data=4, options=PIPELINED),
    Case("64B", "v5p:4x4x4", B64, 3, 2048, V5P, False, mfu=0.7031, kept="products", data=4, options=PIPELINED),
    Case(
        "Llama 3.1 8B", "v6e:16x16", LLAMA3_8B, 4, 8192, RECIPES.format("Llama3.1-8B-MaxText/v6e-256"), True,
        seconds=4.546, kept="projections",
    ),
    Case(
        "Llama 2 70B", "v6e:16x16", LLAMA2_70B, 2, 4096, RECIPES.format("Llama2-70B-MaxText"), False,
        seconds=9.052, kept="projections",
    ),
)  # fmt: skip


def compiled_text(case: Case, resolved: Resolved, folder: Path | None) -> str:
    name = f"{case.name}@{case.topology}".replace(" ", "-").replace(":", "-")
    stored = None if folder is None else folder / f"{name}.hlo.gz"
    if stored is not None and stored.is_file():
        return gzip.decompress(stored.read_bytes()).decode()
    text = compile_program(lower_step(resolved), resolved.compiler_options).as_text()
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(gzip.compress(text.encode(), mtime=0))
    return text


class Program:
    """A case, compiled."""

    def __init__(self, case: Case, folder: Path | None) -> None:
        devices = tpu_devices(case.topology)
        resolved = resolve(case.run(len(devices)), devices)
        chip = find_chip(devices[0].device_kind)
        assert chip is not None
        self.case, self.chip, mesh = case, chip, resolved.placement.mesh
        self.mesh, self.network = dict(mesh.shape), torus(chip, places_of(mesh.devices.flat))
        self.module = parse(compiled_text(case, resolved, folder))

    def row(self, scale: float) -> Row:
        """The products' time before calibration, and the waiting beside a core of that scale."""
        case, calibration = self.case, Calibration(scale, "being fitted")
        found = predict(self.module, chip=self.chip, mesh=self.mesh, network=self.network, calibration=calibration)
        palm = ledger(case.model, sequence_length=case.length, batch_size=case.rows).palm_flops
        seconds = palm / found.peak / case.mfu if case.seconds is None else case.seconds
        return Row(
            chip=self.chip.name,
            name=f"{case.name}, {case.topology}, {case.rows} × {case.length} a chip",
            source=case.source,
            seconds=round(seconds, 3),
            product_seconds=round(product_seconds(found, case) / scale, 3),
            other_seconds=round(other_seconds(found, case), 3),
            attention_seconds=round(attention_seconds(case, self.chip), 3),
            fitted=case.fitted,
        )


def product_seconds(found: Prediction, case: Case) -> float:
    """Of the products that the scale is for, attention's and those that the published step kept left out."""
    counted = (one for one in found.spent if one.category != "attention" and not kept(one, case.kept))
    return sum(one.seconds for one in counted if one.bound == "compute")


def other_seconds(found: Prediction, case: Case) -> float:
    attention = sum(one.seconds for one in found.spent if one.category == "attention")
    again = sum(one.seconds for one in found.spent if one.category != "attention" and kept(one, case.kept))
    return found.step_seconds - product_seconds(found, case) - attention - again


def kept(one: Spent, what: Kept) -> bool:
    again = "rematted_computation" in one.scope and one.category == "matmul"
    return again and (what == "products" or (what == "projections" and "/attention/" in one.scope))


def attention_seconds(case: Case, chip: Chip) -> float:
    """Causal attention's products, half of the square: 2 forward, 2 again, 7 backward in two kernels."""
    model, peak = case.model, chip.device_peak("bfloat16")
    assert peak is not None
    product = case.rows * model.num_layers * model.num_heads * model.head_dim * case.length**2
    return (2 + 2 + 7) * product / peak / PALLAS_SHARE


def calibrate(programs: list[Program]) -> list[Row]:
    """Of one generation. A faster core hides less, so that the scale and the waiting are found in turn."""
    scale = 1.0
    for _ in range(4):
        rows = [program.row(scale) for program in programs]
        if not (fitted := [row for row in rows if row.fitted]):
            print("no row of this generation is fitted", file=sys.stderr)
            return rows
        scale = fit(fitted)
    print(f"{rows[0].chip}: products × {scale:.3f}", file=sys.stderr)
    for row in rows:
        parts = (
            f"{row.product_seconds:.2f} products, {row.other_seconds:.2f} others, {row.attention_seconds:.2f} attention"
        )
        print(
            f"  {row.name:<44} published {row.seconds:7.3f} s  predicted {row.predicted(scale):7.3f} s "
            f"{row.error(scale):+6.1%} {'' if row.fitted else 'held out':<8}  ({parts})",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="topologies, as in v5e:16x16; all by default")
    parser.add_argument("--keep", type=Path, help="folder of compiled texts")
    arguments = parser.parse_args()
    # Compiling needs no device; and where libtpu is installed JAX would look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    programs = [
        Program(case, arguments.keep) for case in CASES if not arguments.only or case.topology in arguments.only
    ]
    rows = []
    for chip in dict.fromkeys(program.chip.name for program in programs):
        rows += calibrate([program for program in programs if program.chip.name == chip])
    print(json.dumps({"benchmark": "prediction", "rows": [dataclasses.asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
