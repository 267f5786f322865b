"""Kills, torn files, full disks and failing writes: the last complete checkpoint is always there."""

from __future__ import annotations

import errno
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint.store
from checkpoint import CheckpointConfig, CheckpointError, CheckpointReader, CheckpointStore

ROOT = Path(__file__).resolve().parents[2]


def open_store(directory: Path, notes: list[str], **config: Any) -> CheckpointStore:
    return CheckpointStore(directory, CheckpointConfig(**config), architecture={}, run_config={}, on_note=notes.append)


def state_of(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.arange(4096.0) + step, "step": jnp.int32(step)}


ABSTRACT = {"w": jax.ShapeDtypeStruct((4096,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}


def assert_state(state: dict[str, jax.Array], step: int) -> None:
    assert int(state["step"]) == step
    np.testing.assert_array_equal(state["w"], np.arange(4096.0, dtype=np.float32) + step)


def two_saves(directory: Path) -> Path:
    """Directory of the newer of two checkpoints, of steps 1 and 2."""
    with open_store(directory, []) as store:
        store.save(1, state_of(1), data_state={"at": 1})
        store.save(2, state_of(2), data_state={"at": 2})
        store.wait()
        return store.latest().path


def largest(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(path: Path) -> None:
    with open(largest(path), "r+b") as file:
        file.truncate(largest(path).stat().st_size - 1)


def flip(path: Path) -> None:
    file = largest(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit_manifest(path: Path) -> None:
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    body["data_state"]["at"] = 3
    file.write_text(json.dumps(body))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "chunk gone": lambda path: largest(path).unlink(),
    "index gone": lambda path: (path / "manifest.ocdbt").unlink(),
    "manifest gone": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:200]),
    "manifest empty": lambda path: (path / "manifest.json").write_text(""),
    "manifest edited": edit_manifest,
    "not committed": lambda path: (path / "commit_success.txt").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_torn_newest_falls_back_and_says_so(tmp_path: Path, kind: str) -> None:
    newest = two_saves(tmp_path)
    DAMAGE[kind](newest)
    notes: list[str] = []
    state, manifest = CheckpointReader(tmp_path, architecture={}, on_note=notes.append).restore(ABSTRACT)
    assert_state(state, 1)
    assert manifest.data_state == {"at": 1}
    assert len(notes) == 1
    assert "step 2 is torn" in notes[0]
    assert "using the previous one, of step 1" in notes[0]
    assert newest.exists()


def test_torn_step_is_replaced_by_a_good_one(tmp_path: Path) -> None:
    flip(two_saves(tmp_path))
    notes: list[str] = []
    with open_store(tmp_path, notes) as store:
        assert store.latest().step == 1
        assert_state(store.restore(ABSTRACT)[0], 1)
        store.save(2, state_of(2), data_state={"at": 2})
        store.wait()
        assert store.list_steps() == [1, 2]
        assert_state(store.restore(ABSTRACT)[0], 2)
    assert not list(tmp_path.glob("*.torn*"))
    assert len(notes) == 1


def test_torn_ones_never_count_as_kept(tmp_path: Path) -> None:
    truncate(two_saves(tmp_path))
    with open_store(tmp_path, [], keep=2, keep_best=0) as store:
        store.save(3, state_of(3), data_state={})
        store.wait()
        assert store.list_steps() == [1, 3]
    assert len(list(tmp_path.glob("step_*"))) == 2


def test_torn_one_stays_until_a_newer_is_complete(tmp_path: Path) -> None:
    newest = two_saves(tmp_path)
    truncate(newest)
    with open_store(tmp_path, []) as store:
        store.wait()
        assert newest.exists()
        store.save(3, state_of(3), data_state={})
        store.wait()
        assert not newest.exists()


def test_nothing_is_deleted_when_all_are_torn(tmp_path: Path) -> None:
    with open_store(tmp_path, []) as store:
        store.save(1, state_of(1), data_state={})
    truncate(next(tmp_path.glob("step_*")))
    notes: list[str] = []
    with open_store(tmp_path, notes, keep=1) as store:
        assert store.latest() is None
    assert "no complete checkpoint is left" in notes[0]
    assert len(list(tmp_path.glob("step_*"))) == 1


def test_leftovers_of_a_kill_are_ignored_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    two_saves(tmp_path)
    left = [tmp_path / "step_0000000003.orbax-checkpoint-tmp", tmp_path / "step_0000000001.deleted"]
    for path in left:
        (path / "d").mkdir(parents=True)
        (path / "d" / "x").write_bytes(b"partial")
    stranger = tmp_path / "notes.txt"
    stranger.write_text("mine")
    reader = CheckpointReader(tmp_path, architecture={}, on_note=[].append)
    assert reader.list_steps() == [1, 2]
    assert all(path.exists() for path in left)
    open_store(tmp_path, []).close()
    assert not any(path.exists() for path in left)
    assert stranger.exists()


def test_sizes_are_checked_without_checksums(tmp_path: Path) -> None:
    with open_store(tmp_path, [], checksum=False) as store:
        store.save(1, state_of(1), data_state={})
        store.save(2, state_of(2), data_state={})
        store.wait()
        path = store.latest().path
    assert all(file.crc32 is None for file in checkpoint.store.read_manifest(path).files.values())
    truncate(path)
    assert CheckpointReader(tmp_path, architecture={}, on_note=[].append).latest().step == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    # Lazily: a test that failed may still hold files open, and the mount must not outlive it.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_save_that_cannot_fit_is_refused_before_it_fills_the_disk(small_disk: Path) -> None:
    with open_store(small_disk, []) as store:
        store.save(1, state_of(1), data_state={})
        with pytest.raises(
            CheckpointError, match=r"step 2 was not saved: 4\.2 MB are needed .* less is free; .* step 1, is intact"
        ):
            store.save(2, {"w": jnp.ones((1024, 1024))}, data_state={})
        store.save(3, state_of(3), data_state={})
        store.wait()
        assert store.list_steps() == [1, 3]


FILL_THE_DISK = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import jax
import jax.numpy as jnp
import checkpoint.store
from checkpoint import CheckpointConfig, CheckpointError, CheckpointStore

# What another program takes after we looked.
checkpoint.store.shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 40)
small = {"w": jnp.ones(4)}
with CheckpointStore(sys.argv[2], CheckpointConfig(), architecture={}, run_config={}, on_note=print) as store:
    store.save(1, small, data_state={})
    store.save(2, {"w": jnp.ones((1024, 1024)), "v": jnp.ones(3)}, data_state={})
    try:
        store.wait()
    except CheckpointError as error:
        print(error)
    print("left", *sorted(path.name for path in store.directory.glob("step_*")))
    # The partial directory is gone, so there is room to go on once less is written.
    store.save(3, small, data_state={})
    store.wait()
    restored, manifest = store.restore({"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
    print("restored", manifest.step, restored["w"].tolist())
"""


def test_disk_that_fills_during_the_write(small_disk: Path) -> None:
    # In a process of its own: Orbax closes its event loop while TensorStore still reports the other writes' failures
    # to it, and what that prints would be a warning in whichever test runs by then.
    result = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(ROOT), str(small_disk)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    error, left, restored = result.stdout.splitlines()
    assert re.search(r"step 2 was not saved: no space is left for .*; .* of step 1, is intact", error)
    assert left == "left step_0000000001"
    assert restored == "restored 3 [1.0, 1.0, 1.0, 1.0]"
    # The exception says it all; Orbax's own reports would bury it.
    assert "absl" not in result.stderr


@pytest.mark.parametrize("call", ["wait", "save", "close"])
def test_background_error_surfaces_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(tmp_path, [])
    store.save(1, state_of(1), data_state={})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.store, "write_manifest", fail)
        assert store.save(2, state_of(2), data_state={})
        calls = {"wait": store.wait, "save": lambda: store.save(3, state_of(3), data_state={}), "close": store.close}
        with pytest.raises(CheckpointError, match=r"step 2 was not saved: no space is left .* step 1, is intact"):
            calls[call]()
    if call != "close":
        assert store.save(2, state_of(2), data_state={})
        store.close()
    steps = CheckpointReader(tmp_path, architecture={}, on_note=[].append).list_steps()
    assert steps == ([1] if call == "close" else [1, 2])


def test_failure_without_an_earlier_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.store, "write_manifest", fail)
    store = open_store(tmp_path, [])
    store.save(1, state_of(1), data_state={})
    with pytest.raises(CheckpointError, match=r"OSError: .*Input/output error; there is no earlier one"):
        store.close()


def test_the_older_goes_only_after_the_newer_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.store.write_manifest
    seen: list[list[str]] = []

    def watch(directory: Path, *arguments: Any, **keywords: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("step_??????????")))
        real(directory, *arguments, **keywords)

    monkeypatch.setattr(checkpoint.store, "write_manifest", watch)
    with open_store(tmp_path, [], keep=1, keep_best=0) as store:
        for step in (1, 2, 3):
            store.save(step, state_of(step), data_state={})
    # While a checkpoint is being finished, the one before it is still there.
    assert seen == [[], ["step_0000000001"], ["step_0000000002"]]
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_0000000003"]


SAVE_FOREVER = """
import sys
sys.path.insert(0, sys.argv[1])
import jax.numpy as jnp
from checkpoint import CheckpointConfig, CheckpointStore

store = CheckpointStore(
    sys.argv[2], CheckpointConfig(keep=2), architecture={}, run_config={}, on_note=lambda line: print("note", line)
)
latest = store.latest()
step = 0 if latest is None else latest.step
while True:
    step += 1
    store.save(step, {f"w{i}": jnp.full((256, 1024), float(step + i)) for i in range(4)}, data_state={"at": step})
    if step % 3 == 0:
        store.wait()
    print(f"{'complete' if step % 3 == 0 else 'begun'} {step}", flush=True)
"""


def test_kill_at_any_moment_keeps_the_last_complete_checkpoint(tmp_path: Path) -> None:
    generator = random.Random(0)
    mid_save = 0
    acknowledged = 0
    target = {f"w{i}": jax.ShapeDtypeStruct((256, 1024), jnp.float32) for i in range(4)}
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            for _ in range(generator.randint(1, 6)):
                word, step = child.stdout.readline().split(" ", 1)
                assert word in ("begun", "complete"), f"{word} {step}"
                acknowledged = int(step) if word == "complete" else max(acknowledged, int(step) - 1)
            time.sleep(generator.uniform(0.0, 0.08))
            child.send_signal(signal.SIGKILL)
            child.stdout.read()
        mid_save += bool(list(tmp_path.glob("*.orbax-checkpoint-tmp")))
        notes: list[str] = []
        state, manifest = CheckpointReader(tmp_path, architecture={}, on_note=notes.append).restore(target)
        assert manifest.step >= acknowledged
        assert manifest.data_state == {"at": manifest.step}
        for i in range(4):
            np.testing.assert_array_equal(state[f"w{i}"], np.full((256, 1024), manifest.step + i, np.float32))
        assert notes == []
    assert mid_save, "no kill hit a save in progress; save more or sleep less"
