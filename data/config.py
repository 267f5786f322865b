"""What a run reads and how it is cut into rows, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "random"]
Packing = Literal["best_fit", "concatenate"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer, packing and order of a training run.

    The vocabulary's size is the model's (`model.vocab_size`), and reaches `data.prepare` as an argument.
    """

    source: SourceKind = "stdlib"
    """What is read: the Python standard library of this machine, text files (a document each), JSON lines, Parquet,
    or random tokens (for benchmarks: no text, no tokenizer, no held-out split)."""
    paths: tuple[str, ...] = ()
    """Files, folders (searched through for *.txt, *.jsonl or *.parquet) or globs (** spans folders)."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds a document's text."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; None trains a byte-level BPE of the model's vocabulary size on the training split."""
    tokenizer_bytes: int = 64 * 1024 * 1024
    """UTF-8 bytes of training documents, from the first on, that a new tokenizer is trained on at most."""
    end_token: str = "<|end|>"
    """Token that begins and ends every document; a tokenizer.json must have it (Llama 3: <|end_of_text|>)."""
    sequence_length: int = 2048
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a step's batch, over all hosts."""
    heldout_fraction: float = 0.05
    """Share of documents kept for evaluation, chosen by a hash of their text; 0 for none."""
    packing: Packing = "best_fit"
    """best_fit: documents whole where they fit, little padding. concatenate: cut wherever a row ends, no padding."""
    seed: int = 0
    """Order of the rows (and the tokens of the random source)."""
    epochs: int | None = None
    """Passes over the training rows before the loader ends; None never ends."""
    prefetch: int = 4
    """Batches made ahead of the step, in a background thread."""

    def __post_init__(self) -> None:
        check_data(self)


def check_data(config: DataConfig) -> None:
    """Raises ValueError for a setting that no run can have, naming it."""
    for name in ("sequence_length", "batch_size", "prefetch", "tokenizer_bytes"):
        if getattr(config, name) < 1:
            raise ValueError(f"data.{name}={getattr(config, name)} must be at least 1")
    if config.epochs is not None and config.epochs < 1:
        raise ValueError(f"data.epochs={config.epochs} must be at least 1, or None to repeat without end")
    if not 0 <= config.heldout_fraction < 1:
        raise ValueError(f"data.heldout_fraction={config.heldout_fraction} must be at least 0 and below 1")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"data.seed={config.seed} must be between 0 and 2**32 - 1")
    if not config.end_token or not config.text_field:
        raise ValueError(
            f"data.end_token={config.end_token!r} and data.text_field={config.text_field!r} must not be empty"
        )
    reads_paths = config.source in ("text", "jsonl", "parquet")
    if reads_paths and not config.paths:
        raise ValueError(f"data.source={config.source!r} needs files; set data.paths")
    if not reads_paths and config.paths:
        raise ValueError(
            f"data.paths={config.paths} is not read by data.source={config.source!r}; "
            "set data.source to text, jsonl or parquet, or leave data.paths empty"
        )
    if config.source == "random" and config.tokenizer is not None:
        raise ValueError(f"data.tokenizer={config.tokenizer!r} is not used by data.source='random'; leave it None")
