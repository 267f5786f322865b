"""The experts' feed-forward: three products with SwiGLU between, apart and in the products' kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import loop
from kernels.grouped_matmul.swiglu import grouped_swiglu
from kernels.grouped_matmul.tiles import Tiles
from kernels.target import Target

H100 = Target("gpu", (9, 0))
NAMES = ("y", "dx", "d_gate", "d_up", "d_down")


def operands(M, D, F, sizes, dtype, spare=1.0):
    """x, gate, up, down and dy; `spare`: what rows of no group hold."""
    rng = np.random.default_rng(0)
    shapes = ((M, D), (len(sizes), D, F), (len(sizes), D, F), (len(sizes), F, D), (M, D))
    arrays = [rng.normal(size=shape) * (shape[-2] ** -0.5 if len(shape) == 3 else 1) for shape in shapes]
    arrays[0][sum(sizes) :], arrays[4][sum(sizes) :] = spare, spare
    return [jnp.asarray(array, dtype) for array in arrays]


def explicit(x, gate, up, down, dy, sizes):
    """(y, dx, and those of the matrices) in float64, one group after another."""
    x, gate, up, down, dy = (np.asarray(array, np.float64) for array in (x, gate, up, down, dy))
    results = [np.zeros(array.shape) for array in (x, x, gate, up, down)]
    y, dx, d_gate, d_up, d_down = results
    stop = 0
    for e, size in enumerate(sizes):
        rows = slice(stop, stop + size)
        stop += size
        g, u, d_hidden = x[rows] @ gate[e], x[rows] @ up[e], dy[rows] @ down[e].T
        sigmoid = 1 / (1 + np.exp(-g))
        dg, du = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid)), d_hidden * g * sigmoid
        hidden = g * sigmoid * u
        y[rows], dx[rows] = hidden @ down[e], dg @ gate[e].T + du @ up[e].T
        d_gate[e], d_up[e], d_down[e] = x[rows].T @ dg, x[rows].T @ du, hidden.T @ dy[rows]
    return results


def computed(x, gate, up, down, dy, *, impl, sizes, target=None):
    def run(*arrays):
        return grouped_swiglu(*arrays, jnp.asarray(sizes, jnp.int32), impl=impl, target=target)

    y, pullback = jax.vjp(run, x, gate, up, down)
    return y, *pullback(dy)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_value_and_gradients_apart(impl):
    sizes = (5, 0, 9, 3)
    arrays = operands(20, 6, 8, sizes, jnp.float32)
    for name, a, b in zip(NAMES, computed(*arrays, impl=impl, sizes=sizes), explicit(*arrays, sizes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


SMALL = Tiles(128, 128, "rows", 2, 1)


@pytest.fixture
def kernels(monkeypatch, execution):
    """The gated kernels with small tiles, on a chip of two processors, as the interpreter can run them."""
    from kernels.grouped_matmul import gpu, gpu_gated, persistent

    monkeypatch.setattr("kernels.hopper_chip.JAX_VERSION", (0, 11, 2))
    monkeypatch.setattr(persistent, "NUM_PROCESSORS", 2)
    # Of hidden's gradients alone two processors walk as one.
    tiles = {"hidden": SMALL, "hidden_gradient": dataclasses.replace(SMALL, cluster=2), "summed_product": SMALL}
    for name, chosen in tiles.items():
        run = functools.partial(getattr(gpu_gated, name), tiles=chosen, interpret=execution.interpret())
        monkeypatch.setattr(gpu_gated, name, run)
    execution.put_plainly(monkeypatch, persistent, in_one_place=lambda *arrays: arrays)
    execution.put_plainly(monkeypatch, gpu_gated, reciprocal=lambda x: 1 / x)
    # Proved by themselves, in test_grouped_matmul_gpu.
    product = jax.jit(loop.product, static_argnames="transpose")
    execution.put_plainly(monkeypatch, gpu, product=product, weight_gradient=jax.jit(loop.weight_gradient))


@pytest.mark.parametrize(
    ("sizes", "M", "D", "F", "dtype"),
    [
        ((37, 0, 95), 139, 64, 192, "bfloat16"),  # ragged, and an odd number of columns; M no multiple of eight
        # As many steps as hidden has parts: those of a tile go out beside the steps of the next one.
        ((3, 0, 21), 24, 384, 192, "bfloat16"),
        pytest.param((130,), 136, 64, 64, "float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's, in the interpreter
def test_value_and_gradients_in_the_products_kernels(execution, kernels, sizes, M, D, F, dtype):
    """Errors are at most 1.5 times those of the same steps apart, in rows that hold NaN where they are of no group."""
    arrays = operands(M, D, F, sizes, dtype, np.nan)
    fused = execution.run(computed, *arrays, impl="pallas", sizes=sizes, target=H100)
    execution.assert_no_races()
    apart = computed(*arrays, impl="loop", sizes=sizes)
    for name, a, b, true in zip(NAMES, fused, apart, explicit(*arrays, sizes), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [np.linalg.norm(np.asarray(array, np.float64) - true) for array in (a, b)]
        assert errors[0] <= 1.5 * errors[1], (name, errors)
    for rest in (fused[0], fused[1]):
        assert (np.asarray(rest)[sum(sizes) :] == 0).all()


def test_without_gradient_only_hidden_is_written(execution, kernels, monkeypatch):
    from kernels.grouped_matmul import gpu_gated

    given = []

    def hidden(x, gate, up, sizes, with_parts):
        given.append(with_parts)
        outs = [jnp.zeros((x.shape[0], gate.shape[2]), x.dtype)] * (3 if with_parts else 1)
        return outs

    monkeypatch.setattr(gpu_gated, "hidden", hidden)
    x, gate, up, down, _ = operands(16, 64, 64, (8,), "bfloat16")
    run = functools.partial(grouped_swiglu, group_sizes_E=np.array([8], np.int32), impl="pallas", target=H100)
    execution.run(run, x, gate, up, down)
    execution.run(lambda x, *matrices: jax.vjp(lambda x: run(x, *matrices), x)[0], x, gate, up, down)
    assert given == [False, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down": np.zeros((2, 6, 8), np.float32)}, r"needs x \[M,D\], gate and up \[E,D,F\], down \[E,F,D\]"),
        ({"up": np.zeros((2, 6, 9), np.float32)}, r"up float32\[2, 6, 9\]"),
        ({"x": np.zeros((4, 6), np.float16)}, "all need one dtype"),
        ({"sizes": np.zeros(3, np.int32)}, r"group_sizes are int32\[3\]"),
        ({"sizes": np.zeros(2, np.float32)}, r"group_sizes are float32\[2\]"),
        ({"impl": "pallas"}, "'pallas' can't run: the kernel is written for NVIDIA GPUs"),
        ({"impl": "fused"}, "'fused' is unknown"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    arguments = dict(zip(("x", "gate", "up", "down"), operands(4, 6, 8, (2, 2), jnp.float32), strict=False))
    arguments |= {"sizes": np.array([2, 2], np.int32), "impl": "auto", **changes}
    impl = arguments.pop("impl")
    with pytest.raises(ValueError, match=words):
        grouped_swiglu(*arguments.values(), impl=impl)
