"""A pytree as a flat dictionary of named leaves, so that what lies on disk knows no Python class."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

SEPARATOR = "/"


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)


def named_leaves(tree: Any) -> tuple[dict[str, Any], jax.tree_util.PyTreeDef]:
    """Leaves of `tree` by path, such as `params/blocks/0/attention/query/kernel`, in the order of the treedef.

    An `nnx.Variable` adds nothing to the path: a state of Params and a dictionary of their arrays have the same names.
    Raises ValueError when two leaves get the same name.
    """
    leaves: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]:
        inner = jax.tree_util.tree_flatten_with_path(node)[0]
        for key, leaf in inner:
            # The first key below a Variable is the attribute that holds its value, whose spelling is flax's own.
            name = _name(path + key[1:] if _is_variable(node) else path)
            if name in leaves:
                raise ValueError(f"two leaves of the state are both named {name!r}; rename one of the keys")
            leaves[name] = leaf
    return leaves, jax.tree_util.tree_structure(tree)


def under(prefix: str, names: list[str]) -> dict[str, str]:
    """Full name of each name below `prefix` (the empty string names the whole tree, and an empty name `prefix`)."""
    return {name: SEPARATOR.join(part for part in (prefix, name) if part) for name in names}
