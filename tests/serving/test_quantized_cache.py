"""Serving with keys and values in 8 bits: the text is that of a model without a cache whose keys and values are rounded
the same way, and the cache takes the bytes that are counted."""

import dataclasses

import jax
import numpy as np
import pytest

from kernels.paged_attention.quantize import dequantize, quantize_heads
from model.attention import Attention
from model.cache import token_bytes
from serving.config import ServeRun, SpeculationConfig
from serving.metrics import Metrics
from serving.request import SamplingParams
from serving.resolve import resolve
from serving.startup import make_runner
from serving.utilization import UtilizationMeter
from tests.serving.engines import MODEL, SHAPES, NaiveDecoder, start_tiny, submit

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [
    tuple(np.random.default_rng(seed).integers(MODEL.vocab_size, size=size).tolist())
    for seed, size in ((0, 30), (1, 9), (2, 17))
]
# Two that begin alike, for a page that they share.
PROMPTS.append(PROMPTS[0][:24] + PROMPTS[1])


def small(kv_dtype: str):
    return dataclasses.replace(SHAPES, kv_dtype=kv_dtype, batch_sizes=(4,), tile_counts=(4,), widths=(64,))


@pytest.mark.parametrize(("kv_dtype", "devices", "speculation"), [("int8", 1, "layers"), ("float8_e4m3fn", 2, "none")])
def test_text_is_that_of_rounded_keys_and_values(monkeypatch, kv_dtype, devices, speculation):
    drafts = SpeculationConfig(kind=speculation, max_draft=2, max_batch=4, num_layers=1)
    server = start_tiny(shapes=small(kv_dtype), devices=devices, speculation=drafts)
    try:
        listeners = [submit(server.engine, str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
        texts = [listener.wait().tokens for listener in listeners]
        plain = NaiveDecoder(server)(PROMPTS[0], GREEDY)
        project = Attention._project

        def rounded(self, *args):
            q, *sides = project(self, *args)
            return q, *(dequantize(*quantize_heads(x, kv_dtype), x.dtype) for x in sides)

        monkeypatch.setattr(Attention, "_project", rounded)
        naive = NaiveDecoder(server)
        assert texts == [naive(prompt, GREEDY).tokens for prompt in PROMPTS]
        # Rounding shows: it is not that nothing was rounded.
        assert naive(PROMPTS[0], GREEDY).logprobs != plain.logprobs
    finally:
        server.engine.stop()


@pytest.mark.parametrize(("kv_dtype", "head"), [("auto", 4 * 4), ("int8", 4 + 4)])
def test_bytes_of_the_cache_are_those_counted(kv_dtype, head):
    resolved = resolve(ServeRun(name="tiny", model=MODEL, dtype="float32", engine=small(kv_dtype)), jax.devices()[:1])
    caches = jax.tree.leaves(make_runner(resolved, SHAPES.num_pages)._caches)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in caches)
    assert held == SHAPES.num_pages * resolved.page_bytes
    assert (
        MODEL.head_dim == 4
        and resolved.page_bytes == SHAPES.page_size * 2 * MODEL.num_layers * MODEL.num_kv_heads * head
    )
    meter = UtilizationMeter(
        resolved.programs.definition, resolved.dtype, resolved.kv_dtype, resolved.devices, Metrics()
    )
    assert meter._traffic.bytes_per_token == token_bytes(MODEL, resolved.kv_dtype)
