"""Two processes compute what one does; a launch that can't work is refused with the setting to change."""

import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import distributed
from parallel.distributed import DistributedConfig
from tests.parallel.two_processes import coordinator_address, finish, run_two, start

WORKER = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from parallel import distributed
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement

address, process_id = sys.argv[1], int(sys.argv[2])
distributed.initialize(distributed.DistributedConfig(
    mode="coordinator", coordinator_address=address, num_processes=2, process_id=process_id, timeout=60))
info = distributed.process_info()
placement = Placement(make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()))
rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)[process_id * 8 : process_id * 8 + 8]
x = jax.make_array_from_process_local_data(placement.sharding("batch", None), rows)
total = jax.jit(lambda x: jnp.sum(x * x, axis=0), out_shardings=placement.sharding(None))(x)
distributed.barrier("computed")
# Process 1 alone raises its flag, at its fourth question.
answers = [distributed.any_process(process_id == 1 and i == 3) for i in range(6)]
texts = [distributed.gather(f"{i} of {process_id}") for i in range(2)]
distributed.shutdown()
distributed.shutdown()
print(json.dumps({"index": info.index, "count": info.count, "local": info.local_devices, "devices": info.devices,
    "primary": info.index == 0, "shape": x.shape, "total": np.asarray(total.addressable_data(0)).tolist(),
    "answers": answers, "texts": texts}))
"""


def test_two_processes_form_one_mesh_and_agree():
    results = run_two(lambda address, process_id: ["-c", WORKER, address, str(process_id)])
    records = [json.loads(result.stdout.splitlines()[-1]) for result in results]
    x = jnp.arange(16 * 3, dtype=jnp.float32).reshape(16, 3)
    for index, record in enumerate(records):
        assert (record["index"], record["count"], record["local"], record["devices"]) == (index, 2, 4, 8)
        assert record["shape"] == [16, 3]
        np.testing.assert_array_equal(record["total"], np.sum(np.asarray(x * x), axis=0))
        assert record["answers"] == [False, False, False, True, False, False]
        assert record["texts"] == [["0 of 0", "0 of 1"], ["1 of 0", "1 of 1"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "coordinator"}, "needs distributed.coordinator_address, distributed.num_processes"),
        (
            {"mode": "coordinator", "coordinator_address": "host:1234", "process_id": 0},
            "needs distributed.num_processes too",
        ),
        (
            {"mode": "coordinator", "coordinator_address": "host:1234", "num_processes": 2, "process_id": 2},
            "distributed.process_id=2 must be at least 0 and below distributed.num_processes=2",
        ),
        (
            {"mode": "coordinator", "coordinator_address": "host:1234", "num_processes": 2, "process_id": -1},
            "distributed.process_id=-1",
        ),
        ({"mode": "gke", "coordinator_address": "host:1234", "num_processes": 0}, "distributed.num_processes=0"),
        ({"mode": "none", "process_id": 1}, "distributed.mode=none does not use distributed.process_id=1"),
        ({"mode": "slurm", "coordinator_address": "host:1"}, "does not use distributed.coordinator_address=host:1"),
        ({"mode": "gke", "process_id": 1}, "does not use distributed.process_id=1"),
        ({"timeout": 0}, "distributed.timeout=0"),
    ],
)
def test_config_refuses_what_no_launch_can_have(settings, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**settings)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:zero", "host:0", "host:65536", "fd00::1"])
def test_address_without_host_or_port_is_refused(address):
    with pytest.raises(ValueError, match=r"distributed\.coordinator_address=.* must be host:port"):
        DistributedConfig(mode="coordinator", coordinator_address=address, num_processes=1, process_id=0)


def test_addresses():
    assert distributed.split_address("node-1.cluster:8476") == ("node-1.cluster", 8476)
    assert distributed.split_address("[fd00::1]:80") == ("fd00::1", 80)


def coordinator(address: str, process_id: int, timeout: int = 1) -> DistributedConfig:
    return DistributedConfig("coordinator", address, num_processes=2, process_id=process_id, timeout=timeout)


def test_unreachable_coordinator_names_the_address():
    address = coordinator_address()
    with pytest.raises(ValueError, match=rf"{address} did not answer within distributed\.timeout=1 s"):
        distributed.initialize(coordinator(address, process_id=1))


def test_taken_port_names_the_address():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"can't open port .* of distributed\.coordinator_address={address}"):
            distributed.initialize(coordinator(address, process_id=0))


def test_missing_process_is_named_before_jax_gives_up():
    address = coordinator_address()
    code = (
        "from parallel.distributed import *\n"
        f"initialize(DistributedConfig('coordinator', '{address}', num_processes=2, process_id=0, timeout=1))"
    )
    (result,) = finish([start(["-c", code])], timeout=60)
    assert result.returncode != 0
    assert f"not all processes joined at {address} within distributed.timeout=1 s" in result.stderr
    assert "start all 2 of them" in result.stderr


SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
LAUNCHER_VARIABLES = (
    *distributed.SLURM_VARIABLES,
    *distributed.GKE_TPU_VARIABLES,
    "JOB_COMPLETION_INDEX",
    "SLURM_GPUS_ON_NODE",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture
def launched(monkeypatch):
    """Calls `initialize` in a given environment and returns what JAX's initialize is given."""

    def launch(config: DistributedConfig, environ: dict[str, str]) -> dict:
        arguments: dict = {}
        for name in LAUNCHER_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: arguments.update(given))
        distributed.initialize(config)
        return arguments

    return launch


def test_mode_none_starts_nothing(launched):
    assert launched(DistributedConfig(), SLURM) == {}


@pytest.mark.parametrize("mode", ["slurm", "auto"])
def test_slurm_is_left_to_jax(launched, mode):
    assert launched(DistributedConfig(mode), SLURM) == {
        "cluster_detection_method": "slurm",
        "local_device_ids": None,
        "initialization_timeout": 300,
    }


def test_slurm_outside_srun_lists_the_missing_variables(launched):
    without = {name: value for name, value in SLURM.items() if "STEP" not in name}
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST, SLURM_STEP_TASKS_PER_NODE not set; start it with srun"):
        launched(DistributedConfig("slurm"), without)


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "local", "gpus", "visible", "expected"),
    [
        ("1(x2)", "1", "0", "8", None, list(range(8))),  # A task per node drives the whole node.
        ("8(x2)", "0", "5", "8", "0,1,2,3,4,5,6,7", [5]),  # A task per GPU, all of them visible.
        ("2", "0", "1", "8", None, [4, 5, 6, 7]),
        ("8(x2)", "0", "5", "8", "5", [0]),  # Bound by Slurm: the task's one GPU is its number 0.
        ("4(x2),2", "2", "1", "4", None, [2, 3]),
        ("1", "0", "0", None, None, None),
    ],
)
def test_slurm_tasks_share_the_gpus_of_a_node(tasks_per_node, node, local, gpus, visible, expected):
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": node, "SLURM_LOCALID": local}
    environ |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    environ |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert distributed.slurm_local_devices(environ) == expected


def test_slurm_gpus_that_do_not_divide():
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"}
    with pytest.raises(ValueError, match="SLURM_GPUS_ON_NODE=8 do not divide over 3 tasks"):
        distributed.slurm_local_devices(environ)


def test_gke_tpu_is_left_to_jax(launched):
    arguments = launched(DistributedConfig("gke"), {"TPU_WORKER_HOSTNAMES": "a,b"})
    assert arguments["cluster_detection_method"] == "gketpu"


def test_gke_gpu_takes_the_completion_index(launched):
    address = coordinator_address()
    config = DistributedConfig("gke", coordinator_address=address, num_processes=2)
    arguments = launched(config, {"JOB_COMPLETION_INDEX": "0"})
    assert arguments == {
        "coordinator_address": address,
        "num_processes": 2,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 300,
    }
    with pytest.raises(ValueError, match=r"JOB_COMPLETION_INDEX=2 must be .* below distributed\.num_processes=2"):
        launched(config, {"JOB_COMPLETION_INDEX": "2"})
    with pytest.raises(ValueError, match=r"needs distributed\.coordinator_address"):
        launched(DistributedConfig("gke"), {"JOB_COMPLETION_INDEX": "0"})


def test_gke_outside_a_job_says_what_is_missing(launched):
    with pytest.raises(ValueError, match=r"neither TPU_WORKER_HOSTNAMES .* nor JOB_COMPLETION_INDEX"):
        launched(DistributedConfig("gke"), {})


def test_auto_without_a_launcher_says_which_mode_to_set():
    code = "from parallel.distributed import *\ninitialize(DistributedConfig('auto', timeout=5))"
    (result,) = finish([start(["-c", code])], timeout=60)
    assert result.returncode == 1
    assert "distributed.mode=auto: JAX finds no launcher that it knows here" in result.stderr


def test_a_single_process_answers_itself_without_touching_a_device():
    code = (
        "from jax._src import xla_bridge\n"
        "from parallel import distributed\n"
        "distributed.initialize(distributed.DistributedConfig())\n"
        "assert distributed.any_process(True) and not distributed.any_process(False)\n"
        "distributed.shutdown()\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "distributed.barrier('alone')\n"
        "assert distributed.is_primary()\n"
        "info = distributed.process_info()\n"
        "assert (info.index, info.count, info.local_devices, info.devices) == (0, 1, 4, 4), info\n"
    )
    (result,) = finish([start(["-c", code])], timeout=60)
    assert result.returncode == 0, result.stderr
