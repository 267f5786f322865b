"""Checks of what arrays hold, in debug mode. Shapes and dtypes are checked in any mode, where they are taken.

Debug mode is JAX's own, `jax_enable_checks`: JAX_ENABLE_CHECKS=1 in the environment of a program, or
`jax.config.update("jax_enable_checks", True)` before anything is traced, because what was traced without it stays
without checks. Arrays at hand are checked at once. Those of a compiled program are checked by the host at each call,
and the call's results are then a `jax.errors.JaxRuntimeError` whose text ends in the ValueError and its text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np


def check_group_sizes(op: str, group_sizes_E: jax.Array, num_rows: int) -> None:
    """ValueError for a size below zero, and for sizes whose sum is above `num_rows`."""
    _check(functools.partial(_check_group_sizes, op, num_rows), group_sizes_E)


def check_pages(op: str, page_table_BM: jax.Array, lengths_B: jax.Array, num_pages: int, page_size: int) -> None:
    """Of rows that are read: ValueError for a length outside [0, M · S], and for the entry of a page, of those that a
    row has positions in, outside [0, P)."""
    _check(functools.partial(_check_pages, op, num_pages, page_size), page_table_BM, lengths_B)


def check_written_pages(
    op: str,
    page_table_BM: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    *,
    read: bool = False,
) -> None:
    """Of rows that are written at [start, start + count): ValueError for a count outside [0, T], for a position outside
    [0, M · S), and for the entry of such a position's page outside [0, P); with `read`, of all pages up to it. A row
    with a count of zero takes no part, whatever its start is: it may be there to fill a batch."""
    check = functools.partial(_check_written_pages, op, num_tokens, num_pages, page_size, read)
    _check(check, page_table_BM, starts_B, counts_B)


def _check(check: Callable[..., None], *arrays: jax.Array) -> None:
    if not jax.config.jax_enable_checks:
        return
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        # Nothing is returned that a result would depend on, so it is kept where gradients, scans and rematerialisation
        # cut a program. An exception in it makes the call fail.
        jax.debug.callback(check, *arrays)
    else:
        check(*arrays)


def _check_group_sizes(op: str, num_rows: int, group_sizes) -> None:
    sizes = np.asarray(group_sizes, np.int64)
    if (negative := np.flatnonzero(sizes < 0)).size:
        group = negative[0]
        raise ValueError(f"{op}: group_sizes[{group}] is {sizes[group]}; sizes can't be negative")
    if sizes.sum() > num_rows:
        raise ValueError(f"{op}: the sum of group_sizes is {sizes.sum()}; at most the {num_rows} rows of x")


def _check_pages(op: str, num_pages: int, page_size: int, page_table, lengths) -> None:
    table, lengths = np.asarray(page_table), np.asarray(lengths, np.int64)
    room = table.shape[1] * page_size
    if (outside := np.flatnonzero((lengths < 0) | (lengths > room))).size:
        row = outside[0]
        raise ValueError(
            f"{op}: lengths[{row}] is {lengths[row]}; it must be in [0, {room}], as page_table holds {table.shape[1]} "
            f"pages of {page_size} for each row"
        )
    _check_entries(op, num_pages, page_size, table, np.zeros_like(lengths), lengths)


def _check_written_pages(
    op: str, num_tokens: int, num_pages: int, page_size: int, read: bool, page_table, starts, counts
) -> None:
    table, starts, counts = np.asarray(page_table), np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    if (outside := np.flatnonzero((counts < 0) | (counts > num_tokens))).size:
        row = outside[0]
        raise ValueError(f"{op}: counts[{row}] is {counts[row]}; it must be in [0, {num_tokens}], the new tokens")
    room = table.shape[1] * page_size
    if (outside := np.flatnonzero((counts > 0) & ((starts < 0) | (starts + counts > room)))).size:
        row = outside[0]
        raise ValueError(
            f"{op}: row {row} is to have positions [{starts[row]}, {starts[row] + counts[row]}); they must be in "
            f"[0, {room}), as page_table holds {table.shape[1]} pages of {page_size} for each row"
        )
    first = np.where(counts > 0, 0, starts) if read else starts
    _check_entries(op, num_pages, page_size, table, first, starts + counts)


def _check_entries(op: str, num_pages: int, page_size: int, table, starts, stops) -> None:
    """Of the pages that positions [start, stop) of each row lie in."""
    first = np.arange(table.shape[1]) * page_size
    used = (first < stops[:, None]) & (first + page_size > starts[:, None]) & (starts < stops)[:, None]
    outside = np.argwhere(used & ((table < 0) | (table >= num_pages)))
    if len(outside):
        row, page = outside[0]
        raise ValueError(
            f"{op}: page_table[{row}, {page}] is {table[row, page]}; it must be in [0, {num_pages}), as row {row} has "
            f"positions [{starts[row]}, {stops[row]}) in pages of {page_size}"
        )
