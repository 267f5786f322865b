"""FLOPs, bytes and time floor of every op of a step, from a config alone: `python -m perf roofline NAME`."""

from __future__ import annotations

import dataclasses

import tyro

import configs
from perf.command import Output
from perf.flops import ledger
from perf.report import Notes, Report


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    name: tyro.conf.Positional[str | None] = None
    """Config, as train.py --list and serve.py --list print them."""


def report(settings: Settings) -> Report:
    if settings.name is None:
        raise ValueError(f"name a config; configs: {', '.join(configs.names())}")
    model = configs.load(settings.name).MODEL
    book = ledger(model, sequence_length=1)
    return Report(settings.name, {"model_flops": book.model_flops}, [Notes("FLOPs", (f"{book.model_flops:,}",))])
