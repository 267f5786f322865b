"""What `python -m perf roofline` says: the tables, the notes and the plot of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perf.plot import Point, Roof, Series, roofline_svg
from perf.report import Notes, Plot, Report, Table, duration, number, quantity
from perf.roofline_record import Question, roofline_record


def roofline_report(question: Question) -> Report:
    record = roofline_record(question)
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
            ("reached", "op by op, at rates reached", step["ops_overhead_seconds"]),
        )
        if step[f"{name}_seconds"] is not None
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
        "work, weights and cache divide evenly over the devices, whatever the mesh, and communication takes no time; "
        "real devices that split the rows read all weights each, those that split the weights all inputs",
        f"peak {record['compute_dtype']} {quantity(record['peak_flops_per_device'], 'FLOP/s', 4)} a device, of every "
        f"product but a router's ({record['peak_source']})",
        f"memory {quantity(record['bandwidth_per_device'], 'B/s', 4)} a device ({record['bandwidth_source']})",
        f"launch overhead a kernel: {duration(on.launch_seconds)} ({on.launch_source})",
        "the bound counts the model's FLOPs and what must move: "
        + ("weights and the optimizer's update" if work.mode == "train" else "weights in use, keys and values"),
        "op by op: each op a kernel of its own that reads and writes its activations in memory, one after the other",
        f"rates reached: {record['step'].get('reached_source') or record['step']['reached_reason']}",
    ]
    cached = on.chip.on_chip_bytes / on.chip.devices_per_chip
    if record["step"]["required_bytes_per_device"] <= cached:
        lines.append(f"the required bytes may stay on the chip ({quantity(cached, 'B')}) and not be moved at all")
    if record["mode"] != "train":
        if question.config.num_kv_heads % on.num_devices:
            lines.append(
                f"{question.config.num_kv_heads} kv heads do not divide over {on.num_devices} devices: keys and values "
                "divide evenly only by rows or positions"
            )
        if question.config.moe is not None:
            lines.append("experts: tokens choose theirs uniformly and independently, and the expected number is read")
        scales = f"counted, per {question.group} inputs in int4" if question.scales else "not counted"
        lines.append(
            f"16-bit scales of quantised weights (all matrices) and of int8 and int4 keys and values are {scales}; "
            "norms and biases stay at 16 bits, the router at 32"
        )
        size = record["memory"]["usable_bytes_per_device"] or record["memory"]["published_bytes_per_device"]
        lines.append(
            "what fits: weights and cache alone, without the program's scratch; in the tables of steps in "
            f"{quantity(size, 'B')} a device"
        )
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
