"""Quantised pages of rows as bfloat16 pages on Hopper, for the kernel for many queries.

That kernel reads a key once for every 128 queries of each head; so codes become bfloat16 once, before it. Rows with the
same pages, which are tiles of one prompt, share what is made, and what is not live is not made.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels import hopper
from kernels.paged_attention import narrow

# One warpgroup passes through these steps once, and its threads meet in `commit_smem`.
_COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)


class _Memory(NamedTuple):
    """Shared memory of a block of threads: the keys of a page and one head, and its values after them."""

    codes: Any
    scales: Any
    wide: Any
    arrived: Any


def widened_pages(
    q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, k_scale, v_scale, *, interpret=None
) -> tuple[jax.Array, ...]:
    """(q, pages of keys, of values, page table), in q's dtype, with the even elements of a head before the odd.

    Pages past a row's length hold anything, as pages do there.
    """
    B, M = page_table_BM.shape
    S = k_pages_PSKH.shape[1]
    # Neighbours with equal tables are tiles of one sequence: the first of them has the pages of all.
    other = jnp.any(page_table_BM[1:] != page_table_BM[:-1], axis=1)
    leads_B = jnp.concatenate([jnp.ones(1, bool), other])
    leader_B = lax.cummax(jnp.where(leads_B, jnp.arange(B, dtype=jnp.int32), 0))
    # The longest of those that share.
    longest_B = jax.ops.segment_max(lengths_B, leader_B, num_segments=B)
    live_B = jnp.where(leads_B, jnp.clip((longest_B + S - 1) // S, 0, M), 0).astype(jnp.int32)
    pages = _widen(k_pages_PSKH, v_pages_PSKH, page_table_BM, live_B, k_scale, v_scale, interpret=interpret)
    table_BM = leader_B[:, None] * M + jnp.arange(M, dtype=jnp.int32)
    return narrow.split(q_BTNH), *pages, table_BM


@functools.partial(jax.jit, static_argnames=("interpret",))
def _widen(k_pages_PSKH, v_pages_PSKH, page_table_BM, live_B, k_scale, v_scale, *, interpret):
    (_, S, K, H), (B, M) = k_pages_PSKH.shape, page_table_BM.shape
    width = min(64, H // 2)
    tiled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    scratch = _Memory(
        codes=plgpu.SMEM((2 * S, H), k_pages_PSKH.dtype, transforms=narrow.transforms(H)),
        scales=plgpu.SMEM((2 * S,), jnp.float32),
        wide=plgpu.SMEM((2 * S, H), jnp.bfloat16, transforms=tiled),
        arrived=plgpu.Barrier(num_arrivals=4),
    )

    def body(*refs):
        pl.run_scoped(lambda **memory: _body(_Memory(**memory), *refs), **scratch._asdict())

    mesh = plgpu.Mesh(grid=(B, M, K), grid_names=("row", "entry", "head"))
    out = jax.ShapeDtypeStruct((B * M, S, K, H), jnp.bfloat16)
    run = pl.kernel(body, [out, out], mesh=mesh, compiler_params=_COMPILER, interpret=interpret, name="widen_pages")
    return run(k_pages_PSKH, v_pages_PSKH, page_table_BM, live_B, k_scale, v_scale)


def _body(memory: _Memory, k_ref, v_ref, table_ref, live_ref, k_scale_ref, v_scale_ref, *outs):
    row, entry, head = (lax.axis_index(name) for name in ("row", "entry", "head"))

    @pl.when(entry < live_ref[row])
    def _():
        page, size = table_ref[row, entry], k_ref.shape[1]
        sides = [pl.ds(0, size), pl.ds(size, size)]
        for side, codes, scales in zip(sides, (k_ref, v_ref), (k_scale_ref, v_scale_ref), strict=True):
            plgpu.copy_gmem_to_smem(codes.at[page, :, head, :], memory.codes.at[side], memory.arrived)
            plgpu.copy_gmem_to_smem(scales.at[page, head], memory.scales.at[side], memory.arrived)
        plgpu.barrier_wait(memory.arrived)
        # Of 64 rows, as a product's operand has them.
        for base in range(0, 2 * size, 64):
            rows = pl.ds(base, 64)
            scale = plgpu.load(memory.scales.at[rows], layout=hopper.ROWS, optimized=False)
            for i, half in enumerate(narrow.load(memory.codes.at[rows])):
                wide = half.astype(jnp.float32) * hopper.along(scale, half.shape, 0)
                memory.wide[rows, pl.ds(i * half.shape[1], half.shape[1])] = wide.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for side, out in zip(sides, outs, strict=True):
            plgpu.copy_smem_to_gmem(memory.wide.at[side], out.at[row * table_ref.shape[1] + entry, :, head, :])
        plgpu.wait_smem_to_gmem(0)
