"""A train step on a mesh, op after op, from the configuration and rates of a chip: a prediction that compiles nothing.

Each device has its share of every op: products at a rate, everything else by its bytes. Beside the ops stand the copies
that a scan over layers makes, the collectives of each mesh axis, and what the optimizer moves. Placement is that of the
default sharding rules. Good for ranking candidates, and on chips whose rates were measured for the step itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from model.config import ModelConfig
from perf.capacity import kept_activations
from perf.flops import count_params, layer_linears
from perf.operations import FLOAT32_BYTES, Op, Work, operations, product_parameters

Grouped = Literal["pallas", "batched", "ragged_dot", "loop"]
# Rows of a block of the batched grouped product (kernels/grouped_matmul/batched.py): it copies a matrix for each.
GROUP_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices along each mesh axis that training can use, as parallel.mesh.MeshConfig has them."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    slice: int = 1

    @property
    def num_devices(self) -> int:
        return self.slice * self.data * self.fsdp * self.expert * self.tensor

    @property
    def row_shards(self) -> int:
        """Parts of the batch: every axis but the tensor's."""
        return self.slice * self.data * self.fsdp * self.expert

    @property
    def state_shards(self) -> int:
        """Parts of parameters and moments: the axes of whole copies leave them whole."""
        return self.fsdp * self.expert * self.tensor

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by mesh axis, of the axes that have more than one."""
        return {name: size for name, size in dataclasses.asdict(self).items() if size > 1}

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self.sizes.items()) or "one device"


DATA, FSDP, EXPERT, TENSOR, SLICE = (field.name for field in dataclasses.fields(Layout))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one JAX device reaches in a train step: FLOP/s of products, of attention (recomputation in its kernel
    counted) and of grouped products by implementation (where they run otherwise than as plain products); bytes/s of
    memory in elementwise ops, and in plain copies; bytes/s of collectives, each direction, on the links and between
    slices (0 where there are none). `overlap`: share of the gathers and reductions of parameters that runs beside
    compute. `launch`: seconds of a kernel.

    `kept_elementwise_bytes`: what the compiler keeps for the backward pass of each value of norms, rotations and
    activations, where nothing is recomputed by request.
    """

    products: float
    attention: float
    memory: float
    copy: float
    link: float
    between_slices: float
    overlap: float
    launch: float
    kept_elementwise_bytes: float
    grouped: Mapping[str, float]
    source: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What of a run decides its step, beside the model and the mesh. `scan`, `accumulation`: as in TrainRun."""

    work: Work
    accumulation: int = 1
    scan: bool = True
    grouped: Grouped = "batched"
    chunk_tokens: int = 4096


@dataclasses.dataclass(frozen=True)
class Communication:
    """One mesh axis in one step: bytes that a device sends by kind of collective, seconds on the links, and those that
    nothing hides."""

    bytes: Mapping[str, float]
    seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Seconds of a step by part, communication by mesh axis, and bytes that a device needs by part."""

    parts: Mapping[str, float]
    communication: Mapping[str, Communication]
    memory: Mapping[str, float]
    model_flops: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) + self.exposed_seconds

    @property
    def exposed_seconds(self) -> float:
        return sum(axis.exposed_seconds for axis in self.communication.values())

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


def estimate(config: ModelConfig, program: Program, layout: Layout, rates: Rates) -> StepEstimate:
    """`program.work` is the step of all devices together, a train step."""
    assert program.work.mode == "train"
    ops = operations(config, program.work)
    model = _Model(config, program, layout, rates)
    parts: dict[str, float] = {}
    for op in ops:
        name, seconds = model.op(op)
        parts[name] = parts.get(name, 0.0) + seconds
    if program.scan:
        parts["scan copies"] = model.scan_copies() / rates.copy
    parts["launches"] = sum(op.kernels for op in ops) * program.accumulation * rates.launch
    return StepEstimate(
        MappingProxyType(parts),
        MappingProxyType(model.communication()),
        MappingProxyType(model.memory()),
        sum(op.model_flops for op in ops),
    )


class _Model:
    def __init__(self, config: ModelConfig, program: Program, layout: Layout, rates: Rates) -> None:
        self.config, self.program, self.layout, self.rates = config, program, layout, rates
        self.work = program.work
        self.parameters = count_params(config).total
        # Weights that the layers' products read, in the precision of the products.
        self.layer_elements = sum(
            op.inputs * op.outputs * op.copies
            for layer in range(config.num_layers)
            for op in layer_linears(config, layer)
        )
        self.weight_bytes = self.work.weights.bits // 8
        self.device_tokens = self.work.tokens / layout.row_shards
        # Passes over the layers: forward and backward, and the forward again for what is recomputed.
        self.passes = 2 if self.work.remat == "none" else 3

    # Compute

    def op(self, op: Op) -> tuple[str, float]:
        """(part, seconds on a device)."""
        layout, rates = self.layout, self.rates
        if op.name in ("cast_weights", "optimizer"):
            return "optimizer", op.num_bytes / layout.state_shards / rates.memory
        flops = op.hardware_flops / layout.num_devices
        activations = op.bytes.activations / layout.num_devices
        if op.name in ("attention", "qk", "softmax", "pv"):
            return "attention", self._attention(op, flops, activations)
        if op.name.startswith("expert_") and op.hardware_flops:
            return "experts", self._experts(op, flops)
        # Every microbatch reads the weights again; those of other data shards are gathered first, and read whole.
        weights = op.bytes.weights / layout.tensor * self.program.accumulation
        if op.hardware_flops:
            return "products", max(flops / rates.products, (weights + activations) / rates.memory)
        if op.name in ("norms", "final_norm", "embedding", "dispatch", "combine"):
            # The residual stream is whole on each device of the tensor axis.
            activations *= layout.tensor
        return "elementwise", (activations + weights) / rates.memory

    def _attention(self, op: Op, flops: float, activations: float) -> float:
        if op.name == "attention":
            return max(flops / self.rates.attention, activations / self.rates.memory)
        return flops / self.rates.products + activations / self.rates.memory

    def _experts(self, op: Op, flops: float) -> float:
        """A product of rows sorted by expert: of an expert's capacity, or of groups of any size by an implementation.

        FLOPs count the slots of a capacity, and not the rows that pad a block of the batched product.
        """
        moe, rates = self.config.moe, self.rates
        assert moe is not None
        form = "capacity" if moe.dispatch == "capacity" else self.program.grouped
        if form in rates.grouped:
            return flops / rates.grouped[form]
        if form != "batched":
            raise ValueError(
                f"the rate of experts' products by {form} is not known for this chip; known: "
                f"{', '.join(('batched', *rates.grouped))}"
            )
        blocks, padded = self._blocks()
        width = self.config.embed_dim * moe.mlp_dim / self.layout.tensor
        # A copy of its expert's matrix for each block, written and read, in both passes that multiply by weights; and
        # the weights' gradient of each block in float32, written and read to be summed.
        copies = blocks * width * (2 * self.weight_bytes * self.passes + 2 * FLOAT32_BYTES)
        # Rows laid out in blocks and back, in and out of each of the products of a pass.
        in_and_out = blocks * GROUP_BLOCK * (self.config.embed_dim + moe.mlp_dim / self.layout.tensor)
        copies += 2 * in_and_out * self.work.activation_bytes * self.passes
        return flops * padded / rates.products + op.count * self.program.accumulation * copies / rates.copy

    def _blocks(self) -> tuple[float, float]:
        """Of the batched grouped product: blocks of rows of a microbatch on a device, and rows with padding over rows
        (each group wastes part of a block)."""
        moe = self.config.moe
        assert moe is not None
        rows = self.device_tokens * moe.experts_per_token / self.program.accumulation
        blocks = math.ceil(rows / GROUP_BLOCK) + moe.num_experts / self.layout.expert
        return blocks, blocks * GROUP_BLOCK / rows

    def scan_copies(self) -> float:
        """Bytes that a device moves because layers are stacked: each pass copies a layer's weights out of the stack,
        the backward pass its gradients in, and what is kept for it goes in and comes out."""
        per_microbatch = self.layer_elements / self.layout.state_shards
        weights = 2 * per_microbatch * self.weight_bytes * 2
        gradients = 2 * per_microbatch * self.work.state.gradient
        kept = kept_activations(self.config, self.work) / self.layout.num_devices
        return (weights + gradients) * self.program.accumulation + 4 * kept

    # Communication

    def communication(self) -> dict[str, Communication]:
        """By mesh axis, those of more than one device. Gathers and reductions of parameters run beside compute as far
        as `overlap` says; what the next product waits for does not."""
        layout, again = self.layout, self.program.accumulation
        axes: dict[str, Communication] = {}
        whole = self.parameters * self.weight_bytes / layout.tensor
        shards = layout.fsdp * layout.expert
        if shards > 1:
            # Gathered for the forward and for the backward pass, then gradients reduced and scattered.
            once = whole * (1 - 1 / shards) * again
            self._add(axes, FSDP if layout.fsdp > 1 else EXPERT, self.rates.overlap, {"all-gather": 2 * once})
            self._add(axes, FSDP if layout.fsdp > 1 else EXPERT, self.rates.overlap, {"reduce-scatter": once})
        gradients = self.parameters * self.work.state.gradient / layout.state_shards
        for axis, copies in ((DATA, layout.data), (SLICE, layout.slice)):
            if copies > 1:
                self._add(axes, axis, self.rates.overlap, {"all-reduce": 2 * gradients * (1 - 1 / copies)})
        stream = self.device_tokens * self.config.embed_dim * self.work.activation_bytes
        if layout.tensor > 1:
            # An all-reduce after attention and one after the feed-forward, in each pass; and around the vocabulary.
            reduces = 2 * self.config.num_layers * self.passes + 2
            self._add(axes, TENSOR, 0.0, {"all-reduce": 2 * stream * (1 - 1 / layout.tensor) * reduces})
        if layout.expert > 1 and self.config.moe is not None:
            trips = 2 * self.config.num_moe_layers * self.passes * self.config.moe.experts_per_token
            self._add(axes, EXPERT, 0.0, {"all-to-all": stream * (1 - 1 / layout.expert) * trips})
        return axes

    def _add(self, axes: dict[str, Communication], axis: str, overlap: float, moved: dict[str, float]) -> None:
        """Raises ValueError for a chip without links."""
        rate = self.rates.between_slices if axis == SLICE else self.rates.link
        if not rate:
            raise ValueError(f"mesh {self.layout}: this chip has no links between devices; plan for one device")
        before = axes.get(axis, Communication({}, 0.0, 0.0))
        seconds = sum(moved.values()) / rate
        exposed = seconds * (1 - overlap)
        axes[axis] = Communication(before.bytes | moved, before.seconds + seconds, before.exposed_seconds + exposed)

    # Memory

    def memory(self) -> dict[str, float]:
        """Bytes that a device needs: what it keeps, and the largest scratch of a layer or of the loss."""
        config, layout, work, state = self.config, self.layout, self.work, self.work.state
        tokens = self.device_tokens / self.program.accumulation
        # Moments and parameters, and the sum of gradients; the weights in the products' precision beside them.
        kept = {"state": state.kept(config) / layout.state_shards}
        beside = self.parameters - (product_parameters(config) if state.halves else 0)
        kept["weights"] = beside * self.weight_bytes / layout.state_shards
        one_layer = self.layer_elements / config.num_layers / layout.tensor * self.weight_bytes
        if layout.fsdp * layout.expert > 1:
            # This layer's gathered weights and the next one's, and a layer's gradients before they are scattered.
            kept["gathered"] = 3 * one_layer
        rows = dataclasses.replace(work, batch=1)
        per_token = kept_activations(config, rows) / rows.length
        inputs = config.num_layers * config.embed_dim * work.activation_bytes
        kept["activations"] = tokens * (inputs + (per_token - inputs) / layout.tensor)
        if work.remat == "none":
            # Beside the products' results; what is cheap to compute again, a compiler may.
            elements = tokens * config.num_layers * self._elementwise_elements()
            kept["activations"] += elements * self.rates.kept_elementwise_bytes
        kept |= self._expert_memory()
        chunk = min(tokens, self.program.chunk_tokens)
        logits = 2 * chunk * config.vocab_size * FLOAT32_BYTES / layout.tensor
        kept["scratch"] = max(logits, tokens * 2 * self._elementwise_elements() * work.activation_bytes)
        return kept

    def _expert_memory(self) -> dict[str, float]:
        """Of the batched grouped product: rows in blocks, kept or for one layer, and copies of matrices."""
        config, moe = self.config, self.config.moe
        if moe is None or moe.dispatch == "capacity" or self.program.grouped != "batched":
            return {}
        blocks, _ = self._blocks()
        layers = config.num_moe_layers if self.work.remat == "none" else 1
        inner = moe.mlp_dim / self.layout.tensor
        rows = blocks * GROUP_BLOCK * (2 * config.embed_dim + 4 * inner) * self.work.activation_bytes
        # One product's matrices, and the gradient of each block in float32.
        copies = blocks * config.embed_dim * inner * (self.weight_bytes + FLOAT32_BYTES)
        return {"experts": layers * rows + copies}

    def _elementwise_elements(self) -> float:
        """Per token and layer on a device: normed streams, rotated heads, and the feed-forward's inner values."""
        config, tensor = self.config, self.layout.tensor
        moe = config.moe
        width = config.mlp_dim if moe is None else moe.mlp_dim * moe.experts_per_token + moe.shared_mlp_dim
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return 2 * config.embed_dim + (heads + 2 * width) / tensor
