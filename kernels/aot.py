"""Compiles the GPU kernels for an H100 on a machine that has none: `python -m kernels.aot` prints what each one takes.

Needs JAX 0.11.2, the wheels jax-cuda13-plugin and jax-cuda13-pjrt of the same version, and CUDA's ptxas on the path; no
GPU and none of NVIDIA's other wheels. It says whether a kernel is legal, its registers, its spills and its shared
memory; it says nothing about time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from kernels import hopper_chip
from kernels.adamw import AdamWCase
from kernels.attention import AttentionCase
from kernels.attention import tiles as attention_tiles
from kernels.cross_entropy import CrossEntropyCase
from kernels.grouped_matmul import GroupedCase
from kernels.grouped_matmul import tiles as grouped_tiles
from kernels.grouped_matmul.quantized import QuantizedGroupedCase
from kernels.norm import NormCase
from kernels.norm import tiles as norm_tiles
from kernels.paged_attention import PagedAttentionCase, tiles
from kernels.quantized_matmul import QuantizedCase
from kernels.quantized_matmul.activations import ActivationCase
from kernels.target import Target

# XLA's description of the device, in the text form of its GpuTargetConfigProto. Figures of an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class GradientsCase:
    """The backward pass of a case of attention."""

    forward: AttentionCase


@dataclasses.dataclass(frozen=True)
class GroupedProductCase:
    """One of the grouped products of a feed-forward [in_dim] -> [out_dim] -> [in_dim]."""

    which: Literal["product", "transposed", "weight gradient", "hidden", "hidden gradient", "sum"]
    shape: GroupedCase


# llama3-8b in decode (many rows, one row, one long row), verification and prefill, and the edges of what the kernels
# take.
CASES = {
    "128 rows of 512": PagedAttentionCase("bfloat16", 128, 1, 32, 8, 128, 64, 512),
    "1 row of 512": PagedAttentionCase("bfloat16", 1, 1, 32, 8, 128, 64, 512),
    "1 row of 8192": PagedAttentionCase("bfloat16", 1, 1, 32, 8, 128, 64, 8192),
    "8 drafts": PagedAttentionCase("bfloat16", 16, 8, 32, 8, 128, 64, 1024),
    "64 queries of a kv head": PagedAttentionCase("bfloat16", 1, 8, 64, 8, 128, 64, 1024),
    "32 queries, pages of 128": PagedAttentionCase("bfloat16", 16, 4, 64, 8, 128, 128, 1024),
    "heads of 64, pages of 16": PagedAttentionCase("float16", 16, 1, 32, 8, 64, 16, 1024),
    "32 queries, heads of 256": PagedAttentionCase("bfloat16", 16, 8, 16, 4, 256, 64, 1024),
    "prefill, 16 tiles": PagedAttentionCase("bfloat16", 16, 128, 32, 8, 128, 64, 8192),
    "prefill, 1 tile in parts": PagedAttentionCase("bfloat16", 1, 128, 32, 8, 128, 64, 8192),
    "20 drafts, pages of 32": PagedAttentionCase("bfloat16", 16, 20, 32, 8, 128, 32, 1024),
    "prefill, 64, pages of 16": PagedAttentionCase("float16", 16, 128, 32, 8, 64, 16, 1024),
    "prefill, 256, pages of 128": PagedAttentionCase("bfloat16", 16, 128, 16, 4, 256, 128, 1024),
    "20 drafts, heads of 256": PagedAttentionCase("bfloat16", 1, 20, 16, 4, 256, 64, 8192),
    "int8 pages, 128 rows": PagedAttentionCase("bfloat16", 128, 1, 32, 8, 128, 64, 1024, "int8"),
    "int8 pages, 1 row of 128k": PagedAttentionCase("bfloat16", 1, 1, 32, 8, 128, 64, 131072, "int8"),
    "int8 pages, 32 queries": PagedAttentionCase("bfloat16", 16, 8, 32, 8, 128, 32, 1024, "int8"),
    "int8 pages, 20 drafts": PagedAttentionCase("bfloat16", 16, 20, 32, 8, 128, 64, 1024, "int8"),
    "float8 pages, 128 rows": PagedAttentionCase("bfloat16", 128, 1, 32, 8, 128, 64, 1024, "float8_e4m3fn"),
    "float8 pages of 128": PagedAttentionCase("bfloat16", 16, 1, 64, 8, 128, 128, 1024, "float8_e4m3fn"),
    "float8 pages, heads of 64": PagedAttentionCase("bfloat16", 16, 1, 32, 8, 64, 64, 1024, "float8_e4m3fn"),
    "float8 pages, heads of 256": PagedAttentionCase("bfloat16", 16, 1, 32, 4, 256, 64, 1024, "float8_e4m3fn"),
    "float8 pages, prefill": PagedAttentionCase("bfloat16", 16, 128, 32, 8, 128, 64, 8192, "float8_e4m3fn"),
    "forward": AttentionCase("bfloat16", 8192, 8192, 32, 8, 128, 128),
    "forward, full, ragged": AttentionCase("float16", 1001, 777, 32, 8, 128, 128, causal=False),
    **{
        f"forward, {key}/{value}, all masks": AttentionCase(
            "bfloat16", 4096, 4096, 32, 8, key, value, True, 1000, segments=True, soft_cap=True, sinks=True
        )
        for key, value in attention_tiles.WIDTHS
    },
    "forward, 64, causal": AttentionCase("bfloat16", 4096, 4096, 32, 8, 64, 64),
    "forward, 256, positions": AttentionCase("bfloat16", 4096, 4096, 16, 4, 256, 256, True, 1000, True, True, True),
    "forward, float8": AttentionCase("float8_e4m3fn", 8192, 8192, 32, 8, 128, 128),
    **{
        f"forward, float8, {width}, all masks": AttentionCase(
            "float8_e4m3fn", 4096, 1001, 32, 8, width, width, True, 1000, segments=True, soft_cap=True, sinks=True
        )
        for width, _ in attention_tiles.FLOAT8_WIDTHS
    },
    "backward": GradientsCase(AttentionCase("bfloat16", 8192, 8192, 32, 8, 128, 128)),
    "backward, full": GradientsCase(AttentionCase("float16", 8192, 8192, 32, 8, 128, 128, causal=False)),
    "backward, ragged": GradientsCase(AttentionCase("float16", 1001, 777, 32, 8, 128, 128)),
    "backward, window, segments": GradientsCase(
        AttentionCase("bfloat16", 4096, 4096, 32, 8, 128, 128, True, 1000, segments=True)
    ),
    "backward, all masks": GradientsCase(
        AttentionCase("bfloat16", 4096, 4096, 32, 8, 128, 128, True, 1000, True, True, True, True)
    ),
    **{
        f"backward, {key}/{value}": GradientsCase(AttentionCase("bfloat16", 4096, 4096, 32, 8, key, value))
        for key, value in ((96, 96), (192, 128), (256, 256))
    },
    "backward, 256, all masks": GradientsCase(
        AttentionCase("bfloat16", 4096, 4096, 16, 4, 256, 256, True, 1000, True, True, True, True)
    ),
    "backward, 64, full": GradientsCase(AttentionCase("bfloat16", 4096, 4096, 32, 8, 64, 64, causal=False)),
    **{
        f"product, {x} and {w}, {name}": QuantizedCase(x, w, 8192, 8192, 8192, *blocks, "columns", bias=bias)
        for x, w, name, blocks, bias in (
            ("int8", "int8", "rows", ((1, 8192), (8192, 1)), False),
            ("float8_e4m3fn", "float8_e4m3fn", "rows, bias", ((1, 8192), (8192, 1)), True),
            ("float8_e4m3fn", "float8_e4m3fn", "blocks", ((1, 128), (128, 128)), False),
            ("float8_e5m2", "float8_e4m3fn", "blocks, bias", ((1, 128), (128, 128)), True),
        )
    },
    **{
        f"few-bit weight, {name}": QuantizedCase("bfloat16", w, M, 8192, N, None, (group, 1), "fragments", zeros, bias)
        for name, w, M, N, group, zeros, bias in (
            ("int8, 1 row", "int8", 1, 28672, 8192, False, False),
            ("float8, 16 rows", "float8_e4m3fn", 16, 28672, 8192, False, True),
            ("int4, 16 rows", "int4", 16, 28672, 128, False, False),
            ("int4, 1 row, narrow", "int4", 1, 4096, 128, False, True),
            ("int4, zero points", "int4", 16, 28672, 32, True, False),
            ("int4, 100 rows", "int4", 100, 4096, 64, False, True),
            ("int4, widened", "int4", 2048, 28672, 32, True, False),
            ("int8, widened", "int8", 2048, 28672, 8192, False, False),
        )
    },
    **{
        f"grouped few-bit weight, {name}": QuantizedGroupedCase(
            "bfloat16", w, M, K, N, None, (group, 1), "fragments", zeros, num_groups=E
        )
        for name, w, M, K, N, E, group, zeros in (
            ("int8, 16 rows", "int8", 16, 4096, 14336, 8, 4096, False),
            ("int4, 2 rows", "int4", 2, 4096, 14336, 8, 128, False),
            ("int4, 16 rows", "int4", 16, 14336, 4096, 8, 128, False),
            ("int4, zero points", "int4", 512, 4096, 14336, 8, 32, True),
            ("int8, 512 rows", "int8", 512, 4096, 14336, 8, 4096, False),
            ("int4, 512 rows", "int4", 512, 4096, 14336, 8, 128, False),
            ("int4, groups of 32, ragged", "int4", 999, 4096, 14336, 8, 32, False),
            ("int4, groups of 64, zero points", "int4", 999, 4096, 14336, 8, 64, True),
            ("float8, 4096 rows", "float8_e4m3fn", 4096, 4096, 14336, 8, 4096, False),
            ("int4, 4096 rows", "int4", 4096, 4096, 14336, 8, 128, False),
            ("int8, 128 groups", "int8", 256, 1024, 3584, 128, 1024, False),
        )
    },
    **{
        f"grouped {which}": GroupedProductCase(which, GroupedCase("bfloat16", 32768, 8, 1024, 3584))
        for which in get_args(get_type_hints(GroupedProductCase)["which"])
    },
    "grouped product, narrow, ragged": GroupedProductCase("product", GroupedCase("float16", 1001, 3, 64, 128)),
    "grouped product, 256 groups": GroupedProductCase("product", GroupedCase("bfloat16", 4096, 256, 7168, 2048)),
    "cross-entropy": CrossEntropyCase("float32", 32_000),
    "cross-entropy, read twice": CrossEntropyCase("float32", 128_256),
    "adamw": AdamWCase("bfloat16", "float32", 8 * 1024 * 3584),
    "adamw, moments in bfloat16": AdamWCase("float32", "bfloat16", 1024),
    "residual norm": NormCase("bfloat16", 16384, 1024, True, uses=3),
    "residual norm, router": NormCase("bfloat16", 16384, 1024, True, num_columns=norm_tiles.MAX_NARROW),
    "residual norm, wide, ragged": NormCase("float16", 1001, norm_tiles.MAX_WIDTH, True, uses=2),
    "residual norm, 512s": NormCase("bfloat16", 8192, 2560, False),
    "norm, quantised": ActivationCase("bfloat16", "float8_e4m3fn", 8192, 4096, gated=False),
    "gate, quantised, wide": ActivationCase("float16", "int8", 8192, 16384, gated=True),
    "gate, quantised, joined": ActivationCase("bfloat16", "int8", 8192, 14336, gated=True, joined=True),
    "product, float8, few odd rows": QuantizedCase(
        "float8_e4m3fn", "float8_e4m3fn", 37, 1000, 777, (1, 1000), (1000, 1), "columns", out_dtype="float32"
    ),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """Per thread: `registers`, `spilled_bytes`. Per block of threads: `shared_bytes`, by the tiles' own account.
    `serialized`: each product of the tensor cores is waited for before the next one starts, since ptxas could not keep
    its sums in place."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool


def missing() -> str | None:
    """What this machine lacks for it; None where nothing does."""
    if hopper_chip.JAX_VERSION < (0, 11):
        return f"needs JAX 0.11, and this is JAX {jax.__version__}"
    for module, package in (("jax_cuda13_plugin", "jax-cuda13-plugin"), ("jax_plugins", "jax-cuda13-pjrt")):
        if importlib.util.find_spec(module) is None:
            return f"needs the wheel {package}=={jax.__version__} (pip install --no-deps)"
    return None if shutil.which("ptxas") else "needs ptxas, of CUDA 13, on the path"


def reports() -> list[Report]:
    """Every case, compiled in a process of its own that uses no GPU. RuntimeError with its output where one fails."""
    cuda = Path(shutil.which("ptxas")).resolve().parents[1]
    settings = ["JAX_PLATFORMS=cpu", f"CUDA_ROOT={cuda}", "MOSAIC_GPU_DUMP_PTXAS=1"]
    command = ["env", *settings, sys.executable, "-m", "kernels.aot", "--compile"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kernels did not compile for an H100:\n{done.stdout[-4000:]}")
    return list(_parse(done.stdout))


def _parse(output: str) -> Iterator[Report]:
    """ptxas writes its report straight to the process's output, after the line with the case's name."""
    for section in output.split("kernel: ")[1:]:
        name = section.splitlines()[0]
        case = CASES[name]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", section)]
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", section)]
        assert registers and spilled, f"no report of ptxas for {name}: {section}"
        yield Report(name, max(registers), max(spilled), _shared_bytes(case), "are serialized" in section)


def _shared_bytes(
    case: PagedAttentionCase
    | AttentionCase
    | GradientsCase
    | QuantizedCase
    | ActivationCase
    | GroupedProductCase
    | CrossEntropyCase
    | NormCase
    | AdamWCase,
) -> int:
    if isinstance(case, AdamWCase):
        return 0
    if isinstance(case, NormCase):
        # Back: it reads the most.
        shape = case.width, case.uses + 2, 2, case.num_columns
        return norm_tiles.shared_bytes(norm_tiles.choose_tiles(case.num_rows, *shape), *shape)
    if isinstance(case, CrossEntropyCase):
        from kernels.cross_entropy import gpu

        return gpu.shared_bytes(case.length)
    if isinstance(case, ActivationCase):
        # Only what Mosaic takes for reductions.
        return 2048
    if isinstance(case, QuantizedGroupedCase):
        from kernels.grouped_matmul import weight_only_tiles

        return weight_only_tiles.shared_bytes(case, weight_only_tiles.choose_tiles(case))
    if isinstance(case, QuantizedCase) and case.weight_only:
        from kernels.quantized_matmul import weight_only_tiles, widening

        if weight_only_tiles.widened_first(case):
            return widening.shared_bytes(case)
        return weight_only_tiles.shared_bytes(case, weight_only_tiles.choose_tiles(case))
    if isinstance(case, QuantizedCase):
        from kernels.quantized_matmul import tiles as product_tiles

        return product_tiles.shared_bytes(product_tiles.choose_tiles(case), case.scales_outside)
    if isinstance(case, GroupedProductCase):
        return _grouped_shared_bytes(case)
    if isinstance(case, GradientsCase):
        from kernels.attention import gpu_backward

        return gpu_backward.shared_bytes(case.forward.key_dim, case.forward.value_dim)
    if isinstance(case, AttentionCase):
        return attention_tiles.shared_bytes(case, attention_tiles.choose_tiles(case))
    if tiles.few_queries(case):
        return tiles.shared_bytes(case, tiles.choose_tiles(case).num_buffers)
    return tiles.prefill_shared_bytes(case, tiles.choose_prefill_tiles(case))


def _grouped_shared_bytes(case: GroupedProductCase) -> int:
    match case.which:
        case "product":
            chosen = grouped_tiles.choose_tiles(case.shape.out_dim, False)
        case "transposed" | "sum":
            chosen = grouped_tiles.choose_tiles(case.shape.in_dim, True)
        case "hidden gradient":
            chosen = grouped_tiles.choose_tiles(case.shape.out_dim, True)
        case "weight gradient":
            chosen = grouped_tiles.choose_gradient_tiles(case.shape.out_dim)
        case "hidden":
            chosen = grouped_tiles.choose_gated_tiles()
    return grouped_tiles.shared_bytes(chosen, num_matrices=2 if case.which == "hidden" else 1)


def _compile_all() -> None:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    # The plugin registers itself when backends are made, and the description below needs it.
    xla_bridge.backends()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=_H100)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    for name, case in CASES.items():
        print(f"kernel: {name}", flush=True)
        match case:
            case PagedAttentionCase():
                _compile(case, mesh)
            case QuantizedGroupedCase():
                _compile_grouped_weight_only(case, mesh)
            case QuantizedCase() if case.weight_only:
                _compile_weight_only(case, mesh)
            case QuantizedCase():
                _compile_product(case, mesh)
            case ActivationCase():
                _compile_activation(case, mesh)
            case NormCase():
                _compile_norm(case, mesh)
            case AdamWCase():
                _compile_adamw(case, mesh)
            case CrossEntropyCase():
                _compile_cross_entropy(case, mesh)
            case GroupedProductCase():
                _compile_grouped(case, mesh)
            case _:
                _compile_attention(case, mesh)


def _compile(case: PagedAttentionCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.paged_attention import extend_pages, paged_attention

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pages = (case.width // case.page_size + 1, case.page_size, case.num_kv_heads, case.head_dim)
    shapes = [(case.batch, case.num_tokens, case.num_heads, case.head_dim), pages, pages]
    dtypes = [case.dtype, *[case.kv_dtype or case.dtype] * 2]
    floats = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    scale = jax.ShapeDtypeStruct((pages[0], pages[2], pages[1]), jnp.float32, sharding=whole)
    scales = {} if case.kv_dtype is None else {"k_scale": scale, "v_scale": scale}
    shapes = [(case.batch, case.width // case.page_size), (case.batch,), (case.batch,)]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in shapes]

    # A row's own key and value, where it has one token: the kernel writes them too.
    new = [jax.ShapeDtypeStruct((case.batch, 1, *pages[2:]), jnp.dtype(case.dtype), sharding=whole)] * 2
    new = new if case.num_tokens == 1 else []

    def attend(q, k_pages, v_pages, page_table, lengths, starts, scales, *new):
        # Every option on: the most that the kernel keeps in registers.
        statics = {
            "scale": 0.1,
            "window": 100,
            "soft_cap": 30.0,
            "impl": "pallas",
            "target": Target("gpu", (9, 0)),
            **scales,
        }
        if not tiles.few_queries(case):
            statics["sinks"] = jnp.zeros(case.num_heads)
        if new:
            counts = lengths - starts
            return extend_pages(q, *new, k_pages, v_pages, page_table, starts, counts, **statics)
        return paged_attention(q, k_pages, v_pages, page_table, lengths, starts_B=starts, **statics)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(attend).trace(*floats, *integers, scales, *new).lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_attention(case: AttentionCase | GradientsCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.attention import gpu, gpu_backward

    backward, case = isinstance(case, GradientsCase), case.forward if isinstance(case, GradientsCase) else case
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    B, T, S = 2, case.query_length, case.kv_length
    heads = ((T, case.num_heads, case.key_dim), (S, case.num_kv_heads, case.key_dim))
    heads = (*heads, (S, case.num_kv_heads, case.value_dim))
    floats = [jax.ShapeDtypeStruct((B, *shape), jnp.dtype(case.dtype), sharding=whole) for shape in heads]
    integers = [jax.ShapeDtypeStruct((B, length), jnp.int32, sharding=whole) for length in (T, S)]

    def attend(q, k, v, of_queries, of_keys):
        segments = (of_queries, of_keys) if case.segments else (None, None)
        positions = (of_queries, of_keys) if case.positions else (None, None)
        marks = dict(
            zip(("q_segments", "kv_segments", "q_positions", "kv_positions"), segments + positions, strict=True)
        )
        soft_cap, sinks = (30.0 if case.soft_cap else None), (jnp.zeros(case.num_heads) if case.sinks else None)
        statics = {"scale": 0.1, "causal": case.causal, "window": case.window, "soft_cap": soft_cap, "sinks": sinks}
        if backward:
            out, lse = jnp.zeros((*q.shape[:3], case.value_dim), q.dtype), jnp.zeros(q.shape[:3])
            return gpu_backward.attention_gradients(q, k, v, out, lse, out, None, **statics, **marks)
        scales = tuple(jnp.ones((B, x.shape[2])) for x in (q, k, v)) if case.float8 else None
        return gpu.forward(q, k, v, **statics, **marks, tiles=attention_tiles.choose_tiles(case), scales=scales)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(attend).trace(*floats, *integers).lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_product(case: QuantizedCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.quantized_matmul import gpu
    from quantization.qarray import QArray

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    M, K, N = case.num_rows, case.in_dim, case.out_dim

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

    x = QArray(array((M, K), case.x_dtype), array((M // case.x_block[0], K // case.x_block[1]), "float32"))
    w_scales = array((K // case.w_block[0], N // case.w_block[1]), "float32")
    w = QArray(array((N, K), case.w_dtype), w_scales, None, case.w_layout)
    bias = array((N,), "float32") if case.bias else None
    multiply = jax.jit(gpu.quantized_matmul, static_argnums=3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = multiply.trace(x, w, bias, jnp.dtype(case.out_dtype)).lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_grouped(case: GroupedProductCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.grouped_matmul import gpu, gpu_gated

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    M, E, K, N = case.shape.num_rows, case.shape.num_groups, case.shape.in_dim, case.shape.out_dim
    shapes = ((M, K), (E, K, N), (E, N, K), (M, N))
    x, w, down, dy = (jax.ShapeDtypeStruct(shape, jnp.dtype(case.shape.dtype), sharding=whole) for shape in shapes)
    run, operands = {
        "product": (gpu.product, (x, w)),
        "transposed": (functools.partial(gpu.product, transpose=True), (dy, w)),
        "weight gradient": (gpu.weight_gradient, (x, dy)),
        "hidden": (functools.partial(gpu_gated.hidden, with_parts=True), (x, w, w)),
        "hidden gradient": (gpu_gated.hidden_gradient, (x, down, dy, dy)),
        "sum": (gpu_gated.summed_product, (dy, w, dy, w)),
    }[case.which]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(lambda sizes, *arrays: run(*arrays, group_sizes=sizes)).trace(sizes, *operands)
        lowered = lowered.lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_multiply(multiply: Callable, operands, out_dtype: str, mesh: jax.sharding.Mesh) -> None:
    """`multiply` of three operands and the dtype of its result."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), operands)
    multiply = jax.jit(multiply, static_argnums=3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = multiply.trace(*operands, jnp.dtype(out_dtype)).lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_weight_only(case: QuantizedCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.quantized_matmul import weight_only
    from kernels.quantized_matmul.weight_only_tiles import widened_first
    from quantization.qarray import QArray, to_fragments

    M, K, N = case.num_rows, case.in_dim, case.out_dim
    shapes = [(K // case.w_block[0], N), (M, K), (N,)]
    scales, x, bias = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape, dtype in zip(shapes, ("float32", case.x_dtype, case.x_dtype), strict=True)
    )
    rows = QArray(jax.ShapeDtypeStruct((K, N), jnp.dtype(case.w_dtype)), scales, scales if case.zero_points else None)
    operands = x, jax.eval_shape(to_fragments, rows), bias if case.bias else None
    multiply = weight_only.quantized_matmul
    if widened_first(case):
        # The product is XLA's, which tries its own ways of it on a GPU.
        multiply = _widen
    _compile_multiply(multiply, operands, case.out_dtype, mesh)


def _widen(x, w, bias, out_dtype) -> jax.Array:
    from kernels.quantized_matmul import widening

    del bias, out_dtype
    return widening.widened(w, x.dtype)


def _compile_grouped_weight_only(case: QuantizedGroupedCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.grouped_matmul import gpu_weight_only
    from quantization.qarray import QArray, to_fragments

    E, M, K, N = case.num_groups, case.num_rows, case.in_dim, case.out_dim
    scales = jax.ShapeDtypeStruct((E, K // case.w_block[0], N), jnp.float32)
    values = jax.ShapeDtypeStruct((E, K, N), jnp.dtype(case.w_dtype))
    w = jax.eval_shape(to_fragments, QArray(values, scales, scales if case.zero_points else None))
    operands = jax.ShapeDtypeStruct((M, K), jnp.dtype(case.x_dtype)), w, jax.ShapeDtypeStruct((E,), jnp.int32)
    _compile_multiply(gpu_weight_only.product, operands, case.out_dtype, mesh)


def _compile_activation(case: ActivationCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.quantized_matmul import activations_gpu

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = (case.num_rows, case.width * (2 if case.joined else 1))
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(case.x_dtype), sharding=whole)
    gain = None if case.gated else jax.ShapeDtypeStruct((case.width,), jnp.float32, sharding=whole)
    run = jax.jit(activations_gpu.quantized_rows, static_argnames=("dtype", "epsilon"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = run.trace((x, x) if case.gated and not case.joined else (x,), gain, dtype=case.dtype, epsilon=1e-6)
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_adamw(case: AdamWCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.adamw import Hyperparameters, adamw

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    dtypes = (case.gradient, "bfloat16", "int16", case.mean, "float32")
    arrays = [jax.ShapeDtypeStruct((case.num_elements,), jnp.dtype(dtype), sharding=whole) for dtype in dtypes]
    factors = jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole)

    def update(*arrays):
        return adamw(*arrays, Hyperparameters(0.9, 0.95, 1e-8, 0.1), impl="pallas", target=Target("gpu", (9, 0)))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(update).trace(*arrays, factors).lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_cross_entropy(case: CrossEntropyCase, mesh: jax.sharding.Mesh) -> None:
    from kernels.cross_entropy import gpu

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = {"float32": ((4096, case.length), (4096,)), "int32": ((4096,),)}
    logits, weights, targets = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole) for dtype in shapes for shape in shapes[dtype]
    )
    run = jax.jit(gpu.rows_and_gradient, static_argnames=("z_loss_coef", "dtype"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = run.trace(logits, targets, weights, z_loss_coef=1e-4, dtype=jnp.dtype("bfloat16"))
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile()


def _compile_norm(case: NormCase, mesh: jax.sharding.Mesh) -> None:
    """Both directions."""
    from kernels.norm import add_rms_norm

    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((case.num_rows, case.width), jnp.dtype(case.dtype), sharding=whole)
    scale = jax.ShapeDtypeStruct((case.width,), jnp.float32, sharding=whole)
    how = {"epsilon": 1e-6, "offset": 1.0, "uses": case.uses, "impl": "pallas", "target": Target("gpu", (9, 0))}

    narrow = jax.ShapeDtypeStruct((case.width, case.num_columns), jnp.float32, sharding=whole)

    def both(x, scale, residual, narrow):
        results, pull = jax.vjp(lambda x, scale: add_rms_norm(x, residual, scale, narrow, **how), x, scale)
        return pull(results)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both).trace(x, scale, x if case.added else None, narrow if case.num_columns else None)
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile in this process (what the command itself runs)")
    if parser.parse_args().compile:
        _compile_all()
        return
    lacking = missing()
    if lacking is not None:
        parser.exit(2, f"python -m kernels.aot {lacking}\n")
    print(f"{'kernel':<32}{'registers':>10}{'spilled':>9}{'shared':>9}")
    for report in reports():
        note = "  products are serialized" if report.serialized else ""
        print(f"{report.name:<32}{report.registers:>10}{report.spilled_bytes:>9}{report.shared_bytes:>9}{note}")


if __name__ == "__main__":
    main()
