"""Bytes of a serving step, FLOPs of a prefill and the share of the bandwidth: worked by hand, and against the model."""

import dataclasses
import math
import time

import jax
import pytest

import configs
from configs import llama3_8b, llama3_70b, mixtral_8x7b
from model.transformer import Definition
from perf.chips import Bandwidth
from perf.flops import ledger
from perf.meter import ImplausibleMeasurement
from perf.traffic import Traffic, decode_mbu, prefill_flops
from tests.model import tiny

H100 = Bandwidth(3350e9, "H100 SXM memory: datasheet", cache_bytes=50 * 2**20)


def variants():
    yield (
        "sinks and biases",
        tiny.dense(attention_sinks=True, qkv_bias=True, attention_output_bias=True, mlp_bias=True, qk_norm=True),
    )
    yield (
        "tied, norms on both sides, not gated",
        tiny.dense(tie_embeddings=True, norm_placement="both", gated_mlp=False),
    )
    yield (
        "dense first, shared expert, router bias",
        tiny.moe(num_layers=3, num_dense_layers=1, shared_mlp_dim=24, router_bias=True, mlp_bias=True),
    )
    yield "one expert", tiny.moe(num_experts=1, experts_per_token=1)
    yield "every layer dense", tiny.moe(num_dense_layers=2)
    for name in configs.names():
        module = configs.load(name)
        if hasattr(module, "MODEL"):
            yield name, module.MODEL


@pytest.mark.parametrize(("config", "dtype"), [(c, d) for _, c in variants() for d in ("bfloat16", "float32")])
def test_all_experts_are_the_parameters_without_the_embedding(config, dtype):
    trees = Definition(config, scan=False, param_dtype=dtype).abstract
    stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
    itemsize = jax.numpy.dtype(dtype).itemsize
    if not config.tie_embeddings:
        stored -= config.vocab_size * config.embed_dim * itemsize
    experts = config.num_moe_layers * config.moe.num_experts if config.moe else None
    assert Traffic(config, weight_bytes=itemsize, cache_bytes=2).weights(experts) == stored


def test_llama_by_hand():
    large = Traffic(llama3_70b.MODEL, weight_bytes=2, cache_bytes=2)
    layer = 8192 * (64 + 8 + 8 + 64) * 128 + 3 * 8192 * 28_672 + 2 * 8192
    assert large.weights() == 2 * (80 * layer + 8192 + 8192 * 128_256) == 139_006_066_688
    small = Traffic(llama3_8b.MODEL, weight_bytes=2, cache_bytes=2)
    assert small.bytes_per_token == 131_072
    # 99 + 1 cached tokens are read, two new ones written.
    assert small.cache([99, 1]) == 102 * 131_072
    assert small.cache(iter([99, 1]), new=5) == 110 * 131_072
    assert small.cache([0]) == 131_072 and small.cache([]) == 0
    assert small.step([99, 1]) == small.weights() + 102 * 131_072
    assert Traffic(llama3_8b.MODEL, weight_bytes=1, cache_bytes=1).step([99, 1]) * 2 == small.step([99, 1])


def test_experts_by_hand():
    config = mixtral_8x7b.MODEL
    traffic = Traffic(config, weight_bytes=2, cache_bytes=2)
    expert = 3 * 4096 * 14_336 * 2
    assert traffic.weights(1) - traffic.weights(0) == expert == 352_321_536
    # 46.7 B parameters in bf16, less the embedding.
    assert traffic.weights(32 * 8) == pytest.approx(2 * (46.7e9 - 0.13e9), rel=2e-3)
    # A token alone: two experts in each layer, 12.9 B active parameters.
    assert traffic.weights(32 * 2) == pytest.approx(2 * (12.9e9 - 0.13e9), rel=5e-3)
    for wrong in (None, 32 * 8 + 1, -1):
        with pytest.raises(AssertionError):
            traffic.weights(wrong)
    shared = dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_mlp_dim=1000))
    more = Traffic(shared, weight_bytes=2, cache_bytes=2).weights(0) - traffic.weights(0)
    assert more == 32 * 3 * 4096 * 1000 * 2


def test_windows_by_hand():
    # Layers 0, 2, 3 and 5 see 4 tokens, 1 and 4 all: 2 heads of 4 elements for keys and for values.
    config = tiny.dense(num_layers=6, num_kv_heads=2, head_dim=4, window_pattern=(4, None, 4))
    traffic = Traffic(config, weight_bytes=4, cache_bytes=1)
    per_layer = 2 * 2 * 4
    assert traffic.cache([10]) == per_layer * (4 * 3 + 2 * 10 + 6)
    # The window holds the new token too: at 3 cached tokens it is just full.
    assert traffic.cache([3]) == per_layer * (6 * 3 + 6)
    assert traffic.cache([2, 10]) == traffic.cache([2]) + traffic.cache([10]) == per_layer * (6 * 2 + 6 + 38)


def test_a_step_costs_microseconds():
    config = tiny.dense(num_layers=26, window_pattern=(512,) * 5 + (None,))
    traffic, lengths = Traffic(config, weight_bytes=2, cache_bytes=2), list(range(1000, 1128))
    best = min(_seconds(lambda: traffic.step(lengths)) for _ in range(200))
    assert best < 100e-6


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("field", ["weight_bytes", "cache_bytes", "router_bytes"])
def test_elements_have_bytes(field):
    sizes = {"weight_bytes": 2, "cache_bytes": 2, "router_bytes": 4, field: 0}
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        Traffic(tiny.dense(), **sizes)


def test_mbu_of_an_h100():
    # The llama3-8b of shared measurements: 179 tokens/s at batch 1, 15.0 GB of weights a token.
    num_bytes = Traffic(llama3_8b.MODEL, weight_bytes=2, cache_bytes=2).step([128])
    used = decode_mbu(num_bytes, 1 / 179, H100)
    assert used.value == pytest.approx(num_bytes * 179 / 3350e9) and 0.79 < used.value < 0.81
    assert used.reason is None and used.name == "decode_mbu" and used.num_bytes == num_bytes
    assert decode_mbu(8 * num_bytes, 8 / 179, H100, steps=8).value == pytest.approx(used.value)
    assert decode_mbu(num_bytes, 1 / 179, H100, num_devices=4).value == pytest.approx(used.value / 4)
    assert decode_mbu(3350 * 10**6, 1e-3, H100).value == 1.0


def test_more_bytes_than_the_bandwidth_is_an_error():
    # 1 ms moves 3.35 GB, and the caches may have kept 52.4 MB.
    with pytest.raises(
        ImplausibleMeasurement, match=r"decode_mbu=1\.01\d* is above 1: 3,402,428,801 bytes in 0\.001 s"
    ):
        decode_mbu(3_350_000_000 + 50 * 2**20 + 1, 1e-3, H100)
    used = decode_mbu(3_350_000_000 + 50 * 2**20, 1e-3, H100)
    assert used.value is None and "52,428,800 of the 3,402,428,800 bytes came from caches" in used.reason
    unknown = dataclasses.replace(H100, cache_bytes=None)
    with pytest.raises(ImplausibleMeasurement, match="is above 1"):
        decode_mbu(3_350_000_001, 1e-3, unknown)


def test_what_fits_in_caches_is_no_utilisation():
    assert "need not come from memory" in decode_mbu(50 * 2**20, 1.0, H100).reason
    assert decode_mbu(50 * 2**20 + 1, 1.0, H100).value is not None
    assert decode_mbu(51 * 2**20 * 2, 1.0, H100, num_devices=2).value is not None
    assert decode_mbu(100 * 2**20, 1.0, H100, steps=2).value is None


def test_an_unknown_bandwidth_gives_its_reason():
    used = decode_mbu(10**9, 1.0, Bandwidth(None, None, "no peak is known for device kind 'X'"))
    assert used.value is None and used.reason == "no peak is known for device kind 'X'"


@pytest.mark.parametrize(
    ("num_bytes", "seconds", "more"),
    [(0, 1.0, {}), (1, 0.0, {}), (1, math.nan, {}), (1, math.inf, {}), (1, 1.0, {"steps": 0}), (1, -1.0, {})],
)
def test_nothing_is_no_measurement(num_bytes, seconds, more):
    with pytest.raises(ValueError, match="give the bytes and the wall seconds"):
        decode_mbu(num_bytes, seconds, H100, **more)


@pytest.mark.parametrize(
    "config",
    [
        tiny.dense(window_pattern=(4, None, 7), num_layers=5),
        tiny.moe(num_dense_layers=1, shared_mlp_dim=8, num_layers=3),
        llama3_8b.MODEL,
    ],
)
def test_prefill_of_whole_prompts_is_the_ledgers_forward(config):
    book = ledger(config, sequence_length=21, batch_size=3, mode="forward")
    assert prefill_flops(config, [(0, 21)] * 3, sampled=63) == book.forward
    head = 2 * config.embed_dim * config.vocab_size
    assert prefill_flops(config, [(0, 21)] * 3, sampled=3) == book.forward - 60 * head


def test_chunks_of_a_prompt_add_up():
    config = tiny.dense(window_pattern=(4, None), num_layers=4)
    whole = prefill_flops(config, [(0, 30)], sampled=1)
    for cut in (1, 3, 4, 5, 17, 29):
        assert prefill_flops(config, [(0, cut)], 0) + prefill_flops(config, [(cut, 30 - cut)], 1) == whole
        assert prefill_flops(config, iter([(0, cut), (cut, 30 - cut)]), 1) == whole


def test_a_chunk_by_hand():
    # Tokens 5, 6 and 7: 6 + 7 + 8 pairs where all are seen, 4 each in a window of 4.
    config = tiny.dense(num_layers=2, window_pattern=(4, None))
    linear = 2 * 3 * 2 * (16 * 32 + 16 * 16 * 2 + 32 * 16 + 3 * 16 * 32)
    pairs = 2 * 2 * 8 * 4 * (21 + 12)
    assert prefill_flops(config, [(5, 3)], 0) == linear + pairs
    assert prefill_flops(config, [], 2) == 2 * 2 * 16 * 64
