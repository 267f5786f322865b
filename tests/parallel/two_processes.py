"""Two real processes of one run on this machine, each with virtual CPU devices, joined over localhost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.host import xla_flags

ROOT = Path(__file__).resolve().parents[2]


def coordinator_address() -> str:
    """An address on this machine whose port was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def start(command: Sequence[str], *, devices: int = 4, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Starts `python *command` on `devices` virtual CPU devices, with our packages importable."""
    # A launcher around the tests would be taken for the run's own.
    launchers = ("SLURM_", "KUBERNETES_", "OMPI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[subprocess.CompletedProcess[str]]:
    """Waits for all of them; kills those that take longer than `timeout` seconds and fails."""
    deadline = time.monotonic() + timeout
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return results


def run_two(
    command: Callable[[str, int], Sequence[str]], *, devices: int = 4, cwd: Path = ROOT, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python *command(address, process_id)` for process ids 0 and 1 and returns both results, both exited 0."""
    address = coordinator_address()
    processes = [start(command(address, process_id), devices=devices, cwd=cwd) for process_id in range(2)]
    results = finish(processes, timeout)
    for process_id, result in enumerate(results):
        assert result.returncode == 0, f"process {process_id} exited {result.returncode}:\n{result.stderr[-4000:]}"
    return results
