"""The record that ends a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perf.flops import count_params
from training.fleet import run_facts, scaling_facts

if TYPE_CHECKING:
    from training.loop import Trainer


def summarize(trainer: Trainer, *, stopped: str | None) -> dict[str, Any]:
    """Flat record; what can't be known is None, with the reason under `<name>_reason`."""
    config, meter = trainer.config, trainer.meter.summary()
    params = count_params(config.model)
    losses = [trainer.losses[step] for step in sorted(trainer.losses)]
    latest = trainer.store.latest()
    record: dict[str, Any] = {
        "config": config.name,
        "steps": max(trainer.losses, default=latest.step if latest else 0),
        "num_devices": trainer.resolved.num_devices,
        "params": params.total,
        "active_params": params.active,
        "products": config.precision.products,
        **meter,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        **_evaluation(trainer, stopped),
        **trainer.goodput.summary().record(),
        "checkpoint": str(latest.path) if latest else None,
        **trainer.watch.summary(),
        **run_facts(trainer),
    }
    record |= scaling_facts(config.fleet, record)
    if not losses:
        reason = "the run was already complete: no step was left"
        record |= {"loss_first_reason": reason, "loss_last_reason": reason}
    if latest is None:
        record["checkpoint_reason"] = (
            "stopped before the first step" if config.checkpoint.every else "checkpoint.every=0"
        )
    if stopped is not None:
        record["stopped"] = stopped
    return record


def _evaluation(trainer: Trainer, stopped: str | None) -> dict[str, Any]:
    evaluation = trainer.evaluation
    record: dict[str, Any] = {
        "eval_loss": evaluation.loss if evaluation else None,
        "bits_per_byte": evaluation.bits_per_byte if evaluation else None,
        "gzip_bits_per_byte": trainer.corpus.heldout_gzip_bits_per_byte(),
    }
    reason = f"stopped by {stopped} before the last evaluation" if stopped else "the data has no held-out documents"
    for name in list(record):
        if record[name] is None:
            record[f"{name}_reason"] = reason
    return record
