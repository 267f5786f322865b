"""Everything a run must save to go on: one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from kernels import adamw
from model.transformer import Definition, Tree
from parallel.sharding import Placement
from training.optimizer import optimizer_state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished updates. `bad_step` is -1, or the step whose loss or gradient was not finite: from
    then on updates leave the state as it was before that step."""

    step: jax.Array
    bad_step: jax.Array
    params: Tree
    """Float32; of a matrix in halves (training/halves.py), the rest of it, int16: see `full_params`."""
    biases: Tree
    opt_state: Any
    magnitudes: Tree = dataclasses.field(default_factory=dict)
    """Of the operands of FP8 products in the last steps; empty without delayed scaling."""
    copies: Tree = dataclasses.field(default_factory=dict)
    """Of matrices, cast for products by the update that wrote the matrices, so that no step reads those to cast them.
    Never saved. Empty without `Definition.copy_dtype`."""
    # Halves of all of them would cost no bytes anywhere. But XLA may compute an update twice, with roundings that
    # differ, and write a half of each: on a CPU one weight of 1024 was off by 2¹⁶ of its last place after one step. So
    # only a kernel's are.

    @property
    def weights(self) -> Tree:
        """The parameters as a forward pass takes them: the copies where there are any."""
        return with_copies(self.params, self.copies)

    @property
    def full_params(self) -> Tree:
        """Float32 parameters, those in halves joined: one array more for each of these."""
        rounded, params = traverse_util.flatten_dict(self.copies), traverse_util.flatten_dict(self.params)
        rests = {path: rest for path, rest in params.items() if rest.dtype == jnp.int16}
        joined = {path: adamw.join(rounded[path], rest) for path, rest in rests.items()}
        return traverse_util.unflatten_dict(params | joined) if joined else self.params

    @property
    def saved(self) -> TrainState:
        """What a checkpoint holds. While it is written, parameters in halves take four bytes more each."""
        return dataclasses.replace(self, params=self.full_params, copies={})


def with_copies(params: Tree, copies: Tree) -> Tree:
    """`params`, or their shapes, with those of `copies` in their places."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(copies)
    return traverse_util.unflatten_dict(flat)


def copies_of(definition: Definition, params: Tree) -> Tree:
    """`TrainState.copies` of these parameters."""
    flat, wanted = traverse_util.flatten_dict(params), traverse_util.flatten_dict(definition.copies[0])
    return traverse_util.unflatten_dict({path: flat[path].astype(copy.dtype) for path, copy in wanted.items()})


def place_copies(
    definition: Definition, state: TrainState, shardings: TrainState, halves: Collection[tuple] = ()
) -> TrainState:
    """`state` with copies of its parameters, where it shall have them, and with those at the paths `halves` in halves:
    what neither init nor a restore gives."""
    if not shardings.copies:
        return state

    def place(params: Tree) -> tuple[dict, Tree]:
        flat, copies, rests = traverse_util.flatten_dict(params), copies_of(definition, params), {}
        copies = traverse_util.flatten_dict(copies)
        for path in halves:
            copies[path], rests[path] = adamw.split(flat[path])
        return rests, traverse_util.unflatten_dict(copies)

    flat = traverse_util.flatten_dict(shardings.params)
    placed = ({path: flat[path] for path in halves}, shardings.copies)
    rests, copies = jax.jit(place, out_shardings=placed)(state.params)
    params = traverse_util.unflatten_dict(traverse_util.flatten_dict(state.params) | rests)
    return dataclasses.replace(state, params=params, copies=copies)


def init_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement,
    halves: Collection[tuple] = (),
) -> TrainState:
    """The state before the first step, on the devices of `placement`; parameters at the paths `halves` are so held."""
    params, biases = definition.init(jax.random.key(seed), lambda names: placement.sharding(*names))
    shardings = state_shardings(definition, optimizer, placement)

    def rest(params: Tree) -> tuple[jax.Array, jax.Array, Any, Tree]:
        magnitudes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), definition.magnitudes[0])
        return jnp.int32(0), jnp.int32(-1), optimizer.init(params), magnitudes

    placed = (shardings.step, shardings.bad_step, shardings.opt_state, shardings.magnitudes)
    step, bad_step, opt_state, magnitudes = jax.jit(rest, out_shardings=placed)(params)
    state = TrainState(step, bad_step, params, biases, opt_state, magnitudes)
    return place_copies(definition, state, shardings, halves)


def _shapes(
    definition: Definition, optimizer: optax.GradientTransformation, halves: Collection[tuple] = ()
) -> TrainState:
    params, biases = definition.abstract
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    flat = traverse_util.flatten_dict(params)
    rests = {path: jax.ShapeDtypeStruct(flat[path].shape, jnp.int16) for path in halves}
    params = traverse_util.unflatten_dict(flat | rests)
    return TrainState(scalar, scalar, params, biases, opt_state, definition.magnitudes[0], definition.copies[0])


def state_shardings(
    definition: Definition, optimizer: optax.GradientTransformation, placement: Placement
) -> TrainState:
    """A NamedSharding for each leaf of the state: parameters by their logical axes, optimizer moments likewise."""
    params, biases = (named_shardings(tree, placement) for tree in definition.logical)
    magnitudes, copies = (named_shardings(tree[1], placement) for tree in (definition.magnitudes, definition.copies))
    abstract = _shapes(definition, optimizer)
    scalar = placement.sharding()
    opt_state = optimizer_state_shardings(abstract.opt_state, abstract.params, params, scalar)
    return TrainState(scalar, scalar, params, biases, opt_state, magnitudes, copies)


def abstract_weights(definition: Definition, placement: Placement) -> tuple[Tree, Tree]:
    """(weights, biases) as ShapeDtypeStructs with shardings."""
    (params, biases), (copies, _) = definition.abstract, definition.copies
    shardings = tuple(named_shardings(tree, placement) for tree in definition.logical)
    described = (with_copies(params, copies), biases)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), described, shardings)


def named_shardings(logical: Tree, placement: Placement) -> Tree:
    """NamedShardings of a tree of logical axis tuples."""
    return jax.tree.map(lambda axes: placement.sharding(*axes), logical, is_leaf=lambda leaf: isinstance(leaf, tuple))


def abstract_state(
    definition: Definition,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    halves: Collection[tuple] = (),
) -> TrainState:
    """ShapeDtypeStructs with shardings: what ahead-of-time compilation takes, and without `halves` a restore fills."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        _shapes(definition, optimizer, halves),
        shardings,
    )
