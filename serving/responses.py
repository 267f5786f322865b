"""What OpenAI's clients read: chunks of a stream, whole answers, errors."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from serving.request import Delta, TokenLogprob, Usage
from serving.schema import Call
from serving.tokenizer import Tokenizer
from serving.tools import ToolCallDelta, ToolCallParser

LEAST_LOGPROB = -9999.0
"""OpenAI's number for a token that can't come: JSON has no infinity."""

DONE = b"data: [DONE]\n\n"


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def event(value: Any) -> bytes:
    """A server-sent event. JSON escapes line ends, so that it is one line."""
    return b"data: " + encode(value) + b"\n\n"


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(call: Call, usages: Sequence[Usage]) -> dict[str, Any]:
    """Tokens of a call, `usages` those of its choices in order. A prompt counts once, however many answers it has."""
    firsts = usages[:: call.n]
    prompt, generated = sum(map(len, call.prompts)), sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


def token_label(data: bytes) -> str:
    """A token's text; of one that is no text by itself its bytes, which keeps different tokens apart."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclasses.dataclass
class Piece:
    """Some of an answer: text, its log-probabilities in the endpoint's format, fragments of tool calls."""

    text: str = ""
    logprobs: Any = None
    tool_calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish: str | None = None


class ChatAnswer:
    """One choice of a chat: deltas become pieces, pieces a chunk or, joined, a message."""

    def __init__(self, call: Call, index: int, tokenizer: Tokenizer) -> None:
        self._call, self._index, self._tokenizer = call, index, tokenizer
        # What a grammar has held to the form of a call is passed on as it is written.
        forced = call.grammar is not None
        self._parser = ToolCallParser(call.tool_names, forced=forced) if call.tool_names else None

    def first(self) -> Piece:
        return Piece()

    def push(self, delta: Delta) -> Piece:
        """A piece of what came. It may have a `finish` that the delta has not: the rest is not wanted then."""
        piece = Piece(delta.text, _chat_logprobs(delta.logprobs, self._tokenizer) or None, finish=delta.finish)
        if self._parser is None:
            return piece
        piece.text, fragments = self._parser.feed(delta.text)
        if delta.finish is not None:
            rest, more = self._parser.finish()
            piece.text, fragments = piece.text + rest, [*fragments, *more]
        wanted = [fragment for fragment in fragments if not (self._call.one_tool_call and fragment.index)]
        piece.tool_calls = [_fragment(fragment) for fragment in wanted]
        # Without a grammar a call comes whole; under one it may be the start of the second that ends the first.
        whole = bool(wanted) and self._call.grammar is None
        enough = self._call.one_tool_call and (whole or len(wanted) < len(fragments))
        if enough or (piece.finish == "stop" and self._parser.num_calls):
            piece.finish = "tool_calls"
        return piece

    def chunk(self, piece: Piece, first: bool = False) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if piece.text or (piece.logprobs and not piece.tool_calls):
            delta["content"] = piece.text
        if piece.tool_calls:
            delta["tool_calls"] = piece.tool_calls
        logprobs = {"content": piece.logprobs, "refusal": None} if piece.logprobs else None
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.text for piece in pieces)
        calls = _join_calls([fragment for piece in pieces for fragment in piece.tool_calls])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        logprobs = None
        if self._call.params.logprobs is not None:
            logprobs = {"content": [entry for piece in pieces for entry in piece.logprobs or ()], "refusal": None}
        finish = pieces[-1].finish
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": finish}


class CompletionAnswer:
    """One choice of a completion: deltas become pieces, pieces a chunk or, joined, the same thing whole."""

    def __init__(self, call: Call, index: int, tokenizer: Tokenizer) -> None:
        self._call, self._index, self._tokenizer = call, index, tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def first(self) -> Piece:
        return Piece("" if self._call.echo is None else self._call.echo[self._index // self._call.n])

    def push(self, delta: Delta) -> Piece:
        return Piece(delta.text, self._logprobs(delta.logprobs) if delta.logprobs else None, finish=delta.finish)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, list]:
        """`text_offset` counts the characters that the bytes of the tokens before have completed."""
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            data = self._tokenizer.token_bytes(entry.token)
            found["tokens"].append(token_label(data))
            found["token_logprobs"].append(max(entry.logprob, LEAST_LOGPROB))
            top = {token_label(self._tokenizer.token_bytes(t)): max(value, LEAST_LOGPROB) for t, value in entry.top}
            found["top_logprobs"].append(top)
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(data))
        return found

    def chunk(self, piece: Piece, first: bool = False) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        joined = Piece("".join(piece.text for piece in pieces), finish=pieces[-1].finish)
        if self._call.params.logprobs is not None:
            parts = [self._logprobs(()), *(piece.logprobs for piece in pieces if piece.logprobs)]
            joined.logprobs = {key: [entry for part in parts for entry in part[key]] for key in parts[0]}
        return self.chunk(joined)


Answer = ChatAnswer | CompletionAnswer


def answer_for(call: Call, index: int, tokenizer: Tokenizer) -> Answer:
    return (ChatAnswer if call.kind == "chat" else CompletionAnswer)(call, index, tokenizer)


def _chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def described(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": token_label(data), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return [
        {**described(entry.token, entry.logprob), "top_logprobs": [described(*top) for top in entry.top]}
        for entry in entries
    ]


class Envelope:
    """What all chunks of a call, or its whole answer, have around the choices."""

    def __init__(self, call: Call) -> None:
        self._call = call
        kind = "chat.completion" if call.kind == "chat" else "text_completion"
        self._head = {"id": call.id, "object": kind, "created": call.created, "model": call.model}
        chunk = self._head | ({"object": "chat.completion.chunk"} if call.kind == "chat" else {})
        # Chunks differ in their choices only: the rest is spelled once.
        self._prefix = b"data: " + encode(chunk)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if call.include_usage else b"]}\n\n"

    def chunk(self, choice: dict[str, Any]) -> bytes:
        return self._prefix + encode(choice) + self._suffix

    def usage_chunk(self, usages: Sequence[Usage]) -> bytes:
        return self._prefix + b'],"usage":' + encode(usage_body(self._call, usages)) + b"}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], usages: Sequence[Usage]) -> bytes:
        return encode({**self._head, "choices": list(choices), "usage": usage_body(self._call, usages)})


def _fragment(delta: ToolCallDelta) -> dict[str, Any]:
    """OpenAI's form: the first piece of a call has its id and name, all have some of its arguments."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def _join_calls(fragments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for fragment in fragments:
        call = calls.setdefault(fragment["index"], {"function": {"arguments": ""}})
        arguments = call["function"]["arguments"] + fragment["function"]["arguments"]
        call["function"] = {**call["function"], **fragment["function"], "arguments": arguments}
        call |= {key: fragment[key] for key in ("id", "type") if key in fragment}
    return [{"id": call["id"], "type": call["type"], "function": call["function"]} for call in calls.values()]
