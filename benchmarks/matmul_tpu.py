"""What TPU's compiler makes of few-bit and grouped products, without a TPU: `python -m benchmarks.matmul_tpu`.

Its own `estimated_cycles`: static estimates, and no speeds, since they know nothing of waiting for memory. Beside times
on hardware for a dense product in bfloat16 they were 2 to 18% too good. The compiler has none for a kernel whose copies
depend on data, so the grouped product stands with all groups in whole tiles, by the same body: what the end of a group
inside a tile costs comes on top.

Compiles in a process of its own, since what to dump is said to libtpu when it is loaded. A table on stderr, one line of
JSON on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.grouped_matmul import GroupedCase, tpu_tiles
from kernels.grouped_matmul import tpu as grouped
from kernels.quantized_matmul import tpu as dense
from parallel.topology import tpu_devices
from quantization.qarray import QArray

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_NAME = "benchmarks.matmul_tpu"
# Operations in bfloat16 that a device's matrix units do in a cycle: its peak over its clock (197 TFLOP/s at 1.5 GHz,
# 459 at 1.75, 918 at 1.75, 1,153 at 2.2). A device of v5p is a chip whose two cores share out a kernel's work, one of
# tpu7x is a core. Of 8 bits, twice that in the format that the chip is made for.
PER_CYCLE = {"v5e": 2**17, "v5p": 2**18, "v6e": 2**19, "tpu7x": 2**19}
FAST = {"v5e": "int8", "v5p": "int8", "v6e": "int8", "tpu7x": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class Case:
    """M, K, N; bits 8 for both in the chip's fast format, else a bfloat16 x and a w of `weights` in blocks along K."""

    M: int
    K: int
    N: int
    weights: str | None = None
    block: int | None = None


DENSE = {
    "8 bits, 4096³": Case(4096, 4096, 4096),
    "8 bits, down of llama3-8b": Case(4096, 14336, 4096),
    "w8, 16 rows": Case(16, 8192, 28672, "int8"),
    "w4 in 128, 16 rows": Case(16, 8192, 28672, "int4", 128),
    "w4 in 128, 2048 rows": Case(2048, 4096, 4096, "int4", 128),
}
GROUPED = {
    "mixtral": GroupedCase("bfloat16", 16384, 8, 4096, 14336),
    "moe-1b": GroupedCase("bfloat16", 32768, 8, 1024, 3584),
}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.dump:
        _compile_all(arguments)
        return
    rows = estimates(arguments.chips, arguments.cases)
    for row in rows:
        print(row, file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(json.dumps({"benchmark": "matmul_tpu", "argv": sys.argv[1:], "versions": versions, "estimates": rows}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--cases", nargs="+", default=[*DENSE, *GROUPED], choices=[*DENSE, *GROUPED])
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    return parser


def estimates(chips: list[str], cases: list[str]) -> list[dict]:
    """Cycles and the share of the chip's peak that they come to, by chip and case; of a grouped case, for each pass.

    Raises RuntimeError where the compiler fails, with the end of its words.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        command = ["env", f"LIBTPU_INIT_ARGS={flags}", "JAX_PLATFORMS=cpu", sys.executable, "-m", _NAME]
        command += ["--chips", *chips, "--cases", *cases, "--dump", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compile_all(arguments: argparse.Namespace) -> None:
    for chip in arguments.chips:
        for name in arguments.cases:
            if name in DENSE:
                _show(chip, name, _dense(chip, DENSE[name], arguments.dump))
            else:
                for which in ("product", "transposed", "weight_gradient"):
                    _show(chip, f"{name}, {which}", _grouped(chip, GROUPED[name], which, arguments.dump))


def _show(chip: str, name: str, numbers: dict) -> None:
    print(json.dumps({"chip": chip, "case": name, **numbers}), flush=True)


def _dense(chip: str, case: Case, folder: Path) -> dict:
    struct = _struct(chip)
    w_scales = struct((case.K // (case.block or case.K), case.N), jnp.float32)
    w = QArray(struct((case.K, case.N), case.weights or FAST[chip]), w_scales)
    if case.weights is None:
        x = QArray(struct((case.M, case.K), FAST[chip]), struct((case.M, 1), jnp.float32))
    else:
        x = struct((case.M, case.K), jnp.bfloat16)
    _compile(chip, functools.partial(dense.quantized_matmul, bias=None, out_dtype=jnp.bfloat16), x, w)
    operations = 2 * case.M * case.K * case.N
    return _numbers(folder, "quantized_matmul", operations / (PER_CYCLE[chip] * (2 if case.weights is None else 1)))


def _grouped(chip: str, case: GroupedCase, which: str, folder: Path) -> dict:
    """By the kernel's body, for groups of whole tiles: a visit's tile is its number, and all rows are its group's."""
    shape = tpu_tiles.shape_of(case, which)
    tiles = tpu_tiles.choose_tiles(shape, which)
    steps, visits = shape.depth // tiles.depth, shape.rows // tiles.rows
    each, columns = visits // case.num_groups, shape.columns // tiles.columns
    statics, struct = grouped.Statics(shape, tiles, which, False), _struct(chip)
    x = struct((shape.rows, shape.depth), jnp.bfloat16)
    if which == "weight_gradient":
        other = struct((shape.rows, shape.columns), jnp.bfloat16)
        grid = (steps, columns, visits)
        specs = [
            pl.BlockSpec((tiles.rows, tiles.depth), lambda k, n, v: (v, k)),
            pl.BlockSpec((tiles.rows, tiles.columns), lambda k, n, v: (v, n)),
            pl.BlockSpec((None, tiles.depth, tiles.columns), lambda k, n, v: (v // each, k, n)),
        ]
        result, sums = (case.num_groups, shape.depth, shape.columns), (tiles.depth, tiles.columns)
        body = grouped.weight_gradient_body
    else:
        flip = -1 if which == "transposed" else 1
        other = struct((case.num_groups, *(shape.depth, shape.columns)[::flip]), jnp.bfloat16)
        grid = (columns, visits, steps)
        specs = [
            pl.BlockSpec((tiles.rows, tiles.depth), lambda n, v, k: (v, k)),
            pl.BlockSpec((None, *(tiles.depth, tiles.columns)[::flip]), lambda n, v, k: (v // each, *(k, n)[::flip])),
            pl.BlockSpec((tiles.rows, tiles.columns), lambda n, v, k: (v, n)),
        ]
        result, sums = (shape.rows, shape.columns), (tiles.rows, tiles.columns)
        body = grouped.product_body
    table = [_Column(lambda visit: visit // each), _Column(lambda visit: visit), _Column(lambda _: 0)]
    table.append(_Column(lambda _: tiles.rows))
    call = pl.pallas_call(
        functools.partial(body, statics, *table),
        grid=grid,
        in_specs=specs[:2],
        out_specs=specs[2],
        out_shape=jax.ShapeDtypeStruct(result, jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM(sums, jnp.float32)] if which == "weight_gradient" or steps > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if which == "weight_gradient" else "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu_tiles.VMEM_BYTES,
        ),
        name="grouped",
    )
    _compile(chip, call, x, other)
    return _numbers(folder, "grouped", 2 * shape.rows * shape.depth * shape.columns / PER_CYCLE[chip])


class _Column:
    """In the place of a field of the table of visits: a function of the visit."""

    def __init__(self, value_of):
        self._value_of = value_of

    def __getitem__(self, visit):
        return self._value_of(visit)


def _numbers(folder: Path, name: str, best: float) -> dict:
    """`best`: cycles at the chip's peak."""
    (path,) = folder.glob(f"{name}*")
    cycles = int(re.search(r"estimated_cycles: (\d+)", path.read_text())[1])
    for path in folder.iterdir():
        path.unlink()
    return {"cycles": cycles, "share_of_peak": round(best / cycles, 3)}


def _struct(chip: str):
    return functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(_mesh(chip), PartitionSpec()))


def _mesh(chip: str) -> Mesh:
    return Mesh(tpu_devices(TOPOLOGIES[chip])[:1], ("x",))


def _compile(chip: str, function, *structs) -> None:
    # Mosaic asks the mesh which chip it is for.
    with jax.sharding.use_abstract_mesh(_mesh(chip).abstract_mesh):
        jax.jit(function).lower(*structs).compile()


if __name__ == "__main__":
    main()
