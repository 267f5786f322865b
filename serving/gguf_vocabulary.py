"""The vocabulary of a GGUF file, as the tokenizer.json that the `tokenizers` library reads."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Value types of GGUF metadata, by their number in the file (ggml's docs/gguf.md).
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9

# Kinds of token in tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """Word pattern of the GPT-4 kind; `digits` matches one group of digits."""
    return (
        rf"{_ANY_CASE_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DIGIT_BY_DIGIT = (r"\p{N}", _GPT2)
_LLAMA3 = (_cl100k(r"\p{N}{1,3}"),)
_QWEN2 = (_cl100k(r"\p{N}"),)

# How text is cut into words, by tokenizer.ggml.pre: each pattern's matches, and what lies between them, are cut apart
# in turn. The names are those that llama.cpp's converter writes, the patterns those of the models' own tokenizers.
WORD_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
    "refact": _DIGIT_BY_DIGIT,
    "command-r": _DIGIT_BY_DIGIT,
    "exaone": _DIGIT_BY_DIGIT,
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
}
# Tokenizers that look a word up before they merge, put a begin token first if the file doesn't say, or normalise.
_WHOLE_WORDS_FIRST = _BEGIN_BY_DEFAULT = ("llama-bpe",)
_COMPOSED = ("qwen2",)

# Control tokens that end a turn or a document whatever the file's own keys say: older files name one end token only.
_END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The key-value pairs of a GGUF file; arrays as lists.

    Read here and not through gguf.GGUFReader, which makes an array of each string: 1.6 s for SmolLM2's vocabulary of
    49,152, where this takes 0.04 s. Raises ValueError if the file can't be read, is cut short or is no GGUF.
    """
    try:
        with open(path, "rb") as file, contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            return _Reader(data).metadata()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as GGUF: {error}") from error


class _Reader:
    """Walks the metadata at the start of a GGUF file. Raises ValueError for what can't be there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 or 3 (little-endian) is needed")
        self._number("<Q")  # count of tensors
        pairs = {}
        for _ in range(self._number("<Q")):
            key = self._string()
            pairs[key] = self._value(self._number("<I"), key)
        return pairs

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("<I"), self._number("<Q")
            if kind == _STRING:
                return [self._string() for _ in range(count)]
            return self._scalars(kind, count, key)
        return self._scalars(kind, 1, key)[0]

    def _scalars(self, kind: int, count: int, key: str) -> list:
        if kind not in _SCALARS:
            raise ValueError(f"{key} has a value of unknown type {kind}")
        return np.frombuffer(self._take(count * _SCALARS[kind].itemsize), _SCALARS[kind]).tolist()

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8")

    def _number(self, layout: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ValueError(f"it ends within its metadata, {size} bytes wanted at {self._at} of {len(self._data)}")
        self._at += size
        return self._data[self._at - size : self._at]


class GgufVocabulary:
    """The keys tokenizer.* of a GGUF file, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the key, for one that is missing, of a wrong kind or not supported."""
        self._metadata = metadata
        self.model = self._get("model", str)
        if self.model not in ("gpt2", "llama"):
            raise ValueError(
                f"tokenizer.ggml.model={self.model!r} is not supported; 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece BPE) are"
            )
        self.tokens = [text or f"[empty {i}]" for i, text in enumerate(self._get("tokens", list))]
        self.kinds = self._get("token_type", list, [NORMAL] * len(self.tokens))
        if len(self.kinds) != len(self.tokens):
            raise ValueError(f"tokenizer.ggml.token_type has {len(self.kinds)} items for {len(self.tokens)} tokens")
        self._ids = {text: i for i, text in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if self._ids[text] != i)
            raise ValueError(f"tokenizer.ggml.tokens holds {twice!r} more than once")
        # Files from before the key existed say nothing; llama.cpp cuts their words in its "default" way too.
        self.pre = self._get("pre", str, "default") if self.model == "gpt2" else ""

    @property
    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ValueError("tokenizer.chat_template is not a string")
        return template

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a document, a turn or a message, the file's own end token first."""
        named = (self.token_id(key) for key in ("eos", "eot", "eom"))
        known = (self._ids.get(text) for text in _END_TOKENS)
        known = (i for i in known if i is not None and self.kinds[i] == CONTROL)
        return tuple(dict.fromkeys(i for i in (*named, *known) if i is not None))

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens, under the names that chat templates use."""
        keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self.token_id(key) for name, key in keys.items()}
        return {name: self.tokens[i] for name, i in ids.items() if i is not None}

    def token_id(self, name: str) -> int | None:
        """Id under tokenizer.ggml.<name>_token_id; None without the key."""
        i = self._get(f"{name}_token_id", int, None)
        if i is not None and not 0 <= i < len(self.tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id={i} is no id of the {len(self.tokens)} tokens")
        return i

    def tokenizer_json(self) -> dict[str, Any]:
        """Content of the tokenizer.json that encodes and decodes as this vocabulary does."""
        parts = self._byte_level() if self.model == "gpt2" else self._sentencepiece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": self.tokens[i], "special": kind != USER_DEFINED, "normalized": False}
                | {"single_word": False, "lstrip": False, "rstrip": False}
                for i, kind in enumerate(self.kinds)
                if kind in (UNKNOWN, CONTROL, USER_DEFINED)
            ],
            "post_processor": self._post_processor(),
            **parts,
        }

    def _byte_level(self) -> dict[str, Any]:
        if self.pre not in WORD_PATTERNS:
            raise ValueError(
                f"tokenizer.ggml.pre={self.pre!r} is not supported; these are: {', '.join(sorted(WORD_PATTERNS))}"
            )
        merges = [merge.split(" ") for merge in self._get("merges", list)]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in WORD_PATTERNS[self.pre]
        ]
        return {
            "normalizer": {"type": "NFC"} if self.pre in _COMPOSED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "decoder": byte_level,
            "model": self._bpe(merges, ignore_merges=self.pre in _WHOLE_WORDS_FIRST),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
        decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if self._get("add_space_prefix", bool, True):
            spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.token_id("unknown")
        return {
            "normalizer": {"type": "Sequence", "normalizers": spaces},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._bpe(self._merges_of_scores(), byte_fallback=True, fuse_unk=True)
            | {"unk_token": None if unknown is None else self.tokens[unknown]},
        }

    def _bpe(self, merges: Sequence[Sequence[str]], **settings: bool) -> dict[str, Any]:
        return {"type": "BPE", "vocab": self._ids, "merges": merges, **settings}

    def _merges_of_scores(self) -> list[tuple[str, str]]:
        """SentencePiece merges the neighbours whose joined token scores highest: BPE, ranked by falling score."""
        scores = self._get("scores", list)
        if len(scores) != len(self.tokens):
            raise ValueError(f"tokenizer.ggml.scores has {len(scores)} items for {len(self.tokens)} tokens")
        merged = [i for i, kind in enumerate(self.kinds) if kind in (NORMAL, USER_DEFINED, UNUSED)]
        merged.sort(key=lambda i: -scores[i])
        return [
            (text[:cut], text[cut:])
            for text in (self.tokens[i] for i in merged)
            for cut in range(1, len(text))
            if text[:cut] in self._ids and text[cut:] in self._ids
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        """Puts the begin and end tokens around a text, where the file asks for them."""
        by_default = self.model == "llama" or self.pre in _BEGIN_BY_DEFAULT
        begin = self._framing("bos", by_default)
        end = self._framing("eos", False)
        if not begin and not end:
            return None
        special = [{"SpecialToken": {"id": text, "type_id": 0}} for text in (*begin, *end)]
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "single": [*special[: len(begin)], sequence, *special[len(begin) :]],
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                text: {"id": text, "ids": [self._ids[text]], "tokens": [text]} for text in (*begin, *end)
            },
        }

    def _framing(self, name: str, by_default: bool) -> tuple[str, ...]:
        i = self.token_id(name)
        if not self._get(f"add_{name}_token", bool, by_default and i is not None):
            return ()
        if i is None:
            raise ValueError(f"tokenizer.ggml.add_{name}_token is set, and tokenizer.ggml.{name}_token_id is missing")
        return (self.tokens[i],)

    def _get(self, name: str, kind: type, *default: Any) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in self._metadata:
            if default:
                return default[0]
            raise ValueError(f"it has no {key}")
        value = self._metadata[key]
        if not isinstance(value, kind):
            raise ValueError(f"{key} is {type(value).__name__}, {kind.__name__} is needed")
        return value
