"""Checks of the fields of a JSON body: a value of the right kind comes back, another one is a `BadRequest`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[str, Any], Any]
"""(name of the field, its value, never None) -> the value as it is used."""

SHOWN = 80
"""Characters of a wrong value that an error repeats."""


class BadRequest(ValueError):
    """What a client got wrong: `param` is the field to change, `status` the HTTP status."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def wrong(name: str, value: Any, required: str) -> BadRequest:
    shown = json.dumps(value, ensure_ascii=True, default=str)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
    return BadRequest(f"{name}={shown} must be {required}", name)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def number(name: str, value: Any) -> float:
    """A finite number; its range is `SamplingParams`' to say."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, value, "a number")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise wrong(name, value, "a finite number")
    return converted


def integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, value, "an integer")
        if not low <= value <= high:
            raise wrong(name, value, f"an integer from {low} to {high}")
        return value

    return check


def one_of(*allowed: Any) -> Check:
    def check(name: str, value: Any) -> Any:
        # By identity of type too: 1 is no true, and an object can't be looked up.
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise wrong(name, value, " or ".join(json.dumps(option) for option in allowed))
        return value

    return check


def refused(reason: str) -> Check:
    """A field that is known and not served."""

    def check(name: str, value: Any) -> Any:
        raise BadRequest(f"{name} is not supported: {reason}", name, code="unsupported_parameter")

    return check


def checked(body: Any, checks: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """The fields of an object that have a value, checked; null is the same as leaving a field out.

    `where` is the object's own name, "" for the body. A field without a check is refused by its name.
    """
    if not isinstance(body, dict):
        raise wrong(where, body, "an object") if where else BadRequest("the body must be a JSON object")
    fields = {}
    for key, value in body.items():
        name = f"{where}.{key}" if where else key
        if key not in checks:
            raise BadRequest(
                f"{name[:SHOWN]} is not a field that this server knows", name[:SHOWN], code="unknown_field"
            )
        if value is not None:
            fields[key] = checks[key](name, value)
    return fields


def required(fields: Mapping[str, Any], name: str, where: str = "") -> Any:
    full = f"{where}.{name}" if where else name
    if name not in fields:
        raise BadRequest(f"{full} is required", full, code="missing_field")
    return fields[name]


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Refuses what Python's parser lets through: NaN, a name twice, lone surrogates."""
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadRequest("the body must be a JSON object")
    # A surrogate can only come from an escape: UTF-8 has none.
    if b"\\ud" in body or b"\\uD" in body:
        for name, value in parsed.items():
            _require_unicode(name, value)
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)[:SHOWN]
        raise BadRequest(f"{twice!r} is given twice in one object", twice)
    return result


def _no_constant(name: str) -> Any:
    raise BadRequest(f"the body is not valid JSON: {name} is no number of JSON")


def _require_unicode(name: str, value: Any) -> None:
    try:
        json.dumps([name, value], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = name.encode("ascii", "backslashreplace").decode()
        raise BadRequest(f"{shown} has a lone surrogate (\\ud800 to \\udfff), which is no text", shown) from error
