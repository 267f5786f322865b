"""Predicted steps: small schedules priced by hand, and real programs against the FLOP ledger and their own sums."""

import dataclasses
import json

import pytest

import configs
from perf.calibration import Calibration, calibration_of, clock_of
from perf.flops import ledger
from perf.hlo import parse
from perf.interconnect import HOP_SECONDS, SLICE_SECONDS
from perf.kernel_cost import PALLAS_SHARE, is_attention
from perf.prediction import predict
from tests.perf.hlo_programs import CHIP, box, planes, program, snake

V5E = CHIP["TPU v5e"]
RAW = Calibration(1.0, "a test")
CLOCK = 1.503e9
BANDWIDTH = 819e9
LINK = 45e9
MB = 2**20


def cycles(seconds: float) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{round(seconds * CLOCK)}"}}}}'


def schedule(body: str, *others: str, devices: int = 4, **settings):
    """A prediction for a line of v5e chips, mesh axis "fsdp"."""
    text = f"HloModule jit_f, is_scheduled=true, num_partitions={devices}\n\n"
    # Somewhere in it there is an estimate.
    others = (f"%unused () -> () {{\n  ROOT %u = f32[] add(%u, %u), {cycles(1.0)}\n}}", *others)
    text += "\n\n".join([*others, "ENTRY %main () -> f32[] {\n" + body + "\n}\n"])
    settings = {
        "chip": V5E,
        "mesh": {"fsdp": devices},
        "network": box("TPU v5e", devices, 1),
        "calibration": RAW,
    } | settings
    return predict(parse(text), **settings)


P = "  %p = bf16[1048576]{0} parameter(0)\n"
GROUPS = "replica_groups={{0,1,2,3}}"
# A whole array of 4 MiB over a line of 4: three quarters of it over one link.
GATHER_SECONDS = 3 * 2 * MB / LINK + 3 * HOP_SECONDS
START = f"  %start = (bf16[1048576]{{0}}, bf16[4194304]{{0}}) all-gather-start(%p), channel_id=2, {GROUPS}\n"
DONE = "  %done = bf16[4194304]{0} all-gather-done(%start)\n"


def test_the_core_runs_what_stands_in_order():
    found = schedule(
        P + f"  %a = bf16[1048576]{{0}} add(%p, %p), {cycles(2e-3)}\n  %c = bf16[1048576]{{0}} copy(%a), {cycles(1e-3)}"
    )
    assert found.step_seconds == pytest.approx(3e-3, rel=1e-6)
    assert found.categories["elementwise"] == pytest.approx(2e-3, rel=1e-6)
    assert found.categories["copies"] == pytest.approx(1e-3, rel=1e-6)
    add = found.losing(1)[0]
    # Both operands and the result, 2 MiB each.
    assert add.name == "a" and add.num_bytes == 6 * MB and add.floor_seconds == pytest.approx(6 * MB / BANDWIDTH)


def test_what_has_no_estimate_moves_its_bytes():
    found = schedule(P + "  %a = bf16[1048576]{0} add(%p, %p)")
    assert found.step_seconds == pytest.approx(6 * MB / BANDWIDTH)
    assert any("100.0% of the step has no estimate" in note for note in found.assumptions)


@pytest.mark.parametrize(("work", "exposed"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (3.0, 0.0)])
def test_what_is_left_of_a_collective_is_exposed(work, exposed):
    core = f"  %a = bf16[8]{{0:S(1)}} add(%b, %b), {cycles(work * GATHER_SECONDS)}\n"
    core += "  %b = bf16[8]{0:S(1)} parameter(1)\n"
    found = schedule(P + START + (core if work else "") + DONE)
    assert found.exposed_by_axis == pytest.approx({"fsdp": exposed * GATHER_SECONDS}, rel=1e-4, abs=1e-9)
    assert found.hidden_by_axis == pytest.approx({"fsdp": (1 - exposed) * GATHER_SECONDS}, rel=1e-3, abs=1e-9)
    assert found.collective_bytes == {"all-gather": 8 * MB}


def test_a_synchronous_collective_is_exposed():
    found = schedule(P + f"  %r = bf16[1048576]{{0}} all-reduce(%p), channel_id=2, {GROUPS}")
    seconds = 2 * 3 / 4 * 2 * MB / LINK + 6 * HOP_SECONDS
    assert found.step_seconds == found.exposed_seconds == pytest.approx(seconds)
    assert [(wait.is_async, wait.count) for wait in found.waits] == [(False, 1)]


def test_transfers_over_the_same_links_wait_for_each_other():
    second = START.replace("%start", "%other").replace("channel_id=2", "channel_id=3")
    last = DONE.replace("%done", "%end").replace("%start", "%other")
    found = schedule(P + START + second + DONE + last)
    assert found.step_seconds == pytest.approx(2 * GATHER_SECONDS)
    permutes = (
        "  %start = (bf16[1048576]{0}, bf16[1048576]{0}) collective-permute-start(%p), channel_id=2, "
        "source_target_pairs={{0,1},{1,2},{2,3}}\n"
        "  %back = (bf16[1048576]{0}, bf16[1048576]{0}) collective-permute-start(%p), channel_id=3, "
        "source_target_pairs={{1,0},{2,1},{3,2}}\n"
        "  %done = bf16[1048576]{0} collective-permute-done(%start)\n"
        "  %end = bf16[1048576]{0} collective-permute-done(%back)"
    )
    # A link carries both directions at once.
    assert schedule(P + permutes).step_seconds == pytest.approx(2 * MB / LINK + HOP_SECONDS)


# A gather that a fusion starts, another repeats beside its own work, and a third waits for.
INNER = (
    "%{name} () -> () {{\n  %q = bf16[1048576]{{0}} parameter(0)\n"
    "  %ag = bf16[4194304]{{0}} all-gather(%q), channel_id=7, replica_groups={{{{0,1,2,3}}}}\n"
    '  ROOT %c = bf16[4194304]{{0}} custom-call(%ag), custom_call_target="{target}"\n}}'
)
ASYNC = [
    INNER.format(name="begins", target="AsyncCollectiveStart"),
    INNER.format(name="carries", target="ConcatBitcast"),
    INNER.format(name="ends", target="AsyncCollectiveDone"),
]
FUSIONS = (
    P + "  %f = bf16[4194304]{0} fusion(%p), calls=%begins\n"
    f"  %g = bf16[4194304]{{0}} fusion(%p), calls=%carries, {cycles(GATHER_SECONDS / 2)}\n"
    f"  %h = bf16[4194304]{{0}} fusion(%p), calls=%carries, {cycles(GATHER_SECONDS / 4)}\n"
    "  %i = bf16[4194304]{0} fusion(%p), calls=%ends"
)


def test_a_collective_that_fusions_repeat_is_one():
    found = schedule(FUSIONS, *ASYNC)
    assert found.collective_bytes == {"all-gather": 8 * MB}
    assert found.exposed_seconds == pytest.approx(GATHER_SECONDS / 4, rel=1e-4)
    assert found.step_seconds == pytest.approx(GATHER_SECONDS, rel=1e-4)


def test_a_loop_may_carry_what_began_outside():
    loop = (
        "%condition () -> () {\n  %t = (s32[]) parameter(0)\n  %i = s32[] get-tuple-element(%t), index=0\n"
        "  %limit = s32[] constant(6)\n  ROOT %c = pred[] compare(%i, %limit), direction=LT\n}",
        "%body () -> () {\n  %t = (s32[]) parameter(0)\n  %i = s32[] get-tuple-element(%t), index=0\n"
        "  %two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n  %v = bf16[1048576]{0} parameter(1)\n"
        f"  %g = bf16[4194304]{{0}} fusion(%v), calls=%carries, {cycles(GATHER_SECONDS / 6)}\n"
        "  ROOT %r = (s32[]) tuple(%next)\n}",
    )
    body = (
        P + "  %zero = s32[] constant(0)\n  %given = (s32[]) tuple(%zero)\n"
        "  %f = bf16[4194304]{0} fusion(%p), calls=%begins\n"
        "  %w = (s32[]) while(%given), condition=%condition, body=%body\n"
        "  %i = bf16[4194304]{0} fusion(%p), calls=%ends"
    )
    found = schedule(body, *ASYNC, *loop)
    # Three turns of a sixth hide half of it.
    assert found.exposed_seconds == pytest.approx(GATHER_SECONDS / 2, rel=1e-3)
    assert found.categories["elementwise"] == pytest.approx(GATHER_SECONDS / 2, rel=1e-3)
    assert {one.name: one.count for one in found.spent}["g"] == 3


def test_copies_run_beside_the_core():
    copy = "  %s = (bf16[1048576]{0}, bf16[1048576]{0:S(1)}, u32[]) copy-start(%p)\n"
    done = "  %d = bf16[1048576]{0:S(1)} copy-done(%s)"
    seconds = 2 * MB / BANDWIDTH
    assert schedule(P + copy + done).categories["copies"] == pytest.approx(seconds)
    core = f"  %a = bf16[8]{{0:S(1)}} add(%b, %b), {cycles(seconds / 2)}\n  %b = bf16[8]{{0:S(1)}} parameter(1)\n"
    found = schedule(P + copy + core + done)
    assert found.categories["copies"] == pytest.approx(seconds / 2, rel=1e-3)
    assert found.step_seconds == pytest.approx(seconds, rel=1e-3)


def test_calibration_is_of_products_that_compute_bounds():
    product = (
        "  %w = bf16[4096,4096]{1,0} parameter(1)\n  %x = bf16[4096,4096]{1,0} parameter(2)\n"
        f"  %y = bf16[4096,4096]{{1,0}} convolution(%x, %w), dim_labels=bf_io->bf, {cycles(1e-3)}\n"
        f"  %v = bf16[1,4096]{{1,0}} parameter(3)\n"
        f"  %z = bf16[1,4096]{{1,0}} convolution(%v, %w), dim_labels=bf_io->bf, {cycles(1e-3)}\n"
    )
    found = schedule(P + product + START + DONE, calibration=Calibration(0.8, "a test"))
    # One row reads all of the kernel: the memory's bandwidth bounds it.
    assert {one.name: one.bound for one in found.spent} == {"y": "compute", "z": "memory"}
    assert found.step_seconds == pytest.approx(0.8e-3 + 1e-3 + GATHER_SECONDS, rel=1e-4)
    assert "products bound by compute: the compiler's cycles × 0.800 (a test)" in found.assumptions


def test_a_conditional_takes_its_longest_branch():
    branches = [
        f"%{name} () -> () {{\n  %v = bf16[8]{{0:S(1)}} parameter(0)\n"
        f"  ROOT %{name}.a = bf16[8]{{0:S(1)}} add(%v, %v), {cycles(seconds)}\n}}"
        for name, seconds in (("short", 1e-3), ("long", 2e-3))
    ]
    body = P + "  ROOT %c = bf16[8]{0} conditional(%p, %p, %p), branch_computations={%short, %long}"
    found = schedule(body, *branches)
    assert found.step_seconds == pytest.approx(2e-3, rel=1e-6) == sum(found.categories.values())


def whole(name: str, **settings):
    cases = {
        "train_v5e_4x4": ("TPU v5e", {"fsdp": 16, "tensor": 1}, snake()),
        "train_v5p_4x4x4": ("TPU v5p", {"data": 4, "fsdp": 16}, planes()),
        "slices_v5e": ("TPU v5e", {"slice": 2, "fsdp": 4}, box("TPU v5e", 2, 2, slices=2)),
        "decode_v5e": ("TPU v5e", {"tensor": 4}, box("TPU v5e", 2, 2)),
        "attention_v5e": ("TPU v5e", {"fsdp": 1}, box("TPU v5e", 1, 1)),
    }
    chip, mesh, network = cases[name]
    return predict(program(name), **({"chip": CHIP[chip], "mesh": mesh, "network": network} | settings))


@pytest.mark.parametrize("name", ["train_v5e_4x4", "train_v5p_4x4x4", "slices_v5e", "decode_v5e", "attention_v5e"])
def test_a_program_adds_up(name):
    found = whole(name)
    assert sum(found.categories.values()) == pytest.approx(found.step_seconds, rel=1e-9)
    assert found.categories["collectives"] == pytest.approx(found.exposed_seconds)
    assert 0 < found.hfu < 1 and all(one.seconds >= 0 for one in found.spent)
    assert found.assumptions[0] == "a prediction: nothing ran on a TPU"
    assert not any("another computation" in note or "unknown work" in note for note in found.assumptions)
    assert json.loads(json.dumps(found.to_json()))["step_seconds"] == found.step_seconds


@pytest.mark.parametrize(("name", "chips"), [("train_v5e_4x4", 16), ("train_v5p_4x4x4", 64)])
def test_flops_of_a_step_are_those_of_the_ledger(name, chips):
    """Scanned layers, windowed einsums, batch axes written as windows: every one of them is counted as often as it
    runs. Both programs do 8 rows of 2048 a chip."""
    model = configs.load("dense-1b").train().model
    expected = ledger(
        model, sequence_length=2048, batch_size=8 * chips, attention="blocks", query_block=256, remat="full",
        fused_attention=True,
    )  # fmt: skip
    found = whole(name)
    # Not quite: the compiler leaves a part of the causal blocks' recomputation out.
    assert found.flops * chips == pytest.approx(expected.hardware_flops, rel=1e-3)
    assert found.mfu(expected.model_flops / chips) == pytest.approx(
        found.hfu * expected.model_flops / expected.hardware_flops, rel=1e-3
    )


def test_a_windowed_einsum_hides_its_permutes_and_loses_in_its_products():
    found = whole("train_v5e_4x4")
    permutes = next(one for one in found.transfers if one.kind == "collective-permute")
    assert permutes.axes == ("fsdp",) and permutes.hidden_seconds > 10 * permutes.exposed_seconds
    assert all(one.category == "matmul" and one.count == 80 for one in found.losing(3))


def test_axes_of_a_mesh_are_told_apart():
    found = whole("train_v5p_4x4x4")
    assert set(found.exposed_by_axis) == {"data", "fsdp", "data × fsdp"}
    assert set(found.collective_bytes) == {"all-gather", "all-reduce", "collective-permute", "reduce-scatter"}
    # Kernels and embedding are gathered for the forward and the backward pass, in bfloat16: twice their bytes at least.
    assert found.collective_bytes["all-gather"] > 2 * 2 * 1.28e9


def test_the_compilers_single_ring_is_priced_as_one():
    """Gradients of 2048 × 8192 in bfloat16 are scattered along one ring through a plane of 4 × 4 chips."""
    found = whole("train_v5p_4x4x4")
    scattered = [wait for wait in found.waits if wait.collective.num_bytes == 2 * 2048 * 8192]
    assert {wait.collective.kind for wait in scattered} >= {"reduce-scatter"}
    seconds = 15 / 16 * 2 * 2048 * 8192 / (2 * 90e9) + 8 * HOP_SECONDS
    for wait in scattered:
        if wait.collective.kind == "reduce-scatter":
            assert wait.seconds / wait.count == pytest.approx(seconds)


def test_slices_exchange_gradients():
    """Each chip its quarter of two kernels of 1024 × 1024, in bfloat16, and the loss."""
    found = whole("slices_v5e")
    (between,) = [one for one in found.transfers if one.axes == ("slice",)]
    assert between.kind == "all-reduce" and between.count == 3
    assert between.num_bytes == 2 * 256 * 1024 * 2 + 4 * 128
    # One after the other.
    seconds = between.num_bytes / 3.125e9 + 3 * SLICE_SECONDS
    assert between.exposed_seconds + between.hidden_seconds == pytest.approx(seconds, rel=0.2)
    assert between.exposed_seconds > 0.9 * seconds


def test_stacked_caches_are_copied():
    """The copies of a scanned decode step take most of it."""
    found = whole("decode_v5e")
    assert found.categories["copies"] > 0.5 * found.step_seconds
    assert all(one.category == "copies" for one in found.losing(4))


def test_kernels_are_priced_by_their_shapes():
    """Queries (1, 1024, 4, 128): half of 1024² scores for each head; 2, 3 and 4 products of them."""
    found = whole("attention_v5e", calibration=RAW)
    kernels = {one.name: one for one in found.spent if one.opcode == "custom-call"}
    product = 2 * 4 * 1024 * 1024 * 128 / 2
    assert [kernels[name].flops for name in ("attention_forward.1", "attention_d_queries.1", "attention_d_keys.1")] == [
        2 * product,
        3 * product,
        4 * product,
    ]
    assert kernels["attention_forward.1"].seconds == pytest.approx(2 * product / 197e12 / PALLAS_SHARE)
    assert not kernels["attention_forward.1"].priced and any("Pallas" in note for note in found.assumptions)


def test_a_ragged_product_is_a_kernel():
    """4096 rows, each by one of 8 kernels of 1024 × 2048; the metadata's kernel is not a product."""
    found = schedule(
        "  %i = s32[39]{0} parameter(0)\n  %x = bf16[4096,1024]{1,0} parameter(1)\n"
        "  %w = bf16[8,1024,2048]{2,1,0} parameter(2)\n"
        '  %m = s32[9]{0} custom-call(%i), custom_call_target="tpu_custom_call"\n'
        '  %y = bf16[4096,2048]{1,0} custom-call(%i, %x, %w), custom_call_target="tpu_custom_call", '
        'frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,1024,1280"}'
    )
    product = {one.name: one for one in found.spent}["y"]
    assert product.flops == 2 * 4096 * 1024 * 2048 and product.category == "matmul"
    assert product.seconds == pytest.approx(product.flops / 197e12 / PALLAS_SHARE)
    assert "a kernel of unknown work (m) takes as long as its bytes" in found.assumptions


def test_scopes_of_attention():
    assert is_attention(
        "jit(step)/jvp()/while/body/closed_call/attention/shard_map/attention/btkgh,bskh->bktgs/dot_general"
    )
    assert is_attention("jit(f)/transpose(jvp(attention))/attention/attention_d_keys/pallas_call")
    assert is_attention("jit(decode)/attention/paged_attention/dot_general")
    assert not is_attention("jit(step)/jvp()/while/body/closed_call/attention/btd,dnh->btnh/dot_general")


def test_more_than_the_peak_is_refused():
    found = whole("train_v5p_4x4x4")
    with pytest.raises(ValueError, match=r"would be \d+% MFU.*give the FLOPs of one device"):
        found.mfu(found.step_seconds * 460e12)
    # 0.70 ms of products at the peak.
    product = (
        "  %w = bf16[4096,4096]{1,0} parameter(1)\n"
        f"  %y = bf16[4096,4096]{{1,0}} convolution(%w, %w), dim_labels=bf_io->bf, {cycles(0.5e-3)}\n"
    )
    with pytest.raises(ValueError, match="140% of TPU v5e's peak: something in its text was not understood"):
        schedule(P + product)


def test_what_can_not_be_predicted_is_refused():
    for name in ("cpu", "gpu"):
        found = program(name)
        devices = found.num_devices
        with pytest.raises(ValueError, match="has no estimated cycles: only TPU's compiler writes them"):
            predict(found, chip=V5E, mesh={"fsdp": devices}, network=box("TPU v5e", devices, 1))
    with pytest.raises(ValueError, match=r"mesh \{'fsdp': 8\}.*a program of 16 devices"):
        whole("train_v5e_4x4", mesh={"fsdp": 8})
    with pytest.raises(ValueError, match="no dense float8 peak is published for TPU v5e"):
        whole("train_v5e_4x4", dtype="float8")
    with pytest.raises(ValueError, match="no clock is known for H100 SXM"):
        clock_of(CHIP["H100 SXM"])


def test_a_generation_without_published_steps_says_so():
    other = dataclasses.replace(V5E, name="TPU v9")
    assert calibration_of(other).scale == 1.0 and "not calibrated on TPU v9" in calibration_of(other).sentence
