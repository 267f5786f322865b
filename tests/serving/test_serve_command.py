"""`serve.py` as it is typed: what it prints, how it refuses, how it stops."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import httpx
import jax
import numpy as np
import pytest

import serve
from tests.contracts.tree import ROOT
from tests.host import xla_flags
from tests.serving.fake_engine import events, wait_until
from tests.serving.tiny_folder import FAST, write_tiny_folder

CONTEXT = 2048
SMALL = [
    "--dtype=float32",
    "--mesh.tensor=1",
    "--engine.max-sequences=1",
    f"--engine.max-context={CONTEXT}",
    "--engine.tile-tokens=16",
    "--engine.page-size=16",
    *("--engine.batch-sizes", "1"),
    *("--engine.widths", str(CONTEXT)),
    *("--engine.tile-counts", "1"),
    *("--xla-options", *FAST),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("command") / "tiny")


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """The command sets its own compilation cache, and the other tests of this process have theirs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class Printed:
    def __init__(self, status: int, captured) -> None:
        self.status, self.out, self.err = status, captured.out, captured.err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs serve.py in this process, as on a machine with one device."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)

    def run(*arguments: str) -> Printed:
        status = serve.main([*arguments])
        return Printed(status, capsys.readouterr())

    return run


@pytest.fixture
def cached() -> str:
    return f"--cache-dir={ROOT / '.cache' / 'xla-tests'}"


# What needs no device


def test_no_arguments_and_help_print_the_usage(command):
    bare, asked = command(), command("--help")
    assert (bare.status, asked.status) == (2, 0)
    assert bare.out == asked.out and "serve.py NAME --prompt" in bare.out


def test_the_list_has_a_line_for_each_config_that_can_be_served(command):
    printed = command("--list")
    names = [line.split()[0] for line in printed.out.splitlines()]
    assert printed.status == 0 and {"smollm2", "llama3-8b"} <= set(names)
    assert names == sorted(set(names))


def test_help_of_a_config_has_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve.main(["smollm2", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for setting in ("--engine.max-queue", "--speculation.kind", "--api.port", "--prompt", "--bench", "--source"):
        assert setting in out


def test_an_unknown_name_is_told_with_those_there_are(command):
    printed = command("no-such-model")
    assert (printed.status, printed.out) == (2, "")
    assert printed.err.startswith("error: 'no-such-model' is neither a config nor a path; configs: ")
    assert "smollm2" in printed.err


def test_an_unknown_setting_stops_the_start(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve.main(["smollm2", "--engine.no-such-setting", "3"])
    assert ended.value.code == 2 and "no-such-setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine.max-queue=0"], "engine.max_queue=0 must be at least 1"),
        (["--engine.page-size=24"], "engine.page_size=24"),
        (["--speculation.kind=model"], "speculation.draft="),
        (["--mesh.tensor=3"], "tensor"),
    ],
)
def test_settings_that_contradict_name_themselves(folder: Path, capsys, arguments: list[str], message: str):
    # tyro reports what a dataclass refuses itself, and exits.
    try:
        status = serve.main([str(folder), *SMALL, *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and message in capsys.readouterr().err


# Files that are damaged


def refused(command, path: Path, *words: str) -> None:
    """Status 2, an error at the end that names the file and what else, nothing on stdout."""
    printed = command(str(path), *SMALL)
    assert (printed.status, printed.out) == (2, "")
    _, found, message = printed.err.rpartition("error: ")
    assert found and "Traceback" not in printed.err
    for word in words:
        assert word in message, message


def test_safetensors_cut_short(folder: Path, tmp_path: Path, command):
    damaged = Path(shutil.copytree(folder, tmp_path / "cut"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(command, damaged, str(weights))


def test_safetensors_without_a_tensor_or_of_another_shape(folder: Path, tmp_path: Path, command):
    from safetensors.numpy import load_file, save_file

    damaged = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, damaged / "model.safetensors")
    refused(command, damaged, str(damaged), name)
    save_file({**tensors, name: tensors[name][:, :-1].copy()}, damaged / "model.safetensors")
    refused(command, damaged, str(damaged), name)


def test_a_tokenizer_that_is_damaged_or_of_another_model(folder: Path, tmp_path: Path, command):
    damaged = Path(shutil.copytree(folder, tmp_path / "words"))
    (damaged / "tokenizer.json").write_text('{"model": ')
    refused(command, damaged, str(damaged / "tokenizer.json"))
    (damaged / "tokenizer.json").unlink()
    refused(command, damaged, str(damaged / "tokenizer.json"))


def test_a_folder_without_a_model(tmp_path: Path, command):
    refused(command, tmp_path, str(tmp_path), "config.json")


def test_gguf_cut_short(tmp_path: Path, command):
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:-64])
    refused(command, path, str(path), "output_norm.weight")
    path.write_bytes(data[:40])
    refused(command, path, str(path))
    path.write_bytes(b"no model at all")
    refused(command, path, str(path))


def write_gguf(path: Path) -> None:
    """Two layers of a Llama with a tokenizer of bytes, its last tensor the final norm."""
    from tests.serving.fake_engine import _letters_of_bytes

    letters = _letters_of_bytes()
    tokens = [*sorted(letters, key=letters.get), "th", "<end>"]
    embed, mlp, layers = 16, 32, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(embed)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), embed), "output": (len(tokens), embed)}
    for layer in range(layers):
        block = {"attn_norm": (embed,), "ffn_norm": (embed,), "ffn_down": (embed, mlp)}
        block |= {f"attn_{part}": (embed, embed) for part in ("q", "k", "v", "output")}
        block |= {name: (mlp, embed) for name in ("ffn_up", "ffn_gate")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in (shapes | {"output_norm": (embed,)}).items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What runs a model


def test_one_answer(folder: Path, command, cached):
    printed = command(str(folder), *SMALL, cached, "--prompt", "hello", "--max-tokens=12")
    assert printed.status == 0
    # The folder has a chat template: the answer alone is printed. Greedy, so the same again.
    assert printed.out.endswith("\n") and len(printed.out) > 4
    assert "ready after" in printed.err and "compiled" in printed.err


def test_a_gguf_file_answers(tmp_path: Path, command, cached):
    write_gguf(tmp_path / "tiny.gguf")
    small = [f"{word}" if str(CONTEXT) not in word else word.replace(str(CONTEXT), "64") for word in SMALL]
    printed = command(str(tmp_path / "tiny.gguf"), *small, cached, "--prompt", "hello", "--max-tokens=5")
    # Without a template it goes on with the text.
    assert printed.status == 0, printed.err
    assert printed.out.startswith("hello")


def test_bench_ends_with_one_json_line(folder: Path, command, cached):
    sizes = ["--benchmark.batches", "1", "--benchmark.prompts", "8", "64", "--benchmark.decode-prompt=8"]
    sizes += ["--benchmark.decode-tokens=40", "--benchmark.repeats=2", "--benchmark.offline", "3", "8", "6"]
    printed = command(str(folder), *SMALL, cached, "--bench", *sizes)
    assert printed.status == 0
    [line] = printed.out.splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["compiles_after_ready"] == 0
    assert found["decode_mbu"].keys() == {"1"}
    assert found["decode_tokens_per_second"]["1"] > 0
    assert found["ttft_ms"].keys() == {"8", "64"} and min(found["ttft_ms"].values()) > 0
    assert 0 < found["itl_ms"]["1"]["p50"] <= found["itl_ms"]["1"]["p99"]
    assert found["offline"]["requests"] == 3 and found["offline"]["output_tokens_per_second"] > 0


# A process of its own


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """(process, URL, lines that it has said) of `serve.py` with these arguments."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "serve.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(devices=1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line.strip())
            if said[-1].startswith("http://"):
                break
        assert said and said[-1].startswith("http://"), said
        yield process, said[-1], said
    finally:
        process.kill()
        process.communicate()


def test_a_full_queue_and_sigterm_in_the_middle_of_a_stream(folder: Path, cached):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    arguments = [str(folder), *SMALL, cached, "--engine.max-queue=1", "--api.port=0"]
    with (
        server(*arguments) as (process, url, said),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        assert any(line.startswith("ready after") for line in said)
        with http.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.iter_text()
            text = next(pieces)
            waits = pool.submit(http.post, "/v1/completions", json={**body, "max_tokens": 5})
            wait_until(lambda: "\nwaiting 1.0" in httpx.get(f"{url}/metrics").text)
            third = http.post("/v1/completions", json=body)
            assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert http.post("/v1/completions", json=body).status_code == 503
            text += "".join(pieces)
        *_, last, done = events(text)
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        assert events(waits.result().text)[-1] == "[DONE]"
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "") and "Traceback" not in err
