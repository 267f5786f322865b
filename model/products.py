"""Matrices of few bits in a model: how a parameter becomes one, and how it is multiplied.

A parameter [*batch, *inputs, *outputs] is held as a `QArray` [*batch, K, N] of its matrix. The `logical` of a parameter
that is one is a QArray of its fields' logical axes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from kernels.grouped_matmul.quantized import QuantizedGroupedCase
from kernels.grouped_matmul.quantized import choose as choose_grouped
from kernels.quantized_matmul import QuantizedCase, choose, quantized_matmul
from kernels.quantized_matmul.training import HISTORY, ScalingState, fp8_matmul
from kernels.target import Target
from model.execution import Execution
from model.parameter import Creator, Logical, Magnitudes, matrix_axes, split_copies, zeros
from model.rounded import Activations, Rounded, flat_rows
from parallel.sharding import Placement, map_shards
from quantization.qarray import TILE, Layout, QArray, quantize, to_fragments
from quantization.rules import Format, Part

# Logical axes of activations that a weight's axis meets, or makes.
_ACTIVATIONS = {
    "embed": "act_embed",
    "heads": "act_heads",
    "kv_heads": "act_heads",
    "mlp": "act_mlp",
    "vocab": "act_vocab",
    # Experts multiply whole rows of the residual stream, and what each device's part of them makes.
    "expert_embed": "act_embed",
    "expert_mlp": "expert_mlp",
}

# A parameter's last name to that of the matrix it may be a part of: a joined one has one format.
_JOINED = {
    **dict.fromkeys(("query", "key", "value"), "qkv"),
    **dict.fromkeys(("gate", "up"), "gate_up"),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """What matrices are held for: a device kind, an implementation of their products or "auto", and a mesh."""

    target: Target
    impl: str = "auto"
    placement: Placement | None = None

    def local(self, shape: tuple[int, ...], logical: Logical) -> tuple[int, ...]:
        """[K, N] of a device's part of a matrix [K, N], by the logical axes of its parameter."""
        if self.placement is None:
            return shape
        return tuple(size // self.placement.size(axis) for size, axis in zip(shape, _sides(logical), strict=True))

    def settle(self, format: Format, part: Part, shape: tuple[int, ...], grouped: bool) -> tuple[Format, Layout]:
        """The format that a device multiplies a matrix [K, N] in, and the layout that decode reads fastest. `grouped`:
        experts are multiplied by grouped products, not by slots of a capacity."""
        if part != "experts":
            return format, self._layout(format, shape)
        # The TPU kernel of rows as they are takes no groups.
        known = format.activation is not None or self.target.platform != "tpu"
        if grouped and known and self.impl in ("auto", "pallas"):
            layout = "fragments" if format.activation is None else "columns"
            case = QuantizedGroupedCase(
                x_dtype=format.activation or "bfloat16",
                w_dtype=format.values,
                num_rows=1,
                num_groups=1,
                in_dim=shape[0],
                out_dim=shape[1],
                x_block=None if format.activation is None else (1, shape[0]),
                w_block=(format.group or shape[0], 1),
                w_layout=layout,
            )
            if choose_grouped(self.impl, case, self.target)[0] == "pallas":
                return format, layout
        # Dequantised before a product of rows as they are.
        return dataclasses.replace(format, activation=None), "rows"

    def _layout(self, format: Format, shape: tuple[int, ...]) -> Layout:
        if self.target.platform != "gpu":
            return "rows"
        if format.activation is not None:
            # Hopper's FP8 tensor cores read the second operand by columns. XLA transposes one in rows at each call: a
            # product of 8192³ runs at 909 TFLOP/s so, at 1,487 by columns.
            return "columns"
        if any(size % TILE for size in shape):
            return "rows"
        case = QuantizedCase(
            x_dtype="bfloat16",
            w_dtype=format.values,
            num_rows=1,
            in_dim=shape[0],
            out_dim=shape[1],
            x_block=None,
            w_block=(format.group or shape[0], 1),
            w_layout="fragments",
        )
        return "fragments" if choose(self.impl, case, self.target)[0] == "pallas" else "rows"


class Matrix(NamedTuple):
    """A parameter with a format, described: its name (see `ProductRules.keep`), its value and its logical axes."""

    name: str
    format: Format
    value: QArray | jax.ShapeDtypeStruct
    logical: QArray | Logical

    @property
    def is_of_experts(self) -> bool:
        return "/experts/" in self.name

    @property
    def is_dequantized(self) -> bool:
        """Whether it is dequantised at each call, since no product takes it as it is held: see `Storage.settle`."""
        return self.is_of_experts and self.value.layout == "rows"

    def row_parts(self, placement: Placement) -> int:
        """Devices that a row to be multiplied is split over."""
        return placement.size(_ACTIVATIONS[_matrix_logical(self.logical)[0]])

    def case(self, num_rows: int, dtype: str, placement: Placement) -> QuantizedCase:
        """One device's product of `num_rows` rows of `dtype` with its part of the matrix."""
        (in_dim, out_dim), (in_block, out_block) = self.value.shape, self.value.block
        inputs, outputs = (placement.size(_ACTIVATIONS[axis]) for axis in _matrix_logical(self.logical))
        in_dim //= inputs
        return QuantizedCase(
            x_dtype=self.format.activation or dtype,
            w_dtype=self.format.values,
            num_rows=num_rows,
            in_dim=in_dim,
            out_dim=out_dim // outputs,
            x_block=None if self.format.activation is None else (1, in_dim),
            w_block=(min(in_block, in_dim), out_block),
            w_layout=self.value.layout,
            out_dtype=dtype,
        )

    def training_case(self, num_rows: int, dtype: str) -> QuantizedCase:
        """The forward product of `num_rows` rows with the matrix in training."""
        in_dim, out_dim = matrix_shape(self.value.shape, self.logical)[-2:]
        return QuantizedCase(
            x_dtype=self.format.values,
            w_dtype=self.format.values,
            num_rows=num_rows,
            in_dim=in_dim,
            out_dim=out_dim,
            x_block=(num_rows, in_dim),
            w_block=(in_dim, out_dim),
            w_layout="columns",
            out_dtype=dtype,
        )


def part_of(logical: Logical) -> Part | None:
    """What a parameter is a matrix of; None for one that is not multiplied as a matrix."""
    if split_copies(logical)[1] == ("embed", "vocab"):
        return "head"
    if matrix_axes(logical) is None:
        return None
    return "experts" if "experts" in logical else "projection"


def matrix_name(path: tuple[str | int, ...]) -> str:
    """Of the parameter at a path, as `ProductRules.keep` spells it: layers/0/attention/qkv whether joined or not."""
    *parents, last = (str(part) for part in path)
    if parents[:1] == ["prefix"]:
        parents[0] = "layers"
    return "/".join([*parents, _JOINED.get(last, last)])


def matrix_shape(shape: tuple[int, ...], logical: Logical) -> tuple[int, ...]:
    """[*batch, K, N] of a parameter that is a matrix."""
    batch, rows = _axes(logical)
    own = shape[batch:]
    return (*shape[:batch], math.prod(own[:rows]), math.prod(own[rows:]))


def _axes(logical: Logical) -> tuple[int, int]:
    return (split_copies(logical)[0], 1) if part_of(logical) == "head" else matrix_axes(logical)


def quantize_matrix(x: jax.Array, logical: Logical, format: Format) -> QArray:
    """A parameter in the format of its matrix, in rows."""
    matrix = x.reshape(matrix_shape(x.shape, logical))
    return quantize(matrix, format.values, (*[1] * (matrix.ndim - 2), format.group, 1))


def arrange(matrix: QArray, layout: Layout) -> QArray:
    """A matrix in rows in another layout."""
    match layout:
        case "rows":
            return matrix
        case "columns":
            return dataclasses.replace(matrix, values=jnp.swapaxes(matrix.values, -1, -2), layout="columns")
        case "fragments":
            return to_fragments(matrix)


@functools.cache
def placed(fn: Callable[..., QArray], layout: Layout, *shardings: Sharding) -> Callable[..., QArray]:
    """`fn(array, *static)`, whose result has this layout, as a program that places values and scales so."""

    def fields(array: jax.Array | QArray, static: tuple) -> tuple[jax.Array, jax.Array]:
        made = fn(array, *static)
        assert made.layout == layout and made.zero_points is None
        return made.values, made.scales

    program = jax.jit(fields, static_argnums=1, out_shardings=shardings)
    # Waited for: the next array is read only when this one's wide form can be freed.
    return lambda array, *static: QArray(*jax.block_until_ready(program(array, static)), layout=layout)


def _sides(logical: Logical) -> tuple[str | None, str | None]:
    """Logical axes of a matrix's K and N. What was several axes is split as the major one of them is."""
    batch, rows = _axes(logical)
    return logical[batch], logical[batch + rows]


def quantized_logical(logical: Logical, format: Format, layout: Layout) -> QArray:
    """Logical axes of the fields."""
    copies, (inputs, outputs) = logical[: _axes(logical)[0]], _sides(logical)
    values = {"rows": (inputs, outputs), "columns": (outputs, inputs), "fragments": (outputs, inputs, None)}[layout]
    return QArray((*copies, *values), (*copies, None if format.group is None else inputs, outputs), None, layout)


def join_columns(parts: Sequence[QArray]) -> QArray:
    """Matrices in rows, of one input and one format, as one: the outputs of the first one first."""
    assert all(part.layout == "rows" for part in parts)
    fields = [[part.values for part in parts], [part.scales for part in parts]]
    return QArray(*(jnp.concatenate(field, axis=-1) for field in fields)).check()


def stored_bytes(tree: object) -> int:
    """Bytes of the arrays of a tree, or of their descriptions: two int4 are one."""
    bits = sum(math.prod(leaf.shape) * element_bits(leaf.dtype) for leaf in jax.tree.leaves(tree))
    return bits // 8


def element_bits(dtype) -> int:
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8 * jnp.dtype(dtype).itemsize


def whole(kernel: nnx.Param, dtype) -> jax.Array:
    """A kernel's values in `dtype`, dequantised where it is held quantised: for products that take no other."""
    value = kernel.get_value()
    return value.dequantize(dtype) if isinstance(value, QArray) else kernel[...].astype(dtype)


def grouped_operand(kernel: nnx.Param, dtype) -> jax.Array | QArray:
    """Experts' kernels as their grouped product takes them: as they are held where that is for one, else whole."""
    value = kernel.get_value()
    return value if isinstance(value, QArray) and value.layout != "rows" else whole(kernel, dtype)


def magnitudes_of(create: Creator, *names: str) -> nnx.Dict:
    """`Magnitudes` of the products with a module's parameters, by their names; empty where scales are of the step."""
    if not create.delayed:
        return nnx.Dict({})
    scope, shape = create.scope("magnitudes"), (len(dataclasses.fields(ScalingState)), HISTORY)
    axes = (None,) * len(shape)
    return nnx.Dict({name: scope(name, shape, axes, zeros, dtype="float32", kind=Magnitudes) for name in names})


def multiply_rounded(
    x: jax.Array, weight: jax.Array, inputs: int, execution: Execution, magnitudes: Magnitudes | None
) -> jax.Array:
    """The last `inputs` axes of x contracted with the first ones of a weight in training: both rounded to FP8, and the
    gradients too, with scales by `magnitudes`, or by the arrays themselves where None.

    A program of all devices (GSPMD) splits it, so that an array has one scale over all of them.
    """
    flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
    matrix = weight.reshape(flat.shape[-1], -1)
    state = None if magnitudes is None else ScalingState(*magnitudes[...])
    y = fp8_matmul(flat, matrix, state, impl=execution.quantized_matmul, target=execution.target)
    return y.reshape(*flat.shape[:-1], *weight.shape[inputs:])


def multiply(
    x: Activations, kernel: nnx.Param, bias: jax.Array | None, execution: Execution, out_dtype=None
) -> jax.Array:
    """x [B, T, K] times the matrix of a parameter that is held quantised: [B, T, N] in `out_dtype`, x's where None.

    Sharded, each device multiplies its part of the matrix. Where K is split x has scales for each device's part of a
    row, and the parts are summed in float32.
    """
    format, logical = kernel.get_metadata("format"), kernel.get_metadata("logical")
    placement = execution.placement
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    inputs, outputs = (_ACTIVATIONS[axis] for axis in _matrix_logical(logical))
    split = () if placement is None else placement.axes(inputs)

    rounded = isinstance(x, Rounded)
    assert not rounded or x.quantized.dtype == format.activation, f"rows of {x.quantized.dtype} for {format}"

    def local(x, w, bias):
        y = quantized_matmul(
            flat_rows(x) if rounded else x,
            w,
            activation=None if rounded else format.activation,
            bias=None if split else bias,
            out_dtype=jnp.float32 if split else out_dtype,
            impl=execution.quantized_matmul,
            target=execution.target,
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        if not split:
            return y
        y = jax.lax.psum(y, split)
        return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)

    rows = ("batch", "sequence")
    given = QArray((*rows, inputs), (*rows, inputs)) if rounded else (*rows, inputs)
    run = map_shards(local, placement, (given, logical, (outputs,)), (*rows, outputs))
    return run(x.quantized if rounded else x, kernel.get_value(), None if bias is None else bias.reshape(-1))


def _matrix_logical(logical: QArray) -> Logical:
    """Logical axes of K and N."""
    own = split_copies(logical.values)[1]
    return own if logical.layout == "rows" else (own[1], own[0])
