"""Work of kernels in HLO for TPU, whose text says neither what they compute nor how long they take."""

from __future__ import annotations

import math
import re

from perf.hlo import Computation, Instruction

PALLAS_SHARE = 0.6
"""Of the peak that a Pallas kernel's products are taken to reach: an assumption, its text has no estimate."""


def is_attention(scope: str) -> bool:
    """Scores and their product with values, kernel or not: not the projections, which share the layer's scope."""
    parts = [part.strip("()") for part in re.split(r"[/(]", scope)]
    return parts.count("attention") > 1 or "paged_attention" in parts


def pallas_flops(scope: Computation, one: Instruction) -> float | None:
    """Of a kernel: its own estimate where its author gave one, else those of attention or of a ragged product from the
    shapes of its operands; None for another kernel.

    Attention is causal: scores, their product with values and, backward, the products of both gradients: 2 forward, 3
    for the queries' gradient, 4 for the keys' and values'.
    """
    if match := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes):
        return float(match[1])
    given = [array for operand in scope.operands(one) for array in operand.results]
    if is_ragged(one):
        # (rows, D) by (experts, D, F): each row meets one expert's kernel.
        rows = next(array for array in given if len(array.dims) == 2)
        return 2 * rows.size * one.results[0].dims[-1]
    big = [array for array in given if len(array.dims) >= 3]
    if not is_attention(one.scope) or len(big) < 3:
        return None
    query = big[0]
    # The last one is keys or values, (..., S, H) or (..., H, S).
    key = [array for array in big if array.dtype == query.dtype][-1]
    products = 2 if len(big) == 3 else 3 if len(one.results) == 1 else 4
    length = math.prod(key.dims[-2:]) / query.dims[-1]
    return products * 2 * query.size * length / 2


def is_ragged(one: Instruction) -> bool:
    """TPU's compiler writes a ragged product as a kernel of its own, which may have lost its scope."""
    return one.attribute("ragged_dot_tiling") is not None
