"""The FLOP ledger of every config against the matmuls in the jaxpr of its model and of its train step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import configs
from kernels.attention.xla import block_length
from model.execution import Execution
from model.transformer import Definition
from perf import flops
from perf.jaxpr import count_matmul_flops
from training.config import LossConfig, TrainRun
from training.step import StepSpec, objective

# Short, and not a multiple of anything; and several of the query blocks of XLA's attention, the last one partial.
SHORT, SEVERAL_BLOCKS = 24, 2 * block_length(1) + 64
ROWS = 2

TRAINED = [name for name in configs.names() if hasattr(configs.load(name), "train")]


@functools.cache
def run_of(name: str) -> TrainRun:
    return configs.load(name).train()


def spec_of(run: TrainRun, *, attention: str, remat: str, scan: bool = True) -> StepSpec:
    # ragged_dot is one equation whatever the groups; the other grouped products run blocks that no jaxpr counts.
    execution = Execution(
        precision=run.precision,
        attention=(attention,) * len(run.model.window_pattern),
        grouped_matmul="ragged_dot",
        remat=remat,
    )
    return StepSpec(Definition(run.model, scan, run.precision.param), execution, LossConfig(chunk_tokens=32))


def batch_of(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    dtypes = {"tokens": "int32", "targets": "int32", "positions": "int32", "weights": "float32"}
    return {name: jax.ShapeDtypeStruct((ROWS, length), dtype) for name, dtype in dtypes.items()}


def count_forward(spec: StepSpec, length: int) -> int:
    """FLOPs of matmuls from tokens to all logits."""

    def logits(params, biases, batch):
        model = spec.definition.bind(params, biases)
        output = model(batch["tokens"], batch["positions"], None, spec.execution)
        return model.logits(output.hidden_BTD, spec.execution), output.moe

    return listed(count_matmul_flops(logits, *spec.definition.abstract, batch_of(length)))


def count_step(spec: StepSpec, length: int) -> int:
    """FLOPs of matmuls in the loss and its gradient."""
    gradient = jax.value_and_grad(functools.partial(objective, spec=spec), has_aux=True)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    return listed(count_matmul_flops(gradient, *spec.definition.abstract, batch_of(length), weight))


def listed(count) -> int:
    """Without sums weighted by a vector: the router's statistics, which are no layer's work."""
    return count["total"] - count["vector_products"]


def book_of(run: TrainRun, length: int, *, attention: str, remat: str = "none", mode: str = "train") -> flops.Ledger:
    blocked = attention == "xla"
    return flops.ledger(
        run.model,
        sequence_length=length,
        batch_size=ROWS,
        mode=mode,
        attention="blocks" if blocked else "full",
        query_block=block_length(length) if blocked else None,
        remat=remat,
        # XLA's attention keeps no scores: its backward pass multiplies q·k again.
        fused_attention=blocked,
    )


@pytest.mark.parametrize(("attention", "length"), [("reference", SHORT), ("xla", SHORT), ("xla", SEVERAL_BLOCKS)])
@pytest.mark.parametrize("name", TRAINED)
def test_forward(name, attention, length):
    run = run_of(name)
    book = book_of(run, length, attention=attention, mode="forward")
    counted = count_forward(spec_of(run, attention=attention, remat="none"), length)
    assert counted == book.executed_forward == book.hardware_flops


@pytest.mark.parametrize(("attention", "length"), [("reference", SHORT), ("xla", SEVERAL_BLOCKS)])
@pytest.mark.parametrize("name", TRAINED)
def test_step(name, attention, length):
    run = run_of(name)
    book = book_of(run, length, attention=attention)
    counted = count_step(spec_of(run, attention=attention, remat="none"), length)
    assert counted == book.hardware_flops


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("name", TRAINED)
def test_step_with_recomputation(name, remat):
    run = run_of(name)
    book = book_of(run, SEVERAL_BLOCKS, attention="xla", remat=remat)
    counted = count_step(spec_of(run, attention="xla", remat=remat), SEVERAL_BLOCKS)
    assert counted == book.hardware_flops


@pytest.mark.parametrize("name", ["dense-1b", "moe-1b"])
def test_unrolled_layers_cost_the_same(name):
    run = run_of(name)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=3))
    scanned, unrolled = (spec_of(run, attention="xla", remat="full", scan=scan) for scan in (True, False))
    assert count_step(unrolled, SHORT) == count_step(scanned, SHORT)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_capacity_dispatch(remat):
    run = run_of("moe-1b")
    moe = dataclasses.replace(run.model.moe, dispatch="capacity")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    book = book_of(run, SHORT, attention="xla", remat=remat)
    assert count_step(spec_of(run, attention="xla", remat=remat), SHORT) == book.hardware_flops


@pytest.mark.parametrize("name", TRAINED)
def test_parameters(name):
    config = run_of(name).model
    params, _ = Definition(config, True).abstract
    assert flops.count_params(config).total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_wrong_ledger_is_noticed():
    """Each term of the ledger is more than nothing of the count: one width off and they differ."""
    run = run_of("moe-1b")
    counted = count_step(spec_of(run, attention="xla", remat="none"), SHORT)
    moe = dataclasses.replace(run.model.moe, mlp_dim=run.model.moe.mlp_dim + 1)
    for wrong in (
        dataclasses.replace(run.model, vocab_size=run.model.vocab_size + 1),
        dataclasses.replace(run.model, num_layers=run.model.num_layers + 1),
        dataclasses.replace(run.model, num_kv_heads=run.model.num_kv_heads // 2),
        dataclasses.replace(run.model, moe=moe),
        dataclasses.replace(run.model, moe=dataclasses.replace(moe, experts_per_token=1)),
    ):
        assert book_of(dataclasses.replace(run, model=wrong), SHORT, attention="xla").hardware_flops != counted
