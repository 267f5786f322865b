"""Parameters as files have them to those of a definition: quantised, joined and laid out, one array at a time, so that
a model is never whole in its wide form."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from model.parameter import Place
from model.products import arrange, join_columns, placed, quantize_matrix, quantized_logical
from model.transformer import Convert, Definition, Tree
from quantization.qarray import QArray


def converter(definition: Definition, place: Place) -> Convert:
    """Makes parameters of `definition.plain` into those that `assemble` takes, each as soon as it is there."""
    before, after = definition.plain.parameters, dataclasses.replace(definition, joined=False).parameters

    def convert(path: tuple[str | int, ...], array: jax.Array) -> jax.Array | QArray:
        if not isinstance(after[path].get_value(), QArray):
            return array
        logical, format = before[path].get_metadata("logical"), after[path].get_metadata("format")
        fields = quantized_logical(logical, format, "rows")
        return placed(quantize_matrix, "rows", place(fields.values), place(fields.scales))(array, logical, format)

    return convert


def assemble(definition: Definition, params: Tree, place: Place) -> Tree:
    """`params` of a definition from what a `converter` made: joined, and in their layouts, one after another. The tree
    given is changed, so that nothing is held twice."""
    params = join_projections(params) if definition.joined else params
    described = definition.parameters
    for path in list(traverse_util.flatten_dict(params)):
        node = functools.reduce(dict.__getitem__, path[:-1], params)
        matrix, logical = node[path[-1]], described[path].get_metadata("logical")
        if isinstance(matrix, QArray) and logical.layout != matrix.layout:
            program = placed(arrange, logical.layout, place(logical.values), place(logical.scales))
            node[path[-1]] = program(matrix, logical.layout)
    return params


def join_projections(params: Tree) -> Tree:
    """`params` of unrolled layers as those of a definition that is `joined`. The arrays of each layer may be freed once
    the ones joined of them are there: the tree given is emptied of them."""
    for layer in params["prefix"].values():
        attention, mlp = layer["attention"], layer["mlp"]
        _join(attention, "qkv", ("query", "key", "value"), axis=-2)
        # A layer of experts may have a shared one beside them, which is dense.
        for dense in (mlp, mlp.get("shared", {})):
            if "gate" in dense:
                _join(dense, "gate_up", ("gate", "up"), axis=-1)
    return params


def _join(tree: Tree, name: str, parts: tuple[str, ...], axis: int) -> None:
    """The kernels `parts` of a module as one along `axis`, and their biases where it has them."""
    for suffix in ("", "_bias"):
        if parts[0] + suffix in tree:
            found = [tree.pop(part + suffix) for part in parts]
            if isinstance(found[0], QArray):
                tree[name + suffix] = join_columns(found)
            else:
                tree[name + suffix] = jnp.concatenate(found, axis=axis)
