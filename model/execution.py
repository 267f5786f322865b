"""How a forward pass runs: everything that may change without changing the model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kernels.target import Target
from model.precision import Precision
from parallel.sharding import Placement

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static argument of the forward pass. `attention`, `paged_attention` and `grouped_matmul` are concrete kernel
    implementations, the first one for each entry of the model's `window_pattern`; `paged_attention`,
    `quantized_matmul`, `quantized_activations`, `norm` and `dispatch` may be "auto", since prefill and decode take
    different ones.

    `remat` is what the backward pass recomputes in each layer: nothing, everything but matrix products without a
    batch dimension (`dots`), or the whole layer from its input (`full`).
    """

    precision: Precision = dataclasses.field(default_factory=Precision)
    placement: Placement | None = None
    attention: tuple[str, ...] = ("xla",)
    paged_attention: str = "xla"
    grouped_matmul: str = "ragged_dot"
    quantized_matmul: str = "auto"
    quantized_activations: str = "auto"
    norm: str = "auto"
    dispatch: str = "auto"
    target: Target | None = None
    """Device kind of the kernels; None for the default device's."""
    remat: Remat = "none"
    check_finite: bool = False
    """Also return, per layer, whether its output is finite (the diagnosis after a non-finite loss)."""
