"""Tiny models, parameters and batches, shared by the tests of several folders."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, MoEConfig
from model.execution import Execution
from model.precision import Precision
from model.transformer import Definition

VOCAB = 64

# For `jax.jit(compiler_options=...)`: a train step of these sizes compiles in 60% of the time (XLA's CPU backend).
COMPILE_FAST = {"xla_backend_optimization_level": 0}


def dense(**changes: Any) -> ModelConfig:
    sizes = {
        "vocab_size": VOCAB,
        "embed_dim": 16,
        "mlp_dim": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 4,
        "max_positions": 64,
    }
    return ModelConfig(**(sizes | changes))


def moe(**changes: Any) -> ModelConfig:
    """Fields of `MoEConfig` go to the experts, the others to the model."""
    own = {field.name for field in dataclasses.fields(MoEConfig)} - {"mlp_dim"}
    experts = {"num_experts": 8, "experts_per_token": 2} | {k: v for k, v in changes.items() if k in own}
    return dense(moe=MoEConfig(mlp_dim=16, **experts), **{k: v for k, v in changes.items() if k not in own})


def random_params(definition: Definition, seed: int = 0) -> tuple[Any, Any]:
    """(params, biases) as NumPy arrays, none of them at its neutral start: a norm's scale is near 1 and not 1, biases
    and sinks are near 0 and not 0. Nothing is compiled."""
    rng = np.random.default_rng(seed)
    one = 0.0 if definition.config.norm_zero_centered else 1.0

    def draw(path, leaf, logical):
        value = rng.normal(size=leaf.shape)
        name = str(path[-1].key)
        own = [n for n, axis in zip(leaf.shape, logical, strict=True) if axis not in ("layers", "experts")]
        if name == "scale":
            value = one + 0.2 * value
        elif name.endswith("bias") or name == "sinks":
            value = 0.2 * value
        elif name != "table":
            # Variance-keeping, so that every part of the model matters: inputs are the first axis, or the first two.
            fan_in = own[0] * own[1] if name == "output" else own[0]
            value = value / np.sqrt(fan_in)
        return value.astype(leaf.dtype)

    def tree(index):
        is_leaf = lambda node: isinstance(node, tuple)  # noqa: E731
        logical = jax.tree.leaves(definition.logical[index], is_leaf=is_leaf)
        structure = jax.tree.structure(definition.abstract[index])
        names = jax.tree.unflatten(structure, logical)
        return jax.tree_util.tree_map_with_path(draw, definition.abstract[index], names)

    return tree(0), tree(1)


def packed_batch(rows: int = 8, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """Documents of random lengths, packed; every third row ends in padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        end = length if row % 3 else length - 3
        start, number = 0, 1
        while start < end:
            stop = min(start + int(rng.integers(2, 9)), end)
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
            weights[row, start : stop - 1] = 1.0
            start, number = stop, number + 1
    tokens, targets = rng.integers(VOCAB, size=(2, rows, length)).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions, "weights": weights}


def execution(config: ModelConfig, compute: str = "float32", **changes: Any) -> Execution:
    settings = {"attention": ("xla",) * len(config.window_pattern), "grouped_matmul": "loop"}
    return Execution(Precision(compute=compute), **(settings | changes))


def hidden(
    definition: Definition, params: Any, biases: Any, batch: dict[str, np.ndarray], run: Execution | None = None
) -> jax.Array:
    """Final hidden states [B, T, D]; `segments` may be missing from the batch."""
    run = execution(definition.config) if run is None else run

    @jax.jit
    def compute(params, biases, tokens, positions, segments):
        return definition.bind(params, biases)(tokens, positions, segments, run).hidden_BTD

    return compute(params, biases, batch["tokens"], batch["positions"], batch.get("segments"))


def plain_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One document per row."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens.astype(np.int32), "positions": positions}


def assert_close(got: Any, want: Any, relative: float) -> None:
    """Trees equal to `relative` of the largest element of each array."""
    names = jax.tree_util.tree_leaves_with_path(want)
    for (path, expected), actual in zip(names, jax.tree.leaves(got), strict=True):
        expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
        assert expected.shape == actual.shape, f"{jax.tree_util.keystr(path)}: {actual.shape} != {expected.shape}"
        bound = relative * max(np.abs(expected).max(initial=0), 1e-30)
        error = np.abs(actual - expected).max(initial=0)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: off by {error:.3g}, more than {bound:.3g}"


def to_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)
