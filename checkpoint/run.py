"""The newest checkpoint of a training run of ours, for another model layout, dtype or mesh."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from checkpoint.store import Checkpoint, CheckpointReader
from checkpoint.tree import SEPARATOR
from model.config import ModelConfig
from model.transformer import Convert, Definition, Tree

DIRECTORY = "checkpoints"

_log = logging.getLogger(__name__)

_LeafPath = tuple[str | int, ...]


def open_run(path: Path) -> tuple[CheckpointReader, Checkpoint]:
    """The newest complete checkpoint of the run in `path`. Raises ValueError if there is none."""
    reader = CheckpointReader(path / DIRECTORY, architecture=None, on_note=_log.warning)
    newest = reader.latest()
    if newest is None:
        raise ValueError(f"{path / DIRECTORY} holds no complete checkpoint; train the run until its first one")
    return reader, newest


def read_run_config(path: Path) -> ModelConfig:
    """Architecture of a run. Raises ValueError for one that this code does not know."""
    return _config_of(open_run(path)[1])


def _config_of(checkpoint: Checkpoint) -> ModelConfig:
    """`architecture` has what the arrays depend on; the rest, such as the longest sequence, is in the run's config."""
    manifest = checkpoint.manifest
    body = _merge(manifest.run_config.get("model") or {}, manifest.architecture.get("model") or {})
    try:
        return _build(ModelConfig, body, "model")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: the architecture of this checkpoint cannot be read: {error}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _build(kind: type, body: Mapping[str, Any], where: str) -> Any:
    """A dataclass from JSON: nested ones and tuples as its annotations say."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(body.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where} has the unknown fields {', '.join(unknown)}: another version of the code wrote it")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in body.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    nested = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
    if nested is not None and value is not None:
        return _build(nested, value, where)
    return tuple(value) if isinstance(value, list) else value


def load_run(
    path: Path, definition: Definition, shardings: tuple[Tree, Tree], convert: Convert | None = None
) -> tuple[Tree, Tree]:
    """(params, biases) of `definition` from the newest checkpoint, whose layers may be stacked otherwise.

    Each leaf comes from the disk onto its shards, and is converted there. Where layers were stacked and are not any
    more, or the other way round, devices hold one stacked leaf besides. `convert` is given the parameters when all of
    them are there.
    """
    params, biases = _load(path, definition, shardings)
    if convert is None:
        return params, biases
    flat = traverse_util.flatten_dict(params)
    # Each one's wide form goes before the next one's narrow form is made.
    del params
    return traverse_util.unflatten_dict({key: convert(key, flat.pop(key)) for key in list(flat)}), biases


def _load(path: Path, definition: Definition, shardings: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    reader, checkpoint = open_run(path)
    saved = Definition(_config_of(checkpoint), scan=checkpoint.manifest.architecture["scan"])
    if saved.scan == definition.scan:
        return _load_same(reader, checkpoint.step, definition, shardings)
    trees = []
    for prefix, target, source, placed in zip(
        ("params", "biases"), definition.abstract, saved.abstract, shardings, strict=True
    ):
        restack = _Restack(reader, checkpoint.step, prefix, saved, definition)
        flat = restack.load(*(traverse_util.flatten_dict(tree) for tree in (target, source, placed)))
        trees.append(traverse_util.unflatten_dict(flat))
    return trees[0], trees[1]


def _load_same(reader: CheckpointReader, step: int, definition: Definition, shardings: tuple[Tree, Tree]):
    trees = []
    for prefix, abstract, placed in zip(("params", "biases"), definition.abstract, shardings, strict=True):
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
        trees.append(reader.restore_subtree(prefix, wanted, step=step, cast=True)[0] if wanted else {})
    return trees[0], trees[1]


@dataclasses.dataclass(frozen=True)
class _Restack:
    """Leaves of one tree of a checkpoint for a definition that stacks its layers otherwise."""

    reader: CheckpointReader
    step: int
    prefix: str
    saved: Definition
    wanted: Definition

    def load(self, target: dict, source: dict, placed: dict) -> dict[_LeafPath, jax.Array]:
        """Flat trees: abstract leaves wanted, abstract leaves saved, shardings wanted."""
        homes = {key: path for path in target for key in _elements(self.wanted, path)}
        rows: dict[_LeafPath, dict[Any, jax.Array]] = {path: {} for path in target}
        out: dict[_LeafPath, jax.Array] = {}
        for path, leaf in source.items():
            keys = list(_elements(self.saved, path))
            for key, row in zip(keys, self._rows(path, leaf, target, placed, homes, keys), strict=True):
                home = homes[key]
                rows[home][key] = row
                wanted = list(_elements(self.wanted, home))
                if len(rows[home]) == len(wanted):
                    ready = rows.pop(home)
                    out[home] = _join([ready[key] for key in wanted], home[0] == "blocks", placed[home])
        assert not rows, f"leaves without a source: {list(rows)}"
        return {path: out[path] for path in target}

    def _rows(self, path, leaf, target, placed, homes, keys) -> list[jax.Array]:
        """The leaf at `path` of the checkpoint, one array per layer, each where its new home is."""
        home = homes[keys[0]]
        row = _row_sharding(placed[home], stacked=home[0] == "blocks")
        stacked = path[0] == "blocks"
        sharding = _stacked_sharding(row) if stacked else row
        name = SEPARATOR.join(map(str, (self.prefix, *path)))
        abstract = jax.ShapeDtypeStruct(leaf.shape, target[home].dtype, sharding=sharding)
        array, _ = self.reader.restore_subtree(name, abstract, step=self.step, cast=True)
        if not stacked:
            return [array]
        return [
            jax.device_put(array[index], _row_sharding(placed[homes[key]], False)) for index, key in enumerate(keys)
        ]


def _elements(definition: Definition, path: _LeafPath) -> list[tuple[int | None, tuple]]:
    """(layer, path within it) of each array that the leaf at `path` holds; layer None for those outside the layers."""
    if path[0] not in ("prefix", "blocks", "suffix"):
        return [(None, path)]
    return [(layer, path[2:]) for layer in definition.layers_at(path)]


def _join(rows: list[jax.Array], stack: bool, sharding: Sharding) -> jax.Array:
    return jax.device_put(jnp.stack(rows) if stack else rows[0], sharding)


def _row_sharding(sharding: Sharding, stacked: bool) -> Sharding:
    """Sharding of one layer of a stacked leaf."""
    if not stacked or isinstance(sharding, SingleDeviceSharding):
        return sharding
    _require_named(sharding)
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


def _stacked_sharding(row: Sharding) -> Sharding:
    if isinstance(row, SingleDeviceSharding):
        return row
    _require_named(row)
    return NamedSharding(row.mesh, PartitionSpec(None, *row.spec), memory_kind=row.memory_kind)


def _require_named(sharding: Sharding) -> None:
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"a checkpoint is restacked onto a NamedSharding or one device, not onto {sharding}")
