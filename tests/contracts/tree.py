"""What the contracts read: the files of the checkout and their syntax trees."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "benchmarks",
    "checkpoint",
    "configs",
    "data",
    "kernels",
    "launch",
    "model",
    "parallel",
    "perf",
    "quantization",
    "serving",
    "training",
)
ENTRY_POINTS = ("train", "serve")


def product_files() -> list[Path]:
    """Every Python file of ours that is not a test."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return files + [path for name in ENTRY_POINTS if (path := ROOT / f"{name}.py").exists()]


def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").rglob("*.py"))


def repository_files() -> list[Path]:
    """Files that git tracks, and new ones that it does not ignore."""
    # safe.directory: the tests may run as another user than the one who cloned.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def module_name(path: Path) -> str:
    """Dotted name of a file of ours: model/config.py is model.config, model/__init__.py is model."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def called_name(call: ast.Call) -> str:
    """Last part of what is called: psum for jax.lax.psum(...); "" if it has no name."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def strings_in(node: ast.AST) -> Iterator[ast.Constant]:
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child
