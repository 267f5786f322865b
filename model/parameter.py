"""A parameter, described once: shape, dtype, logical axes, initialiser."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

Tree = dict[Any, Any]
Convert = Callable[[tuple[str | int, ...], jax.Array], Any]
"""What becomes of the parameter at a path of `params`."""
Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Place = Callable[[tuple[str | None, ...]], jax.sharding.Sharding]
"""Where an array of these logical axes lives."""


class RouterBias(nnx.Variable):
    """Balancing bias of a router: follows the load, not the gradient."""


class Magnitudes(nnx.Variable):
    """Largest magnitudes of a product's operands in the last steps, float32 [3, steps] as `ScalingState` has them: its
    gradient is what it becomes."""


@functools.cache
def normal(stddev: float) -> Init:
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A parameter's value that is yet to be made."""

    program: Callable[[jax.Array], jax.Array]
    keys: jax.Array

    def make(self) -> jax.Array:
        return self.program(self.keys)


@dataclasses.dataclass(frozen=True)
class Creator:
    """Creates the parameters of a module from keys.

    `keys` has one key per copy of the module: a scalar, or [L] for L layers stacked into one array, whose values then
    equal those of L modules created from the keys one by one. A parameter's key depends on its path alone.
    """

    keys: jax.Array
    dtype: str
    joined: bool = False
    """Projections of one input are one array: attention's query, key and value, a gated feed-forward's gate and up."""
    delayed: bool = False
    """Products are rounded by the magnitudes of the steps before: each has `Magnitudes`."""
    place: Place | None = None
    """Makes each parameter where it lives, by a program of its own that all of its kind share: one program that makes
    all of them takes XLA's GPU compiler 168 s for 20 unrolled layers (one core, JAX 0.11.2). The values are `Pending`
    then, for `Definition.init` to make. None when traced."""

    def scope(self, name: str | int) -> Creator:
        number = name if isinstance(name, int) else zlib.crc32(name.encode()) & 0x7FFFFFFF
        return dataclasses.replace(self, keys=_per_copy(lambda key: jax.random.fold_in(key, number), self.keys))

    def __call__(
        self,
        name: str,
        shape: tuple[int, ...],
        logical: tuple[str | None, ...],
        init: Init,
        *,
        dtype: str | None = None,
        kind: type[nnx.Variable] = nnx.Param,
    ) -> nnx.Variable:
        """A variable of `kind` whose metadata `logical` names its axes, `layers` first where stacked."""
        assert len(shape) == len(logical), f"{name}: {shape} named by {logical}"
        dtype = jnp.dtype(dtype or self.dtype)
        keys, logical = self.scope(name).keys, ("layers",) * self.keys.ndim + tuple(logical)
        draw = _draw(init, shape, dtype)
        value = draw(keys) if self.place is None else Pending(_program(draw, self.place(logical)), keys)
        # `format` is how a product takes it, where that is not as it is (see `Definition`).
        return kind(value, logical=logical, format=None)


@functools.cache
def _draw(init: Init, shape: tuple[int, ...], dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    return lambda keys: _per_copy(lambda key: init(key, shape, dtype), keys)


@functools.cache
def _program(draw: Callable[[jax.Array], jax.Array], sharding: jax.sharding.Sharding):
    return jax.jit(draw, out_shardings=sharding)


Logical = tuple[str | None, ...]


def matrix_axes(logical: Logical) -> tuple[int, int] | None:
    """Number of batch axes and of row axes of a hidden weight [*batch, *rows, *columns]; None for other parameters.

    A hidden weight maps from or to the residual stream: its first or last axis is the model's width, and the axes left
    are its other side, together ([D, N, H] is [D, N·H]). Biases have no width axis beside another one, a router has an
    unnamed axis, embedding and head have a vocab axis.
    """
    batch, own = split_copies(logical)
    if len(own) < 2 or "vocab" in own or None in own:
        return None
    if own[0] in ("embed", "expert_embed"):
        return batch, 1
    if own[-1] in ("embed", "expert_embed"):
        return batch, len(own) - 1
    return None


def split_copies(logical: Logical) -> tuple[int, Logical]:
    """Number of leading axes that only enumerate copies (layers, experts), and the names of the others."""
    batch = 0
    while batch < len(logical) and logical[batch] in ("layers", "experts"):
        batch += 1
    return batch, logical[batch:]


def _per_copy(fn: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
    return jax.vmap(fn)(keys) if keys.ndim else fn(keys)


def logical_tree(state: nnx.State) -> Tree:
    """Logical axes of each variable, as a nested dict."""
    tree: Tree = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = path
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        node[name] = variable.get_metadata("logical")
    return tree


def make_pending(pending: nnx.State, convert: Convert | None) -> Tree:
    """Values of parameters that are yet to be made, one at a time."""
    flat = {}
    for path, variable in nnx.to_flat_state(pending):
        array = variable.get_value().make()
        flat[path] = array if convert is None else convert(path, array)
    return traverse_util.unflatten_dict(flat)


def fill(abstract: nnx.State, values: Tree) -> nnx.State:
    """`abstract` with the arrays of a nested dict; both flatten in the order of sorted keys."""
    structure = jax.tree.structure(nnx.to_pure_dict(abstract))
    assert structure == jax.tree.structure(values), f"{structure} != {jax.tree.structure(values)}"
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(values))
