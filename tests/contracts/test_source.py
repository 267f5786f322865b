"""House rules that a reader of the syntax tree can hold."""

import ast
from collections.abc import Iterator

import pytest

from parallel.mesh import MESH_AXES
from tests.contracts.tree import ROOT, called_name, files_of_tests, parse, product_files, strings_in, where

# Modules that read the environment, and what for.
READS_ENVIRONMENT = {
    "parallel/distributed.py": "the launcher's own variables, in initialize()",
    "parallel/topology.py": "none: it sets libtpu's, in tpu_devices()",
}

# Modules that may catch everything, and why.
CATCHES_EVERYTHING = {
    "serving/engine.py": "whatever one request brings about, in its step or its listener, must not end the others",
}

# Mesh axes whose names mean nothing else here; the others ("data", "context", ...) are also plain words.
ONLY_MESH_AXES = ("fsdp", "stage")

# Calls whose string arguments are mesh axes.
TAKES_MESH_AXES = {
    "all_gather",
    "all_to_all",
    "axis_index",
    "axis_size",
    "Mesh",
    "make_mesh",
    "P",
    "PartitionSpec",
    "pbroadcast",
    "pcast",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "psum",
    "psum_scatter",
    "pvary",
    "ragged_all_to_all",
    "shard_map",
}
AXIS_KEYWORDS = {"axis_name", "axis_names", "mesh_axis", "mesh_axes"}


def environment_reads(tree: ast.Module) -> Iterator[ast.AST]:
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in names:
                yield node
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            yield node


def broad_handlers(tree: ast.Module) -> Iterator[ast.AST]:
    """`except:`, `except Exception`, `except BaseException`, and `suppress` of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None or _names_broad(node.type):
                yield node
        elif isinstance(node, ast.Call) and called_name(node) == "suppress" and any(map(_names_broad, node.args)):
            yield node


def _names_broad(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id in ("Exception", "BaseException") for n in ast.walk(node))


def interpreted_kernels(tree: ast.Module) -> Iterator[ast.AST]:
    """`interpret=True` given to a call, as a default of a parameter, or assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "interpret" and _is_true(node.value):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.Lambda):
            positional = [*node.args.posonlyargs, *node.args.args]
            defaults = list(zip(positional[::-1], node.args.defaults[::-1], strict=False))
            defaults += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for argument, default in defaults:
                if argument.arg == "interpret" and default is not None and _is_true(default):
                    yield default
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_true(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "interpret" for target in targets):
                yield node


def _is_true(node: ast.AST) -> bool:
    # pltpu.InterpretParams() is the other way to ask for it.
    if isinstance(node, ast.Call):
        return "Interpret" in called_name(node)
    return isinstance(node, ast.Constant) and node.value is True


def defaulted_getattr(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called_name(node) == "getattr" and len(node.args) == 3:
            yield node


def mesh_axis_literals(tree: ast.Module) -> Iterator[ast.AST]:
    """String constants that name a mesh axis: anywhere if the word means nothing else, else where an axis is meant.

    That is in the arguments of a collective, a PartitionSpec or a mesh, in a keyword for axes, in `mesh.shape[...]`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ONLY_MESH_AXES:
            yield node
        elif isinstance(node, ast.Call) and called_name(node) in TAKES_MESH_AXES:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                yield from _axes_in(argument)
        elif isinstance(node, ast.keyword) and node.arg in AXIS_KEYWORDS:
            yield from _axes_in(node.value)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            yield from _axes_in(node.slice)


def _axes_in(node: ast.AST) -> Iterator[ast.AST]:
    return (constant for constant in strings_in(node) if constant.value in MESH_AXES)


def found(rule, files) -> list[str]:
    return sorted({where(path, node) for path in files for node in rule(parse(path))})


def outside(*packages: str) -> list:
    return [path for path in product_files() if path.relative_to(ROOT).parts[0] not in packages]


def test_only_the_listed_modules_read_the_environment():
    reading = {place.split(":")[0] for place in found(environment_reads, product_files())}
    assert reading == set(READS_ENVIRONMENT)


def test_no_handler_catches_everything():
    catching = {place.split(":")[0] for place in found(broad_handlers, [*product_files(), *files_of_tests()])}
    assert catching == set(CATCHES_EVERYTHING)


def test_kernels_are_interpreted_in_tests_only():
    assert not found(interpreted_kernels, product_files())


def test_no_attribute_has_a_silent_default():
    assert not found(defaulted_getattr, product_files())


def test_only_parallel_spells_mesh_axis_names():
    # Benchmarks state the mesh that they measure.
    assert not found(mesh_axis_literals, outside("parallel", "benchmarks"))


@pytest.mark.parametrize(
    ("rule", "source", "count"),
    [
        (environment_reads, "import os\nos.environ['A']\nos.getenv('B')", 2),
        (environment_reads, "from os import environ, path", 1),
        (environment_reads, "import os\nos.path.exists('environ')", 0),
        (broad_handlers, "try:\n    f()\nexcept:\n    pass", 1),
        (broad_handlers, "try:\n    f()\nexcept (ValueError, Exception):\n    pass", 1),
        (broad_handlers, "with contextlib.suppress(BaseException):\n    f()", 1),
        (broad_handlers, "try:\n    f()\nexcept (OSError, MyException):\n    pass", 0),
        (interpreted_kernels, "pl.pallas_call(body, interpret=True)(x)", 1),
        (interpreted_kernels, "pl.pallas_call(body, interpret=pltpu.InterpretParams())(x)", 1),
        (interpreted_kernels, "def f(x, interpret: bool = True): pass\ndef g(x, *, interpret=True): pass", 2),
        (interpreted_kernels, "interpret = True", 1),
        (interpreted_kernels, "def f(x=True, *, interpret=False): g(x, interpret=interpret)", 0),
        (defaulted_getattr, "getattr(config, 'x', 8)\ngetattr(config, 'x')", 1),
        (mesh_axis_literals, "jax.lax.psum(x, 'data')", 1),
        (mesh_axis_literals, "jax.lax.psum(x, ('data', 'expert'))", 2),
        (mesh_axis_literals, "jax.lax.all_gather(x, axis_name='tensor')", 2),
        (mesh_axis_literals, "PartitionSpec(None, 'tensor')", 1),
        (mesh_axis_literals, "placement.mesh.shape['expert']", 1),
        (mesh_axis_literals, "axes = ['fsdp']", 1),
        (mesh_axis_literals, "manifest['data']; x.context; MeshConfig(data=2, fsdp=4)", 0),
        (mesh_axis_literals, "'''data over fsdp'''\nplacement.sharding('batch', 'experts')", 0),
    ],
)
def test_each_rule_can_fail(rule, source, count):
    assert len(list(rule(ast.parse(source)))) == count
