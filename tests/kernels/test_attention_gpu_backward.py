"""Gradients of attention on Hopper: the kernel interpreted or on a GPU, held to float64 and to the XLA route."""

import contextlib
import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import reference, xla
from kernels.attention.masks import Marks


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    S: int | None = None
    B: int = 1
    N: int = 2
    K: int = 1
    H: int = 64
    V: int | None = None
    dtype: str = "bfloat16"
    scale: float = 0.2
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    # Lengths of the documents of each row, the rest padding; how far apart the positions of each row start.
    documents: tuple[tuple[int, ...], ...] | None = None
    positions: tuple[int, ...] | None = None
    d_lse: bool = False

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S


def masks_of(case: Case) -> dict:
    B, T, S = case.B, case.T, case.keys
    masks = dict.fromkeys(("q_segments", "kv_segments", "q_positions", "kv_positions", "sinks"))
    if case.documents is not None:
        segments = np.zeros((B, max(T, S)), np.int32)
        for row, lengths in enumerate(case.documents):
            ends = np.cumsum(lengths)
            for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
                segments[row, end - length : end] = i + 1
        masks |= {"q_segments": jnp.asarray(segments[:, :T]), "kv_segments": jnp.asarray(segments[:, :S])}
    if case.positions is not None:
        starts = np.asarray(case.positions, np.int32)[:, None]
        masks |= {
            "q_positions": jnp.asarray(starts + np.arange(T)),
            "kv_positions": jnp.asarray(0 * starts + np.arange(S)),
        }
        masks = {key: value if value is None else value.astype(jnp.int32) for key, value in masks.items()}
    return masks


def operands(case: Case):
    """(q, k, v, d_out) in the case's dtype, d_lse, the masks and sinks."""
    rng = np.random.default_rng(7)
    B, T, S, V = case.B, case.T, case.keys, case.V or case.H
    shapes = [(B, T, case.N, case.H), (B, S, case.K, case.H), (B, S, case.K, V), (B, T, case.N, V)]
    arrays = [jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes]
    masks = masks_of(case)
    if case.sinks:
        masks["sinks"] = jnp.asarray(rng.normal(size=case.N) + 1, jnp.float32)
    d_lse = jnp.asarray(rng.normal(size=(B, T, case.N)), jnp.float32) if case.d_lse else None
    return arrays, d_lse, masks


def statics(case: Case):
    return {"scale": case.scale, "causal": case.causal, "window": case.window, "soft_cap": case.soft_cap}


def gradients_of(attention, case, q, k, v, d_out, d_lse, masks):
    """(dq, dk, dv, dsinks) by JAX's derivative of an implementation, with (out, lse)."""
    masks = dict(masks)
    sinks = masks.pop("sinks")

    def run(q, k, v, sinks):
        return attention(q, k, v, **statics(case), **masks, sinks=sinks)

    (out, lse), pull = jax.vjp(run, q, k, v, sinks)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse.astype(lse.dtype)
    return pull((d_out.astype(out.dtype), d_lse)), (out, lse)


def exact(case, arrays, d_lse, masks):
    """The definition, in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        masks = dict(masks)
        if masks["sinks"] is not None:
            masks["sinks"] = jnp.asarray(np.asarray(masks["sinks"], np.float64))
        q, k, v, d_out = wide
        gradients, _ = gradients_of(reference.attention, case, q, k, v, d_out, d_lse, masks)
        return [None if x is None else np.asarray(x) for x in gradients]


@pytest.fixture(scope="module")
def kernel(execution):
    """The kernel's module, with plain products and sums wherever the interpreter has none."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from kernels.attention import gpu_backward

    def dot(a, b):
        a, b = (x[...].astype(jnp.float32) for x in (a, b))
        # The interpreter asks it between a read into registers and the next copy to that place; wgmma has none.
        plgpu.commit_smem()
        return jnp.dot(a, b)

    def product(start, a, b):
        return start + dot(a, b)

    def two_products(first, with_first, start, second):
        with_first(dot(*first))
        return start + dot(*second)

    def product_beside(start, a, b, x, meanwhile):
        return start + dot(a, b), meanwhile(x)

    def accumulate(dk, dv, d_scores, q_smem, weights, d_out_smem, meanwhile):
        meanwhile()
        return dk + dot(d_scores, q_smem), dv + dot(weights, d_out_smem)

    def accumulate_wide(sums, a, b_smem):
        whole, count = dot(a, b_smem), sums[0].shape[1]
        return sums[0] + whole[:, :count], sums[1] + whole[:, count:]

    # One thread of the interpreter's has both to itself, in its turn.
    def put(smem, place):
        place[...] = smem[...]

    def add(smem, place):
        place[...] = place[...] + smem[...]

    with pytest.MonkeyPatch.context() as patch:
        execution.put_plainly(
            patch,
            gpu_backward,
            _product=product,
            _two_products=two_products,
            _product_beside=product_beside,
            _accumulate=accumulate,
            _accumulate_wide=accumulate_wide,
            _add=add,
            _put=put,
            # Blocks of threads run one after another here, in the order that the turns ask for.
            _turns=lambda statics: None,
            _await_turn=lambda turns, place, turn: None,
            _end_turn=lambda turns, place: None,
        )
        yield gpu_backward


def computed(execution, kernel, case, arrays, out, lse, d_lse, masks, tiles=None):
    """(dq, dk, dv, dsinks) of the kernel."""
    operands = (*arrays[:3], out, lse, arrays[3], d_lse)
    settings = {**masks, **statics(case), "tiles": tiles}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        gradients = execution.run(kernel.attention_gradients, *operands, **settings, interpret=execution.interpret())
    assert not races(said.getvalue())
    execution.assert_same_again(gradients, kernel.attention_gradients, *operands, **settings)
    return gradients


def races(said: str) -> list[str]:
    """What the interpreter found, but between the additions of two blocks of threads to dq: it runs those one after the
    other and does not know it, since their order is that of turns, which it cannot follow."""
    _, *found = said.split("RACE DETECTED")
    return [text for text in found if len(re.findall(r"kernel\.<locals>\.(?:put|add)", text)) < 2]


def check(execution, kernel, case: Case, tiles=None):
    """Errors of each gradient, at most 1.5 times those of the XLA route in the same precision."""
    arrays, d_lse, masks = operands(case)
    expected = exact(case, arrays, d_lse, masks)
    peers, (out, lse) = gradients_of(xla.attention, case, *arrays, d_lse, masks)
    actual = computed(execution, kernel, case, arrays, out, lse, d_lse, masks, tiles)
    for name, array, peer, right in zip(("dq", "dk", "dv", "dsinks"), actual, peers, expected, strict=True):
        if right is None:
            assert array is None and not case.sinks
            continue
        assert array.dtype == peer.dtype and array.shape == right.shape, name
        array, peer = (np.asarray(x).astype(np.float64) for x in (array, peer))
        assert np.isfinite(array).all(), name
        size = np.linalg.norm(right)
        error, peer_error = (np.linalg.norm(x - right) / max(size, 1e-30) for x in (array, peer))
        # Sums in another order differ in the last bits of float32, which is all that an exact peer leaves.
        assert error <= 1.5 * peer_error + 1e-5, (name, error, peer_error)
    return actual


# One case for each way through the kernel; an interpreted one takes seconds.
CASES = {
    "causal, a group of heads, ragged": Case(T=190, N=2, dtype="float16"),
    "widths of 128, window, soft cap, sinks, lse": Case(
        T=140, N=1, H=128, window=70, soft_cap=3.0, sinks=True, d_lse=True, scale=-0.1
    ),
    "segments, positions, queries that see nothing, rows and kv heads": Case(
        T=64, S=140, B=2, N=2, K=2, H=128, documents=((30, 60, 20), (64, 76)), positions=(60, -40), d_lse=True
    ),
    "widths of 96": Case(T=130, N=1, H=96),
    "widths of 256, ragged, window, soft cap, sinks": Case(
        T=150, N=2, H=256, window=70, soft_cap=3.0, sinks=True, d_lse=True, scale=-0.1
    ),
    "keys of 192, values of 128, segments, no causal mask": Case(
        T=70, S=130, N=1, H=192, V=128, causal=False, documents=((30, 20),)
    ),
}


# Ways through the kernel that others have taken: filled up to 128, and wide with other operands.
SLOW = ("widths of 96", "keys of 192, values of 128, segments, no causal mask")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_gradients_equal_the_definition(execution, kernel, name):
    check(execution, kernel, CASES[name])


@st.composite
def masked_cases(draw):
    # Few shapes, since each is compiled.
    T, S = draw(st.sampled_from([1, 150, 256])), draw(st.sampled_from([100, 384]))
    documents = st.lists(st.integers(1, 200), min_size=1, max_size=4).map(tuple)
    return Case(
        T=T,
        S=S,
        B=2,
        H=128,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 300)),
        documents=draw(st.none() | st.tuples(documents, documents)),
        positions=draw(st.none() | st.tuples(st.integers(-200, 200), st.integers(-200, 200))),
    )


@settings(max_examples=15, deadline=None)
@given(masked_cases())
def test_walks_visit_what_is_seen(case):
    """No pair of blocks with anything to see is left out, none in a run without a mask has anything hidden, and the
    turns of a block of queries count from 0, the first keys first."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} lacks what the module imports; 0.11 has it")
    from kernels.attention import backward_walks
    from kernels.attention import gpu_backward as backward

    masks = masks_of(case)
    masks.pop("sinks")
    tiles = backward.choose_backward_tiles(case.H, case.H)
    features = (case.documents is not None, case.positions is not None)
    fixed = (case.B, case.T, case.keys, case.K, case.N // case.K, case.H, case.H)
    statics = backward._Statics(*fixed, case.scale, case.causal, case.window, None, *features, tiles)
    padded = backward_walks.padded_masks(statics, Marks(**masks))
    visited, runs, walk, turns = (np.asarray(x) for x in backward_walks.walks(statics, padded))
    seen = np.asarray(reference.visible(case.B, case.T, case.keys, case.causal, case.window, *masks.values()))
    queries, keys = tiles.block_queries, tiles.block_keys
    for row in range(case.B):
        of_row = 0 if len(walk) == 1 else row
        next_turn = np.zeros(statics.query_blocks, int)
        for j in range(statics.key_blocks):
            begin, end, count = runs[of_row, j]
            visits = walk[of_row, j, :count]
            assert (np.diff(visits) < 0).all() and 0 <= begin <= end <= count
            for i in range(statics.query_blocks):
                block = seen[row, i * queries : (i + 1) * queries, j * keys : (j + 1) * keys]
                assert not block.any() or i in visits
                if i in visits[begin:end]:
                    assert block.all() and block.shape[1] == keys
            assert (turns[of_row, j, :count] == next_turn[visits]).all()
            next_turn[visits] += 1
        assert (visited[of_row] == (next_turn > 0)).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.sampled_from([1, 7, 64, 1000, 10**6]))
def test_blocks_of_threads_start_in_the_order_of_their_turns(batch, kv_heads, key_blocks, together):
    """All of them, once; what waits for another starts after it."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} lacks what the module imports; 0.11 has it")
    from kernels.attention import gpu_backward as backward

    tiles = backward.choose_backward_tiles(128, 128)
    sizes = (batch, 128, key_blocks * tiles.block_keys, kv_heads, 1, 128, 128)
    statics = backward._Statics(*sizes, 1.0, True, None, None, False, False, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_TOKENS_TOGETHER", together)
        places = backward._coordinates(statics, np.arange(batch * kv_heads * key_blocks))
    places = list(zip(*(np.asarray(x).tolist() for x in places), strict=True))
    assert sorted(places) == [(b, k, j) for b in range(batch) for k in range(kv_heads) for j in range(key_blocks)]
    for row_and_head in {place[:2] for place in places}:
        blocks = [j for *pair, j in places if tuple(pair) == row_and_head]
        assert blocks == sorted(blocks)


def test_widths_without_a_kernel_are_refused():
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"JAX {jax.__version__} lacks what the module imports; 0.11 has it")
    from kernels.attention import gpu_backward as backward

    case = Case(T=64, H=48)
    (q, k, v, d_out), d_lse, masks = operands(case)
    with pytest.raises(ValueError, match="192/128, 256/256, not 48/48; set the attention impl"):
        backward.attention_gradients(q, k, v, d_out, d_out[..., 0], d_out, d_lse, **statics(case), **masks)
