"""Every finding: from a planted fault with known figures, and not without it."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from perf.breakdown import breakdown
from perf.doctor import measured_costs, predicted_costs
from perf.findings import DOMAINS, Cost, Evidence, Finding, examine, ordered
from perf.hlo import parse
from perf.prediction import predict
from perf.run_facts import RunFacts
from perf.serving_facts import DecodePoint, Drafts, ServingFacts
from perf.trace import read_trace
from serving.config import ServeRun
from tests.perf import hlo_programs
from tests.perf.xspace import Op, gpu_step, marks, write
from training.config import TrainRun

# What every check looks at, in one step of 100 ms of which most is products.
STEP = 100_000


def run_facts(**changes) -> RunFacts:
    facts = RunFacts(
        folder=Path("runs/x"),
        steps=100,
        measured=97,
        step_seconds=0.1,
        input_seconds=0.0005,
        mfu=0.5,
        mfu_reason=None,
        hfu=0.51,
        expert_load_max=1.2,
        dropped=0.0,
        num_devices=1,
        chip="H100 SXM",
        summary={},
    )
    return dataclasses.replace(facts, **changes)


def traced(folder, step, *, devices=1, host=(), late=0, period=STEP) -> Evidence:
    """Evidence of three runs of a step on GPUs: (kernel, op, start, length)."""
    starts = [10_000 + period * number for number in range(3)]
    planes = {}
    for device in range(devices):
        shifted = [(name, op, at + late * device, length) for name, op, at, length in step]
        planes[f"/device:GPU:{device}"] = {"Stream #1": [o for at in starts for o in gpu_step(at, shifted)]}
    host = [*marks(*((i, at, 50) for i, at in enumerate(starts)), inputs=[(1, 2)]), *host]
    timeline = read_trace(write(folder, {**planes, "/host:CPU": {"python": host}}))
    times = breakdown(timeline)
    return Evidence(
        timeline=timeline, breakdown=times, costs=measured_costs(times), step_ns=times.step, platform=timeline.platform
    )


def names(evidence: Evidence) -> list[str]:
    return [one.name for one in examine(evidence)]


BUSY = (("nvjet", "dot.1", 0, 70_000), ("loop_fusion", "loop_fusion", 70_000, 29_900))


def test_a_healthy_trace_and_run_have_no_finding(tmp_path):
    evidence = dataclasses.replace(traced(tmp_path, BUSY), run=run_facts())
    assert names(evidence) == []


def test_input_bound_by_the_trace(tmp_path):
    step = (("nvjet", "dot.1", 0, 60_000),)
    host = [Op("input", 10_000 + STEP * n + 60_000, 39_000) for n in range(3)]
    (finding,) = examine(traced(tmp_path, step, host=host))
    assert (finding.name, finding.domain) == ("input-bound", "input")
    assert finding.milliseconds == pytest.approx(0.039) and "data.prefetch" in finding.setting


def test_input_bound_by_the_runs_own_clock():
    (finding,) = examine(Evidence(run=run_facts(input_seconds=0.03)))
    assert finding.name == "input-bound" and finding.milliseconds == pytest.approx(30)
    assert "30 ms of a step of 100.00 ms" in finding.sentence.replace("30.00", "30")


def test_host_bound(tmp_path):
    evidence = traced(tmp_path, (("nvjet", "dot.1", 0, 60_000),))
    (finding,) = examine(evidence)
    assert finding.name == "host-bound" and finding.milliseconds == pytest.approx(0.04)


def test_one_step_that_the_host_held_up_is_no_finding(tmp_path):
    starts = (0, STEP, 2 * STEP, 5 * STEP)
    kernels = [op for at in starts for op in gpu_step(at, [("nvjet", "dot.1", 0, 99_000)])]
    timeline = read_trace(write(tmp_path, {"/device:GPU:0": {"Stream #1": kernels}}))
    times = breakdown(timeline)
    # Two steps of 100 µs and one of 300, of which the device works 99 each.
    assert times.per_step("host") == pytest.approx((1000 + 1000 + 201_000) / 3) and times.typical("host") == 1000
    assert names(Evidence(timeline=timeline, breakdown=times, step_ns=times.step, platform="gpu")) == []


def test_launch_bound(tmp_path):
    step = [("tiny_add_fusion", f"add_fusion.{n}", 1000 * n, 600) for n in range(100)]
    (finding,) = examine(traced(tmp_path, step))
    # 99 gaps of 400 ns within the program; the last one is between programs.
    assert finding.name == "launch-bound" and finding.milliseconds == pytest.approx(0.0396)
    assert "100 kernels a step, 100 of them" in finding.evidence[0]


def test_recompilation_is_no_fault_of_the_host(tmp_path):
    host = [Op("backend_compile_and_load", 10_000 + STEP * n + 60_000, 39_000) for n in range(3)]
    host += [Op("train", 10_000 + STEP * n + 60, 99_000, {"step_num": 10 + n}) for n in range(3)]
    findings = examine(traced(tmp_path, (("nvjet", "dot.1", 0, 60_000),), host=host))
    assert [one.name for one in findings] == ["recompilation"]
    assert findings[0].milliseconds == pytest.approx(3 * 39_000 / 6 / 1e6)


def test_a_slow_device(tmp_path):
    starts = [10_000 + STEP * n for n in range(3)]

    def kernels(compute: int) -> list[Op]:
        step = [("nvjet", "dot.1", 0, compute), ("ncclDevKernel", "all-reduce.1", compute, 99_000 - compute)]
        return [op for at in starts for op in gpu_step(at, step)]

    planes = {f"/device:GPU:{n}": {"Stream #1": kernels(80_000 if n == 2 else 60_000)} for n in range(4)}
    timeline = read_trace(write(tmp_path, planes))
    times = breakdown(timeline)
    evidence = Evidence(timeline=timeline, breakdown=times, step_ns=times.step, platform="gpu")
    findings = examine(evidence)
    assert findings[0].name == "device imbalance" and "Device 2" in findings[0].sentence
    assert findings[0].milliseconds == pytest.approx(0.02)
    # The others' waiting is no communication; the 19 µs that the slow one needs too are.
    assert times.collective_wait == pytest.approx(15_000)
    assert [one.name for one in findings[1:]] == ["serialized collective"]


def test_expert_imbalance_and_dropped_tokens():
    found = examine(Evidence(run=run_facts(expert_load_max=3.5, dropped=0.2)))
    assert {one.name for one in found} == {"expert imbalance", "dropped tokens"}
    assert all(one.milliseconds is None and one.reason for one in found)


def test_hfu_above_mfu():
    settings = {"layers": {"remat": "full"}}
    (finding,) = examine(Evidence(run=run_facts(mfu=0.45, hfu=0.6), settings=settings))
    assert finding.name == "HFU–MFU gap" and finding.milliseconds == pytest.approx(25)
    assert "layers.remat" in finding.setting and "now full" in finding.setting
    (finding,) = examine(Evidence(run=run_facts(mfu=0.45, hfu=0.6), settings={"layers": {"remat": "none"}}))
    assert finding.setting.startswith("kernels.attention")


# Programs, as small as the form that is looked for.

SUM = """
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.0 = f32[] add(%x, %y)
}
"""


def module(body: str, more: str = ""):
    return parse(
        f"HloModule jit_step, num_partitions=4\n{SUM}{more}\nENTRY %main (p: bf16[4096,4096]) -> f32[] {{\n{body}\n}}\n"
    )


P = "  %p = bf16[4096,4096]{1,0} parameter(0)\n"
DOT = "  %dot.1 = bf16[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
REDUCE = "  %all-reduce.1 = bf16[4096,4096]{1,0} all-reduce(%dot.1), replica_groups={{0,1,2,3}}, to_apply=%sum\n"
SLICE = (
    "  %i = s32[] constant(0)\n"
    "  ROOT %slice.1 = bf16[1024,4096]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={1024,4096}"
)
WHOLE = "  ROOT %out = bf16[4096,4096]{1,0} add(%all-reduce.1, %all-reduce.1)"


def of_program(program, milliseconds: dict[str, float], step: float = 100.0, **facts) -> Evidence:
    costs = {name: Cost(time * 1e6, time * 1e6) for name, time in milliseconds.items()}
    base = Evidence(program=program, costs=costs, step_ns=step * 1e6, predicted=True, platform="tpu")
    return dataclasses.replace(base, **facts)


def test_an_all_reduce_of_which_a_slice_is_kept():
    evidence = of_program(module(P + DOT + REDUCE + SLICE), {"dot.1": 70, "all-reduce.1": 30})
    (finding,) = examine(evidence)
    assert finding.name == "all-reduce where reduce-scatter would do" and finding.milliseconds == pytest.approx(15)
    assert finding.trial is not None and finding.trial.settings[0][0] == "xla_options"
    # All of it is used: it is what it has to be, and only in the way.
    whole = of_program(module(P + DOT + REDUCE + WHOLE), {"dot.1": 70, "all-reduce.1": 30}, mesh={"data": 1, "fsdp": 4})
    (finding,) = examine(whole)
    assert finding.name == "serialized collective" and "synchronous, over fsdp" in finding.evidence[0]
    assert names(of_program(module(P + DOT + REDUCE + WHOLE), {"dot.1": 98, "all-reduce.1": 2})) == []
    # XLA's CPU compiler has nothing else.
    assert "reduce-scatter" not in " ".join(names(dataclasses.replace(evidence, platform="cpu")))


def test_a_slice_within_a_fusion_is_found():
    fused = """
%part (a: bf16[4096,4096], k: s32[]) -> bf16[1024,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %k = s32[] parameter(1)
  %s = bf16[1024,4096]{1,0} dynamic-slice(%a, %k, %k), dynamic_slice_sizes={1024,4096}
  ROOT %n = bf16[1024,4096]{1,0} negate(%s)
}
"""
    use = (
        "  %i = s32[] constant(0)\n  ROOT %f = bf16[1024,4096]{1,0} fusion(%all-reduce.1, %i), kind=kLoop, calls=%part"
    )
    evidence = of_program(module(P + DOT + REDUCE + use, fused), {"dot.1": 70, "all-reduce.1": 30})
    assert names(evidence) == ["all-reduce where reduce-scatter would do"]
    # Another use of it needs all.
    also = fused.replace("  ROOT %n", "  %all = bf16[4096,4096]{1,0} negate(%a)\n  ROOT %n")
    used = of_program(module(P + DOT + REDUCE + use, also), {"dot.1": 70, "all-reduce.1": 30})
    assert names(used) == ["serialized collective"]


def test_a_shard_among_zeros_that_is_summed():
    body = (
        "  %p = bf16[64,4096]{1,0} parameter(0)\n  %i = s32[] constant(0)\n  %zero = bf16[] constant(0)\n"
        "  %zeros = bf16[4096,4096]{1,0} broadcast(%zero), dimensions={}\n"
        "  %own = bf16[4096,4096]{1,0} dynamic-update-slice(%zeros, %p, %i, %i)\n"
        "  %all-reduce.1 = bf16[4096,4096]{1,0} all-reduce(%own), replica_groups={{0,1,2,3}}, to_apply=%sum\n"
        "  ROOT %dot.1 = bf16[4096,4096]{1,0} dot(%all-reduce.1, %all-reduce.1), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}"
    )
    (finding,) = examine(of_program(module(body), {"dot.1": 70, "all-reduce.1": 30}))
    assert finding.name == "all-gather turned all-reduce" and finding.milliseconds == pytest.approx(15)


def test_windows_cost_what_their_products_lose():
    program = hlo_programs.program("train_v5e_4x4")
    prediction = predict(program, chip=hlo_programs.CHIP["TPU v5e"], mesh={"fsdp": 16}, network=hlo_programs.snake())
    evidence = Evidence(
        program=program,
        costs=predicted_costs(prediction),
        step_ns=prediction.step_seconds * 1e9,
        predicted=True,
        platform="tpu",
    )
    (finding, *rest) = examine(evidence)
    assert finding.name == "windowed-einsum loss" and finding.is_prediction and not rest
    # 2.75 s a step; without windows 2.1 s (compiled again, README.md).
    assert 300 < finding.milliseconds < 1000
    assert (
        "windowed_einsum" in finding.setting and finding.trial.option == f"--xla-options {finding.trial.settings[0][1]}"
    )


def test_a_sharded_step_on_v5p_has_no_finding():
    program = hlo_programs.program("train_v5p_4x4x4")
    prediction = predict(
        program, chip=hlo_programs.CHIP["TPU v5p"], mesh={"data": 4, "fsdp": 16}, network=hlo_programs.planes()
    )
    step = prediction.step_seconds * 1e9
    evidence = Evidence(
        program=program, costs=predicted_costs(prediction), step_ns=step, predicted=True, platform="tpu"
    )
    assert names(evidence) == []


def test_a_decode_step_that_copies_its_cache():
    program = hlo_programs.program("decode_v5e")
    evidence = Evidence(program=program, platform="tpu", decode=True)
    (finding,) = examine(evidence)
    assert finding.name == "stacked-cache copy in decode" and finding.milliseconds is None
    timed = of_program(program, {"constant_dynamic-slice_fusion.7": 25.0, "copy.49": 4.0}, decode=True)
    assert examine(timed)[0].milliseconds == pytest.approx(29)
    # A training step moves stacks through its loop as well: that is how a scan works.
    assert names(dataclasses.replace(evidence, decode=False)) == []


NORM = """
%slow (a: bf16[4096,4096]) -> (bf16[4096,4096], f32[4096]) {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %dot.2 = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %zero = f32[] constant(0)
  %reduce.1 = f32[4096]{0} reduce(%dot.2, %zero), dimensions={0}, to_apply=%sum, metadata={op_name="jit(step)/rms_norm/reduce_sum"}
  ROOT %t = (bf16[4096,4096]{1,0}, f32[4096]{0}) tuple(%dot.2, %reduce.1)
}
"""  # noqa: E501


def test_a_norm_that_slows_a_product_down():
    body = P + DOT + "  ROOT %fusion.1 = (bf16[4096,4096]{1,0}, f32[4096]{0}) fusion(%p), kind=kOutput, calls=%slow"
    evidence = of_program(module(body, NORM), {"dot.1": 30, "fusion.1": 70})
    (finding,) = examine(evidence)
    assert finding.name == "unfused norm in matmul" and finding.milliseconds == pytest.approx(40)
    assert "43%" in finding.sentence
    assert names(of_program(module(body, NORM), {"dot.1": 45, "fusion.1": 55})) == []


def test_axes_that_no_tile_divides():
    body = (
        "  %p = bf16[4096,4096]{1,0} parameter(0)\n  %q = bf16[4096,4099]{1,0} parameter(1)\n"
        "  %dot.1 = bf16[4096,4096]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  ROOT %dot.2 = bf16[4096,4099]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    settings = {"model": {"vocab_size": 4099, "embed_dim": 4096}}
    evidence = of_program(module(body), {"dot.1": 30, "dot.2": 60}, platform="gpu", settings=settings)
    (finding,) = examine(evidence)
    assert finding.name == "tensor-core misalignment"
    assert finding.milliseconds == pytest.approx(60 - 30 * 4099 / 4096)
    assert finding.setting == "model.vocab_size=4104 (now 4099)"
    aligned = of_program(module(body.replace("4099", "4104")), {"dot.1": 30, "dot.2": 60}, platform="gpu")
    assert names(aligned) == []
    # Where no kernel says which product it is, there is no figure.
    (finding,) = examine(of_program(module(body), {"nvjet": 90}, platform="gpu"))
    assert finding.milliseconds is None and "command buffers" in finding.reason
    # TPU's tiles are wider.
    narrow = module(body.replace("4099", "4104"))
    assert names(of_program(narrow, {"dot.1": 30, "dot.2": 60})) == ["tensor-core misalignment"]


def serving(**changes) -> ServingFacts:
    points = (DecodePoint(1, 0.0058, 0.774), DecodePoint(32, 0.0063, 0.76), DecodePoint(256, 0.0113, 0.3))
    return dataclasses.replace(ServingFacts("bench.json", "NVIDIA H100 80GB HBM3", points, None, 0), **changes)


def test_a_healthy_server_has_no_finding():
    paying = Drafts(4000, 3000, 1000, 4000, None, 0.008, 0.006)
    assert names(Evidence(serving=serving(drafts=paying))) == []


def test_low_mbu():
    points = (DecodePoint(1, 0.0186, 0.24), DecodePoint(8, 0.019, 0.5))
    (finding,) = examine(Evidence(serving=serving(decode=points)))
    assert finding.name == "low MBU in decode" and finding.milliseconds == pytest.approx(18.6 * (1 - 0.24 / 0.6))
    assert names(Evidence(serving=serving(decode=(DecodePoint(1, 0.01, None),)))) == []


def test_drafts_that_cost_more_than_they_give():
    """1.2 tokens in 9 ms are 7.5 ms a token; without drafts 6 ms."""
    losing = Drafts(4000, 200, 1000, 1200, None, 0.009, 0.006)
    (finding,) = examine(Evidence(serving=serving(drafts=losing)))
    assert finding.name == "speculation that does not pay" and finding.milliseconds == pytest.approx(1.5)
    given_up = Drafts(400, 20, 100, 120, 900, None, None)
    (finding,) = examine(Evidence(serving=serving(drafts=given_up)))
    assert finding.milliseconds is None and "90% of rounds had none" in finding.sentence


def test_compilations_while_serving():
    (finding,) = examine(Evidence(serving=serving(compiles=3)))
    assert finding.name == "recompilation" and finding.domain == "host"


def test_the_order_is_that_of_decision_then_of_time():
    def one(domain: str, milliseconds: float | None) -> Finding:
        reason = "unknown" if milliseconds is None else None
        return Finding(f"{domain} {milliseconds}", domain, "", (), milliseconds, "", reason=reason)

    found = ordered([one("memory", 9), one("compute", None), one("compute", 1), one("host", 2), one("compute", 5)])
    assert [entry.name for entry in found] == ["host 2", "compute 5", "compute 1", "compute None", "memory 9"]
    assert DOMAINS == ("input", "host", "communication", "compute", "memory")


def fields_of(kind, prefix="") -> set[str]:
    found = set()
    for field, hint in typing.get_type_hints(kind).items():
        found.add(prefix + field)
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= fields_of(part, f"{prefix}{field}.")
    return found


def test_every_setting_that_is_named_exists():
    """A finding's text names settings as the command line spells them."""
    known = fields_of(TrainRun) | fields_of(ServeRun)
    groups = {name.partition(".")[0] for name in known if "." in name}
    text = "".join(
        (Path(__file__).parents[2] / "perf" / f"findings_{part}.py").read_text()
        for part in ("run", "program", "communication", "serving")
    )
    named = set(re.findall(rf"(?<!evidence\.)\b((?:{'|'.join(sorted(groups))})(?:\.[a-z_]+)+)\b", text))
    named = {name for name in named if not name.endswith((".jsonl", ".json", ".py"))}
    assert len(named) > 20 and "model.moe.load_balance_coef" in named
    assert not named - known
