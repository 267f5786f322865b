"""Findings about a server: decoding far below the memory's bandwidth, drafts that cost more than they give."""

from __future__ import annotations

from perf.findings import Check, Evidence, Finding
from perf.program_view import by_scope
from perf.serving_facts import DecodePoint, Drafts

# Share of the bandwidth that good stacks reach in decoding (Databricks and MosaicML, LLM inference: 60% to 85%). On an
# H100 an 8B model in bf16 reaches 80% at batch 1 and 61% at 256 (benchmarks/results/serving_h100.json).
GOOD_MBU = 0.6
LOW_MBU = 0.5
# With more rows the products are compute-bound, and bandwidth says nothing.
LARGEST_BATCH = 64


def low_mbu(evidence: Evidence) -> Finding | None:
    facts = evidence.serving
    if facts is None:
        return None
    known = [
        one
        for one in facts.decode
        if one.mbu is not None and one.step_seconds and (one.batch is None or one.batch <= LARGEST_BATCH)
    ]
    low = [one for one in known if one.mbu < LOW_MBU]
    if not low:
        return None
    worst = max(low, key=_lost)
    at = "" if worst.batch is None else f" at batch {worst.batch}"
    return Finding(
        "low MBU in decode",
        "compute",
        f"Decoding{at} uses {worst.mbu:.0%} of the memory's bandwidth, where {GOOD_MBU:.0%} or more can be had: it "
        "waits for something other than its weights.",
        (*(_point(one) for one in known), *_longest(evidence)),
        _lost(worst) * 1e3,
        _bandwidth_settings(evidence),
        is_prediction=evidence.predicted,
    )


def _lost(point: DecodePoint) -> float:
    """Seconds of a step beyond those that a good share of the bandwidth makes."""
    assert point.step_seconds is not None and point.mbu is not None
    return point.step_seconds * (1 - point.mbu / GOOD_MBU)


def _bandwidth_settings(evidence: Evidence) -> str:
    smaller = (
        "engine.widths, engine.cell_tokens: programs no wider than what is served, since a round reads their width"
    )
    if evidence.platform == "tpu":
        return f"{smaller}; the scopes above are the code to look at"
    return (
        f"kernels.paged_attention=pallas, which reads live pages alone{evidence.now('kernels.paged_attention')}; "
        f"{smaller}; engine.rounds_ahead: more; a trace (POST /admin/profile) says what the rest of a round is"
    )


def _longest(evidence: Evidence, count: int = 3) -> tuple[str, ...]:
    """Where the time of a compiled round goes."""
    if not evidence.predicted or evidence.costs is None or evidence.program is None:
        return ()
    return tuple(
        f"{time / 1e6:.2f} ms in {ops} ops of {scope[-70:]}" for scope, time, ops in by_scope(evidence)[:count]
    )


def _point(point: DecodePoint) -> str:
    batch = "as served" if point.batch is None else f"batch {point.batch}"
    return f"{batch}: {point.step_seconds * 1e3:.2f} ms a round, MBU {point.mbu:.1%}"


def losing_speculation(evidence: Evidence) -> Finding | None:
    drafts = None if evidence.serving is None else evidence.serving.drafts
    if drafts is None or not drafts.rounds:
        return None
    facts = (
        f"{drafts.rounds} verifications: {drafts.tokens_per_round:.2f} tokens each, {drafts.acceptance:.0%} of drafts "
        "accepted",
    )
    setting = "speculation.kind=none; or shorter drafts (speculation.max_draft), or another drafter (speculation.kind)"
    name = "speculation that does not pay"
    if drafts.verify_seconds is not None and drafts.decode_seconds is not None:
        lost = drafts.verify_seconds / drafts.tokens_per_round - drafts.decode_seconds
        if lost <= 0:
            return None
        ratio = drafts.verify_seconds / drafts.decode_seconds
        return Finding(
            name,
            "compute",
            f"A step with drafts takes {ratio:.2f} times one without and gives {drafts.tokens_per_round:.2f} tokens a "
            "row: without them each token comes sooner.",
            (
                *facts,
                f"step {drafts.verify_seconds * 1e3:.2f} ms with drafts, {drafts.decode_seconds * 1e3:.2f} ms without",
            ),
            lost * 1e3,
            setting,
        )
    return _given_up(name, drafts, facts, setting)


def _given_up(name: str, drafts: Drafts, facts: tuple[str, ...], setting: str) -> Finding | None:
    """Without times: the controller measures them, and chooses rounds without drafts where those are faster."""
    if drafts.plain_rounds is None or drafts.plain_rounds <= drafts.rounds:
        return None
    share = drafts.plain_rounds / (drafts.plain_rounds + drafts.rounds)
    return Finding(
        name,
        "compute",
        f"The controller of drafts found them slower than plain decoding: {share:.0%} of rounds had none.",
        facts,
        None,
        setting,
        reason="the bench does not time steps with drafts apart: give the text of /metrics",
    )


def compiled_while_serving(evidence: Evidence) -> Finding | None:
    if evidence.serving is None or not evidence.serving.compiles:
        return None
    return Finding(
        "recompilation",
        "host",
        f"{evidence.serving.compiles} programs were compiled after the server was ready: requests waited for them.",
        (f"{evidence.serving.source}: compiles_after_ready {evidence.serving.compiles}",),
        None,
        "engine.batch_sizes, engine.widths, engine.tile_counts: a shape was asked for that they do not have",
        reason="how long requests waited is not in the metrics",
    )


SERVING_CHECKS: tuple[Check, ...] = (compiled_while_serving, low_mbu, losing_speculation)
