"""Every op of a train, prefill or decode step with its FLOPs, bytes and kernels, from the configuration alone.

FLOPs are those of the ledger in perf/flops.py: matrix products alone. Weight and cache bytes are those of
perf/traffic.py. Activation bytes count each op as one kernel that reads its inputs from memory and writes its result
there once; a compiler that fuses neighbours moves less. Nothing is counted for communication.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from model.config import ModelConfig
from perf.flops import (
    ATTENTION_OPS,
    DtypeClass,
    Ledger,
    Linear,
    Remat,
    Row,
    causal_pairs,
    count_params,
    layer_linears,
    layer_vectors,
    ledger,
    pair_flops,
)
from perf.formats import WEIGHTS, Format, cache_token_bytes

Mode = Literal["train", "prefill", "decode"]
AttentionForm = Literal["fused", "unfused"]

# The router's weights and logits, and the LM head's logits, are float32.
FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Bytes per parameter that a train step keeps and moves, beside the weights in compute precision.

    `first_moment` and `second_moment`: of AdamW. `clip`: gradients are read once more for their global norm. `muon`:
    hidden matrices keep no second moment (the traffic of its Newton-Schulz products is not counted). `copies`: the
    optimizer writes matrices in compute precision too, where that is narrower; without, each step casts them all, as
    our steps did when perf/step_rates.py was fitted to them. `halves`: those are the upper halves of the float32
    matrices (training/halves.py), which costs no bytes.
    """

    parameter: int = 4
    gradient: int = 4
    first_moment: int = 4
    second_moment: int = 4
    clip: bool = True
    muon: bool = False
    copies: bool = True
    halves: bool = False

    def kept(self, config: ModelConfig) -> int:
        """Bytes of parameters, gradients and moments."""
        kept = self.parameter + self.gradient + self.first_moment
        return count_params(config).total * kept + self._second_moments(config)

    def update(self, config: ModelConfig) -> int:
        """Bytes that the optimizer moves: parameters and moments both ways, the gradients in."""
        both = self.parameter + self.first_moment
        read = self.gradient * (1 + self.clip)
        return count_params(config).total * (2 * both + read) + 2 * self._second_moments(config)

    def _second_moments(self, config: ModelConfig) -> int:
        without = hidden_parameters(config) if self.muon else 0
        return (count_params(config).total - without) * self.second_moment


@dataclasses.dataclass(frozen=True)
class Work:
    """One step over all devices.

    `length`: tokens of each row that train and prefill compute; in decode, tokens in each row's cache before its new
    one. `activation_bytes`: per element between ops. `attention`: "fused" keeps scores on the chip, "unfused" writes
    [T, T] of them per head.
    """

    mode: Mode
    batch: int
    length: int
    weights: Format
    cache: Format
    activation_bytes: int = 2
    attention: AttentionForm = "fused"
    remat: Remat = "none"
    state: TrainState = TrainState()

    def __post_init__(self) -> None:
        least = 0 if self.mode == "decode" else 1
        if self.batch < 1 or self.length < least:
            name = "--context" if self.mode == "decode" else "--seq"
            raise ValueError(f"--batch {self.batch} must be at least 1, and {name} {self.length} at least {least}")
        assert self.mode != "train" or not self.weights.scale_bits

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.batch * (1 if self.mode == "decode" else self.length)


def hidden_parameters(config: ModelConfig) -> int:
    """Weights of matrices inside the layers but the routers: those that Muon takes."""
    linears = (op for layer in range(config.num_layers) for op in layer_linears(config, layer) if op.op != "router")
    return sum(op.inputs * op.outputs * op.copies for op in linears)


def product_parameters(config: ModelConfig) -> int:
    """Weights that products take in the compute precision alone: `hidden_parameters`, and a head of its own."""
    return hidden_parameters(config) + (0 if config.tie_embeddings else config.embed_dim * config.vocab_size)


class Bytes(NamedTuple):
    """Bytes read plus written. `state`: gradients, moments and master weights of a train step."""

    weights: int = 0
    cache: int = 0
    activations: int = 0
    state: int = 0


@dataclasses.dataclass(frozen=True)
class Op:
    """One op in all `count` layers of a kind, over all devices and the whole step, backward pass included.

    `model_flops` and `hardware_flops` as in the ledger. `kernels`: launches, were each op and each product of its
    backward pass a kernel of its own.
    """

    name: str
    layers: str
    count: int
    dtype: DtypeClass
    model_flops: int
    hardware_flops: int
    bytes: Bytes
    kernels: int

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes)


class LayerKind(NamedTuple):
    """Layers whose ops cost the same: feed-forward (dense or experts) and sliding window."""

    is_moe: bool
    window: int | None


def layer_kinds(config: ModelConfig) -> dict[LayerKind, list[int]]:
    """Layers of each kind, in order of first appearance."""
    kinds: dict[LayerKind, list[int]] = {}
    for layer in range(config.num_layers):
        kinds.setdefault(LayerKind(config.is_moe(layer), config.window(layer)), []).append(layer)
    return kinds


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of one layer that at least one of `tokens` tokens takes, each choosing `experts_per_token` of them
    uniformly and independently: E·(1 − (1 − A/E)^tokens). A trained router is less even, and reaches fewer."""
    moe = config.moe
    assert moe is not None
    return moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** tokens)


def operations(config: ModelConfig, work: Work) -> tuple[Op, ...]:
    """Ops of one step in order of execution, the same op of equal layers together."""
    return tuple(_Step(config, work).ops())


def step_ledger(config: ModelConfig, work: Work) -> Ledger:
    """The FLOP ledger of a train step, or of a forward pass over the same tokens (for decode, one per row).

    Of a forward pass, serving needs the LM head for the last position of each row alone.
    """
    is_train = work.mode == "train"
    return ledger(
        config,
        sequence_length=1 if work.mode == "decode" else work.length,
        batch_size=work.batch,
        mode="train" if is_train else "forward",
        attention="full" if work.attention == "unfused" and work.mode != "decode" else "exact",
        remat=work.remat,
        fused_attention=is_train and work.attention == "fused",
    )


@functools.lru_cache(maxsize=32)
def _ledger_of_a_row(config: ModelConfig, work: Work) -> tuple[Mapping[str, int], dict[tuple[int | None, str], Row]]:
    """(times that each op is recomputed, the ledger's rows by layer and op) of a step of one row."""
    assert work.batch == 1
    book = step_ledger(config, work)
    return book.recomputed, {(row.layer, row.op): row for row in book.rows}


class _Step:
    """Makes the ops of one step."""

    def __init__(self, config: ModelConfig, work: Work) -> None:
        self.config, self.work = config, work
        self.is_train = work.mode == "train"
        # The ledger of one row, times the batch: the search for the ridge tries batches of millions.
        self.recomputed, self.rows_of_one = _ledger_of_a_row(config, dataclasses.replace(work, batch=1))
        self.kinds = layer_kinds(config)
        windowed = len({kind.window for kind in self.kinds}) > 1
        mixed = len({kind.is_moe for kind in self.kinds}) > 1
        self.labels = {kind: _label(kind, windowed, mixed) for kind in self.kinds}

    def ops(self) -> Iterator[Op]:
        yield self.embedding()
        for kind, layers in self.kinds.items():
            yield from self.attention_block(kind, layers)
            yield from self.mlp_block(kind, layers)
        yield self.elementwise("final_norm", None, 2, 3, self.config.embed_dim, vectors=self.config.embed_dim)
        yield from self.head()
        if self.is_train:
            yield from self.update()

    def row(self, layer: int | None, op: str) -> Row:
        row = self.rows_of_one[layer, op]
        batch = self.work.batch
        return dataclasses.replace(row, forward=row.forward * batch, executed=row.executed * batch)

    # Outside of the layers.

    def embedding(self) -> Op:
        """The rows that are looked up. `Traffic` leaves them out, so they are not among the weight bytes."""
        config, work = self.config, self.work
        row = work.weights.matrix(config.embed_dim, 1) + config.embed_dim * work.activation_bytes
        state = config.embed_dim * config.vocab_size * work.state.gradient if self.is_train else 0
        read_back = work.tokens * config.embed_dim * work.activation_bytes if self.is_train else 0
        moved = Bytes(activations=work.tokens * row + read_back, state=state)
        return Op("embedding", "-", 1, "compute", 0, 0, moved, 2 if self.is_train else 1)

    def head(self) -> Iterator[Op]:
        config, work = self.config, self.work
        row = self.row(None, "lm_head")
        positions = work.tokens if self.is_train else work.batch
        flops = (row.model_flops, row.hardware_flops)
        if not self.is_train:
            flops = (row.forward // work.tokens * positions,) * 2
        logits = positions * config.vocab_size * FLOAT32_BYTES
        inputs = positions * config.embed_dim * work.activation_bytes
        # Training reads the logits' gradient twice, for the two products of the backward pass.
        activations = inputs + logits + (2 * logits + 2 * inputs if self.is_train else 0)
        weights = work.weights.matrix(config.embed_dim, config.vocab_size)
        state = config.embed_dim * config.vocab_size * work.state.gradient if self.is_train else 0
        moved = Bytes(weights * (2 if self.is_train else 1), 0, activations, state)
        yield Op("lm_head", "-", 1, "compute", *flops, moved, 3 if self.is_train else 1)
        name, passes = ("loss", 2) if self.is_train else ("sampling", 1)
        yield Op(name, "-", 1, "compute", 0, 0, Bytes(activations=passes * logits), 1)

    def update(self) -> Iterator[Op]:
        work, parameters = self.work, count_params(self.config).total
        kernels = sum(len(layer_linears(self.config, layer)) for layer in range(self.config.num_layers)) + 2
        compute_bytes, state = work.weights.bits // 8, work.state.update(self.config)
        if work.state.copies and compute_bytes < work.state.parameter:
            state += 0 if work.state.halves else compute_bytes * product_parameters(self.config)
        elif compute_bytes != work.state.parameter:
            moved = Bytes(state=parameters * (work.state.parameter + compute_bytes))
            yield Op("cast_weights", "-", 1, "compute", 0, 0, moved, kernels)
        yield Op("optimizer", "-", 1, "compute", 0, 0, Bytes(state=state), kernels)

    # Layers.

    def attention_block(self, kind: LayerKind, layers: list[int]) -> Iterator[Op]:
        config, work = self.config, self.work
        query, key, value, output = layer_linears(config, layers[0])[:4]
        yield self.norms(kind, layers)
        yield from self.linears("qkv", (query, key, value), kind, work.tokens)
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if config.rope.fraction or config.qk_norm:
            width = heads + kv_heads
            yield self.elementwise("rope", kind, 2, 2, width)
        if not self.is_train:
            yield self.cache_write(kind)
        yield from self.attention(kind, layers, heads, kv_heads)
        yield self.linear(output, kind, work.tokens)

    def norms(self, kind: LayerKind, layers: list[int]) -> Op:
        """Both norms of a layer with their residual additions, and the few KB of all its vectors.

        An addition and the norm after it read the stream and a block's output, and write the stream and the normed.
        """
        config = self.config
        passes = 8 + (4 if config.norm_placement == "both" else 0)
        count = 4 if config.norm_placement == "both" else 2
        vectors = layer_vectors(config, layers[0])
        return self.elementwise("norms", kind, passes, passes, config.embed_dim, vectors=vectors, kernels=count)

    def cache_write(self, kind: LayerKind) -> Op:
        count, tokens = len(self.kinds[kind]), self.work.tokens
        kv_bytes = 2 * self.config.num_kv_heads * self.config.head_dim * self.work.activation_bytes
        moved = Bytes(
            cache=count * tokens * cache_token_bytes(self.config, self.work.cache),
            activations=count * tokens * kv_bytes,
        )
        return Op("kv_write", self.labels[kind], count, "compute", 0, 0, moved, count)

    def attention(self, kind: LayerKind, layers: list[int], heads: int, kv_heads: int) -> Iterator[Op]:
        """One kernel, or with scores in memory three: q·k, softmax, p·v."""
        work, count = self.work, len(layers)
        flops = {name: self.attention_flops(name, layers[0], count, kind.window) for name in ATTENTION_OPS}
        read, label = self.cache_read(kind) * count, self.labels[kind]
        per_token = count * work.tokens * work.activation_bytes
        # In decode keys and values come from the cache.
        keys = 0 if work.mode == "decode" else kv_heads
        if work.attention == "fused":
            passes = 2 * heads + 2 * keys
            backward, again = (4 * heads + 4 * kv_heads, self.recomputed.get("pv", 0)) if self.is_train else (0, 0)
            moved = Bytes(cache=read, activations=per_token * (passes * (1 + again) + backward))
            total = [sum(pair) for pair in zip(*flops.values(), strict=True)]
            yield Op("attention", label, count, "compute", *total, moved, count * (2 if self.is_train else 1))
            return
        yield from self.unfused(kind, flops, read, per_token, heads, keys)

    def unfused(self, kind, flops, read: int, per_token: int, heads: int, keys: int) -> Iterator[Op]:
        """Scores [T, T] of each head, dense: written, read and written by softmax, read. The backward pass reads the
        probabilities for the values' gradient, writes and reads their own gradient, and the same of the scores."""
        work, count, label = self.work, len(self.kinds[kind]), self.labels[kind]
        scores = count * work.batch * self.config.num_heads * work.activation_bytes
        scores *= self.span(kind.window) if work.mode == "decode" else work.length**2
        train, again = self.is_train, self.recomputed.get("pv", 0) if self.is_train else 0
        for name, inputs, passes, backward in (
            ("qk", heads + keys, 1, 2),
            ("softmax", 0, 2, 3),
            ("pv", heads + keys, 1, 2),
        ):
            runs = 1 + again
            activations = per_token * inputs * (runs + (2 if train else 0))
            activations += scores * (passes * runs + (backward if train else 0))
            # Keys for q·k, values for p·v: a half of what is cached each.
            moved = Bytes(cache=0 if name == "softmax" else read // 2, activations=activations)
            products = flops.get(name, (0, 0))
            kernels = count * (runs + ((1 if name == "softmax" else 2) if train else 0))
            yield Op(name, label, count, "compute", *products, moved, kernels)

    def span(self, window: int | None) -> int:
        """Tokens that a decoded token attends to, itself included."""
        return causal_pairs(self.work.length + 1, window) - causal_pairs(self.work.length, window)

    def attention_flops(self, name: str, layer: int, count: int, window: int | None) -> tuple[int, int]:
        if self.work.mode != "decode":
            row = self.row(layer, name)
            return count * row.model_flops, count * row.hardware_flops
        flops = count * self.work.batch * pair_flops(self.config) * self.span(window)
        return flops, flops

    def cache_read(self, kind: LayerKind) -> int:
        """Of one layer: in decode all cached tokens that the new one attends to."""
        if self.work.mode != "decode":
            return 0
        return self.work.batch * (self.span(kind.window) - 1) * cache_token_bytes(self.config, self.work.cache)

    def mlp_block(self, kind: LayerKind, layers: list[int]) -> Iterator[Op]:
        config, tokens = self.config, self.work.tokens
        mlp = layer_linears(config, layers[0])[4:]
        moe = config.moe
        if moe is None or not kind.is_moe:
            yield from self.feed_forward(mlp, "", config.mlp_dim, kind, tokens)
            return
        routed = tuple(op for op in mlp if op.is_routed)
        rows = tokens * moe.experts_per_token
        # A token is read once and written for each of its experts; and back.
        passes = 1 + moe.experts_per_token
        yield self.linear(mlp[0], kind, tokens)
        yield self.elementwise("dispatch", kind, passes, passes, config.embed_dim)
        yield from self.feed_forward(routed, "expert_", moe.mlp_dim, kind, rows)
        yield self.elementwise("combine", kind, passes, passes, config.embed_dim)
        yield from self.feed_forward(mlp[1 + len(routed) :], "shared_", moe.shared_mlp_dim, kind, tokens)

    def feed_forward(
        self, ops: tuple[Linear, ...], prefix: str, width: int, kind: LayerKind, rows: int
    ) -> Iterator[Op]:
        if not ops:
            return
        *inputs, down = ops
        yield from self.linears(f"{prefix}gate_up", tuple(inputs), kind, rows)
        forward, backward = (3, 5) if self.config.gated_mlp else (2, 3)
        yield self.elementwise(f"{prefix}activation", kind, forward, backward, width * rows // self.work.tokens)
        yield self.linear(down, kind, rows)

    def linears(self, name: str, products: tuple[Linear, ...], kind: LayerKind, rows: int) -> Iterator[Op]:
        """Products of the same rows: one kernel in serving, where their weights are joined; in training one each."""
        parts = [self.linear(op, kind, rows) for op in products]
        if self.is_train or len(parts) == 1:
            yield from parts
            return
        count, first = len(self.kinds[kind]), parts[0]
        again = (len(parts) - 1) * count * rows * products[0].inputs * self.work.activation_bytes
        moved = Bytes(
            weights=sum(part.bytes.weights for part in parts),
            activations=sum(part.bytes.activations for part in parts) - again,
        )
        yield dataclasses.replace(
            first,
            name=name,
            model_flops=sum(part.model_flops for part in parts),
            hardware_flops=sum(part.hardware_flops for part in parts),
            bytes=moved,
        )

    def linear(self, op: Linear, kind: LayerKind, rows: int) -> Op:
        """A product of [rows, inputs] with its weights; its backward pass has two, for inputs and for weights."""
        work, layers = self.work, self.kinds[kind]
        count, row = len(layers), self.row(layers[0], op.op)
        runs, train = 1 + row.recompute, self.is_train
        output_bytes = FLOAT32_BYTES if op.dtype == "float32" else work.activation_bytes
        forward = rows * (op.inputs * work.activation_bytes + op.outputs * output_bytes)
        gradients = op.inputs * op.outputs * op.copies * work.state.gradient if train else 0
        moved = Bytes(
            round(count * self.linear_weights(op) * (runs + train)),
            activations=count * forward * (runs + 2 * train),
            state=count * gradients,
        )
        flops = (count * row.model_flops, count * row.hardware_flops)
        return Op(op.op, self.labels[kind], count, op.dtype, *flops, moved, count * (runs + 2 * train))

    def linear_weights(self, op: Linear) -> float:
        """Bytes of the weights that one pass reads in one layer: of the experts, those that some token takes."""
        if op.op == "router":
            moe = self.config.moe
            assert moe is not None
            return (op.inputs * op.outputs + (moe.num_experts if moe.router_bias else 0)) * FLOAT32_BYTES
        one = self.work.weights.matrix(op.inputs, op.outputs)
        return one * (expected_experts(self.config, self.work.tokens) if op.is_routed else op.copies)

    def elementwise(
        self,
        name: str,
        kind: LayerKind | None,
        forward: int,
        backward: int,
        width: int,
        *,
        vectors: int = 0,
        kernels: int = 1,
    ) -> Op:
        """An op that moves `forward` times `width` elements per token (and as much again if it is recomputed), and
        `backward` times in the backward pass. No product, so no FLOPs of the ledger."""
        work, count = self.work, 1 if kind is None else len(self.kinds[kind])
        # The final norm is outside of the layers that are recomputed.
        runs = 2 if self.is_train and work.remat != "none" and kind is not None else 1
        passes = forward * runs + (backward if self.is_train else 0)
        moved = Bytes(
            weights=count * vectors * work.weights.vector_bytes * (runs + self.is_train),
            activations=count * passes * width * work.tokens * work.activation_bytes,
            state=count * vectors * work.state.gradient if self.is_train else 0,
        )
        label = "-" if kind is None else self.labels[kind]
        return Op(name, label, count, "compute", 0, 0, moved, count * kernels * (runs + self.is_train))


def _label(kind: LayerKind, windowed: bool, mixed: bool) -> str:
    words = [("moe" if kind.is_moe else "dense")] if mixed else []
    if windowed:
        words.append("full" if kind.window is None else f"window {kind.window}")
    return " ".join(words) or "all"


@functools.cache
def train_weights(activation_bytes: int) -> Format:
    """Weights as a train step multiplies them: in the format of its activations."""
    return WEIGHTS["fp32" if activation_bytes == FLOAT32_BYTES else "bf16"]


def totals(ops: tuple[Op, ...]) -> Counter[str]:
    """Sums over ops: model_flops, hardware_flops, kernels, and bytes by kind."""
    total: Counter[str] = Counter()
    for op in ops:
        total.update(model_flops=op.model_flops, hardware_flops=op.hardware_flops, kernels=op.kernels)
        total.update({f"{kind}_bytes": value for kind, value in op.bytes._asdict().items()})
    return total
