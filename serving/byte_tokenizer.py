"""The tokenizer of a model without files."""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from serving.tokenizer import Tokenizer


def byte_tokenizer(vocab_size: int = 256) -> Tokenizer:
    """One token for each byte in some order, and no end token: a model of random weights ends by length.

    Text is encoded by these alone. What such a model says comes from all of its vocabulary, so the tokens past 256 have
    text too, of two bytes and more: a stream then has something to show for each token, as it has of a real model.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = itertools.chain.from_iterable(itertools.product(letters, repeat=length) for length in itertools.count(1))
    vocab = {"".join(text): index for index, text in enumerate(itertools.islice(texts, max(vocab_size, 256)))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend.to_str(), end_ids=())
