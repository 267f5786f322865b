"""Learning rate as a function of the optimizer step."""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over a run: linear warm-up, then the shape of `kind`.

    `cosine` falls over the rest of the run (Loshchilov & Hutter, arXiv 1608.03983); `wsd` stays at the peak and falls
    linearly over the last `decay_fraction` (warmup-stable-decay, Hu et al., arXiv 2404.06395); `constant` stays.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up."""
    peak_lr: float = 3e-4
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up; 0 for none."""
    decay_fraction: float = 0.2
    """wsd: the last part of all steps, in which the learning rate falls."""
    final_lr_fraction: float = 0.1
    """cosine and wsd: learning rate at the end of the run, over `peak_lr`."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ValueError(f"optimizer.schedule.peak_lr={self.peak_lr} must be above 0")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"optimizer.schedule.decay_fraction={self.decay_fraction} must be above 0 and at most 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"optimizer.schedule.final_lr_fraction={self.final_lr_fraction} must be between 0 and 1")


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update number s = 0, 1, ..., `total_steps` - 1.

    Warm-up is peak·(s + 1) / (warmup_steps + 1), so that the first update already learns; `final_lr_fraction`·peak is
    reached at s = `total_steps`, so that the last update still does, and is kept from there on.
    Raises ValueError if the warm-up and the decay do not fit into `total_steps`.
    """
    warmup = config.warmup_steps
    if warmup >= total_steps:
        raise ValueError(
            f"optimizer.schedule.warmup_steps={warmup} must be below the {total_steps} steps of the run; "
            "lower it or raise the number of steps"
        )
    body = _body(config, total_steps)
    if not warmup:
        return body
    ramp = optax.linear_schedule(config.peak_lr / (warmup + 1), config.peak_lr, warmup)
    return optax.join_schedules([ramp, body], [warmup])


def _body(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by the number of steps since the end of the warm-up."""
    peak, after_warmup = config.peak_lr, total_steps - config.warmup_steps
    match config.kind:
        case "cosine":
            return optax.cosine_decay_schedule(peak, after_warmup, alpha=config.final_lr_fraction)
        case "constant":
            return optax.constant_schedule(peak)
        case "wsd":
            decay = max(1, round(config.decay_fraction * total_steps))
            if decay > after_warmup:
                raise ValueError(
                    f"optimizer.schedule.warmup_steps={config.warmup_steps} and the {decay} steps of "
                    f"optimizer.schedule.decay_fraction={config.decay_fraction} exceed the {total_steps} steps of the "
                    "run; lower one of them"
                )
            return optax.linear_schedule(peak, config.final_lr_fraction * peak, decay, after_warmup - decay)
