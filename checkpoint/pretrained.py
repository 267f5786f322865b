"""A trained model on disk, whatever its format: its architecture, and its weights on their devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from checkpoint.gguf import GGUFFile, load_gguf, read_gguf_config
from checkpoint.huggingface import CONFIG_FILE, load_huggingface, read_config
from checkpoint.run import DIRECTORY, load_run, read_run_config
from model.config import ModelConfig
from model.families.huggingface import computed_fields
from model.transformer import Convert, Definition, Tree

Kind = Literal["huggingface", "gguf", "run"]

PACKAGE = "package:"

_LOADERS: dict[Kind, Callable[[Path, Definition, tuple[Tree, Tree], Convert | None], tuple[Tree, Tree]]] = {
    "huggingface": load_huggingface,
    "gguf": load_gguf,
    "run": load_run,
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was found and described, and not read yet.

    `path` is a Hugging Face folder, a GGUF file, or the folder of a run of ours.
    """

    path: Path
    kind: Kind
    config: ModelConfig

    def load(
        self, definition: Definition, shardings: tuple[Tree, Tree], convert: Convert | None = None
    ) -> tuple[Tree, Tree]:
        """(params, biases) of `definition`, which may stack layers and choose the dtype of parameters freely.

        `shardings`: trees of jax.sharding.Sharding with the structure of `definition.abstract`. Host memory stays at
        a few shards of single leaves. What `convert` makes of each parameter takes its place, as soon as it is read; of
        a run of ours, when all are. Raises ValueError for a definition of another model, and for files that are damaged
        or do not fit, with their names and those of the tensors; CheckpointError for a torn run of ours.
        """
        ours, theirs = computed_fields(self.config), computed_fields(definition.config)
        # Fewer or more positions than a model was made for are for the caller to judge.
        different = [name for name in ours if ours[name] != theirs[name] and name != "max_positions"]
        if different:
            given = ", ".join(f"{name}={theirs[name]}" for name in different)
            raise ValueError(f"{self.path} holds another model than the one with {given}; take its `config`")
        return _LOADERS[self.kind](self.path, definition, shardings, convert)


def open_pretrained(source: str | os.PathLike[str]) -> Pretrained:
    """Finds a model and reads its architecture.

    `source`: a folder with config.json, a file *.gguf, the folder of a run of ours (with checkpoints/), or
    "package:NAME" for the one GGUF file inside the installed package NAME, which is not imported.
    Raises ValueError that says what was looked for, and for an architecture that is not supported.
    """
    text = os.fspath(source)
    path = _file_of_package(text.removeprefix(PACKAGE)) if text.startswith(PACKAGE) else Path(text)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return Pretrained(path, "gguf", read_gguf_config(GGUFFile(path)))
    if (path / CONFIG_FILE).is_file():
        return Pretrained(path, "huggingface", read_config(path))
    if (path / DIRECTORY).is_dir():
        return Pretrained(path, "run", read_run_config(path))
    what = "does not exist" if not path.exists() else "is a folder without them" if path.is_dir() else "is another file"
    raise ValueError(
        f"no model at {text!r}, which {what}; looked for a folder with {CONFIG_FILE} (Hugging Face), "
        f"a file named *.gguf, a folder with {DIRECTORY}/ (a run), or {PACKAGE}NAME"
    )


def _file_of_package(name: str) -> Path:
    """The GGUF file in an installed top-level package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PACKAGE}{name}: no package {name!r} is installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{PACKAGE}{name}: one *.gguf is looked for in {folders[0]}, and {len(files)} are there")
    return files[0]
