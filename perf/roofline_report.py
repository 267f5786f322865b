"""What `python -m perf roofline` says: the figures as a record, and the tables and the plot that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from model.config import ModelConfig
from perf.capacity import largest_batch, memory_need, request_bytes
from perf.chips import CHIPS
from perf.flops import count_params
from perf.formats import CACHE, WEIGHTS, Format, stored_weight_bytes
from perf.operations import Work, expected_experts, operations
from perf.plot import Point, Roof, Series, roofline_svg
from perf.report import Notes, Plot, Report, Table, duration, number, quantity
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

BATCHES = (1, 8, 32, 128, 256, 512)
_NOT_DENSE = "I(B) = 2PB / (P·b + B·d·b) is of a dense model; how many experts are read depends on the batch"
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


def roofline_report(question: Question) -> Report:
    step = step_floor(question.config, question.work, question.on)
    record: dict[str, Any] = {
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
    parts = [
        _step_table(record),
        _op_table(record),
        *_decode_tables(record),
        *_capacity_tables(record),
        *_expert_tables(record),
        _chip_table(record),
        Notes("Assumptions: every figure is a prediction", tuple(_notes(question, record))),
        Plot("Roofline", lambda: _plot(record)),
    ]
    return Report(_title(question), record, parts)


# The record. A section that has no meaning in a mode is not in it.


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
    peak = on.peak(on.dtype)
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
        **{
            f"{name}_{share}": amount / seconds / most
            for name, seconds in (("bound", step.bound_seconds), ("ops", step.op_seconds))
            for share, amount, most in (("mfu", step.model_flops, peak), ("mbu", step.required_bytes, on.bandwidth))
        },
        "kernels": sum(floor.op.kernels for floor in step.floors),
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


# Tables.


def _title(question: Question) -> str:
    work, on = question.work, question.on
    what = {
        "train": f"one train step of {work.batch} × {work.length} tokens",
        "prefill": f"prefill of {work.batch} × {work.length} tokens",
        "decode": f"one decoded token of {work.batch} rows, each with {work.length} cached",
    }[work.mode]
    devices = f"{on.num_devices} × {on.chip.name}" + (" (devices)" if on.chip.devices_per_chip > 1 else "")
    formats = "" if work.mode == "train" else f", weights {work.weights.name}, cache {work.cache.name}"
    return f"Roofline of {question.name}: {what} on {devices}, {on.dtype}{formats} (prediction)"


def _step_table(record: dict[str, Any]) -> Table:
    step, memory = record["step"], record["memory"]
    fits = {True: "yes", False: "NO", None: "unknown"}[memory["fits"]]
    rows = tuple(
        (
            words,
            duration(step[f"{name}_compute_seconds"]),
            duration(step[f"{name}_data_seconds"]),
            duration(overhead),
            duration(step[f"{name}_seconds"]),
            number(step[f"{name}_tokens_per_second"]),
            f"{step[f'{name}_mfu']:.1%}",
            f"{step[f'{name}_mbu']:.1%}",
        )
        for name, words, overhead in (
            ("bound", "bound of any program", 0),
            ("ops", "op by op, at the peaks", step["ops_overhead_seconds"]),
        )
    )
    flops, moved, required, kept = (
        quantity(value, unit)
        for value, unit in (
            (step["hardware_flops_per_device"], "FLOP"),
            (step["bytes_per_device"], "B"),
            (step["required_bytes_per_device"], "B"),
            (memory["total_bytes_per_device"], "B"),
        )
    )
    title = (
        f"Step: {flops} and {moved} a device ({required} required), bound by {step['bound_side']} "
        f"(ridge {record['ridge']:.0f} FLOP/B); keeps {kept} a device, fits: {fits}"
    )
    return Table(title, ("prediction", "compute", "data", "overhead", "step", "tokens/s", "MFU", "MBU"), rows)


def _op_table(record: dict[str, Any]) -> Table:
    train = record["mode"] == "train"
    total = record["step"]["ops_seconds"]
    # One unit for all rows, so that they compare at a glance.
    scale, unit = (1e3, "ms") if total >= 0.02 else (1e6, "µs")
    third = "state" if train else "cache"
    rows = [
        (
            op["op"],
            f"{op['layers']} ×{op['num_layers']}" if op["layers"] != "-" else "",
            quantity(op["hardware_flops_per_device"]) if op["hardware_flops_per_device"] else "",
            quantity(op["weights_bytes_per_device"]) if op["weights_bytes_per_device"] else "",
            quantity(op[f"{third}_bytes_per_device"]) if op[f"{third}_bytes_per_device"] else "",
            quantity(op["activations_bytes_per_device"]) if op["activations_bytes_per_device"] else "",
            number(op["intensity"]) if op["intensity"] else "",
            op["side"],
            _time(op["compute_seconds"] or None, scale),
            _time(op["data_seconds"], scale),
            _time(op["overhead_seconds"], scale),
            _time(op["seconds"], scale),
            f"{op['seconds'] / total:.1%}",
        )
        for op in record["ops"]
    ]
    ops = record["ops"]
    sums = [sum(op[f"{name}_bytes_per_device"] for op in ops) for name in ("weights", third, "activations")]
    step = record["step"]
    rows.append(
        (
            "total",
            "",
            quantity(step["hardware_flops_per_device"]),
            *(quantity(value) for value in sums),
            number(step["intensity"]),
            "",
            _time(step["ops_compute_seconds"], scale),
            _time(step["ops_data_seconds"], scale),
            _time(step["ops_overhead_seconds"], scale),
            _time(total, scale),
            "",
        )
    )
    columns = ("op", "layers", "FLOP", "weights", third, "activ.", "FLOP/B", "side")
    times = ("compute", "data", "launch", "floor", "share")
    title = f"Ops: FLOP and bytes of a device, floor = max(compute, data) + launch in {unit}"
    return Table(title, (*columns, *times), tuple(rows), left=2, totals=1)


def _time(seconds: float | None, scale: float) -> str:
    if seconds is None:
        return ""
    value = seconds * scale
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _decode_tables(record: dict[str, Any]) -> list[Table]:
    if "decode" not in record:
        return []
    decode = record["decode"]
    rows = tuple(
        (
            str(row["batch"]),
            number(row["formula_intensity"]),
            number(row["intensity"]),
            row["bound_side"],
            quantity(row["required_bytes_per_device"], "B"),
            duration(row["bound_seconds"]),
            number(row["bound_tokens_per_second"]),
            duration(row["ops_seconds"]),
            number(row["ops_tokens_per_second"]),
            quantity(row["kept_bytes_per_device"], "B"),
            "yes" if row["fits"] else "no",
        )
        for row in decode["batches"]
    )
    crossings = ", ".join(
        f"{words} {_batch(decode[f'{name}_crossing_batch'])}"
        for name, words in (("formula", "by I(B)"), ("products", "products with weights"), ("step", "whole step"))
    )
    columns = ("batch", "I(B)", "FLOP/B", "bound by", "B a device", "bound", "tokens/s", "op by op", "tokens/s")
    title = (
        f"Decode at a context of {decode['context']}; batch that crosses the ridge of {decode['ridge']:.0f} FLOP/B: "
    )
    return [Table(title + crossings, (*columns, "kept", "fits"), rows, left=0)]


def _batch(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"


def _capacity_tables(record: dict[str, Any]) -> list[Table]:
    if "capacity" not in record:
        return []
    capacity = record["capacity"]
    per_request = capacity["request_bytes"]
    rows = []
    for row in capacity["weights"]:
        for memory in ("published", "usable"):
            largest = row[f"largest_batch_{memory}"]
            if largest is None:
                continue
            counts = tuple(f"{largest[name]:,}" for name in per_request)
            rows.append((row["weight_format"], memory, quantity(row["weight_bytes"], "B"), *counts))
    columns = ("weights", "memory", "bytes", *(f"KV {name}" for name in per_request))
    sizes = ("a request", "", "", *(quantity(value, "B") for value in per_request.values()))
    return [
        Table(
            f"Largest batch of requests of {capacity['tokens_per_request']} tokens that fits, all devices together",
            columns,
            (*rows, sizes),
            left=2,
            totals=1,
        )
    ]


def _expert_tables(record: dict[str, Any]) -> list[Table]:
    if "experts" not in record:
        return []
    experts = record["experts"]
    rows = tuple(
        (
            str(row["batch"]),
            f"{row['expected_experts']:.1f} of {experts['num_experts']}",
            quantity(row["active_weight_bytes"], "B"),
            f"{row['active_weight_bytes'] / experts['stored_weight_bytes']:.1%}",
        )
        for row in experts["batches"]
    )
    columns = ("batch", "expected experts a layer", "weights read", "of all weights")
    return [
        Table("Experts that a decoded batch reaches, routed uniformly; all devices together", columns, rows, left=0)
    ]


def _chip_table(record: dict[str, Any]) -> Table:
    rows: list[Sequence[str]] = []
    for row in record["chips"]:
        name = f"{row['chip']}{' ←' if row['chosen'] else ''}"
        if row["bound_seconds"] is None:
            rows.append((name, *("n/a",) * 8))
            continue
        rows.append(
            (
                name,
                quantity(row["peak_flops_per_device"], "FLOP/s"),
                quantity(row["bandwidth_per_device"], "B/s"),
                f"{row['ridge']:.0f}",
                row["bound_side"],
                duration(row["bound_seconds"]),
                number(row["bound_tokens_per_second"]),
                quantity(row["memory_bytes_per_device"], "B"),
                "yes" if row["kept_bytes_fit"] else "no",
            )
        )
    title = f"The same step on {record['num_devices']} devices of each chip: bound of any program"
    columns = ("chip", "peak", "bandwidth", "ridge", "bound by", "step", "tokens/s", "memory", "kept fits")
    return Table(title, columns, tuple(map(tuple, rows)))


def _notes(question: Question, record: dict[str, Any]) -> list[str]:
    on, work = question.on, question.work
    lines = [
        "work, weights and cache divide evenly over the devices, whatever the mesh; communication takes no time",
        f"peak {record['compute_dtype']} {quantity(record['peak_flops_per_device'], 'FLOP/s', 4)} a device "
        f"({record['peak_source']}), memory {quantity(record['bandwidth_per_device'], 'B/s', 4)} "
        f"({record['bandwidth_source']})",
        f"launch overhead a kernel: {duration(on.launch_seconds)} ({on.launch_source})",
        "the bound counts the model's FLOPs and what must move: "
        + ("weights and the optimizer's update" if work.mode == "train" else "weights in use, keys and values"),
        "op by op: each op a kernel of its own that reads and writes its activations in memory, one after the other",
    ]
    if record["mode"] != "train":
        scales = f"counted, per {question.group} inputs in int4" if question.scales else "not counted"
        lines.append(
            f"16-bit scales of quantised weights (all matrices) and of int8 and int4 keys and values are {scales}; "
            "norms and biases stay at 16 bits, the router at 32"
        )
        lines.append("capacity: weights and cache alone, without the program's scratch")
    if "decode" in record:
        decode = record["decode"]
        if "formula_seconds" in decode:
            stored = quantity(decode["formula_weight_bytes_per_device"], "B")
            seconds, rate = duration(decode["formula_seconds"]), number(decode["formula_tokens_per_second"])
            lines.append(
                f"every parameter read once and no cache: {stored} a device, {seconds} a token, {rate} tokens/s; "
                f"I(B) = 2PB / (P·b + B·d·b) with P = {record['parameters']:,}, d = {question.config.embed_dim}"
            )
        lines += [
            f"{words}: no crossing of the ridge: {decode[f'{name}_crossing_reason']}"
            for name, words in (("formula", "I(B)"), ("products", "products with weights"), ("step", "the whole step"))
            if f"{name}_crossing_reason" in decode
        ]
    if "fits_reason" in record["memory"]:
        lines.append(f"fits unknown: {record['memory']['fits_reason']}")
    if work.mode != "decode":
        attention = record["attention"]
        lines.append(
            f"attention of one layer and one sequence of {attention['length']} tokens, forward: "
            f"{quantity(attention['fused_bytes'], 'B')} fused, {quantity(attention['unfused_bytes'], 'B')} with dense "
            f"scores in memory, {attention['ratio']:.0f} times as much"
        )
    missing = [row for row in record["chips"] if row["bound_seconds"] is None]
    lines += [f"{row['chip']}: {row['reason']}" for row in missing]
    return [*lines, *question.assumptions]


def _plot(record: dict[str, Any]) -> str:
    roofs = [
        Roof(row["chip"], row["peak_flops_per_device"], row["bandwidth_per_device"])
        for row in record["chips"]
        if row["bound_seconds"] is not None
    ]
    ops = tuple(
        Point(
            op["op"] if op["layers"] in ("-", "all") else f"{op['op']} ({op['layers']})",
            op["intensity"],
            op["hardware_flops_per_device"] / op["seconds"],
        )
        for op in record["ops"]
        if op["intensity"]
    )
    series = [Series("ops at their floor", "o", "crimson", ops)]
    if record["mode"] == "decode":
        rows = record["decode"]["batches"]
        steps = tuple(
            Point(f"B={row['batch']}", row["intensity"], row["flops_per_device"] / row["ops_seconds"]) for row in rows
        )
        series.append(Series("whole step by batch", "s", "navy", steps))
    return roofline_svg(roofs, series, record["chip"])
