"""Messages and tools of a chat request, checked and brought into the form that chat templates read."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from serving.fields import BadRequest, boolean, checked, mapping, one_of, refused, required, text, wrong

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MAX_TOOLS = 128

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]

_NO_AUDIO = refused("this server reads and writes text only")
_NO_FUNCTIONS = refused("it was replaced by tools and tool_calls")


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Messages for a template: content a string (or None beside tool calls), arguments of calls as objects.

    Templates know the role "system", not OpenAI's newer name "developer" for it, so that becomes "system". A message's
    `name` reaches the template, whose business it is.
    """
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a list of at least one message")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    role = required(mapping(where, value), "role", where)
    one_of("system", "developer", "user", "assistant", "tool")(f"{where}.role", role)
    checks = {"role": text, "content": _content, "name": text}
    if role == "assistant":
        checks |= {
            "tool_calls": _tool_calls,
            "refusal": refused("send the text as content"),
            "audio": _NO_AUDIO,
            "function_call": _NO_FUNCTIONS,
            "annotations": _no_annotations,
        }
    elif role == "tool":
        checks["tool_call_id"] = text
    fields = checked(value, checks, where)
    fields.pop("annotations", None)
    if role == "developer":
        fields["role"] = "system"
    elif role == "tool":
        required(fields, "tool_call_id", where)
    if role != "assistant" or "tool_calls" not in fields:
        required(fields, "content", where)
    fields.setdefault("content", None)
    return fields


def _no_annotations(name: str, value: Any) -> list:
    # OpenAI's client sends back the empty list that its replies have.
    if value != []:
        raise wrong(name, value, "an empty list")
    return value


def _content(name: str, value: Any) -> str:
    """A string, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a string or a list of text parts")
    parts = []
    for i, part in enumerate(value):
        where = f"{name}[{i}]"
        kind = required(mapping(where, part), "type", where)
        if kind != "text":
            raise wrong(f"{where}.type", kind, '"text": this server reads text only')
        parts.append(required(checked(part, {"type": text, "text": text}, where), "text", where))
    return "".join(parts)


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a list of at least one call")
    return [_tool_call(f"{name}[{i}]", call) for i, call in enumerate(value)]


def _tool_call(where: str, value: Any) -> dict[str, Any]:
    call = checked(value, {"id": text, "type": one_of("function"), "function": mapping}, where)
    required(call, "id", where)
    inside = f"{where}.function"
    function = checked(required(call, "function", where), {"name": text, "arguments": text}, inside)
    required(function, "name", inside)
    arguments = required(function, "arguments", inside)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise wrong(f"{inside}.arguments", arguments, f"a JSON object as a string ({error})") from error
    if not isinstance(parsed, dict):
        raise wrong(f"{inside}.arguments", arguments, "a JSON object as a string")
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": parsed}}


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Tools of type function, each with its `parameters` (an object without properties if none are given)."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOLS:
        raise wrong(name, value, f"a list of 1 to {MAX_TOOLS} tools")
    found = [_tool(f"{name}[{i}]", tool) for i, tool in enumerate(value)]
    seen: set[str] = set()
    for i, tool in enumerate(found):
        if tool["function"]["name"] in seen:
            raise wrong(f"{name}[{i}].function.name", tool["function"]["name"], "a name that no other tool has")
        seen.add(tool["function"]["name"])
    return found


def _tool(where: str, value: Any) -> dict[str, Any]:
    tool = checked(value, {"type": one_of("function"), "function": mapping}, where)
    required(tool, "type", where)
    inside = f"{where}.function"
    checks = {"name": text, "description": text, "parameters": mapping, "strict": boolean}
    function = checked(required(tool, "function", where), checks, inside)
    if not _NAME.fullmatch(required(function, "name", inside)):
        raise wrong(f"{inside}.name", function["name"], "1 to 64 letters, digits, _ or -")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def tool_choice(name: str, value: Any) -> ToolChoice:
    """ "none", "auto", "required", or {"type": "function", "function": {"name": ...}}."""
    if isinstance(value, str):
        return one_of("none", "auto", "required")(name, value)
    if not isinstance(value, dict):
        raise wrong(name, value, '"none", "auto", "required" or a function')
    choice = checked(value, {"type": one_of("function"), "function": mapping}, name)
    required(choice, "type", name)
    function = checked(required(choice, "function", name), {"name": text}, f"{name}.function")
    required(function, "name", f"{name}.function")
    return choice


def check_tool_use(fields: dict[str, Any]) -> ToolChoice:
    """The tool choice of a body whose fields are checked one by one; "none" without tools. Raises BadRequest."""
    given = fields.get("tools")
    if not given:
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in fields and fields[name] != "none":
                raise BadRequest(f"{name} needs tools", name)
        return "none"
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        names = [tool["function"]["name"] for tool in given]
        if choice["function"]["name"] not in names:
            shown = ", ".join(names)[:200]
            raise wrong("tool_choice.function.name", choice["function"]["name"], f"one of the tools: {shown}")
    return choice
