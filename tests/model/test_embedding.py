"""The token table's lookup, and its gradient where a token is frequent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.transformer import Definition
from tests.model.tiny import VOCAB, dense, execution, random_params

CONFIG = dense(num_layers=1)


def lookup(table, tokens_BT, compute):
    definition = Definition(CONFIG, scan=False)
    params, biases = random_params(definition)
    params = params | {"embedding": {"table": table}}
    return definition.bind(params, biases).embedding(tokens_BT, execution(CONFIG, compute))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_rows_are_those_of_the_table_in_the_compute_dtype(compute):
    table = np.random.default_rng(0).normal(size=(VOCAB, CONFIG.embed_dim)).astype(np.float32)
    tokens_BT = np.random.default_rng(1).integers(VOCAB, size=(2, 16))
    rows = lookup(table, tokens_BT, compute)
    assert rows.dtype == compute
    np.testing.assert_array_equal(rows, table.astype(jnp.dtype(compute))[tokens_BT])


def test_the_gradient_of_a_frequent_token_is_its_sum():
    """1024 ones of bfloat16: added up in bfloat16, they stop at 256."""
    tokens_BT = np.full((1, 1025), 3)
    tokens_BT[0, 7] = 5
    table = jnp.ones((VOCAB, CONFIG.embed_dim), jnp.float32)

    @jax.jit
    def gradient(table):
        return jax.grad(lambda table: lookup(table, tokens_BT, "bfloat16").astype(jnp.float32).sum())(table)

    want = np.zeros(table.shape, np.float32)
    want[3], want[5] = 1024, 1
    np.testing.assert_array_equal(gradient(table), want)
