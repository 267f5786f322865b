"""FLOP ledger: mask counts by brute force, known models with their arithmetic, totals, documents and recompute."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from model.config import ModelConfig, MoEConfig
from perf import flops

LLAMA3_8B, LLAMA3_70B, MIXTRAL_8X7B, QWEN3_30B_A3B = (
    configs.load(name).MODEL for name in ("llama3-8b", "llama3-70b", "mixtral-8x7b", "qwen3-30b-a3b")
)
TINY = ModelConfig(
    vocab_size=50, embed_dim=12, mlp_dim=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64
)


def brute_force_pairs(lengths, window):
    """Pairs that the mask of packed documents leaves, counted in the mask itself."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    query, key = np.arange(len(segments))[:, None], np.arange(len(segments))[None, :]
    mask = (segments[:, None] == segments[None, :]) & (key <= query)
    if window is not None:
        mask &= query - key < window
    return int(mask.sum())


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
def test_attention_pairs_equal_the_mask(lengths, window):
    assert flops.attention_pairs(lengths, window) == brute_force_pairs(lengths, window)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    pattern=st.lists(st.one_of(st.none(), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_ledger_attention_follows_windows_and_documents(lengths, pattern):
    config = dataclasses.replace(TINY, window_pattern=tuple(pattern))
    book = flops.ledger(config, sequence_length=16, batch_size=4, segment_lengths=lengths)
    for row in book.rows:
        if row.op in flops.ATTENTION_OPS:
            pairs = brute_force_pairs(lengths, config.window(row.layer))
            assert row.forward == 2 * pairs * 4 * 6  # 4 query heads of 6
    assert book.tokens == sum(lengths)


def test_llama3_8b():
    # Parameters. A layer: q and o 4096·4096 each, k and v 4096·1024 each, gate, up, down 4096·14336, two norms of 4096.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096
    total = 32 * layer + 2 * 128_256 * 4096 + 4096
    assert flops.count_params(LLAMA3_8B) == (total, total) == (8_030_261_248, 8_030_261_248)
    # Matmul parameters: without norms and without the embedding look-up, with the LM head.
    matmul = 32 * (layer - 2 * 4096) + 128_256 * 4096
    assert flops.matmul_parameters(LLAMA3_8B) == matmul == 7_504_658_432

    book = flops.ledger(LLAMA3_8B, sequence_length=8192)
    # Published per token: 51.5 GFLOP causal and 57.9 full. The published causal figure is 6N + 6·L·H·Q·T, half of the
    # square; the exact count has (T + 1)/2 keys per query instead of T/2, a share of 1/T = 0.012 % of attention more.
    assert book.palm_flops_per_token == 6 * matmul + 12 * 32 * 32 * 128 * 8192
    assert book.palm_flops_per_token / 1e9 == pytest.approx(57.9, abs=0.05)
    assert book.model_flops_per_token == 6 * matmul + 12 * 32 * 32 * 128 * (8192 + 1) / 2
    assert book.model_flops_per_token / 1e9 == pytest.approx(51.5, abs=0.05)


def test_llama3_70b():
    params = flops.count_params(LLAMA3_70B)
    assert params.total == params.active == 70_553_706_496
    # Published: 449.2 GFLOP per token causal, 481.4 full, both at S = 8192.
    book = flops.ledger(LLAMA3_70B, sequence_length=8192)
    assert book.model_flops_per_token / 1e9 == pytest.approx(449.2, abs=0.1)
    assert book.palm_flops_per_token / 1e9 == pytest.approx(481.4, abs=0.1)


def test_mixtral_8x7b():
    # Of the eight experts of each of 32 layers a token uses two: 6 · 3 · 4096 · 14336 parameters stay idle.
    params = flops.count_params(MIXTRAL_8X7B)
    assert params.total / 1e9 == pytest.approx(46.7, abs=0.05)
    assert params.active == params.total - 32 * 6 * 3 * 4096 * 14_336
    assert params.active / 1e9 == pytest.approx(12.9, abs=0.05)


def test_qwen3_30b_a3b():
    params = flops.count_params(QWEN3_30B_A3B)
    assert params.total / 1e9 == pytest.approx(30.5, abs=0.05)
    # The model card prints 3.3 B and counts the embedding.
    assert params.active / 1e9 == pytest.approx(3.35, abs=0.05)
    # 128 + 128 scales of q and k norm per layer are parameters and no matmul.
    without = flops.count_params(dataclasses.replace(QWEN3_30B_A3B, qk_norm=False))
    assert params.total - without.total == 48 * 2 * 128
    book = flops.ledger(QWEN3_30B_A3B, sequence_length=4096)
    assert book.model_flops_per_token / 1e9 == pytest.approx(23.1, abs=0.05)
    assert book.palm_flops_per_token / 1e9 == pytest.approx(27.9, abs=0.05)


def test_parameters_of_every_option():
    base = flops.count_params(TINY).total
    # A layer: q 12·24, k and v 12·12, o 24·12, three of 12·20, two norms; then embedding, head and final norm.
    assert base == 3 * (2 * 12 * 24 + 2 * 12 * 12 + 3 * 12 * 20 + 2 * 12) + 2 * 50 * 12 + 12

    def more(**changes):
        return flops.count_params(dataclasses.replace(TINY, **changes)).total - base

    assert more(tie_embeddings=True) == -50 * 12
    assert more(norm_placement="both") == 3 * 2 * 12
    assert more(norm_placement="post") == 0
    assert more(qk_norm=True) == 3 * 2 * 6
    assert more(qkv_bias=True) == 3 * (24 + 12 + 12)
    assert more(attention_output_bias=True) == 3 * 12
    assert more(mlp_bias=True) == 3 * (20 + 20 + 12)
    assert more(gated_mlp=False) == -3 * 12 * 20
    assert more(attention_sinks=True) == 3 * 4
    # Two MoE layers: router, 5 experts of 3·12·8 and a shared one of 3·12·7 instead of the dense 3·12·20.
    moe = MoEConfig(num_experts=5, experts_per_token=2, mlp_dim=8, shared_mlp_dim=7, num_dense_layers=1)
    assert more(moe=moe) == 2 * (12 * 5 + 5 * 3 * 12 * 8 + 3 * 12 * 7 - 3 * 12 * 20)
    # Biases: the dense layer's and the shared expert's in two layers.
    assert more(moe=moe, mlp_bias=True) - more(moe=moe) == (20 + 20 + 12) + 2 * (7 + 7 + 12)
    config = dataclasses.replace(TINY, moe=moe)
    assert flops.count_params(config).total - flops.count_params(config).active == 2 * 3 * (3 * 12 * 8)


def test_tied_embedding_is_a_matmul_as_lm_head():
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert flops.matmul_parameters(tied) == flops.matmul_parameters(TINY)
    assert flops.ledger(tied, sequence_length=8).model_flops == flops.ledger(TINY, sequence_length=8).model_flops


def test_moe_rows_count_the_experts_in_use():
    moe = MoEConfig(num_experts=5, experts_per_token=2, mlp_dim=8, shared_mlp_dim=7, num_dense_layers=1)
    book = flops.ledger(dataclasses.replace(TINY, moe=moe), sequence_length=8, mode="forward")
    rows = {row.op: row for row in book.rows if row.layer == 2}
    assert rows["router"].forward == 2 * 8 * 12 * 5 and rows["router"].dtype == "float32"
    assert rows["expert_up"].forward == 2 * 8 * 2 * 12 * 8
    assert rows["shared_down"].forward == 2 * 8 * 7 * 12
    assert {"gate", "up", "down"} <= {row.op for row in book.rows if row.layer == 0}
    assert "gate" not in rows


def test_capacity_dispatch_runs_every_slot():
    moe = MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, dispatch="capacity", capacity_factor=1.5)
    config = dataclasses.replace(TINY, moe=moe)
    row = next(r for r in flops.ledger(config, sequence_length=10, batch_size=3).rows if r.op == "expert_up")
    # ceil(10 · 2 / 4 · 1.5) = 8 slots for each of 4 experts in each of 3 rows; the model needs 30 · 2.
    assert row.executed == 2 * 12 * 8 * (3 * 4 * 8)
    assert row.forward == 2 * 12 * 8 * (30 * 2)

    # Half of the balanced share: what is dropped is not computed, so the model is not credited for it.
    config = dataclasses.replace(TINY, moe=dataclasses.replace(moe, capacity_factor=0.5))
    row = next(r for r in flops.ledger(config, sequence_length=10).rows if r.op == "expert_up")
    assert row.forward == row.executed == 2 * 12 * 8 * (4 * 3)
    # No expert has more slots than a sequence has tokens.
    config = dataclasses.replace(TINY, moe=dataclasses.replace(moe, capacity_factor=100.0))
    row = next(r for r in flops.ledger(config, sequence_length=10).rows if r.op == "expert_up")
    assert row.executed == 2 * 12 * 8 * (4 * 10)


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 30),
    block=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
def test_blocks_of_queries_compute_their_own_rectangles(length, block, window):
    config = dataclasses.replace(TINY, window_pattern=(window,))
    book = flops.ledger(config, sequence_length=length, attention="blocks", query_block=block)
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    start = query // block * block
    rectangle = (key < start + block) & (key >= start - (length if window is None else window - 1))
    row = next(row for row in book.rows if row.op == "qk")
    assert row.executed == 2 * int(rectangle.sum()) * 4 * 6
    assert row.executed >= row.forward


def test_totals_by_mode():
    train = flops.ledger(TINY, sequence_length=16, batch_size=2)
    forward = flops.ledger(TINY, sequence_length=16, batch_size=2, mode="forward")
    assert train.model_flops == 3 * forward.model_flops == 3 * train.forward
    assert train.palm_flops_per_token == 3 * forward.palm_flops_per_token
    assert train.hardware_flops == train.model_flops  # No recompute, no padding, kernels skip masked pairs.


def test_full_attention_and_padding_are_hardware_only():
    exact = flops.ledger(TINY, sequence_length=16, batch_size=2, segment_lengths=(10, 5, 9))
    full = flops.ledger(TINY, sequence_length=16, batch_size=2, segment_lengths=(10, 5, 9), attention="full")
    assert exact.model_flops == full.model_flops
    assert full.hardware_flops > exact.hardware_flops > exact.model_flops
    qk = next(row for row in full.rows if row.op == "qk")
    assert qk.executed == 2 * 2 * 16 * 16 * 4 * 6
    up = next(row for row in full.rows if row.op == "up")
    assert up.executed == 2 * 32 * 12 * 20 and up.forward == 2 * 24 * 12 * 20


@pytest.mark.parametrize(("remat", "fused"), [("none", False), ("none", True), ("dots", False), ("full", False)])
def test_recompute_adds_to_hardware_only(remat, fused):
    plain = flops.ledger(TINY, sequence_length=16)
    book = flops.ledger(TINY, sequence_length=16, remat=remat, fused_attention=fused)
    forward = {op: sum(row.forward for row in plain.rows if row.op == op) for op in {row.op for row in plain.rows}}
    again = {
        ("none", False): 0,
        ("none", True): forward["qk"],
        ("dots", False): forward["qk"] + forward["pv"],
        ("full", False): sum(forward.values()) - forward["lm_head"] - forward["down"],
    }
    assert book.model_flops == plain.model_flops
    assert book.hardware_flops - plain.hardware_flops == again[remat, fused]


def test_a_norm_after_the_mlp_needs_its_output_again():
    config = dataclasses.replace(TINY, norm_placement="both")
    assert "down" in flops.recomputed_ops(config, "full")
    assert "down" not in flops.recomputed_ops(TINY, "full")


def test_documents_can_change_per_step():
    book = flops.ledger(TINY, sequence_length=16, batch_size=2, remat="full")
    packed = book.for_documents([16, 7, 9])
    assert packed == flops.ledger(TINY, sequence_length=16, batch_size=2, segment_lengths=[16, 7, 9], remat="full")
    assert packed.model_flops < book.model_flops and packed.tokens == book.tokens


@pytest.mark.parametrize("lengths", [[], [0], [17], [16, 16, 1]])
def test_documents_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit 2 rows of 16 tokens"):
        flops.ledger(TINY, sequence_length=16, batch_size=2, segment_lengths=lengths)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"\['upp'\] are not ops of this model; ops: .*up"):
        flops.ledger(TINY, sequence_length=16, recomputed=("upp",))
    with pytest.raises(ValueError, match="'none', 'dots', 'full'"):
        flops.ledger(TINY, sequence_length=16, remat="some")
    with pytest.raises(ValueError, match="at least 1"):
        flops.ledger(TINY, sequence_length=0)
    for attention, block in (("blocks", None), ("blocks", 0), ("exact", 0), ("full", 4)):
        with pytest.raises(ValueError, match="'blocks' needs one, others none"):
            flops.ledger(TINY, sequence_length=16, attention=attention, query_block=block)


def test_table_groups_equal_layers_and_sums():
    config = dataclasses.replace(
        TINY, num_layers=5, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=2)
    )
    book = flops.ledger(config, sequence_length=16)
    lines = book.table().splitlines()
    assert [line.split()[0] for line in lines if " up " in line or "expert_up" in line] == ["0-1", "2-4"]
    model_column = [float(line.split()[4]) for line in lines[1:-2]]
    assert sum(model_column) == pytest.approx(book.model_flops_per_token / 1e9, abs=5e-4 * len(model_column))
    assert f"active {flops.count_params(config).active:,}" in lines[-1]
