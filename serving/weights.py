"""The weights that are served: read from disk, or random for measuring."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from model.transformer import Definition, Tree

Shardings = tuple[Tree, Tree]


def random_weights(definition: Definition, shardings: Shardings, seed: int) -> tuple[Tree, Tree]:
    """(params, biases) of a model that only its speed is asked of: norms are identities, the rest is normal.

    Made leaf by leaf: the model's own init is one program of hundreds of random arrays, and compiles for minutes.
    """
    key = jax.random.key(seed)
    trees = []
    for abstract, sharding in zip(definition.abstract, shardings, strict=True):
        flat, places = traverse_util.flatten_dict(abstract), traverse_util.flatten_dict(sharding)
        leaves = {}
        for number, (path, leaf) in enumerate(flat.items()):
            if path[-1] == "scale":
                fill = 0.0 if definition.config.norm_zero_centered else 1.0
                make = functools.partial(jnp.full, leaf.shape, fill, leaf.dtype)
                leaves[path] = jax.jit(make, out_shardings=places[path])()
            else:
                make = _normal(leaf.shape, leaf.dtype, definition.config.init_stddev, places[path])
                leaves[path] = make(jax.random.fold_in(key, number))
        trees.append(traverse_util.unflatten_dict(leaves))
    return trees[0], trees[1]


@functools.cache
def _normal(shape: tuple[int, ...], dtype, stddev: float, sharding: jax.sharding.Sharding):
    def make(key: jax.Array) -> jax.Array:
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)
