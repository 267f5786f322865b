"""Arithmetic of time intervals: unions, intersections, self time of nested ones, and who has each moment.

A span is (start, end) in integer nanoseconds, end not included; lists of spans that functions return are sorted and
disjoint. Integers, so that parts sum to their whole exactly.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TypeVar

Span = tuple[int, int]
T = TypeVar("T")
Piece = tuple[int, int, T]
"""A stretch of time with what it belongs to."""


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans that cover the same moments, none overlapping or touching another."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(spans: Iterable[Span]) -> int:
    """Nanoseconds of disjoint spans."""
    return sum(end - start for start, end in spans)


def intersect(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """Moments in both; each argument is a union."""
    both: list[Span] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            both.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both


def subtract(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """Moments of the first that are not in the second; each argument is a union."""
    left: list[Span] = []
    j = 0
    for start, end in first:
        while j < len(second) and second[j][1] <= start:
            j += 1
        at, k = start, j
        while k < len(second) and second[k][0] < end:
            if at < second[k][0]:
                left.append((at, second[k][0]))
            at = max(at, second[k][1])
            k += 1
        if at < end:
            left.append((at, end))
    return left


def clip(pieces: Iterable[Piece[T]], window: Span) -> list[Piece[T]]:
    """The parts of pieces that lie in the window."""
    clipped = ((max(start, window[0]), min(end, window[1]), item) for start, end, item in pieces)
    return [piece for piece in clipped if piece[0] < piece[1]]


def innermost(pieces: Iterable[Piece[T]]) -> list[Piece[T]]:
    """Self time of the pieces of one thread, which nest: each moment goes to the piece that began last.

    A loop's event wraps its body's; only what its body leaves is its own.
    """
    result: list[Piece[T]] = []
    stack: list[tuple[int, T]] = []
    at = 0

    def advance(to: int) -> None:
        nonlocal at
        while stack and at < to:
            end, item = stack[-1]
            if min(end, to) > at:
                result.append((at, min(end, to), item))
                at = min(end, to)
            if end <= to:
                stack.pop()
        at = max(at, to)

    for start, end, item in sorted(pieces, key=lambda piece: (piece[0], -piece[1])):
        advance(start)
        stack.append((end, item))
    if stack:
        advance(max(end for end, _ in stack))
    return result


def foremost(pieces: Iterable[tuple[int, int, int, T]]) -> list[Piece[T]]:
    """Pieces (start, end, rank, item) of several threads of one device, as disjoint pieces: each moment goes to the one
    of least rank that is under way."""
    ordered = sorted(pieces, key=lambda piece: piece[0])
    result: list[Piece[T]] = []
    # (rank, number, end, item): the number keeps items from being compared.
    active: list[tuple[int, int, int, T]] = []
    at = 0
    for number, (start, end, rank, item) in enumerate(ordered):
        at = _drain(active, at, start, result)
        heapq.heappush(active, (rank, number, end, item))
    _drain(active, at, None, result)
    return result


def _drain(active: list[tuple[int, int, int, T]], at: int, until: int | None, result: list[Piece[T]]) -> int:
    """Hands out the time from `at` to `until` (None: to the last end); returns where it stopped."""
    while active:
        _, _, end, item = active[0]
        if end <= at:
            heapq.heappop(active)
            continue
        stop = end if until is None else min(end, until)
        if stop > at:
            if result and result[-1][1] == at and result[-1][2] is item:
                result[-1] = (result[-1][0], stop, item)
            else:
                result.append((at, stop, item))
            at = stop
        if until is not None and at >= until:
            return at
    return at if until is None else until
