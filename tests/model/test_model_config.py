"""Architectures that cannot be are refused by the name of the field."""

import dataclasses

import pytest

from model.config import RopeConfig
from model.precision import Precision
from tests.model.tiny import dense, moe


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions"],
)
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=rf"model\.{name}=0 must be at least 1"):
        dense(**{name: 0})


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (dense, {"num_heads": 6, "num_kv_heads": 4}, r"num_heads=6 is not divisible by model\.num_kv_heads=4"),
        (dense, {"window_pattern": ()}, r"model\.window_pattern=\(\) needs at least one entry"),
        (dense, {"window_pattern": (4, 0)}, r"model\.window_pattern=\(4, 0\) needs .* None or at least 1"),
        (dense, {"rope": RopeConfig(fraction=0.25)}, r"rope\.fraction=0\.25 of head_dim=4 is 1\.0 elements"),
        (dense, {"rope": RopeConfig(fraction=0.4)}, r"rope\.fraction=0\.4 .* even whole number between 0 and head_dim"),
        (dense, {"rope": RopeConfig(fraction=1.5)}, r"model\.rope\.fraction=1\.5"),
        (moe, {"num_experts": 0}, r"model\.moe\.num_experts=0 .* must be at least 1"),
        (moe, {"experts_per_token": 9}, r"experts_per_token=9 must be between 1 and num_experts=8"),
        (moe, {"experts_per_token": 0}, r"experts_per_token=0 must be between 1"),
        (moe, {"num_dense_layers": 3}, r"num_dense_layers=3 must be between 0 and num_layers=2"),
        (moe, {"dispatch": "capacity", "capacity_factor": 0.0}, r"capacity_factor=0\.0 must be above 0"),
    ],
)
def test_fields_that_contradict_are_refused(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_changed_config_is_checked_again():
    with pytest.raises(ValueError, match="num_heads=3"):
        dataclasses.replace(dense(), num_heads=3)


def test_gradients_have_the_dtype_of_parameters_or_compute():
    assert Precision(gradient="bfloat16").gradient == "bfloat16"
    with pytest.raises(ValueError, match=r"precision\.gradient=float16 must be precision\.param=float32 or"):
        Precision(gradient="float16")


def test_derived_values():
    config = moe(num_layers=5, num_dense_layers=2, window_pattern=(4, None))
    assert [config.window(layer) for layer in range(5)] == [4, None, 4, None, 4]
    assert [config.is_moe(layer) for layer in range(5)] == [False, False, True, True, True]
    assert config.num_moe_layers == 3
    assert (config.scale, dense(attention_scale=0.1).scale) == (0.5, 0.1)
    assert dense().num_moe_layers == 0


def test_a_bias_that_moves_needs_a_bias():
    with pytest.raises(ValueError, match=r"bias_update_rate=0.1 .* set model.moe.router_bias"):
        moe(bias_update_rate=0.1)
