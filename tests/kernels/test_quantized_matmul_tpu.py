"""Products of few-bit numbers on TPU: in Pallas's interpreter, tiles, TPU's own compiler, and its static estimate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.matmul_tpu import estimates
from kernels.quantized_matmul import QuantizedCase, case_of, choose, quantized_matmul, supports, tpu
from kernels.quantized_matmul.tpu_tiles import (
    VMEM_BYTES,
    Tiles,
    check,
    choose_tiles,
    needed_bytes,
    scaling,
    unsupported,
    widened,
)
from kernels.target import Target
from quantization.qarray import QArray, quantize
from tests.kernels.absent_tpu import SLICES, compiled_for, needs_libtpu

TPU = Target("tpu")
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def operands(M, K, N, x_dtype, w_dtype, x_block=(1, None), w_block=(None, 1), layout="rows", asymmetric=False, seed=0):
    """(x, w); a float x where `x_dtype` is one."""

    @jax.jit
    def quantized(x, w):
        x = x.astype(x_dtype) if x_dtype in ("bfloat16", "float32") else quantize(x, x_dtype, x_block)
        return x, quantize(w, w_dtype, w_block, layout=layout, asymmetric=asymmetric)

    return quantized(draw((M, K), seed), draw((K, N), seed + 1))


def exactly(array) -> np.ndarray:
    """What it stands for, in float64."""
    if not isinstance(array, QArray):
        return np.asarray(array, np.float64)
    with jax.enable_x64(True):
        return np.asarray(array.dequantize(jnp.float64), np.float64)


def within_rounding(y, x, w, bias=None):
    """Sums in float32, a w (and a widened x) rounded to bfloat16 where scales vary along K, and one last rounding."""
    exact_x, exact_w = exactly(x), exactly(w)
    case = case_of(x, w, bias, y.dtype)
    exact = exact_x @ exact_w + (0 if bias is None else np.asarray(bias, np.float64))
    rounded = widened(case).x_dtype == "bfloat16" and not (case.scales_outside and not case.zero_points)
    allowed = (2.0**-7 if rounded else 2.0**-18) * (np.abs(exact_x) @ np.abs(exact_w))
    allowed += (2.0**-8 if y.dtype == jnp.bfloat16 else 2.0**-22) * np.abs(exact)
    assert y.shape == exact.shape and (np.abs(np.asarray(y, np.float64) - exact) <= allowed + 1e-30).all()


CASES = {
    "int8": {"x_dtype": "int8", "w_dtype": "int8"},
    "int8, one scale each": {"x_dtype": "int8", "w_dtype": "int8", "x_block": (None, None), "w_block": (None, None)},
    "int8 by int4": {"x_dtype": "int8", "w_dtype": "int4"},
    "int8 in columns": {"x_dtype": "int8", "w_dtype": "int8", "layout": "columns"},
    "int8 in blocks": {"x_dtype": "int8", "w_dtype": "int8", "x_block": (1, 128), "w_block": (128, 100)},
    "int8 with zero points": {"x_dtype": "int8", "w_dtype": "int8", "asymmetric": True},
    "fp8": {"x_dtype": E4M3, "w_dtype": E4M3},
    "two fp8": {"x_dtype": E5M2, "w_dtype": E4M3, "layout": "columns"},
    "fp8 in blocks": {"x_dtype": E4M3, "w_dtype": E4M3, "x_block": (1, 128), "w_block": (128, 100)},
    "w8": {"x_dtype": "bfloat16", "w_dtype": "int8"},
    "w8 in columns": {"x_dtype": "bfloat16", "w_dtype": "int8", "layout": "columns"},
    "w fp8": {"x_dtype": "bfloat16", "w_dtype": E4M3},
    "w4 in groups": {"x_dtype": "bfloat16", "w_dtype": "int4", "w_block": (32, 1)},
    "w4 in long groups": {"x_dtype": "bfloat16", "w_dtype": "int4", "w_block": (128, 1)},
    "w4 with zero points": {"x_dtype": "bfloat16", "w_dtype": "int4", "w_block": (64, 1), "asymmetric": True},
    "w8 of float32": {"x_dtype": "float32", "w_dtype": "int8", "w_block": (128, 1)},
}


IN_BLOCKS = ["int8 in blocks", "fp8 in blocks", "w4 in long groups"]


@pytest.mark.parametrize(("name", "M"), [*((name, 136) for name in CASES), *((name, 5) for name in IN_BLOCKS)])
def test_within_the_rounding_of_its_formats(name, M):
    """In several steps, with columns past the edge of the last tile; few rows and many scale differently."""
    x, w = operands(M, 384, 200, **CASES[name])
    bias = draw(200, 5) * 10
    tiles = Tiles(min(M, 128), 128, 128)
    y = jax.jit(functools.partial(tpu.quantized_matmul, out_dtype=jnp.bfloat16, tiles=tiles, interpret=True))(
        x, w, bias
    )
    assert y.dtype == jnp.bfloat16
    within_rounding(y, x, w, bias)


@pytest.mark.parametrize("name", ["int8", "w4 in groups"])
def test_all_of_it_in_one_step(name):
    x, w = operands(16, 384, 200, **CASES[name])
    within_rounding(tpu.quantized_matmul(x, w, None, jnp.float32, interpret=True), x, w)


def test_integer_sums_are_exact():
    """The longest sums of large products, of which float32 would round parts."""
    K, one = 2**17, jnp.ones((1, 1))
    values = [np.random.default_rng(i).integers(120, 128, shape) for i, shape in enumerate([(1, K), (K, 128)])]
    x, w = (QArray(jnp.asarray(a, jnp.int8), one) for a in values)
    y = tpu.quantized_matmul(x, w, None, jnp.float32, tiles=Tiles(1, 128, K // 8), interpret=True)
    np.testing.assert_array_equal(y, (values[0] @ values[1]).astype(np.float32))


_any = jax.jit(
    functools.partial(tpu.quantized_matmul, bias=None, out_dtype=jnp.float32, tiles=Tiles(16, 128, 128), interpret=True)
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["int8", "w4 with zero points", "fp8 in blocks"]),
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    seed=st.integers(0, 99),
)
@example("int8", (-60, -60), 0)
@example("fp8 in blocks", (40, -40), 1)
def test_any_scale(name, exponents, seed):
    x, w = operands(16, 384, 200, **CASES[name], seed=seed)
    if isinstance(x, QArray):
        x = dataclasses.replace(x, scales=x.scales * 2.0 ** exponents[0])
    w = dataclasses.replace(w, scales=w.scales * 2.0 ** exponents[1])
    within_rounding(_any(x, w), x, w)


def test_nan_stays_in_its_row_and_its_column():
    x, w = operands(16, 384, 200, "int8", "int8")
    x = dataclasses.replace(x, scales=x.scales.at[3].set(jnp.nan))
    w = dataclasses.replace(w, scales=w.scales.at[0, 130].set(jnp.nan))
    y = np.asarray(_any(x, w))
    assert np.isnan(y[3]).all() and np.isnan(y[:, 130]).all()
    assert np.isfinite(np.delete(np.delete(y, 3, 0), 130, 1)).all()


def test_a_tile_past_the_last_row_changes_nothing():
    x, w = operands(136, 256, 200, "bfloat16", "int8")
    whole, cut = (
        tpu.quantized_matmul(x, w, None, jnp.float32, tiles=tiles, interpret=True)
        for tiles in (Tiles(136, 200, 256), Tiles(128, 128, 256))
    )
    np.testing.assert_allclose(whole, cut, rtol=1e-6, atol=1e-5)


DENSE = QuantizedCase("int8", "int8", 4096, 4096, 4096, (1, 4096), (4096, 1))
FEW = QuantizedCase("bfloat16", "int4", 16, 8192, 28672, None, (128, 1))


def test_named_on_tpu_and_never_chosen():
    assert choose("pallas", DENSE, TPU)[0] == "pallas"
    impl, reason = choose("auto", DENSE, TPU)
    assert impl == "xla" and "not measured" in reason


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (DENSE, {"x_dtype": "int4"}, "not int4"),
        (DENSE, {"num_rows": 0}, "M=0"),
        (DENSE, {"out_dtype": "float16"}, "and float16"),
        (DENSE, {"in_dim": 2**18, "x_block": (1, 2**18), "w_block": (2**18, 1)}, "do not fit into int32"),
        (DENSE, {"in_dim": 127 * 1009, "x_block": (1, 127 * 1009), "w_block": (127 * 1009, 1)}, "no small divisor"),
        (FEW, {"x_dtype": "float16"}, "not float16"),
        (FEW, {"w_layout": "columns", "w_block": (32, 1)}, "quantise w with layout='rows'"),
        (FEW, {"w_block": (4, 1)}, "multiple of 8"),
        (FEW, {"w_layout": "packed"}, "not in 'packed'"),
    ],
)
def test_refuses_what_it_cannot_do(case, changes, words):
    case = dataclasses.replace(case, **changes)
    assert words in supports("pallas", case, TPU)
    with pytest.raises(ValueError, match="'pallas' can't run"):
        choose("pallas", case, TPU)
    assert unsupported(DENSE, Target("gpu", (9, 0))) is not None


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tiles(2048, 2048, 4096), r"Tiles\(rows=2048, .* needs .* MiB of vector memory"),
        (Tiles(100, 128, 128), "rows must be a multiple of 8"),
        (Tiles(128, 100, 128), "columns of 128"),
        (Tiles(128, 128, 384), "depth must divide K=4096"),
    ],
)
def test_tiles_without_room_are_named(tile, words):
    with pytest.raises(ValueError, match=words):
        check(DENSE, tile)


@pytest.mark.parametrize("rows", [1, 16, 64, 300, 8192])
def test_chosen_tiles_fit(rows):
    for K, N in [(4096, 4096), (8192, 28672), (14336, 4096), (4096, 14336), (2048, 1408), (4096, 128256), (72, 40)]:
        for x_dtype, w_dtype, x_k, w_k in [
            ("int8", "int8", K, K),
            (E4M3, E4M3, 8, 8),
            ("bfloat16", "int8", None, K),
            ("bfloat16", "int4", None, 8),
            ("float32", "int8", None, K),
        ]:
            x_block = None if x_k is None else (1, x_k)
            case = widened(QuantizedCase(x_dtype, w_dtype, rows, K, N, x_block, (w_k, 1)))
            tiles = choose_tiles(case)
            check(case, tiles)
            assert needed_bytes(case, tiles) <= VMEM_BYTES


def test_few_rows_scale_sums_and_many_scale_weights():
    assert scaling(FEW, choose_tiles(FEW)) == "sums"
    many = dataclasses.replace(FEW, num_rows=2048)
    assert scaling(many, choose_tiles(many)) == "operands"
    assert scaling(DENSE, choose_tiles(DENSE)) == "outside"


@needs_libtpu
@pytest.mark.parametrize("chip", SLICES)
def test_compiles_for_tpu(chip):
    """By the public op, each way of scaling, with rows and columns that fill no register."""
    names = ["int8", "int8 in blocks", "two fp8", "w8 in columns", "w4 in long groups", "w4 with zero points"]
    pairs = [jax.eval_shape(functools.partial(operands, 20, 256, 200, **CASES[name])) for name in names]

    def all_of_them(pairs):
        return [quantized_matmul(x, w, impl="pallas", target=TPU) for x, w in pairs]

    assert compiled_for(chip, all_of_them, pairs).as_text().count("tpu_custom_call") >= len(names)


@needs_libtpu
@pytest.mark.parametrize("name", ["int8", "w4 in groups", "w4 in long groups", "w8 of float32"])
def test_vector_memory_is_not_underestimated(monkeypatch, name):
    """The compiler, held to our own count for the tile, has enough."""
    rows = 64 if name == "w4 in long groups" else 256
    x, w = jax.eval_shape(functools.partial(operands, 2 * rows, 1024, 1024, **CASES[name]))
    tile = Tiles(rows, 512, 512)
    monkeypatch.setattr(tpu, "VMEM_BYTES", needed_bytes(case_of(x, w, None, jnp.bfloat16), tile))
    product = functools.partial(tpu.quantized_matmul, bias=None, out_dtype=jnp.bfloat16, tiles=tile)
    compiled_for("v5e", product, x, w)


@needs_libtpu
def test_static_estimate_of_int8(capsys):
    """The compiler's own count of cycles, which knows nothing of waiting for memory: an estimate, and the same for the
    same compiler."""
    shares = {row["chip"]: row["share_of_peak"] for row in estimates(["v5e", "v6e"], ["8 bits, 4096³"])}
    with capsys.disabled():
        print(f" [estimated share of peak in int8: {shares}] ", end="")
    assert shares["v5e"] >= 0.90 and shares["v6e"] >= 0.75
