"""Which of a model's matrices are held in few bits, in what format, and which stay as they are."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Literal

Products = Literal["compute", "fp8", "int8", "w8", "w4"]

Part = Literal["projection", "experts", "head"]
"""What a matrix belongs to: attention or a dense feed-forward; routed experts; the projection to logits."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a matrix [K, N] is held and multiplied.

    Attributes:
      name: as a setting spells it.
      values: dtype of its elements.
      group: elements along K that share a scale; None for all of K. A column never shares one with another.
      activation: what the other operand is quantised to, with a scale for each of its rows; None leaves it as it is.
    """

    name: str
    values: str
    group: int | None = None
    activation: str | None = None

    def __str__(self) -> str:
        scales = "a scale per column" if self.group is None else f"a scale per {self.group} inputs of a column"
        other = "" if self.activation is None else f", times {self.activation} with a scale per row"
        return f"{self.values} with {scales}{other}"


_FORMATS = {
    "fp8": Format("fp8", "float8_e4m3fn", activation="float8_e4m3fn"),
    "int8": Format("int8", "int8", activation="int8"),
    "w8": Format("w8", "int8"),
    "w4": Format("w4", "int4", group=128),
}

GROUPS = (128, 64, 32)
"""Lengths of a group of int4: the longest that divides K is taken."""


@dataclasses.dataclass(frozen=True)
class ProductRules:
    """In what numbers a model's matrices are held and multiplied. Embeddings, norms, biases and routers stay in the
    compute dtype: they have few elements, or choose between experts."""

    products: Products = "compute"
    """Of attention, feed-forward and experts. w8, w4: int8 and int4 weights, activations as they are. int8, fp8:
    weights of 8 bits, and activations quantised to the same as they come. compute: nothing is quantised."""
    head: Literal["compute", "w8"] = "compute"
    """Of the projection to logits, where it is no embedding too. An error there is one of the answer itself; w8 halves
    its bytes: a decode step of llama3-8b with w4 reads a ninth less."""
    keep: tuple[str, ...] = ()
    """Matrices that stay in the compute dtype, by patterns such as layers/0/* or */mlp/down."""
    group: Literal[128, 64, 32] = 128
    """w4: inputs of a column that share a scale, at most. Scales take 6% of the bytes with 128 and 20% with 32, and
    small models need the shorter ones."""

    def covers(self, part: Part | None) -> bool:
        """Whether matrices of a part have a format, unless they are kept."""
        return part is not None and self._chosen(part) != "compute"

    def format_of(self, name: str, part: Part | None, in_dim: int) -> Format | None:
        """Of the matrix `name`, of whose rows a device has `in_dim`; None where it stays as it is.

        Raises ValueError where no length of a group divides `in_dim`.
        """
        if not self.covers(part) or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep):
            return None
        found = _FORMATS[self._chosen(part)]
        if found.group is None:
            return found
        lengths = [length for length in GROUPS if length <= self.group]
        group = next((length for length in lengths if in_dim % length == 0), None)
        if group is None:
            raise ValueError(
                f"precision.products={self.products} has groups of {', '.join(map(str, lengths))} inputs, and {name} "
                f"has {in_dim} on a device; choose w8, or keep it by precision.keep={name}"
            )
        return dataclasses.replace(found, group=group)

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError for a pattern that keeps none of the matrices `names`."""
        names = sorted(names)
        for pattern in self.keep:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"precision.keep={pattern} matches no matrix that would be quantised; they are "
                    f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                )

    def _chosen(self, part: Part) -> Products:
        return self.head if part == "head" else self.products
