"""Gradient transformation of a run: clipping, then AdamW or Muon by the logical axes of each parameter."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from kernels.adamw import Hyperparameters
from model.parameter import Logical, matrix_axes, split_copies
from training.schedule import ScheduleConfig, make_schedule

# Quintic whose slope at zero is as large as it can be while singular values in (0, 1] end up around 1 (0.7 to 1.2
# after five steps): Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024): momentum whose matrices are made orthogonal before they are applied.

    `rms` multiplies the orthogonal matrix by 0.2·sqrt(max(rows, columns)), which gives it the size of an AdamW update,
    so that both take the same learning rate (Liu et al., arXiv 2502.16982 section 2.2). `spectral` multiplies it by
    sqrt(max(1, columns / rows)), rows being the input width (Jordan's own).
    """

    momentum: float = 0.95
    """Decay of the (Nesterov) momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the Newton-Schulz products."""
    scaling: Literal["rms", "spectral"] = "rms"
    """Size of an update by the shape of its matrix."""
    lr_scale: float = 1.0
    """Learning rate of Muon's parameters, over that of the schedule."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.muon.momentum={self.momentum} must be at least 0 and below 1")
        if self.ns_steps < 1:
            raise ValueError(f"optimizer.muon.ns_steps={self.ns_steps} must be at least 1")
        if self.lr_scale <= 0:
            raise ValueError(f"optimizer.muon.lr_scale={self.lr_scale} must be above 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of a run. With `muon`, parameters other than hidden matrices are still updated by AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for every parameter, or Muon for hidden matrices and AdamW for the rest."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """Learning rate."""
    b1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    b2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-8
    """AdamW: added to the root of the mean of squared gradients."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate; for matrices only, never for norms and biases."""
    decay_embeddings: bool = False
    """Decay the embedding table too (a tied one included). A separate LM head always decays."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are scaled down to; None for no clipping."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Stored format of the first moment (AdamW) and the momentum (Muon). The second moment is float32."""
    muon: MuonConfig = dataclasses.field(default_factory=MuonConfig)
    """Settings of Muon; ignored with adamw."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps={self.eps} must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm={self.clip_norm} must be above 0, or None for no clipping")


def make_optimizer(config: OptimizerConfig, total_steps: int, logical: Any) -> optax.GradientTransformationExtraArgs:
    """Transformation whose `update(gradients, state, params)` returns float32 updates to add to the parameters.

    logical: pytree shaped like the parameters, with a tuple of logical axis names for each (see `ShardingRules`).
    All arithmetic is float32 whatever the dtype of parameters and gradients. Raises ValueError as `make_schedule`.
    """
    schedule = make_schedule(config.schedule, total_steps)
    axes = jax.tree.leaves(logical, is_leaf=_is_logical)
    groups = [_group(config, names) for names in axes]

    def labels(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        assert [leaf.ndim for leaf in leaves] == [len(names) for names in axes], "params are not those of `logical`"
        return jax.tree.unflatten(structure, groups)

    adamw = functools.partial(
        optax.adamw, schedule, b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.moment_dtype
    )
    transforms = {
        "adamw": adamw(weight_decay=config.weight_decay),
        "adamw_undecayed": adamw(weight_decay=0.0),
    }
    for names, group in zip(axes, groups, strict=True):
        if group not in transforms:
            transforms[group] = _muon(config, schedule, *matrix_axes(names))
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return _in_float32(optax.chain(clip, optax.partition(transforms, labels)))


def optimizer_state_shardings(opt_state: Any, params: Any, shardings: Any, scalar: Sharding) -> Any:
    """Shardings of `opt_state` (arrays or shapes): a parameter's own for what is kept per parameter, else `scalar`.

    params, shardings: pytrees of the parameters (arrays or shapes) and of their shardings, of one structure.
    """
    placed = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple, leaf: Any) -> Sharding:
        # Optax keeps a moment at <path in the state> + <path of the parameter>; the longest suffix is the parameter.
        for start in range(len(path)):
            shape, sharding = placed.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        assert leaf.ndim == 0, f"{jax.tree_util.keystr(path)} of shape {leaf.shape} belongs to no parameter"
        return scalar

    return jax.tree_util.tree_map_with_path(place, opt_state)


def adamw_settings(config: OptimizerConfig, names: Logical) -> Hyperparameters | None:
    """Of the AdamW that updates a parameter of these logical axes; None where it is Muon that does."""
    group = _group(config, names)
    if not group.startswith("adamw"):
        return None
    return Hyperparameters(config.b1, config.b2, config.eps, config.weight_decay if group == "adamw" else 0.0)


def adamw_moments(opt_state: Any) -> dict[tuple[str, tuple], Any]:
    """The leaves of `opt_state` that are AdamW's moments, by ("mu" or "nu", path of the parameter)."""
    leaves = ((_moment_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state))
    return {key: leaf for key, leaf in leaves if key is not None}


def with_adamw_moments(opt_state: Any, moments: dict[tuple[str, tuple], Any]) -> Any:
    """`opt_state` with these in the places that `adamw_moments` names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: moments.get(_moment_of(path), leaf), opt_state)


def _moment_of(path: tuple) -> tuple[str, tuple] | None:
    for i, entry in enumerate(path):
        if isinstance(entry, jax.tree_util.GetAttrKey) and entry.name in ("mu", "nu"):
            return entry.name, tuple(inner.key for inner in path[i + 1 :])
    return None


def _is_logical(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _group(config: OptimizerConfig, names: Logical) -> str:
    """Which transformation updates a parameter; those of one group are of one layout."""
    matrix = matrix_axes(names)
    if matrix and config.kind == "muon":
        return f"muon_batch{matrix[0]}_rows{matrix[1]}"
    _, own = split_copies(names)
    is_router = own[:1] == ("router",)
    is_table = own[:1] == ("vocab",)
    is_head = own[-1:] == ("vocab",)
    decays = matrix is not None or is_router or (len(own) > 1 and is_head) or (is_table and config.decay_embeddings)
    return "adamw" if decays else "adamw_undecayed"


def _muon(
    config: OptimizerConfig, schedule: optax.Schedule, num_batch: int, num_rows: int
) -> optax.GradientTransformation:
    muon = config.muon
    orthogonal = functools.partial(_orthogonal_update, muon, num_batch, num_rows)
    return optax.chain(
        optax.trace(muon.momentum, nesterov=True, accumulator_dtype=config.moment_dtype),
        optax.stateless_with_tree_map(lambda update, _: orthogonal(update)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: muon.lr_scale * schedule(step)),
    )


def _orthogonal_update(config: MuonConfig, num_batch: int, num_rows: int, update: jax.Array) -> jax.Array:
    """Scaled orthogonal factor of each matrix of `update` [*batch, *rows, *columns], in its shape and dtype."""
    batch, own = update.shape[:num_batch], update.shape[num_batch:]
    rows, columns = math.prod(own[:num_rows]), math.prod(own[num_rows:])
    if config.scaling == "rms":
        scale = 0.2 * math.sqrt(max(rows, columns))
    else:
        scale = math.sqrt(max(1.0, columns / rows))
    # Batch axes stay apart: merging them would merge a sharded axis (experts) into an unsharded one (layers).
    orthogonal = orthogonalize(update.reshape(*batch, rows, columns), config.ns_steps, config.ns_dtype)
    return scale * orthogonal.reshape(update.shape)


@jax.named_scope("newton_schulz")
def orthogonalize(x: jax.Array, num_steps: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Nearly U·Vᵀ of each matrix U·S·Vᵀ of `x` [..., rows, columns], in its dtype; products in `dtype`.

    A zero matrix gives zero (an expert that saw no token).
    """
    a, b, c = NEWTON_SCHULZ
    wide = jnp.swapaxes(x, -1, -2) if x.shape[-2] > x.shape[-1] else x
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True))
    y = (wide / (norm + 1e-7)).astype(dtype)
    for _ in range(num_steps):
        gram = y @ jnp.swapaxes(y, -1, -2)
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.astype(x.dtype)
    return jnp.swapaxes(y, -1, -2) if x.shape[-2] > x.shape[-1] else y


def _in_float32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner` over float32 copies: Optax gives moments the dtype of the parameters, and in bf16 a mean of squares
    with b2 = 0.95 or more stops moving."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return inner.init(cast(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(cast(updates), state, None if params is None else cast(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)
