"""Text to token ids and back, as the model's own files say."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from serving.gguf_vocabulary import GgufVocabulary, read_metadata

# Put in front of a text to learn how it is cut where it does not begin: characters that merge with few others.
_MARKS = ("\n", "\x02")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Token ids of a text, and the exact bytes of every token.

    Text is what the bytes of its tokens say, special tokens left out. Bytes that are no UTF-8 become U+FFFD, one for
    each longest piece that begins like a character, as Python and the WHATWG decode. (Hugging Face's byte-fallback
    decoder gives one per byte, and spoils the good characters around a bad one.) Spaces are left as they are, whatever
    clean_up_tokenization_spaces says.
    """

    def __init__(
        self,
        content: str | bytes,
        *,
        end_ids: Sequence[int] = (),
        begin_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`content` is that of a tokenizer.json. `begin_id` goes in front of texts in addition to what its own
        post-processor adds. Raises ValueError if `content` is malformed, or has a decoder whose bytes are not known.
        """
        self._backend = _backend(content)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = self._backend.get_added_tokens_decoder()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.chat_template = chat_template
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens))
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self._begin = () if begin_id is None else (begin_id,)
        for i in (*self.end_ids, *self._begin):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"the end or begin token {i} is no id of the tokenizer's {self.vocab_size} tokens")
        self._spelling = _Spelling(json.loads(content)["decoder"])

    @property
    def strips_first_space(self) -> bool:
        """A text's first token carries a space that is not the text's (SentencePiece)."""
        return self._spelling.strips_first_space

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; special tokens spelled in it are read as such.

        `special` adds what the tokenizer puts around a text (a begin token); a rendered chat has it already.
        Raises ValueError if `text` has surrogates, which have no UTF-8.
        """
        _check_unicode(text)
        ids = self._backend.encode(text, add_special_tokens=special).ids
        return [*self._begin, *ids] if special else ids

    def encode_within(self, text: str) -> list[int]:
        """Ids of a text that follows another one: without a first space, and special tokens are not read out of it.

        Their bytes are those of the text, but for bytes that no token has.
        """
        _check_unicode(text)
        for mark in _MARKS if self.strips_first_space else ("",):
            before = self._plain_backend.encode(mark, add_special_tokens=False).ids
            ids = self._plain_backend.encode(mark + text, add_special_tokens=False).ids
            after = ids[len(before) :]
            # A mark that merges with the text is none: the bytes differ.
            if b"".join(map(self.token_bytes, after)) == text.encode("utf-8"):
                return after
        return self._longest_tokens(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that begin a sequence, special tokens left out."""
        data = b"".join(map(self.shown_bytes, ids))
        if self.strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The token's own bytes: of a special token those of its name, of an id that the tokenizer lacks none.

        A model's vocabulary is often padded with ids that the tokenizer does not know.
        """
        return self._bytes[id] if 0 <= id < self.vocab_size else b""

    def shown_bytes(self, id: int) -> bytes:
        """The token's bytes as text shows them: `token_bytes`, or none of a special token."""
        return b"" if id in self.special_ids else self.token_bytes(id)

    def token_text(self, id: int) -> str:
        """`token_bytes` as text; a piece of a character becomes U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        """Id of the token that is named `text` in the vocabulary."""
        return self._backend.token_to_id(text)

    def _longest_tokens(self, data: bytes) -> list[int]:
        """Ids of bytes, the longest token first."""
        ids, at = [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((size for size in sizes if data[at : at + size] in self._id_of_bytes), None)
            if size is not None:
                ids.append(self._id_of_bytes[data[at : at + size]])
            at += size or 1
        return ids

    @functools.cached_property
    def _id_of_bytes(self) -> dict[bytes, int]:
        return {data: i for i, data in enumerate(self._bytes) if data and i not in self.special_ids}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of_bytes), default=0)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        backend = _backend(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for piece, i in self._backend.get_vocab(with_added_tokens=True).items():
            table[i] = self._spelling.bytes_of(piece)
        for i, token in self._added.items():
            table[i] = token.content.encode("utf-8")
        return table


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is no valid Unicode: {error}") from error


def _backend(content: str | bytes) -> tokenizers.Tokenizer:
    # from_buffer raises ValueError where from_str raises a plain Exception.
    data = content.encode("utf-8") if isinstance(content, str) else content
    return tokenizers.Tokenizer.from_buffer(data)


class _Spelling:
    """How the pieces of a vocabulary spell bytes, read off the decoder of its tokenizer.json."""

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = {step["type"]: step for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        known = {"ByteLevel"} if self._byte_level else {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not steps or not kinds.keys() <= known or not kinds.keys() & {"ByteLevel", "Replace", "Metaspace"}:
            raise ValueError(
                f"its decoder ({', '.join(kinds) or 'none'}) is not supported; byte-level BPE and SentencePiece are"
            )
        replace = kinds.get("Replace", {"pattern": {"String": "▁"}, "content": " "})
        if (replace["pattern"], replace["content"]) != ({"String": "▁"}, " "):
            raise ValueError("its decoder replaces other than '▁' by a space, which is not supported")
        self.strips_first_space = "Strip" in kinds and kinds["Strip"]["start"] == 1
        if "Metaspace" in kinds:
            self.strips_first_space |= _prepends(kinds["Metaspace"])

    def bytes_of(self, piece: str) -> bytes:
        if self._byte_level:
            # A piece with a character that stands for no byte is the text itself, as the library's decoder has it.
            if all(char in _BYTE_OF_CHAR for char in piece):
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            return piece.encode("utf-8")
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode("utf-8")


def _prepends(metaspace: Mapping[str, Any]) -> bool:
    # Files from before the library wrote a scheme have a flag.
    if "prepend_scheme" in metaspace:
        return metaspace["prepend_scheme"] != "never"
    return metaspace.get("add_prefix_space", True)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for the characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def load_tokenizer(path: str | os.PathLike, end_token: str | None = None) -> Tokenizer:
    """Tokenizer of a Hugging Face folder, of a GGUF file, or of the folder of a training run.

    A run's documents begin and end with one token: `end_token`, or the only special token of its tokenizer.json if
    None; it ends generation, and `encode` puts it in front of a text. Elsewhere `end_token` is one more end token.
    Raises ValueError, naming the file, for one that is missing, malformed or not supported.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path, end_token)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder with a tokenizer.json nor a .gguf file")
    if any((path / name).exists() for name in ("tokenizer_config.json", "generation_config.json", "config.json")):
        return _from_hugging_face(path, end_token)
    return _from_run(path, end_token)


def _from_gguf(path: Path, end_token: str | None) -> Tokenizer:
    metadata = read_metadata(path)
    with _naming(path):
        vocabulary = GgufVocabulary(metadata)
        tokenizer = functools.partial(
            Tokenizer,
            json.dumps(vocabulary.tokenizer_json()),
            chat_template=vocabulary.chat_template,
            special_tokens=vocabulary.special_tokens,
        )
        return _with_end(tokenizer, vocabulary.end_ids, end_token)


def _from_hugging_face(path: Path, end_token: str | None) -> Tokenizer:
    settings = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
    with _naming(path / "tokenizer_config.json"):
        special_tokens = _special_tokens(settings)
        template = _chat_template(path, settings)
    # Where both name end tokens, generation_config.json is what transformers generates by.
    generation, config = _read_json(path / "generation_config.json"), _read_json(path / "config.json")
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    with _naming(path / "generation_config.json"):
        end_ids = _ids(named)
    content = _read(path / "tokenizer.json")
    with _naming(path / "tokenizer.json"):
        tokenizer = functools.partial(Tokenizer, content, chat_template=template, special_tokens=special_tokens)
        return _with_end(tokenizer, end_ids, end_token or special_tokens.get("eos_token"))


def _from_run(path: Path, end_token: str | None) -> Tokenizer:
    content = _read(path / "tokenizer.json")
    with _naming(path / "tokenizer.json"):
        special = [token.content for token in _backend(content).get_added_tokens_decoder().values() if token.special]
        if end_token is None and len(special) != 1:
            raise ValueError(
                f"it has {len(special)} special tokens ({', '.join(special[:8])}), and nothing says which ends a "
                "document; give the run's data.end_token as end_token"
            )
        end = _named_id(Tokenizer(content), end_token or special[0])
        return Tokenizer(content, end_ids=(end,), begin_id=end, special_tokens={"eos_token": end_token or special[0]})


def _with_end(tokenizer: functools.partial[Tokenizer], end_ids: Sequence[int], end_token: str | None) -> Tokenizer:
    """The tokenizer, with the end tokens of `end_ids` and the one named `end_token`."""
    if end_token is None:
        return tokenizer(end_ids=end_ids)
    end = _named_id(tokenizer(), end_token)
    return tokenizer(end_ids=(end, *end_ids))


def _named_id(tokenizer: Tokenizer, text: str) -> int:
    i = tokenizer.token_id(text)
    if i is None:
        raise ValueError(f"the tokenizer has no token {text!r}, which is to end a text")
    return i


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the keys *_token, which hold a string or a dict with its `content`."""
    found = {}
    for key, value in settings.items():
        if not key.endswith("_token") or key.startswith(("add_", "use_")):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    if (path / "chat_template.jinja").exists():
        return _read(path / "chat_template.jinja").decode("utf-8")
    template = settings.get("chat_template", _read_json(path / "chat_template.json").get("chat_template"))
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"chat_template has {', '.join(named)}; one named 'default' is needed")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template is {type(template).__name__}; a string or a list of named ones is needed")
    return template


def _ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id={value!r} is neither a token id nor a list of them")
    return ids


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


class _naming:
    """Puts the file's name in front of a ValueError, and makes one of what a file of a wrong shape causes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | LookupError | TypeError | AttributeError):
            raise ValueError(f"{self._path}: {error}") from error
