"""Settings of a server: frozen dataclasses that `configs/NAME.py` fills and the command line changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from model.config import ModelConfig
from parallel.mesh import MeshConfig
from parallel.sharding import ShardingRules
from quantization.rules import ProductRules
from serving.api_config import ApiConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How requests share the device. Rows are sequences of a batch; widths and lengths are in tokens."""

    max_sequences: int | None = None
    """Rows: sequences that run at once; None for the largest of `batch_sizes`."""
    max_queue: int = 1024
    """Requests that may wait; the next one is refused."""
    max_context: int | None = None
    """Longest sequence, prompt and answer; None for the model's max_positions."""
    batch_sizes: tuple[int, ...] | None = None
    """Rows of the compiled decode programs; a batch takes the smallest that holds it. None for 1, 8, 32 and 128, on a
    CPU 2 and 8."""
    widths: tuple[int, ...] | None = None
    """Context lengths of the compiled programs; a batch takes the smallest that holds its longest sequence. Decoding
    has programs of the largest alone where its kernel reads live pages only. None for 512 and 2048, and 8192 unless on
    a CPU; the longest context always has programs."""
    cell_tokens: int = 131_072
    """Largest rows × width of a program; a batch beyond it runs as several."""
    tile_tokens: int = 128
    """Prompt tokens of a tile, the unit of prefill."""
    tile_counts: tuple[int, ...] | None = None
    """Tiles of the compiled prefill programs; the largest one is the prompt tokens of a step, in tiles. None
    for 1, 4 and 16, on a CPU 1 and 8."""
    rounds_ahead: int = 4
    """Rounds of decoding that may be with the device before the host has seen what the first of them gave, while
    nothing else is to be done: the device need not wait for the host, and a new request waits for so many rounds."""
    page_size: int = 64
    """Tokens of a page of the cache, the unit of allocation and of the prefix cache."""
    kv_dtype: Literal["auto", "int8", "float8_e4m3fn"] = "auto"
    """Keys and values in the cache; auto: in the dtype of activations. In 8 bits each position and kv head has a
    float32 scale too, and the draft model's cache is in 8 bits as well."""
    num_pages: int | None = None
    """Pages of the cache; None for what fits in `memory_fraction`."""
    memory_fraction: float = 0.9
    """Share, for weights, programs and cache, of the memory that JAX takes of a device (by default three quarters of a
    GPU's). On a CPU the cache gets 1 GiB instead."""
    prefix_cache: bool = True
    """Keep the pages of finished requests, and share them between requests that begin alike."""
    ageing_seconds: float = 10.0
    """Waiting this long raises a request's priority by 1."""


@dataclasses.dataclass(frozen=True)
class SpeculationConfig:
    """Tokens guessed cheaply and checked by the model in one pass. The distribution of the text stays the model's."""

    kind: Literal["none", "ngram", "layers", "model"] = "none"
    """ngram: what followed the last words before. layers: the model's own first layers. model: a smaller model."""
    max_draft: int = 4
    """Drafts per round at most; the controller picks fewer, or none, by measured times and acceptance."""
    max_batch: int = 32
    """Largest batch that programs with drafts are compiled for."""
    num_layers: int = 4
    """layers: how many."""
    draft: str = ""
    """model: its weights, spelled as the served model's; it must have the same vocabulary."""


@dataclasses.dataclass(frozen=True)
class ServingKernels:
    """Kernel implementations; "auto" takes the one known to be fastest."""

    paged_attention: str = "auto"
    """Attention over pages."""
    grouped_matmul: str = "auto"
    """Products of the experts."""
    quantized_matmul: str = "auto"
    """Products with matrices of few bits."""
    quantized_activations: str = "auto"
    """Norms and gates that quantise what a product with fp8 or int8 activations reads."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `--bench` measures."""

    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences that decode at once."""
    prompts: tuple[int, ...] = (128, 1024, 8192)
    """Lengths of prompts whose first token is timed."""
    decode_prompt: int = 128
    """Prompt tokens of each sequence that decodes."""
    decode_tokens: int = 256
    """Tokens that each of them generates."""
    repeats: int = 3
    """Times that each prompt is measured."""
    offline: tuple[int, int, int] | None = None
    """Requests, prompt tokens and generated tokens of a run with everything submitted at once; None for no such run."""


@dataclasses.dataclass(frozen=True)
class ServeRun:
    """One server; `serve.py NAME` starts from the one that configs/NAME.py gives."""

    name: str
    """The model's name in the API."""
    source: str = ""
    """Weights: a Hugging Face folder, a GGUF file, a folder of a training run, or package:NAME for a package that
    carries a GGUF file. Empty for random weights (a model only for measuring)."""
    model: ModelConfig | None = None
    """Architecture of random weights; None where `source` has it."""
    dtype: Dtype = "auto"
    """Weights, activations and cache; auto: bfloat16, on a CPU float32."""
    precision: ProductRules = dataclasses.field(default_factory=ProductRules)
    """Matrices of few bits: quantised as they are loaded, array by array."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=1, tensor=-1))
    """Devices: `tensor` splits every layer; the other axes must be 1."""
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)
    """Mesh axes of each logical axis."""
    kernels: ServingKernels = dataclasses.field(default_factory=ServingKernels)
    """Kernel implementations."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    """Batching, shapes and cache."""
    speculation: SpeculationConfig = dataclasses.field(default_factory=SpeculationConfig)
    """Drafts."""
    api: ApiConfig = dataclasses.field(default_factory=ApiConfig)
    """HTTP server."""
    bench: bool = False
    """Measure decode and prefill, print one JSON line and exit."""
    benchmark: BenchConfig = dataclasses.field(default_factory=BenchConfig)
    """What `--bench` measures."""
    prompt: str | None = None
    """Print a completion of this text and exit."""
    max_tokens: int = 128
    """Tokens of that completion."""
    temperature: float = 0.0
    """Temperature of that completion."""
    seed: int = 0
    """Random weights, and the texts of requests without a seed of their own (None in a request: drawn from this)."""
    xla_options: tuple[str, ...] = ()
    """Compiler options of every program, each xla_NAME=VALUE; those of another platform are left out."""
    cache_dir: Path = Path(".cache")
    """Compiled programs."""
    fleet: Path | None = None
    """Store that gets a record of a bench, or of the traffic at shutdown: NAME.sqlite or a folder; None for none."""

    def __post_init__(self) -> None:
        check_serve(self)


def settle_engine(engine: EngineConfig, platform: str) -> EngineConfig:
    """The same with every None decided. Raises ValueError for settings that contradict each other.

    A CPU has few programs, since compiling is what its user waits for, and none of a single row: to multiply one row
    by a weight, XLA's CPU compiler copies the weight into another layout first. SmolLM2-135M takes 162 ms a round with
    one row and 34 ms with two (two cores, jax 0.10.2).
    """
    cpu = platform == "cpu"
    batch_sizes = engine.batch_sizes or ((2, 8) if cpu else (1, 8, 32, 128))
    if cpu:
        batch_sizes = tuple(sorted({max(size, 2) for size in batch_sizes}))
    settled = dataclasses.replace(
        engine,
        batch_sizes=batch_sizes,
        max_sequences=engine.max_sequences or batch_sizes[-1],
        widths=engine.widths or ((512, 2048) if cpu else (512, 2048, 8192)),
        tile_counts=engine.tile_counts or ((1, 8) if cpu else (1, 4, 16)),
    )
    check_engine(settled)
    return settled


def check_engine(engine: EngineConfig) -> None:
    """Raises ValueError for settings that contradict each other; None agrees with everything."""
    for setting, values in (
        ("engine.batch_sizes", engine.batch_sizes),
        ("engine.widths", engine.widths),
        ("engine.tile_counts", engine.tile_counts),
    ):
        if values is not None and (not values or min(values) < 1 or list(values) != sorted(set(values))):
            raise ValueError(f"{setting}={values} must be positive and ascending")
    for setting, value in (
        ("engine.max_sequences", engine.max_sequences),
        ("engine.max_queue", engine.max_queue),
        ("engine.tile_tokens", engine.tile_tokens),
        ("engine.rounds_ahead", engine.rounds_ahead),
        ("engine.page_size", engine.page_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{setting}={value} must be at least 1")
    if engine.max_sequences and engine.batch_sizes and engine.max_sequences > engine.batch_sizes[-1]:
        raise ValueError(
            f"engine.max_sequences={engine.max_sequences} is above the largest of engine.batch_sizes="
            f"{engine.batch_sizes}; add a batch size"
        )
    if engine.widths and engine.cell_tokens < engine.widths[-1]:
        raise ValueError(
            f"engine.cell_tokens={engine.cell_tokens} must be at least the largest of engine.widths={engine.widths}"
        )
    if any(width % engine.page_size for width in engine.widths or ()):
        raise ValueError(f"engine.widths={engine.widths} must be multiples of engine.page_size={engine.page_size}")
    if not 0 < engine.memory_fraction <= 1:
        raise ValueError(f"engine.memory_fraction={engine.memory_fraction} must be above 0 and at most 1")


def check_serve(run: ServeRun) -> None:
    """Raises ValueError for settings that contradict each other, whatever the devices."""
    check_engine(run.engine)
    speculation = run.speculation
    if bool(run.source) == (run.model is not None):
        raise ValueError("give either source (weights on disk) or model (random weights), not both")
    for setting, value in (
        ("speculation.max_draft", speculation.max_draft),
        ("speculation.num_layers", speculation.num_layers),
        ("max_tokens", run.max_tokens),
    ):
        if value < 1:
            raise ValueError(f"{setting}={value} must be at least 1")
    if (speculation.kind == "model") != bool(speculation.draft):
        raise ValueError(
            f"speculation.draft={speculation.draft!r} names the draft model of speculation.kind=model, "
            f"and the kind is {speculation.kind}"
        )
