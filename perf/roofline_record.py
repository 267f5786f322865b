"""The figures of `python -m perf roofline`, as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.config import ModelConfig
from perf.capacity import largest_batch, memory_need, request_bytes
from perf.chips import CHIPS
from perf.flops import count_params
from perf.formats import CACHE, WEIGHTS, Format, stored_weight_bytes
from perf.operations import Work, expected_experts, operations
from perf.reached import reached_step
from perf.roofline import (
    Floor,
    Machine,
    StepFloor,
    formula_crossing,
    formula_intensity,
    machine,
    step_crossing,
    step_floor,
)

# Of the tables by batch, beside the batch that was asked for.
BATCHES = (1, 8, 32, 128, 256, 512)
_NOT_DENSE = "I(B) = 2PB / (P·b + B·d·b) is of a dense model; how many experts are read depends on the batch"
# Of the tables of capacity, beside the formats that were asked for.
SERVED = ("bf16", "fp8", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Question:
    """What was asked: a step of a model on a machine. `assumptions` are printed with the answer."""

    name: str
    config: ModelConfig
    work: Work
    on: Machine
    group: int
    scales: bool
    assumptions: tuple[str, ...] = ()


def roofline_record(question: Question) -> dict[str, Any]:
    """Plain values for JSON: what was asked, the step, its ops, memory, attention, other chips, and in serving batches
    of decode, capacity and experts. A section that has no meaning in a mode is not in it; a null has a reason beside.
    """
    step = step_floor(question.config, question.work, question.on)
    return {
        "command": "roofline",
        "is_prediction": True,
        **_given(question),
        "step": _step(question, step),
        "ops": [_op(floor, question.on) for floor in step.floors],
        "memory": _memory(question),
        "attention": _attention(question),
        **({} if question.work.mode == "train" else _serving(question)),
        "chips": _chips(question),
    }


def _given(question: Question) -> dict[str, Any]:
    config, work, on = question.config, question.work, question.on
    parameters = count_params(config)
    return {
        "config": question.name,
        "mode": work.mode,
        "batch": work.batch,
        "length": work.length,
        "weight_format": work.weights.name,
        "cache_format": work.cache.name,
        "scales_counted": question.scales,
        "scale_group": question.group,
        "attention_form": work.attention,
        **({"remat": work.remat} if work.mode == "train" else {}),
        "parameters": parameters.total,
        "active_parameters": parameters.active,
        "chip": on.chip.name,
        "num_devices": on.num_devices,
        "compute_dtype": on.dtype,
        "peak_flops_per_device": on.peak(on.dtype) / on.num_devices,
        "peak_source": on.chip.sources["peaks"],
        "bandwidth_per_device": on.bandwidth / on.num_devices,
        "bandwidth_source": on.chip.sources["memory"],
        "ridge": on.ridge,
        "launch_seconds": on.launch_seconds,
        ("launch_reason" if on.launch_seconds is None else "launch_source"): on.launch_source,
    }


def _step(question: Question, step: StepFloor) -> dict[str, Any]:
    work, on = question.work, question.on
    tokens = work.tokens
    hardware = sum(floor.op.hardware_flops for floor in step.floors)
    moved = sum(floor.op.num_bytes for floor in step.floors)
    return {
        "tokens": tokens,
        "model_flops_per_device": step.model_flops / on.num_devices,
        "hardware_flops_per_device": hardware / on.num_devices,
        "bytes_per_device": moved / on.num_devices,
        "required_bytes_per_device": step.required_bytes / on.num_devices,
        "intensity": hardware / moved,
        "bound_side": step.side,
        "bound_compute_seconds": step.model_compute_seconds,
        "bound_data_seconds": step.required_seconds,
        "bound_seconds": step.bound_seconds,
        "bound_tokens_per_second": tokens / step.bound_seconds,
        "ops_compute_seconds": step.compute_seconds,
        "ops_data_seconds": step.data_seconds,
        "ops_overhead_seconds": step.overhead_seconds if on.launch_seconds is not None else None,
        **({} if on.launch_seconds is not None else {"ops_overhead_reason": on.launch_source}),
        "ops_seconds": step.op_seconds,
        "ops_tokens_per_second": tokens / step.op_seconds,
        **_shares("bound", step.bound_seconds, step),
        **_shares("ops", step.op_seconds, step),
        **_reached(question, step),
        "kernels": sum(floor.op.kernels for floor in step.floors),
    }


def _shares(name: str, seconds: float, step: StepFloor) -> dict[str, float]:
    """The utilisations that a step of these seconds would report."""
    mfu = step.model_flops / seconds / step.on.peak(step.on.dtype)
    return {f"{name}_mfu": mfu, f"{name}_mbu": step.required_bytes / seconds / step.on.bandwidth}


def _reached(question: Question, step: StepFloor) -> dict[str, Any]:
    reached = reached_step(step, question.work)
    if reached.seconds is None:
        return {"reached_seconds": None, "reached_reason": reached.reason}
    return {
        "reached_compute_seconds": reached.compute_seconds,
        "reached_data_seconds": reached.data_seconds,
        "reached_seconds": reached.seconds,
        "reached_tokens_per_second": question.work.tokens / reached.seconds,
        **_shares("reached", reached.seconds, step),
        "reached_source": reached.source,
    }


def _op(floor: Floor, on: Machine) -> dict[str, Any]:
    op = floor.op
    return {
        "op": op.name,
        "layers": op.layers,
        "num_layers": op.count,
        "dtype": op.dtype,
        "kernels": op.kernels,
        "model_flops_per_device": op.model_flops / on.num_devices,
        "hardware_flops_per_device": op.hardware_flops / on.num_devices,
        "bytes_per_device": op.num_bytes / on.num_devices,
        **{f"{kind}_bytes_per_device": value / on.num_devices for kind, value in op.bytes._asdict().items()},
        "intensity": floor.intensity,
        "ridge": floor.ridge,
        "side": floor.side,
        "compute_seconds": floor.compute_seconds,
        "data_seconds": floor.data_seconds,
        "overhead_seconds": floor.overhead_seconds if on.launch_seconds is not None else None,
        **({} if on.launch_seconds is not None else {"overhead_reason": on.launch_source}),
        "seconds": floor.seconds,
        "longest_term": floor.longest,
    }


def _memory(question: Question) -> dict[str, Any]:
    """What the step keeps, against the memory. Training's scratch is as large as what is counted: no "fits" from it."""
    on, need = question.on, memory_need(question.config, question.work)
    limit = on.published_memory if on.usable_memory is None else on.usable_memory
    fits: bool | None = need.total <= limit
    record: dict[str, Any] = {
        **{f"{name}_bytes_per_device": value / on.num_devices for name, value in dataclasses.asdict(need).items()},
        "total_bytes_per_device": need.total / on.num_devices,
        "published_bytes_per_device": on.published_memory / on.num_devices,
        "usable_bytes_per_device": None if on.usable_memory is None else on.usable_memory / on.num_devices,
    }
    if on.usable_memory is None:
        record["usable_reason"] = _no_usable(on)
    if question.work.mode == "train" and fits:
        fits = None
        record["fits_reason"] = (
            "state and kept activations fit; scratch and what else the compiler keeps are known only when compiled"
        )
    return {**record, "fits": fits, "free_bytes_per_device": (limit - need.total) / on.num_devices}


def _no_usable(on: Machine) -> str:
    return f"no source gives what a program can have of {on.chip.name}'s memory"


def _attention(question: Question) -> dict[str, Any]:
    """One layer's forward pass over one sequence: bytes with scores in memory, against a fused kernel."""
    length = max(question.work.length, 1)
    moved = {}
    for form in ("fused", "unfused"):
        work = dataclasses.replace(
            question.work, mode="prefill", batch=1, length=length, attention=form, remat="none", weights=WEIGHTS["bf16"]
        )
        first = operations(question.config, work)
        layers = next(op.layers for op in first if op.name in ("attention", "qk"))
        parts = [op for op in first if op.name in ("attention", "qk", "softmax", "pv") and op.layers == layers]
        moved[form] = sum(op.bytes.activations // op.count for op in parts)
    return {
        "length": length,
        "fused_bytes": moved["fused"],
        "unfused_bytes": moved["unfused"],
        "ratio": moved["unfused"] / moved["fused"],
    }


def _serving(question: Question) -> dict[str, Any]:
    sections = {"decode": _decode(question), "capacity": _capacity(question)}
    return sections if question.config.moe is None else sections | {"experts": _experts(question)}


def _decode(question: Question) -> dict[str, Any]:
    """Batches of decode at this context: where it crosses the ridge, and its bound at a few."""
    config, on = question.config, question.on
    work = dataclasses.replace(question.work, mode="decode")
    products, products_limit = step_crossing(config, work, on, products_only=True)
    whole, limit = step_crossing(config, work, on)
    record: dict[str, Any] = {
        "context": work.length,
        "ridge": on.ridge,
        **_formula(question),
        "products_crossing_batch": products,
        "products_intensity_limit": products_limit,
        "step_crossing_batch": whole,
        "step_intensity_limit": limit,
    }
    for name, batch, most in (("products", products, products_limit), ("step", whole, limit)):
        if batch is None:
            record[f"{name}_crossing_reason"] = (
                f"FLOPs per byte tend to {most:.3g} as the batch grows, below the ridge of {on.ridge:.3g}"
            )
    batches = sorted({*BATCHES, work.batch})
    return {**record, "batches": [_decode_at(question, dataclasses.replace(work, batch=batch)) for batch in batches]}


def _formula(question: Question) -> dict[str, Any]:
    """The dense textbook form: every parameter read once a step, and no cache."""
    config, work, on = question.config, question.work, question.on
    if config.moe is not None:
        return {"formula_crossing_batch": None, "formula_crossing_reason": _NOT_DENSE}
    parameters = count_params(config).total
    stored = stored_weight_bytes(config, work.weights)
    per_weight = stored / parameters
    batch = formula_crossing(parameters, config.embed_dim, per_weight, work.activation_bytes, on.ridge)
    record = {
        "formula_weight_bytes_per_device": stored / on.num_devices,
        "formula_seconds": stored / on.bandwidth,
        "formula_tokens_per_second": on.bandwidth / stored,
        "formula_crossing_batch": batch,
    }
    if batch is None:
        record["formula_crossing_reason"] = f"I(B) stays below the ridge of {on.ridge:.3g}"
    return record


def _decode_at(question: Question, work: Work) -> dict[str, Any]:
    config, on = question.config, question.on
    step = step_floor(config, work, on)
    need = memory_need(config, work)
    limit = on.published_memory if on.usable_memory is None else on.usable_memory
    if config.moe is not None:
        formula: dict[str, Any] = {"formula_intensity": None, "formula_reason": _NOT_DENSE}
    else:
        parameters = count_params(config).total
        per_weight = stored_weight_bytes(config, work.weights) / parameters
        intensity = formula_intensity(parameters, work.batch, config.embed_dim, per_weight, work.activation_bytes)
        formula = {"formula_intensity": intensity}
    flops = sum(floor.op.hardware_flops for floor in step.floors)
    return {
        "batch": work.batch,
        **formula,
        "intensity": flops / sum(floor.op.num_bytes for floor in step.floors),
        "flops_per_device": flops / on.num_devices,
        "required_bytes_per_device": step.required_bytes / on.num_devices,
        "bound_side": step.side,
        "bound_seconds": step.bound_seconds,
        "bound_tokens_per_second": work.batch / step.bound_seconds,
        "ops_seconds": step.op_seconds,
        "ops_tokens_per_second": work.batch / step.op_seconds,
        "kept_bytes_per_device": need.total / on.num_devices,
        "fits": need.total <= limit,
    }


def _capacity(question: Question) -> dict[str, Any]:
    """Requests of `length` tokens that fit, for each precision of weights and cache."""
    config, on, length = question.config, question.on, max(question.work.length, 1)
    work = question.work
    caches = [_as_asked(item, question) for item in CACHE.values() if item.name in (*SERVED, work.cache.name)]
    weights = [_as_asked(item, question) for item in WEIGHTS.values() if item.name in (*SERVED, work.weights.name)]
    requests = {cache.name: request_bytes(config, length, cache) for cache in caches}
    memories = {"published": on.published_memory, "usable": on.usable_memory}
    rows = []
    for item in weights:
        stored = stored_weight_bytes(config, item)
        row = {"weight_format": item.name, "weight_bytes": stored}
        for memory, size in memories.items():
            if size is None:
                row |= {f"largest_batch_{memory}": None, f"{memory}_reason": _no_usable(on)}
            else:
                counts = {name: largest_batch(size, stored, one) for name, one in requests.items()}
                row[f"largest_batch_{memory}"] = counts
        rows.append(row)
    return {"tokens_per_request": length, "request_bytes": requests, "weights": rows}


def _as_asked(item: Format, question: Question) -> Format:
    if not question.scales:
        return item.without_scales()
    return dataclasses.replace(item, group=question.group) if item.group is not None else item


def _experts(question: Question) -> dict[str, Any]:
    """Expected experts that a batch reaches in each layer, and the bytes of weights that a decode step reads."""
    config, work = question.config, question.work
    assert config.moe is not None
    batches = sorted({*BATCHES, work.batch})
    rows = []
    for batch in batches:
        ops = operations(config, dataclasses.replace(work, mode="decode", batch=batch))
        rows.append(
            {
                "batch": batch,
                "expected_experts": expected_experts(config, batch),
                "active_weight_bytes": sum(op.bytes.weights for op in ops),
            }
        )
    stored = stored_weight_bytes(config, work.weights)
    return {"num_experts": config.moe.num_experts, "stored_weight_bytes": stored, "batches": rows}


def _chips(question: Question) -> list[dict[str, Any]]:
    """The same step on as many devices of each chip."""
    rows = []
    for chip in CHIPS:
        row: dict[str, Any] = {"chip": chip.name, "chosen": chip is question.on.chip}
        if question.on.dtype not in chip.peaks:
            published = ", ".join(sorted(chip.peaks))
            reason = f"no dense {question.on.dtype} peak is published; published: {published}"
            rows.append({**row, "bound_seconds": None, "reason": reason})
            continue
        on = machine(chip, question.on.num_devices, question.on.dtype)
        step, need = step_floor(question.config, question.work, on), memory_need(question.config, question.work)
        limit = on.published_memory if on.usable_memory is None else on.usable_memory
        row |= {
            "devices_per_chip": chip.devices_per_chip,
            "peak_flops_per_device": on.peak(on.dtype) / on.num_devices,
            "bandwidth_per_device": on.bandwidth / on.num_devices,
            "memory_bytes_per_device": limit / on.num_devices,
            "ridge": on.ridge,
            "bound_side": step.side,
            "bound_seconds": step.bound_seconds,
            "bound_tokens_per_second": question.work.tokens / step.bound_seconds,
            "kept_bytes_fit": need.total <= limit,
        }
        rows.append(row)
    return rows
