"""Logical axes land where the rules say, and rules that can't hold are refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules, as_tuple, constrain, from_host_rows, map_shards

LOGICAL = tuple(field.name for field in dataclasses.fields(ShardingRules))


@pytest.fixture(scope="module")
def placement() -> Placement:
    """fsdp 2 × expert 2 × tensor 2."""
    return Placement(make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()))


def test_spec_of_weights_and_activations():
    rules = ShardingRules()
    assert rules.spec("batch", "sequence", "act_embed") == PartitionSpec(
        ("slice", "data", "fsdp", "expert"), None, None
    )
    assert rules.spec("embed", "mlp") == PartitionSpec(("fsdp", "expert"), "tensor")
    assert rules.spec("layers", "experts", "expert_embed", "expert_mlp") == PartitionSpec(
        None, "expert", "fsdp", "tensor"
    )
    assert rules.spec() == PartitionSpec()
    assert rules.spec(None, "mlp") == PartitionSpec(None, "tensor")
    assert ShardingRules(mlp=None).spec("embed", "mlp") == PartitionSpec(("fsdp", "expert"), None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.sampled_from(LOGICAL), max_size=4))
def test_spec_never_uses_a_mesh_axis_twice(logical):
    try:
        spec = ShardingRules().spec(*logical)
    except ValueError as error:
        assert "is used by both" in str(error)
        return
    used = [axis for entry in spec for axis in as_tuple(entry)]
    assert len(spec) == len(logical)
    assert len(used) == len(set(used))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"mlp": "tensr"}, r"rules\.mlp=\('tensr',\) names unknown mesh axes \['tensr'\]; known: slice, data, fsdp"),
        ({"batch": ("data", "model")}, r"rules\.batch=.* unknown mesh axes \['model'\]"),
        ({"embed": ("fsdp", "fsdp")}, r"rules\.embed=\('fsdp', 'fsdp'\) uses a mesh axis twice"),
    ],
)
def test_rules_that_cannot_hold_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        ShardingRules(**rules)


def test_unknown_logical_axis_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd'; known: batch, sequence, .*layers"):
        ShardingRules().spec("embd")


def test_two_axes_of_one_array_on_one_mesh_axis():
    with pytest.raises(
        ValueError, match=r"'tensor' is used by both 'mlp' and 'vocab'; change rules\.mlp or rules\.voc"
    ):
        ShardingRules().spec("mlp", "vocab")


def test_axes_and_size_count_only_axes_with_several_devices(placement):
    assert placement.axes("batch") == ("fsdp", "expert")
    assert placement.size("batch") == 4
    assert (placement.axes("sequence"), placement.size("sequence")) == ((), 1)
    alone = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))
    assert all(alone.axes(logical) == () for logical in LOGICAL)


def test_check_names_the_setting_and_the_mesh(placement):
    placement.check("data.batch_size", 12, "batch")
    placement.check("anything", 7, "sequence")
    with pytest.raises(
        ValueError, match=r"num_experts=13 is not divisible by mesh axis 'expert'=2; set mesh\.expert to"
    ):
        placement.check("num_experts", 13, "experts")
    with pytest.raises(ValueError, match=r"data\.batch_size=6 .* 'fsdp'=2 × 'expert'=2; .*mesh\.fsdp × mesh\.expert"):
        placement.check("data.batch_size", 6, "batch")


def test_constrain_places_values_without_changing_them(placement):
    x = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)
    y = jax.jit(lambda x: constrain(x, placement, "batch", "sequence", "act_mlp"))(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.is_equivalent_to(placement.sharding("batch", "sequence", "act_mlp"), 3)
    assert y.addressable_shards[0].data.shape == (2, 4, 3)
    gradient = jax.grad(lambda x: jnp.sum(constrain(x, placement, "batch", "sequence", "act_mlp") ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)


def test_constrain_without_a_placement_is_the_identity(placement):
    x = jnp.ones((2, 3))
    assert constrain(x, None, "batch", "act_embed") is x
    with pytest.raises(AssertionError):
        constrain(x, placement, "batch")


def test_placement_is_a_static_argument(placement):
    traces = []

    def scale(x, placement):
        traces.append(placement)
        return constrain(2 * x, placement, "batch", None)

    jitted = jax.jit(scale, static_argnums=1)
    x = jnp.ones((4, 2))
    jitted(x, placement)
    jitted(x, Placement(make_mesh(MeshConfig(expert=2, tensor=2), jax.devices()), ShardingRules()))
    assert len(traces) == 1
    jitted(x, Placement(placement.mesh, ShardingRules(batch=None)))
    assert len(traces) == 2


def test_map_shards_gives_each_device_its_shard(placement):
    x = jnp.arange(8.0 * 4).reshape(8, 4)
    weight = jnp.arange(4.0 * 6).reshape(4, 6)
    shapes = []

    def product(x, weight, bias):
        assert bias is None
        shapes.append((x.shape, weight.shape))
        return x @ weight

    mapped = map_shards(
        product, placement, (("batch", None), (None, "act_mlp"), ("act_mlp",)), outputs=("batch", "act_mlp")
    )
    np.testing.assert_allclose(jax.jit(mapped)(x, weight, None), x @ weight)
    assert shapes == [((2, 4), (4, 3))]


def test_map_shards_of_several_results_and_without_a_placement(placement):
    x = jnp.arange(8.0).reshape(4, 2)

    def both(x):
        return x + 1, x * 2

    mapped = map_shards(both, placement, (("batch", None),), outputs=(("batch", None), ("batch", None)))
    for got, expected in zip(mapped(x), both(x), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert map_shards(both, None, (("batch", None),), outputs=(("batch", None), ("batch", None))) is both


def test_host_rows_of_one_host_are_the_global_array(placement):
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    x = from_host_rows(rows, placement, "batch", None)
    assert x.shape == (8, 2)
    assert x.sharding.spec == placement.rules.spec("batch", None)
    np.testing.assert_array_equal(x, rows)


def test_default_rules_name_mesh_axes_only():
    used = {axis for logical in LOGICAL for axis in as_tuple(getattr(ShardingRules(), logical))}
    assert used <= set(MESH_AXES)
