"""What a server measured of itself: the JSON line of `serve.py --bench`, or the text of its /metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.prom"
"""The server's metrics at the end of a capture, beside the trace."""


@dataclasses.dataclass(frozen=True)
class DecodePoint:
    """Decoding without drafts at a batch size; of /metrics, at whatever was served (`batch` None). `step_seconds` is of
    a round of all rows. `mbu` is None where it isn't known."""

    batch: int | None
    step_seconds: float | None
    mbu: float | None


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Speculation so far. A round is one sequence's verification; `plain_rounds` had no drafts.

    Seconds are of a step with drafts and of one without, None where they were not measured apart.
    """

    drafted: int
    accepted: int
    rounds: int
    emitted: int
    plain_rounds: int | None
    verify_seconds: float | None
    decode_seconds: float | None

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.emitted / self.rounds if self.rounds else 0.0


@dataclasses.dataclass(frozen=True)
class ServingFacts:
    source: str
    device: str | None
    decode: tuple[DecodePoint, ...]
    drafts: Drafts | None
    compiles: int
    """Programs compiled after the server said that it was ready."""


def read_serving(path: Path) -> ServingFacts:
    """Raises ValueError for a file that is neither."""
    text = path.read_text("utf-8", errors="replace").strip()
    for candidate in (text, text.rpartition("\n")[2]):
        try:
            found = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and isinstance(found.get("decode"), dict):
            return from_bench(found, path.name)
    samples = prometheus_samples(text)
    if "compiles_after_ready_total" not in samples:
        raise ValueError(
            f"{path} is neither the JSON line of `serve.py NAME --bench` nor the text of a server's /metrics; give "
            "one of them to --metrics"
        )
    return from_metrics(samples, path.name)


def from_bench(bench: Mapping[str, Any], source: str) -> ServingFacts:
    points = tuple(
        DecodePoint(int(batch), row["step_ms"] / 1e3, row["mbu"])
        for batch, row in sorted(bench["decode"].items(), key=lambda item: int(item[0]))
    )
    stats = bench.get("drafts")
    drafts = None
    if stats is not None:
        names = ("drafted", "accepted", "rounds", "emitted", "plain_rounds")
        drafts = Drafts(*(stats[name] for name in names), None, None)
    return ServingFacts(source, bench.get("device"), points, drafts, bench.get("compiles_after_ready", 0))


def from_metrics(samples: Mapping[str, float], source: str) -> ServingFacts:
    decode, verify = (_mean_step(samples, kind) for kind in ("decode", "verify"))
    # The gauge is 0 until a window of decoding was measured, and where the bandwidth isn't known.
    mbu = samples.get("decode_mbu") or None
    points = (DecodePoint(None, decode, mbu),) if decode is not None else ()
    rounds = int(samples.get("draft_rounds_total", 0))
    drafts = None
    if rounds:
        names = (
            "draft_tokens_total",
            "draft_accepted_tokens_total",
            "draft_rounds_total",
            "draft_emitted_tokens_total",
        )
        drafts = Drafts(*(int(samples[name]) for name in names), None, verify, decode)
    return ServingFacts(source, None, points, drafts, int(samples["compiles_after_ready_total"]))


def _mean_step(samples: Mapping[str, float], kind: str) -> float | None:
    count = samples.get(f'step_seconds_count{{kind="{kind}"}}', 0)
    return samples[f'step_seconds_sum{{kind="{kind}"}}'] / count if count else None


def prometheus_samples(text: str) -> dict[str, float]:
    """Values of Prometheus's text format by name and labels, as they are written."""
    samples = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            try:
                samples[name] = float(value)
            except ValueError:
                continue
    return samples
