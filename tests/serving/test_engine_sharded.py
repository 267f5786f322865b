"""Four devices that share every layer give the text of one."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.model.tiny import dense, moe
from tests.serving.engines import SHAPES, NaiveDecoder, start_tiny
from tests.serving.test_engine import REQUESTS, Entry, check_script

# Few programs: compiling them takes most of the time.
ONE_SHAPE = dataclasses.replace(SHAPES, widths=(64,), batch_sizes=(4,), tile_counts=(4,))

MODELS = {
    "dense": dense(init_stddev=0.5, qkv_bias=True, attention_sinks=True, window_pattern=(None, 9)),
    # Two experts on each device.
    "experts": moe(init_stddev=0.5, shared_mlp_dim=8),
}


@pytest.mark.parametrize("name", MODELS)
def test_four_devices_give_the_text_of_one(name):
    server = start_tiny(MODELS[name], devices=4, shapes=ONE_SHAPE)
    try:
        runner, definition = server.started.runner, server.resolved.programs.definition
        cache = runner._cache[0][0]
        assert cache.sharding.shard_shape(cache.shape)[2] == cache.shape[2] // 4
        # The decoder gathers these, and computes on one device.
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        alone = definition.init(jax.random.key(0), lambda names: one)
        jax.tree.map(np.testing.assert_array_equal, runner._weights[0], alone)
        naive = NaiveDecoder(server)
        script = [Entry(index, step=index, cancel_after=9 if index == 4 else None) for index in range(len(REQUESTS))]
        for entry in script:
            naive(*REQUESTS[entry.index])
        engine = check_script(server, naive, script, num_pages=10)
        assert engine.preemptions > 0
    finally:
        server.engine.stop()
