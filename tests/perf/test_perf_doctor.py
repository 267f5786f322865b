"""`python -m perf doctor`: what it reads, what it prints, and what bad input gets."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import pytest

from perf.breakdown import breakdown
from perf.command import main
from perf.commands import doctor_compile
from perf.commands.doctor_compile import apply
from perf.doctor import diagnose_run, diagnose_trace
from perf.doctor_report import doctor_report
from perf.findings import Finding, Trial
from perf.memory_use import memory_use
from perf.report import Notes, Table, json_text
from perf.run_facts import input_seconds, read_run
from perf.serving_facts import read_serving
from perf.trace import Memory, read_trace
from tests.kernels.absent_tpu import nothing_cached
from tests.perf import hlo_programs
from tests.perf.xspace import gpu_step, marks, write
from tests.training import runs

# Three steps of `train.py dense-1b` on one H100 (jax 0.11.2, 2026-11-23), profiled: kernels, marks and allocations.
H100 = Path(__file__).with_name("trace_fixtures") / "dense_1b_h100.xplane.pb.gz"
# What its unprofiled steps took, the median of 97 (metrics.jsonl of that run).
MEASURED_STEP_MS = 255.21


@pytest.fixture
def h100(tmp_path):
    path = tmp_path / "dense.xplane.pb"
    path.write_bytes(gzip.decompress(H100.read_bytes()))
    return path


def test_categories_of_a_real_h100_step_sum_to_the_measured_one(h100):
    times = breakdown(read_trace(h100))
    (device,) = times.devices
    assert sum(device.nanoseconds.values()) == device.window[1] - device.window[0]
    assert times.step / 1e6 == pytest.approx(MEASURED_STEP_MS, rel=0.02)
    # Products, then reductions and elementwise; cuDNN's attention of 20 layers.
    assert 0.65 < times.share("matmul") < 0.72 and 0.08 < times.share("attention") < 0.12
    assert times.share("launch") < 0.01 and times.share("other") < 0.01
    assert times.collective == 0 and times.overlap is None


def test_a_healthy_h100_run_has_no_finding(h100):
    found = diagnose_trace(h100)
    assert found.findings == ()
    assert any("no HLO of jit_step" in line for line in found.unjudged)
    (use,) = memory_use(found.evidence.timeline.memory)
    # Parameters and moments stay; what a step needs beside them comes and goes with it.
    assert use.name == "GPU_0_bfc"
    assert (use.low / 2**30, use.peak / 2**30) == (pytest.approx(15.06, abs=0.01), pytest.approx(41.64, abs=0.01))
    assert use.spikes[0].size / 2**30 == pytest.approx(26.58, abs=0.01)


def run(capsys, *arguments: str):
    status = main(["doctor", *arguments])
    return status, *capsys.readouterr()


def test_a_trace_is_printed_and_drawn(capsys, h100, tmp_path):
    page, data = tmp_path / "page.html", tmp_path / "record.json"
    status, out, _ = run(capsys, str(h100), "--html", str(page), "--json", str(data))
    assert status == 0
    assert (
        "nothing that is worth a change" in out and "matrix products" in out and "Device memory, and its spikes" in out
    )
    record = json.loads(data.read_text())
    assert sum(record["breakdown"]["categories_ms"].values()) == pytest.approx(record["breakdown"]["step_ms"])
    assert record["findings"] == [] and record["run"] is None and record["run_reason"]
    assert record["breakdown"]["overlap"] is None and record["breakdown"]["overlap_reason"]
    assert "<svg" in page.read_text()


# A run's folder, written by hand.


def write_run(folder: Path, *, wait: float = 0.0, **changes) -> Path:
    """Ten steps of 100 ms, the first two to warm up, the fifth profiled, after the eighth an evaluation."""
    folder.mkdir(parents=True)
    records, ledger, waited = [], [{"event": "attempt", "unix_time": 0.0}], 0.0
    ledger.append({"event": "resumed", "step": 0})
    for step in range(1, 11):
        seconds = {1: 9.0, 2: 3.0, 5: 0.5, 9: 4.0}.get(step, 0.1)
        record = {
            "event": "train",
            "step": step,
            "attempt": 1,
            "time": 0.0,
            "step_seconds": seconds,
            "mfu": 0.5,
            "hfu": 0.5,
        }
        if step == 5:
            record["profiled"] = True
        if step == 9:
            record["tokens_per_second_reason"] = "something other than steps ran during the interval"
        records.append({**record, **changes})
        waited += wait
        spent = {"step": round(step * 1e8), "input_wait": round(waited * 1e9)}
        ledger.append({"event": "mark", "step": step, "nanoseconds": spent})
    records.append({"event": "summary", "attempt": 1, "mfu": 0.5, "hfu": 0.51, "chip": "H100 SXM", "num_devices": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    return folder


def test_steps_that_do_not_count_are_left_out(tmp_path):
    facts = read_run(write_run(tmp_path / "x", wait=0.02))
    assert (facts.measured, facts.step_seconds, facts.hfu) == (6, 0.1, 0.51)
    assert facts.input_seconds == pytest.approx(0.02)


def test_a_run_without_a_trace(capsys, tmp_path):
    write_run(tmp_path / "runs" / "slow", wait=0.04)
    status, out, _ = run(capsys, "slow", "--runs-dir", str(tmp_path / "runs"))
    assert status == 0 and "1. input-bound" in out
    assert "the run has no trace; add --profile 10:13" in out
    found = diagnose_run(write_run(tmp_path / "fine"))
    assert found.findings == ()


def test_a_run_with_a_trace_and_its_program(tmp_path):
    folder = write_run(tmp_path / "both")
    steps = [op for at in (1000, 2000) for op in gpu_step(at, [("nvjet", "dot.1", 0, 990)], module="jit_dec")]
    capture = folder / "profiles" / "steps-4-5"
    write(capture, {"/device:GPU:0": {"Stream #1": steps}, "/host:CPU": {"python": marks((4, 900, 10), (5, 1900, 10))}})
    settings = {"precision": {"compute": "float32"}, "layers": {"remat": "full"}}
    note = {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "settings": settings, "mesh": {"data": 2}}
    (capture / "capture.json").write_text(json.dumps(note))
    (capture / "dec.hlo.gz").write_bytes(gzip.compress(hlo_programs.text("decode_v5e").encode()))
    evidence = diagnose_run(folder).evidence
    assert evidence.program is not None and evidence.program.name == "jit_dec" == evidence.breakdown.program
    assert evidence.mesh == {"data": 2} and evidence.now("layers.remat") == " (now full)"
    (capture / "dec.hlo.gz").write_bytes(gzip.compress(b"HloModule x")[:20])
    with pytest.raises(ValueError, match=r"dec\.hlo\.gz is no whole HLO text"):
        diagnose_run(folder)


def test_a_torn_line_and_a_damaged_one(tmp_path):
    folder = write_run(tmp_path / "x")
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"event": "tr')
    assert read_run(folder).measured == 6
    metrics.write_text(whole.replace('{"event": "train", "step": 3', '{"event": "train", "st', 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 3 is no JSON"):
        read_run(folder)
    metrics.write_text("")
    with pytest.raises(ValueError, match="has no step"):
        read_run(folder)


def test_an_attempt_that_was_taken_up_again_starts_its_waiting_anew(tmp_path):
    lines = [
        {"event": "attempt", "unix_time": 0.0},
        {"event": "mark", "step": 1, "nanoseconds": {"input_wait": 10**9}},
        {"event": "attempt", "unix_time": 1.0},
        {"event": "mark", "step": 1, "nanoseconds": {"input_wait": 2 * 10**9}},
        {"event": "mark", "step": 2, "nanoseconds": {"input_wait": 5 * 10**9}},
    ]
    path = tmp_path / "goodput.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert input_seconds(path, [2]) == 3.0
    assert input_seconds(path, [1]) is None and input_seconds(tmp_path / "none", [1]) is None


# A server's figures.

BENCH = {
    "name": "x",
    "device": "NVIDIA H100 80GB HBM3",
    "decode": {"8": {"step_ms": 5.84, "mbu": 0.781}, "1": {"step_ms": 18.0, "mbu": 0.2}},
    "drafts": {"drafted": 40, "accepted": 4, "rounds": 10, "emitted": 14, "plain_rounds": 90, "acceptance": 0.1},
    "compiles_after_ready": 0,
}
METRICS = """# HELP step_seconds Time of a step on the device, by kind
# TYPE step_seconds histogram
step_seconds_bucket{kind="decode",le="+Inf"} 100.0
step_seconds_count{kind="decode"} 100.0
step_seconds_sum{kind="decode"} 0.6
step_seconds_count{kind="verify"} 50.0
step_seconds_sum{kind="verify"} 0.45
draft_tokens_total 200.0
draft_accepted_tokens_total 10.0
draft_rounds_total 50.0
draft_emitted_tokens_total 60.0
decode_mbu 0.0
compiles_after_ready_total 0.0
"""


def test_a_bench_and_the_text_of_metrics_are_told_apart(tmp_path):
    path = tmp_path / "figures"
    path.write_text("ready\n" + json.dumps(BENCH))
    facts = read_serving(path)
    assert [(one.batch, one.mbu) for one in facts.decode] == [(1, 0.2), (8, 0.781)]
    assert facts.drafts.tokens_per_round == 1.4 and facts.drafts.plain_rounds == 90
    path.write_text(METRICS)
    facts = read_serving(path)
    # A gauge that was never set is no utilisation of 0.
    assert facts.decode[0].mbu is None and facts.decode[0].step_seconds == pytest.approx(0.006)
    assert facts.drafts.verify_seconds == pytest.approx(0.009) and facts.drafts.acceptance == 0.05
    path.write_text("hello")
    with pytest.raises(ValueError, match="neither the JSON line of"):
        read_serving(path)


def test_a_servers_figures_join_its_trace(capsys, h100, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(BENCH))
    status, out, _ = run(capsys, str(h100), "--metrics", str(path))
    assert status == 0 and "1. low MBU in decode" in out and "2. speculation that does not pay" in out
    # What the server left beside its trace is found.
    folder = tmp_path / "profile"
    write(folder, {"/device:GPU:0": {"Stream #1": gpu_step(0, [("nvjet", "dot.1", 0, 10)])}})
    (folder / "capture.json").write_text(json.dumps({"kind": "serve"}))
    (folder / "metrics.prom").write_text(METRICS)
    found = diagnose_trace(folder)
    assert found.evidence.decode and [one.name for one in found.findings] == ["speculation that does not pay"]


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run, a trace or a config; runs in"),
        (["nothing-like-it"], r"no run, trace or config 'nothing-like-it'; runs in .*: good; configs: .*dense-1b"),
        (["dense-1b"], r"is a config, and no run of that name is in .* --topology v5e:4x4"),
        (["nothing-like-it", "--topology", "v5e:2x2"], "nothing-like-it"),
        (["dense-1b", "--topology", "v5e:2x2", "--workers", "0"], "--workers 0 must be at least 1"),
    ],
)
def test_a_target_that_is_not_there(capsys, tmp_path, arguments, message):
    write_run(tmp_path / "good")
    status, _, err = run(capsys, *arguments, "--runs-dir", str(tmp_path))
    assert status == 2
    assert re.search(message, err), err


def test_a_folder_without_a_trace_says_what_it_has(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    status, _, err = run(capsys, str(tmp_path))
    assert status == 2 and "has no trace (*.xplane.pb); it has: notes.txt" in err


# Memory and trials.


def test_blocks_that_come_and_go():
    def taken(time: int, used: int, size: int, released: bool = False) -> Memory:
        return Memory(time, "GPU_0_bfc", used, size, released)

    memory = [taken(0, 150, 50), taken(10, 100, 50, True), taken(20, 150, 50), taken(50, 100, 50, True)]
    memory += [taken(60, 130, 30), Memory(61, "host_bfc", 999, 999, False), taken(62, 131, 1)]
    (use,) = memory_use(memory)
    assert (use.low, use.peak, use.peak_time) == (100, 150, 0)
    assert [(one.size, one.count, one.seconds) for one in use.spikes] == [(50, 2, 20e-9), (30, 1, None)]


def test_a_trial_adds_options_and_replaces_settings():
    import configs

    before = configs.load("dense-1b").train()
    after = apply(before, Trial((("xla_options", "xla_tpu_rwb_fusion=false"), ("layers.remat", "full")), ""))
    assert after.xla_options == (*before.xla_options, "xla_tpu_rwb_fusion=false")
    assert (before.layers.remat, after.layers.remat) == ("none", "full") and after.mesh == before.mesh


# A config, compiled.


def test_what_decoding_needs_is_refused_for_training(capsys):
    slice_of = ["--topology", "v5e:2x2"]
    for arguments, message in (
        (["dense-1b", *slice_of, "--context", "5"], "--context is of --mode decode"),
        (["dense-1b", *slice_of, "--mode", "decode", "--scan"], "--scan is of --mode train"),
        (["dense-1b", *slice_of, "--mode", "decode", "--context", "99999999"], "leaves no room for a token"),
        (["smollm2", *slice_of], "can be served and not trained; set --mode decode"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and message in err, err


@pytest.fixture
def alone(monkeypatch):
    """Compiles in this process: the tests' own is set up as a compiling one is."""

    def run_here(work, jobs, workers, follow):
        answers = []
        while len(answers) < len(jobs):
            answers.append(work(jobs[len(answers)]))
            jobs = [*jobs, *follow(len(answers) - 1, answers[-1])]
        return answers

    monkeypatch.setattr(doctor_compile, "run_jobs", run_here)
    # Not by leaving JAX's cache out: once it was used, the process goes on to.
    with nothing_cached():
        yield


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is not installed")
def test_a_config_is_compiled_and_compiled_again(alone, monkeypatch, tmp_path):
    """Every finding's trial is compiled: here one that is made up, for a step that compiles in seconds."""
    run = with_settings(runs.DENSE, {"data.batch_size": 8, "data.source": "random", "layers.remat": "none"})
    trial = Trial((("model.num_layers", 4),), "--model.num-layers 4")
    made_up = Finding("made up", "compute", "", (), 1.0, "", trial=trial)
    monkeypatch.setattr(doctor_compile, "examine", lambda evidence: (made_up,))
    job = doctor_compile.Job(run, "v5e:2x2", 1, tmp_path / "plan")
    found = doctor_compile.diagnose_config("tiny", job, True, 1)
    (finding,) = found.findings
    assert finding.verified.before > 0 and finding.verified.after > finding.verified.before
    assert finding.verified.gain == finding.verified.before - finding.verified.after
    assert found.evidence.predicted and found.evidence.mesh["fsdp"] == 4 and found.evidence.platform == "tpu"
    report = doctor_report(found)
    text = json_text(report)
    assert "no gain: leave it as it is" in "".join(
        line for part in report.parts if isinstance(part, Notes) for line in part.lines
    )
    assert json.loads(text)["findings"][0]["verified"]["gain"] < 0
    (table,) = [part for part in report.parts if isinstance(part, Table) and part.title == "Predicted time of a step"]
    shares = [float(row[1]) for row in table.rows]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.01)
    # What can't be compiled is an error that says why.
    refused = doctor_compile.Job(with_settings(runs.DENSE, {"data.batch_size": 6}), "v5e:2x2", 1, tmp_path / "plan")
    with pytest.raises(ValueError, match=r"tiny can't be compiled for v5e:2x2: .*batch"):
        doctor_compile.diagnose_config("tiny", refused, True, 1)


def with_settings(base: runs.Settings, changes: runs.Settings):
    return runs.run_of(
        {**base, "data.paths": ("x",), **changes} if "data.source" not in changes else {**base, **changes}
    )
