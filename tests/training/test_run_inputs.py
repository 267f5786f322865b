"""What can't work is refused before anything is compiled: exit status 2, one error that names the setting."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import train
from data import train_tokenizer
from tests.training import runs

BASES: dict[str, runs.Settings] = {
    "text": runs.DENSE,
    "random": {**runs.DENSE, "data.source": "random"},
    "moe": {**runs.MOE, "data.source": "random"},
}


def refused(settings: runs.Settings, capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a run that must not start; checks all that such errors have in common."""
    capsys.readouterr()
    del runs.COMPILATIONS[:]
    try:
        status = runs.main_here(settings)
    except SystemExit as error:  # How the parser of the command line ends.
        status = error.code
        message = unboxed(capsys.readouterr().err)
    else:
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        assert len(re.findall("^error: ", err, re.MULTILINE)) == 1, err
        message = err[err.index("error: ") :]
    assert (status, runs.COMPILATIONS) == (2, [])
    return message


def unboxed(text: str) -> str:
    """What the parser prints in a frame, on one line."""
    return " ".join(re.sub("[─-╿]", " ", text).split())


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        # Windows to profile.
        (
            "random",
            {"profile": "1:3"},
            r"profile=1:3 must lie between step 3, since the first ones warm up, and steps=12",
        ),
        ("random", {"profile": "6:13"}, r"profile=6:13 must lie between step 3"),
        ("random", {"profile": "6"}, r"profile='6' must be FIRST:LAST"),
        # Axes that do not divide.
        (
            "moe",
            {"model.moe.num_experts": 6, "mesh.expert": 4},
            r"model\.moe\.num_experts=6 is not divisible by mesh axis 'expert'=4; set mesh\.expert to a divisor of 6",
        ),
        (
            "moe",
            {"data.batch_size": 12},
            r"data\.batch_size=12 is not divisible by mesh axis 'fsdp'=4 × 'expert'=2; set mesh\.fsdp × mesh\.expert",
        ),
        ("random", {"mesh.tensor": 4}, r"model\.num_kv_heads=2 is not divisible by mesh axis 'tensor'=4"),
        (
            "random",
            {"model.mlp_dim": 63, "mesh.tensor": 2},
            r"model\.mlp_dim=63 is not divisible by mesh axis 'tensor'",
        ),
        ("random", {"accumulation": 2}, r"data\.batch_size / accumulation=4 is not divisible by mesh axis 'fsdp'=8"),
        ("random", {"accumulation": 3}, r"data\.batch_size=8 is not divisible by accumulation=3"),
        ("random", {"mesh.expert": 2}, r"the model has none; set mesh\.expert to 1 or model\.moe"),
        # The mesh itself.
        ("random", {"mesh.context": 2}, r"mesh\.context=2: axis 'context' is reserved .*; set mesh\.context to 1"),
        ("random", {"mesh.stage": 2}, r"mesh\.stage=2: axis 'stage' is reserved"),
        ("random", {"mesh.fsdp": 16}, r"mesh fsdp 16 is 16 devices, and 8 are available; change the mesh axes"),
        ("random", {"mesh.data": 16}, r"needs a multiple of 16 devices, and 8 are available"),
        ("random", {"mesh.data": -1}, r"at most one may be -1"),
        # Settings that contradict each other, or that nothing can have.
        (
            "random",
            {"data.sequence_length": 128},
            r"data\.sequence_length=128 is above model\.max_positions=64; shorten",
        ),
        ("random", {"sample.tokens": 5}, r"data\.source=random has none; set sample\.tokens to 0"),
        ("random", {"steps": 0}, r"steps=0 .* must be at least 1"),
        (
            "random",
            {"optimizer.schedule.warmup_steps": 12},
            r"optimizer\.schedule\.warmup_steps=12 must be below the 12",
        ),
        ("random", {"optimizer.schedule.peak_lr": -1.0}, r"optimizer\.schedule\.peak_lr=-1\.0 must be above 0"),
        ("random", {"model.num_kv_heads": 3}, r"model\.num_heads=4 is not divisible by model\.num_kv_heads=3"),
        ("random", {"xla_options": ("fast_math",)}, r"xla_options='fast_math' must be xla_NAME=VALUE"),
        ("random", {"kernels.attention": "cudnn"}, r"cudnn.*cpu"),
        ("random", {"checkpoint.every": -1}, r"checkpoint\.every=-1 must be at least 0"),
        ("random", {"distributed.mode": "coordinator"}, r"needs distributed\.coordinator_address"),
        ("random", {"name": "../elsewhere"}, r"name='\.\./elsewhere' must be a plain folder name"),
        # Data.
        ("text", {"data.paths": ()}, r"data\.source='text' needs files; set data\.paths"),
        ("text", {"data.paths": ("{tmp}/missing.txt",)}, r"data\.paths: .*missing\.txt does not exist"),
        ("text", {"data.paths": ("{tmp}/*.log",)}, r"data\.paths: no file matches"),
        ("text", {"data.paths": ("{tmp}/empty",)}, r"the corpus is empty: .*empty.*; add text to data\.paths"),
        ("text", {"data.paths": ("{tmp}/latin.txt",)}, r"latin\.txt is not UTF-8 text \(byte 3\); convert it"),
        ("text", {"data.heldout_fraction": 1e-9}, r"no document .* fell into the held-out split"),
        ("text", {"data.batch_size": 1024, "data.epochs": 1}, r"do not fill data\.batch_size=1024; lower one"),
        ("text", {"data.epochs": 1, "steps": 30}, r"data ends after step 9 \(data\.epochs=1\), before steps=30; raise"),
        ("text", {"model.vocab_size": 200}, r"model\.vocab_size=200"),
        ("text", {"data.tokenizer": "{tmp}/none.json"}, r"none\.json"),
        ("text", {"data.tokenizer": "{tmp}/tokenizer.json", "model.vocab_size": 280}, r"model\.vocab_size=280"),
        ("text", {"sample.tokens": 40}, r"sample\.tokens=40 exceed data\.sequence_length=32; shorten one"),
        # Places that can't be written.
        ("random", {"runs_dir": "{tmp}/latin.txt"}, r"run directory .* can't be written: .*; choose another"),
        ("text", {"cache_dir": "{tmp}/latin.txt"}, r"cache .*latin\.txt can't be written"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_refused(base, changes, message, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    if "tokenizer" in str(changes.get("data.tokenizer")):
        texts = [path.read_text() for path in sorted(runs.write_corpus(tmp_path / "corpus").iterdir())]
        train_tokenizer(texts, 288, "<|end|>").save(tmp_path / "tokenizer.json")
    settings = {**runs.prepare(tmp_path / "run", BASES[base]), **placed(changes, tmp_path)}
    error = refused(settings, capsys)
    assert re.search(message, error), error


def placed(changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return value.format(tmp=folder) if isinstance(value, str) else value

    return {name: place(value) for name, value in changes.items()}


def test_resuming_what_does_not_fit(tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, {**runs.DENSE, "steps": 4, "data.heldout_fraction": 0.0})
    runs.train_here(settings)
    refusals: Iterable[tuple[dict[str, Any], str]] = (
        ({"steps": 3}, r"step_0000000004 is after steps=3; raise steps, choose another name, or .* --fresh"),
        ({"model.mlp_dim": 32}, r"of another architecture; .*\n.*model\.mlp_dim: 64 in the checkpoint, 32 in this run"),
        ({"layers.scan": False}, r"of another architecture; .*\n.*scan: True in the checkpoint, False in this run"),
        ({"optimizer.kind": "muon"}, r"optimizer: adamw in the checkpoint, muon in this run"),
        ({"data.batch_size": 16}, r"another token stream \(batch_size: 8 then, 16 now\); restore those settings"),
        ({"data.seed": 1}, r"another token stream \(seed: 0 then, 1 now\)"),
    )
    for changes, message in refusals:
        error = refused({**settings, "steps": 8, **changes}, capsys)
        assert re.search(message, error), error
    # None of them has harmed the run.
    assert runs.train_here({**settings, "steps": 6})["steps"] == 6
    assert list(runs.losses_of(settings)) == [1, 2, 3, 4, 5, 6]


def test_unknown_config_lists_the_known(capsys) -> None:
    assert train.main(["quikstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown config 'quikstart'; known: ")
    assert "dense-1b" in error and "quickstart" in error
    assert error.count("\n") == 1


def test_unknown_and_malformed_fields(capsys) -> None:
    for words, named in (
        (["--data.batchsize", "4"], "data.batchsize"),
        (["--steps", "many"], "steps"),
        (["--optimizer.kind", "adagrad"], "adagrad"),
    ):
        with pytest.raises(SystemExit) as error:
            train.main(["quickstart", *words])
        assert error.value.code == 2
        assert named in unboxed(capsys.readouterr().err)


def test_option_that_xla_does_not_know(tmp_path: Path, capsys) -> None:
    settings = runs.prepare(tmp_path, {**BASES["random"], "xla_options": ("xla_cpu_no_such_option=1",)})
    assert runs.main_here(settings) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"\nerror: xla_options=.*xla_cpu_no_such_option", err)


def test_as_a_process(tmp_path: Path) -> None:
    """The command itself: nothing on stdout, one line on stderr, status 2."""
    settings = runs.prepare(tmp_path, {**BASES["random"], "mesh.stage": 2})
    command = [sys.executable, "train.py", *runs.arguments(settings)]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: mesh\.stage=2: .*\n", result.stderr)
