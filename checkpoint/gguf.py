"""GGUF files: metadata, and tensors that are dequantised block by block as they are read."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from checkpoint.stream import Tensor, load_tensors
from model.config import ModelConfig
from model.families.gguf import ROPE_FACTORS, interleaved_rotation, parse_metadata
from model.families.names import gguf_names
from model.transformer import Convert, Definition, Tree

_VERSIONS = (2, 3)
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTISED = (
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q6_K,
)
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMENSIONS = 4


class _Cursor:
    """Reads little-endian values one after the other. Raises struct.error past the end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        # The size is checked before the format is built: a corrupt count may be anything.
        size = struct.calcsize(f"<{code}") * count
        if size > len(self.data) - self.at:
            raise struct.error(f"{size} bytes are needed at offset {self.at}, and the file ends")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return values

    def one(self, code: str) -> Any:
        return self.values(code)[0]

    def string(self) -> str:
        size = self.one("Q")
        if size > len(self.data) - self.at:
            raise struct.error(f"a string of {size} bytes at offset {self.at} goes beyond the end")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self) -> Any:
        kind = GGUFValueType(self.one("I"))
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.one(_SCALARS[kind])
        kind, count = GGUFValueType(self.one("I")), self.one("Q")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return list(self.values(_SCALARS[kind], count))


class GGUFFile:
    """A GGUF file: `metadata` by key (lists for arrays), `tensors` with shapes in NumPy's order, mapped, not read.

    The header is parsed here and not by gguf.GGUFReader, which makes NumPy arrays of every token and merge: 2.1 s for
    the 49,152 tokens of SmolLM2, against 0.06 s (one CPU core). Raises ValueError that names the file, and the tensor
    if it is one's, for a header that cannot be read and for data beyond the end of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._kinds: dict[str, GGMLQuantizationType] = {}
        self._offsets: dict[str, int] = {}
        try:
            with open(self.path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be opened as a GGUF file: {error}") from error
        try:
            self._parse(_Cursor(self._data))
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"{self.path} has a damaged GGUF header: {error}") from error
        for name in self.tensors:
            self._check_extent(name)

    def _parse(self, cursor: _Cursor) -> None:
        magic, version = cursor.values("I", 2)
        if magic != GGUF_MAGIC:
            raise ValueError(f"{self.path} is no GGUF file: it begins with {bytes(self._data[:4])!r}, not b'GGUF'")
        if version not in _VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version} (or big-endian); supported: {_VERSIONS}")
        num_tensors, num_values = cursor.values("Q", 2)
        for _ in range(num_values):
            key = cursor.string()
            try:
                self.metadata[key] = cursor.value()
            except ValueError as error:
                raise ValueError(f"{self.path}: metadata {key} cannot be read: {error}") from error
        for _ in range(num_tensors):
            self._parse_tensor(cursor)
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path}: general.alignment={alignment!r} must be at least 1")
        start = -(-cursor.at // alignment) * alignment
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}

    def _parse_tensor(self, cursor: _Cursor) -> None:
        name = cursor.string()
        num_dimensions = cursor.one("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(
                f"{self.path}: damaged header: {name} has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}"
            )
        shape = cursor.values("Q", num_dimensions)[::-1]
        number, offset = cursor.one("I"), cursor.one("Q")
        if name in self.tensors:
            raise ValueError(f"{self.path}: {name} is there twice")
        supported = [kind.name for kind in (*_PLAIN, *_QUANTISED)]
        known = {kind.value: kind for kind in GGMLQuantizationType}
        kind = known.get(number)
        problem = None
        if kind not in _PLAIN and kind not in _QUANTISED:
            called = f"{number}" if kind is None else kind.name
            problem = f"type {called} is not supported; supported: {', '.join(supported)}"
        elif shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{self.path}: {name} has rows of {shape[-1]}, no multiple of {kind.name}'s block")
        self.tensors[name] = Tensor(self.path, shape, f"{number}" if kind is None else kind.name, problem)
        self._kinds[name], self._offsets[name] = kind, offset

    def _row_bytes(self, name: str, width: int) -> int:
        block, size = GGML_QUANT_SIZES[self._kinds[name]]
        return width // block * size

    def _check_extent(self, name: str) -> None:
        tensor = self.tensors[name]
        if tensor.problem is not None:
            return
        size = int(np.prod(tensor.shape[:-1], dtype=object)) * self._row_bytes(name, tensor.shape[-1])
        end = self._offsets[name] + size
        if end > len(self._data):
            raise ValueError(
                f"{self.path}: {name} ends at byte {end}, and the file has {len(self._data)}: truncated or corrupt"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Elements of a tensor: F32, F16 and BF16 as they are, quantised ones as float32."""
        tensor, kind = self.tensors[name], self._kinds[name]
        assert tensor.problem is None, tensor.problem
        rows = (*tensor.shape[:-1], self._row_bytes(name, tensor.shape[-1]))
        raw = np.frombuffer(self._data, np.uint8, int(np.prod(rows)), self._offsets[name]).reshape(rows)
        if kind in _PLAIN:
            return raw.view(_PLAIN[kind])[index]
        block, size = GGML_QUANT_SIZES[kind]
        columns = index[-1]
        first, last = columns.start // block, -(-columns.stop // block)
        packed = raw[(*index[:-1], slice(first * size, last * size))]
        values = quants.dequantize(packed, kind)
        return values[..., columns.start - first * block : columns.stop - first * block]

    def read_all(self, name: str) -> np.ndarray:
        return self.read(name, tuple(slice(0, size) for size in self.tensors[name].shape))


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Architecture of a GGUF file. Raises ValueError, naming file and key, for what we do not compute."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    try:
        return parse_metadata(file.metadata, shapes, file.read_all)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def load_gguf(
    path: Path, definition: Definition, shardings: tuple[Tree, Tree], convert: Convert | None = None
) -> tuple[Tree, Tree]:
    """(params, biases) of `definition` from a GGUF file; see `load_tensors`."""
    file = GGUFFile(path)
    interleaved = interleaved_rotation(file.metadata["general.architecture"])
    names = gguf_names(definition.config, interleaved=interleaved)
    return load_tensors(file, names, definition, shardings, ignored=[ROPE_FACTORS], convert=convert)
