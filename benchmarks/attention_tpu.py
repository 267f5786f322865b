"""What TPU's compiler makes of attention's kernels, on a machine without a TPU: `python -m benchmarks.attention_tpu`.

For each chip and kernel, the compiler's final schedule: bundles (one a cycle, if nothing waits for memory or a result),
and how many of them use the matrix units, the vector units, and vector memory for spilled registers. A kernel is one
program with a few branches (a step that needs a mask, one that needs none), and all are counted: numbers rank tiles of
the same kind of call, and are no speed. The compiler's own `estimated_cycles` is 0 for kernels with branches.

Each compiles in a process of its own, since the dump's folder is given to libtpu when it is loaded. A table on stderr,
one line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.attention import AttentionCase, tpu
from kernels.attention.tpu_tiles import AllTiles, Tiles, choose_tiles, shape_of
from parallel.topology import tpu_devices

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KERNELS = ("attention_forward", "attention_d_queries", "attention_d_keys")
# Columns of the compiler's table of what each bundle uses.
_COLUMNS = ("matrix", "across lanes", "vector", "pops", "transcendental", "load", "fill", "store", "spill", "scalar")


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.compile:
        compile_case(arguments)
        return
    rows = []
    for chip in arguments.chips:
        for name, counts in schedule(chip).items():
            rows.append({"chip": chip, "kernel": name, **counts})
            print(rows[-1], file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(json.dumps({"benchmark": "attention_tpu", "argv": sys.argv[1:], "versions": versions, "schedules": rows}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8, help="query heads, over 2 kv heads")
    parser.add_argument("--widths", type=int, nargs=2, default=(128, 128), help="of keys and of values")
    parser.add_argument("--full", action="store_true", help="no causal mask, so that a kernel has one branch")
    parser.add_argument("--tile", type=int, nargs=3, help="queries, keys and heads of every kernel; default: as chosen")
    parser.add_argument("--compile", choices=TOPOLOGIES, help=argparse.SUPPRESS)
    return parser


def schedule(chip: str) -> dict[str, dict[str, int]]:
    """Bundles and what they use, by kernel. Raises RuntimeError where the compiler fails, with the end of its words."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        settings = ["env", f"LIBTPU_INIT_ARGS={flags}", "JAX_PLATFORMS=cpu"]
        command = [*settings, sys.executable, "-m", "benchmarks.attention_tpu", *sys.argv[1:], "--compile", chip]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr[-2000:]}")
        tables = sorted(Path(folder).glob("*-final_hlo-static-per-bundle-utilization.txt"))
        # Beside ours, one for each fusion and copy of the program.
        ours = [(name, path) for path in tables for name in KERNELS if name in path.name]
        return {name: _count(path.read_text()) for name, path in ours}


def _count(table: str) -> dict[str, int]:
    lines = [line.split() for line in table.splitlines()]
    bundles = [list(map(int, line)) for line in lines[4:] if len(line) == len(_COLUMNS)]
    totals = map(sum, zip(*bundles, strict=True))
    return {"bundles": len(bundles), **dict(zip(_COLUMNS, totals, strict=True))}


def compile_case(arguments: argparse.Namespace) -> None:
    """Both passes, for one device."""
    heads, (key_dim, value_dim), tokens = arguments.heads, arguments.widths, arguments.tokens
    case = AttentionCase("bfloat16", tokens, tokens, heads, 2, key_dim, value_dim, causal=not arguments.full)
    tiles = AllTiles(*[Tiles(*arguments.tile)] * 3) if arguments.tile else choose_tiles(shape_of(case))
    mesh = Mesh(tpu_devices(TOPOLOGIES[arguments.compile])[:1], ("x",))
    shapes = [(1, tokens, n, width) for n, width in ((heads, key_dim), (2, key_dim), (2, value_dim))]
    sharding = NamedSharding(mesh, PartitionSpec())
    options = dict.fromkeys(("window", "q_segments", "kv_segments", "q_positions", "kv_positions", "soft_cap", "sinks"))

    def loss(q, k, v):
        out, _ = tpu.attention(q, k, v, scale=0.1, causal=case.causal, tiles=tiles, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*structs).compile()


if __name__ == "__main__":
    main()
