"""One optimizer step, and one evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from kernels.cross_entropy import Impl as CrossEntropyImpl
from model.config import ModelConfig
from model.execution import Execution
from model.transformer import Definition, Tree
from training.config import LossConfig
from training.halves import NO_HALVES, Halves, clip_factor, update
from training.loss import cross_entropy
from training.optimizer import adamw_moments, with_adamw_moments
from training.state import TrainState, copies_of

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Carry = tuple[Tree, Tree]
"""Sums of gradients, and magnitudes."""


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a step is compiled from, besides shapes."""

    definition: Definition
    execution: Execution
    loss: LossConfig
    accumulation: int = 1
    cross_entropy: CrossEntropyImpl = "xla"
    """Implementation of the loss's softmax and its gradient."""
    halves: Halves = NO_HALVES
    """Parameters that AdamW's kernel updates; none where XLA does all."""


def make_train_step(
    spec: StepSpec, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), to be jitted with the state donated.

    The batch is [B, T] arrays (tokens, targets, segments, positions, weights); it is cut into `accumulation`
    microbatches whose gradients are summed. The loss is the mean over the whole batch's weights, so the number of
    microbatches changes rounding alone; the routers' auxiliary losses are means over microbatches. A step with a
    non-finite loss or gradient changes nothing but `bad_step`.
    """
    gradient_dtype = spec.execution.precision.gradient

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total_weight = jnp.maximum(batch["weights"].sum(), 1.0)

        def microstep(carry: Carry, micro: Batch) -> tuple[Carry, Metrics]:
            def loss(weights: Tree, magnitudes: Tree) -> tuple[jax.Array, Metrics]:
                return objective(weights, state.biases, micro, total_weight, spec, magnitudes)

            gradient_fn = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            (_, metrics), (gradient, magnitudes) = gradient_fn(state.weights, state.magnitudes)
            total = gradient
            if spec.accumulation > 1:
                total = jax.tree.map(lambda sum_, g: sum_ + g.astype(gradient_dtype), carry[0], gradient)
            # The gradient of magnitudes is what they become, with this step's: the largest of any microbatch.
            return (total, jax.tree.map(jnp.maximum, carry[1], magnitudes)), metrics

        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, gradient_dtype), state.params)
        none = jax.tree.map(jnp.zeros_like, state.magnitudes)
        (gradient, magnitudes), metrics = _accumulate(microstep, (zero, none), batch, spec.accumulation)
        return _update(state, gradient, magnitudes, metrics, spec, optimizer, schedule)

    return step


def make_eval_step(spec: StepSpec) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]:
    """eval(weights, biases, batch) -> (sum of nats, sum of weights), float32 scalars."""

    def step(weights: Tree, biases: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, metrics = objective(weights, biases, batch, jnp.float32(1.0), spec)
        return metrics["loss_sum"], metrics["weight_sum"]

    return step


def objective(
    weights: Tree,
    biases: Tree,
    batch: Batch,
    total_weight: jax.Array,
    spec: StepSpec,
    magnitudes: Tree | None = None,
) -> tuple[jax.Array, Metrics]:
    """This microbatch's share of the loss, and sums to add up over microbatches (router terms are averaged).

    `weights`: the parameters, or `TrainState.weights`: what is cast already is not cast again. Without `magnitudes`, as
    in evaluation, products in few bits have scales by their own operands.
    """
    config, execution = spec.definition.config, spec.execution
    model = spec.definition.bind(weights, biases, magnitudes)
    output = model(batch["tokens"], batch["positions"], batch.get("segments"), execution)
    with jax.named_scope("cross_entropy"):
        sums = cross_entropy(
            output.hidden_BTD,
            model.head(execution),
            batch["targets"],
            batch["weights"],
            placement=execution.placement,
            soft_cap=config.final_soft_cap,
            z_loss_coef=spec.loss.z_loss_coef,
            chunk_tokens=spec.loss.chunk_tokens,
            impl=spec.cross_entropy,
            target=spec.execution.target,
        )
    value = (sums.loss_sum + spec.loss.z_loss_coef * sums.z_loss_sum) / total_weight
    metrics = {"loss_sum": sums.loss_sum, "weight_sum": sums.weight_sum, "correct_sum": sums.correct_sum}
    if output.moe is not None:
        moe = config.moe
        balance, router_z = output.moe.load_balance.mean(), output.moe.router_z.mean()
        value += (moe.load_balance_coef * balance + moe.router_z_coef * router_z) / spec.accumulation
        metrics |= {"load_LE": output.moe.load_E, "load_balance": balance, "router_z": router_z}
        metrics |= {"dropped": output.moe.dropped.mean()}
    if output.finite_L is not None:
        metrics["finite_L"] = output.finite_L
    return value, metrics


def _accumulate(
    microstep: Callable[[Carry, Batch], tuple[Carry, Metrics]], zero: Carry, batch: Batch, count: int
) -> tuple[Carry, Metrics]:
    if count == 1:
        return microstep(zero, batch)
    # Microbatch i takes rows i, i + count, ...: a device's rows stay its own.
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    carry, metrics = jax.lax.scan(microstep, zero, micro)
    averaged = ("load_balance", "router_z", "dropped")
    return carry, {k: m.mean(axis=0) if k in averaged else m.sum(axis=0) for k, m in metrics.items()}


def _update(
    state: TrainState,
    gradient: Tree,
    magnitudes: Tree,
    metrics: Metrics,
    spec: StepSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
    definition, old_params = spec.definition, state.full_params
    loss = metrics["loss_sum"] / jnp.maximum(metrics["weight_sum"], 1.0)
    # A kernel reads a single microbatch's as its products gave it: written wide, it would be six bytes a parameter.
    own, gradient = gradient, jax.tree.map(lambda g: g.astype(spec.execution.precision.gradient), gradient)
    gradient_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    good = finite & (state.bad_step < 0)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, old_params)
        params = optax.apply_updates(old_params, updates)
    biases = state.biases
    if definition.config.moe is not None and definition.config.moe.bias_update_rate:
        biases = balance_biases(definition, state.biases, metrics["load_LE"])
    new: Any = (params, biases, opt_state, magnitudes)
    old: Any = (old_params, state.biases, state.opt_state, state.magnitudes)
    kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
    report = {
        "loss": loss,
        "accuracy": metrics["correct_sum"] / jnp.maximum(metrics["weight_sum"], 1.0),
        "gradient_norm": gradient_norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "target_tokens": metrics["weight_sum"],
        "bad_step": bad_step,
    }
    report |= _moe_report(definition.config, metrics)
    step = state.step + good.astype(jnp.int32)
    # Of what is kept, so that a step that is not finite leaves the copies too.
    after = TrainState(step, bad_step, *kept, copies_of(definition, kept[0]))
    if spec.halves.settings:
        clip = clip_factor(spec.halves, gradient_norm)
        factors = {"apply": good, "clip": clip, "learning_rate": schedule(state.step), "count": state.step + 1}
        after = _with_halves(after, state, own, factors, spec)
    return after, report


def _with_halves(
    after: TrainState, before: TrainState, gradient: Tree, factors: dict[str, Any], spec: StepSpec
) -> TrainState:
    """`after`, with parameters in halves as the kernel updates them. What Optax made of these is read by nothing, so
    XLA computes none of it."""
    logical, moments = spec.definition.logical[0], adamw_moments(before.opt_state)
    with jax.named_scope("optimizer"):
        rests, rounded, moments = update(
            spec.halves, gradient, before.params, before.copies, moments, factors, logical, spec.execution
        )
    flat_params, flat_copies = traverse_util.flatten_dict(after.params), traverse_util.flatten_dict(after.copies)
    return dataclasses.replace(
        after,
        params=traverse_util.unflatten_dict(flat_params | rests),
        copies=traverse_util.unflatten_dict(flat_copies | rounded),
        opt_state=with_adamw_moments(after.opt_state, moments),
    )


def _moe_report(config: ModelConfig, metrics: Metrics) -> Metrics:
    """Balance of the experts: `expert_load_max` is the busiest expert's load over the mean, worst layer."""
    if config.moe is None:
        return {}
    load_LE = metrics["load_LE"]
    mean_L = jnp.maximum(load_LE.mean(axis=-1), 1e-9)
    return {
        "expert_load_max": (load_LE.max(axis=-1) / mean_L).max(),
        "expert_load_min": (load_LE.min(axis=-1) / mean_L).min(),
        "expert_load_LE": load_LE,
        "load_balance": metrics["load_balance"],
        "router_z": metrics["router_z"],
        "dropped": metrics["dropped"],
    }


def balance_biases(definition: Definition, biases: Tree, load_LE: jax.Array) -> Tree:
    """Each expert's bias one step up if its load is below the mean, down if above (arXiv 2408.15664, algorithm 1)."""
    moe = definition.config.moe
    error_LE = jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)

    def move(path, bias):
        layers = definition.layers_at(tuple(entry.key for entry in path))
        moe_layers = jnp.array([layer - moe.num_dense_layers for layer in layers])
        return bias + moe.bias_update_rate * error_LE[moe_layers].reshape(bias.shape)

    return jax.tree_util.tree_map_with_path(move, biases)
