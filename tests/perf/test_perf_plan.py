"""`python -m perf plan`: candidates are what a run's own checks accept, the best are compiled, and all is said."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import types

import jax
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from model.config import ModelConfig, MoEConfig
from perf.command import main
from perf.commands import plan as command
from perf.commands.plan_compile import Compiled, exhausted, key, read, run_jobs, write
from perf.plan import (
    Answer,
    Candidate,
    Entry,
    Group,
    Ranked,
    command_line,
    divisors,
    enumerate_candidates,
    layouts,
    next_smaller,
    rank,
    shortlist,
)
from perf.plan_report import plan_report
from perf.report import html_page, json_text
from perf.roofline import chip_named
from perf.step_model import Layout, StepEstimate
from training.config import DataConfig, LayerConfig, TrainRun
from training.resolve import resolve

DENSE = ModelConfig(
    vocab_size=256, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=64
)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=96))
GIB = 2**30


def tiny(model: ModelConfig = DENSE, rows: int = 8) -> TrainRun:
    data = DataConfig(source="random", sequence_length=32, batch_size=rows)
    return TrainRun(name="tiny", model=model, data=data, steps=200, layers=LayerConfig(document_mask=False))


def made(seconds: float, gib: float) -> StepEstimate:
    return StepEstimate({"products": seconds}, {}, {"state": gib * GIB}, 10**12)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["plan", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Candidates


@given(st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_layouts_are_all_that_multiply_to_the_devices(num_devices):
    found = list(layouts(num_devices))
    expected = {
        (*sizes, 1) for sizes in itertools.product(divisors(num_devices), repeat=4) if math.prod(sizes) == num_devices
    }
    assert len(found) == len(set(found)) and {dataclasses.astuple(one) for one in found} == expected
    assert all(one.num_devices == num_devices for one in found)
    # No other axis goes over several slices.
    joined = list(layouts(3 * num_devices, num_slices=3))
    assert joined == [dataclasses.replace(one, slice=3) for one in found]
    assert all(one.num_devices == 3 * num_devices for one in joined)


def test_divisors():
    assert divisors(1) == [1] and divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("rows", [4, 12])
def test_candidates_are_what_a_run_can_be_started_with(model, rows):
    """The command's checks need no devices; train.py's own, on eight of them, must say the same of every candidate."""
    base, accepted = tiny(model, rows), 0
    for candidate in enumerate_candidates(8, (1, 2), ("full",), (True,)):
        try:
            resolve(command.apply(base, candidate), jax.devices()[:8])
            refused = None
        except ValueError as error:
            refused = str(error)
        accepted += refused is None
        assert command.refusal(base, candidate, 8) == refused
    assert accepted > 0


def test_a_candidate_becomes_settings():
    base = dataclasses.replace(tiny(), xla_options=("xla_a=1",))
    changed = command.apply(base, Candidate(Layout(2, 1, 1, 2), 4, "dots", False, ("xla_b=2",)))
    assert (changed.mesh.data, changed.mesh.fsdp, changed.mesh.expert, changed.mesh.tensor) == (2, 1, 1, 2)
    assert (changed.accumulation, changed.layers.remat, changed.layers.scan) == (4, "dots", False)
    assert changed.xla_options == ("xla_a=1", "xla_b=2") and changed.data == base.data
    assert not changed.layers.document_mask


def test_rows_that_no_mesh_takes_go_on_each_device():
    asked = command.Settings(name="tiny", topology="v5e:2x2")
    changed, accepted, notes = command.settle(asked, tiny(rows=8), 4, (True,))
    assert changed.data.batch_size == 8 and accepted and not notes
    # Tensor parallelism ends at the 2 kv heads: 3 rows can't be on 8 devices.
    changed, accepted, notes = command.settle(asked, tiny(rows=3), 8, (True,))
    assert (
        changed.data.batch_size == 24 and accepted and notes == ["no mesh takes the config's 3 rows; 3 on each device"]
    )
    per_device = dataclasses.replace(asked, batch_per_device=2)
    assert command.settle(per_device, tiny(rows=3), 8, (True,))[0].data.batch_size == 16
    with pytest.raises(ValueError, match=r"no mesh over 8 devices can run tiny; the first of them: .*divisible"):
        command.settle(dataclasses.replace(asked, batch=3), tiny(), 8, (True,))


# Which are compiled


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_ranking_keeps_the_best(figures):
    """By brute force: the fastest of those that fit come first, the smallest of the others after them."""
    candidates = [Candidate(Layout(data=2**number)) for number in range(len(figures))]
    estimates = {one: made(*figure) for one, figure in zip(candidates, figures, strict=True)}
    ranked = rank(candidates, estimates.__getitem__, 3 * GIB)
    fitting = [seconds for seconds, gib in figures if gib <= 3]
    others = [gib for _, gib in figures if gib > 3]
    assert [one.estimate.seconds for one in ranked[: len(fitting)]] == sorted(fitting)
    assert [one.estimate.memory_bytes / GIB for one in ranked[len(fitting) :]] == sorted(others)
    assert {one.candidate for one in ranked} == set(candidates)


def test_of_equals_the_simpler_comes_first():
    simple, cut, again = Candidate(Layout(fsdp=4)), Candidate(Layout(fsdp=4), 2), Candidate(Layout(fsdp=4), 1, "full")
    split = Candidate(Layout(tensor=4))
    ranked = rank([split, cut, again, simple], lambda one: made(1, 1), 2 * GIB)
    assert [one.candidate for one in ranked] == [simple, again, cut, split]


def test_a_shortlist_has_the_best_of_each_mesh():
    first, again, second, third = (
        Ranked(Candidate(layout, accumulation), made(seconds, 1), True)
        for layout, accumulation, seconds in (
            (Layout(fsdp=4), 1, 1),
            (Layout(fsdp=4), 2, 2),
            (Layout(fsdp=2, data=2), 1, 3),
            (Layout(tensor=4), 1, 4),
        )
    )
    ranked = [first, again, second, third]
    assert shortlist(ranked, 1) == [first]
    assert shortlist(ranked, 2) == [first, second]
    assert shortlist(ranked, 9) == [first, second, third]


def test_what_follows_a_candidate_that_does_not_fit():
    layout, other = Layout(fsdp=4), Layout(tensor=4)
    big, large, small, least = (
        Ranked(Candidate(layout, accumulation), made(seconds, gib), True)
        for accumulation, seconds, gib in ((1, 1, 10), (2, 2, 7), (4, 3, 4), (8, 4, 3))
    )
    elsewhere = Ranked(Candidate(other), made(0.5, 1), True)
    ranked = [elsewhere, big, large, small, least]
    # 25 needed of 10: estimates must shrink to 4, and the faster one that does is taken.
    assert next_smaller(ranked, big.candidate, 25, 10, [big.candidate]) == small
    assert next_smaller(ranked, big.candidate, 25, 10, [big.candidate, small.candidate]) == least
    # None is small enough: the smallest that is left.
    assert next_smaller(ranked, big.candidate, 1000, 10, [big.candidate]) == least
    assert next_smaller(ranked, least.candidate, 20, 10, [least.candidate]) is None


def space(*ranked: Ranked) -> command.Space:
    return command.Space("v5e:2x2", tiny(), 1, chip_named("v5e"), 4, ranked, ())


def test_products_in_parts_are_tried_whole_once():
    whole = Ranked(Candidate(Layout(fsdp=4)), made(1, 1), True)
    fits = Answer(fits=True, windowed=True)
    more = command.next_candidate(space(whole), whole, fits, [whole.candidate])
    assert more.candidate == dataclasses.replace(whole.candidate, options=(command.NO_WINDOWS,))
    assert command.next_candidate(space(whole), more, fits, [whole.candidate, more.candidate]) is None
    assert command.next_candidate(space(whole), whole, Answer(fits=True), [whole.candidate]) is None
    assert command.next_candidate(space(whole), whole, Answer(refused="no"), [whole.candidate]) is None


# What the compiler says


@pytest.mark.parametrize(
    ("message", "need", "is_least", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (53.29G) "
            "exceeds available HBM (15.75G).",
            53.29,
            True,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.62G "
            "of 15.75G hbm. Exceeded hbm capacity by 894.45M.\n\nTotal hbm usage >= 16.88G:",
            16.62,
            False,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.5M of 0.25G hbm.", 512.5 / 1024, False, 0.25),
    ],
)
def test_a_refusal_for_memory_is_read(message, need, is_least, limit):
    found = exhausted(message)
    assert (found[0] / GIB, found[2] / GIB) == (pytest.approx(need), pytest.approx(limit)) and found[1] is is_least
    assert found[3] == message.splitlines()[0]


def test_a_refusal_without_figures_says_so():
    assert exhausted("RESOURCE_EXHAUSTED: out of something") == (
        None,
        False,
        None,
        "the compiler names no bytes: RESOURCE_EXHAUSTED: out of something",
    )


def test_what_was_compiled_is_kept(tmp_path):
    where = tmp_path / "deep" / "abc"
    assert read(where) is None
    fits = Compiled(True, 5.0, False, None, None, 2.5, "HloModule µ\n")
    write(where, fits)
    assert read(where) == dataclasses.replace(fits, kept=True)
    other = tmp_path / "other"
    write(other, Compiled(False, None, False, None, "why", 1.0))
    assert read(other) == Compiled(False, None, False, None, "why", 1.0, None, True)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["abc.hlo.gz", "abc.json", "other.json"]


@pytest.mark.parametrize("damaged", ["abc.json", "abc.hlo.gz"])
def test_what_is_kept_and_damaged_is_named(tmp_path, damaged):
    write(tmp_path / "abc", Compiled(True, 5.0, False, None, None, 2.5, "HloModule m\n"))
    whole = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"abc\.json and what is beside it can't be read .*; delete them"):
        read(tmp_path / "abc")
    (tmp_path / damaged).unlink()
    if damaged == "abc.json":
        assert read(tmp_path / "abc") is None


def test_a_key_holds_all_that_an_answer_depends_on():
    first = ("program", "v5e:2x2", {"xla_a": True}, [0, 1])
    others = [
        ("program2", *first[1:]),
        (first[0], "v5e:4x4", *first[2:]),
        (*first[:2], {}, first[3]),
        (*first[:3], [1, 0]),
    ]
    assert len({key(*arguments) for arguments in [first, *others]}) == 5
    assert key(*first) == key(*first)


def test_jobs_are_answered_in_order_by_other_processes():
    followed = []

    def follow(index: int, found: float) -> list[float]:
        followed.append((index, found))
        return [16.0] if found == 3.0 else []

    assert run_jobs(math.sqrt, [4.0, 9.0, 25.0], 1, follow) == [2.0, 3.0, 5.0, 4.0]
    assert sorted(followed) == [(0, 2.0), (1, 3.0), (2, 5.0), (3, 4.0)]


def test_a_process_that_dies_is_an_error_that_says_what_to_do():
    with pytest.raises(OSError, match="set --workers to 1"):
        run_jobs(os._exit, [3], 1, lambda index, found: [])


# The report


def answers() -> list[tuple[Ranked, Answer]]:
    """A candidate that fits, a faster one with products whole, one that is too large, one that can't be made."""
    losing = [
        {
            "name": f"fusion.{number}",
            "scope": "jit(step)/layers/while/body/closed_call/moe/shard_map/reduce_sum",
            "category": "matmul",
            "count": 20,
            "seconds": 0.02,
            "floor_seconds": 0.01,
            "lost_seconds": 0.01,
        }
        for number in range(7)
    ]

    def prediction(seconds: float) -> dict:
        return {
            "step_seconds": seconds,
            "categories_seconds": {"matmul": seconds - 0.3, "collectives": 0.3},
            "exposed_seconds_by_axis": {"fsdp": 0.2, "tensor": 0.1},
            "hidden_seconds_by_axis": {"fsdp": 0.05, "tensor": 0.0},
            "collective_bytes": {"all-gather": 3e9, "reduce-scatter": 1e9},
            "losing": losing,
            "hfu": 0.5,
            "calibration": {"scale": 1.0},
            "assumptions": ["nothing ran"],
        }

    fits = {"fits": True, "need_bytes": 9.0 * GIB, "limit_bytes": 15.75 * GIB, "compile_seconds": 90.0}
    one = Ranked(Candidate(Layout(fsdp=4)), made(1, 9), True)
    whole = dataclasses.replace(one, candidate=dataclasses.replace(one.candidate, options=("xla_x=1",)))
    large = Ranked(Candidate(Layout(fsdp=2, tensor=2), 2, "dots"), made(2, 12), True)
    never = Ranked(Candidate(Layout(data=4)), made(3, 9), True)
    too_large = Answer(
        fits=False, need_bytes=20.0 * GIB, is_least=True, limit_bytes=15.75 * GIB, reason="said", compile_seconds=2.0
    )
    return [
        (one, Answer(**fits, prediction=prediction(2.0), mfu=0.4)),
        (whole, Answer(**fits, prediction=prediction(1.6), mfu=0.5)),
        (large, too_large),
        (never, Answer(refused="the torus has no such axis")),
    ]


def group(found: list[tuple[Ranked, Answer | None]], name: str = "v5e:2x2") -> Group:
    entries = tuple(Entry(*pair, f"train.py tiny {number}") for number, pair in enumerate(found))
    return Group(name, chip_named("v5e"), 4, 32, 2048, "bfloat16", entries, 72, ("ranked",))


def test_the_report_says_everything():
    report = plan_report("tiny", "train", [group(answers())])
    record = json.loads(json_text(report))
    (found,) = record["groups"]
    assert record["is_prediction"] and found["best"] == 1
    first, whole, large, never = found["candidates"]
    assert whole["step_seconds"] == 1.6 and whole["tokens_per_second"] == 32 * 2048 / 1.6
    assert len(first["losing"]) == 5 and first["need_source"] == "peak of the compiler's plan"
    assert large["fits"] is False and large["mfu"] is None and large["reason"] == "said" and large["need_is_least"]
    assert never["fits"] is None and never["reason"] == "the torus has no such axis" and never["need_bytes"] is None
    tables = {part.title: part for part in report.parts}
    rows = next(part for title, part in tables.items() if "4 of 72 candidates" in title).rows
    assert rows[1][0] == "1 ←" and rows[1][4:8] == ("whole", "yes", "9.00 of 15.75", "1.6 s")
    assert rows[2][5] == "NO, by at least 4.2" and rows[3][5] == "refused"
    axes = next(part for title, part in tables.items() if "by mesh axis" in title)
    assert axes.rows[0] == ("0", "200.0 + 50.0", "100.0 + 0.0")
    assert tables["Best of each, to copy"].lines == ("v5e:2x2: train.py tiny 1",)
    page = html_page(report)
    assert page.count("<svg") == 1 and "(prediction)" in report.title


def test_an_estimate_that_does_not_fit_is_never_the_best():
    slow, fast = (Ranked(Candidate(Layout(fsdp=4), n), made(3 - n, 9), n == 1) for n in (1, 2))
    assert group([(fast, None), (slow, None)]).best.ranked == slow
    assert group([(fast, None)]).best is None


def test_several_sets_of_devices_have_a_summary():
    none = [answers()[2]]
    report = plan_report("tiny", "train", [group(answers()), group(none, "v5e:4x4")])
    summary = report.parts[0]
    assert summary.rows[0][:3] == ("v5e:2x2", "4", "fsdp 4") and summary.rows[0][-1] == "50.0%"
    assert summary.rows[1][2] == "no candidate that was tried fits"
    assert report.record["groups"][1]["best"] is None
    assert "v5e:4x4: no candidate that was tried fits" in report.parts[-3].lines


# The command


@pytest.mark.parametrize("name", [name for name in configs.names() if hasattr(configs.load(name), "train")])
def test_the_line_to_copy_starts_the_run(name):
    """train.py's own parser makes of it the run that was planned."""
    config = configs.load(name).train()
    candidate = Candidate(Layout(2, 4, 1, 1), 2, "dots", not config.layers.scan, ("xla_a=1", "xla_b=2"))
    planned = command.apply(
        dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=64)), candidate
    )
    words = command_line("train.py", name, config, planned).split()
    assert words[:2] == ["train.py", name]
    parsed = tyro.cli(tyro.conf.AvoidSubcommands[TrainRun], default=config, args=words[2:])
    assert parsed == planned
    assert command_line("train.py", name, config, config) == f"train.py {name}"


def test_gpus_are_planned_by_the_model(capsys, tmp_path):
    page = tmp_path / "plan.html"
    status, out, err = run(capsys, "dense-1b", "--chip", "h100", "--devices", "8", "--html", str(page))
    assert status == 0 and err == ""
    assert max(map(len, out.splitlines())) <= 120 and "…" not in out
    assert re.search(r"^0 ← +fsdp 8 ", out, re.MULTILINE) and "train.py dense-1b --mesh.fsdp 8" in out
    assert "measured on one H100 SXM" in out and "every figure is a prediction" in out
    assert "<svg" in page.read_text()
    record = json.loads(run(capsys, "moe-1b", "--chip", "b200", "--devices", "4", "--json", "-")[1])
    best = record["groups"][0]["candidates"][record["groups"][0]["best"]]
    assert (
        0 < best["mfu"] < 1 and best["fits"] and best["losing"] is None and "knows no fusions" in best["losing_reason"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a config; configs: dense-1b, "),
        (["llama", "--topology", "v5e:2x2"], "unknown config 'llama'; known: dense-1b, "),
        (["dense-1b"], "give either --topology"),
        (["dense-1b", "--topology", "v5e:2x2", "--chip", "h100"], "give either --topology"),
        (["dense-1b", "--topology", "v5e:3"], "unknown TPU topology 'v5e:3'; known forms: "),
        (["dense-1b", "--topology", "v9:2x2"], "known forms: v4:XxYxZ, v5e:XxY"),
        (["dense-1b", "--topology", "v5e:2x2", "--slices", "0"], "--slices 0 must be at least 1"),
        (["dense-1b", "--topology", "v5e:2x2", "--devices", "4"], "--devices 4 goes with --chip"),
        (["dense-1b", "--chip", "h1000", "--devices", "8"], "unknown chip 'h1000'; chips: "),
        (["dense-1b", "--chip", "h100"], "--chip h100 needs --devices"),
        (["dense-1b", "--chip", "v5e", "--devices", "8"], "give --topology"),
        (["dense-1b", "--chip", "l4", "--devices", "2"], "no links between devices"),
        (["dense-1b", "--chip", "v100", "--devices", "2"], "no dense bfloat16 peak"),
        (["dense-1b", "--chip", "h100", "--devices", "0"], "--devices 0 must be at least 1"),
        (["dense-1b", "--chip", "h100", "--devices", "8", "--batch", "3"], "no mesh over 8 devices can run dense-1b"),
        (["dense-1b", "--chip", "h100", "--devices", "8", "--seq", "9000"], "above model.max_positions=8192"),
        (["dense-1b", "--chip", "h100", "--devices", "8", "--batch", "8", "--batch-per-device", "1"], "not both"),
    ],
)
def test_a_wrong_setting_is_one_line_on_stderr(capsys, arguments, said):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_without_libtpu_it_says_how_to_get_it(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
    status, _, err = run(capsys, "dense-1b", "--topology", "v5e:2x2")
    assert status == 2 and "uv run --group tpu" in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU: needs libtpu")
def test_a_real_step_is_compiled_kept_and_predicted(capsys, monkeypatch, tmp_path):
    """From the command line to the answer: TPU's compiler in a process of its own, then what it left."""
    model = dataclasses.replace(DENSE, num_layers=1, embed_dim=128, num_heads=1, num_kv_heads=1, head_dim=128)
    monkeypatch.setattr(configs, "load", lambda name: types.SimpleNamespace(train=lambda: tiny(model)))
    asked = ("tiny", "--topology", "v5e:2x2", "--candidates", "1", "--cache-dir", str(tmp_path))
    status, out, err = run(capsys, *asked, "--json", "-")
    assert status == 0 and "fits, compiled in" in err
    (found,) = json.loads(out)["groups"]
    (one,) = found["candidates"]
    assert found["best"] == 0 and one["fits"] and 0 < one["need_bytes"] < one["limit_bytes"] == 15.75 * GIB
    assert 0 < one["mfu"] < 1 and sum(one["parts_seconds"].values()) == pytest.approx(one["step_seconds"])
    assert one["collective_bytes"] and set(one["exposed_seconds_by_axis"]) <= {"fsdp", "data", "none"}
    # Found again, here without the price of another process.
    monkeypatch.setattr(command, "run_jobs", lambda work, jobs, workers, follow: [follow(0, work(*jobs))])
    status, out, err = run(capsys, *asked)
    assert status == 0 and "fits, kept from before" in err
    assert max(map(len, out.splitlines())) <= 120 and one["command"] in out
