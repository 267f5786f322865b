"""Tokens fed in pieces over a paged cache give the hidden states of the whole sequence: every family, any pieces, any
pages, whatever the pages hold that are not theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.cache import PagedRows, abstract_cache, token_bytes
from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement, ShardingRules
from tests.model.test_transformer import FAMILIES
from tests.model.tiny import COMPILE_FAST, VOCAB, assert_close, dense, execution, hidden, plain_batch, random_params

ROWS, LENGTH, TILE = 3, 21, 6
PAGE = 4
PAGES_PER_ROW = 6
NUM_PAGES = 1 + ROWS * PAGES_PER_ROW + 4


class Model:
    """A family's parameters, its hidden states by the plain forward, and its programs over pages."""

    def __init__(self, family: str) -> None:
        self.config = FAMILIES[family]
        self.definition = Definition(self.config, scan=False)
        self.params, self.biases = random_params(self.definition)
        rng = np.random.default_rng(1)
        self.tokens = rng.integers(VOCAB, size=(ROWS, LENGTH)).astype(np.int32)
        # The last row begins as the first one does.
        self.tokens[-1, : 2 * PAGE] = self.tokens[0, : 2 * PAGE]
        self.want = np.asarray(hidden(self.definition, self.params, self.biases, plain_batch(self.tokens)))
        run = execution(self.config, grouped_matmul="ragged_dot")

        def extend(params, biases, tokens_BT, cache, rows):
            output, cache = self.definition.bind(params, biases).extend(tokens_BT, cache, rows, run)
            return output.hidden_BTD, cache

        self.extend = jax.jit(extend, compiler_options=COMPILE_FAST)

    def junk(self, fill: float) -> list:
        like = abstract_cache(
            self.config,
            num_pages=NUM_PAGES,
            page_size=PAGE,
            dtype="float32",
            placement=None,
            device=jax.devices()[0],
        )
        return jax.tree.map(lambda a: np.full(a.shape, fill, a.dtype), like)


@functools.cache
def model(family: str) -> Model:
    return Model(family)


class Feeding:
    """Rows that are fed piece by piece; what came out is put together."""

    def __init__(self, family: str, page_table: np.ndarray, starts: list[int], fill: float) -> None:
        self.model, self.page_table = model(family), page_table
        self.cache = self.model.junk(fill)
        self.done = np.array(starts, np.int32)
        self.got = self.model.want.copy()

    def feed(self, length: int, counts: np.ndarray) -> None:
        counts = np.minimum(counts, LENGTH - self.done).astype(np.int32)
        rng = np.random.default_rng(int(self.done.sum()))
        # Padding is not zeros.
        tokens = rng.integers(VOCAB, size=(ROWS, length)).astype(np.int32)
        for row, (start, count) in enumerate(zip(self.done, counts, strict=True)):
            tokens[row, :count] = self.model.tokens[row, start : start + count]
        rows = PagedRows(self.page_table, self.done, counts)
        out, self.cache = self.model.extend(self.model.params, self.model.biases, tokens, self.cache, rows)
        out = np.asarray(out)
        for row, (start, count) in enumerate(zip(self.done, counts, strict=True)):
            self.got[row, start : start + count] = out[row, :count]
        self.done = self.done + counts

    def finish(self) -> None:
        """The rest, one token at a time."""
        while (self.done < LENGTH).any():
            self.feed(1, np.ones(ROWS, np.int32))
        assert_close(self.got, self.model.want, 3e-5)


def random_table(rng: np.random.Generator) -> np.ndarray:
    """Pages of each row in any order. What lies past a row's length points anywhere, to pages of others too."""
    own = 1 + rng.permutation(NUM_PAGES - 1)[: ROWS * PAGES_PER_ROW].reshape(ROWS, PAGES_PER_ROW)
    beyond = rng.integers(NUM_PAGES, size=own.shape)
    used = np.arange(PAGES_PER_ROW) < -(-LENGTH // PAGE)
    return np.where(used, own, beyond).astype(np.int32)


pieces = st.lists(st.tuples(*[st.integers(0, TILE)] * ROWS), max_size=10)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(pieces=pieces, seed=st.integers(0, 2**16), fill=st.sampled_from([np.nan, np.inf, 1e30]))
@example([], 0, np.nan)
@example([(TILE, TILE - 1, 1), (0, TILE, TILE), (TILE, 0, TILE), (TILE, TILE, TILE)], 1, np.nan)
def test_pieces_equal_the_whole(family, pieces, seed, fill):
    table = random_table(np.random.default_rng(seed))
    feeding = Feeding(family, table, [0] * ROWS, fill)
    for counts in pieces:
        feeding.feed(TILE, np.array(counts))
    feeding.finish()
    # Nothing but their own pages, and the one for what belongs nowhere, was written.
    others = sorted(set(range(1, NUM_PAGES)) - set(table[:, : -(-LENGTH // PAGE)].ravel().tolist()))
    for before, after in zip(jax.tree.leaves(model(family).junk(fill)), jax.tree.leaves(feeding.cache), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[others], before[others])


@pytest.mark.parametrize("family", ["llama 3", "gemma 2", "gpt-oss"])
def test_rows_that_begin_alike_share_pages(family):
    """The last row has the first one's first pages, and is fed from there on."""
    table = random_table(np.random.default_rng(3))
    table[-1, :2] = table[0, :2]
    feeding = Feeding(family, table, [0, 0, 2 * PAGE], np.nan)
    feeding.feed(TILE, np.array([TILE, TILE, 0]))
    feeding.feed(TILE, np.array([TILE, TILE, 0]))
    for _ in range(3):
        feeding.feed(TILE, np.full(ROWS, TILE - 1))
    feeding.finish()


def test_the_first_layers_alone():
    """A pass of some layers reads and writes their pages, and leaves the other layers' as they are."""
    family = model("gemma 3")
    small = Definition(dense(**{**vars(family.config), "num_layers": 2}), scan=False)
    prefix = {key: value for key, value in family.params["prefix"].items() if int(key) < 2}
    params = family.params | {"prefix": prefix}
    want = hidden(small, params, family.biases, plain_batch(family.tokens))
    table, run = random_table(np.random.default_rng(4)), execution(family.config)
    rows = PagedRows(table, np.zeros(ROWS, np.int32), np.full(ROWS, LENGTH, np.int32))

    @jax.jit
    def first(params, biases, tokens, cache):
        return family.definition.bind(params, biases).extend(tokens, cache, rows, run, num_layers=2)

    output, cache = first(family.params, family.biases, family.tokens, family.junk(np.nan))
    assert_close(output.hidden_BTD, want, 3e-5)
    assert np.isnan(np.asarray(cache[2][0])).all() and not np.isnan(np.asarray(cache[1][0])[table[:, 0]]).any()


def test_pages_of_several_devices_are_split_by_heads():
    config = dense(num_layers=3)
    placement = Placement(make_mesh(MeshConfig(fsdp=1, tensor=4), jax.devices()[:4]), ShardingRules())
    cache = abstract_cache(
        config, num_pages=5, page_size=PAGE, dtype="bfloat16", placement=placement, device=jax.devices()[0]
    )
    assert len(cache) == 3
    for keys, values in cache:
        assert keys.shape == values.shape == (5, PAGE, 4, 4) and keys.dtype == jnp.bfloat16
        assert keys.sharding.shard_shape(keys.shape) == (5, PAGE, 1, 4)
    assert token_bytes(config, "bfloat16") == 3 * 2 * 4 * 4 * 2


def test_a_token_that_is_not_finite_harms_only_those_that_see_it():
    its = model(next(iter(FAMILIES)))
    token, place = int(its.tokens[0, 3]), 3
    table = np.array(its.params["embedding"]["table"])
    table[token] = np.nan
    broken = its.params | {"embedding": its.params["embedding"] | {"table": table}}
    tokens = np.where(its.tokens == token, (token + 1) % VOCAB, its.tokens)[:, :TILE]
    rows = PagedRows(
        np.arange(1, 1 + ROWS * PAGES_PER_ROW, dtype=np.int32).reshape(ROWS, -1),
        np.zeros(ROWS, np.int32),
        np.full(ROWS, TILE, np.int32),
    )
    sound, _ = its.extend(its.params, its.biases, tokens, its.junk(0.0), rows)
    tokens[0, place] = token
    got, _ = its.extend(broken, its.biases, tokens, its.junk(0.0), rows)
    np.testing.assert_array_equal(got[1:], sound[1:])
    np.testing.assert_array_equal(got[0, :place], sound[0, :place])
    assert np.isnan(np.asarray(got)[0, place:]).all()
