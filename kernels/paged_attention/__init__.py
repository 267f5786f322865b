"""Attention over a cache of keys and values in pages, and the write of new ones into their pages."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from kernels.paged_attention import reference, tiles, xla
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class PagedAttentionCase:
    """The static facts of one call: shapes (of one shard, where sharded) and dtype. `width` counts positions: M · S."""

    dtype: str
    batch: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    width: int


def supports(impl: Impl, case: PagedAttentionCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return tiles.unsupported(case, target)
        case _:
            raise ValueError(f"paged_attention impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")


def choose(impl: Impl, target: Target, case: PagedAttentionCase | None = None) -> tuple[Impl, str]:
    """Concrete implementation and the reason for it; "auto" is decided here.

    One name serves a run's calls of many lengths, so without a `case` "auto" stays "auto" on a GPU that has a kernel,
    and is decided at each call. Raises ValueError for an unknown name and, with the reason, for a named implementation
    that can't run `case`.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"paged_attention impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")
    if impl != "auto":
        reason = None if case is None else supports(impl, case, target)
        if reason is not None:
            raise ValueError(
                f"paged_attention impl={impl!r} can't run: {reason}; set the paged_attention impl to 'auto' or 'xla'"
            )
        return impl, "asked for by name"
    if target.platform != "gpu":
        return "xla", f"the only fast implementation for {target.platform}"
    if case is None:
        if target.compute_capability == (9, 0):
            return "auto", "at each call: pallas where it takes the shapes and the dtype, else xla"
        return "xla", f"the only fast implementation for {target}"
    reason = supports("pallas", case, target)
    if reason is None:
        return "pallas", "reads pages where they lie, and live ones only"
    return "xla", f"pallas can't: {reason}"


def paged_attention(
    q_BTNH: jax.Array,
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    page_table_BM: jax.Array,
    lengths_B: jax.Array,
    *,
    starts_B: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Causal attention of a short block of queries per row over the row's pages, which hold its own keys already.

    Position p of row b is at offset p % S of page page_table[b, p // S]. Query t of row b is at position
    starts[b] + t, and sees positions up to its own that are below lengths[b] (and within the window). What a page
    holds at or past lengths[b] is never read into a result, finite or not. A query that sees nothing gives zeros.

    Args:
      q_BTNH: bfloat16, float16 or float32, T tokens of each row: one in decode, more in prefill and verification.
      k_pages_PSKH, v_pages_PSKH: P pages of S positions, K kv heads (N a multiple of K), q's dtype.
      page_table_BM: int32, pages of each row in order; entries past its length are read and masked.
      lengths_B: int32, positions of each row that hold keys, the block's own included.
      starts_B: int32, position of each row's first query; None for lengths - T, a block without padding.
      scale: factor on q·k.
      window: a query sees itself and the window - 1 positions before it; None for all.
      soft_cap: scores become soft_cap · tanh(score / soft_cap).
      sinks: float32 [N], a logit per head that joins the softmax and carries no value.
      impl: "auto" chooses for `target`, as `choose` does.
      target: device kind; None for the default device. Read only where `impl` is "auto" or "pallas".

    Returns out_BTNH in q's dtype. Raises ValueError for shapes or dtypes that disagree, for an unknown `impl` and for
    one that can't run.
    """
    _check(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B)
    case = case_of(q_BTNH, k_pages_PSKH, page_table_BM)
    if impl not in ("reference", "xla"):
        impl, _ = choose(impl, default_target() if target is None else target, case)
    if starts_B is None:
        starts_B = lengths_B - q_BTNH.shape[1]
    operands = (q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
    statics = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    with jax.named_scope("paged_attention"):
        match impl:
            case "reference":
                return reference.paged_attention(*operands, **statics)
            case "xla":
                return xla.paged_attention(*operands, **statics)
            # Imported here and not above: Mosaic GPU's modules change with JAX's version, and most runs need none.
            case _ if tiles.few_queries(case):
                from kernels.paged_attention import gpu

                return gpu.paged_attention(*operands, **statics, tiles=tiles.choose_tiles(case))
            case _:
                from kernels.paged_attention import prefill

                return prefill.paged_attention(*operands, **statics, tiles=tiles.choose_prefill_tiles(case))


def extend_pages(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    page_table_BM: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`write_pages` and then `paged_attention` of the rows so extended: (out_BTNH, k_pages, v_pages).

    One launch does both where a row has one token and the kernel for few queries runs: row b has starts[b] + counts[b]
    keys then, with counts[b] 0 or 1. Arguments, the default of `impl` and errors are those of the two.
    """
    case = case_of(q_BTNH, k_pages_PSKH, page_table_BM)
    if impl not in ("reference", "xla"):
        target = default_target() if target is None else target
        impl, _ = choose(impl, target, case)
    statics = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    lengths_B = starts_B + counts_B
    if impl == "pallas" and case.num_tokens == 1 and tiles.few_queries(case):
        _check(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B)
        from kernels.paged_attention import gpu

        new = (k_BTKH.astype(k_pages_PSKH.dtype), v_BTKH.astype(v_pages_PSKH.dtype))
        operands = (q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
        with jax.named_scope("paged_attention"):
            return gpu.paged_attention(*operands, **statics, tiles=tiles.choose_tiles(case), new=new)
    pages = write_pages(k_pages_PSKH, v_pages_PSKH, k_BTKH, v_BTKH, page_table_BM, starts_B, counts_B)
    statics |= {"starts_B": starts_B, "impl": impl, "target": target}
    return paged_attention(q_BTNH, *pages, page_table_BM, lengths_B, **statics), *pages


def case_of(q_BTNH: jax.Array, k_pages_PSKH: jax.Array, page_table_BM: jax.Array) -> PagedAttentionCase:
    """The case of a call with these arrays (or their shapes and dtypes)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    return PagedAttentionCase(jnp.dtype(q_BTNH.dtype).name, B, T, N, K, H, S, page_table_BM.shape[1] * S)


def _check(q, k_pages, v_pages, page_table, lengths) -> None:
    given = f"q {q.dtype}{list(q.shape)}, k_pages {k_pages.dtype}{list(k_pages.shape)}, v_pages {list(v_pages.shape)}"
    if q.ndim != 4 or k_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3] or q.shape[3] != k_pages.shape[3]:
        raise ValueError(f"paged_attention of {given}: needs q [B,T,N,H] and pages [P,S,K,H]")
    if q.shape[2] % k_pages.shape[2]:
        raise ValueError(f"paged_attention of {given}: the query heads must be a multiple of the kv heads")
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(f"paged_attention of {given}: all three need one dtype")
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"paged_attention: page_table {list(page_table.shape)} and lengths {list(lengths.shape)} need [B, M] "
            f"and [B] with B={q.shape[0]}"
        )


def write_pages(
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    page_table_BM: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The pages with the first counts[b] keys and values of each row at positions starts[b], starts[b] + 1, and so on.

    Page 0 is no row's: what is left out may be written there. Rows must not write to one place. In place where the
    pages are donated, or carried by a loop.
    """
    P, S, K, _ = k_pages_PSKH.shape
    B, T = k_BTKH.shape[:2]
    offset_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    position_BT = starts_B[:, None] + offset_BT
    entry_BT = jnp.minimum(position_BT // S, page_table_BM.shape[1] - 1)
    slot_BT = jnp.take_along_axis(page_table_BM, entry_BT, axis=1) * S + position_BT % S
    written_BT = (offset_BT < counts_B[:, None]) & (position_BT < page_table_BM.shape[1] * S)
    if B * T == 1:
        # One token needs no scatter, which would read and select what it may not overwrite (two launches more). One
        # that takes no part is written too, to the first place: no row reads that page.
        slot = jnp.where(written_BT, slot_BT, 0)[0, 0]

        def write(pages: jax.Array, new: jax.Array) -> jax.Array:
            rows = pages.reshape(P * S, K, -1)
            return lax.dynamic_update_slice(rows, new.astype(pages.dtype)[0], (slot, 0, 0)).reshape(pages.shape)
    else:
        # Tokens that are not written get a place of their own past the end: a promise of distinct places must hold.
        nowhere_BT = P * S + jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
        slot_M = jnp.where(written_BT, slot_BT, nowhere_BT).reshape(-1)

        def write(pages: jax.Array, new: jax.Array) -> jax.Array:
            rows = pages.reshape(P * S, K, -1)
            values = new.astype(pages.dtype).reshape(B * T, K, -1)
            return rows.at[slot_M].set(values, mode="drop", unique_indices=True).reshape(pages.shape)

    with jax.named_scope("write_pages"):
        return write(k_pages_PSKH, k_BTKH), write(v_pages_PSKH, v_BTKH)
