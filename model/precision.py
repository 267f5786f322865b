"""Number formats of a run, in one place: the model names no dtype of its own except where fp32 is required."""

from __future__ import annotations

import dataclasses
from typing import Literal

from quantization.rules import Products

Float = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of parameters and arithmetic. Matrix products always accumulate in float32."""

    param: Float = "float32"
    """Stored parameters, the optimizer's master copy."""
    compute: Float = "bfloat16"
    """Activations and the operands of matrix products."""
    gradient: Float = "float32"
    """Gradients as summed over microbatches and given to the optimizer: `param` or `compute`. A product's gradient,
    and its sum over devices, has `compute` precision either way, since its operands do."""
    products: Products = "compute"
    """Operands of the products of attention's and feed-forwards' matrices. fp8: e4m3 forward and e5m2 for gradients,
    a scale for each array; experts, head and router stay in `compute`."""
    scaling: Literal["current", "delayed"] = "current"
    """fp8: by an array's largest element now, or in the last 16 steps, so that rounding it needs no pass before; what
    is larger saturates."""

    def __post_init__(self) -> None:
        if self.gradient not in (self.param, self.compute):
            raise ValueError(
                f"precision.gradient={self.gradient} must be precision.param={self.param} "
                f"or precision.compute={self.compute}"
            )
        if self.products not in ("compute", "fp8"):
            raise ValueError(
                f"precision.products={self.products} is a format of weights that are served: training has gradients "
                "with respect to parameters in precision.param, and int8 has too few magnitudes for them; choose "
                "compute or fp8"
            )
        if self.scaling == "delayed" and self.products != "fp8":
            raise ValueError(
                f"precision.scaling=delayed is of products in few bits, and precision.products={self.products}; set "
                "precision.products to fp8, or precision.scaling to current"
            )
