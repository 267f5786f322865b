"""Byte-level BPE: trained on a corpus, or loaded from a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

_NUM_BYTES = 256


class Tokenizer:
    """Text to token ids and back.

    Special tokens are never read out of text: a document that spells the end token encodes it as plain characters,
    and comes back unchanged.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_token: str) -> None:
        """Raises ValueError if `backend` has no `end_token`."""
        end_id = backend.token_to_id(end_token)
        if end_id is None:
            special = sorted(t.content for t in backend.get_added_tokens_decoder().values() if t.special)
            raise ValueError(
                f"the tokenizer has no token {end_token!r}; set data.end_token to the one that ends a document: "
                f"{', '.join(special) or 'it has no special tokens'}"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_token = end_token
        self.end_id = end_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the encoding."""
        settings = f"{self.end_token}\0{self._backend.to_str()}"
        return hashlib.blake2b(settings.encode("utf-8"), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """int32 [num_tokens], without end tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, over all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out. Bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json, whole or not at all."""
        write_atomically(path, self._backend.to_str(pretty=True).encode("utf-8"))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id would fall outside a model's embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has token ids up to {self.vocab_size - 1} and model.vocab_size={vocab_size}; "
                f"set model.vocab_size to at least {self.vocab_size}, or data.tokenizer to a smaller one"
            )


def load_tokenizer(path: Path, end_token: str) -> Tokenizer:
    """Tokenizer of a tokenizer.json. Raises ValueError if the file is missing, malformed or without `end_token`."""
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.tokenizer: {path} can't be read ({error})") from error
    _check_tokenizer_json(content, path)
    return Tokenizer(tokenizers.Tokenizer.from_str(content), end_token)


def _check_tokenizer_json(content: str, path: Path) -> None:
    """Raises ValueError for what is no tokenizer.json of a BPE model: the library has no error type to catch."""
    try:
        parsed: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"data.tokenizer: {path} is not JSON ({error})") from error
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"data.tokenizer: {path} is not a tokenizer.json: it has no model with a vocab")
    # Files from before the library wrote types carry merges and no type.
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        raise ValueError(
            f"data.tokenizer: {path} holds a {model.get('type', 'untyped')} model; BPE with merges is needed"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_token: str) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (a small corpus has fewer merges to give); same in, same out.

    The 256 bytes are all in it, so any text encodes, and decodes to itself. Words are split as GPT-2 splits them.
    Raises ValueError if `vocab_size` has no room for the bytes and the end token.
    """
    if vocab_size < _NUM_BYTES + 1:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small for byte-level BPE: "
            f"{_NUM_BYTES} bytes and {end_token} need {_NUM_BYTES + 1}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_token],
        # Sorted: the library returns a set's order, and ids follow it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, end_token)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is seen whole or not at all, also by another process writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
