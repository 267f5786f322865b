"""Messages to a prompt, through the model's own chat template."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from serving.tools import call_text, tools_prompt

# A template that needs more is broken: seven hundred messages under one that walks all of them for each take as many.
# They run for 1 s (loops) to 3 s (macros) on one core.
_MAX_STEPS = 500_000
_MAX_CHARACTERS = 32 * 1024 * 1024

# What a template's expressions can raise: all of it is the template's, or the messages', fault.
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ChatTemplateError(ValueError):
    """The template is malformed, refuses the messages, or grows without bound."""


class ChatTemplate:
    """A chat template in the dialect of Hugging Face's tokenizers, run in a sandbox.

    Bounded are the characters written (32 Mi, also inside macros and blocks), the turns of loops and calls of macros
    (half a million in all), a range (100,000), and what `+`, `*`, `**` and `~` make. Not bounded is what one filter or
    format makes of one value, such as a width given to `center`: a template comes with the model, and requests can't
    bring their own.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the template's variables bos_token, eos_token and so on.

        Raises ChatTemplateError if `source` is malformed.
        """
        self._special_tokens = dict(special_tokens)
        self._environment = _Environment()
        with _reported("the chat template is malformed"):
            tree = self._environment.parse(source)
            variables = jinja2.meta.find_undeclared_variables(tree)
            self._template = self._environment.from_string(source)
        # A template that does not know tools would drop them without a word.
        self._reads_tools = "tools" in variables
        self._tags_calls = "<tool_call>" in source
        self._reads_calls = "tool_calls" in source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt of a conversation in OpenAI's form; `extra` are more variables of the template.

        Texts in parts are joined, a missing content is an empty text, and arguments of tool calls, which are JSON in a
        string, are objects to the template. If it does not know tools, they are described in the system message, and
        earlier calls in their messages, in the form of `serving.tools`; if it knows tools of another form, they are
        refused. Raises ChatTemplateError, with the reason.
        """
        messages = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if not self._reads_calls:
            messages = [_calls_as_text(message) for message in messages]
        if tools and self._reads_tools and not self._tags_calls:
            raise ChatTemplateError("tools: the model's chat template asks for calls in a form other than <tool_call>")
        if tools and not self._reads_tools:
            messages = _tools_as_text(messages, tools)
        variables = {
            **self._special_tokens,
            **extra,
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        token = _budget.set(_Budget())
        try:
            with _reported("the chat template failed"):
                return self._template.render(variables)
        finally:
            _budget.reset(token)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except ChatTemplateError:
        raise
    except _FAULTS as error:
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        # Jinja's own errors go on with a place in the source.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ChatTemplateError(f"{what}{line}: {reason}") from error


# --- messages


def _plain(message: Any, where: str) -> dict[str, Any]:
    """The message as templates expect it. Raises ChatTemplateError for what is no message of text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"{where} must be an object with a role")
    plain = {**message, "content": _text(message.get("content"), f"{where}.content")}
    if plain.get("tool_calls") is None:
        plain.pop("tool_calls", None)
    else:
        if not isinstance(plain["tool_calls"], list):
            raise ChatTemplateError(f"{where}.tool_calls must be a list")
        calls = enumerate(plain["tool_calls"])
        plain["tool_calls"] = [_parsed_call(call, f"{where}.tool_calls[{i}]") for i, call in calls]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f"{where} must be a string or a list of parts")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatTemplateError(f"{where}[{i}] must be a part of type 'text': the model reads only text")
    return "".join(part["text"] for part in content)


def _parsed_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(f"{where} must be an object with a function that has a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise ChatTemplateError(f"{where}.function.arguments is not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise ChatTemplateError(f"{where}.function.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    texts = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return {**message, "content": "\n".join(filter(None, [message["content"], *texts]))}


def _tools_as_text(messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prompt = tools_prompt(tools)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{prompt}".lstrip("\n")}
        return [first, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


# --- the sandbox


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = _MAX_STEPS
        self.characters = _MAX_CHARACTERS

    def spend(self, steps: int, characters: int) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0:
            raise ChatTemplateError(f"the chat template takes more than {_MAX_STEPS} steps")
        if self.characters < 0:
            raise ChatTemplateError(f"the chat template writes more than {_MAX_CHARACTERS} characters")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("_budget")


class _Bounds(jinja2.ext.Extension):
    """Calls that the environment writes into each template, to count what it does."""

    def enter(self, constant: int) -> None:
        """A turn of a loop or a call of a macro, with `constant` characters of text in it."""
        _budget.get().spend(1, constant)

    def write(self, value: Any) -> str:
        """A value that is written, or joined to others by `~`."""
        text = str(value)
        _budget.get().spend(0, len(text))
        return text

    def insert_into(self, tree: jinja2.nodes.Template) -> None:
        for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock))):
            constant = sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
            enter = self.call_method("enter", [jinja2.nodes.Const(constant)])
            node.body.insert(0, jinja2.nodes.ExprStmt(enter, lineno=node.lineno))
        for node in list(tree.find_all((jinja2.nodes.Output, jinja2.nodes.Concat))):
            node.nodes = [part if _is_constant(part) else self.call_method("write", [part]) for part in node.nodes]


def _is_constant(node: jinja2.nodes.Node) -> bool:
    return isinstance(node, jinja2.nodes.TemplateData)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with what a template does counted."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation, _Bounds]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        self.extensions[_Bounds.identifier].insert_into(tree)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            size = _size(left) + _size(right)
        elif operator == "*":
            size = max(_size(left) * _count(right), _size(right) * _count(left))
        else:
            size = abs(_count(left)).bit_length() * abs(_count(right))
        if size > _MAX_CHARACTERS:
            raise ChatTemplateError(f"the chat template makes a value of size {size}")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    """In characters; an item of a list counts as 32."""
    return len(value) if isinstance(value, str) else 32 * len(value) if isinstance(value, list | tuple) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks an assistant's text for training; here it is only its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as the models were trained on: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
