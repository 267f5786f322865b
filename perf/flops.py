"""FLOPs and parameters of a model, per layer and op, from its configuration alone.

A matmul of [m, k] by [k, n] is 2·m·k·n FLOPs; its backward pass is two such matmuls (one per operand). Only matmuls
count: norms, rotations, softmax, soft-caps, sinks, activations and the embedding look-up do not.

Three totals of one step:

- `model_flops`, the numerator of `mfu`: what the mathematics needs. Attention counts the pairs (query, key) that the
  mask leaves: causal T(T+1)/2, sliding windows and packed documents exactly. A token uses `experts_per_token` experts.
- `palm_flops`, the numerator of `mfu_palm`: 6·N + 12·L·H·Q·T per token (PaLM, arXiv 2204.02311, appendix B), with N
  the active matmul parameters (LM head in, embedding look-up out). Attention is counted as if every token saw all T.
- `hardware_flops`, the numerator of `hfu`: what the device runs, with padding, masked pairs that the attention
  implementation computes anyway, and recompute.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from model.config import ModelConfig, MoEConfig

Mode = Literal["train", "forward"]
Attention = Literal["exact", "full", "blocks"]
Remat = Literal["none", "dots", "full"]
DtypeClass = Literal["compute", "float32"]

ATTENTION_OPS = ("qk", "pv")


class ParameterCount(NamedTuple):
    """Parameters of a model. `active` leaves out the experts that a token does not use; both count the embedding."""

    total: int
    active: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One matmul of one layer over a whole step; `layer` is None for the LM head.

    `forward`: model FLOPs of the forward pass. `executed`: FLOPs that the device runs for it. `backward` and
    `recompute`: how many more times `forward` (or `executed`) the backward pass and recompute cost.
    `dtype`: "compute" for the compute precision, "float32" where the model insists on it (the router).
    """

    layer: int | None
    op: str
    dtype: DtypeClass
    forward: int
    executed: int
    backward: int
    recompute: int

    @property
    def model_flops(self) -> int:
        return self.forward * (1 + self.backward)

    @property
    def hardware_flops(self) -> int:
        return self.executed * (1 + self.backward + self.recompute)


class Linear(NamedTuple):
    """A product with weights: `uses` weight matrices of `inputs` × `outputs` per token, out of `copies`."""

    op: str
    inputs: int
    outputs: int
    uses: int = 1
    copies: int = 1
    dtype: DtypeClass = "compute"

    @property
    def active_weights(self) -> int:
        return self.inputs * self.outputs * self.uses

    @property
    def is_routed(self) -> bool:
        """Of the routed experts: a token uses some copies, by the router's choice."""
        return self.op.startswith("expert_")


@dataclasses.dataclass(frozen=True)
class Ledger:
    """FLOPs of one step of `batch_size` rows of `sequence_length` tokens, over all devices; see the module for terms.

    `documents`: lengths of the packed documents, None for one document per row.
    """

    config: ModelConfig
    sequence_length: int
    batch_size: int
    documents: tuple[int, ...] | None
    mode: Mode
    attention: Attention
    query_block: int | None
    recomputed: Mapping[str, int]
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.executed_tokens if self.documents is None else sum(self.documents)

    @property
    def executed_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @functools.cached_property
    def forward(self) -> int:
        """Model FLOPs of the forward pass."""
        return sum(row.forward for row in self.rows)

    @functools.cached_property
    def executed_forward(self) -> int:
        """FLOPs that the forward pass executes: with `attention="full"`, what a jaxpr of dense attention counts."""
        return sum(row.executed for row in self.rows)

    @functools.cached_property
    def model_flops(self) -> int:
        return sum(row.model_flops for row in self.rows)

    @functools.cached_property
    def hardware_flops(self) -> int:
        return sum(row.hardware_flops for row in self.rows)

    @property
    def palm_flops(self) -> int:
        return self.tokens * self.palm_flops_per_token

    @property
    def palm_flops_per_token(self) -> int:
        config = self.config
        pairs = config.num_layers * config.num_heads * config.head_dim * self.sequence_length
        forward = 2 * matmul_parameters(config) + 4 * pairs
        return forward * (3 if self.mode == "train" else 1)

    @property
    def model_flops_per_token(self) -> float:
        return self.model_flops / self.tokens

    @property
    def hardware_flops_per_token(self) -> float:
        return self.hardware_flops / self.tokens

    def for_documents(self, lengths: Iterable[int]) -> Ledger:
        """The same step over documents of these lengths (of the whole batch); padding is what they leave."""
        return _fill(dataclasses.replace(self, documents=tuple(int(n) for n in lengths), rows=()))

    def table(self) -> str:
        """Per-layer table in GFLOP per token; runs of equal layers share lines."""
        return _table(self)


def ledger(
    config: ModelConfig,
    *,
    sequence_length: int,
    batch_size: int = 1,
    segment_lengths: Iterable[int] | None = None,
    mode: Mode = "train",
    attention: Attention = "exact",
    query_block: int | None = None,
    remat: Remat = "none",
    recomputed: Sequence[str] | None = None,
    fused_attention: bool = False,
) -> Ledger:
    """FLOP ledger of one step of [batch_size, sequence_length] tokens.

    `segment_lengths`: lengths of the packed documents of the batch; tokens beyond them are padding, which the
    hardware runs and the model does not need. `attention`: what the device computes, "exact" for kernels that skip
    masked pairs (their partly masked tiles are not counted), "full" for a dense masked product of T × T, "blocks" for
    blocks of `query_block` queries, each against the keys from its first query's window to its last query.
    `remat`: which ops the backward pass recomputes, see `recomputed_ops`; `recomputed` names them instead, an op
    twice if it runs twice more. `fused_attention`: attention is a kernel whose backward pass recomputes q·k
    (FlashAttention, arXiv 2205.14135, section 3.1).

    Raises ValueError for sizes below 1, for segments that do not fit, and for an unknown op.
    """
    if sequence_length < 1 or batch_size < 1:
        raise ValueError(f"sequence_length={sequence_length} and batch_size={batch_size} must be at least 1")
    if (query_block is not None and query_block < 1) or (attention == "blocks") != (query_block is not None):
        raise ValueError(f"attention='{attention}' with query_block={query_block}; 'blocks' needs one, others none")
    again: Counter[str] = Counter()
    if mode == "train":
        again.update(recomputed_ops(config, remat) if recomputed is None else recomputed)
        if fused_attention:
            again["qk"] += 1
    documents = None if segment_lengths is None else tuple(int(n) for n in segment_lengths)
    return _fill(Ledger(config, sequence_length, batch_size, documents, mode, attention, query_block, dict(again), ()))


def recomputed_ops(config: ModelConfig, remat: Remat) -> tuple[str, ...]:
    """Ops of a block that the backward pass runs again.

    "none": nothing. "dots": `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` saves products with a weight
    matrix; those of attention (batched) and of experts (grouped) run again. "full": only the block's input is saved;
    then every matmul runs again but the last, whose output nobody needs unless a norm follows it. Experts are the
    exception: the router's gradient needs their outputs.
    """
    if remat == "none":
        return ()
    if remat == "dots":
        return tuple(op for op in _block_ops(config) if op in ATTENTION_OPS or op.startswith("expert_"))
    if remat != "full":
        raise ValueError(f"remat='{remat}' is not one of 'none', 'dots', 'full'")
    last = ("down", "shared_down") if config.norm_placement == "pre" else ()
    return tuple(op for op in _block_ops(config) if op not in last)


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) of one document that a causal mask leaves; token t sees min(t + 1, window) tokens."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def attention_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """Causal pairs of packed documents: none between documents."""
    return sum(causal_pairs(length, window) for length in lengths)


def pair_flops(config: ModelConfig) -> int:
    """FLOPs of one pair (query, key) in one layer, for q·k as for p·v: a multiply-add per element of a query head."""
    return 2 * config.num_heads * config.head_dim


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that multiply each token: experts in use, router and LM head (tied or not), no embedding look-up."""
    return sum(op.active_weights for layer in range(config.num_layers) for op in layer_linears(config, layer)) + (
        config.embed_dim * config.vocab_size
    )


def count_params(config: ModelConfig) -> ParameterCount:
    """Every parameter: weights, norms, biases, sinks and router. A tied embedding is counted once.

    The balancing bias of the router is state that no gradient reaches, and is not counted.
    """
    total = active = 0
    for layer in range(config.num_layers):
        linears = layer_linears(config, layer)
        vectors = layer_vectors(config, layer)
        total += vectors + sum(op.inputs * op.outputs * op.copies for op in linears)
        active += vectors + sum(op.active_weights for op in linears)
    outside = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2) + config.embed_dim
    return ParameterCount(total + outside, active + outside)


def layer_linears(config: ModelConfig, layer: int) -> tuple[Linear, ...]:
    """Products with weights of one layer, in the order of execution."""
    embed = config.embed_dim
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = (
        Linear("query", embed, heads),
        Linear("key", embed, kv_heads),
        Linear("value", embed, kv_heads),
        Linear("output", heads, embed),
    )
    moe = config.moe
    if moe is None or not config.is_moe(layer):
        return attention + _mlp(config, "", config.mlp_dim)
    router = Linear("router", embed, moe.num_experts, dtype="float32")
    experts = _mlp(config, "expert_", moe.mlp_dim, moe.experts_per_token, moe.num_experts)
    shared = _mlp(config, "shared_", moe.shared_mlp_dim) if moe.shared_mlp_dim else ()
    return (*attention, router, *experts, *shared)


def _mlp(config: ModelConfig, prefix: str, width: int, uses: int = 1, copies: int = 1) -> tuple[Linear, ...]:
    inputs = ("gate", "up") if config.gated_mlp else ("up",)
    return (
        *(Linear(prefix + name, config.embed_dim, width, uses, copies) for name in inputs),
        Linear(prefix + "down", width, config.embed_dim, uses, copies),
    )


def layer_vectors(config: ModelConfig, layer: int) -> int:
    """Parameters of a layer that are not matmul weights: norms, biases, sinks."""
    count = config.embed_dim * (4 if config.norm_placement == "both" else 2)
    if config.qk_norm:
        count += 2 * config.head_dim
    if config.qkv_bias:
        count += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if config.attention_output_bias:
        count += config.embed_dim
    if config.attention_sinks:
        count += config.num_heads
    # Routed experts have no biases; the shared expert is a plain feed-forward.
    if not config.is_moe(layer):
        width = config.mlp_dim
    else:
        width = config.moe.shared_mlp_dim if config.moe is not None else 0
    if config.mlp_bias and width:
        count += width * (2 if config.gated_mlp else 1) + config.embed_dim
    return count


def _block_ops(config: ModelConfig) -> tuple[str, ...]:
    """Names of all ops that some layer has, in order of first use."""
    names = dict.fromkeys(ATTENTION_OPS)
    for layer in range(config.num_layers):
        names.update(dict.fromkeys(op.op for op in layer_linears(config, layer)))
    return tuple(names)


def _fill(book: Ledger) -> Ledger:
    """The ledger with its rows computed."""
    config = book.config
    known = (*_block_ops(config), "lm_head")
    unknown = sorted(set(book.recomputed) - set(known))
    if unknown:
        raise ValueError(f"recomputed ops {unknown} are not ops of this model; ops: {', '.join(known)}")
    lengths = (book.sequence_length,) * book.batch_size if book.documents is None else book.documents
    _check_documents(book, lengths)
    pairs = {window: _pairs(lengths, window) for window in set(config.window_pattern)}
    executed = {window: _executed_pairs(book, window, exact) for window, exact in pairs.items()}
    rows = []
    for layer in range(config.num_layers):
        query, key, value, output, *mlp = layer_linears(config, layer)
        rows += [_linear_row(book, layer, op) for op in (query, key, value)]
        window = config.window(layer)
        rows += [_attention_row(book, layer, op, pairs[window], executed[window]) for op in ATTENTION_OPS]
        rows += [_linear_row(book, layer, op) for op in (output, *mlp)]
    rows.append(_linear_row(book, None, Linear("lm_head", config.embed_dim, config.vocab_size)))
    return dataclasses.replace(book, rows=tuple(rows))


def _pairs(lengths: tuple[int, ...], window: int | None) -> int:
    return sum(count * causal_pairs(length, window) for length, count in Counter(lengths).items())


def _check_documents(book: Ledger, lengths: tuple[int, ...]) -> None:
    if not lengths or min(lengths) < 1 or max(lengths) > book.sequence_length or sum(lengths) > book.executed_tokens:
        raise ValueError(
            f"segment_lengths: {len(lengths)} documents of {sum(lengths)} tokens, from {min(lengths, default=0)} to "
            f"{max(lengths, default=0)} long, do not fit {book.batch_size} rows of {book.sequence_length} tokens; "
            "give the lengths of the documents in one batch, each at least 1"
        )


def _row(book: Ledger, layer: int | None, op: str, dtype: DtypeClass, forward: int, executed: int) -> Row:
    backward = 2 if book.mode == "train" else 0
    return Row(layer, op, dtype, forward, executed, backward, book.recomputed.get(op, 0))


def _linear_row(book: Ledger, layer: int | None, op: Linear) -> Row:
    forward = 2 * op.active_weights * book.tokens
    executed = 2 * op.active_weights * book.executed_tokens
    moe = book.config.moe
    if moe is not None and moe.dispatch == "capacity" and op.copies > 1:
        # Every slot of every expert is computed, filled or not; a token beyond the slots is not.
        slots = _capacity(moe, book.sequence_length)
        executed = 2 * op.inputs * op.outputs * book.batch_size * moe.num_experts * slots
        forward = min(forward, executed)
    return _row(book, layer, op.op, op.dtype, forward, executed)


def _capacity(moe: MoEConfig, sequence_length: int) -> int:
    """Slots per expert and sequence: `capacity_factor` over the balanced share, at most one per token."""
    balanced = sequence_length * moe.experts_per_token / moe.num_experts
    return min(max(math.ceil(moe.capacity_factor * balanced), 1), sequence_length)


def _attention_row(book: Ledger, layer: int, op: str, pairs: int, executed: int) -> Row:
    per_pair = pair_flops(book.config)
    return _row(book, layer, op, "compute", per_pair * pairs, per_pair * executed)


def _executed_pairs(book: Ledger, window: int | None, exact: int) -> int:
    length = book.sequence_length
    if book.attention == "exact":
        return exact
    if book.query_block is None:
        return book.batch_size * length**2
    pairs = 0
    for start in range(0, length, book.query_block):
        stop = min(start + book.query_block, length)
        low = 0 if window is None else max(0, start - window + 1)
        pairs += (stop - start) * (stop - low)
    return book.batch_size * pairs


def _table(book: Ledger) -> str:
    columns = ("layers", "op", "dtype", "forward", "model", "hardware", "share")
    lines = ["{:>9}  {:<12} {:<8} {:>10} {:>10} {:>10} {:>7}".format(*columns)]
    for layers, rows in _runs(book):
        for row in rows:
            scale = len(layers) / book.tokens / 1e9
            name = "-" if row.layer is None else f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
            share = row.model_flops * len(layers) / book.model_flops
            lines.append(
                f"{name:>9}  {row.op:<12} {row.dtype:<8} {row.forward * scale:>10.4f} {row.model_flops * scale:>10.4f} "
                f"{row.hardware_flops * scale:>10.4f} {share:>7.2%}"
            )
    per_token = [total / book.tokens / 1e9 for total in (book.forward, book.model_flops, book.hardware_flops)]
    lines.append("{:>9}  {:<12} {:<8} {:>10.4f} {:>10.4f} {:>10.4f} {:>7.2%}".format("total", "", "", *per_token, 1))
    params = count_params(book.config)
    lines.append(
        f"GFLOP per token, {book.mode}, {book.batch_size} × {book.sequence_length} tokens "
        f"({book.tokens:,} not padding); 6·N + 12·L·H·Q·T convention: {book.palm_flops_per_token / 1e9:.4f}; "
        f"parameters {params.total:,}, active {params.active:,}, in matmuls {matmul_parameters(book.config):,}"
    )
    return "\n".join(lines)


def _runs(book: Ledger) -> list[tuple[list[int], list[Row]]]:
    """Runs of consecutive layers whose rows are equal, with the rows of the first; the LM head is its own run."""
    layers = [(layer, list(rows)) for layer, rows in itertools.groupby(book.rows, key=lambda row: row.layer)]
    runs: list[tuple[list[int], list[Row]]] = []
    for layer, rows in layers:
        same = runs and layer is not None and [dataclasses.replace(row, layer=runs[-1][1][0].layer) for row in rows]
        if same and same == runs[-1][1]:
            runs[-1][0].append(layer)
        else:
            runs.append(([0 if layer is None else layer], rows))
    return runs
