"""`--help` explains every setting: its text is the line below the field."""

import ast
import dataclasses
import importlib
import inspect
import typing

import pytest

from serving.config import ServeRun
from training.config import TrainRun


def dataclasses_below(kind: type) -> dict[str, type]:
    found = {kind.__name__: kind}
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and part.__name__ not in found:
                found |= dataclasses_below(part)
    return found


SETTINGS = dataclasses_below(TrainRun) | dataclasses_below(ServeRun)


def undocumented(source: str) -> list[str]:
    (kind,) = ast.parse(source).body
    missing = []
    for field, below in zip(kind.body, [*kind.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            text = below.value if isinstance(below, ast.Expr) else None
            if not (isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.strip()):
                missing.append(field.target.id)
    return missing


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_explained(name):
    kind = SETTINGS[name]
    importlib.import_module(kind.__module__)
    assert undocumented(inspect.getsource(kind)) == []


def test_the_check_can_fail():
    assert undocumented("class A:\n    x: int = 1\n    y: int = 2\n    'text'\n") == ["x"]
