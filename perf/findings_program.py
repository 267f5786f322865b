"""Findings about what a compiled program computes and copies: caches, norms in products, misaligned products.

Priced as those about communication are.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from perf.findings import Check, Evidence, Finding
from perf.hlo import Computation, Instruction
from perf.op_kind import fused
from perf.program_view import (
    LARGE,
    NO_TIMES,
    SLOW_PRODUCT,
    Place,
    View,
    arrays_of,
    cost_of,
    is_small,
    largest,
    option_trial,
    rate_of,
    shape,
    total_cost,
)

# Of a program's bytes of parameters, what a decode step may copy before it counts.
COPIED_SHARE = 0.1
# A product with fewer of the program's FLOPs is not worth a look.
LARGE_PRODUCT = 0.01
NO_KERNELS = "the trace does not say which kernels these products are: a GPU starts them together, as command buffers"
NO_REDUCE_FUSION = "xla_tpu_rwb_fusion=false"


def stacked_cache_copy(evidence: Evidence) -> Finding | None:
    """A decode step that copies its keys and values: from a stack over layers into a layer's own array, and back."""
    if evidence.program is None or not evidence.decode:
        return None
    view = View(evidence.program)
    parameters = [one for one in view.module.entry_computation.instructions if one.opcode == "parameter"]
    stacks = _stacks(parameters)
    size = sum(one.num_bytes for one in parameters)
    copies = [
        place
        for place in view.places
        if _copies(view, place.instruction) and arrays_of(place, stacks) and place.instruction.num_bytes >= LARGE
    ]
    moved = sum(2 * place.instruction.num_bytes * (place.times or 1) for place in copies)
    if moved < COPIED_SHARE * size:
        return None
    cost = total_cost(evidence, view, copies)
    milliseconds = None if cost is None else cost.nanoseconds / 1e6
    if is_small(evidence, milliseconds):
        return None
    return Finding(
        "stacked-cache copy in decode",
        "memory",
        f"A decoded token copies {moved / 2**30:.2f} GiB of arrays that are stacked over layers, beside "
        f"{size / 2**30:.2f} GiB of weights and cache that it needs to read.",
        largest(copies),
        milliseconds,
        "layers.scan=False for decoding: an array for each layer's keys and values, donated, so that a token is "
        "written in place (serve.py does so for every config)",
        reason=None if milliseconds is not None else NO_TIMES,
        is_prediction=evidence.predicted,
    )


def _stacks(parameters: Sequence[Instruction]) -> dict[tuple[int, ...], str]:
    """Dimensions of stacked arrays and of one layer of them, without axes of 1: what a copy of either looks like."""
    found: dict[tuple[int, ...], str] = {}
    for one in parameters:
        for array in one.results:
            # Layers, rows or pages, tokens or heads, head size: weights have fewer axes but for experts.
            if len(array.dims) >= 4 and array.num_bytes >= LARGE:
                for dims in (array.dims, array.dims[1:]):
                    found[tuple(size for size in dims if size > 1)] = shape(array)
    return found


def _copies(view: View, one: Instruction) -> bool:
    """Whether it moves its result's bytes without computing: a copy, a slice of a stack, or a write that is not in
    place (a fusion whose result is an update of its operand is)."""
    if one.opcode in ("copy", "copy-start", "dynamic-slice"):
        return True
    if one.opcode != "fusion":
        return False
    inside = {inner.opcode for _, inner in fused(view.module, one)}
    return bool(inside & {"dynamic-slice", "copy", "slice"}) and not inside & {
        "dot",
        "convolution",
        "reduce",
        "dynamic-update-slice",
    }


def norm_in_matmul(evidence: Evidence) -> Finding | None:
    """Products that a norm's reduction was fused into, and that are slow for it."""
    if evidence.program is None or evidence.costs is None:
        return None
    view = View(evidence.program)
    products = {id(place.instruction): place for place, _, _ in view.products()}
    total = sum(view.flops(place) for place in products.values())
    with_norm = [
        place
        for place in products.values()
        if _has_norm(view, place.instruction) and view.flops(place) >= LARGE_PRODUCT * total
    ]
    plain = [place for place in products.values() if not _has_reduction(view, place.instruction)]
    best = rate_of(evidence, view, plain)
    slow = [place for place in with_norm if best and (rate_of(evidence, view, [place]) or best) < SLOW_PRODUCT * best]
    if not slow or best is None:
        return None
    lost = sum(
        cost.nanoseconds - view.flops(place) / best * 1e9
        for place in slow
        if (cost := cost_of(evidence, view, place)) is not None
    )
    if is_small(evidence, lost / 1e6):
        return None
    rate = rate_of(evidence, view, slow)
    assert rate is not None
    trial = option_trial(NO_REDUCE_FUSION) if evidence.platform == "tpu" else None
    return Finding(
        "unfused norm in matmul",
        "compute",
        f"{len(slow)} products carry a norm's reduction and reach {rate / best:.0%} of the FLOP/s of the others: the "
        "reduction holds the matrix unit up, and is better left on its own.",
        largest(slow),
        lost / 1e6,
        f"xla_options={NO_REDUCE_FUSION}"
        if trial
        else "layers.remat=none, so that the norm's inputs are kept" + evidence.now("layers.remat"),
        is_prediction=evidence.predicted,
        trial=trial,
    )


def _has_norm(view: View, one: Instruction) -> bool:
    return any(inner.opcode == "reduce" and "norm" in inner.scope for _, inner in fused(view.module, one))


def _has_reduction(view: View, one: Instruction) -> bool:
    return any(inner.opcode == "reduce" for _, inner in fused(view.module, one))


# Elements that a matrix unit takes at a time. NVIDIA: rows of 16 bytes, else slower kernels (cuBLAS documentation,
# tensor core usage). TPU: lanes of 128, and what is missing is padding.
TILE_BYTES = {"gpu": 16}
LANES = 128


def misalignment(evidence: Evidence) -> Finding | None:
    """Products with an axis that the matrix unit's tile doesn't divide."""
    if evidence.program is None or evidence.platform not in ("gpu", "tpu"):
        return None
    view = View(evidence.program)
    products = list(view.products())
    total = sum(view.flops(place) for place in {id(p.instruction): p for p, _, _ in products}.values())
    bad: dict[int, tuple[Place, set[int]]] = {}
    for place, product, scope in products:
        if view.flops(place) < LARGE_PRODUCT * total:
            continue
        axes = {size for size in _matrix_axes(scope, product) if size > 1 and size % _tile(evidence, product)}
        if axes:
            bad.setdefault(id(place.instruction), (place, set()))[1].update(axes)
    if not bad:
        return None
    places = [place for place, _ in bad.values()]
    sizes = sorted({size for _, axes in bad.values() for size in axes})
    lost = _misaligned_loss(evidence, view, places, [place for place, _, _ in products], sizes)
    if is_small(evidence, lost):
        return None
    tile = LANES if evidence.platform == "tpu" else TILE_BYTES["gpu"] // 2
    return Finding(
        "tensor-core misalignment",
        "compute",
        f"{len(places)} products have axes of {', '.join(map(str, sizes[:4]))}, which {tile} does not divide: the "
        "matrix unit pads them, or a slower kernel runs.",
        largest(places),
        lost,
        _aligned_settings(evidence, sizes, tile),
        reason=None if lost is not None else NO_TIMES if evidence.costs is None else NO_KERNELS,
        is_prediction=evidence.predicted,
    )


def _tile(evidence: Evidence, product: Instruction) -> int:
    if evidence.platform == "tpu":
        return LANES
    width = max(product.results[0].num_bytes // max(product.results[0].size, 1), 1)
    return max(TILE_BYTES["gpu"] // width, 1)


def _matrix_axes(scope: Computation, product: Instruction) -> set[int]:
    """Sizes of the axes that are summed over, and of the last axis of the result: those that lie in tiles."""
    left = scope.operands(product)[0].results[0].dims
    if product.opcode == "dot":
        summed = {left[int(axis)] for axis in (product.attribute("lhs_contracting_dims") or "").split(",") if axis}
    else:
        # A convolution's features: what is summed over is the input's, the result's are the kernel's.
        labels = (product.attribute("dim_labels") or "").partition("_")[0]
        summed = {left[labels.index("f")]} if "f" in labels else set()
    return summed | set(product.results[0].dims[-1:])


def _misaligned_loss(
    evidence: Evidence, view: View, bad: list[Place], every: list[Place], sizes: Sequence[int]
) -> float | None:
    """Milliseconds of what the products take beyond the rate of the aligned ones, or, where all are misaligned, the
    share of a tile that is padding."""
    cost = total_cost(evidence, view, bad)
    if cost is None or not cost.nanoseconds:
        return None
    names = {place.instruction.name for place in bad}
    rate = rate_of(evidence, view, [place for place in every if place.instruction.name not in names])
    work = sum(view.flops(place) for place in bad)
    if rate:
        return max(cost.nanoseconds - work / rate * 1e9, 0.0) / 1e6
    tile = LANES if evidence.platform == "tpu" else TILE_BYTES["gpu"] // 2
    padding = statistics.fmean(1 - size / (-(-size // tile) * tile) for size in sizes)
    return cost.nanoseconds * padding / 1e6


def _aligned_settings(evidence: Evidence, sizes: Sequence[int], tile: int) -> str:
    """The model's settings that have these sizes, or a multiple that the mesh divides."""
    names = ("vocab_size", "embed_dim", "mlp_dim", "head_dim")
    found = []
    for name in names:
        value = evidence.setting(f"model.{name}")
        size = next((size for size in sizes if isinstance(value, int) and value % size == 0 and value % tile), None)
        if size is not None:
            found.append(f"model.{name}={-(-value // tile) * tile} (now {value})")
    return "; ".join(found) or f"model.vocab_size, model.embed_dim, model.mlp_dim, model.head_dim: multiples of {tile}"


PROGRAM_CHECKS: tuple[Check, ...] = (stacked_cache_copy, norm_in_matmul, misalignment)
