"""Expert parallelism: tokens travel to the devices that hold their experts, and back.

Runs per device, inside `map_shards`. Shapes are static and no token is lost: a round carries `capacity` rows from each
device to each other one, the first round's size is chosen so that it nearly always suffices, and a loop repeats rounds
while any device still has rows to send. The loop's gradient recomputes its rounds, because a loop whose length is data
can't keep residuals; the first round differentiates like any code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.permute import combine, expand, permute, sort_by_expert
from parallel.sharding import Placement

# Rows of a round over the balanced share. Above 1, so that the usual imbalance of a trained router fits one round.
ROUND_FACTOR = 1.5

FeedForward = Callable[..., jax.Array]
Kernels = tuple[jax.Array, jax.Array | None, jax.Array]


class Plan(NamedTuple):
    """This device's sorted rows, by the device they go to."""

    expert_M: jax.Array
    """Expert of each row, rows sorted by expert."""
    start_P: jax.Array
    """First row for each destination device, int32."""
    count_P: jax.Array
    """Rows for each destination device, int32."""


def exchange_experts(
    x_ND: jax.Array,
    experts_NA: jax.Array,
    weights_NA: jax.Array,
    kernels: Kernels,
    feed_forward: FeedForward,
    num_experts: int,
    axes: tuple[str, ...],
    placement: Placement,
    round_factor: float = ROUND_FACTOR,
    **dispatch: Any,
) -> jax.Array:
    """Sum over each token's experts of weight · expert(x), float32 [N, D], experts split over the mesh axes `axes`.

    `kernels` are this device's num_experts / P experts. `feed_forward(rows_MD, group_sizes, *kernels)` takes rows
    sorted by local expert, and may leave rows past the groups' sum unwritten by returning zeros there. `dispatch`: impl
    and target of `model.permute.expand` and `combine`.
    """
    num_devices = placement.size("experts")
    local_experts = num_experts // num_devices
    order = sort_by_expert(experts_NA, num_experts)
    rows_of = functools.partial(expand, **dispatch)
    rows_MD = rows_of(x_ND, order)
    count_P = order.group_sizes.reshape(num_devices, local_experts).sum(axis=1)
    plan = Plan(experts_NA.reshape(-1)[order.sorted_M], jnp.cumsum(count_P) - count_P, count_P)
    num_rows = rows_MD.shape[0]
    capacity = min(-(-int(round_factor * num_rows) // num_devices), num_rows)

    def one_round(number: jax.Array, rows_MD: jax.Array, kernels: Kernels, plan: Plan) -> jax.Array:
        return _round(number, rows_MD, kernels, plan, rows_of, feed_forward, capacity, local_experts, axes)

    # The same number of rounds on every device of the mesh: a collective must be entered by all.
    most = jax.lax.pmax(jnp.max(count_P), placement.mesh.axis_names)
    num_rounds = -(-most // capacity)
    y_MD = one_round(jnp.int32(0), rows_MD, kernels, plan)
    if capacity < num_rows:
        y_MD = y_MD + _further_rounds(one_round, num_rounds, rows_MD, kernels, plan)
    return combine(y_MD, weights_NA, order, **dispatch)


def _round(number, rows_MD, kernels, plan, rows_of, feed_forward, capacity, local_experts, axes) -> jax.Array:
    """Results of the rows [number · capacity, (number + 1) · capacity) of each destination; zeros elsewhere."""
    num_devices = plan.count_P.size
    first = number * capacity
    # Sending: slot (p, c) holds row start[p] + first + c, if p has so many.
    slot_C = jnp.arange(capacity)
    filled_PC = first + slot_C < plan.count_P[:, None]
    source_PC = jnp.minimum(plan.start_P[:, None] + first + slot_C, rows_MD.shape[0] - 1)
    # Receiving back: row m of destination p sits in slot (p, m - start[p] - first) if that is within the round.
    device_M = plan.expert_M // local_experts
    offset_M = jnp.arange(rows_MD.shape[0]) - plan.start_P[device_M] - first
    inside_M = (offset_M >= 0) & (offset_M < capacity)
    place_M = device_M * capacity + jnp.clip(offset_M, 0, capacity - 1)

    sent_SD = _gather(rows_MD, source_PC.reshape(-1), filled_PC.reshape(-1), place_M, inside_M)
    expert_S = jnp.where(filled_PC, plan.expert_M[source_PC] % local_experts, local_experts).reshape(-1)
    received_SD = _all_to_all(sent_SD, axes, num_devices)
    expert_S = _all_to_all(expert_S, axes, num_devices)

    # Empty slots count as one expert more, so they sort behind every group.
    order = sort_by_expert(expert_S[:, None], local_experts + 1)
    y_SD = feed_forward(rows_of(received_SD, order), order.group_sizes[:local_experts], *kernels)
    y_SD = _all_to_all(permute(y_SD, order.place_M, order.sorted_M), axes, num_devices)
    return _gather(y_SD, place_M, inside_M, source_PC.reshape(-1), filled_PC.reshape(-1))


def _all_to_all(x: jax.Array, axes: tuple[str, ...], num_devices: int) -> jax.Array:
    blocks = x.reshape(num_devices, -1, *x.shape[1:])
    return jax.lax.all_to_all(blocks, axes, split_axis=0, concat_axis=0).reshape(x.shape)


@jax.custom_vjp
def _gather(x, index, keep, back_index, back_keep):
    """Rows x[index] where `keep`, else zeros. A partial permutation: `back_index`, `back_keep` undo it."""
    return jnp.where(keep[:, None], x[index], 0)


def _gather_forward(x, index, keep, back_index, back_keep):
    return _gather(x, index, keep, back_index, back_keep), (back_index, back_keep)


def _gather_backward(residuals, dy):
    back_index, back_keep = residuals
    return jnp.where(back_keep[:, None], dy[back_index], 0), None, None, None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _further_rounds(one_round: Callable, num_rounds: jax.Array, rows_MD: jax.Array, kernels: Kernels, plan: Plan):
    """Sum of rounds 1 to num_rounds - 1."""

    @jax.custom_vjp
    def run(rows_MD, kernels, num_rounds, plan):
        def body(carry):
            number, y_MD = carry
            return number + 1, y_MD + one_round(number, rows_MD, kernels, plan)

        return jax.lax.while_loop(lambda c: c[0] < num_rounds, body, (jnp.int32(1), jnp.zeros_like(rows_MD)))[1]

    def forward(rows_MD, kernels, num_rounds, plan):
        return run(rows_MD, kernels, num_rounds, plan), (rows_MD, kernels, num_rounds, plan)

    def backward(residuals, dy_MD):
        rows_MD, kernels, num_rounds, plan = residuals

        def body(carry):
            number, gradient = carry
            _, vjp = jax.vjp(lambda rows, kernels: one_round(number, rows, kernels, plan), rows_MD, kernels)
            return number + 1, jax.tree.map(jnp.add, gradient, vjp(dy_MD))

        start = jax.tree.map(jnp.zeros_like, (rows_MD, kernels))
        _, (d_rows, d_kernels) = jax.lax.while_loop(lambda c: c[0] < num_rounds, body, (jnp.int32(1), start))
        return d_rows, d_kernels, None, None

    run.defvjp(forward, backward)
    return run(rows_MD, kernels, num_rounds, plan)
