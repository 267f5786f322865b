"""The tokenizer of a model without files."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from serving.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """256 tokens, one for each byte in some order, and no end token: a model of random weights ends by length."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend.to_str(), end_ids=())
