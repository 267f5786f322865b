"""Who may import whom: a module imports only what stands in its package's row, inside functions too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.tree import ENTRY_POINTS, PACKAGES, ROOT, called_name, module_name, parse, product_files, where

OURS = {*PACKAGES, *ENTRY_POINTS, "tests"}

# A row allows whole packages ("model") or single modules ("model.config"). Its own package is always allowed.
ROWS: dict[str, tuple[str, ...]] = {
    # The array type that operators of few-bit numbers take.
    "kernels": ("quantization.qarray",),
    "parallel": (),
    "quantization": ("kernels",),
    "model": ("parallel", "kernels", "quantization"),
    "perf": ("model.config",),
    "data": ("parallel",),
    "checkpoint": ("parallel", "model", "quantization"),
    "training": (
        "parallel",
        "kernels.adamw",
        "kernels.cross_entropy",
        "kernels.target",
        "model",
        "quantization",
        "data",
        "checkpoint",
        "perf",
    ),
    "serving": ("parallel", "model", "quantization", "checkpoint", "perf"),
    # Data only: the modules that define a run's dataclasses.
    "configs": (
        "model.config",
        "model.precision",
        "data.config",
        "checkpoint.config",
        "training.config",
        "training.optimizer",
        "training.schedule",
        "serving.config",
        "parallel.mesh",
        "parallel.sharding",
        "parallel.distributed",
        "quantization.rules",
    ),
    "launch": ("configs", "training.config", "serving.config", "parallel.distributed"),
    # Entry points wire their own side, and start the processes.
    "train": ("configs", "training", "parallel"),
    "serve": ("configs", "serving", "parallel"),
    # Measures everything; nothing imports it.
    "benchmarks": tuple(name for name in (*PACKAGES, *ENTRY_POINTS) if name != "benchmarks"),
}

# An entry point inside a package has a row of its own, and is imported by nothing outside of it. A command compiles and
# runs what train.py and serve.py would.
ENTRY_ROWS: dict[str, tuple[str, ...]] = {
    "perf.commands": ("perf", "configs", "parallel", "model", "checkpoint", "training", "serving"),
}

# Plain Python over ints: a scheduler step must not wait for a device.
NO_ARRAYS = ("serving/scheduler.py", "serving/pages.py", "serving/request.py")


def imports(tree: ast.Module, module: str, is_package: bool = False) -> Iterator[tuple[ast.AST, str]]:
    """Dotted names that a module imports anywhere in its text, through `importlib` too where the name is constant.

    `from model import config` gives both model and model.config: only the second is asked of the row if it is a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") + (["__init__"] if is_package else [])
                base = ".".join(filter(None, [*parts[: len(parts) - node.level], base]))
            for alias in node.names:
                submodule = f"{base}.{alias.name}" if base else alias.name
                yield node, submodule if _is_module(submodule) else base
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node, node.args[0].value
            elif isinstance(node.args[0], ast.JoinedStr) and isinstance(node.args[0].values[0], ast.Constant):
                yield node, node.args[0].values[0].value.rstrip(".")


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def forbidden(tree: ast.Module, module: str, is_package: bool = False) -> list[tuple[ast.AST, str]]:
    package = module.split(".")[0]
    entry = next((row for row in ENTRY_ROWS if _inside(module, row)), None)
    allowed = (package, *ROWS[package]) if entry is None else (entry, *ENTRY_ROWS[entry])
    return [
        (node, name)
        for node, name in imports(tree, module, is_package)
        if name.split(".")[0] in OURS
        and (
            not any(_inside(name, row) for row in allowed)
            or any(_inside(name, row) for row in ENTRY_ROWS if row != entry)
        )
    ]


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_package_has_a_row():
    assert set(ROWS) == OURS - {"tests"}


def test_modules_import_only_what_their_row_allows():
    wrong = [
        f"{where(path, node)}: {module_name(path)} imports {name}"
        for path in product_files()
        for node, name in forbidden(parse(path), module_name(path), path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize(
    ("module", "source", "names"),
    [
        ("model.moe", "import training.loop", ["training.loop"]),
        ("model.moe", "def f():\n    from training import loss", ["training.loss"]),
        ("parallel.mesh", "from model.config import ModelConfig", ["model.config"]),
        ("perf.flops", "from model.config import ModelConfig\nfrom model import config", []),
        ("perf.flops", "from model import attention", ["model.attention"]),
        ("perf.flops", "from model import nothing_of_that_name", ["model"]),
        ("perf.commands.roofline", "import configs, perf.flops, training.loop, kernels.hopper", ["kernels.hopper"]),
        ("perf.flops", "import configs, perf.commands.roofline", ["configs", "perf.commands.roofline"]),
        ("training.loop", "from perf.commands import roofline", ["perf.commands.roofline"]),
        ("kernels.attention.xla", "from ..target import Target\nfrom .reference import attention", []),
        ("kernels.attention.xla", "from ... import parallel", ["parallel"]),
        ("serving.engine", "import importlib\nimportlib.import_module('training.loop')", ["training.loop"]),
        ("model.moe", "import importlib\nimportlib.import_module(f'configs.{name}')", ["configs"]),
        ("train", "import configs, parallel.distributed, training.loop, data", ["data"]),
        ("data.loader", "import tests.conftest, numpy", ["tests.conftest"]),
        ("configs.quickstart", "from parallel.mesh import MeshConfig\nimport training.loop", ["training.loop"]),
    ],
)
def test_the_reader_sees_each_kind_of_import(module, source, names):
    assert [name for _, name in forbidden(ast.parse(source), module)] == names


def test_the_scheduler_knows_no_arrays():
    wrong = [
        f"{where(path, node)}: imports {name}"
        for path in (ROOT / name for name in NO_ARRAYS)
        if path.exists()
        for node, name in imports(parse(path), module_name(path))
        if name.split(".")[0] in ("jax", "jaxlib", "numpy", "flax")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_a_regular_one():
    """A directory without __init__.py would lose to an installed package of the same name."""
    missing = {
        str(path.parent.relative_to(ROOT))
        for path in product_files()
        if path.parent != ROOT and not (path.parent / "__init__.py").is_file()
    }
    assert not missing


def test_kernels_has_a_version():
    """A Hugging Face package is also called `kernels`, and `transformers` asks ours for its version."""
    import kernels

    assert kernels.__version__ == "0.0.0"


def test_importing_everything_touches_no_device():
    modules = [module_name(path) for path in product_files()]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge.backends_are_initialized(), f'importing {name} touches a device'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_module_names():
    assert module_name(ROOT / "model" / "config.py") == "model.config"
    assert module_name(ROOT / "model" / "__init__.py") == "model"
    assert module_name(Path(ROOT / "train.py")) == "train"
