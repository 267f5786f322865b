"""Logical axes to mesh axes: the only vocabulary in which the model speaks of placement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Where each logical axis lives: a mesh axis, several (major first), or None for replicated.

    The first group names activation axes, the second weight axes. Arrays with an `experts` axis have names of their
    own for the others, because `experts` takes a mesh axis that `batch` and `embed` are spread over elsewhere.
    """

    batch: MeshAxes = ("slice", "data", "fsdp", "expert")
    """Activations: rows."""
    sequence: MeshAxes = None
    """Activations: tokens of a row."""
    act_embed: MeshAxes = None
    """Activations: residual stream."""
    act_heads: MeshAxes = "tensor"
    """Activations: attention heads."""
    act_mlp: MeshAxes = "tensor"
    """Activations: feed-forward width."""
    act_vocab: MeshAxes = "tensor"
    """Activations: logits."""
    expert_batch: MeshAxes = ("slice", "data", "fsdp")
    """Activations with an expert axis: rows."""

    vocab: MeshAxes = "tensor"
    """Weights: vocabulary."""
    embed: MeshAxes = ("fsdp", "expert")
    """Weights: residual stream."""
    heads: MeshAxes = "tensor"
    """Weights: query heads."""
    kv_heads: MeshAxes = "tensor"
    """Weights: key and value heads."""
    head_dim: MeshAxes = None
    """Weights: width of a head."""
    mlp: MeshAxes = "tensor"
    """Weights: feed-forward width."""
    norm: MeshAxes = None
    """Weights: norms, and biases on the residual stream."""
    router: MeshAxes = None
    """Weights: residual stream of the router."""
    experts: MeshAxes = "expert"
    """Weights: experts."""
    expert_embed: MeshAxes = "fsdp"
    """Weights of experts: residual stream."""
    expert_mlp: MeshAxes = "tensor"
    """Weights of experts: feed-forward width."""
    layers: MeshAxes = None
    """Weights: layers stacked for scanning."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = as_tuple(getattr(self, field.name))
            unknown = [axis for axis in axes if axis not in MESH_AXES]
            if unknown:
                raise ValueError(
                    f"rules.{field.name}={axes} names unknown mesh axes {unknown}; known: {', '.join(MESH_AXES)}"
                )
            if len(set(axes)) != len(axes):
                raise ValueError(f"rules.{field.name}={axes} uses a mesh axis twice")

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose axes have these logical names (None: replicated).

        Raises ValueError for an unknown name, or when two axes of the array land on one mesh axis.
        """
        entries: list[MeshAxes] = []
        used: dict[str, str] = {}
        for name in logical:
            if name is None:
                entries.append(None)
                continue
            if name not in self.__dataclass_fields__:
                raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(self.__dataclass_fields__)}")
            axes = getattr(self, name)
            for axis in as_tuple(axes):
                if axis in used:
                    raise ValueError(
                        f"logical axes {logical}: mesh axis '{axis}' is used by both '{used[axis]}' and '{name}'; "
                        f"change rules.{used[axis]} or rules.{name}"
                    )
                used[axis] = name
            entries.append(axes)
        return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that map logical axes onto it. Hashable: it may be a static argument of `jit`."""

    mesh: Mesh
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    def sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(*logical))

    def axes(self, logical: str) -> tuple[str, ...]:
        """Mesh axes of more than one device that a logical axis is spread over, major first."""
        return tuple(axis for axis in as_tuple(getattr(self.rules, logical)) if self.mesh.shape[axis] > 1)

    def size(self, logical: str) -> int:
        """Number of shards of a logical axis."""
        size = 1
        for axis in self.axes(logical):
            size *= self.mesh.shape[axis]
        return size

    def check(self, setting: str, length: int, logical: str) -> None:
        """Raises ValueError unless `length` (the value of `setting`) divides over the mesh axes of `logical`."""
        shards = self.size(logical)
        if length % shards:
            axes = self.axes(logical)
            named = " × ".join(f"'{axis}'={self.mesh.shape[axis]}" for axis in axes)
            settings = " × ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(
                f"{setting}={length} is not divisible by mesh axis {named}; "
                f"set {settings} to a divisor of {length}, or change {setting}"
            )


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def constrain(x: jax.Array, placement: Placement | None, *logical: str | None) -> jax.Array:
    """`x` held to the sharding of its logical axes; `x` itself without a placement. Differentiable."""
    if placement is None:
        return x
    assert x.ndim == len(logical), f"{x.ndim} axes named by {logical}"
    return jax.lax.with_sharding_constraint(x, placement.sharding(*logical))


def map_shards(fn: Callable, placement: Placement | None, inputs: tuple[object, ...], outputs: object) -> Callable:
    """`fn` run once per device on its shards, every mesh axis manual; `fn` itself without a placement.

    `inputs` has the logical axes of each positional argument (an argument may be None; one that is a tree has a tree of
    them), `outputs` those of the result, or a tuple of such for several results. A logical axis that maps to no mesh
    axis arrives whole.
    """
    if placement is None:
        return fn

    def mapped(*args):
        present = [i for i, arg in enumerate(args) if arg is not None]

        def body(*shards):
            whole = [None] * len(args)
            for i, shard in zip(present, shards, strict=True):
                whole[i] = shard
            return fn(*whole)

        specs = tuple(_specs(placement, inputs[i]) for i in present)
        several = isinstance(outputs, tuple) and outputs and isinstance(outputs[0], tuple)
        out = tuple(placement.rules.spec(*o) for o in outputs) if several else placement.rules.spec(*outputs)
        # check_vma=False: the bodies hold custom gradients and loops, whose replication JAX can't infer.
        sharded = jax.shard_map(body, mesh=placement.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return sharded(*(args[i] for i in present))

    return mapped


def _specs(placement: Placement, logical: object) -> object:
    """PartitionSpecs of a tree of logical axes, each a tuple."""
    return jax.tree.map(lambda names: placement.rules.spec(*names), logical, is_leaf=lambda n: isinstance(n, tuple))


def from_host_rows(rows: np.ndarray, placement: Placement, *logical: str | None) -> jax.Array:
    """Global array from each host's own rows of its first axis, in the order of hosts."""
    return jax.make_array_from_process_local_data(placement.sharding(*logical), rows)
