"""Attention over a cache of keys and values in pages, and the write of new ones into their pages."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from kernels.choice import by_name
from kernels.debug import check_pages, check_written_pages
from kernels.paged_attention import reference, tiles, tpu_tiles, xla
from kernels.paged_attention.quantize import LARGEST, quantize_heads
from kernels.target import Target, default_target

Impl = Literal["auto", "reference", "xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class PagedAttentionCase:
    """The static facts of one call: shapes (of one shard, where sharded) and dtypes. `width` counts positions: M · S.

    `kv_dtype`: that of quantised pages; None for pages in `dtype`.
    """

    dtype: str
    batch: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    width: int
    kv_dtype: str | None = None


def supports(impl: Impl, case: PagedAttentionCase, target: Target) -> str | None:
    """Why `impl` can't compute `case` on `target`; None where it can. Raises ValueError for an unknown name."""
    match impl:
        case "reference" | "xla":
            return None
        case "pallas":
            return (tpu_tiles if target.platform == "tpu" else tiles).unsupported(case, target)
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
        return by_name("paged_attention", impl, None if case is None else supports(impl, case, target))
    if target.platform == "tpu":
        return "xla", "pallas has been compiled for TPU, and not measured there"
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
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Causal attention of a short block of queries per row over the row's pages, which hold its own keys already.

    Position p of row b is at offset p % S of page page_table[b, p // S]. Query t of row b is at position
    starts[b] + t, and sees positions up to its own that are below lengths[b] (and within the window). What a page
    holds at or past lengths[b] is never read into a result, finite or not. A query that sees nothing gives zeros.

    Args:
      q_BTNH: bfloat16, float16 or float32, T tokens of each row: one in decode, more in prefill and verification.
      k_pages_PSKH, v_pages_PSKH: P pages of S positions, K kv heads (N a multiple of K), q's dtype; int8 or
        float8_e4m3fn with scales.
      page_table_BM: int32, pages of each row in order; entries past its length are read and masked.
      lengths_B: int32, positions of each row that hold keys, the block's own included.
      starts_B: int32, position of each row's first query; None for lengths - T, a block without padding.
      scale: factor on q·k.
      window: a query sees itself and the window - 1 positions before it; None for all.
      soft_cap: scores become soft_cap · tanh(score / soft_cap).
      sinks: float32 [N], a logit per head that joins the softmax and carries no value.
      k_scale, v_scale: float32 [P, K, S], the factor of each position's key and value; None for pages in q's dtype.
      impl: "auto" chooses for `target`, as `choose` does.
      target: device kind; None for the default device. Read only where `impl` is "auto" or "pallas".

    Returns out_BTNH in q's dtype. Raises ValueError for shapes or dtypes that disagree, for an unknown `impl` and for
    one that can't run; in debug mode (`kernels.debug`) for lengths and pages that are not there.
    """
    _check(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, k_scale, v_scale)
    check_pages("paged_attention", page_table_BM, lengths_B, *k_pages_PSKH.shape[:2])
    if starts_B is None:
        starts_B = lengths_B - q_BTNH.shape[1]
    operands = (q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
    statics = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    return _attend(operands, statics, {"k_scale": k_scale, "v_scale": v_scale}, impl, target)


def _attend(operands, statics, scales, impl: Impl, target: Target | None) -> jax.Array:
    """`operands` are those of the implementations, from q to starts."""
    q_BTNH, k_pages_PSKH, _, page_table_BM, *_ = operands
    case = case_of(q_BTNH, k_pages_PSKH, page_table_BM)
    if impl not in ("reference", "xla"):
        impl, _ = choose(impl, default_target() if target is None else target, case)
    with jax.named_scope("paged_attention"):
        match impl:
            case "reference":
                return reference.paged_attention(*operands, **scales, **statics)
            case "xla":
                return xla.paged_attention(*operands, **scales, **statics)
            # Imported here and not above: Pallas's modules take half a second, and Mosaic GPU's change with JAX.
            case _ if target.platform == "tpu":
                from kernels.paged_attention import tpu

                return tpu.paged_attention(*operands, **scales, **statics)
            case _ if tiles.few_queries(case) and case.kv_dtype is None:
                from kernels.paged_attention import gpu

                return gpu.paged_attention(*operands, **statics, tiles=tiles.choose_tiles(case))
            case _ if tiles.few_queries(case):
                from kernels.paged_attention import gpu_quantized

                return gpu_quantized.paged_attention(*operands, **scales, **statics, tiles=tiles.choose_tiles(case))
            case _ if case.kv_dtype is None:
                from kernels.paged_attention import prefill

                return prefill.paged_attention(*operands, **statics, tiles=tiles.choose_prefill_tiles(case))
            case _:
                from kernels.paged_attention import narrow, prefill, widen

                wide = widen.widened_pages(*operands[:5], **scales)
                chosen = tiles.choose_prefill_tiles(case)
                return narrow.join(prefill.paged_attention(*wide, *operands[4:], **statics, tiles=chosen))


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
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    impl: Impl = "auto",
    target: Target | None = None,
) -> tuple[jax.Array, ...]:
    """`write_pages` and then `paged_attention` of the rows so extended: (out_BTNH, k_pages, v_pages), and k_scale,
    v_scale where pages are quantised.

    One launch does both where a row has one token and the Hopper kernel for few queries runs: row b has starts[b] +
    counts[b] keys then, with counts[b] 0 or 1. Arguments, the default of `impl` and errors are those of the two; what
    debug mode says of lengths and pages, it says of rows with a count above 0.
    """
    lengths_B = starts_B + counts_B
    _check(q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, k_scale, v_scale)
    sizes = (k_BTKH.shape[1], *k_pages_PSKH.shape[:2])
    check_written_pages("extend_pages", page_table_BM, starts_B, counts_B, *sizes, read=True)
    case = case_of(q_BTNH, k_pages_PSKH, page_table_BM)
    if impl not in ("reference", "xla"):
        target = default_target() if target is None else target
        impl, _ = choose(impl, target, case)
    statics = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if impl == "pallas" and target.platform == "gpu" and case.num_tokens == 1 and tiles.few_queries(case):
        operands = (q_BTNH, k_pages_PSKH, v_pages_PSKH, page_table_BM, lengths_B, starts_B)
        statics["tiles"] = tiles.choose_tiles(case)
        with jax.named_scope("paged_attention"):
            if case.kv_dtype is not None:
                from kernels.paged_attention import gpu_quantized

                return gpu_quantized.paged_attention(*operands, **scales, **statics, new=(k_BTKH, v_BTKH))
            from kernels.paged_attention import gpu

            new = (k_BTKH.astype(k_pages_PSKH.dtype), v_BTKH.astype(v_pages_PSKH.dtype))
            return gpu.paged_attention(*operands, **statics, new=new)
    new = (k_BTKH, v_BTKH, page_table_BM, starts_B, counts_B)
    pages = _write(k_pages_PSKH, v_pages_PSKH, *new, **scales, apart=impl == "pallas" and target.platform == "tpu")
    scales |= dict(zip(scales, pages[2:], strict=False))
    operands = (q_BTNH, *pages[:2], page_table_BM, lengths_B, starts_B)
    return _attend(operands, statics, scales, impl, target), *pages


def case_of(q_BTNH: jax.Array, k_pages_PSKH: jax.Array, page_table_BM: jax.Array) -> PagedAttentionCase:
    """The case of a call with these arrays (or their shapes and dtypes)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_pages_PSKH.shape[1:3]
    kv_dtype = jnp.dtype(k_pages_PSKH.dtype).name
    kv_dtype = kv_dtype if kv_dtype in LARGEST else None
    return PagedAttentionCase(
        jnp.dtype(q_BTNH.dtype).name, B, T, N, K, H, S, page_table_BM.shape[1] * S, kv_dtype=kv_dtype
    )


def _check(q, k_pages, v_pages, page_table, lengths, k_scale, v_scale) -> None:
    given = f"q {q.dtype}{list(q.shape)}, k_pages {k_pages.dtype}{list(k_pages.shape)}, v_pages {list(v_pages.shape)}"
    if q.ndim != 4 or k_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3] or q.shape[3] != k_pages.shape[3]:
        raise ValueError(f"paged_attention of {given}: needs q [B,T,N,H] and pages [P,S,K,H]")
    if q.shape[2] % k_pages.shape[2]:
        raise ValueError(f"paged_attention of {given}: the query heads must be a multiple of the kv heads")
    _check_scales("paged_attention", k_pages, v_pages, k_scale, v_scale)
    if k_scale is None and q.dtype != k_pages.dtype:
        raise ValueError(
            f"paged_attention of {given}: pages need q's dtype, or {' or '.join(LARGEST)} with k_scale and v_scale"
        )
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"paged_attention: page_table {list(page_table.shape)} and lengths {list(lengths.shape)} need [B, M] "
            f"and [B] with B={q.shape[0]}"
        )


def _check_scales(name: str, k_pages, v_pages, k_scale, v_scale) -> None:
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"{name}: k_pages are {k_pages.dtype} and v_pages {v_pages.dtype}; both need one dtype")
    codes = jnp.dtype(k_pages.dtype).name
    P, S, K = k_pages.shape[:3]
    for side, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if codes not in LARGEST and scale is not None:
            raise ValueError(
                f"{name}: {side} is for pages of {' or '.join(LARGEST)}, and these are {codes}; leave it out"
            )
        if codes in LARGEST and scale is None:
            raise ValueError(f"{name}: pages of {codes} need {side}, float32 [P, K, S] = {[P, K, S]}")
        if scale is not None and (scale.shape != (P, K, S) or scale.dtype != jnp.float32):
            raise ValueError(
                f"{name}: {side} is {scale.dtype}{list(scale.shape)} and needs float32 [P, K, S] = {[P, K, S]}"
            )


def write_pages(
    k_pages_PSKH: jax.Array,
    v_pages_PSKH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    page_table_BM: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The pages with the first counts[b] keys and values of each row at positions starts[b], starts[b] + 1, and so on.

    Pages of int8 or float8_e4m3fn get codes, and their scales float32 [P, K, S] come after them: `quantize_heads`.
    Page 0 is no row's: what is left out, as what lies past the table is, may be written there. Rows must not write to
    one place. In place where the pages are donated, or carried by a loop. Raises ValueError for scales that are
    missing, or not of such pages; in debug mode (`kernels.debug`) for counts, positions and pages that are not there.
    """
    _check_scales("write_pages", k_pages_PSKH, v_pages_PSKH, k_scale, v_scale)
    sizes = (k_BTKH.shape[1], *k_pages_PSKH.shape[:2])
    check_written_pages("write_pages", page_table_BM, starts_B, counts_B, *sizes)
    new = (k_BTKH, v_BTKH, page_table_BM, starts_B, counts_B)
    return _write(k_pages_PSKH, v_pages_PSKH, *new, k_scale, v_scale)


def _write(
    k_pages_PSKH, v_pages_PSKH, k_BTKH, v_BTKH, page_table_BM, starts_B, counts_B, k_scale, v_scale, apart=False
):
    """As `write_pages`, unchecked; `apart`: each head by itself."""
    place = _place_heads if apart else _place_rows
    if k_BTKH.shape[0] * k_BTKH.shape[1] == 1:
        place = _place_one
    with jax.named_scope("write_pages"):
        pages, scales = [], []
        sides = ((k_pages_PSKH, k_BTKH, k_scale), (v_pages_PSKH, v_BTKH, v_scale))
        for pages_PSKH, new_BTKH, scale_PKS in sides:
            write, write_scale = place(pages_PSKH.shape, new_BTKH.shape[:2], page_table_BM, starts_B, counts_B)
            if scale_PKS is not None:
                new_BTKH, new_scale_BTK = quantize_heads(new_BTKH, pages_PSKH.dtype)
                scales.append(write_scale(scale_PKS, new_scale_BTK))
            pages.append(write(pages_PSKH, new_BTKH.astype(pages_PSKH.dtype)))
    return *pages, *scales


def _places(shape, tokens: tuple[int, int], page_table_BM, starts_B, counts_B) -> tuple[jax.Array, ...]:
    """(page, offset in it, whether it is written), each [B, T]."""
    (S, M), (B, T) = (shape[1], page_table_BM.shape[1]), tokens
    offset_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    position_BT = starts_B[:, None] + offset_BT
    page_BT = jnp.take_along_axis(page_table_BM, jnp.minimum(position_BT // S, M - 1), axis=1)
    return page_BT, position_BT % S, (offset_BT < counts_B[:, None]) & (position_BT < M * S)


def _place_one(shape, tokens, page_table_BM, starts_B, counts_B):
    """One token needs no scatter, which would read and select what it may not overwrite (two launches more). One that
    takes no part is written too, to the first place: no row reads that page."""
    page_BT, offset_BT, written_BT = _places(shape, tokens, page_table_BM, starts_B, counts_B)
    page, offset = (jnp.where(written_BT, x, 0)[0, 0] for x in (page_BT, offset_BT))

    def write(pages: jax.Array, new_11KH: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(pages, new_11KH, (page, offset, 0, 0))

    def write_scale(scales: jax.Array, new_11K: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(scales, new_11K[0, :, :, None], (page, 0, offset))

    return write, write_scale


def _place_rows(shape, tokens, page_table_BM, starts_B, counts_B):
    (P, S, K, _), (B, T) = shape, tokens
    page_BT, offset_BT, written_BT = _places(shape, tokens, page_table_BM, starts_B, counts_B)
    # Tokens that are not written get a place of their own past the end: a promise of distinct places must hold.
    nowhere_BT = P * S + jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
    slot_M = jnp.where(written_BT, page_BT * S + offset_BT, nowhere_BT).reshape(-1)

    def write(pages: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        rows = pages.reshape(P * S, K, -1)
        values = new_BTKH.reshape(B * T, K, -1)
        return rows.at[slot_M].set(values, mode="drop", unique_indices=True).reshape(pages.shape)

    def write_scale(scales: jax.Array, new_BTK: jax.Array) -> jax.Array:
        places = scales.at[slot_M // S, :, slot_M % S]
        return places.set(new_BTK.reshape(B * T, K), mode="drop", unique_indices=True)

    return write, write_scale


def _place_heads(shape, tokens, page_table_BM, starts_B, counts_B):
    """Whatever order arrays have in memory. For all heads of a token at once, XLA lays arrays of scales, and some of
    pages, out anew on TPU before and after, all of them."""
    (P, _, K, _), (B, T) = shape, tokens
    page_BT, offset_BT, written_BT = _places(shape, tokens, page_table_BM, starts_B, counts_B)
    nowhere_BT = P + jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
    page_L1 = jnp.where(written_BT, page_BT, nowhere_BT).reshape(-1, 1)
    offset_L1, head_1K = offset_BT.reshape(-1, 1), jnp.arange(K, dtype=jnp.int32)[None]

    def write(pages: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        places = pages.at[page_L1, offset_L1, head_1K]
        return places.set(new_BTKH.reshape(B * T, K, -1), mode="drop", unique_indices=True)

    def write_scale(scales: jax.Array, new_BTK: jax.Array) -> jax.Array:
        places = scales.at[page_L1, head_1K, offset_L1]
        return places.set(new_BTK.reshape(B * T, K), mode="drop", unique_indices=True)

    return write, write_scale
