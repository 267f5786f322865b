"""Bodies of /v1/completions and /v1/chat/completions as calls: every field is enforced or refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from serving import messages
from serving.chat import ChatTemplate, ChatTemplateError
from serving.fields import (
    BadRequest,
    Check,
    boolean,
    checked,
    integer,
    mapping,
    number,
    one_of,
    parse_json,
    refused,
    required,
    text,
    wrong,
)
from serving.grammar import Grammar, GrammarCompiler, GrammarError
from serving.request import MAX_TOP_LOGPROBS, Delta, Request, SamplingParams
from serving.tokenizer import Tokenizer
from serving.tools import tool_grammar

MAX_N = 128
MAX_STOP = 4
MAX_STOP_CHARACTERS = 1024
MAX_PRIORITY = 1000
MAX_TIMEOUT_SECONDS = 24 * 3600.0
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; a chat may fill the context."""


class Model(Protocol):
    """What of an engine a body is checked against."""

    tokenizer: Tokenizer
    model_name: str
    max_context: int
    vocab_size: int
    chat: ChatTemplate | None
    grammars: GrammarCompiler | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked body. Choice `i` answers prompt `i // n` with its sequence `i % n`."""

    id: str
    kind: Literal["chat", "completion"]
    created: int
    """Seconds since 1970."""
    model: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    params: SamplingParams
    stop: tuple[str, ...]
    grammar: Grammar | None
    priority: int
    arrival: float
    """Of `time.monotonic()`, as in `deadline`."""
    deadline: float | None
    stream: bool
    include_usage: bool
    echo: tuple[str, ...] | None
    """The prompts' texts, to go in front of the answers."""
    tool_names: tuple[str, ...]
    """Tools that the answer may call; () where it is text only."""
    one_tool_call: bool
    """The answer ends with its first tool call."""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def requests(self, on_delta: Callable[[int], Callable[[Delta], None]]) -> list[Request]:
        """The requests of all choices, in order; `on_delta(i)` gives the callback of choice `i`."""
        return [
            Request(
                id=f"{self.id}-{i}",
                prompt=self.prompts[i // self.n],
                params=dataclasses.replace(self.params, seed=sequence_seed(self.params.seed, i % self.n)),
                on_delta=on_delta(i),
                stop=self.stop,
                grammar=self.grammar,
                priority=self.priority,
                deadline=self.deadline,
                arrival=self.arrival,
            )
            for i in range(self.num_choices)
        ]


def sequence_seed(seed: int | None, i: int) -> int | None:
    """Seed of the i-th sequence of a prompt: the first has the request's own, as it would have alone."""
    if seed is None or i == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest(), "big", signed=True)


def _stop(name: str, value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > MAX_STOP or any(not isinstance(s, str) for s in found):
        raise wrong(name, value, f"a string or a list of up to {MAX_STOP} strings")
    if any(not 1 <= len(s) <= MAX_STOP_CHARACTERS for s in found):
        raise wrong(name, value, f"made of strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(found)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    entries = {}
    for key, bias in mapping(name, value).items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise wrong(name, value, f"an object of token ids and numbers; {key[:20]!r} is no token id")
        if int(key) in entries:
            raise wrong(name, value, f"an object that names each token once; {int(key)} is named twice")
        entries[int(key)] = number(f"{name}.{key}", bias)
    return tuple(sorted(entries.items()))


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    # Obfuscation pads the chunks with random characters; leaving it out is all that is served.
    return checked(value, {"include_usage": boolean, "include_obfuscation": one_of(False)}, name)


def _metadata(name: str, value: Any) -> dict[str, str]:
    if any(not isinstance(entry, str) for entry in mapping(name, value).values()):
        raise wrong(name, value, "an object of strings")
    return value


def _modalities(name: str, value: Any) -> list[str]:
    if value != ["text"]:
        raise wrong(name, value, '["text"]: this server reads and writes text only')
    return value


def _prompts(name: str, value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, as texts or as token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = {type(entry) for entry in value}
        if kinds == {str}:
            return value
        if kinds == {int}:
            return [value]
        if kinds == {list} and all(type(token) is int for prompt in value for token in prompt):
            return value
    raise wrong(name, value, "a string, a list of strings, a list of token ids or a list of such lists")


def _response_format(name: str, value: Any) -> dict[str, Any] | None:
    """A JSON schema that the answer must keep, {} for any JSON object, None for free text."""
    kind = required(mapping(name, value), "type", name)
    one_of("text", "json_object", "json_schema")(f"{name}.type", kind)
    checks: dict[str, Check] = {"type": text}
    if kind == "json_schema":
        checks["json_schema"] = mapping
    fields = checked(value, checks, name)
    if kind == "text":
        return None
    if kind == "json_object":
        return {}
    # The schema is kept whether `strict` is true or not: the promise without it is weaker.
    parts = {"name": text, "description": text, "schema": mapping, "strict": boolean}
    inside = f"{name}.json_schema"
    described = checked(required(fields, "json_schema", name), parts, inside)
    required(described, "name", inside)
    return {"schema": required(described, "schema", inside)}


_SHARED: dict[str, Check] = {
    "model": text,
    "stream": boolean,
    "stream_options": _stream_options,
    "n": integer(1, MAX_N),
    "stop": _stop,
    "seed": integer(-(2**63), 2**63 - 1),
    "temperature": number,
    "top_p": number,
    "top_k": integer(0, 2**31 - 1),
    "min_p": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "repetition_penalty": number,
    "logit_bias": _logit_bias,
    "max_tokens": integer(1, 2**31 - 1),
    "ignore_eos": boolean,
    "priority": integer(-MAX_PRIORITY, MAX_PRIORITY),
    "timeout": number,
    # These identify a request to whoever wrote it and can't change its answer: checked, then dropped.
    "user": text,
    "metadata": _metadata,
    "safety_identifier": text,
    "prompt_cache_key": text,
    # What is served is all that these may ask for.
    "store": one_of(False),
    "service_tier": one_of("auto", "default"),
}

COMPLETION: dict[str, Check] = {
    **_SHARED,
    "prompt": _prompts,
    "echo": boolean,
    "logprobs": integer(0, MAX_TOP_LOGPROBS),
    "best_of": integer(1, MAX_N),
    "suffix": refused("this server has no model that fills in the middle"),
}

_NO_AUDIO = refused("this server reads and writes text only")
_NO_REASONING = refused("the models served have no such control; say it in a message")

CHAT: dict[str, Check] = {
    **_SHARED,
    "messages": messages.messages,
    "max_completion_tokens": integer(1, 2**31 - 1),
    "logprobs": boolean,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
    "response_format": _response_format,
    "tools": messages.tools,
    "tool_choice": messages.tool_choice,
    "parallel_tool_calls": boolean,
    "modalities": _modalities,
    "audio": _NO_AUDIO,
    "functions": refused("use tools"),
    "function_call": refused("use tool_choice"),
    "moderation": refused("this server moderates nothing"),
    "prediction": refused("set up speculative decoding in the server"),
    "prompt_cache_options": refused("the prefix cache keeps what it can, for all requests alike"),
    "prompt_cache_retention": refused("the prefix cache keeps what it can, for all requests alike"),
    "reasoning_effort": _NO_REASONING,
    "verbosity": _NO_REASONING,
    "web_search_options": refused("this server reaches no web"),
}


def parse_completion(body: bytes, model: Model, max_choices: int, arrival: float) -> Call:
    """Call of a body of /v1/completions that came at `arrival` (`time.monotonic()`). Raises BadRequest."""
    fields = _fields(body, COMPLETION, model)
    n = fields.get("n", 1)
    if fields.get("best_of", n) != n:
        raise BadRequest(
            f"best_of={fields['best_of']} must be n={n}: this server returns all that it generates", "best_of"
        )
    given = required(fields, "prompt")
    _check_choices(len(given), n, max_choices)
    prompts = tuple(_encode(prompt, model) for prompt in given)
    for prompt in prompts:
        _check_length(prompt, fields, ("max_tokens",), "prompt", model)
    echo = None
    if fields.get("echo"):
        if "logprobs" in fields:
            raise BadRequest("echo=true can't be combined with logprobs: those of a prompt are not computed", "echo")
        echo = tuple(p if isinstance(p, str) else model.tokenizer.decode(p) for p in given)
    params = _params(fields, fields.get("max_tokens", COMPLETION_MAX_TOKENS), fields.get("logprobs"), model)
    room = model.max_context - max(map(len, prompts))
    params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
    return _call("completion", fields, prompts, params, model, arrival, echo=echo)


def parse_chat(body: bytes, model: Model, max_choices: int, arrival: float) -> Call:
    """Call of a body of /v1/chat/completions that came at `arrival` (`time.monotonic()`). Raises BadRequest."""
    fields = _fields(body, CHAT, model)
    given = required(fields, "messages")
    _check_choices(1, fields.get("n", 1), max_choices)
    choice = messages.check_tool_use(fields)
    if model.chat is None:
        raise BadRequest(f"{model.model_name} has no chat template; use /v1/completions", "messages")
    try:
        rendered = model.chat.render(given, tools=fields.get("tools") if choice != "none" else None)
    except ChatTemplateError as error:
        # The template's own faults are the messages'; what it says of tools begins with their field.
        name = "tools" if str(error).startswith("tools:") else "messages"
        raise BadRequest(f"{name}: {str(error).removeprefix('tools: ')}", name, code="template_error") from error
    prompt = tuple(model.tokenizer.encode(rendered, special=False))
    max_tokens = _chat_max_tokens(fields)
    _check_length(prompt, fields, ("max_completion_tokens", "max_tokens"), "messages", model)
    params = _params(fields, max_tokens or model.max_context - len(prompt), _chat_logprobs(fields), model)
    calling = choice != "none"
    return _call(
        "chat",
        fields,
        (prompt,),
        params,
        model,
        arrival,
        grammar=_grammar(fields, choice, model),
        tool_names=tuple(tool["function"]["name"] for tool in fields["tools"]) if calling else (),
        one_tool_call=calling and (isinstance(choice, dict) or not fields.get("parallel_tool_calls", True)),
    )


def _fields(body: bytes, checks: Mapping[str, Check], model: Model) -> dict[str, Any]:
    fields = checked(parse_json(body), checks)
    if required(fields, "model") != model.model_name:
        raise unknown_model(fields["model"], model)
    if "stream_options" in fields and not fields.get("stream"):
        raise BadRequest("stream_options needs stream=true", "stream_options")
    if not 0 < fields.get("timeout", 1) <= MAX_TIMEOUT_SECONDS:
        raise wrong("timeout", fields["timeout"], f"above 0 and at most {MAX_TIMEOUT_SECONDS:.0f} seconds")
    for token, _ in fields.get("logit_bias", ()):
        if token >= model.vocab_size:
            raise BadRequest(
                f"logit_bias: token {token} must be below the vocabulary's {model.vocab_size}", "logit_bias"
            )
    return fields


def unknown_model(name: str, model: Model) -> BadRequest:
    message = f"there is no model {name[:80]!r} here, only {model.model_name!r}"
    return BadRequest(message, "model", status=404, code="model_not_found")


def _check_choices(prompts: int, n: int, limit: int) -> None:
    if prompts * n > limit:
        what = f"n={n}" if prompts == 1 else f"prompt: {prompts} prompts times n={n}"
        raise BadRequest(f"{what} is more than {limit} sequences, this server's limit", "n" if n > 1 else "prompt")


def _encode(prompt: str | list[int], model: Model) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = tuple(model.tokenizer.encode(prompt))
    else:
        ids = tuple(prompt)
        for token in ids:
            if not 0 <= token < model.vocab_size:
                raise BadRequest(f"prompt: token {token} must be from 0 to {model.vocab_size - 1}", "prompt")
    if not ids:
        raise BadRequest("prompt must have at least one token", "prompt")
    return ids


def _check_length(
    prompt: Sequence[int], fields: Mapping[str, Any], limits: Sequence[str], source: str, model: Model
) -> None:
    """Prompt and answer must fit in the context; `limits` are the fields that may bound the answer."""
    name = next((name for name in limits if name in fields), None)
    answer = fields[name] if name else 1
    if len(prompt) + answer <= model.max_context:
        return
    asked = f" and {name}={answer}" if name and len(prompt) < model.max_context else ""
    raise BadRequest(
        f"{source} has {len(prompt)} tokens{asked}; the context of {model.model_name} holds {model.max_context}, "
        "at least one of them for the answer",
        name if asked else source,
        code="context_length_exceeded",
    )


def _chat_max_tokens(fields: Mapping[str, Any]) -> int | None:
    old, new = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise BadRequest(f"max_tokens={old} and max_completion_tokens={new} differ; give one of them", "max_tokens")
    return new if new is not None else old


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    if fields.get("logprobs"):
        return fields.get("top_logprobs", 0)
    if "top_logprobs" in fields:
        raise BadRequest("top_logprobs needs logprobs=true", "top_logprobs")
    return None


_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
)


def _params(fields: Mapping[str, Any], max_tokens: int, logprobs: int | None, model: Model) -> SamplingParams:
    given = {name: fields[name] for name in _SAMPLING_FIELDS if name in fields}
    stop_ids = () if fields.get("ignore_eos") else model.tokenizer.end_ids
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, stop_ids=stop_ids, **given)
    except ValueError as error:
        # Its messages begin with the field, which here has the same name: those it can refuse are the given ones.
        name = re.match(r"\w*", str(error))[0]
        assert name in given, error
        raise BadRequest(str(error), name) from error


def _grammar(fields: Mapping[str, Any], choice: messages.ToolChoice, model: Model) -> Grammar | None:
    form = fields.get("response_format")
    if form is not None and choice != "none":
        raise BadRequest(
            "response_format can't be combined with tools unless tool_choice is \"none\": a text can't be both",
            "response_format",
        )
    lark = None
    if choice != "none":
        lark = tool_grammar(fields["tools"], choice, parallel=fields.get("parallel_tool_calls", True))
    if form is None and lark is None:
        return None
    name = "tools" if form is None else "response_format"
    if model.grammars is None:
        raise BadRequest(f"{name} can't be kept: {model.model_name} has no end token for a grammar", name)
    if fields.get("ignore_eos"):
        raise BadRequest(f"ignore_eos can't be combined with {name}: its grammar ends the text", "ignore_eos")
    try:
        return model.grammars.compile_lark(lark) if form is None else _compile_format(form, model.grammars)
    except GrammarError as error:
        raise BadRequest(f"{name}: {error}", name, code="invalid_schema") from error


def _compile_format(form: Mapping[str, Any], grammars: GrammarCompiler) -> Grammar:
    return grammars.compile_json_schema(form["schema"]) if form else grammars.compile_json_object()


def _call(
    kind: Literal["chat", "completion"],
    fields: Mapping[str, Any],
    prompts: tuple[tuple[int, ...], ...],
    params: SamplingParams,
    model: Model,
    arrival: float,
    **parts: Any,
) -> Call:
    defaults = {"grammar": None, "echo": None, "tool_names": (), "one_tool_call": False}
    return Call(
        id=f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
        kind=kind,
        created=int(time.time()),
        model=model.model_name,
        prompts=prompts,
        n=fields.get("n", 1),
        params=params,
        stop=fields.get("stop", ()),
        priority=fields.get("priority", 0),
        arrival=arrival,
        deadline=arrival + fields["timeout"] if "timeout" in fields else None,
        stream=fields.get("stream", False),
        include_usage=fields.get("stream_options", {}).get("include_usage", False),
        **defaults | parts,
    )
