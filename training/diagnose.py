"""Where a loss or gradient first stopped being finite."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from training.state import TrainState
from training.step import Batch, StepSpec, objective


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names where."""


def find_non_finite(spec: StepSpec, state: TrainState, batch: Batch) -> str:
    """Repeats the step that failed, from the state before it, and names the first place that is not finite:
    a parameter, a layer's output, the loss, or the gradient of the layer nearest to the loss."""
    bad = _first_bad_leaf(jax.jit(lambda state: _finite_leaves(state.full_params))(state))
    if bad is not None:
        return f"parameter {bad} is not finite before the step"
    execution = dataclasses.replace(spec.execution, check_finite=True)
    finite_L, loss_finite, gradient = jax.jit(_forward_and_gradient, static_argnums=2)(
        state, batch, dataclasses.replace(spec, execution=execution)
    )
    layers = [number for number, finite in enumerate(finite_L.tolist()) if not finite]
    if layers:
        return f"the output of layer {layers[0]} is the first that is not finite"
    if not bool(loss_finite):
        return "every layer's output is finite, and the loss is not: the LM head's logits overflow"
    bad = _last_bad_leaf(gradient)
    if bad is not None:
        return f"the forward pass is finite; nearest to the loss, the gradient of {bad} is not"
    return "the step is finite when repeated: the hardware or a race produced it"


def _forward_and_gradient(state: TrainState, batch: Batch, spec: StepSpec):
    whole = jnp.maximum(batch["weights"].sum(), 1.0)

    def run(weights):
        value, metrics = objective(weights, state.biases, batch, whole, spec, state.magnitudes)
        return value, (metrics["finite_L"], jnp.isfinite(value))

    (_, (finite_L, loss_finite)), gradient = jax.value_and_grad(run, has_aux=True)(state.weights)
    return finite_L, loss_finite, _finite_leaves(gradient)


def _finite_leaves(tree):
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _bad_leaves(flags) -> list[str]:
    named, _ = jax.tree_util.tree_flatten_with_path(flags)
    return ["/".join(str(entry.key) for entry in path) for path, flag in named if not bool(flag)]


def _first_bad_leaf(flags) -> str | None:
    return next(iter(_bad_leaves(flags)), None)


# Parameters in the order in which the gradient reaches them, from the loss back.
_FROM_LOSS = ("lm_head", "final_norm", "suffix", "blocks", "prefix", "embedding")


def _last_bad_leaf(flags) -> str | None:
    def distance(name: str) -> tuple[int, int]:
        group, _, rest = name.partition("/")
        index = rest.partition("/")[0]
        return _FROM_LOSS.index(group), -int(index) if index.isdigit() else 0

    return min(_bad_leaves(flags), key=distance, default=None)
