"""TPU's compiler's own count of cycles for a block of keys of the kernel over pages.

Its count leaves out loops whose length depends on data, which all of the kernel's are: so the body of the loop is
compiled over blocks in a static order. A static estimate, which knows nothing of waiting for memory. Compiles in a
process of its own, since what to dump is said to libtpu when it is loaded; prints a line of JSON for each chip and
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

from kernels.paged_attention import PagedAttentionCase, tpu
from kernels.paged_attention.tpu_tiles import LANES, VMEM_BYTES, choose_tiles, laid_by_heads
from tests.kernels.absent_tpu import compiled_for

# Bytes that a core's memory gives in a cycle of its clock, at its peak: 819 GB/s at 1.5 GHz, 2,765 for two cores at
# 1.75, 1,640 at 1.75, 3,690 at 2.2.
BYTES_PER_CYCLE = {"v5e": 546, "v5p": 790, "v6e": 937, "tpu7x": 1677}
LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "width": 8192}
CASES = {
    "decode": PagedAttentionCase("bfloat16", 32, 1, page_size=64, **LLAMA),
    "decode, int8": PagedAttentionCase("bfloat16", 32, 1, page_size=128, kv_dtype="int8", **LLAMA),
    "prompts": PagedAttentionCase("bfloat16", 4, 128, page_size=64, **LLAMA),
}
_NAME, _BLOCKS = "tests.kernels.paged_tpu_estimate", 8


def estimates(chips: list[str], cases: list[str]) -> list[dict]:
    """Cycles of a block of keys, those that its copy takes at the memory's peak, and the share of the matrix units'
    peak. Raises RuntimeError where the compiler fails, with the end of its words."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        command = ["env", f"LIBTPU_INIT_ARGS={flags}", "JAX_PLATFORMS=cpu", sys.executable, "-m", _NAME, folder]
        command += [json.dumps([chips, cases])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _estimate(chip: str, case: PagedAttentionCase, folder: Path) -> dict:
    _compile(chip, case)
    (path,) = folder.glob("paged_block*")
    cycles = int(re.search(r"estimated_cycles: (\d+)", path.read_text())[1]) // _BLOCKS
    for path in folder.iterdir():
        path.unlink()
    positions = choose_tiles(case).pages * case.page_size
    of_head = case.head_dim * (2 if case.kv_dtype is None else 1) + (0 if case.kv_dtype is None else 4)
    copied = 2 * positions * case.num_kv_heads * of_head
    return {"positions": positions, "cycles": cycles, "cycles_of_copy": round(copied / BYTES_PER_CYCLE[chip])}


def _compile(chip: str, case: PagedAttentionCase) -> None:
    tiles, K, S, H = choose_tiles(case), case.num_kv_heads, case.page_size, case.head_dim
    code = jnp.dtype(case.kv_dtype or case.dtype)
    by_heads = laid_by_heads(K, code.itemsize)
    statics = tpu._Statics(case, tiles, (1, 1, 1), 1, by_heads, 0.1, None, None)
    page = (K, S, H) if by_heads else (S, K, H)
    shapes = [(page, code)] * 2 + ([] if case.kv_dtype is None else [((K, S), jnp.float32)] * 2)
    state, sums = (pltpu.VMEM((K * tiles.rows, width), jnp.float32) for width in (LANES, H))

    def body(q, *refs):
        *buffers, out, highest, total, sums = refs
        refs = tpu._Refs(None, None, None, q, None, (), out, tuple(buffers), None, None, highest, total, sums)

        @pl.when(pl.program_id(0) == 0)
        def _():
            tpu._begin(statics, refs)

        tpu._add(statics, refs, tpu._Walk(0, case.width - case.num_tokens, 0, 0, case.width, _BLOCKS), 0, 0, 0)

        @pl.when(pl.program_id(0) == _BLOCKS - 1)
        def _():
            tpu._end(statics, refs)

    whole = pl.BlockSpec((K, tiles.rows, H), lambda i: (0, 0, 0))
    specs = [
        pl.BlockSpec(
            (1, tiles.pages, *shape), (lambda i: (i, 0, 0, 0, 0)) if len(shape) == 3 else (lambda i: (i, 0, 0, 0))
        )
        for shape, _ in shapes
    ]
    call = pl.pallas_call(
        body,
        grid=(_BLOCKS,),
        in_specs=[whole, *specs],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((K, tiles.rows, H), case.dtype),
        scratch_shapes=[state, state, sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        name="paged_block",
    )
    blocks = [jax.ShapeDtypeStruct((_BLOCKS, tiles.pages, *shape), dtype) for shape, dtype in shapes]
    compiled_for(chip, call, jax.ShapeDtypeStruct((K, tiles.rows, H), case.dtype), *blocks)


if __name__ == "__main__":
    given_folder, (given_chips, given_cases) = Path(sys.argv[1]), json.loads(sys.argv[2])
    for one_chip in given_chips:
        for name in given_cases:
            row = {"chip": one_chip, "case": name, **_estimate(one_chip, CASES[name], given_folder)}
            print(json.dumps(row), flush=True)
