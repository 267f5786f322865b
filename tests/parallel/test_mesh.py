"""Mesh shapes resolve to every device or are refused with the setting to change."""

import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from parallel.mesh import MESH_AXES, RESERVED_AXES, MeshConfig, make_mesh

IMPLEMENTED = tuple(axis for axis in MESH_AXES if axis not in RESERVED_AXES)


def sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    return {axis: size for axis, size in zip(MESH_AXES, config.shape(num_devices), strict=True) if size > 1}


@pytest.mark.parametrize(
    ("config", "num_devices", "expected"),
    [
        (MeshConfig(), 1, {}),
        (MeshConfig(), 8, {"fsdp": 8}),
        (MeshConfig(fsdp=1, tensor=4, data=2), 8, {"tensor": 4, "data": 2}),
        (MeshConfig(expert=2, tensor=2), 8, {"fsdp": 2, "expert": 2, "tensor": 2}),
        (MeshConfig(fsdp=1, data=-1, expert=4), 4096, {"data": 1024, "expert": 4}),
        (MeshConfig(tensor=8), 8, {"tensor": 8}),
    ],
)
def test_one_axis_may_take_what_the_others_leave(config, num_devices, expected):
    assert sizes(config, num_devices) == expected


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(st.sampled_from(IMPLEMENTED), st.sampled_from([-1, 1, 2, 3, 4, 8])),
    st.sampled_from([1, 2, 6, 8, 12, 64]),
)
def test_a_shape_uses_every_device_and_keeps_what_was_set(axes, num_devices):
    config = MeshConfig(**axes)
    try:
        shape = dict(zip(MESH_AXES, config.shape(num_devices), strict=True))
    except ValueError:
        given_sizes = [getattr(config, axis) for axis in MESH_AXES]
        fixed = math.prod(size for size in given_sizes if size != -1)
        free = given_sizes.count(-1)
        assert free > 1 or (fixed != num_devices if free == 0 else num_devices % fixed)
        return
    assert math.prod(shape.values()) == num_devices
    assert all(shape[axis] == size for axis, size in axes.items() if size != -1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=1), r"mesh of one device is 1 devices, and 8 are available; .*set one of them to -1"),
        (MeshConfig(fsdp=4, tensor=4), r"mesh fsdp 4 × tensor 4 is 16 devices, and 8 are available"),
        (MeshConfig(tensor=3), r"needs a multiple of 3 devices, and 8 are available; .*product divides 8"),
        (MeshConfig(tensor=16), r"needs a multiple of 16 devices, and 8 are available"),
        (MeshConfig(data=-1), r"at most one may be -1"),
        (MeshConfig(tensor=0), r"'tensor': 0.*each must be at least 1"),
        (MeshConfig(expert=-2), r"'expert': -2.*each must be at least 1"),
        *[
            (MeshConfig(**{axis: size}), f"mesh.{axis}={size}: axis '{axis}' is reserved .* set mesh.{axis} to 1")
            for axis in RESERVED_AXES
            for size in (2, -1)
        ],
    ],
)
def test_a_shape_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.shape(8)


def test_mesh_has_every_axis_and_each_device_once():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices())
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_over_some_of_the_devices():
    mesh = make_mesh(MeshConfig(tensor=2, fsdp=2), jax.devices()[4:])
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()[4:]}
    with pytest.raises(ValueError, match="is 4 devices, and 3 are available"):
        make_mesh(MeshConfig(tensor=2, fsdp=2), jax.devices()[:3])


def test_tensor_neighbours_are_neighbouring_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices())
    pairs = mesh.devices.reshape(4, 2)
    assert all(right.id == left.id + 1 for left, right in pairs)
