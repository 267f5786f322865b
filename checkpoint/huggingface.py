"""Folders of Hugging Face models: config.json and safetensors, in and out."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoint.stream import Tensor, load_tensors, to_file
from model.config import ModelConfig
from model.families.huggingface import (
    OTHER_PARTS,
    WRAPPED_ROOTS,
    Family,
    family_of,
    is_wrapped,
    parse_config,
    render_config,
)
from model.families.names import Piece, huggingface_names, pieces
from model.precision import Float
from model.transformer import Convert, Definition, Tree

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_log = logging.getLogger(__name__)

_DTYPES = ("F32", "F16", "BF16")
# Buffers that old files hold and that follow from the config.
_BUFFERS = (".rotary_emb.inv_freq",)


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Architecture of the model in `folder`, from its config.json.

    Raises ValueError for a file that is missing or no JSON, and for a model_type or a value that we do not compute.
    """
    return _within(Path(folder), parse_config)


def _within(folder: Path, read: Any) -> Any:
    """`read` of config.json's body; its errors say which file."""
    path = folder / CONFIG_FILE
    body = read_json(path)
    try:
        return read(body)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is unreadable: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} holds a {type(body).__name__}, and an object is required")
    return body


class SafetensorsFolder:
    """The tensors of a folder: model.safetensors, or the files that its index lists. Opened, not read."""

    def __init__(self, path: Path):
        self.path = path
        self._files = {name: _open(path / name) for name in self._listed()}
        self._slices: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        for file_name, file in self._files.items():
            names = file.keys()
            for name in names:
                self._add(name, path / file_name, file.get_slice(name))

    def _add(self, name: str, file: Path, part: Any) -> None:
        if name in self.tensors:
            raise ValueError(f"{file}: {name} is in {self.tensors[name].file} too")
        dtype = str(part.get_dtype())
        problem = None if dtype in _DTYPES else f"type {dtype} is not supported; supported: {', '.join(_DTYPES)}"
        self._slices[name] = part
        self.tensors[name] = Tensor(file, tuple(part.get_shape()), dtype, problem)

    def _listed(self) -> list[str]:
        if (self.path / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        index = self.path / INDEX_FILE
        if not index.is_file():
            raise ValueError(f"{self.path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; only safetensors are read")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: weight_map must give the file of each tensor")
        files = sorted(set(places.values()))
        for name in files:
            if Path(name).name != name or not (self.path / name).is_file():
                raise ValueError(f"{index} lists the file {name!r}, which is not in the folder")
        return files

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._slices[name][index]
        except SafetensorError as error:
            raise ValueError(f"{self.tensors[name].file}: {name} cannot be read: {error}") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def load_huggingface(
    folder: Path, definition: Definition, shardings: tuple[Tree, Tree], convert: Convert | None = None
) -> tuple[Tree, Tree]:
    """(params, biases) of `definition` from the safetensors in `folder`; see `load_tensors`."""
    family: Family = _within(folder, family_of)
    source = SafetensorsFolder(folder)
    ignored = [name for name in source.tensors if name.endswith(_BUFFERS)]
    if definition.config.tie_embeddings and "lm_head.weight" in source.tensors:
        _check_tied(source)
        ignored.append("lm_head.weight")
    roots = ("model.",)
    if _within(folder, is_wrapped):
        roots, others = WRAPPED_ROOTS, [name for name in source.tensors if name.startswith(OTHER_PARTS)]
        _log.warning("%s: %d tensors for other things than text are left out", folder, len(others))
        ignored += others
    names = huggingface_names(definition.config, interleaved=family.interleaved, roots=roots)
    return load_tensors(source, names, definition, shardings, ignored=ignored, convert=convert)


def _check_tied(source: SafetensorsFolder, rows: int = 1024) -> None:
    """Raises ValueError unless the head that a file holds besides its tied embedding is equal to it."""
    head, table = (source.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if table is None or len(table.shape) != 2:
        return  # To be named with all that is missing or misshapen.
    same = head.shape == table.shape
    for start in range(0, table.shape[0] if same else 0, rows):
        part = (slice(start, min(start + rows, table.shape[0])), slice(0, table.shape[1]))
        names = ("lm_head.weight", "model.embed_tokens.weight")
        left, right = (source.read(name, part).astype(np.float32) for name in names)
        same = same and np.array_equal(left, right)
    if not same:
        raise ValueError(
            f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, and {CONFIG_FILE} ties them; "
            "set tie_word_embeddings to false there"
        )


@dataclasses.dataclass(frozen=True)
class _Export:
    """A tensor to be written: its name, its piece of a leaf, and its size in bytes."""

    name: str
    leaf: jax.Array
    piece: Piece
    dtype: Any
    size: int

    def value(self) -> np.ndarray:
        ours = np.asarray(self.leaf[self.piece.prefix] if self.piece.prefix else self.leaf).astype(self.dtype)
        return np.ascontiguousarray(to_file(self.piece.stored, ours).reshape(self.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        spelling = next(each for each in self.piece.stored.spellings if each.name == self.name)
        return (*spelling.lead, *self.piece.stored.shape(self.leaf.shape[len(self.piece.prefix) :]))


def save_huggingface(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Tree,
    biases: Tree,
    *,
    dtype: Float = "bfloat16",
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes a model, its layers stacked or not, as a folder that `transformers` loads.

    One file if it fits into `max_shard_bytes`, else several with an index; host memory holds one of them. Balancing
    biases stay float32. The folder must not hold a model already; config.json comes last, so that a write cut short
    leaves no folder that passes for a model. Raises ValueError for an architecture that no model_type can hold, and
    for parameters that are not of `config`. All arrays must be addressable from this process.
    """
    folder = Path(folder)
    family, body = render_config(config)
    exports = list(_exports(config, params, biases, family, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in folder.iterdir() if path.name == CONFIG_FILE or path.suffix == ".safetensors"]
    if taken:
        raise ValueError(f"{folder} already holds {', '.join(sorted(taken))}; name another folder")
    files = _shards(exports, max_shard_bytes)
    for name, part in files.items():
        save_file({export.name: export.value() for export in part}, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        places = {export.name: name for name, part in files.items() for export in part}
        total = sum(export.size for export in exports)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(folder / CONFIG_FILE, {**body, "torch_dtype": dtype})


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _exports(config: ModelConfig, params: Tree, biases: Tree, family: Family, dtype: Float) -> Iterator[_Export]:
    """Every tensor of the model, in the order of its layers where the layers are apart."""
    definition = _definition_of(config, params, biases)
    names = huggingface_names(config, interleaved=family.interleaved)
    for tree, kind in ((params, jnp.dtype(dtype)), (biases, jnp.dtype("float32"))):
        for path, leaf in traverse_util.flatten_dict(tree).items():
            for piece in pieces(definition, path, names):
                spellings = [each.name for each in piece.stored.spellings]
                name = next((each for each in spellings if family.spelling and family.spelling in each), spellings[0])
                size = int(np.prod(leaf.shape[len(piece.prefix) :])) * kind.itemsize
                yield _Export(name, leaf, piece, kind, size)


def _definition_of(config: ModelConfig, params: Tree, biases: Tree) -> Definition:
    """The definition, of stacked or separate layers, that these trees belong to."""
    shapes = functools.partial(jax.tree.map, lambda leaf: tuple(leaf.shape))
    given = [traverse_util.flatten_dict(shapes(tree)) for tree in (params, biases)]
    for scan in (False, True):
        definition = Definition(config, scan=scan)
        if [traverse_util.flatten_dict(shapes(tree)) for tree in definition.abstract] == given:
            return definition
    raise ValueError("params and biases are not those of this config, neither with stacked layers nor without")


def _shards(exports: list[_Export], limit: int) -> dict[str, list[_Export]]:
    """Files and what goes into them, none above `limit` bytes unless a single tensor is."""
    parts: list[list[_Export]] = [[]]
    size = 0
    for export in exports:
        if parts[-1] and size + export.size > limit:
            parts.append([])
            size = 0
        parts[-1].append(export)
        size += export.size
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}
