"""Losses of twenty steps of tiny models, as they were when written down: what a refactoring may not change.

After a change that is meant to change them: `python -m tests.golden.test_golden_losses` writes them anew.
"""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from model.transformer import Definition
from parallel.mesh import MeshConfig, make_mesh
from parallel.sharding import Placement
from tests.model.tiny import VOCAB, dense, execution, moe
from training.config import LossConfig
from training.optimizer import MuonConfig, OptimizerConfig, make_optimizer
from training.schedule import ScheduleConfig, make_schedule
from training.state import init_state, state_shardings
from training.step import StepSpec, make_train_step

GOLDEN = Path(__file__).with_name("losses.json")
STEPS, ROWS, LENGTH = 20, 8, 16

SCHEDULE = ScheduleConfig(kind="cosine", peak_lr=0.02, warmup_steps=4)
ADAMW = OptimizerConfig(schedule=SCHEDULE)
RUNS = {
    "dense": (dense(window_pattern=(6, None), qk_norm=True, tie_embeddings=True, init_stddev=0.1), ADAMW),
    "moe": (
        moe(
            num_layers=3,
            num_dense_layers=1,
            shared_mlp_dim=16,
            load_balance_coef=0.01,
            router_z_coef=0.001,
            init_stddev=0.1,
        ),
        # float32: the orthogonal update amplifies rounding.
        OptimizerConfig(kind="muon", schedule=SCHEDULE, muon=MuonConfig(ns_dtype="float32")),
    ),
}


def batch(step: int) -> dict[str, np.ndarray]:
    """Two documents a row, each an arithmetic sequence modulo the vocabulary: whole numbers, the same everywhere."""
    row, column = np.arange(ROWS)[:, None], np.arange(LENGTH + 1)[None]
    start = 5 + (row + step) % 7
    second = column >= start
    tokens = (3 * row + 7 * step + column * np.where(second, 1 + row % 3, 5)) % VOCAB
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segments": (1 + second[:, :-1]).astype(np.int32),
        "positions": np.where(second, column - start, column)[:, :-1].astype(np.int32),
        "weights": (column[:, 1:] != start).astype(np.float32),
    }


def train(name: str) -> tuple[list[float], int]:
    """Losses of every step, and how many programs the step was compiled to."""
    config, settings = RUNS[name]
    definition = Definition(config, scan=True)
    optimizer = make_optimizer(settings, STEPS, definition.logical[0])
    spec = StepSpec(definition, execution(config), LossConfig(chunk_tokens=32, z_loss_coef=1e-4))
    alone = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))
    step = jax.jit(
        make_train_step(spec, optimizer, make_schedule(settings.schedule, STEPS)),
        donate_argnums=0,
        out_shardings=(state_shardings(definition, optimizer, alone), alone.sharding()),
    )
    state = init_state(definition, optimizer, 0, alone)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, batch(number))
        losses.append(float(metrics["loss"]))
    return losses, step._cache_size()


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        losses, programs = train(name)
    compiled = [record.getMessage() for record in caplog.records if "Compiling jit(step)" in record.getMessage()]
    assert programs == len(compiled) == 1, "the step was compiled again"
    golden = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(losses, golden, rtol=2e-5)
    assert losses[-1] < 0.8 * losses[0], "the model learns nothing"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: train(name)[0] for name in RUNS}, indent=2) + "\n")
