"""Mixture-of-Experts feed-forward: router, dispatch, experts, combine.

Dropless dispatch runs per device inside `map_shards`: assignments sorted by expert, one grouped product per
projection. With the experts split over devices, tokens travel by all-to-all (`model/exchange.py`). Capacity dispatch
gathers a fixed number of slots per expert and sequence and leaves the all-to-all to GSPMD.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_matmul.quantized import quantized_grouped_matmul
from kernels.grouped_matmul.swiglu import grouped_swiglu
from kernels.quantized_matmul.activations import swiglu_quantized
from model.config import ModelConfig, MoEConfig
from model.exchange import exchange_experts
from model.execution import Execution
from model.layers import MLP, activate, residual_stddev
from model.parameter import Creator, RouterBias, normal, zeros
from model.permute import combine, expand, sort_by_expert
from model.products import grouped_operand, whole
from model.routing import log_sum, pick, shares, softmax, top
from parallel.sharding import Placement, constrain, map_shards
from quantization.qarray import QArray


class MoEMetrics(NamedTuple):
    """Of one layer: assignments per expert, float32 [E], and scalars. Padding tokens do not count."""

    load_E: jax.Array
    load_balance: jax.Array
    router_z: jax.Array
    dropped: jax.Array
    """Fraction of assignments dropped (0 when dropless)."""


class Routing(NamedTuple):
    experts_BTA: jax.Array
    weights_BTA: jax.Array


class Router(nnx.Module):
    """Scores experts per token; float32 throughout.

    fp32 because top-k is discontinuous: a rounding that swaps two experts changes the output by a whole expert.
    """

    def __init__(self, config: ModelConfig, create: Creator):
        moe = config.moe
        assert moe is not None
        self.moe = moe
        shape = (config.embed_dim, moe.num_experts)
        self.kernel = create("kernel", shape, ("router", None), normal(config.init_stddev), dtype="float32")
        bias = ("bias", (moe.num_experts,), (None,), zeros)
        self.bias = create(*bias, dtype="float32", kind=RouterBias) if moe.router_bias else None

    @jax.named_scope("router")
    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, logits_BTE: jax.Array | None = None
    ) -> tuple[Routing, MoEMetrics]:
        """`logits_BTE`: x · kernel in float32, where what made x has them already."""
        moe = self.moe
        if logits_BTE is None:
            logits_BTE = jnp.einsum(
                "btd,de->bte", x_BTD.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST
            )
        if moe.scoring == "softmax":
            scores_BTE = softmax(logits_BTE)
        else:
            scores_BTE = jax.nn.sigmoid(logits_BTE)
        ranked_BTE = scores_BTE if self.bias is None else scores_BTE + self.bias[...]
        if moe.force_balance:
            experts_BTA = _in_turn(moe, x_BTD.shape[:2])
        else:
            experts_BTA = top(jax.lax.stop_gradient(ranked_BTE), moe.experts_per_token)
        weights_BTA = pick(scores_BTE, experts_BTA)
        if moe.normalize_weights:
            weights_BTA = shares(weights_BTA)
        routing = Routing(experts_BTA, weights_BTA * moe.weight_scale)
        return routing, _metrics(moe, logits_BTE, scores_BTE, experts_BTA, valid_BT)


def _in_turn(moe: MoEConfig, shape: tuple[int, int]) -> jax.Array:
    """Experts of each token [B, T, A]: those after the experts of the token before."""
    index_BTA = jnp.arange(shape[0] * shape[1] * moe.experts_per_token, dtype=jnp.int32) % moe.num_experts
    return index_BTA.reshape(*shape, moe.experts_per_token)


def _metrics(
    moe: MoEConfig, logits_BTE: jax.Array, scores_BTE: jax.Array, experts_BTA: jax.Array, valid_BT: jax.Array
) -> MoEMetrics:
    count = jnp.maximum(valid_BT.sum(), 1.0)
    chosen_BTE = jax.nn.one_hot(experts_BTA, moe.num_experts, dtype=jnp.float32).sum(axis=-2)
    load_E = jnp.einsum("bte,bt->e", chosen_BTE, valid_BT)
    probability_E = jnp.einsum("bte,bt->e", shares(scores_BTE), valid_BT) / count
    fraction_E = load_E / (count * moe.experts_per_token)
    z_BT = log_sum(logits_BTE) ** 2
    return MoEMetrics(
        load_E=load_E,
        load_balance=moe.num_experts * jnp.sum(fraction_E * probability_E),
        router_z=jnp.sum(z_BT * valid_BT) / count,
        dropped=jnp.zeros((), jnp.float32),
    )


class Experts(nnx.Module):
    """The routed feed-forwards, stacked over experts: up and gate [E, D, F], down [E, F, D]."""

    def __init__(self, config: ModelConfig, create: Creator):
        moe = config.moe
        assert moe is not None
        E, D, F = moe.num_experts, config.embed_dim, moe.mlp_dim
        self.config = config
        logical = ("experts", "expert_embed", "expert_mlp")
        self.up = create("up", (E, D, F), logical, normal(config.init_stddev))
        self.gate = create("gate", (E, D, F), logical, normal(config.init_stddev)) if config.gated_mlp else None
        down = ("experts", "expert_mlp", "expert_embed")
        self.down = create("down", (E, F, D), down, normal(residual_stddev(config)))

    def kernels(self, dtype: str) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        gate = None if self.gate is None else whole(self.gate, dtype)
        return whole(self.up, dtype), gate, whole(self.down, dtype)

    def dropless(self, x_BTD: jax.Array, routing: Routing, execution: Execution) -> jax.Array:
        """Every assignment is computed, whatever the balance."""
        tokens = ("batch", None, None)
        wide, narrow = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
        kernels, axes = [], []
        for kernel, own in ((self.up, wide), (self.gate, wide), (self.down, narrow)):
            held = None if kernel is None else grouped_operand(kernel, x_BTD.dtype)
            kernels.append(held)
            axes.append(kernel.get_metadata("logical") if isinstance(held, QArray) else own)
        local = functools.partial(self._dropless_on_device, execution)
        run = map_shards(local, execution.placement, (tokens, tokens, tokens, *axes), tokens)
        return run(x_BTD, routing.experts_BTA, routing.weights_BTA, *kernels)

    def _dropless_on_device(self, execution: Execution, x_BTD, experts_BTA, weights_BTA, up, gate, down) -> jax.Array:
        num_experts, placement = self.config.moe.num_experts, execution.placement
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_NA = experts_BTA.reshape(-1, experts_BTA.shape[-1])
        weights_NA = weights_BTA.reshape(experts_NA.shape)
        kernels = (_gather(up, 1, placement), _gather(gate, 1, placement), _gather(down, 2, placement))
        feed_forward = functools.partial(self._feed_forward, execution)
        how = {"impl": execution.dispatch, "target": execution.target}
        axes = () if placement is None else placement.axes("experts")
        if axes:
            y_ND = exchange_experts(
                x_ND, experts_NA, weights_NA, kernels, feed_forward, num_experts, axes, placement, **how
            )
        else:
            order = sort_by_expert(experts_NA, num_experts)
            y_MD = feed_forward(expand(x_ND, order, **how), order.group_sizes, *kernels)
            # Parts of a sum are added up before they are rounded.
            dtype = jnp.float32 if placement is not None and placement.axes("expert_mlp") else x_BTD.dtype
            y_ND = combine(y_MD, weights_NA, order, dtype, **how)
        if placement is not None:
            # F is split: each shard holds a part of the sum. Tokens are A times fewer than rows: added up here.
            y_ND = jax.lax.psum(y_ND, placement.axes("expert_mlp"))
        return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)

    def _feed_forward(self, execution: Execution, rows_MD, group_sizes, up, gate, down) -> jax.Array:
        """Rows sorted by expert through their expert; partial over the shards of F."""
        how = {"impl": execution.grouped_matmul, "target": execution.target}
        quantized = any(isinstance(kernel, QArray) for kernel in (up, gate, down))
        if gate is not None and self.config.activation == "silu" and not quantized:
            return grouped_swiglu(rows_MD, gate, up, down, group_sizes, **how)

        def product(rows, kernel):
            if isinstance(kernel, QArray):
                made, dtype = isinstance(rows, QArray), _rows_format(kernel)
                rounded = {"activation": None if made else dtype, "out_dtype": rows_MD.dtype}
                # Rows as they are may be of a dtype that the kernel lacks: an error only where it is named.
                impl = execution.quantized_matmul if dtype is None else "pallas"
                return quantized_grouped_matmul(
                    rows, kernel, group_sizes, impl=impl, target=execution.target, **rounded
                )
            return grouped_matmul(rows, kernel, group_sizes, **how)

        up_MF, gate_MF = product(rows_MD, up), None if gate is None else product(rows_MD, gate)
        dtype = _rows_format(down)
        if dtype is not None and gate is not None and self.config.activation == "silu":
            given = {"dtype": dtype, "impl": execution.quantized_activations, "target": execution.target}
            return product(swiglu_quantized(gate_MF, up_MF, **given), down)
        return product(self._activate(up_MF, gate_MF), down)

    def _activate(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
        activation = self.config.activation
        return activate(up, activation) if gate is None else activate(gate, activation) * up

    def capacity(self, x_BTD: jax.Array, routing: Routing, execution: Execution) -> tuple[jax.Array, jax.Array]:
        """At most C assignments per expert and sequence, earlier tokens first; and which were kept, bool [B, T, A]."""
        moe, placement = self.config.moe, execution.placement
        B, T, A = routing.experts_BTA.shape
        D, E = x_BTD.shape[-1], moe.num_experts
        C = min(max(-int(-moe.capacity_factor * T * A // E), 1), T)
        slots = assign_slots(routing.experts_BTA, E, C)
        x_BSD = jnp.take_along_axis(x_BTD, slots.token_BS[..., None], axis=1) * slots.filled_BS[..., None]
        rows = ("expert_batch", "experts", None, None)
        x_BECD = constrain(x_BSD.astype(x_BTD.dtype).reshape(B, E, C, D), placement, *rows)

        up, gate, down = self.kernels(x_BTD.dtype)
        gate_BECF = None if gate is None else jnp.einsum("becd,edf->becf", x_BECD, gate)
        hidden_BECF = self._activate(jnp.einsum("becd,edf->becf", x_BECD, up), gate_BECF)
        hidden_BECF = constrain(hidden_BECF, placement, "expert_batch", "experts", None, "act_mlp")
        y_BECD = constrain(jnp.einsum("becf,efd->becd", hidden_BECF, down), placement, *rows)
        y_BSD = constrain(y_BECD.reshape(B, E * C, D), placement, "batch", None, None)

        y_BTAD = jnp.take_along_axis(y_BSD, slots.slot_BM[..., None], axis=1).reshape(B, T, A, D)
        kept_BTA = slots.kept_BM.reshape(B, T, A)
        weights_BTA = (routing.weights_BTA * kept_BTA).astype(jnp.float32)
        y_BTD = jnp.einsum("btad,bta->btd", y_BTAD.astype(jnp.float32), weights_BTA)
        return y_BTD.astype(x_BTD.dtype), kept_BTA


def _rows_format(kernel: jax.Array | QArray) -> str | None:
    """Dtype that the product with experts' kernels rounds its rows to; None for rows as they are, which kernels in
    fragments take (see `Storage.settle`)."""
    return kernel.dtype.name if isinstance(kernel, QArray) and kernel.layout != "fragments" else None


def _gather(kernel: jax.Array | None, axis: int, placement: Placement | None) -> jax.Array | None:
    """The kernel whole along `axis`. Not on the way in: the gradient of that would be summed whole on every
    device, and this one's is scattered as it is summed."""
    axes = () if placement is None else placement.axes("expert_embed")
    return jax.lax.all_gather(kernel, axes, axis=axis, tiled=True) if axes and kernel is not None else kernel


class Slots(NamedTuple):
    """S = E · C slots of each sequence, C to an expert, and the assignments M = T · A, numbered t · A + a."""

    token_BS: jax.Array
    filled_BS: jax.Array
    slot_BM: jax.Array
    kept_BM: jax.Array


def assign_slots(experts_BTA: jax.Array, num_experts: int, slots_per_expert: int) -> Slots:
    """Slots of each expert to its assignments in the order of tokens; those beyond the last slot are not kept."""
    B, T, A = experts_BTA.shape
    experts_BM = experts_BTA.reshape(B, T * A)
    order_BM = jnp.argsort(experts_BM, axis=-1, stable=True)
    counts_BE = jax.nn.one_hot(experts_BM, num_experts, dtype=jnp.int32).sum(axis=1)
    start_BE = jnp.cumsum(counts_BE, axis=-1) - counts_BE
    source_BEC = jnp.minimum(start_BE[..., None] + jnp.arange(slots_per_expert), T * A - 1)
    filled_BEC = jnp.arange(slots_per_expert) < counts_BE[..., None]
    token_BS = jnp.take_along_axis(order_BM, source_BEC.reshape(B, -1), axis=-1) // A
    # Rank of each assignment among those of its expert.
    rank_BM = jnp.argsort(order_BM, axis=-1) - jnp.take_along_axis(start_BE, experts_BM, axis=-1)
    slot_BM = experts_BM * slots_per_expert + jnp.minimum(rank_BM, slots_per_expert - 1)
    return Slots(token_BS, filled_BEC.reshape(B, -1), slot_BM, rank_BM < slots_per_expert)


class MoE(nnx.Module):
    """Router and experts, and the shared expert that every token takes."""

    def __init__(self, config: ModelConfig, create: Creator):
        assert config.moe is not None
        self.moe = config.moe
        self.router = Router(config, create.scope("router"))
        self.experts = Experts(config, create.scope("experts"))
        width = config.moe.shared_mlp_dim
        self.shared = MLP(width, config, create.scope("shared")) if width else None

    @property
    def rows_format(self) -> None:
        """None: the router reads what comes as it is, in float32."""
        return None

    @property
    def num_reads(self) -> int:
        """One: XLA adds up what the router and the experts give back as it gathers the experts' rows."""
        return 1

    @jax.named_scope("moe")
    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, execution: Execution, logits_BTE: jax.Array | None = None
    ) -> tuple[jax.Array, MoEMetrics]:
        """`logits_BTE`: of the router, where the norm has made them."""
        routing, metrics = self.router(x_BTD, valid_BT, logits_BTE)
        if self.moe.dispatch == "dropless":
            y_BTD = self.experts.dropless(x_BTD, routing, execution)
        else:
            y_BTD, kept_BTA = self.experts.capacity(x_BTD, routing, execution)
            kept = jnp.sum(kept_BTA.mean(axis=-1) * valid_BT) / jnp.maximum(valid_BT.sum(), 1.0)
            metrics = metrics._replace(dropped=1.0 - kept)
        y_BTD = constrain(y_BTD, execution.placement, "batch", "sequence", "act_embed")
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, execution)
        return y_BTD, metrics
