"""Two processes write one checkpoint together and agree on what they read."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import os, sys
root, directory, coordinator, index = sys.argv[1:]
sys.path.insert(0, root)
from tests.host import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=2)
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, 2, int(index))
from checkpoint import CheckpointConfig, CheckpointStore
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement

before = Placement(make_mesh(MeshConfig(fsdp=4), jax.devices()))
after = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()))

def value(step):
    return np.arange(64, dtype=np.float32).reshape(16, 4) + step

def state(step):
    w = jax.make_array_from_callback((16, 4), before.sharding("embed", "mlp"), lambda at: value(step)[at])
    return {"w": w, "copy": jax.make_array_from_callback((4,), before.sharding(None), lambda at: value(step)[0][at])}

target = {
    "w": jax.ShapeDtypeStruct((16, 4), np.float32, sharding=after.sharding("embed", "mlp")),
    "copy": jax.ShapeDtypeStruct((4,), np.float32, sharding=after.sharding("mlp")),
}

def check(store, step):
    restored, manifest = store.restore(target)
    assert (manifest.step, manifest.data_state, manifest.devices["num_processes"]) == (step, {"at": step}, 2)
    for shard in restored["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, value(step)[shard.index])

notes = []
config = CheckpointConfig(keep=2, keep_best=0)
open_store = lambda: CheckpointStore(directory, config, architecture={}, run_config={}, on_note=notes.append)
with open_store() as store:
    for step in (1, 2, 3):
        store.save(step, state(step), data_state={"at": step})
    store.wait()
    assert store.list_steps() == [2, 3], store.list_steps()
    check(store, 3)
with open_store() as store:
    if index == "1":
        # Only this process sees the damage before the two compare: the other holds a sound first half.
        newest = store.directory / "step_0000000003"
        file = max(newest.rglob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    check(store, 2)
    assert len(notes) == 1 and "step 3 is torn" in notes[0], notes
    store.save(3, state(3), data_state={"at": 3})
    store.wait()
    check(store, 3)
    try:
        store.save(2, state(2), data_state={})
    except ValueError as error:
        assert "already holds" in str(error)
    else:
        raise AssertionError("a complete checkpoint was written over")
print("agreed", flush=True)
"""


def test_two_processes_save_restore_and_agree(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-W", "error", "-c", PROCESS, str(ROOT), str(tmp_path), coordinator]
    processes = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.rstrip().endswith("agreed"), output
