"""Grouped products on TPU with scales along K: in Pallas's interpreter, tiles, TPU's compiler, its static estimate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import tpu_scaled
from kernels.grouped_matmul.quantized import QuantizedGroupedCase, case_of, choose, quantized_grouped_matmul, supports
from kernels.grouped_matmul.tpu_scaled_tiles import check, choose_tiles, needed_bytes
from kernels.grouped_matmul.tpu_tiles import SMEM_BYTES, VMEM_BYTES, Tiles, table_bytes
from kernels.quantized_matmul.tpu_tiles import scaling, widened
from kernels.target import Target
from quantization.qarray import QArray, quantize
from tests.kernels.absent_tpu import SLICES, compiled_for, needs_libtpu
from tests.kernels.grouped_scaled_tpu_estimate import CASES, estimates

TPU = Target("tpu")
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
GROUPS, K, N = 4, 256, 200


@dataclasses.dataclass(frozen=True)
class Formats:
    """Dtypes of x and w, and elements that share a scale; a float x where `x_block` is None."""

    x_dtype: str
    w_dtype: str
    x_block: tuple | None
    w_block: tuple
    layout: str = "rows"
    asymmetric: bool = False


FORMATS = {
    "fp8 in blocks": Formats(E4M3, E4M3, (1, 128), (1, 128, 100)),
    "fp8, w in blocks": Formats(E4M3, E5M2, (1, None), (1, 128, 1)),
    "int8 in blocks": Formats("int8", "int8", (1, 128), (1, 128, 100)),
    "int8 by int4 in blocks": Formats("int8", "int4", (1, 128), (1, 128, 1)),
    "int8 with zero points": Formats("int8", "int8", (1, None), (1, None, 1), asymmetric=True),
    "w8 in groups": Formats("bfloat16", "int8", None, (1, 128, 1)),
    "w4 in groups": Formats("bfloat16", "int4", None, (1, 32, 1)),
    "w4 in long groups": Formats("bfloat16", "int4", None, (1, 128, 1)),
    "w4 with zero points": Formats("bfloat16", "int4", None, (1, 64, 1), asymmetric=True),
}
# Few rows scale the sums of a block, which w may lie in columns for.
COLUMNS = {
    "fp8 in columns": dataclasses.replace(FORMATS["fp8 in blocks"], layout="columns"),
    "w8 in columns": dataclasses.replace(FORMATS["w8 in groups"], layout="columns"),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def operands(formats, M, seed=0):
    """(x, w); experts' weights differ in size."""
    keys = jax.random.split(jax.random.key(seed))
    x, w = jax.random.normal(keys[0], (M, K)), jax.random.normal(keys[1], (GROUPS, K, N))
    w = w * jnp.asarray([1e-3, 1, 10, 100])[:, None, None]
    x = x.astype(formats.x_dtype) if formats.x_block is None else quantize(x, formats.x_dtype, formats.x_block)
    return x, quantize(w, formats.w_dtype, formats.w_block, layout=formats.layout, asymmetric=formats.asymmetric)


def exactly(array) -> np.ndarray:
    """What it stands for, in float64."""
    if not isinstance(array, QArray):
        return np.asarray(array, np.float64)
    with jax.enable_x64(True):
        return np.asarray(array.dequantize(jnp.float64), np.float64)


def within_rounding(y, x, w, sizes):
    """Sums in float32; where scales are multiplied into w (and x), of what is rounded to bfloat16."""
    case = case_of(x, w, y.dtype)
    own = np.repeat(np.arange(GROUPS + 1), [*sizes, len(x.values if isinstance(x, QArray) else x) - sum(sizes)])
    exact_x, exact_w = exactly(x), np.concatenate([exactly(w), np.zeros((1, K, N))])
    exact, size = np.zeros(y.shape), np.zeros(y.shape)
    for group in range(GROUPS + 1):
        rows = own == group
        exact[rows], size[rows] = exact_x[rows] @ exact_w[group], np.abs(exact_x[rows]) @ np.abs(exact_w[group])
    few = scaling(widened(case), Tiles(min(case.num_rows, 128), K, N)) == "sums"
    allowed = (2.0**-18 if few else 2.0**-7) * size
    assert y.shape == exact.shape and (np.abs(np.asarray(y, np.float64) - exact) <= allowed).all()
    assert (np.asarray(y)[sum(sizes) :] == 0).all()


@functools.partial(jax.jit, static_argnums=3)
def kernel(x, w, sizes, tiles):
    return tpu_scaled.product(x, w, sizes, jnp.float32, tiles=tiles, interpret=True)


SIZES = {384: (130, 0, 10, 200), 40: (3, 0, 30, 5)}


MANY = ("fp8 in blocks", "int8 with zero points", "w8 in groups", "w4 with zero points")
FEW = ("fp8, w in blocks", "int8 in blocks", "int8 by int4 in blocks", "w4 in long groups")


@pytest.mark.parametrize(("name", "M"), [*((name, 384) for name in MANY), *((name, 40) for name in FEW)])
def test_within_the_rounding_of_its_formats(name, M):
    """Two steps over depth; columns past the edge; many rows and few, a group without and rows of no group."""
    x, w = operands(FORMATS[name], M)
    sizes = jnp.asarray(SIZES[M], jnp.int32)
    within_rounding(kernel(x, w, sizes, Tiles(min(M, 128), 128, 128)), x, w, SIZES[M])


@pytest.mark.parametrize("name", COLUMNS)
def test_few_rows_by_columns(name):
    x, w = operands(COLUMNS[name], 40)
    within_rounding(kernel(x, w, jnp.asarray(SIZES[40], jnp.int32), Tiles(40, 256, 256)), x, w, SIZES[40])


@pytest.mark.parametrize(("name", "M"), [("fp8 in blocks", 40), ("w4 in groups", 384)])
def test_in_tiles_that_are_chosen(name, M):
    x, w = operands(FORMATS[name], M)
    within_rounding(kernel(x, w, jnp.asarray(SIZES[M], jnp.int32), None), x, w, SIZES[M])


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shares=st.lists(st.integers(0, 9), min_size=GROUPS, max_size=GROUPS),
    spare=st.integers(0, 9),
    name=st.sampled_from(["int8 in blocks", "w4 with zero points"]),
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
)
@example([0, 0, 0, 0], 1, "int8 in blocks", (0, 0))
@example([0, 0, 1, 0], 0, "int8 in blocks", (-40, 40))
@example([1, 9, 1, 1], 0, "w4 with zero points", (20, -40))
def test_any_groups_and_scales(shares, spare, name, exponents):
    sizes = [40 * share // max(1, sum(shares) + spare) for share in shares]
    x, w = operands(FORMATS[name], 40)
    if isinstance(x, QArray):
        x = dataclasses.replace(x, scales=x.scales * 2.0 ** exponents[0])
    w = dataclasses.replace(w, scales=w.scales * 2.0 ** exponents[1])
    within_rounding(kernel(x, w, jnp.asarray(sizes, jnp.int32), Tiles(40, 128, 128)), x, w, sizes)


def test_nan_stays_in_its_row_and_its_experts_column():
    x, w = operands(FORMATS["fp8 in blocks"], 40)
    sizes = (10, 0, 12, 15)
    # Rows 3 and 39 are of the first expert and of none; columns 100 to 199 of the third.
    x = dataclasses.replace(x, scales=x.scales.at[jnp.asarray([3, 39]), 1].set(jnp.nan))
    w = dataclasses.replace(w, scales=w.scales.at[2, 1, 1].set(jnp.nan))
    y = np.asarray(kernel(x, w, jnp.asarray(sizes, jnp.int32), Tiles(40, 128, 128)))
    wrong = np.zeros(y.shape, bool)
    wrong[3], wrong[10:22, 100:] = True, True
    np.testing.assert_array_equal(np.isnan(y), wrong)
    assert (y[37:] == 0).all()


DEEPSEEK = QuantizedGroupedCase(E4M3, E4M3, 8192, 7168, 4096, (1, 128), (128, 128), num_groups=256)
DECODE = QuantizedGroupedCase("bfloat16", "int4", 64, 4096, 14336, None, (128, 1), num_groups=8)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (DEEPSEEK, {"w_layout": "columns"}, "quantise w with layout='rows'"),
        (DEEPSEEK, {"w_layout": "fragments"}, "not in 'fragments'"),
        (DEEPSEEK, {"w_dtype": "int8"}, "can't be multiplied together"),
        (DEEPSEEK, {"x_dtype": "float16", "x_block": None}, "not float16"),
        (DEEPSEEK, {"num_groups": 40000}, "scalar memory"),
        (DECODE, {"w_block": (4, 1)}, "multiple of 8"),
        (DECODE, {"in_dim": 127 * 1009, "w_block": (127, 1)}, "no small divisor"),
    ],
)
def test_refuses_what_it_cannot_do(case, changes, words):
    case = dataclasses.replace(case, **changes)
    assert words in supports("pallas", case, TPU)
    with pytest.raises(ValueError, match="'pallas' can't run"):
        choose("pallas", case, TPU)


def test_named_on_tpu_and_never_chosen():
    for case in (DEEPSEEK, DECODE):
        assert choose("pallas", case, TPU)[0] == "pallas" and choose("auto", case, TPU)[0] == "widened"


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (Tiles(512, 7168, 2048), r"Tiles\(rows=512, .* needs .* MiB of vector memory"),
        (Tiles(512, 7168, 128 * 1000), "vector memory"),
        (Tiles(128, 384, 128), "depth must divide 7168"),
    ],
)
def test_tiles_without_room_are_named(tile, words):
    with pytest.raises(ValueError, match=words):
        check(widened(DEEPSEEK), tile)


@pytest.mark.parametrize("rows", [8, 64, 200, 16384])
def test_chosen_tiles_fit(rows):
    # Mixtral's, DeepSeek's, moe-1b's, small widths.
    for E, K, N in [
        (8, 4096, 14336),
        (256, 7168, 4096),
        (256, 2048, 7168),
        (8, 1024, 3584),
        (64, 2048, 1408),
        (4, 256, 72),
    ]:
        for formats in FORMATS.values():
            x_block = None if formats.x_block is None else (1, formats.x_block[1] or K)
            w_block = (formats.w_block[1] or K, 1)
            case = QuantizedGroupedCase(
                formats.x_dtype,
                formats.w_dtype,
                rows,
                K,
                N,
                x_block,
                w_block,
                num_groups=E,
                zero_points=formats.asymmetric,
            )
            case = widened(case)
            tiles = choose_tiles(case)
            check(case, tiles)
            assert needed_bytes(case, tiles) <= VMEM_BYTES
            assert table_bytes(tpu_scaled.shape_of(case), tiles) <= SMEM_BYTES


@needs_libtpu
@pytest.mark.parametrize("chip", SLICES)
def test_compiles_for_tpu(chip):
    """By the public op, both ways of scaling, with rows and columns that fill no register."""
    names = [("fp8 in blocks", 40), ("fp8 in blocks", 300), ("int8 in blocks", 40), ("w4 in long groups", 40)]
    names += [("w4 with zero points", 300)]
    calls = [jax.eval_shape(functools.partial(operands, FORMATS[name], M)) for name, M in names]

    def all_of_them(calls, sizes):
        return [quantized_grouped_matmul(x, w, sizes, impl="pallas", target=TPU) for x, w in calls]

    program = compiled_for(chip, all_of_them, calls, jax.ShapeDtypeStruct((GROUPS,), jnp.int32))
    assert program.as_text().count("tpu_custom_call") >= len(calls)


@needs_libtpu
@pytest.mark.parametrize(("name", "rows"), [("int8 in blocks", 64), ("w4 with zero points", 256)])
def test_vector_memory_is_not_underestimated(monkeypatch, name, rows):
    """The compiler, held to our own count for the tile, has enough."""
    formats, tile = FORMATS[name], Tiles(rows, 512, 512)

    def shapes():
        x, w = jnp.zeros((rows, 1024)), jnp.zeros((2, 1024, 1024))
        x = x.astype(formats.x_dtype) if formats.x_block is None else quantize(x, formats.x_dtype, formats.x_block)
        return x, quantize(w, formats.w_dtype, (*formats.w_block[:2], 1), asymmetric=formats.asymmetric)

    x, w = jax.eval_shape(shapes)
    monkeypatch.setattr(tpu_scaled, "VMEM_BYTES", needed_bytes(case_of(x, w, jnp.bfloat16), tile))
    product = functools.partial(tpu_scaled.product, out_dtype=jnp.bfloat16, tiles=tile)
    compiled_for("v5e", product, x, w, jax.ShapeDtypeStruct((2,), jnp.int32))


def printed(capsys, chips, cases) -> dict:
    """Shares of the peak in bfloat16, by chip and case."""
    rows = estimates(chips, cases)
    with capsys.disabled():
        for row in rows:
            print(f" [estimated: {row}]", end="")
    return {(row["chip"], row["case"]): row["share_of_bfloat16_peak"] for row in rows}


@needs_libtpu
def test_static_estimate(capsys):
    """The compiler's own count of cycles, which knows nothing of waiting for memory: an estimate, and the same for the
    same compiler."""
    shares = printed(capsys, ["v5e"], ["8 bits in blocks"])
    assert shares["v5e", "8 bits in blocks"] >= 0.85


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", SLICES)
def test_static_estimates_of_all(capsys, chip):
    if chip == "tpu7x" and jax.__version_info__ < (0, 11):
        pytest.skip("the libtpu of JAX 0.10 aborts where it writes its estimate for tpu7x")
    shares = printed(capsys, [chip], list(CASES))
    # Where scales are outside of the sums, few-bit numbers are multiplied.
    assert shares[chip, "8 bits"] > 1.1 * shares[chip, "8 bits in blocks"] > 0.7
