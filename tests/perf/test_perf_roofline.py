"""Ops, floors, crossings and capacities: sums equal the ledgers, worked examples come out with their figures."""

import dataclasses
import itertools
import json
import math

import pytest

import configs
from configs import dense_1b, llama3_8b, llama3_70b, mixtral_8x7b, moe_1b
from perf.capacity import kept_activations, largest_batch, memory_need, request_bytes
from perf.chips import CHIPS
from perf.flops import count_params
from perf.formats import CACHE, WEIGHTS, Format, stored_weight_bytes
from perf.operations import TrainState, Work, expected_experts, operations, step_ledger, totals
from perf.reached import reached_step
from perf.report import json_text
from perf.roofline import (
    chip_named,
    formula_crossing,
    formula_intensity,
    machine,
    op_floor,
    step_crossing,
    step_floor,
)
from perf.roofline_record import Question
from perf.roofline_report import roofline_report
from perf.traffic import Traffic, prefill_flops
from tests.model import tiny

BF16 = WEIGHTS["bf16"]
H100 = chip_named("h100")
EIGHT_H100 = machine(H100, 8, "bfloat16")


def decode(batch: int, context: int, weights: Format = BF16, cache: Format = CACHE["bf16"], **more) -> Work:
    return Work("decode", batch, context, weights, cache, **more)


def models():
    for name in configs.names():
        module = configs.load(name)
        if hasattr(module, "MODEL"):
            yield pytest.param(module.MODEL, id=name)
    yield pytest.param(tiny.moe(num_layers=3, num_dense_layers=1, shared_mlp_dim=24, router_bias=True), id="mixed")
    yield pytest.param(
        tiny.dense(window_pattern=(8, None), attention_sinks=True, qkv_bias=True, norm_placement="both", qk_norm=True),
        id="windows",
    )
    yield pytest.param(tiny.dense(gated_mlp=False, tie_embeddings=True), id="not gated")


@pytest.fixture(params=models())
def model(request):
    return request.param


def textbook_70b():
    """70.0 B parameters: Llama 3 70B's layers, and a vocabulary of the size that is missing."""
    config = llama3_70b.MODEL
    missing = 70e9 - count_params(config).total
    config = dataclasses.replace(config, vocab_size=config.vocab_size + round(missing / (2 * config.embed_dim)))
    assert count_params(config).total == pytest.approx(70e9, rel=1e-6)
    return config


# Sums.


@pytest.mark.parametrize("attention", ["fused", "unfused"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_train_ops_sum_to_the_flop_ledger(model, remat, attention):
    work = Work("train", 3, 24, BF16, CACHE["bf16"], attention=attention, remat=remat)
    book, total = step_ledger(model, work), totals(operations(model, work))
    assert total["model_flops"] == book.model_flops
    assert total["hardware_flops"] == book.hardware_flops
    # The ledger is that of such a step: recomputation, and a fused kernel's own.
    assert ("qk" in book.recomputed) == (attention == "fused" or remat != "none")


@pytest.mark.parametrize(("batch", "context"), [(1, 0), (5, 40)])
def test_decode_ops_sum_to_the_traffic_and_the_flops(model, batch, context):
    total = totals(operations(model, decode(batch, context)))
    assert total["model_flops"] == total["hardware_flops"] == prefill_flops(model, [(context, 1)] * batch, batch)
    assert total["cache_bytes"] == Traffic(model, weight_bytes=2, cache_bytes=2).cache([context] * batch)
    assert_weights(model, total["weights_bytes"], batch)


def test_prefill_ops_sum_to_the_traffic_and_the_flops(model):
    total = totals(operations(model, Work("prefill", 3, 20, BF16, CACHE["fp32"])))
    assert total["model_flops"] == prefill_flops(model, [(0, 20)] * 3, 3)
    assert total["cache_bytes"] == Traffic(model, weight_bytes=2, cache_bytes=4).cache([0] * 3, new=20)
    assert_weights(model, total["weights_bytes"], 60)


def assert_weights(model, num_bytes: int, tokens: int) -> None:
    book = Traffic(model, weight_bytes=2, cache_bytes=2)
    if model.moe is None:
        assert num_bytes == book.weights()
        return
    # Expected experts are no whole number; each of the ops is rounded to a byte.
    one = book.weights(1) - book.weights(0)
    expected = book.weights(0) + model.num_moe_layers * expected_experts(model, tokens) * one
    assert abs(num_bytes - expected) <= 4


def test_stored_weights_are_the_parameters(model):
    routers = 0
    if model.moe is not None:
        routers = model.num_moe_layers * model.moe.num_experts * (model.embed_dim + model.moe.router_bias)
    parameters = count_params(model).total
    biases = model.num_moe_layers * model.moe.num_experts if model.moe is not None and model.moe.router_bias else 0
    assert stored_weight_bytes(model, BF16) == 2 * (parameters + biases - routers) + 4 * routers
    assert stored_weight_bytes(model, WEIGHTS["fp32"]) == 4 * (parameters + biases)


def test_expected_experts_by_counting_every_choice():
    """All ways in which three tokens can each choose 2 of 4 experts, equally likely."""
    model = tiny.moe(num_experts=4, experts_per_token=2)
    choices = list(itertools.combinations(range(4), 2))
    reached = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=3)]
    assert expected_experts(model, 3) == pytest.approx(sum(reached) / len(reached))
    assert expected_experts(model, 1) == pytest.approx(2)
    assert expected_experts(model, 10_000) == pytest.approx(4)


def test_a_layer_of_decode_by_hand():
    """One layer, embed 16, 8 query and 4 kv heads of 4, mlp 32, vocabulary 64; 3 rows with 10 cached tokens."""
    ops = {op.name: op for op in operations(tiny.dense(num_layers=1), decode(3, 10))}
    qkv = ops["qkv"]
    assert qkv.model_flops == 2 * 3 * 16 * (32 + 16 + 16)
    assert qkv.bytes == (2 * 16 * 64, 0, 2 * 3 * (16 + 64), 0)
    attention = ops["attention"]
    assert attention.model_flops == 2 * 2 * 8 * 4 * 11 * 3
    assert attention.bytes == (0, 3 * 10 * 2 * 4 * 4 * 2, 2 * 3 * 2 * 32, 0)
    assert ops["kv_write"].bytes.cache == 3 * 2 * 4 * 4 * 2
    assert ops["gate_up"].bytes == (2 * 2 * 16 * 32, 0, 2 * 3 * (16 + 64), 0)
    assert ops["activation"].bytes.activations == 2 * 3 * 3 * 32
    assert ops["lm_head"].bytes == (2 * 16 * 64, 0, 3 * (2 * 16 + 4 * 64), 0)
    assert [op.kernels for op in ops.values()] == [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_a_train_step_moves_its_state():
    model = tiny.dense()
    parameters = count_params(model).total
    work = Work("train", 2, 8, BF16, CACHE["bf16"])
    ops = {op.name: op for op in operations(model, work)}
    hidden = 2 * (16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 32)
    # Parameter and two moments both ways, the gradient for the norm and for the update; 4 bytes each. And the matrices
    # and the head in the precision of products.
    state = 4 * parameters * (2 * 3 + 2)
    assert ops["optimizer"].bytes.state == state + 2 * (hidden + 16 * 64)
    tied = operations(tiny.dense(tie_embeddings=True), work)[-1]
    assert tied.bytes.state == 4 * (parameters - 16 * 64) * (2 * 3 + 2) + 2 * hidden
    # Every parameter's gradient is written once.
    written = sum(op.bytes.state for op in ops.values() if op.name != "optimizer")
    assert written == 4 * parameters
    # Forward, and in the backward pass for the inputs' gradient.
    assert ops["down"].bytes.weights == 2 * 2 * 2 * 16 * 32
    assert ops["down"].kernels == 2 * 3
    muon = TrainState(muon=True)
    assert TrainState().kept(model) - muon.kept(model) == 4 * hidden
    assert TrainState().update(model) - muon.update(model) == 2 * 4 * hidden
    # A copy that is a half of its matrix costs nothing.
    halves = dataclasses.replace(work, state=TrainState(halves=True))
    assert operations(model, halves)[-1].bytes.state == state
    # Parameters as products take them have no copy; wider products cast them at each step.
    wide = dataclasses.replace(work, weights=WEIGHTS["fp32"])
    (same,) = (op for op in operations(model, wide) if op.name in ("optimizer", "cast_weights"))
    assert same.bytes.state == state
    narrow = dataclasses.replace(wide, state=TrainState(parameter=2))
    (cast,) = (op for op in operations(model, narrow) if op.name == "cast_weights")
    assert cast.bytes.state == (2 + 4) * parameters


# Worked examples.


def test_70b_on_eight_h100s_at_batch_1():
    """17.5 GB and 5.2 ms a token per GPU, 191 tokens/s: the weights alone with P = 70 B, and Llama 3 70B with 4k of
    keys and values in, and the embedding table, of which a token needs a row, out."""
    for config in (textbook_70b(), llama3_70b.MODEL):
        record = answer(config, decode(1, 4096), EIGHT_H100)
        step, formula = record["step"], record["decode"]
        if config is llama3_70b.MODEL:
            per_device, seconds, rate = (
                step["required_bytes_per_device"],
                step["bound_seconds"],
                step["bound_tokens_per_second"],
            )
        else:
            per_device, seconds, rate = (
                formula["formula_weight_bytes_per_device"],
                formula["formula_seconds"],
                formula["formula_tokens_per_second"],
            )
        assert round(per_device / 1e9, 1) == 17.5
        assert round(seconds * 1e3, 1) == 5.2
        assert round(rate) == 191


def test_requests_of_4k_that_fit_eight_h100s():
    config = textbook_70b()
    record = answer(config, decode(1, 4096), EIGHT_H100, scales=False)["capacity"]
    assert round(record["request_bytes"]["bf16"] / 1e9, 2) == 1.34
    largest = {row["weight_format"]: row["largest_batch_published"] for row in record["weights"]}
    assert largest["bf16"]["bf16"] == 372
    assert largest["int4"]["int8"] == 901
    # The scales that the textbook leaves out: 16 bits per 128 weights, 32 per head of 128 of a key or value.
    scaled = answer(config, decode(1, 4096), EIGHT_H100)["capacity"]
    assert {row["weight_format"]: row["largest_batch_published"] for row in scaled["weights"]}["int4"]["int8"] == 872


def test_attention_at_8192_with_scores_in_memory():
    """34.9 GB against 537 MB: one layer of 64 heads of 128 that share no keys."""
    config = dataclasses.replace(llama3_70b.MODEL, num_kv_heads=64)
    attention = answer(config, Work("prefill", 1, 8192, BF16, CACHE["bf16"]), EIGHT_H100)["attention"]
    assert attention["fused_bytes"] == 4 * 8192 * 64 * 128 * 2
    assert round(attention["fused_bytes"] / 1e6) == 537
    assert round(attention["unfused_bytes"] / 1e9, 1) == 34.9
    assert round(attention["ratio"]) == 65


def test_where_decode_crosses_the_ridge():
    """With 2 bytes a weight I(B) is nearly B, so that it crosses H100's ridge of 295 there."""
    batch = formula_crossing(70e9, 8192, 2, 2, EIGHT_H100.ridge)
    assert (
        formula_intensity(70e9, batch, 8192, 2, 2) == pytest.approx(EIGHT_H100.ridge) == pytest.approx(295.3, abs=0.1)
    )
    assert batch == pytest.approx(295.3, abs=0.2)
    # Weights in half of the bytes cross at half of the batch.
    assert formula_crossing(70e9, 8192, 1, 2, EIGHT_H100.ridge) == pytest.approx(batch / 2, rel=1e-3)
    # I(B) tends to 2P / (d·b).
    assert formula_crossing(1e6, 8192, 2, 2, 295) is None
    assert formula_intensity(1e6, 1e12, 8192, 2, 2) == pytest.approx(2e6 / (8192 * 2), rel=1e-3)


@pytest.mark.parametrize("config", [llama3_8b.MODEL, mixtral_8x7b.MODEL], ids=["dense", "experts"])
@pytest.mark.parametrize("products_only", [False, True])
def test_a_crossing_is_the_first_batch_bound_by_compute(config, products_only):
    on, work = machine(H100, 1, "bfloat16"), decode(1, 16)
    batch, _ = step_crossing(config, work, on, products_only=products_only)

    def compute_over_data(batch: int) -> float:
        ops = operations(config, dataclasses.replace(work, batch=batch))
        floors = [op_floor(op, on) for op in ops if not products_only or (op.hardware_flops and op.bytes.weights)]
        return sum(floor.compute_seconds for floor in floors) / sum(floor.data_seconds for floor in floors)

    assert batch is not None and batch > 100
    assert compute_over_data(batch - 1) < 1 <= compute_over_data(batch)


def test_a_long_context_never_crosses():
    """Each row reads its own keys and values: FLOPs per byte tend to less than the ridge."""
    on = machine(H100, 1, "bfloat16")
    batch, limit = step_crossing(llama3_8b.MODEL, decode(1, 8000), on)
    assert batch is None
    assert 1 < limit < on.ridge
    record = answer(llama3_8b.MODEL, decode(1, 8000), on)["decode"]
    assert record["step_crossing_batch"] is None and "tend to" in record["step_crossing_reason"]


# Formats.


def test_formats_count_their_scales():
    int4 = WEIGHTS["int4"]
    # 300 inputs: three groups of at most 128.
    assert int4.matrix(300, 10) == 10 * (150 + 3 * 2)
    assert WEIGHTS["int8"].matrix(300, 10) == 10 * (300 + 2)
    assert int4.without_scales().matrix(300, 10) == 1500
    assert BF16.matrix(300, 10) == 6000
    assert (int4.vector_bytes, BF16.vector_bytes, WEIGHTS["fp32"].vector_bytes) == (2, 2, 4)
    model = llama3_8b.MODEL
    assert request_bytes(model, 10, CACHE["bf16"]) == 10 * 32 * 2 * 8 * 128 * 2
    assert request_bytes(model, 10, CACHE["int8"]) == 10 * 32 * 2 * 8 * (128 + 4)
    assert request_bytes(model, 10, CACHE["fp8"]) == 10 * 32 * 2 * 8 * (128 + 4)
    assert request_bytes(model, 10, CACHE["int4"]) == 10 * 32 * 2 * 8 * (64 + 2)


def test_decode_reads_weights_and_cache_in_their_formats():
    total = totals(operations(llama3_8b.MODEL, decode(2, 100, WEIGHTS["int4"], CACHE["int8"])))
    plain = totals(operations(llama3_8b.MODEL, decode(2, 100)))
    vectors = 2 * (65 * 4096)
    assert total["weights_bytes"] - vectors == (plain["weights_bytes"] - vectors) * (4 + 16 / 128) / 16
    assert total["cache_bytes"] == plain["cache_bytes"] * 132 / 256


# Floors.


def test_the_iron_law():
    on = machine(H100, 2, "bfloat16")
    for op in operations(mixtral_8x7b.MODEL, decode(64, 1000)):
        floor = op_floor(op, on)
        peak = 2 * (494.7e12 if op.name == "router" else 989.4e12)
        assert floor.compute_seconds == pytest.approx(op.hardware_flops / peak)
        assert floor.data_seconds == pytest.approx(op.num_bytes / (2 * 3350e9))
        assert floor.overhead_seconds == pytest.approx(op.kernels * 2e-6)
        assert floor.seconds == max(floor.compute_seconds, floor.data_seconds) + floor.overhead_seconds
        assert (floor.side == "compute") == (floor.compute_seconds >= floor.data_seconds)
    step = step_floor(mixtral_8x7b.MODEL, decode(64, 1000), on)
    assert step.bound_seconds <= max(step.compute_seconds, step.data_seconds) <= step.op_seconds
    assert step.side == "memory"


def test_the_bound_of_training_leaves_out_what_recomputation_adds():
    on = machine(H100, 1, "bfloat16")
    plain, full = (
        step_floor(llama3_8b.MODEL, Work("train", 8, 512, BF16, CACHE["bf16"], remat=remat), on)
        for remat in ("none", "full")
    )
    assert plain.bound_seconds == full.bound_seconds
    assert plain.required_bytes == full.required_bytes
    assert full.op_seconds > 1.1 * plain.op_seconds
    assert plain.side == "compute"


def test_devices_divide_the_work():
    """A TPU7x chip is two devices, each with half of its peak and bandwidth."""
    one, four = (machine(H100, count, "bfloat16") for count in (1, 4))
    work = decode(8, 100)
    quarter = step_floor(llama3_8b.MODEL, work, four).bound_seconds
    assert step_floor(llama3_8b.MODEL, work, one).bound_seconds == pytest.approx(4 * quarter)
    core = machine(chip_named("tpu7x"), 1, "bfloat16")
    assert core.peak("bfloat16") == 2307e12 / 2
    assert core.bandwidth == 7380e9 / 2
    assert core.published_memory == 96 * 2**30


def test_launch_overhead_is_known_where_it_was_measured():
    assert machine(H100, 1, "bfloat16").launch_seconds == 2e-6
    tpu = machine(chip_named("v5e"), 1, "bfloat16")
    assert tpu.launch_seconds is None and "not measured on TPU v5e" in tpu.launch_source
    assert op_floor(operations(llama3_8b.MODEL, decode(1, 0))[0], tpu).overhead_seconds == 0
    assert machine(chip_named("v5e"), 1, "bfloat16", 1e-7).launch_seconds == 1e-7
    for wrong in (-1e-6, math.nan, math.inf):
        with pytest.raises(ValueError, match="--launch-us"):
            machine(H100, 1, "bfloat16", wrong)


def test_chips_by_name():
    names = {
        "h100": "H100 SXM",
        "H100-PCIe": "H100 PCIe",
        "a100": "A100 SXM 80GB",
        "a100-sxm-40gb": "A100 SXM 40GB",
        "v5e": "TPU v5e",
        "tpu v5p": "TPU v5p",
        "TPUv6e": "TPU v6e",
        "7x": "TPU7x",
        "tpu7x": "TPU7x",
        "gb200": "GB200",
        "v100": "V100 SXM2",
    }
    assert {name: chip_named(name).name for name in names} == names
    for chip in CHIPS:
        assert chip_named(chip.name) is chip
    for wrong in ("h10", "v5", "", "h100 pcie 80gb", "100"):
        with pytest.raises(ValueError, match=r"unknown chip .*chips: v100-sxm2, .*tpu7x"):
            chip_named(wrong)


def test_a_peak_that_is_not_published_is_refused():
    with pytest.raises(
        ValueError, match=r"no dense bfloat16 peak is published for V100 SXM2; set --compute .* fp16, fp32"
    ):
        machine(chip_named("v100"), 1, "bfloat16")
    with pytest.raises(ValueError, match="--devices 0"):
        machine(H100, 0, "bfloat16")


# Rates reached.


def test_an_op_at_the_rates_reached():
    on, work = machine(H100, 2, "bfloat16"), decode(1, 100, WEIGHTS["int8"])
    step = step_floor(llama3_8b.MODEL, work, on)
    reached = reached_step(step, work)
    total = totals(tuple(floor.op for floor in step.floors))
    others = total["cache_bytes"] + total["activations_bytes"]
    assert reached.data_seconds == pytest.approx((total["weights_bytes"] / 2.77e12 + others / 2.98e12) / 2)
    attention = sum(floor.op.hardware_flops for floor in step.floors if floor.op.name == "attention")
    products = total["hardware_flops"] - attention
    assert reached.compute_seconds == pytest.approx((products / 786e12 + attention / 548e12) / 2)
    # All ops of such a step wait for memory.
    assert reached.seconds == pytest.approx(reached.data_seconds + step.overhead_seconds)
    assert step.op_seconds < reached.seconds


@pytest.mark.parametrize(
    ("chip", "dtype", "weights", "reason"),
    [
        ("v5e", "bfloat16", "bf16", "not measured on TPU v5e"),
        ("h100", "float8", "bf16", "in bfloat16, not in float8"),
        ("h100", "bfloat16", "fp8", "reads fp8 weights was not measured; measured: bf16, int8, int4"),
    ],
)
def test_rates_that_were_not_measured_are_not_made_up(chip, dtype, weights, reason):
    work = decode(1, 100, WEIGHTS[weights])
    reached = reached_step(step_floor(llama3_8b.MODEL, work, machine(chip_named(chip), 1, dtype)), work)
    assert (reached.seconds, reached.source) == (None, None) and reason in reached.reason


def test_products_of_experts_have_a_rate_of_their_own():
    work = Work("train", 8, 2048, BF16, CACHE["bf16"])
    step = step_floor(moe_1b.MODEL, work, machine(H100, 1, "bfloat16"))
    experts = [floor for floor in step.floors if floor.op.name.startswith("expert_")]
    attention = sum(floor.op.hardware_flops for floor in step.floors if floor.op.name == "attention")
    grouped = sum(floor.op.hardware_flops for floor in experts)
    # A router's product is in float32, at the share of its own peak.
    routers = [floor for floor in step.floors if floor.op.name == "router"]
    plain = sum(floor.op.hardware_flops for floor in step.floors) - attention - grouped
    plain -= sum(floor.op.hardware_flops for floor in routers)
    in_float32 = sum(floor.compute_seconds for floor in routers) * 989.4e12 / 786e12
    expected = plain / 786e12 + grouped / 684e12 + attention / 454e12 + in_float32
    assert experts and reached_step(step, work).compute_seconds == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "work", "measured"),
    [
        (dense_1b.MODEL, Work("train", 8, 2048, BF16, CACHE["bf16"]), 0.251),
        (moe_1b.MODEL, Work("train", 8, 2048, BF16, CACHE["bf16"]), 0.0800),
        (llama3_8b.MODEL, decode(1, 256), 0.00558),
        (llama3_8b.MODEL, decode(8, 256), 0.00573),
        (llama3_8b.MODEL, decode(32, 256), 0.00628),
        (llama3_8b.MODEL, decode(128, 256), 0.00851),
    ],
    ids=["dense-1b", "moe-1b", *(f"llama3-8b, {rows} rows" for rows in (1, 8, 32, 128))],
)
def test_steps_that_were_measured_on_an_h100(config, work, measured):
    """README.md's tables: `train.py dense-1b`, `moe-1b` but for what its host added, and `serve.py llama3-8b --bench`
    from 128 to 384 tokens of context."""
    step = step_floor(config, work, machine(H100, 1, "bfloat16"))
    assert step.bound_seconds < measured and step.op_seconds < measured
    assert reached_step(step, work).seconds == pytest.approx(measured, rel=0.15)


# Memory.


def test_largest_batch():
    assert largest_batch(100, 40, 30) == 2
    assert largest_batch(100, 40, 20) == 3
    assert largest_batch(100, 140, 20) == 0


def test_a_train_step_keeps_state_and_activations():
    model = tiny.dense()
    work = Work("train", 2, 8, BF16, CACHE["bf16"])
    tokens = 2 * 8
    # Each layer's input; and query, key, value, output, gate and up.
    assert kept_activations(model, work) == 2 * tokens * 2 * (16 + 32 + 16 + 16 + 16 + 32 + 32)
    assert kept_activations(model, dataclasses.replace(work, remat="full")) == 2 * tokens * 2 * 16
    # A decoded row keeps its new token too.
    assert memory_need(model, decode(3, 10)).cache == 3 * request_bytes(model, 11, CACHE["bf16"])
    need = memory_need(model, work)
    assert (need.state, need.weights, need.cache) == (16 * count_params(model).total, 0, 0)


def test_training_fits_for_certain_only_when_compiled():
    small = Work("train", 1, 64, BF16, CACHE["bf16"])
    memory = answer(tiny.dense(), small, machine(H100, 1, "bfloat16"))["memory"]
    assert memory["fits"] is None and "compiled" in memory["fits_reason"]
    memory = answer(llama3_8b.MODEL, small, machine(H100, 1, "bfloat16"))["memory"]
    assert memory["fits"] is False and memory["free_bytes_per_device"] < -40e9
    assert answer(llama3_70b.MODEL, decode(1, 10), machine(H100, 1, "bfloat16"))["memory"]["fits"] is False
    assert answer(llama3_70b.MODEL, decode(1, 10), machine(H100, 2, "bfloat16"))["memory"]["fits"] is True


# The report.


def answer(config, work: Work, on, scales: bool = True) -> dict:
    report = roofline_report(Question("a model", config, work, on, 128, scales))
    return json.loads(json_text(report))


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
@pytest.mark.parametrize("chip", ["h100", "tpu7x", "h200"])
def test_the_record_adds_up_and_explains_what_is_missing(mode, chip):
    work = Work(mode, 4, 32, BF16, CACHE["bf16"])
    config = tiny.moe(num_layers=3, num_dense_layers=1, window_pattern=(8, None))
    record = answer(config, work, machine(chip_named(chip), 2, "bfloat16"))
    assert record["is_prediction"] is True
    step, ops = record["step"], record["ops"]
    for name in ("model_flops_per_device", "hardware_flops_per_device", "bytes_per_device"):
        assert sum(op[name] for op in ops) == pytest.approx(step[name])
    assert sum(op["seconds"] for op in ops) == pytest.approx(step["ops_seconds"])
    assert {op["layers"] for op in ops} == {"-", "dense window 8", "moe full", "moe window 8"}
    missing = nulls(record)
    assert [name for name in missing if name.endswith("bound_seconds")] == ["chips.0.bound_seconds"]
    if mode != "train":
        # The formula is of dense models.
        assert {"decode.formula_crossing_batch", "decode.batches.0.formula_intensity"} <= set(missing)


def nulls(node, path: str = "") -> list[str]:
    """Paths of all nulls; each has a reason beside it."""
    if isinstance(node, list):
        return [found for index, item in enumerate(node) for found in nulls(item, f"{path}{index}.")]
    if not isinstance(node, dict):
        return []
    here = [f"{path}{key}" for key, value in node.items() if value is None]
    assert not here or any(key.endswith("reason") and isinstance(node[key], str) for key in node), here
    return here + [found for key, value in node.items() for found in nulls(value, f"{path}{key}.")]
