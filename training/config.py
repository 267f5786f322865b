"""Everything a training run is, as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from checkpoint.config import CheckpointConfig
from data.config import DataConfig
from model.config import ModelConfig
from model.execution import Remat
from model.precision import Precision
from parallel.distributed import DistributedConfig
from parallel.mesh import MeshConfig
from parallel.sharding import ShardingRules
from perf.capture import parse_window
from training.optimizer import MuonConfig, OptimizerConfig
from training.profile import WARMUP_STEPS
from training.schedule import ScheduleConfig

# What a file in configs/ needs, from one place.
__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "KernelConfig",
    "LayerConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "Precision",
    "SampleConfig",
    "ScheduleConfig",
    "ShardingRules",
    "StragglerConfig",
    "TrainRun",
]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy over the vocabulary."""

    chunk_tokens: int = 4096
    """Tokens per device whose logits exist at one time."""
    z_loss_coef: float = 0.0
    """Weight of mean(logsumexp(logits)^2) (PaLM, arXiv 2204.02311 section 5: 1e-4)."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Implementation of each kernel. `auto` takes the fastest known here and says which; a named one runs or raises."""

    attention: Literal["auto", "reference", "xla", "cudnn", "pallas"] = "auto"
    """Attention inside a layer."""
    grouped_matmul: Literal["auto", "reference", "ragged_dot", "loop", "batched", "pallas"] = "auto"
    """Products of expert-sorted rows with their experts' weights."""
    quantized_matmul: Literal["auto", "reference", "xla", "pallas"] = "auto"
    """Products in FP8, where `precision.products` asks for them."""
    dispatch: Literal["auto", "xla", "pallas"] = "auto"
    """Tokens to rows sorted by expert, and the gradients of their weighted sums."""
    norm: Literal["auto", "xla", "pallas"] = "auto"
    """Sums with the residual stream and their norms."""
    cross_entropy: Literal["auto", "xla", "pallas"] = "auto"
    """Softmax of the logits and its gradient, in the loss."""
    adamw: Literal["auto", "xla", "pallas"] = "auto"
    """AdamW's update of matrices that products read in bfloat16; pallas holds them in halves (training/halves.py)."""


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """How layers are compiled."""

    scan: bool = True
    """Compile one layer and loop over stacked parameters; off: compile every layer (faster steps, slower compile)."""
    remat: Remat = "none"
    """What the backward pass recomputes: none, dots (all but matrix products) or full (each layer from its input)."""
    document_mask: bool = True
    """Attention and positions stay within a document; off: a row is one sequence."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out documents, whole, at the end and on the way."""

    every: int = 0
    """Steps between evaluations; 0 for one at the end."""
    batches: int | None = None
    """Batches evaluated on the way; None for all. The evaluation at the end always takes all."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated after training, from the trained weights."""

    prompt: str = ""
    """Text to continue; empty for the start of a document."""
    tokens: int = 0
    """Tokens to generate; 0 for none."""
    temperature: float = 0.8
    """Divides the logits; 0 for the most likely token each time."""


@dataclasses.dataclass(frozen=True)
class StragglerConfig:
    """The watch for a host that the others wait for, in runs of two processes or more."""

    every: int = 5
    """Steps between two times that the hosts tell each other what they measured; 0 for never."""
    probe: bool = True
    """Also time a small computation on each host's devices, behind a step: 0.25% of the steps' time at most."""


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """One training run; `train.py NAME` starts from the one that configs/NAME.py gives."""

    name: str
    """Folder of the run under `runs_dir`."""
    model: ModelConfig
    """Architecture."""
    data: DataConfig
    """Corpus, packing and batches."""
    steps: int
    """Optimizer steps of the whole run, resumed parts included."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """Cross-entropy."""
    accumulation: int = 1
    """Microbatches per step: the batch is cut into this many, and their gradients summed."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices along each mesh axis."""
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)
    """Mesh axes of each logical axis."""
    precision: Precision = dataclasses.field(default_factory=Precision)
    """Number formats."""
    layers: LayerConfig = dataclasses.field(default_factory=LayerConfig)
    """Scan, recomputation, document masks."""
    kernels: KernelConfig = dataclasses.field(default_factory=KernelConfig)
    """Kernel implementations."""
    xla_options: tuple[str, ...] = ()
    """Compiler options of the train step, each xla_NAME=VALUE; those of another platform are left out."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When the state is saved, and what is kept."""
    evaluation: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    """Held-out loss."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    """Text at the end."""
    stragglers: StragglerConfig = dataclasses.field(default_factory=StragglerConfig)
    """Which host is too slow."""
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    """How the processes of a run find each other."""
    seed: int = 0
    """Initial parameters and sampling. The order of the data has its own, `data.seed`."""
    runs_dir: Path = Path("runs")
    """Metrics and checkpoints of every run, a folder each."""
    cache_dir: Path = Path(".cache")
    """Compiled programs and trained tokenizers, shared by all runs."""
    fresh: bool = False
    """Start over: what an earlier run of this name left is moved aside, not resumed."""
    tensorboard: bool = True
    """Also write TensorBoard files."""
    fleet: Path | None = None
    """Store that gets a record of the run at its end: a file NAME.sqlite, or a folder; None for none."""
    profile: str | None = None
    """FIRST:LAST, steps to profile, both counted. The trace is under profiles/ in the run's folder, and the run is
    marked as profiled."""

    def __post_init__(self) -> None:
        check_run(self)

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / self.name


def check_run(run: TrainRun) -> None:
    """Raises ValueError for settings that contradict each other, whatever the devices."""
    if run.steps < 1 or run.accumulation < 1:
        raise ValueError(f"steps={run.steps} and accumulation={run.accumulation} must be at least 1")
    if run.data.batch_size % run.accumulation:
        raise ValueError(
            f"data.batch_size={run.data.batch_size} is not divisible by accumulation={run.accumulation}; "
            "set accumulation to a divisor of data.batch_size"
        )
    if run.data.sequence_length > run.model.max_positions:
        raise ValueError(
            f"data.sequence_length={run.data.sequence_length} is above model.max_positions="
            f"{run.model.max_positions}; shorten the rows, or raise model.max_positions"
        )
    for setting, value in (
        ("evaluation.every", run.evaluation.every),
        ("sample.tokens", run.sample.tokens),
        ("sample.temperature", run.sample.temperature),
        ("stragglers.every", run.stragglers.every),
        ("loss.z_loss_coef", run.loss.z_loss_coef),
        ("seed", run.seed),
    ):
        if value < 0:
            raise ValueError(f"{setting}={value} must be at least 0")
    if run.evaluation.batches is not None and run.evaluation.batches < 1:
        raise ValueError(f"evaluation.batches={run.evaluation.batches} must be at least 1, or None for all")
    if run.profile is not None:
        window = parse_window(run.profile)
        if window.start <= WARMUP_STEPS or window.stop > run.steps + 1:
            raise ValueError(
                f"profile={run.profile} must lie between step {WARMUP_STEPS + 1}, since the first ones warm up, and "
                f"steps={run.steps}"
            )
    if run.loss.chunk_tokens < 1:
        raise ValueError(f"loss.chunk_tokens={run.loss.chunk_tokens} must be at least 1")
    if not run.name or "/" in run.name or run.name.startswith("."):
        raise ValueError(f"name={run.name!r} must be a plain folder name")
    if run.sample.tokens and run.data.source == "random":
        raise ValueError("sample.tokens needs a tokenizer, and data.source=random has none; set sample.tokens to 0")
