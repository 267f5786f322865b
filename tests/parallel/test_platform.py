"""Where JAX is kept from looking for a TPU, and where it is left alone."""

import importlib.util
from pathlib import Path

import jax
import pytest

from parallel import platform


@pytest.fixture
def machine(monkeypatch):
    """Calls `skip_absent_tpu` on a described machine; returns the platforms that JAX is then told to look for."""

    def call(modules=(), devices=(), platforms=None):
        chosen = {"jax_platforms": platforms}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)
        monkeypatch.setattr(Path, "glob", lambda self, pattern: [d for d in devices if Path(d).match(pattern)])
        # The tests' own platform is chosen already: the real setting must neither be read nor changed.
        monkeypatch.setattr(platform, "jax", FakeJax(chosen))
        platform.skip_absent_tpu()
        return chosen["jax_platforms"]

    return call


class FakeJax:
    def __init__(self, chosen):
        self.config = self
        self.chosen = chosen

    @property
    def jax_platforms(self):
        return self.chosen["jax_platforms"]

    def update(self, name, value):
        assert name in self.chosen
        self.chosen[name] = value


def test_libtpu_without_a_tpu_means_cpu(machine):
    assert machine(modules=["libtpu"]) == "cpu"


def test_without_libtpu_nothing_changes(machine):
    assert machine() is None
    assert machine(modules=["jax_cuda13_plugin"]) is None


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"])
def test_a_gpu_plugin_is_left_to_find_its_device(machine, plugin):
    assert machine(modules=["libtpu", plugin]) is None


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_is_found_by_its_device_file(machine, device):
    assert machine(modules=["libtpu"], devices=[device]) is None


def test_the_vfio_control_file_is_no_tpu(machine):
    assert machine(modules=["libtpu"], devices=["vfio/vfio"]) == "cpu"


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_a_choice_already_made_stands(machine, platforms):
    assert machine(modules=["libtpu"], platforms=platforms) == platforms


def test_the_setting_exists():
    """The fake above has this name; the tests' own setting is the CPU."""
    assert jax.config.jax_platforms == "cpu"
