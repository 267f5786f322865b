"""Which matrices get which format."""

import pytest

from quantization.rules import ProductRules


def test_each_part_has_its_format():
    rules = ProductRules("int8", head="w8")
    found = {part: rules.format_of("m", part, 96) for part in ("projection", "experts", "head", None)}
    assert found[None] is None
    assert (found["projection"].values, found["projection"].activation) == ("int8", "int8")
    assert found["experts"] == found["projection"]
    assert (found["head"].name, found["head"].activation) == ("w8", None)


@pytest.mark.parametrize(("products", "part"), [("compute", "projection"), ("w4", "head")])
def test_nothing_is_quantised_unasked(products, part):
    assert ProductRules(products).format_of("m", part, 128) is None


@pytest.mark.parametrize(("in_dim", "group"), [(256, 128), (576, 64), (96, 32)])
def test_the_longest_group_that_divides_is_taken(in_dim, group):
    assert ProductRules("w4").format_of("m", "projection", in_dim).group == group


def test_a_shorter_group_can_be_asked_for():
    assert ProductRules("w4", group=64).format_of("m", "projection", 256).group == 64


def test_a_matrix_that_no_group_divides_is_named():
    rules = ProductRules("w4", keep=("layers/1/*",))
    with pytest.raises(ValueError, match="groups of 128, 64, 32 inputs, and layers/0/mlp/down has 100"):
        rules.format_of("layers/0/mlp/down", "projection", 100)
    assert rules.format_of("layers/1/mlp/down", "projection", 100) is None


def test_a_pattern_that_keeps_nothing_is_an_error():
    names = ["layers/0/mlp/down", "layers/0/attention/qkv"]
    ProductRules("w8", keep=("*/down", "layers/0/att*")).check(names)
    with pytest.raises(ValueError, match=r"precision.keep=\*/query matches no matrix.*layers/0/attention/qkv"):
        ProductRules("w8", keep=("*/down", "*/query")).check(names)
