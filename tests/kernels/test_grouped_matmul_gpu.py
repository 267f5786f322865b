"""Grouped product on Hopper: the kernels, interpreted or on a GPU, against a loop over groups in float64."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import GroupedCase, choose, grouped_matmul, supports
from kernels.grouped_matmul.tiles import (
    Tiles,
    choose_gated_gradient_tiles,
    choose_gated_tiles,
    choose_gradient_tiles,
    choose_tiles,
    shared_bytes,
)
from kernels.hopper_chip import SHARED_BYTES
from kernels.target import Target

H100 = Target("gpu", (9, 0))
CASE = GroupedCase("bfloat16", 32768, 8, 1024, 3584)


@pytest.fixture
def gpu(monkeypatch, execution):
    """The kernels' module, on a chip of three processors, as the interpreter can run it."""
    from kernels.grouped_matmul import gpu, persistent

    monkeypatch.setattr(persistent, "NUM_PROCESSORS", 3)
    execution.put_plainly(monkeypatch, persistent, in_one_place=lambda *arrays: arrays)
    return gpu


def computed(execution, gpu, which, x, w, dy, sizes, chosen, races=True):
    run = functools.partial(execution.kernel, group_sizes=jnp.asarray(sizes, jnp.int32), tiles=chosen, races=races)
    match which:
        case "forward":
            return np.asarray(run(gpu.product, x, w))
        case "dx":
            return np.asarray(run(gpu.product, dy, w, transpose=True))
        case "dw":
            return np.asarray(run(gpu.weight_gradient, x, dy))


def operands(M, K, N, sizes, dtype="bfloat16"):
    """Rows of no group hold what is not finite."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape) for shape in ((M, K), (len(sizes), K, N), (M, N)))
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.inf
    return tuple(jnp.asarray(array, dtype) for array in (x, w, dy))


def exact(which, x, w, dy, sizes):
    """In float64, one group after another; and the same of absolute values."""
    results = []
    for of in (lambda x: x, np.abs):
        x64, w64, dy64 = (of(np.asarray(array, np.float64)) for array in (x, w, dy))
        out = np.zeros({"forward": dy.shape, "dx": x.shape, "dw": w.shape}[which])
        stop = 0
        for group, size in enumerate(sizes):
            rows = slice(stop, stop + size)
            stop += size
            match which:
                case "forward":
                    out[rows] = x64[rows] @ w64[group]
                case "dx":
                    out[rows] = dy64[rows] @ w64[group].T
                case "dw":
                    out[group] = x64[rows].T @ dy64[rows]
        results.append(out)
    return results


def assert_rounds_once(actual, which, x, w, dy, sizes):
    """One rounding of the result to its dtype, and of each term of its sum to float32; zeros in rows of no group."""
    true, size = exact(which, x, w, dy, sizes)
    half_unit = float(jnp.finfo(actual.dtype).eps) / 2
    assert (np.abs(actual.astype(np.float64) - true) <= half_unit * np.abs(true) + 1e-5 * size).all()
    if which != "dw":
        assert (actual[sum(sizes) :] == 0).all()


SMALL = Tiles(128, 128, "rows", 2, 1)
# One case for each way through the kernels; an interpreted one takes seconds.
CASES = {
    "ragged, empty, rows of none": dict(which="forward", M=200, K=128, N=192, sizes=(37, 0, 91, 40)),
    "ragged, empty, rows of none, dx": dict(which="dx", M=200, K=192, N=128, sizes=(37, 0, 91, 40)),
    "ragged, empty, rows of none, dw": dict(which="dw", M=200, K=64, N=192, sizes=(37, 0, 91, 40)),
    "one group of all, M no multiple of eight": dict(which="forward", M=203, K=64, N=64, sizes=(0, 203, 0)),
    "one group of all, M no multiple of eight, dw": dict(which="dw", M=203, K=64, N=64, sizes=(0, 203, 0)),
    "no rows in groups, float16": dict(which="forward", M=24, K=64, N=64, sizes=(0, 0), dtype="float16"),
    "no rows in groups, dw": dict(which="dw", M=24, K=64, N=64, sizes=(0, 0)),
    "columns shared out, wide tiles, panels": dict(
        which="forward", M=300, K=64, N=320, sizes=(290, 3), chosen=Tiles(128, 256, "columns", 2, 2)
    ),
    "columns shared out, dx": dict(
        which="dx", M=72, K=192, N=64, sizes=(5, 60), chosen=Tiles(128, 256, "columns", 2, 2)
    ),
    # Three processors are one cluster, and one that is left out.
    "clusters, more tiles than processors": dict(
        which="forward", M=208, K=64, N=128, sizes=(37, 0, 163), chosen=Tiles(128, 128, "rows", 3, 1, cluster=2)
    ),
    "clusters, dx": dict(
        which="dx", M=72, K=128, N=64, sizes=(5, 60), chosen=Tiles(128, 128, "columns", 3, 1, cluster=2)
    ),
    "clusters, dw": dict(
        which="dw", M=72, K=192, N=128, sizes=(5, 60), chosen=Tiles(128, 128, "columns", 3, 1, cluster=2)
    ),
    "columns shared out, dw": dict(
        which="dw", M=100, K=64, N=192, sizes=(5, 95), chosen=Tiles(128, 256, "columns", 2, 2)
    ),
}


# What another case goes through but for a dimension.
SLOW = (
    "clusters, dw",
    "clusters, dx",
    "one group of all, M no multiple of eight, dw",
    "no rows in groups, dw",
    "columns shared out, dx",
)


# Of numpy, in the interpreter: infinities meet, in rows that are not kept.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES])
def test_product_and_gradients(execution, gpu, name):
    fields = {"chosen": SMALL, "dtype": "bfloat16", **CASES[name]}
    which, sizes, chosen = fields["which"], fields["sizes"], fields["chosen"]
    x, w, dy = operands(fields["M"], fields["K"], fields["N"], sizes, fields["dtype"])
    assert_rounds_once(computed(execution, gpu, which, x, w, dy, sizes, chosen), which, x, w, dy, sizes)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 144), min_size=4, max_size=4))
@example(cuts=[1, 1, 2, 9])  # groups within eight rows, which one copy brings
@example(cuts=[5, 132, 137, 144])  # 127 rows that reach into a second tile, since a tile begins before them
def test_any_groups(execution, gpu, cuts):
    sizes = tuple(np.diff([0, *sorted(cuts)]).tolist())
    x, w, dy = operands(144, 64, 64, sizes)
    for which in ("forward", "dw"):
        # One compilation for all examples.
        actual = computed(execution, gpu, which, x, w, dy, sizes, SMALL, races=False)
        assert_rounds_once(actual, which, x, w, dy, sizes)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_rows_of_other_groups_may_hold_anything(execution, gpu):
    """What is not finite in one group's rows stays in that group's results."""
    sizes = (13, 30, 21)
    x, w, dy = operands(64, 64, 64, sizes)
    bad_x, bad_dy = x.at[13:43].set(jnp.nan), dy.at[13:43].set(jnp.inf)
    for which, others in (("forward", np.r_[0:13, 43:64]), ("dw", np.array([0, 2]))):
        true = exact(which, x, w, dy, sizes)[0]
        actual = computed(execution, gpu, which, bad_x, w, bad_dy, sizes, SMALL, races=False)
        np.testing.assert_allclose(actual[others].astype(np.float64), true[others], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("out_dim", [64, 128, 192, 2048, 14336])
def test_chosen_tiles_fit(out_dim):
    products = [choose_tiles(out_dim, False), choose_tiles(out_dim, True), choose_gradient_tiles(out_dim)]
    products += [choose_gated_gradient_tiles(32768, groups, out_dim) for groups in (8, 128)]
    assert [product.cluster for product in products] == [1, 1, 1, 2, 1]
    for chosen, matrices in [*((product, 1) for product in products), (choose_gated_tiles(), 2)]:
        assert shared_bytes(chosen, matrices) <= SHARED_BYTES
        rows, columns = chosen.piece
        # 128 registers of sums to a thread, and whole copies of 64 columns, an even number of them.
        assert rows % 64 == 0 and columns % 64 == 0 and rows * columns * matrices <= 64 * 256
        assert rows * columns // 64**2 % 2 == 0


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({}, Target("cpu"), "compute capability 9.0, and the target is cpu"),
        ({}, Target("gpu", (8, 0)), "compute capability 9.0, and the target is gpu of compute capability 8.0"),
        ({"dtype": "float32"}, H100, "bfloat16 and float16, not float32"),
        ({"in_dim": 100}, H100, "multiples of 64, not K 100 and N 3584"),
        ({"out_dim": 32}, H100, "multiples of 64, not K 1024 and N 32"),
        ({"num_groups": 257}, H100, "1 to 256 groups, not 257"),
    ],
)
def test_what_the_kernel_refuses(monkeypatch, changes, target, words):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    case = dataclasses.replace(CASE, **changes)
    assert words in supports("pallas", case, target)
    with pytest.raises(ValueError, match="impl='pallas' can't run"):
        choose("pallas", case, target)


def test_older_jax_is_named(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 10, 2))
    assert "needs JAX 0.11" in supports("pallas", CASE, H100)


def test_what_the_kernel_takes(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert supports("pallas", CASE, H100) is None
    assert choose("pallas", CASE, H100) == ("pallas", "asked for by name")


def test_auto_takes_the_kernel_where_it_can_run(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    assert choose("auto", CASE, H100)[0] == "pallas"
    impl, reason = choose("auto", dataclasses.replace(CASE, dtype="float32"), H100)
    assert impl == "batched" and "not float32" in reason


def test_a_call_is_judged_by_its_own_shapes(monkeypatch):
    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    for E, K, N, words in ((3, 100, 64, "not K 100 and N 64"), (257, 64, 128, "1 to 256 groups, not 257")):
        x, w, sizes = np.zeros((8, K), np.float16), np.zeros((E, K, N), np.float16), np.zeros(E, np.int32)
        with pytest.raises(ValueError, match=words):
            grouped_matmul(x, w, sizes, impl="pallas", target=H100)
