"""Tool calls in text: forced by a grammar, and read back.

The form is that of Hermes, Qwen 2.5 and 3, and SmolLM2, one block for each call:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

# Arguments as json.dumps writes them, which is what the models were trained on.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What OpenAI's API takes a function without parameters to mean.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model must be told of its tools if its chat template doesn't."""
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = call_text("NAME", {"PARAMETER": "VALUE"})
    return (
        f"You can call functions. Their signatures are JSON, one per line:\n<tools>\n{described}\n</tools>\n\n"
        f"To call one, write its name and arguments as JSON in this form, one block for each call:\n{example}"
    )


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of one call."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{_OPEN}\n{call}\n{_CLOSE}"


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] = "auto", *, parallel: bool = True
) -> str | None:
    """Lark grammar for `GrammarCompiler.compile_lark` that makes the text what `tools` and `choice` ask for.

    `tools` and `choice` are OpenAI's `tools` and `tool_choice`. "required" forces one call or more (one only, unless
    `parallel`), a named function one call of it: nothing but calls, arguments by the tool's schema. "none" is no
    grammar. "auto" is none either, so that the model writes freely and `ToolCallParser` reads what it wrote: calls may
    then break their schema. If a tool is marked `strict`, "auto" is a grammar too: free text, and from the first
    `<tool_call>` on a call of the schema. It is not used for all, since each token then waits for its mask and a text
    that only mentions the tag must go on as a call.

    Raises ValueError, naming the field, for tools or a choice of a wrong form; `compile_lark` refuses schemas.
    """
    functions = _functions(tools)
    if choice == "none":
        return None
    if choice == "auto":
        return _free_text(functions, parallel) if any(f.get("strict") for f in functions.values()) else None
    if choice != "required":
        name = _chosen(choice, functions)
        functions, parallel = {name: functions[name]}, False
    if not functions:
        raise ValueError("tool_choice asks for a call, and tools is empty")
    start = r'call ("\n" call)*' if parallel else "call"
    return f"start: {start}\n" + _call_rules(functions, r'"<tool_call>\n"')


def _free_text(functions: Mapping[str, Mapping[str, Any]], parallel: bool) -> str:
    # A lazy terminal ends as soon as it can, which is at the first <tool_call>.
    start = "call* text" if parallel else "call | text"
    rules = f"start: {start}\nopening[lazy]: /(.|\\n)*<tool_call>/\ntext: /(.|\\n)*/\n"
    return rules + _call_rules(functions, r'opening "\n"')


def _call_rules(functions: Mapping[str, Mapping[str, Any]], opening: str) -> str:
    lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, (name, function) in enumerate(functions.items()):
        # Each schema is a grammar of its own, so that its references start at its own root.
        schema = {**function.get("parameters", _NO_PARAMETERS), "x-guidance": _SPACING}
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        lines.append(f'call_{i}: {opening} {head} arguments_{i} "}}\\n</tool_call>"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Name to function of each tool."""
    functions: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise ValueError(f"tools[{i}].type must be 'function'")
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{i}].function must be an object with a name")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", function["name"]):
            raise ValueError(f"tools[{i}].function.name must be 1 to 64 letters, digits, '_', '-' or '.'")
        if function["name"] in functions:
            raise ValueError(f"tools[{i}].function.name={function['name']!r} is the name of an earlier tool too")
        if not isinstance(function.get("parameters", {}), Mapping):
            raise ValueError(f"tools[{i}].function.parameters must be a JSON schema")
        functions[function["name"]] = function
    return functions


def _chosen(choice: str | Mapping[str, Any], functions: Mapping[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping) or choice.get("type") != "function" or "name" not in function:
        raise ValueError("tool_choice must be 'none', 'auto', 'required' or a function with its name")
    if function["name"] not in functions:
        known = ", ".join(functions) or "none"
        raise ValueError(f"tool_choice.function.name={function['name']!r} is none of the tools: {known}")
    return function["name"]


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call: with its `id` and `name` the first, then more text of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ToolCallParser:
    """Splits a text, as it arrives, into content and tool calls.

    A call comes out whole, once it is closed and found to be an object with the name of a tool and an object of
    arguments; anything else is content, as it was written. `forced` is for text that a grammar holds to that form:
    the arguments then come out as they are written, and a text cut short leaves them cut short.
    White space before a call, and after the last one, is dropped.
    """

    def __init__(self, names: Sequence[str], *, forced: bool = False) -> None:
        """`names` are those of the tools."""
        self.num_calls = 0
        self._names = frozenset(names)
        self._forced = forced
        self._text = ""  # taken in, not yet given out
        self._in_call = False
        self._after_call = False
        self._arguments: _JsonEnd | None = None  # of the call whose arguments are being given out

    def feed(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Takes more text; content and pieces of calls that are certain now."""
        self._text += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        while self._take_call(content, deltas) if self._in_call else self._take_content(content):
            pass
        return "".join(content), deltas

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """What was held back, at the end of the text: a call that was never closed is content."""
        rest, self._text = self._text, ""
        if self._arguments is not None or (self._after_call and not rest.strip()):
            return "", []
        return rest, []

    def _take_content(self, content: list[str]) -> bool:
        """Takes content off the text, up to a call; true if there is one."""
        at = self._text.find(_OPEN)
        end = at if at >= 0 else len(self._text) - _overlap(self._text, _OPEN)
        # White space at the end may turn out to stand before a call.
        end = len(self._text[:end].rstrip())
        if end:
            content.append(self._text[:end])
            self._text = self._text[end:]
            self._after_call = False
        self._in_call = at >= 0
        return self._in_call

    def _take_call(self, content: list[str], deltas: list[ToolCallDelta]) -> bool:
        """Takes a call, or a piece of its arguments, off the text; true if there may be more."""
        if self._arguments is not None:
            return self._take_arguments(deltas)
        header = _HEADER.match(self._text) if self._forced else None
        if header and header["name"] in self._names:
            deltas.append(self._begin(header["name"], ""))
            self._text = self._text[header.end() :]
            self._arguments = _JsonEnd()
            return True
        end = _end_of_call(self._text)
        if end is None:
            return False
        block, self._text = self._text[:end], self._text[end:]
        call = self._read(block)
        if call is None:
            content.append(block)
        else:
            deltas.append(self._begin(*call))
        self._in_call, self._after_call = False, call is not None
        return True

    def _take_arguments(self, deltas: list[ToolCallDelta]) -> bool:
        size = self._arguments.read(self._text)
        if size:
            deltas.append(ToolCallDelta(self.num_calls - 1, self._text[:size]))
            self._text = self._text[size:]
        at = self._text.find(_CLOSE) if self._arguments.ended else -1
        if at < 0:
            return False
        self._text = self._text[at + len(_CLOSE) :]
        self._arguments, self._in_call, self._after_call = None, False, True
        return True

    def _begin(self, name: str, arguments: str) -> ToolCallDelta:
        self.num_calls += 1
        return ToolCallDelta(self.num_calls - 1, arguments, id=f"call_{uuid.uuid4().hex}", name=name)

    def _read(self, block: str) -> tuple[str, str] | None:
        """Name and JSON arguments of a closed call; None if it is none."""
        body = block.strip()[len(_OPEN) : -len(_CLOSE)].strip()
        try:
            call = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or call["name"] not in self._names:
            return None
        if not isinstance(call["arguments"], dict):
            return None
        header = _HEADER.match(f"{_OPEN}{body}")
        # As the model wrote them, if they come last: Python's numbers are not JSON's.
        written = body[header.end() - len(_OPEN) : -1].strip() if header else json.dumps(call["arguments"])
        return call["name"], written


_HEADER = re.compile(rf'\s*{_OPEN}\s*\{{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{{)')


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _end_of_call(text: str) -> int | None:
    """Where the closing tag ends: the first that stands in no string of the call's JSON."""
    scan, at = _JsonEnd(), text.index(_OPEN) + len(_OPEN)
    while (close := text.find(_CLOSE, at)) >= 0:
        scan.read(text[at:close])
        if not scan.in_string:
            return close + len(_CLOSE)
        scan.read(_CLOSE)
        at = close + len(_CLOSE)
    return None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


class _JsonEnd:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self.in_string = self._escaped = False

    def read(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        if self.ended:
            return 0
        for n, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self.in_string:
                self._escaped = char == "\\"
                self.in_string = char != '"'
            elif char == '"':
                self.in_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if not self._depth:
                    self.ended = True
                    return n + 1
        return len(text)
