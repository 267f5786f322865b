"""Runs by name: configs/NAME.py (dashes become underscores) gives `train()` and, where it can be served, `serve()`."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Every config, as the command line spells it."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Module of a config. Raises ValueError for an unknown name, listing the known ones."""
    if name not in names():
        raise ValueError(f"unknown config {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def listing(use: str) -> str:
    """A line for each config that has the function `use` ("train" or "serve"): its name and what it is."""
    modules = [(name, load(name)) for name in names()]
    known = [(name, (m.__doc__ or "").strip().splitlines()[0]) for name, m in modules if hasattr(m, use)]
    width = max(len(name) for name, _ in known)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in known)
