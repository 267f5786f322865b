"""TPU's compiler's own count of cycles for grouped products of few-bit numbers.

It has none for a kernel whose copies depend on data: so all groups are whole tiles, by the kernel's own body. What the
end of a group inside a tile costs comes on top. A static estimate, which knows nothing of waiting for memory. Compiles
in a process of its own, since what to dump is said to libtpu when it is loaded; prints a line of JSON for each chip and
case.
"""

from __future__ import annotations

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

from benchmarks.matmul_tpu import FAST, PER_CYCLE
from kernels.grouped_matmul import tpu_scaled
from kernels.grouped_matmul.quantized import QuantizedGroupedCase
from kernels.grouped_matmul.tpu_scaled_tiles import VMEM_BYTES, choose_tiles
from kernels.quantized_matmul import tpu as dense
from kernels.quantized_matmul.tpu_tiles import widened
from tests.kernels.absent_tpu import compiled_for

GROUPS, M, K, N = 2, 4096, 1024, 4096
# (x is of few bits, w's dtype or None for the chip's fast format, block along K or None).
CASES = {
    "8 bits": (True, None, None),
    "8 bits in blocks": (True, None, 128),
    "w8": (False, "int8", None),
    "w4 in groups": (False, "int4", 128),
}
_NAME = "tests.kernels.grouped_scaled_tpu_estimate"


def estimates(chips: list[str], cases: list[str]) -> list[dict]:
    """Cycles, and the share of the matrix units' peak in bfloat16 that they come to. Raises RuntimeError where the
    compiler fails, with the end of its words."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        command = ["env", f"LIBTPU_INIT_ARGS={flags}", "JAX_PLATFORMS=cpu", sys.executable, "-m", _NAME, folder]
        done = subprocess.run([*command, json.dumps([chips, cases])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _case(chip: str, name: str) -> QuantizedGroupedCase:
    few, w_dtype, block = CASES[name]
    x_block = (1, block or K) if few else None
    given = (FAST[chip] if few else "bfloat16", w_dtype or FAST[chip], M, K, N, x_block)
    return widened(QuantizedGroupedCase(*given, (block or K, 1), num_groups=GROUPS))


def _estimate(chip: str, name: str, folder: Path) -> dict:
    _compile(chip, _case(chip, name))
    (path,) = folder.glob("grouped*")
    cycles = int(re.search(r"estimated_cycles: (\d+)", path.read_text())[1])
    for path in folder.iterdir():
        path.unlink()
    return {"cycles": cycles, "share_of_bfloat16_peak": round(2 * M * K * N / PER_CYCLE[chip] / cycles, 3)}


def _compile(chip: str, case: QuantizedGroupedCase) -> None:
    tiles = choose_tiles(case)
    statics = tpu_scaled._Statics(case, tiles, False)
    visits, outside = M // tiles.rows, statics.scaling == "outside"
    each, blocks = visits // GROUPS, tiles.depth // statics.block

    def at(step):
        return 0 if outside else step

    inputs = {
        "x": ((M, K), case.x_dtype, pl.BlockSpec((tiles.rows, tiles.depth), lambda n, v, k: (v, k))),
        "w": (
            (GROUPS, K, N),
            case.w_dtype,
            pl.BlockSpec((None, tiles.depth, tiles.columns), lambda n, v, k: (v // each, k, n)),
        ),
        "w_scales": (
            (GROUPS, 1 if outside else statics.steps, blocks, N),
            "float32",
            pl.BlockSpec((None, None, blocks, tiles.columns), lambda n, v, k: (v // each, at(k), 0, n)),
        ),
    }
    if case.x_block is not None:
        by_row = pl.BlockSpec((None, tiles.rows, blocks), lambda n, v, k: (at(k), v, 0))
        inputs["x_scales"] = (1 if outside else statics.steps, M, blocks), "float32", by_row
    names = (*inputs, "out", *(["sums"] if statics.steps > 1 else []))

    def body(*blocks):
        refs = dense.Refs(**dict.fromkeys(dense.Refs._fields) | dict(zip(names, blocks, strict=True)))
        tpu_scaled._body(statics, _Column(lambda v: v), _Column(lambda _: 0), _Column(lambda _: tiles.rows), refs)

    call = pl.pallas_call(
        body,
        grid=(N // tiles.columns, visits, statics.steps),
        in_specs=[spec for *_, spec in inputs.values()],
        out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda n, v, k: (v, n)),
        out_shape=jax.ShapeDtypeStruct((M, N), case.out_dtype),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), statics.sum_dtype)] if statics.steps > 1 else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="grouped",
    )
    compiled_for(chip, call, *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype, _ in inputs.values()))


class _Column:
    """In the place of a field of the table of visits: a function of the visit."""

    def __init__(self, value_of):
        self._value_of = value_of

    def __getitem__(self, visit):
        return self._value_of(visit)


if __name__ == "__main__":
    given_folder, (given_chips, given_cases) = Path(sys.argv[1]), json.loads(sys.argv[2])
    for one_chip in given_chips:
        for one_case in given_cases:
            print(json.dumps({"chip": one_chip, "case": one_case, **_estimate(one_chip, one_case, given_folder)}))
