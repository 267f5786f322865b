"""Findings from a run's own metrics and its trace: input, host, launches, recompilation, devices, experts."""

from __future__ import annotations

import statistics

from perf.breakdown import Breakdown
from perf.findings import Check, Evidence, Finding
from perf.intervals import intersect, total, union
from perf.report import duration

# Hardware FLOPs over model FLOPs: full recomputation of a layer makes 1.33. Attention that multiplies q·k a second time
# in its backward pass, or whole blocks of a causal mask, stays below this at the lengths that the configs train.
HFU_OVER_MFU = 1.15
# Busiest expert over the mean. A balanced router is below 2 (README.md, moe-1b); each device waits for the busiest.
EXPERT_LOAD = 2.0
DROPPED = 0.02
# Compute time of the slowest device over the median one's.
DEVICE_SPREAD = 1.05


def _share(nanoseconds: float, step: float) -> str:
    return f"{nanoseconds / 1e6:.2f} ms of a step of {step / 1e6:.2f} ms ({nanoseconds / step:.0%})"


def input_bound(evidence: Evidence) -> Finding | None:
    """The device has nothing to do while the host takes a batch. By the run's own clock, and by the trace."""
    candidates: list[tuple[float, float, str]] = []
    times, run = evidence.breakdown, evidence.run
    if times is not None and times.has_marks:
        waited = times.typical("input")
        candidates.append(
            (waited, times.step, f"trace: devices idle while the host takes a batch, {duration_ns(waited)}")
        )
    if run is not None and run.input_seconds is not None and run.step_seconds:
        waited = run.input_seconds * 1e9
        candidates.append(
            (waited, run.step_seconds * 1e9, f"goodput.jsonl: input_wait of {duration_ns(waited)} a step")
        )
    bad = [one for one in candidates if one[0] > evidence.worth * one[1]]
    if not bad:
        return None
    waited, step, _ = max(bad)
    return Finding(
        "input-bound",
        "input",
        f"The devices wait for the next batch: {_share(waited, step)}.",
        tuple(text for _, _, text in candidates),
        waited / 1e6,
        f"data.prefetch: more batches ahead{evidence.now('data.prefetch')}, if the loader is uneven; if it is slow, "
        "files on a faster disk (data.paths) or data.packing=concatenate",
    )


def duration_ns(nanoseconds: float) -> str:
    return duration(nanoseconds / 1e9)


def recompilation(evidence: Evidence) -> Finding | None:
    """Programs that were traced or compiled while steps ran."""
    timeline, times = evidence.timeline, evidence.breakdown
    if timeline is None or times is None or not timeline.compiles:
        return None
    inside = union(span for _, span in timeline.steps) or union(device.window for device in times.devices)
    spans = union(span for _, span in timeline.compiles)
    lost = total(intersect(spans, inside))
    if not lost:
        return None
    steps = max(len(timeline.steps), times.steps)
    compiles = [span for name, span in timeline.compiles if intersect([span], inside) and "compile" in name]
    return Finding(
        "recompilation",
        "host",
        f"{len(compiles) or len(spans)} programs were compiled while {steps} steps ran: "
        f"{duration_ns(lost / steps)} a step.",
        (
            f"compilations under way for {duration_ns(lost)} of {duration_ns(total(inside))} of steps",
            f"programs named {times.program} that ran: {_variants(evidence)}",
        ),
        lost / steps / 1e6,
        "the shapes and static arguments of the jitted step must be the same at every call: pad batches to one length "
        "(data.sequence_length, data.batch_size), or to few (engine.batch_sizes, engine.widths when serving)",
    )


def _variants(evidence: Evidence) -> int:
    assert evidence.timeline is not None and evidence.breakdown is not None
    programs = {
        event.program
        for device in evidence.timeline.devices
        for _, _, event in device.pieces
        if event.module == evidence.breakdown.program
    }
    return len(programs)


def host_bound(evidence: Evidence) -> Finding | None:
    """Devices idle between programs, with the host at something other than taking a batch."""
    times = evidence.breakdown
    if times is None or not times.whole:
        return None
    compiling = 0.0
    if evidence.timeline is not None and evidence.timeline.compiles:
        # That time is the recompilation's.
        compiling = total(union(span for _, span in evidence.timeline.compiles)) / times.steps
    waited = max(times.typical("host") - compiling, 0.0)
    if waited <= evidence.worth * times.step:
        return None
    evidences = [f"trace: devices idle between programs, host not at its input, {duration_ns(waited)} a step"]
    if not times.has_marks:
        evidences.append("the trace does not mark when the host takes a batch: some of it may be input")
    return Finding(
        "host-bound",
        "host",
        f"The devices wait for the host between steps: {_share(waited, times.step)}.",
        tuple(evidences),
        waited / 1e6,
        "keep the host from waiting for a step before it dispatches the next (read metrics a step late), and from slow "
        "work between steps: evaluation.every, checkpoint.every, tensorboard; when serving, engine.rounds_ahead",
    )


def launch_bound(evidence: Evidence) -> Finding | None:
    """Gaps within a program: kernels so short that starting them takes longer, or a program that the host feeds."""
    times = evidence.breakdown
    # A CPU starts no kernels: gaps are its cores' at other devices' or threads' work.
    if times is None or times.platform == "cpu":
        return None
    idle = times.typical("launch")
    if idle <= evidence.worth * times.step:
        return None
    count = sum(times.devices[0].lengths) / times.steps
    short = sum(times.devices[0].lengths[:2]) / times.steps
    return Finding(
        "launch-bound",
        "host",
        f"The devices idle between the kernels of one program: {_share(idle, times.step)}.",
        (
            f"{count:,.0f} kernels a step, {short:,.0f} of them of 5 µs or less",
            f"a gap of {duration_ns(idle / max(count, 1))} for each kernel on average",
        ),
        idle / 1e6,
        "more work for each kernel: larger data.batch_size or smaller accumulation"
        f"{evidence.now('accumulation')}; layers.scan=False{evidence.now('layers.scan')}: no copies of a loop; "
        "on a GPU xla_options=xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUDNN,CUSTOM_CALL",
    )


def device_imbalance(evidence: Evidence) -> Finding | None:
    """One device computes longer than the others, which wait for it in collectives."""
    times = evidence.breakdown
    # Devices of a CPU share its cores: whose turn it is, is no property of the device.
    if times is None or times.platform == "cpu" or times.spread is None or times.spread < DEVICE_SPREAD:
        return None
    each = {device.ordinal: device.compute / device.steps for device in times.devices}
    slowest, middle = max(each, key=lambda ordinal: each[ordinal]), statistics.median(each.values())
    lost = each[slowest] - middle
    if lost <= evidence.worth * times.step:
        return None
    return Finding(
        "device imbalance",
        "communication",
        f"Device {slowest} computes {times.spread:.2f} times as long as the median device; the others wait for it.",
        (
            f"compute a step: device {slowest} {duration_ns(each[slowest])}, median {duration_ns(middle)}",
            f"waiting in collectives, mean: {duration_ns(times.collective_wait or 0)}",
        ),
        lost / 1e6,
        "find out whether the device or its work is slow: `python -m perf stragglers RUN`",
    )


def expert_imbalance(evidence: Evidence) -> Finding | None:
    run = evidence.run
    if run is None or run.expert_load_max is None or run.expert_load_max < EXPERT_LOAD:
        return None
    # Whether the step waits for it depends on how experts are placed: what is lost is bounded by the experts' time.
    experts = _expert_time(evidence.breakdown)
    lost = None if experts is None else experts * (1 - 1 / run.expert_load_max) / 1e6
    dropped = [] if not run.dropped else [f"{run.dropped:.1%} of routed tokens dropped"]
    return Finding(
        "expert imbalance",
        "compute",
        f"The busiest expert has {run.expert_load_max:.1f} times the mean load; its device sets the pace of all.",
        (f"metrics.jsonl: expert_load_max {run.expert_load_max:.2f} (median of {run.measured} steps)", *dropped),
        lost,
        f"model.moe.load_balance_coef: larger{evidence.now('model.moe.load_balance_coef')}, or "
        f"model.moe.bias_update_rate above 0{evidence.now('model.moe.bias_update_rate')}",
        reason=None if lost is not None else "the time of the experts' products is not known without a trace",
    )


def _expert_time(times: Breakdown | None) -> float | None:
    """Nanoseconds a step in ops of the experts; None without a trace that names them."""
    if times is None:
        return None
    spent = sum(op.exposed for op in times.devices[0].ops if "/moe" in op.scope or "grouped_matmul" in op.scope)
    return spent or None


def dropped_tokens(evidence: Evidence) -> Finding | None:
    run = evidence.run
    if run is None or run.dropped is None or run.dropped < DROPPED:
        return None
    return Finding(
        "dropped tokens",
        "compute",
        f"The experts drop {run.dropped:.1%} of the tokens that are routed to them: their compute is spent on padding.",
        (f"metrics.jsonl: dropped {run.dropped:.3f} (median of {run.measured} steps)",),
        None,
        f"model.moe.dispatch=dropless{evidence.now('model.moe.dispatch')}, or a larger model.moe.capacity_factor"
        f"{evidence.now('model.moe.capacity_factor')}",
        reason="dropping costs quality, not time",
    )


def hfu_gap(evidence: Evidence) -> Finding | None:
    """FLOPs that the hardware does and the model doesn't need."""
    run = evidence.run
    if run is None or not run.mfu or not run.hfu or run.hfu / run.mfu < HFU_OVER_MFU or not run.step_seconds:
        return None
    lost = run.step_seconds * (1 - run.mfu / run.hfu)
    remat = evidence.setting("layers.remat")
    setting = f"layers.remat: dots or none if memory allows{evidence.now('layers.remat')}"
    if remat == "none":
        setting = (
            f"kernels.attention{evidence.now('kernels.attention')}: one that leaves out what a causal mask or a window "
            "hides (auto, cudnn); nothing is recomputed already"
        )
    return Finding(
        "HFU–MFU gap",
        "compute",
        f"The hardware does {run.hfu / run.mfu:.2f} times the FLOPs that the model needs: recomputation, or attention "
        "to what is masked.",
        (f"mfu {run.mfu:.1%}, hfu {run.hfu:.1%} over {run.measured} steps of {duration(run.step_seconds)}",),
        lost * 1e3,
        setting,
    )


RUN_CHECKS: tuple[Check, ...] = (
    input_bound,
    recompilation,
    host_bound,
    launch_bound,
    device_imbalance,
    expert_imbalance,
    dropped_tokens,
    hfu_gap,
)
