"""From settings to an engine that is ready: weights and cache on their devices, every program compiled and tried."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp

from checkpoint.pretrained import Pretrained
from model.assembly import assemble, converter
from model.cache import abstract_cache
from model.config import ModelConfig
from model.parameter import Place
from model.products import stored_bytes
from model.transformer import Definition, Tree
from serving.byte_tokenizer import byte_tokenizer
from serving.chat import ChatTemplate
from serving.compilations import CompilationCounter
from serving.controller import DraftController
from serving.engine import Engine
from serving.executor import Executor
from serving.grammar import GrammarCompiler
from serving.metrics import Metrics
from serving.pages import PagePool
from serving.programs import Cache, Weights
from serving.request import MAX_STOP_IDS
from serving.resolve import CPU_CACHE_BYTES, Resolved
from serving.runner import Compiled, Runner
from serving.scheduler import Scheduler, SchedulerConfig
from serving.tokenizer import Tokenizer, load_tokenizer
from serving.utilization import UtilizationMeter

Say = Callable[[str], None]

SCRATCH_COPIES = 6
"""Arrays of a cell's context or logits that a program is taken to hold at once; XLA held fewer wherever it was looked
at."""


@dataclasses.dataclass(frozen=True)
class Started:
    """A server's parts, ready to serve. `seconds`: from the first to ready."""

    engine: Engine
    runner: Runner
    metrics: Metrics
    meter: UtilizationMeter
    compilations: CompilationCounter
    compiled: Compiled
    seconds: float


def start(resolved: Resolved, say: Say) -> Started:
    """Loads, compiles and tries everything. Raises ValueError for files and settings that can't work."""
    began = time.monotonic()
    run, engine = resolved.run, resolved.run.engine
    compilations = CompilationCounter()
    tokenizer = _tokenizer(resolved)
    num_pages = engine.num_pages or _fitting_pages(resolved)
    say(f"cache: {num_pages - 1} pages of {engine.page_size} tokens, {num_pages * resolved.page_bytes / 1e9:.1f} GB")
    runner = make_runner(resolved, num_pages)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        weights = pool.submit(_load, resolved, say)
        compiled = runner.compile(say, weights.result)
    runner.load(*weights.result())
    say(f"compiled {compiled.programs} programs in {compiled.seconds:.1f} s")
    controller = _controller(resolved)
    runner.warm_up(None if controller is None else controller.record_time)
    metrics = Metrics()
    meter = UtilizationMeter(resolved.programs.definition, resolved.dtype, resolved.kv_dtype, resolved.devices, metrics)
    served = Engine(
        model_name=run.name,
        tokenizer=tokenizer,
        chat=None
        if tokenizer.chat_template is None
        else ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens),
        grammars=_grammars(tokenizer, resolved.model),
        vocab_size=resolved.model.vocab_size,
        scheduler=_scheduler(resolved, num_pages),
        executor=Executor(
            runner,
            page_size=engine.page_size,
            tile_tokens=engine.tile_tokens,
            vocab_size=resolved.model.vocab_size,
            max_draft=run.speculation.max_draft,
        ),
        controller=controller,
        max_draft_batch=_max_draft_batch(resolved),
        rounds_ahead=engine.rounds_ahead,
        metrics=metrics,
        on_calls=meter.observe,
        seed=run.seed,
    )
    compilations.start(metrics.observe_compile)
    served.start()
    return Started(served, runner, metrics, meter, compilations, compiled, time.monotonic() - began)


def make_runner(resolved: Resolved, num_pages: int) -> Runner:
    """The programs over caches of `num_pages` pages, for the devices of `resolved`, present or only described."""
    return Runner(
        resolved.programs,
        _abstract(resolved),
        _caches(resolved, num_pages),
        cells=resolved.cells,
        engine=resolved.run.engine,
        placement=resolved.placement,
        device=resolved.devices[0],
        options=resolved.options,
    )


def _tokenizer(resolved: Resolved) -> Tokenizer:
    if resolved.pretrained is None:
        return byte_tokenizer(resolved.model.vocab_size)
    tokenizer = load_tokenizer(resolved.pretrained.path)
    if len(tokenizer.end_ids) > MAX_STOP_IDS:
        raise ValueError(
            f"{resolved.pretrained.path} names {len(tokenizer.end_ids)} end tokens; at most {MAX_STOP_IDS} can be used"
        )
    if tokenizer.vocab_size > resolved.model.vocab_size:
        raise ValueError(
            f"{resolved.pretrained.path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{resolved.model.vocab_size}; they are not of one model"
        )
    return tokenizer


def _grammars(tokenizer: Tokenizer, model: ModelConfig) -> GrammarCompiler | None:
    """None for a model without an end token: a grammar could not say that a text is whole."""
    return GrammarCompiler(tokenizer, model.vocab_size, tokenizer.end_ids) if tokenizer.end_ids else None


def _definitions(resolved: Resolved) -> list[tuple[Definition, Pretrained | None]]:
    """The model's, and the draft model's where there is one."""
    models = [(resolved.programs.definition, resolved.pretrained)]
    if resolved.draft is not None:
        models.append((resolved.programs.drafting.definition, resolved.draft))
    return models


def _place(resolved: Resolved) -> Place:
    if resolved.placement is None:
        return lambda names: jax.sharding.SingleDeviceSharding(resolved.devices[0])
    return lambda names: resolved.placement.sharding(*names)


def _shardings(definition: Definition, place: Place) -> tuple[Tree, Tree]:
    return tuple(jax.tree.map(place, tree, is_leaf=_is_axes) for tree in definition.logical)


def _abstract(resolved: Resolved) -> tuple[Weights, Weights | None]:
    def describe(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    described = [
        jax.tree.map(describe, definition.abstract, _shardings(definition, _place(resolved)))
        for definition, _ in _definitions(resolved)
    ]
    return described[0], described[1] if len(described) > 1 else None


def _load(resolved: Resolved, say: Say) -> tuple[Weights, Weights | None]:
    began = time.monotonic()
    loaded = [_load_one(resolved, *model) for model in _definitions(resolved)]
    jax.block_until_ready(loaded)
    source = "random" if resolved.pretrained is None else str(resolved.pretrained.path)
    size, wide = (
        stored_bytes(loaded),
        stored_bytes([definition.plain.abstract for definition, _ in _definitions(resolved)]),
    )
    before = "" if size == wide else f", of {wide / 1e9:.2f} GB in {resolved.dtype}"
    say(f"weights: {source}, {size / 1e9:.2f} GB{before}, in {time.monotonic() - began:.1f} s")
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def _load_one(resolved: Resolved, definition: Definition, pretrained: Pretrained | None) -> Weights:
    """Each parameter is quantised as soon as it is there: the model is never whole in its wide form."""
    plain, place = definition.plain, _place(resolved)
    convert = converter(definition, place)
    if pretrained is None:
        params, biases = plain.init(jax.random.key(resolved.run.seed), place, convert)
    else:
        params, biases = pretrained.load(plain, _shardings(plain, place), convert)
    return assemble(definition, params, place), biases


def _is_axes(node: object) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _caches(resolved: Resolved, num_pages: int) -> tuple[Cache, Cache]:
    models = [resolved.model] + ([] if resolved.draft is None else [resolved.draft.config])
    caches = [
        abstract_cache(
            model,
            num_pages=num_pages,
            page_size=resolved.run.engine.page_size,
            dtype=resolved.kv_dtype,
            placement=resolved.placement,
            device=resolved.devices[0],
        )
        for model in models
    ]
    return caches[0], caches[1] if len(caches) > 1 else []


def _fitting_pages(resolved: Resolved) -> int:
    """Pages that fit beside the weights and the scratch of the largest program."""
    engine, device = resolved.run.engine, resolved.devices[0]
    # More than every row at its longest would never be used.
    useful = engine.max_sequences * -(-resolved.max_context // engine.page_size) + 1
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats is None:
        room = CPU_CACHE_BYTES
    else:
        scratch, weights = _scratch_bytes(resolved), _bytes_per_device(resolved)
        room = int(stats["bytes_limit"] * engine.memory_fraction) - weights - scratch
        least = -(-resolved.max_context // engine.page_size) + 1
        if room < least * resolved.page_bytes:
            raise ValueError(
                f"{max(room, 0) / 1e9:.1f} GB are left for the cache beside {weights / 1e9:.1f} GB of "
                f"weights and {scratch / 1e9:.1f} GB for programs, and one sequence of {resolved.max_context} tokens "
                f"takes {least * resolved.page_bytes / 1e9:.1f} GB; lower engine.max_context, raise "
                "engine.memory_fraction, or use more devices (mesh.tensor)"
            )
    return max(2, min(useful, room // resolved.page_bytes))


def _bytes_per_device(resolved: Resolved) -> int:
    def shard(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return stored_bytes(jax.tree.map(shard, _abstract(resolved)))


def _scratch_bytes(resolved: Resolved) -> int:
    """What the largest program needs beside its arguments: the pages of a cell laid end to end, and its logits.

    An estimate, made before anything is compiled, since the programs' shapes depend on the number of pages.
    """
    model, itemsize = resolved.model, jnp.dtype(resolved.dtype).itemsize
    tensor = 1 if resolved.placement is None else resolved.placement.size("act_heads")
    prefills = [cell for cell in resolved.cells if cell.drafts is None]
    decodes = [cell for cell in resolved.cells if cell.drafts is not None]
    # A program that reads live pages where they lie lays nothing end to end, and holds no scores.
    laid = ([] if resolved.live_prefill else prefills) + ([] if resolved.live_decode else decodes)
    context = max((cell.rows * cell.width for cell in laid), default=0) * 2 * model.num_kv_heads * model.head_dim
    tokens = max(cell.rows * ((cell.drafts or 0) + 1) for cell in resolved.cells)
    logits = tokens * model.vocab_size * 4
    tiles = max(cell.rows for cell in prefills) * resolved.run.engine.tile_tokens
    hidden = tiles * (2 * model.mlp_dim + 4 * model.embed_dim) * itemsize
    scored = max(cell.rows * cell.width for cell in prefills) if resolved.holds_scores else 0
    scores = scored * resolved.run.engine.tile_tokens * model.num_heads * 4 * 2 // tensor
    widened = _widened_elements(resolved.programs.definition) * itemsize // tensor
    return SCRATCH_COPIES * (context * itemsize // tensor + logits) + hidden + scores + widened


def _widened_elements(definition: Definition) -> int:
    """Of the matrices of a layer that a product may dequantise in memory: experts', and those with scales in groups."""
    layers: Counter[str] = Counter()
    for matrix in definition.matrices:
        in_groups = matrix.format.group is not None and not matrix.is_of_experts
        if matrix.is_dequantized or in_groups:
            layers["/".join(matrix.name.split("/")[:2])] += math.prod(matrix.value.shape)
    return max(layers.values(), default=0)


def _controller(resolved: Resolved) -> DraftController | None:
    speculation = resolved.run.speculation
    if speculation.kind == "none":
        return None
    # Of every size, since the times of every batch are recorded; the engine asks about those that may draft alone.
    return DraftController(range(speculation.max_draft + 1), resolved.run.engine.batch_sizes)


def _max_draft_batch(resolved: Resolved) -> int:
    """Rows of the largest program with drafts; 0 without any."""
    return max((cell.rows for cell in resolved.cells if cell.drafts), default=0)


def _scheduler(resolved: Resolved, num_pages: int) -> Scheduler:
    engine = resolved.run.engine
    pool = PagePool(num_pages, engine.page_size, prefix_cache=engine.prefix_cache)
    config = SchedulerConfig(
        max_sequences=engine.max_sequences,
        max_queue=engine.max_queue,
        chunk_tokens=engine.tile_counts[-1] * engine.tile_tokens,
        tile_tokens=engine.tile_tokens,
        max_context=resolved.max_context,
        ageing_seconds=engine.ageing_seconds,
    )
    return Scheduler(config, pool)
