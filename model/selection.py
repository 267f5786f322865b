"""Which kernel implementations a model runs with: decided once, before anything is compiled, with the reasons."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from kernels import attention as attention_op
from kernels import dispatch as dispatch_op
from kernels import grouped_matmul as grouped_op
from kernels import norm as norm_op
from kernels import paged_attention as paged_op
from kernels import quantized_matmul as quantized_op
from kernels.attention import xla as attention_xla
from kernels.dispatch import DispatchCase
from kernels.norm import NormCase
from kernels.quantized_matmul import activations as activations_op
from kernels.quantized_matmul.activations import ActivationCase
from kernels.quantized_matmul.training import HISTORY
from kernels.target import Target, target_of
from model.products import Matrix
from model.rounded import made_by
from model.transformer import Definition
from parallel.sharding import Placement
from quantization.rules import Format


class Selection(NamedTuple):
    """Concrete implementations (see `Execution`), and a line for the log about each decision."""

    attention: tuple[str, ...]
    grouped_matmul: str
    quantized_matmul: str
    reasons: tuple[str, ...]
    target: Target

    def query_block(self, sequence_length: int) -> int | None:
        """Queries that share a range of computed keys in XLA's attention; None where no layer uses it."""
        return attention_xla.block_length(sequence_length) if "xla" in self.attention else None


def select_kernels(
    definition: Definition,
    *,
    attention: str,
    grouped_matmul: str,
    quantized_matmul: str,
    norm: str,
    dispatch: str,
    dtype: str,
    rows: int,
    sequence_length: int,
    segments: bool,
    placement: Placement,
    device: jax.Device,
) -> Selection:
    """Implementations for batches of `rows` rows of `sequence_length` tokens over all devices of `placement`.

    The first five arguments are "auto" or a name. Raises ValueError for a named one that can't run.
    """
    config, target = definition.config, target_of(device)
    chosen, reasons = [], []
    for window in config.window_pattern:
        case = attention_op.AttentionCase(
            dtype=dtype,
            query_length=sequence_length,
            kv_length=sequence_length,
            num_heads=config.num_heads // placement.size("act_heads"),
            num_kv_heads=config.num_kv_heads // placement.size("act_heads"),
            key_dim=config.head_dim,
            value_dim=config.head_dim,
            causal=True,
            window=window,
            segments=segments,
            soft_cap=config.attention_soft_cap is not None,
            sinks=config.attention_sinks,
            gradient=True,
        )
        impl, reason = attention_op.choose(attention, case, target)
        chosen.append(impl)
        layers = "" if len(set(config.window_pattern)) == 1 else f" (window {window})"
        reasons.append(f"attention{layers}: {impl}, {reason}")
    tokens = rows * sequence_length // placement.size("batch")
    grouped, reason = _select_grouped(config, grouped_matmul, dtype, tokens, placement, target)
    if config.moe is not None and config.moe.dispatch == "dropless":
        reasons.append(f"grouped product: {grouped}, {reason}")
        reasons += _select_dispatch(config, dispatch, dtype, tokens, placement, target)
    elif dispatch == "pallas":
        raise ValueError(
            "kernels.dispatch='pallas' can't run: it is for experts with model.moe.dispatch='dropless', and the model "
            "has none; set it to 'auto' or 'xla'"
        )
    if config.norm_placement != "post":
        # Layers choose by themselves, the same but for how many read a norm.
        case = NormCase(dtype, tokens // placement.size("sequence"), config.embed_dim, added=True)
        reasons.append("residual sums and their norms: {}, {}".format(*norm_op.choose(norm, case, target)))
    quantized, lines = _select_rounded(definition, quantized_matmul, dtype, tokens, placement, target)
    return Selection(tuple(chosen), grouped, quantized, tuple(dict.fromkeys([*reasons, *lines])), target)


def _select_rounded(definition, impl, dtype, tokens, placement, target) -> tuple[str, list[str]]:
    """Implementation of training's FP8 products, and lines about them."""
    matrices = definition.matrices
    if not matrices:
        return "xla", []
    kinds = ", ".join(dict.fromkeys(matrix.name.rsplit("/", 1)[-1] for matrix in matrices))
    when = f"in the last {HISTORY} steps" if definition.delayed else "now"
    experts = (
        "" if definition.config.moe is None else f"; experts stay in {dtype}: grouped products have no gradients in FP8"
    )
    lines = [
        f"precision {matrices[0].format.name}: products of {kinds} are of e4m3, their gradients of e5m2, with a scale "
        f"for each array by its largest element {when}{experts}. Utilisations are shares of the {dtype} peak"
    ]
    if placement.mesh.size > 1:
        if impl not in ("auto", "xla"):
            raise ValueError(
                f"kernels.quantized_matmul={impl} runs on one device, and the mesh has {placement.mesh.size}: XLA "
                "splits training's FP8 products; set it to auto or xla"
            )
        return "xla", [*lines, "FP8 products: xla, which splits them over devices"]
    found: dict[str, str] = {}
    for matrix in matrices:
        name, reason = quantized_op.choose(impl, matrix.training_case(tokens, dtype), target)
        found.setdefault(name, reason)
    return impl, [*lines, "FP8 products: " + "; ".join(f"{name}, {reason}" for name, reason in found.items())]


def _select_grouped(config, impl, dtype, tokens, placement, target) -> tuple[str, str]:
    """A model without experts gets one too, which nothing calls."""
    moe = config.moe
    case = grouped_op.GroupedCase(
        dtype=dtype,
        num_rows=tokens * (1 if moe is None else moe.experts_per_token),
        num_groups=1 if moe is None else moe.num_experts // placement.size("experts"),
        in_dim=config.embed_dim,
        out_dim=config.mlp_dim if moe is None else moe.mlp_dim // placement.size("expert_mlp"),
    )
    return grouped_op.choose(impl, case, target)


def _select_dispatch(config, impl, dtype, tokens, placement, target) -> list[str]:
    """Lines about the two ways, which take different ones where the sums are in float32."""
    case = DispatchCase(dtype, tokens, config.embed_dim, config.moe.experts_per_token)
    cases = {"dispatch to experts": case}
    if placement.size("experts") * placement.size("expert_mlp") > 1:
        # Parts from several devices are added up before they are rounded.
        cases["gradients of what comes back"] = dataclasses.replace(case, rounded=False)
    return [f"{way}: {{}}, {{}}".format(*dispatch_op.choose(impl, case, target)) for way, case in cases.items()]


class PagedSelection(NamedTuple):
    """As `Selection`, for extending sequences over a paged cache."""

    paged_attention: str
    grouped_matmul: str
    quantized_matmul: str
    quantized_activations: str
    reasons: tuple[str, ...]
    live_decode: bool
    """Decoding reads live pages alone, so that the width of the page table costs nothing."""
    live_prefill: bool
    """So does the computation of prompts."""
    holds_scores: bool
    """The computation of prompts holds the scores of all its tokens."""
    target: Target


def select_paged_kernels(
    definition: Definition,
    *,
    paged_attention: str,
    grouped_matmul: str,
    quantized_matmul: str,
    quantized_activations: str,
    kv_dtype: str,
    rows: int,
    tiles: tuple[int, int],
    page_size: int,
    width: int,
    placement: Placement,
    device: jax.Device,
) -> PagedSelection:
    """Implementations for decoding batches of up to `rows` tokens whose contexts have up to `width`, and for up to so
    many tiles of so many prompt tokens, over pages of `kv_dtype`. Raises ValueError for a named one that can't run."""
    config, dtype, target = definition.config, definition.param_dtype, target_of(device)
    paged, reason = paged_op.choose(paged_attention, target)
    decode = paged_op.PagedAttentionCase(
        dtype=dtype,
        batch=rows,
        num_tokens=1,
        num_heads=config.num_heads // placement.size("act_heads"),
        num_kv_heads=config.num_kv_heads // placement.size("act_heads"),
        head_dim=config.head_dim,
        page_size=page_size,
        width=width,
        kv_dtype=None if kv_dtype == dtype else kv_dtype,
    )
    prefill = dataclasses.replace(decode, batch=tiles[0], num_tokens=tiles[1])
    in_decode, in_prefill = (paged_op.choose(paged, target, case)[0] for case in (decode, prefill))
    reasons = [f"attention over pages: {paged}, {reason}; {in_decode} in decode, {in_prefill} in prefill"]
    grouped, reason = _select_grouped(config, grouped_matmul, dtype, rows, placement, target)
    if config.moe is not None:
        reasons.append(f"grouped product: {grouped}, {reason}")
    sizes = (rows, tiles[0] * tiles[1])
    reasons += _select_quantized(definition, quantized_matmul, sizes, placement, target)
    reasons += _select_activations(definition, quantized_activations, sizes[1], placement, target)
    # Hopper's kernel for prompts takes pages in the activations' dtype: quantised ones are laid end to end for it.
    reads_pages = target.platform == "tpu" or prefill.kv_dtype is None
    live = (in_decode == "pallas", in_prefill == "pallas" and reads_pages, in_prefill != "pallas")
    impls = (paged, grouped, quantized_matmul, quantized_activations)
    return PagedSelection(*impls, tuple(reasons), *live, target)


def _select_quantized(
    definition: Definition, impl: str, sizes: tuple[int, int], placement: Placement, target: Target
) -> list[str]:
    """Lines about the matrices of few bits, for up to so many tokens in decode and in prefill."""
    by_format: dict[Format, list[Matrix]] = {}
    for matrix in definition.matrices:
        by_format.setdefault(matrix.format, []).append(matrix)
    reasons = []
    for format, matrices in by_format.items():
        kinds = ", ".join(dict.fromkeys(matrix.name.rsplit("/", 1)[-1] for matrix in matrices))
        reasons.append(f"precision {format.name}: {len(matrices)} matrices ({kinds}) are {format}")
        experts = [matrix for matrix in matrices if matrix.is_of_experts]
        if experts:
            taken = f"dequantised from {format.name} at each call: that saves memory, and no time"
            reasons.append(f"experts: {taken if experts[0].is_dequantized else f'pallas, in {format.name}'}")
        dense = [matrix for matrix in matrices if not matrix.is_of_experts]
        for phase, num_rows in zip(("decode", "prefill"), sizes if dense else (), strict=False):
            found: dict[str, str] = {}
            for matrix in dense:
                case = matrix.case(num_rows // placement.size("batch"), definition.param_dtype, placement)
                chosen, reason = quantized_op.choose(impl, case, target)
                found.setdefault(chosen, reason)
            said = "; ".join(f"{chosen}, {reason}" for chosen, reason in found.items())
            reasons.append(f"product of {num_rows} rows in {phase} with {format.name}: {said}")
    return reasons


def _select_activations(
    definition: Definition, impl: str, num_rows: int, placement: Placement, target: Target
) -> list[str]:
    """Lines about what quantises the rows of products whose activations are of few bits too."""
    config, dtype = definition.config, definition.param_dtype
    found: dict[str, dict[str, None]] = {}
    for matrix in definition.matrices:
        if matrix.format.activation is None:
            continue
        maker, parts = made_by(matrix.name, config, placement), matrix.row_parts(placement)
        how = "by the product, in a pass of its own" if maker is None else f"by the {maker} that makes them"
        how += "" if parts == 1 else ", each device's part of a row apart"
        if maker is not None:
            case = ActivationCase(
                x_dtype=dtype,
                dtype=matrix.format.activation,
                num_rows=num_rows // placement.size("batch"),
                width=matrix.value.shape[-2] // parts,
                gated=maker == "gate",
                joined=maker == "gate" and definition.joined and not matrix.is_of_experts,
            )
            how += ": {}, {}".format(*activations_op.choose(impl, case, target))
        kind = matrix.name.rsplit("/", 1)[-1]
        found.setdefault(how, {})[f"experts' {kind}" if matrix.is_of_experts else kind] = None
    return [f"rows for {', '.join(kinds)} are quantised {how}" for how, kinds in found.items()]
