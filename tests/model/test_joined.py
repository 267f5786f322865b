"""Projections of one input joined into one array give what they gave apart: every family, biases included."""

import jax
import numpy as np
import pytest

from model.assembly import join_projections
from model.transformer import Definition
from tests.model.test_transformer import FAMILIES
from tests.model.tiny import VOCAB, assert_close, dense, execution, hidden, plain_batch, random_params

# One for each way to write the joined modules; the other families differ elsewhere.
WAYS = ("qwen 3", "gemma 2", "post-norm, plain MLP, half-rotated", "deepseek-style")
MODELS = {name: FAMILIES[name] for name in WAYS} | {
    "gated, all biases": dense(mlp_bias=True, qkv_bias=True, activation="gelu")
}


def copied(params):
    return jax.tree.map(np.copy, params)


@pytest.mark.parametrize("name", MODELS)
def test_joined_equals_apart(name):
    apart, joined = (Definition(MODELS[name], scan=False, joined=joined) for joined in (False, True))
    params, biases = random_params(apart)
    batch = plain_batch(np.random.default_rng(2).integers(VOCAB, size=(2, 7)))
    run = execution(MODELS[name], grouped_matmul="ragged_dot")
    want = hidden(apart, params, biases, batch, run)
    assert_close(hidden(joined, join_projections(copied(params)), biases, batch, run), want, 1e-6)


@pytest.mark.parametrize("name", ["gated, all biases", "deepseek-style", "post-norm, plain MLP, half-rotated"])
def test_joined_arrays_are_those_of_the_definition_and_the_rest_stays(name):
    definition = Definition(MODELS[name], scan=False)
    params, _ = random_params(definition)
    joined = join_projections(copied(params))
    described = Definition(MODELS[name], scan=False, joined=True).abstract[0]
    assert jax.tree.map(np.shape, joined) == jax.tree.map(np.shape, described)
    for index, layer in params["prefix"].items():
        got = joined["prefix"][index]
        kernels = [layer["attention"][part] for part in ("query", "key", "value")]
        np.testing.assert_array_equal(got["attention"]["qkv"], np.concatenate(kernels, axis=1))
        assert not {"query", "key", "value", "query_bias"} & set(got["attention"])
        check_feed_forward(got["mlp"], layer["mlp"])
        if "shared" in layer["mlp"]:
            check_feed_forward(got["mlp"]["shared"], layer["mlp"]["shared"])


def check_feed_forward(got, want):
    for name in ("gate", "gate_bias"):
        if name in want:
            halves = (want[name], want[name.replace("gate", "up")])
            np.testing.assert_array_equal(got[name.replace("gate", "gate_up")], np.concatenate(halves, axis=-1))
    for name in set(want) & set(got) - {"shared"}:
        jax.tree.map(np.testing.assert_array_equal, got[name], want[name])
