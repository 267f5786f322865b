"""Categories of a step's time, against traces with known answers."""

import random

import pytest

from perf.breakdown import CATEGORIES, breakdown
from perf.hlo import parse
from perf.op_kind import kernel_kind, plain_scope, program_ops
from perf.trace import read_trace
from tests.perf.xspace import Op, gpu_step, marks, write

# A step of 10 µs: a gather that attention and a product hide in part, a gap between kernels, then nothing.
COMPUTE = (
    ("nvjet_tst_128x256", "dot.1", 0, 3000),
    ("cudnn_generated_fort_native_sdpa_sm90_knob", "custom-call.2", 3000, 2000),
    ("loop_add_fusion", "loop_add_fusion", 6000, 1000),
    ("copy_fusion", "copy.3", 7200, 800),
)
GATHER = (("ncclDevKernel_AllGather_RING_LL", "all-gather-start.1", 2500, 3500),)
KNOWN = {
    "matmul": 3000,
    "attention": 2000,
    "collective": 1000,
    "elementwise": 1000,
    "launch": 200,
    "copy": 800,
    "input": 1200,
    "host": 800,
    "other": 0,
}


def planes(*starts: int, late: int = 0):
    """Two devices, the second's gather `late`: it arrives last, and its transfer is shorter by as much."""
    compute = [op for start in starts for op in gpu_step(start, COMPUTE)]
    late_gather = [(name, op, at + late, length - late) for name, op, at, length in GATHER]
    return {
        "/device:GPU:0": {"Stream #1": compute, "Stream #2": [o for s in starts for o in gpu_step(s, GATHER)]},
        "/device:GPU:1": {"Stream #1": compute, "Stream #2": [o for s in starts for o in gpu_step(s, late_gather)]},
        "/host:CPU": {
            "python": marks(*((i, s, 100) for i, s in enumerate(starts)), inputs=[(s + 8500, 1200) for s in starts])
        },
    }


def test_every_category_of_a_known_step(tmp_path):
    times = breakdown(read_trace(write(tmp_path, planes(5000, 15000, 25000))))
    assert times.program == "jit_step" and times.steps == 2 and times.step == 10_000
    assert {name: times.per_step(name) for name in CATEGORIES} == KNOWN
    assert times.collective == 3500 and times.hidden == 2500 and times.overlap == pytest.approx(2500 / 3500)
    assert times.step_times == (10_000, 10_000)
    assert times.has_marks and times.whole and times.spread == 1.0
    # Up to 2 µs: attention, the fusion and the copy; up to 5: the product and the gather.
    assert times.devices[0].lengths == (6, 4, 0, 0, 0, 0, 0)
    longest = times.devices[0].ops[0]
    assert (longest.op, longest.kind, longest.exposed, longest.count) == ("dot.1", "matmul", 3000, 1)


def test_waiting_for_the_last_device_is_no_transfer(tmp_path):
    """The second device comes 3 µs late, when 500 ns of what is exposed are left."""
    trace = planes(5000, 15000, 25000, late=3000)
    times = breakdown(read_trace(write(tmp_path, trace)))
    # Exposed from 5 µs to 6 µs on both; on the second from 5.5 µs on.
    assert times.transfers == {"all-gather-start.1": 500}
    assert times.collective_wait == pytest.approx((1000 + 500) / 2 - 500)
    # Before it arrives the second device is idle within its program.
    assert times.devices[1].nanoseconds["launch"] == 2 * (200 + 500)


def test_one_step_alone_is_that_step(tmp_path):
    times = breakdown(read_trace(write(tmp_path, planes(5000))))
    assert times.steps == 1 and times.step == 8000 and not times.whole
    assert times.per_step("host") == times.per_step("input") == 0


def test_other_programs_and_missing_marks(tmp_path):
    trace = planes(5000, 15000, 25000)
    other = gpu_step(13100, [("iota", "iota.1", 0, 500)], module="jit_other")
    trace["/device:GPU:0"]["Stream #1"] += other
    del trace["/host:CPU"], trace["/device:GPU:1"]
    times = breakdown(read_trace(write(tmp_path, trace)))
    assert times.program == "jit_step" and not times.has_marks
    # What ran between is work, of one step in two; the rest of the gap is the host's.
    assert times.per_step("elementwise") == 1000 + 250 and times.per_step("host") == 2000 - 250
    assert times.per_step("input") == 0 and times.collective_wait is None and times.spread is None


def test_categories_sum_to_the_window_whatever_ran(tmp_path):
    draw = random.Random(0)
    names = ["dot.1", "all-reduce.2", "loop_fusion.3", "copy.4", "while.5", "custom-call.6"]
    for case in range(20):
        ops = {}
        for stream in range(3):
            found, at = [], 0
            for _ in range(40):
                at += draw.randint(0, 30)
                length = draw.randint(1, 60)
                found.append((draw.choice(names), at, length))
                at += length if draw.random() < 0.7 else draw.randint(1, length)
            ops[f"Stream #{stream}"] = [op for name, at, n in found for op in gpu_step(0, [(name, name, at, n)])]
        host = marks(*((i, 200 * i, 50) for i in range(3)), inputs=[(draw.randint(0, 900), 90) for _ in range(5)])
        path = write(tmp_path / str(case), {"/device:GPU:0": ops, "/host:CPU": {"python": host}})
        (device,) = breakdown(read_trace(path)).devices
        assert sum(device.nanoseconds.values()) == device.window[1] - device.window[0]
        assert device.collective - device.hidden == device.nanoseconds["collective"]


def test_a_trace_without_programs_is_refused(tmp_path):
    path = write(tmp_path, {"/device:GPU:0": {"Stream #1": [Op("kernel", 0, 10)]}})
    with pytest.raises(ValueError, match="says of no op which program it is of"):
        breakdown(read_trace(path))


TEXT = """HloModule jit_step, entry_computation_layout={()->f32[]}, num_partitions=2

%inner (a: bf16[8,16], b: bf16[16,8]) -> bf16[8,8] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  ROOT %dot.9 = bf16[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (c: bf16[8,16]) -> bf16[16,8] {
  %c = bf16[8,16]{1,0} parameter(0)
  ROOT %transpose.8 = bf16[16,8]{0,1} transpose(%c), dimensions={1,0}
}

%added (d: bf16[8,8]) -> bf16[8,8] {
  %d = bf16[8,8]{1,0} parameter(0)
  ROOT %add.7 = bf16[8,8]{1,0} add(%d, %d)
}

ENTRY %main (p: bf16[8,16], q: bf16[16,8]) -> bf16[8,8] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[16,8]{1,0} parameter(1)
  %fusion.1 = bf16[8,8] fusion(%p, %q), calls=%inner, metadata={op_name="jit(step)/transpose(jvp(mlp))/dot_general"}
  %fusion.2 = bf16[16,8]{1,0} fusion(%p), kind=kLoop, calls=%moved
  %fusion.3 = bf16[8,8] fusion(%fusion.1), calls=%added, metadata={op_name="jit(step)/jvp(attention)/attention/exp"}
  %fusion.4 = bf16[8,8]{1,0} fusion(%fusion.1), kind=kLoop, calls=%added
  %fusion.5 = bf16[8,8]{1,0} fusion(%p, %q), calls=%inner, metadata={op_name="jit(step)/attention/btd,dnh->btnh/dot"}
  %custom-call.6 = bf16[8,8]{1,0} custom-call(%p, %q), custom_call_target="__cublas$lt$matmul"
  ROOT %all-reduce.1 = bf16[8,8]{1,0} all-reduce(%fusion.3), replica_groups={{0,1}}, to_apply=%added
}
"""


def test_kinds_come_from_the_program():
    facts = program_ops(parse(TEXT))
    assert {name: facts[name].kind for name in facts if "." in name} == {
        "dot.9": "matmul",
        "transpose.8": "copy",
        "add.7": "elementwise",
        "fusion.1": "matmul",
        "fusion.2": "copy",
        "fusion.3": "attention",
        "fusion.4": "elementwise",
        # A projection is in the layer's scope of attention, and is no attention.
        "fusion.5": "matmul",
        "custom-call.6": "matmul",
        "all-reduce.1": "collective",
    }
    assert facts["fusion.1"].scope == "step/mlp/dot_general"
    assert plain_scope("jit(step)/transpose(jvp())/while/body") == "step/while/body"


@pytest.mark.parametrize(
    ("kernel", "op", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", None, "matmul"),
        ("nvjet_sm90_tst_128x256_64x4", "custom-call.12", "matmul"),
        ("gemm_fusion_dot_12", "gemm_fusion_dot.12", "matmul"),
        ("ynn_fusion.3", "ynn_fusion.3", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "custom-call.4", "attention"),
        ("flash_attention_kernel", None, "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reduce-scatter-start.1", "collective"),
        ("all-reduce-scatter.5", "all-reduce-scatter.5", "collective"),
        ("async-collective-start.2", "async-collective-start.2", "collective"),
        ("MemcpyD2D", None, "copy"),
        ("Memset", "memset.1", "copy"),
        ("wrapped_transpose", "wrapped_transpose", "copy"),
        ("loop_add_fusion", "loop_add_fusion", "elementwise"),
        ("input_reduce_fusion", "input_reduce_fusion.3", "elementwise"),
        ("loop_convert_fusion", "loop_convert_fusion", "elementwise"),
        ("while.3", "while.3", "other"),
        ("custom-call.77", "custom-call.77", "other"),
    ],
)
def test_kinds_come_from_names_where_there_is_no_program(kernel, op, kind):
    assert kernel_kind(kernel, op, None) == kind
