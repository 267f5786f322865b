"""What debug mode finds in arrays, sizes of groups, lengths and pages: at once, and in programs that were traced."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_matmul.quantized import quantized_grouped_matmul
from kernels.grouped_matmul.swiglu import grouped_swiglu
from kernels.paged_attention import extend_pages, paged_attention, write_pages
from kernels.target import Target
from quantization.qarray import quantize

CPU = Target("cpu")
ROWS = 6
# Pages 0 to 4, of four positions; three for each of two rows.
NUM_PAGES, PAGE, WIDTH = 5, 4, 3
TABLE = [[1, 2, 3], [4, 0, 0]]


@pytest.fixture(autouse=True)
def debug_mode():
    with jax.enable_checks(True):
        yield
        # JAX waits for the last program with checks on each device when it exits: let that be one that succeeded.
        jax.block_until_ready(_sharded(jnp.ones((ROWS, 64)), jnp.asarray([6, 0, 0], jnp.int32)))


def grouped(sizes, x=None):
    x = jnp.ones((ROWS, 64), jnp.bfloat16) if x is None else x
    return grouped_matmul(x, jnp.ones((3, 64, 64), x.dtype), sizes, impl="loop")


def gated(impl, target, sizes):
    up, down = jnp.ones((3, 64, 64), jnp.bfloat16), jnp.ones((3, 64, 64), jnp.bfloat16)
    x = jnp.ones((ROWS, 64), jnp.bfloat16)
    return grouped_swiglu(x, up, up, down, sizes, impl=impl, target=target)


def few_bits(sizes):
    w = quantize(jnp.ones((3, 64, 64)), "int8", (1, None, 1))
    return quantized_grouped_matmul(jnp.ones((ROWS, 64)), w, sizes, impl="reference", target=CPU)


def pages(dtype=jnp.float32):
    return jnp.zeros((2, NUM_PAGES, PAGE, 1, 8), dtype)


def attend(table, lengths):
    q = jnp.ones((2, 1, 2, 8))
    return paged_attention(q, *pages(), table, lengths, scale=1.0, impl="xla")


def write(table, starts, counts):
    return write_pages(*pages(), *jnp.ones((2, 2, 2, 1, 8)), table, starts, counts)[0]


def extend(table, starts, counts):
    q = jnp.ones((2, 2, 2, 8))
    return extend_pages(q, *jnp.ones((2, 2, 2, 1, 8)), *pages(), table, starts, counts, scale=1.0, impl="xla")[0]


FAULTS = {
    "negative size": (grouped, ([3, -1, 2],), r"grouped_matmul: group_sizes\[1\] is -1"),
    "sum above the rows": (grouped, ([3, 2, 2],), "grouped_matmul: the sum of group_sizes is 7; at most the 6 rows"),
    "gated by products": (functools.partial(gated, "loop", CPU), ([7, 0, 0],), "sum of group_sizes is 7"),
    "gated in one": (
        functools.partial(gated, "pallas", Target("gpu", (9, 0))),
        ([7, 0, 0],),
        "grouped_swiglu: the sum of group_sizes is 7",
    ),
    "of few bits": (few_bits, ([0, 0, -7],), r"quantized_grouped_matmul: group_sizes\[2\] is -7"),
    "negative length": (attend, (TABLE, [3, -1]), r"lengths\[1\] is -1; it must be in \[0, 12\]"),
    "too long": (attend, (TABLE, [13, 1]), r"lengths\[0\] is 13; it must be in \[0, 12\]"),
    "no such page": (attend, ([[1, 5, 9], [4, 0, 0]], [5, 1]), r"page_table\[0, 1\] is 5; it must be in \[0, 5\)"),
    "negative page": (attend, ([[1, 2, 3], [-1, 0, 0]], [5, 1]), r"page_table\[1, 0\] is -1"),
    "writes no such page": (write, ([[9, 9, 5], [4, 0, 0]], [8, 1], [1, 1]), r"write_pages: page_table\[0, 2\] is 5"),
    "writes on into no such page": (write, ([[1, 5, 0], [4, 0, 0]], [3, 1], [2, 1]), r"page_table\[0, 1\] is 5"),
    "writes before": (write, (TABLE, [1, -1], [1, 1]), r"row 1 is to have positions \[-1, 0\)"),
    "writes past": (
        write,
        (TABLE, [11, 0], [2, 1]),
        r"row 0 is to have positions \[11, 13\); they must be in \[0, 12\)",
    ),
    "negative count": (write, (TABLE, [0, 0], [1, -1]), r"counts\[1\] is -1; it must be in \[0, 2\]"),
    "count above the tokens": (write, (TABLE, [0, 0], [3, 0]), r"counts\[0\] is 3"),
    "extends past": (extend, (TABLE, [0, 11], [1, 2]), r"extend_pages: row 1 is to have positions \[11, 13\)"),
    "extends after no such page": (extend, ([[5, 2, 3], [4, 0, 0]], [6, 0], [1, 1]), r"page_table\[0, 0\] is 5"),
}
LEGAL = {
    "sizes of all rows": (grouped, ([0, 6, 0],)),
    "rows of no group": (grouped, ([0, 1, 0],)),
    "gated": (functools.partial(gated, "loop", CPU), ([1, 5, 0],)),
    "of few bits": (few_bits, ([6, 0, 0],)),
    # Past a length, entries may be anything; and all of a row's pages may be in use.
    "lengths to the ends": (attend, ([[1, 2, 3], [-7, 99, 5]], [12, 0])),
    "a page's last position": (attend, ([[1, 2, 99], [4, 99, 99]], [8, 4])),
    "writes around others' pages": (write, ([[99, 2, 99], [4, -1, 0]], [6, 0], [2, 2])),
    "writes of no tokens": (write, ([[99, 99, 99], [4, 0, 0]], [-1, 10], [0, 2])),
    "rows that fill a batch": (extend, ([[99, 99, 99], [4, 0, 0]], [-1, 1], [0, 2])),
    "rows that have ended": (extend, (TABLE, [40, 1], [0, 2])),
}


def arrays(values):
    return [jnp.asarray(value, jnp.int32) for value in values]


@pytest.mark.parametrize("name", FAULTS)
def test_at_once(name):
    op, values, words = FAULTS[name]
    with pytest.raises(ValueError, match=words):
        op(*arrays(values))


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "gated in one"])
def test_when_a_traced_program_runs(name):
    op, values, words = FAULTS[name]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)ValueError: .*{words}"):
        jax.block_until_ready(jax.jit(op)(*arrays(values)))


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_passes(name):
    op, values = LEGAL[name]
    jax.block_until_ready(op(*arrays(values)))
    jax.block_until_ready(jax.jit(op)(*arrays(values)))


def sharded(x, sizes):
    mesh = Mesh(jax.devices()[:2], ("x",))
    specs = (PartitionSpec(), PartitionSpec("x"))
    own = jax.shard_map(
        lambda x, sizes: grouped(sizes[0], x), mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"), check_vma=False
    )
    # One device's sizes are right.
    return own(x, jnp.stack([jnp.zeros_like(sizes), sizes]))


_sharded = jax.jit(sharded)


def scanned(x, sizes):
    def step(x, own):
        return x + grouped(own, x), None

    return jax.lax.scan(step, x, jnp.stack([jnp.zeros_like(sizes), sizes]))[0]


TRANSFORMS = {
    "scan": scanned,
    "shard_map": sharded,
    "gradient": lambda x, sizes: jax.grad(lambda x: jnp.sum(grouped(sizes, x)))(x),
    "gradient that recomputes": lambda x, sizes: jax.grad(lambda x: jnp.sum(jax.checkpoint(grouped)(sizes, x)))(x),
    "while": lambda x, sizes: jax.lax.fori_loop(0, 1 - sizes[0] // 100, lambda _, x: grouped(sizes, x), x),
    "cond": lambda x, sizes: jax.lax.cond(sizes[0] > 5, lambda: grouped(sizes, x), lambda: x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside(name):
    run, x = jax.jit(TRANSFORMS[name]), jnp.ones((ROWS, 64))
    jax.block_until_ready(run(x, jnp.asarray([6, 0, 0], jnp.int32)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)ValueError: .*the sum of group_sizes is 7"):
        jax.block_until_ready(run(x, jnp.asarray([7, 0, 0], jnp.int32)))


@pytest.mark.parametrize("name", ["negative size", "of few bits", "too long", "writes past", "extends past"])
def test_nothing_is_compiled_in_without_debug_mode(name):
    op, values, _ = FAULTS[name]
    values = arrays(values)
    assert "callback" in str(jax.make_jaxpr(op)(*values))
    with jax.enable_checks(False):
        # A function of its own: traces are kept.
        assert "callback" not in str(jax.make_jaxpr(functools.partial(op))(*values))
        # As data.
        assert np.isfinite(np.asarray(op(*values), np.float32)).all()
