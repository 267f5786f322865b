"""Small vocabularies and the GGUF files that hold them."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from serving.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

CORPUS = ["def f(x):\n    return x + 1  # größe 12\n", "the quick brown fox, the lazy dog; it's 1234\n"] * 20


def byte_level_vocabulary() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def write_gguf(path: Path, model: str, tokens, kinds, **keys) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, pre: str, **keys) -> Path:
    model = json.loads(byte_level_vocabulary().to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|end|>", "<tool>"]
    kinds = [NORMAL] * len(model["vocab"]) + [CONTROL, USER_DEFINED]
    merges = [" ".join(pair) for pair in model["merges"]]
    return write_gguf(path, "gpt2", tokens, kinds, merges=merges, pre=pre, eos_token_id=len(tokens) - 2, **keys)


def sentencepiece_vocabulary():
    pieces = [
        *"▁abcdehlortuwxyz.<>/",
        "▁h",
        "he",
        "ll",
        "▁he",
        "llo",
        "lo",
        "▁hello",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
    ]
    pieces += ["ab", "bc", "abc", "▁▁", "▁▁▁▁", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in np.random.default_rng(3).permutation(len(pieces))] + [0.0]
    return tokens, kinds, scores


def sentencepiece_gguf(path: Path, **keys) -> Path:
    tokens, kinds, scores = sentencepiece_vocabulary()
    keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | keys
    return write_gguf(path, "llama", tokens, kinds, scores=scores, **keys)
