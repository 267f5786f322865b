"""Multi-host start-up on JAX's own multi-controller runtime, and the few agreements that hosts need."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
from jax._src import distributed as jax_distributed  # The coordination client has no public name in JAX 0.10 or 0.11.
from jax.experimental import multihost_utils

# What `srun` sets for each task. A batch script that does not go through `srun` lacks the STEP ones.
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
)
# One of these tells JAX the hosts of a TPU slice in GKE.
GKE_TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_PROCESS_ADDRESSES_PATH")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other."""

    mode: Literal["none", "auto", "slurm", "gke", "coordinator"] = "none"
    """none: one process. auto: whatever launcher JAX detects (Slurm, Open MPI, Cloud TPU). slurm: a task of `srun`.
    gke: a pod of a JobSet; TPU pods need nothing else, GPU pods the coordinator's address and the number of processes.
    coordinator: address, number of processes and process id as given."""
    coordinator_address: str | None = None
    """host:port of process 0, where it opens the coordination service; the same on every process."""
    num_processes: int | None = None
    """Processes in the run, over all hosts."""
    process_id: int | None = None
    """Number of this process, from 0; in mode gke, the pod's completion index."""
    timeout: int = 300
    """Seconds to wait for all processes at the start."""

    def __post_init__(self) -> None:
        check_distributed(self)


def check_distributed(config: DistributedConfig) -> None:
    """Raises ValueError for settings that no launch can have, naming them. Looks at nothing but the config."""
    given = {
        name: getattr(config, name)
        for name in ("coordinator_address", "num_processes", "process_id")
        if getattr(config, name) is not None
    }
    taken = {"coordinator": set(given), "gke": {"coordinator_address", "num_processes"}}.get(config.mode, set())
    ignored = [f"distributed.{name}={value}" for name, value in given.items() if name not in taken]
    if ignored:
        raise ValueError(
            f"distributed.mode={config.mode} does not use {', '.join(ignored)}; "
            "set distributed.mode to coordinator, or leave them out"
        )
    if config.mode == "coordinator":
        missing = [
            f"distributed.{name}"
            for name in ("coordinator_address", "num_processes", "process_id")
            if name not in given
        ]
        if missing:
            raise ValueError(f"distributed.mode=coordinator needs {', '.join(missing)} too")
    if config.timeout < 1:
        raise ValueError(f"distributed.timeout={config.timeout} must be at least 1 second")
    if config.num_processes is not None and config.num_processes < 1:
        raise ValueError(f"distributed.num_processes={config.num_processes} must be at least 1")
    if config.process_id is not None:
        _check_process_id(config.process_id, config.num_processes, "distributed.process_id")
    if config.coordinator_address is not None:
        split_address(config.coordinator_address)


def _check_process_id(process_id: int, num_processes: int | None, source: str) -> None:
    if process_id < 0 or (num_processes is not None and process_id >= num_processes):
        raise ValueError(
            f"{source}={process_id} must be at least 0 and below distributed.num_processes={num_processes}; "
            "processes are numbered from 0"
        )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port". Raises ValueError if either is missing."""
    host, colon, port = address.rpartition(":")
    # An IPv6 address has colons of its own: without brackets its last group would be taken for the port.
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or bare_ipv6 or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"distributed.coordinator_address={address!r} must be host:port with a port from 1 to 65535, "
            "for example 10.0.0.1:8476 or [fd00::1]:8476"
        )
    return host.strip("[]"), int(port)


def initialize(config: DistributedConfig) -> None:
    """Joins this process to the run. Call it before anything touches a device; with mode "none" it does nothing.

    Raises ValueError, naming settings or the launcher's variables, if the launcher is not the one named, if process 0
    cannot open its port, or if another process cannot reach it within `config.timeout` seconds. If process 0 is up
    and others never come, JAX ends the process itself (abort, measured with jaxlib 0.10.2 and 0.11.2: no exception);
    what it waited for is then printed first.
    """
    if config.mode == "none":
        return
    arguments = _arguments(config, os.environ)
    # The only collectives between CPU processes that jaxlib's wheels contain.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service takes SIGTERM for itself; the training loop handles it, through `any_process`.
    jax.config.update("jax_enable_preemption_service", False)
    if "coordinator_address" in arguments:
        _check_coordinator(arguments["coordinator_address"], arguments["process_id"], config.timeout)
    with _explain_timeout(config):
        try:
            jax.distributed.initialize(initialization_timeout=config.timeout, **arguments)
        except ValueError as error:
            raise ValueError(
                f"distributed.mode={config.mode}: JAX finds no launcher that it knows here ({error}); "
                "set distributed.mode to none for one process, or to coordinator and give the address"
            ) from error


def _arguments(config: DistributedConfig, environ: Mapping[str, str]) -> dict:
    """Arguments of `jax.distributed.initialize`. `environ` is read for the launcher's own variables only."""
    if config.mode == "coordinator":
        return _explicit(config.coordinator_address, config.num_processes, config.process_id)
    if config.mode == "slurm":
        missing = [name for name in SLURM_VARIABLES if name not in environ]
        if missing:
            raise ValueError(
                f"distributed.mode=slurm, but this process is not a task of srun: {', '.join(missing)} not set; "
                "start it with srun inside an allocation, or set distributed.mode"
            )
        return {"cluster_detection_method": "slurm", "local_device_ids": slurm_local_devices(environ)}
    if config.mode == "gke":
        return _gke_arguments(config, environ)
    assert config.mode == "auto", config.mode
    if all(name in environ for name in SLURM_VARIABLES):
        return {"cluster_detection_method": "slurm", "local_device_ids": slurm_local_devices(environ)}
    return {}


def _gke_arguments(config: DistributedConfig, environ: Mapping[str, str]) -> dict:
    if any(name in environ for name in GKE_TPU_VARIABLES):
        return {"cluster_detection_method": "gketpu"}
    index = environ.get("JOB_COMPLETION_INDEX")
    if index is None or not index.isdecimal():
        raise ValueError(
            "distributed.mode=gke, but this is not a pod of an indexed job: neither TPU_WORKER_HOSTNAMES (TPU) nor "
            f"JOB_COMPLETION_INDEX (GPU; got {index!r}) is set; use completionMode: Indexed, or set distributed.mode"
        )
    if config.coordinator_address is None or config.num_processes is None:
        raise ValueError(
            "distributed.mode=gke on GPU needs distributed.coordinator_address (JOBSET-JOB-0-0.JOBSET:8476, the DNS "
            "name of pod 0) and distributed.num_processes (pods of the job)"
        )
    _check_process_id(int(index), config.num_processes, "JOB_COMPLETION_INDEX")
    return _explicit(config.coordinator_address, config.num_processes, int(index))


def _explicit(address: str | None, num_processes: int | None, process_id: int | None) -> dict:
    # Without "deactivate" JAX would still fill in local devices from a Slurm job around it: one GPU per process.
    return {
        "coordinator_address": address,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def slurm_local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """GPUs that this Slurm task takes of those it sees; None where there are none.

    JAX's own choice is the one GPU with the task's local number: a task per node would leave the others idle, and
    a task that Slurm has bound to its GPUs (they are then numbered from 0) would ask for one it can't see.
    """
    on_node = environ.get("SLURM_GPUS_ON_NODE")
    if on_node is None or not on_node.isdecimal():
        return None
    tasks = _tasks_on_node(environ)
    bound = environ.get("CUDA_VISIBLE_DEVICES")
    visible = int(on_node) if bound is None else len([d for d in bound.split(",") if d])
    if visible < int(on_node) or tasks == 1:
        return list(range(visible))
    if visible % tasks:
        raise ValueError(
            f"SLURM_GPUS_ON_NODE={on_node} do not divide over {tasks} tasks on this node; set --ntasks-per-node to "
            f"a divisor of {on_node}"
        )
    each = visible // tasks
    first = int(environ["SLURM_LOCALID"]) * each
    return list(range(first, first + each))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from SLURM_STEP_TASKS_PER_NODE in its form "8(x3),4": nodes 0-2 have 8."""
    counts: list[int] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(environ["SLURM_NODEID"])]


def _check_coordinator(address: str, process_id: int, timeout: int) -> None:
    """Raises ValueError if process 0 can't open its port, or if another process can't reach it within `timeout` s.

    JAX itself ends in a segmentation fault (jaxlib 0.10.2) and in an abort: neither names a setting.
    """
    host, port = split_address(address)
    if process_id == 0:
        try:
            with socket.create_server(("", port)):
                return
        except OSError as error:
            raise ValueError(
                f"process 0 can't open port {port} of distributed.coordinator_address={address}: {error.strerror}; "
                "choose a free port"
            ) from error
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"distributed.coordinator_address={address} did not answer within distributed.timeout={timeout} s "
                    f"({error}); start process 0 there, or correct the address"
                ) from error
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


@contextlib.contextmanager
def _explain_timeout(config: DistributedConfig) -> Iterator[None]:
    """Says on stderr what was waited for, just before JAX gives up and aborts."""

    def explain() -> None:
        state = jax_distributed.global_state
        print(
            f"distributed.mode={config.mode}: not all processes joined at {state.coordinator_address} within "
            f"distributed.timeout={config.timeout} s; start all {state.num_processes} of them with the same address "
            f"and different process ids (this one is {state.process_id})",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(max(0.5, config.timeout - 0.5), explain)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """This process among those of the run, and its devices."""

    index: int
    count: int
    local_devices: int
    devices: int


def process_info() -> ProcessInfo:
    return ProcessInfo(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())


def is_primary() -> bool:
    """Whether this is the process that writes files and prints: process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here, and until the work its devices have queued is done.

    All processes give the same `name`, or JAX raises an AssertionError. In a single process it does nothing.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


_rounds = itertools.count()
_gathered: list[str] = []
"""This process's key of its last `gather`."""


def any_process(flag: bool, timeout: int = 600) -> bool:
    """Whether any process gave True, the same answer on all of them: how hosts stop at the same step.

    Every process calls it equally often. It goes over the hosts' coordination service, not over the devices, so queued
    steps keep running; in a single process it returns `flag`. `timeout`, in seconds, bounds the wait for the slowest.
    """
    if not jax.distributed.is_initialized():
        return flag
    client = jax_distributed.global_state.client
    round_key = f"ridgeline/any/{next(_rounds)}"
    if flag:
        # A key per round: under a shared one, a process already in the next round could be heard in this one.
        client.key_value_set(f"{round_key}/{jax_distributed.global_state.process_id}", "true")
    client.wait_at_barrier("ridgeline/any", timeout_in_ms=timeout * 1000)
    return bool(client.key_value_dir_get(round_key + "/"))


def gather(text: str, timeout: int = 600) -> list[str]:
    """Every process's `text`, in the order of their indices, on all of them.

    Every process calls it equally often. It goes over the hosts' coordination service, as `any_process` does.
    """
    if not jax.distributed.is_initialized():
        return [text]
    client = jax_distributed.global_state.client
    round_key = f"ridgeline/gather/{next(_rounds)}"
    # The service lists keys by name: padded, so that 10 comes after 9.
    own_key = f"{round_key}/{jax_distributed.global_state.process_id:08}"
    client.key_value_set(own_key, text)
    client.wait_at_barrier("ridgeline/gather", timeout_in_ms=timeout * 1000)
    # Who is here has read the round before: what is gathered for days must not stay in process 0's memory.
    for key in _gathered:
        client.key_value_delete(key)
    _gathered[:] = [own_key]
    return [value for _, value in sorted(client.key_value_dir_get(round_key + "/"))]


def shutdown() -> None:
    """Leaves the run, once every process does. Does nothing in a single process, or when called again."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
