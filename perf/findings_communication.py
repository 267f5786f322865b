"""Findings about communication in a compiled program: collectives of the wrong kind, cut into parts, or in the way.

Each looks for a form in the HLO and prices it by what its ops took in a trace, or by the prediction of a step that was
compiled for a TPU slice. Without either a finding says what it found and not what it costs.
"""

from __future__ import annotations

import math

from perf.findings import Check, Evidence, Finding
from perf.hlo import Instruction
from perf.interconnect import axes_of
from perf.program_view import (
    LARGE,
    NO_TIMES,
    SLOW_PRODUCT,
    Place,
    View,
    describe,
    is_small,
    largest,
    option_trial,
    rate_of,
    total_cost,
)

# Exposed communication that is left to a step: less is what well-tuned sharded runs have (README.md, plan).
EXPOSED_SHARE = 0.1

NO_WINDOWS = {
    "tpu": "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
    "gpu": "xla_gpu_threshold_for_windowed_einsum_mib=1000000",
}
# The compiler makes a reduce-scatter of an all-reduce and a slice only in groups up to this size unless it may change
# the layout; this lets it for all.
RELAYOUT = "xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1"


def _reductions(view: View) -> list[Place]:
    """All-reduces worth a look, without those that a TPU's reduce-scatter is written as."""
    return [
        place
        for place in view.places
        if place.instruction.opcode in ("all-reduce", "all-reduce-start")
        and place.instruction.num_bytes >= LARGE
        and not place.scope.name.startswith("all-reduce-scatter")
    ]


def _sliced(view: View) -> list[Place]:
    return [place for place in _reductions(view) if view.is_sliced_only(place.scope, place.instruction)]


def _gathering(view: View) -> list[Place]:
    """All-reduces of arrays that are a device's own part within zeros: their sum is the parts side by side."""
    return [
        place
        for place in _reductions(view)
        if not view.is_sliced_only(place.scope, place.instruction)
        and view.makers(place.scope, place.instruction) & {"dynamic-update-slice", "pad"}
        and not view.makers(place.scope, place.instruction) & {"dot", "convolution", "reduce", "scatter"}
    ]


def _half(evidence: Evidence, view: View, places: list[Place]) -> tuple[float | None, str | None]:
    """Milliseconds that half of the bytes of these collectives cost, as far as they are exposed."""
    cost = total_cost(evidence, view, places)
    return (None, NO_TIMES) if cost is None else (cost.exposed / 2e6, None)


def _gib(places: list[Place]) -> float:
    return sum(place.instruction.num_bytes * (place.times or 1) for place in places) / 2**30


def _comparable(evidence: Evidence) -> View | None:
    """The program, if collectives in it mean something: XLA's CPU compiler has no reduce-scatter to choose."""
    return None if evidence.program is None or evidence.platform == "cpu" else View(evidence.program)


def all_reduce_for_reduce_scatter(evidence: Evidence) -> Finding | None:
    view = _comparable(evidence)
    places = [] if view is None else _sliced(view)
    if view is None or not places:
        return None
    milliseconds, reason = _half(evidence, view, places)
    if is_small(evidence, milliseconds):
        return None
    trial = option_trial(RELAYOUT) if evidence.platform == "tpu" else None
    return Finding(
        "all-reduce where reduce-scatter would do",
        "communication",
        f"{len(places)} all-reduces give each device {_gib(places):.2f} GiB a step of which it keeps a slice: a "
        "reduce-scatter moves half of it.",
        largest(places),
        milliseconds,
        (f"xla_options={RELAYOUT}; or " if trial else "")
        + f"mesh.fsdp smaller, with mesh.data for the rest{evidence.now('mesh.fsdp')}",
        reason=reason,
        is_prediction=evidence.predicted,
        trial=trial,
    )


def all_gather_as_all_reduce(evidence: Evidence) -> Finding | None:
    view = _comparable(evidence)
    places = [] if view is None else _gathering(view)
    if view is None or not places:
        return None
    milliseconds, reason = _half(evidence, view, places)
    if is_small(evidence, milliseconds):
        return None
    return Finding(
        "all-gather turned all-reduce",
        "communication",
        f"{len(places)} all-reduces ({_gib(places):.2f} GiB a step) add a device's shard to zeros: an all-gather moves "
        "half of it. Shards below the hardware's tile (8 × 128 on TPU) are gathered like this.",
        largest(places),
        milliseconds,
        f"mesh.fsdp smaller, with mesh.data for the rest{evidence.now('mesh.fsdp')}: shards become whole tiles",
        reason=reason,
        is_prediction=evidence.predicted,
    )


def _windows(view: View) -> list[Place]:
    return [place for place in view.places if "windowed_dot_general" in place.scope.name]


def windowed_einsum(evidence: Evidence) -> Finding | None:
    """A product cut into the parts of its all-gather, each reading and writing the whole sum."""
    view = None if evidence.program is None else View(evidence.program)
    places = [] if view is None else _windows(view)
    if view is None or not places:
        return None
    loops = sorted({place.scope.name for place in places})
    products = {id(place.instruction): place for place, _, _ in view.products()}
    windowed = [place for place in products.values() if "windowed_dot_general" in place.scope.name]
    whole = [place for place in products.values() if "windowed_dot_general" not in place.scope.name]
    rate, others = rate_of(evidence, view, windowed), rate_of(evidence, view, whole)
    milliseconds, reason = None, NO_TIMES
    if evidence.costs is not None and rate and others:
        spent = total_cost(evidence, view, windowed)
        assert spent is not None
        milliseconds, reason = max(spent.nanoseconds * (1 - rate / others), 0.0) / 1e6, None
        if rate > SLOW_PRODUCT * others or is_small(evidence, milliseconds):
            return None
    elif evidence.costs is not None:
        reason = "the products outside of the windows have no times to compare with"
    option = NO_WINDOWS.get(evidence.platform or "", NO_WINDOWS["tpu"])
    rates = (
        [] if not (rate and others) else [f"FLOP/s: {rate / 1e12:.0f} T in windows, {others / 1e12:.0f} T in others"]
    )
    return Finding(
        "windowed-einsum loss",
        "communication",
        f"{len(loops)} products are cut into the parts of their all-gather (windowed einsum), and each part reads and "
        "writes the whole sum again.",
        (f"loops: {', '.join(loops[:3])}{', ...' if len(loops) > 3 else ''}", *rates),
        milliseconds,
        f"xla_options={option}",
        reason=reason,
        is_prediction=evidence.predicted,
        trial=option_trial(option),
    )


def serialized_collective(evidence: Evidence) -> Finding | None:
    """Communication that nothing hides and that no other finding explains."""
    times = evidence.breakdown
    if times is not None and not evidence.predicted:
        exposed, step, source = dict(times.transfers), times.step, "trace"
        waited = times.collective_wait
    elif evidence.predicted and evidence.costs is not None and evidence.program is not None and evidence.step_ns:
        names = _collective_names(evidence)
        exposed = {name: cost.exposed for name, cost in evidence.costs.items() if name in names and cost.exposed}
        step, source, waited = evidence.step_ns, "prediction", None
    else:
        return None
    explained = _explained(evidence)
    rest = {name: time for name, time in exposed.items() if name not in explained}
    lost = sum(rest.values())
    if lost <= max(EXPOSED_SHARE, evidence.worth) * step:
        return None
    lines = [_exposed_line(evidence, name, time) for name, time in sorted(rest.items(), key=lambda item: -item[1])[:3]]
    if times is not None and times.overlap is not None and not evidence.predicted:
        lines.append(f"overlap: {times.overlap:.0%} of the collectives' time is hidden behind other work")
    if waited:
        lines.append(f"beside it, {waited / 1e6:.2f} ms a step of waiting for the last device to arrive")
    return Finding(
        "serialized collective",
        "communication",
        f"Nothing runs while collectives do: {lost / 1e6:.2f} ms of a step of {step / 1e6:.2f} ms ({lost / step:.0%}; "
        f"{source}).",
        tuple(lines),
        lost / 1e6,
        f"more work for each byte: larger data.batch_size{evidence.now('data.batch_size')}, or smaller mesh axes that "
        f"communicate in every layer (mesh.tensor{evidence.now('mesh.tensor')}, "
        f"mesh.expert{evidence.now('mesh.expert')}) and mesh.data for the rest"
        + (
            "; xla_options=xla_gpu_enable_latency_hiding_scheduler=true, which starts collectives early"
            if evidence.platform == "gpu"
            else ""
        ),
        is_prediction=evidence.predicted,
    )


def _over(evidence: Evidence, one: Instruction) -> str:
    """The mesh axes that take part, where they are known. Partitions are in the mesh's order."""
    assert evidence.program is not None
    groups = one.groups(evidence.program.num_devices)
    if evidence.mesh is None or groups is None or math.prod(evidence.mesh.values()) != evidence.program.num_devices:
        return ""
    axes = axes_of(max(groups, key=len), evidence.mesh)
    return f", over {' × '.join(axes)}" if axes else ""


def _collective_names(evidence: Evidence) -> set[str]:
    assert evidence.program is not None
    return {one.name for _, one in evidence.program.instructions() if one.is_collective}


def _explained(evidence: Evidence) -> set[str]:
    """Collectives that a finding of their own is about."""
    view = _comparable(evidence)
    if view is None:
        return set()
    found: set[str] = set()
    if all_reduce_for_reduce_scatter(evidence) is not None:
        found |= {place.instruction.name for place in _sliced(view)}
    if all_gather_as_all_reduce(evidence) is not None:
        found |= {place.instruction.name for place in _gathering(view)}
    if windowed_einsum(evidence) is not None:
        found |= {place.instruction.name for place in _windows(view)}
    starts = {one.name: one for _, one in view.module.instructions() if one.opcode.endswith("-done") and one.operands}
    return found | {name for name, one in starts.items() if one.operands[0] in found}


def _exposed_line(evidence: Evidence, name: str, time: float) -> str:
    text = f"{name}: {time / 1e6:.2f} ms a step exposed"
    if evidence.program is not None:
        for scope, one in evidence.program.instructions():
            if one.name == name:
                form = "asynchronous" if one.opcode.endswith(("-start", "-done")) else "synchronous"
                return f"{text}, {form}{_over(evidence, one)}; {describe(Place(scope, one, None))}"
    return text


COMMUNICATION_CHECKS: tuple[Check, ...] = (
    all_reduce_for_reduce_scatter,
    all_gather_as_all_reduce,
    windowed_einsum,
    serialized_collective,
)
