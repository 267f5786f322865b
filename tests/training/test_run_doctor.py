"""Faults planted in real runs are what `perf doctor` names first; a healthy run has none."""

import json
import statistics
import subprocess
import sys

import pytest

from perf.breakdown import CATEGORIES
from tests.training import runs

FAULTS = {
    "slow_loader": "input-bound",
    "host_sync": "host-bound",
    "bad_mesh": "serialized collective",
    "skewed_router": "expert imbalance",
    "changing_shape": "recompilation",
}


def process(*arguments: str) -> str:
    # Compiled as users have it: how long that takes against a step is what one fault is found by.
    environment = ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2"]
    command = ["env", *environment, sys.executable, "-m", "tests.training.planted_faults", *arguments]
    result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the doctor says of each run."""
    folder = str(tmp_path_factory.mktemp("faults"))
    names = ["healthy", *FAULTS]
    process(folder, *names)
    return json.loads(process("--examine", folder, *names).splitlines()[-1])


def test_a_healthy_run_has_no_finding(found):
    assert found["healthy"]["findings"] == [], found["healthy"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_first(found, fault):
    findings = found[fault]["findings"]
    assert findings and findings[0]["name"] == FAULTS[fault], findings
    assert findings[0]["evidence"] and findings[0]["setting"]


@pytest.mark.parametrize("name", ["healthy", "slow_loader", "host_sync", "bad_mesh", "changing_shape"])
def test_categories_sum_to_the_step(found, name):
    times = found[name]["breakdown"]
    for device in times["devices"]:
        assert sum(device["categories_ms"].values()) == pytest.approx(device["step_ms"], rel=1e-9)
    assert set(times["categories_ms"]) == set(CATEGORIES)


def test_the_time_at_stake_is_the_pause(found):
    """Both faults take twice as long as a step, after it."""
    for fault in ("slow_loader", "host_sync"):
        step = statistics.median(found[fault]["breakdown"]["step_times_ms"])
        share = found[fault]["findings"][0]["milliseconds"] / step
        assert 0.3 < share < 1, (found[fault]["findings"][0], found[fault]["breakdown"])


def test_ops_of_a_run_are_known_by_its_program(found):
    ops = found["healthy"]["breakdown"]["ops"]
    assert {"matmul", "attention", "elementwise"} <= {op["kind"] for op in ops}
    assert any("mlp" in op["scope"] for op in ops)
    # Two devices, each with its own rows: gradients are summed.
    assert found["healthy"]["breakdown"]["collective_ms"] > 0
