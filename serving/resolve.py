"""From a server's settings to what it runs with: every cross-check made, every "auto" decided, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from checkpoint.pretrained import Pretrained, open_pretrained
from model.cache import token_bytes
from model.config import ModelConfig
from model.execution import Execution
from model.placement import check_model_placement
from model.precision import Precision
from model.selection import PagedSelection, select_paged_kernels
from model.transformer import Definition
from parallel.compilation import Options, compiler_options
from parallel.mesh import make_mesh
from parallel.sharding import Placement
from serving.config import EngineConfig, ServeRun, settle_engine
from serving.programs import Drafting, Programs
from serving.runner import Cell, plan_cells

CPU_CACHE_BYTES = 2**30
"""Cache on a CPU, whose memory is everybody's."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A server on given devices. `choices` are the decisions taken, one line each, for the log."""

    run: ServeRun
    devices: tuple[jax.Device, ...]
    placement: Placement | None
    pretrained: Pretrained | None
    draft: Pretrained | None
    programs: Programs
    dtype: str
    kv_dtype: str
    max_context: int
    cells: tuple[Cell, ...]
    live_decode: bool
    """Decoding reads live pages alone, where they lie."""
    live_prefill: bool
    """So does a prefill."""
    holds_scores: bool
    """A prefill holds the scores of all its tokens."""
    options: Options
    choices: tuple[str, ...]

    @property
    def model(self) -> ModelConfig:
        return self.programs.definition.config

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one device, in the caches of the model and of the draft model."""
        tensor = 1 if self.placement is None else self.placement.size("act_heads")
        models = [self.model] if self.draft is None else [self.model, self.draft.config]
        return sum(token_bytes(model, self.kv_dtype) for model in models) * self.run.engine.page_size // tensor


def resolve(run: ServeRun, devices: Sequence[jax.Device]) -> Resolved:
    """Raises ValueError, naming the setting, for whatever can't run on these devices. Computes nothing on them."""
    run = dataclasses.replace(run, engine=settle_engine(run.engine, devices[0].platform))
    mesh = make_mesh(run.mesh, devices)
    whole = Placement(mesh, run.rules)
    if mesh.size != whole.size("act_heads"):
        sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
        raise ValueError(f"mesh {sizes}: serving splits a model over 'tensor' alone; set the other mesh axes to 1")
    pretrained = open_pretrained(run.source) if run.source else None
    model = run.model if pretrained is None else pretrained.config
    assert model is not None
    check_model_placement(model, whole)
    platform = devices[0].platform
    dtype = run.dtype if run.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"
    max_context = min(run.engine.max_context or model.max_positions, model.max_positions)
    apart = Definition(model, False, dtype, mesh.size == 1, run.precision)
    definition = apart.stored_on(devices[0], run.kernels.quantized_matmul, whole)
    _check_four_bits(definition)
    selection = _select(run, definition, max_context, whole, devices[0])
    drafting, draft, more = _drafting(run, model, dtype, max_context, whole, devices[0])
    drafts = 0 if drafting is None else drafting.max_draft
    cells = plan_cells(
        run.engine,
        max_context,
        drafts,
        run.speculation.max_batch,
        live_decode=selection.live_decode,
        live_prefill=selection.live_prefill,
    )
    kv_dtype = _kv_dtype(run, dtype)
    where = f"devices: {mesh.size} of {devices[0].device_kind}, weights in {dtype}, cache in {kv_dtype}"
    return Resolved(
        run=run,
        devices=tuple(devices),
        placement=whole if mesh.size > 1 else None,
        pretrained=pretrained,
        draft=draft,
        programs=Programs(
            definition,
            _execution(selection, dtype, whole),
            drafting,
            branches=platform != "gpu",
        ),
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_context=max_context,
        cells=cells,
        live_decode=selection.live_decode,
        live_prefill=selection.live_prefill,
        holds_scores=selection.holds_scores,
        options=compiler_options(run.xla_options, platform),
        choices=(where, _describe(cells, run.engine), *selection.reasons, *more),
    )


def _check_four_bits(definition: Definition) -> None:
    """Raises ValueError for arrays of int4 where JAX can't give them to a compiled program."""
    held = [leaf.dtype for leaf in jax.tree.leaves(definition.abstract)]
    if jnp.int4 in held and jax.__version_info__ < (0, 11):
        # It takes the 4 bits of an argument's element for a layout that the array does not have.
        raise ValueError(
            f"precision.products={definition.rules.products} is served by JAX 0.11 or newer (Python 3.12), and this is "
            f"JAX {jax.__version__}; choose w8, or update"
        )


def _describe(cells: Sequence[Cell], engine: EngineConfig) -> str:
    decode = sorted({(cell.rows, cell.width) for cell in cells if cell.drafts is not None})
    rows, widths = (sorted({size[axis] for size in decode}) for axis in (0, 1))
    return (
        f"programs of the model: {len(cells)}, for batches of {rows} at contexts of {widths}, prefill by "
        f"{engine.tile_counts} tiles"
    )


def _kv_dtype(run: ServeRun, dtype: str) -> str:
    return dtype if run.engine.kv_dtype == "auto" else run.engine.kv_dtype


def _select(
    run: ServeRun, definition: Definition, max_context: int, placement: Placement, device: jax.Device
) -> PagedSelection:
    return select_paged_kernels(
        definition,
        paged_attention=run.kernels.paged_attention,
        grouped_matmul=run.kernels.grouped_matmul,
        quantized_matmul=run.kernels.quantized_matmul,
        quantized_activations=run.kernels.quantized_activations,
        kv_dtype=_kv_dtype(run, definition.param_dtype),
        rows=run.engine.batch_sizes[-1],
        tiles=(run.engine.tile_counts[-1], run.engine.tile_tokens),
        page_size=run.engine.page_size,
        width=max_context,
        placement=placement,
        device=device,
    )


def _execution(selection: PagedSelection, dtype: str, placement: Placement) -> Execution:
    return Execution(
        precision=Precision(param=dtype, compute=dtype, gradient=dtype),
        placement=placement if placement.mesh.size > 1 else None,
        paged_attention=selection.paged_attention,
        grouped_matmul=selection.grouped_matmul,
        quantized_matmul=selection.quantized_matmul,
        quantized_activations=selection.quantized_activations,
        target=selection.target,
    )


def _drafting(
    run: ServeRun, model: ModelConfig, dtype: str, max_context: int, placement: Placement, device: jax.Device
) -> tuple[Drafting | None, Pretrained | None, tuple[str, ...]]:
    speculation = run.speculation
    match speculation.kind:
        case "none":
            return None, None, ()
        case "ngram":
            return Drafting("ngram", speculation.max_draft), None, ("drafts: n-grams of the text itself",)
        case "layers":
            if speculation.num_layers >= model.num_layers:
                raise ValueError(
                    f"speculation.num_layers={speculation.num_layers} must be below the model's {model.num_layers}"
                )
            drafting = Drafting("layers", speculation.max_draft, num_layers=speculation.num_layers)
            return drafting, None, (f"drafts: the model's first {speculation.num_layers} layers",)
    draft = open_pretrained(speculation.draft)
    if draft.config.vocab_size != model.vocab_size:
        raise ValueError(
            f"speculation.draft={speculation.draft} has a vocabulary of {draft.config.vocab_size} and the model one of "
            f"{model.vocab_size}; drafts need the same"
        )
    check_model_placement(draft.config, placement)
    definition = Definition(draft.config, False, dtype, placement.mesh.size == 1)
    selection = _select(run, definition, max_context, placement, device)
    drafting = Drafting(
        "model",
        speculation.max_draft,
        definition=definition,
        execution=_execution(selection, dtype, placement),
    )
    return drafting, draft, (f"drafts: {speculation.draft}", *selection.reasons)
