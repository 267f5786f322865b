"""What a fleet's records say together: MFU across sizes and versions, the reality tax, and whether a run regressed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from perf.baseline import MAX_RECORDS, Judgement, Median, judge, median
from perf.records import METRICS, RunRecord

By = Literal["size", "version"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What makes runs of different sizes, versions and names comparable."""

    workload: str
    config_hash: str
    chip: str


def work_of(record: RunRecord) -> Work:
    return Work(record.workload, record.config_hash, record.chip)


def headline(workload: str) -> str:
    """The one metric by which runs of a kind are drawn: a server's decode is bound by memory."""
    return "mfu" if workload == "train" else "decode_mbu"


def select(
    records: Iterable[RunRecord], *, config: str | None = None, chip: str | None = None
) -> tuple[RunRecord, ...]:
    """Records of a chip and of a config, by its hash or by a name: then also runs of other names and the same settings.

    Raises ValueError for a config or chip that is not there, listing those that are.
    """
    records = tuple(records)
    names = {record.config for record in records} | {record.config_hash for record in records}
    if config is not None and config not in names:
        there = ", ".join(sorted({record.config for record in records}))
        raise ValueError(f"--config {config}: no record of it; configs recorded: {there}")
    hashes = {record.config_hash for record in records if config in (None, record.config, record.config_hash)}
    records = tuple(record for record in records if record.config_hash in hashes)
    chips = sorted({record.chip for record in records})
    if chip is not None and chip.lower() not in [known.lower() for known in chips]:
        of = "" if config is None else f" of {config}"
        raise ValueError(f"--chip {chip}: no record of it; chips{of} recorded: {', '.join(chips)}")
    return tuple(r for r in records if chip is None or r.chip.lower() == chip.lower())


def countable(records: Iterable[RunRecord]) -> tuple[RunRecord, ...]:
    """Those whose absolute numbers count."""
    return tuple(record for record in records if not record.profiled)


def values(records: Iterable[RunRecord], metric: str) -> list[float]:
    found = (record.metric(metric) for record in records)
    return [value for value in found if value is not None]


def version_of(record: RunRecord) -> str:
    """jax and our own commit, the versions that most often explain a change."""
    commit = record.versions.get("commit")
    ours = "no commit" if commit is None else commit[:9] + "+changes" * commit.endswith("+changes")
    return f"jax {record.versions.get('jax', 'unknown')}, {ours}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Countable records of one work, of one size or of one version on one size."""

    label: str
    size: int
    """Devices."""
    records: tuple[RunRecord, ...]
    metric: str
    middle: Median | None
    """Of the metric; None where no record has it."""
    best: float | None
    goodput: float | None
    tax: float | None
    """1 − median / median of the smallest size (the scaling tax of the fleet), or of the size's first version."""

    @property
    def fleet_value(self) -> float | None:
        """The metric over wall time: median × goodput."""
        return None if self.middle is None or self.goodput is None else self.middle.value * self.goodput


def groups(records: Sequence[RunRecord], by: By) -> tuple[Group, ...]:
    """Of the records of one work: one per size, or per size and version, in the order of sizes, then of time."""
    members: dict[tuple[int, str], list[RunRecord]] = {}
    for record in sorted(countable(records), key=lambda record: (record.num_devices, record.ended)):
        version = version_of(record) if by == "version" else ""
        members.setdefault((record.num_devices, version), []).append(record)
    found = [_group(size, version, of) for (size, version), of in members.items()]
    return tuple(dataclasses.replace(group, tax=_tax(group, found, by)) for group in found)


def _group(size: int, version: str, records: list[RunRecord]) -> Group:
    metric = headline(records[0].workload)
    known = values(records, metric)
    label = f"{size} device{'s' * (size != 1)}" + (f", {version}" if version else "")
    middle = median(known) if known else None
    goodput = goodput_shares(records).get("step")
    return Group(label, size, tuple(records), metric, middle, max(known, default=None), goodput, None)


def _tax(group: Group, among: Sequence[Group], by: By) -> float | None:
    """Against the smallest size, or against the first version of the same size."""
    known = [one for one in among if one.middle is not None and (by == "size" or one.size == group.size)]
    if group.middle is None or not known or known[0].middle is None or not known[0].middle.value:
        return None
    return 1 - group.middle.value / known[0].middle.value


def scaling_tax(records: Iterable[RunRecord], work: Work, num_devices: int, mfu: float) -> dict[str, float] | None:
    """What a run of `num_devices` lost against the smallest size that the same work was recorded on: the tax,
    1 - mfu / median of that size, its size, median and number of runs. None without a record on fewer devices."""
    alike = [record for record in countable(records) if work_of(record) == work and record.mfu]
    smallest = min((record.num_devices for record in alike), default=num_devices)
    if smallest >= num_devices:
        return None
    known = values((record for record in alike if record.num_devices == smallest), "mfu")
    base = median(known).value
    return {
        "scaling_tax": 1 - mfu / base,
        "scaling_tax_base_devices": smallest,
        "scaling_tax_base_mfu": base,
        "scaling_tax_base_runs": len(known),
    }


def goodput_shares(records: Iterable[RunRecord]) -> dict[str, float]:
    """Share of the runs' wall time in each bucket (`step` is goodput), each device's hour counting alike.

    A resumed run counts once, by its last record, which has all of its attempts, killed ones included.
    """
    last: dict[tuple[str, float], RunRecord] = {}
    for record in sorted(records, key=lambda record: record.ended):
        last[record.config, record.first_started] = record
    seconds: dict[str, float] = {}
    for record in last.values():
        for name, value in record.goodput_seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value * record.num_devices
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total else {}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The reality tax of one work: from its best run to what the fleet gets, in points that add up exactly.

    `lines`: what lies between, each as (what it is, share of the peak lost to it).
    """

    metric: str
    hero: RunRecord
    hero_value: float
    lines: tuple[tuple[str, float], ...]
    fleet_value: float
    reason: str | None
    """Why the goodput parts are not among the lines."""


def budget(records: Sequence[RunRecord]) -> Budget | None:
    """None where no countable record has the metric."""
    records = countable(records)
    metric = headline(records[0].workload) if records else ""
    heroes = [record for record in records if record.metric(metric) is not None]
    if not heroes:
        return None
    hero = max(heroes, key=lambda record: record.metric(metric) or 0.0)
    best = hero.metric(metric)
    assert best is not None
    alike = median(values([r for r in heroes if r.num_devices == hero.num_devices], metric)).value
    typical = median(values(heroes, metric)).value
    lines = [(f"other runs on {hero.num_devices} devices: best to median", best - alike)]
    if len({record.num_devices for record in heroes}) > 1:
        lines.append(("other sizes: to the median of all", alike - typical))
    shares = goodput_shares(heroes)
    reason = None if shares else "no record has the parts of its goodput"
    # Time outside steps costs its share of what the steps reach.
    lines += [(f"not in a step: {name}", typical * share) for name, share in shares.items() if name != "step"]
    left = typical * shares["step"] if shares else typical
    return Budget(metric, hero, best, tuple(lines), left, reason)


# The gate.


@dataclasses.dataclass(frozen=True)
class Check:
    """A run against its baseline, and the same work on fewer devices."""

    run: RunRecord
    baseline: tuple[RunRecord, ...]
    judgements: tuple[Judgement, ...]
    canaries: tuple[Canary, ...]
    reason: str | None
    """Why nothing was judged."""

    @property
    def status(self) -> int:
        """0 pass, 1 regression, 2 not to be judged (too few records, or a metric that is not known)."""
        verdicts = {judgement.verdict for judgement in self.judgements}
        if "regression" in verdicts:
            return 1
        return 0 if verdicts == {"pass"} else 2


@dataclasses.dataclass(frozen=True)
class Canary:
    """The latest run of the same work on a smaller slice, where a regression costs less to find."""

    run: RunRecord
    judgements: tuple[Judgement, ...]

    @property
    def verdict(self) -> str:
        verdicts = [judgement.verdict for judgement in self.judgements]
        return next((one for one in ("regression", "too few", "unknown") if one in verdicts), "pass")


def find_run(records: Sequence[RunRecord], name: str) -> RunRecord:
    """`LAST` for the one that ended last, or an id or the unique start or end of one. Raises ValueError otherwise."""
    if name.upper() == "LAST":
        return max(records, key=lambda record: record.ended)
    found = [record for record in records if record.id == name]
    found = found or [record for record in records if record.id.startswith(name) or record.id.endswith(name)]
    if len(found) != 1:
        latest = ", ".join(record.id for record in sorted(records, key=lambda record: -record.ended)[:5])
        what = f"{len(found)} records are" if found else "no record is"
        raise ValueError(f"--run {name}: {what} called so; the latest: {latest}")
    return found[0]


def gate_metrics(run: RunRecord) -> tuple[str, ...]:
    """What a run of this kind is judged by: figures of the work itself, each said once (tokens/s only where there is
    no utilisation to go by). Goodput is left out, since it depends on how long a run was."""
    if run.workload == "traffic":
        return ()
    rate = "tokens_per_second_per_device"
    if run.workload == "train":
        return ("mfu" if run.mfu is not None else rate,)
    pace = "decode_tokens_per_second_" if run.decode_mbu is None else "decode_mbu_"
    return tuple(sorted(name for name in run.measures if name.startswith((pace, "ttft_")))) or (rate,)


def check(
    records: Sequence[RunRecord],
    run: RunRecord,
    *,
    metrics: Sequence[str] | None = None,
    rate: float,
    threshold: float,
) -> Check:
    """`run` against the countable records of its work and size that ended before it, the latest MAX_RECORDS.

    `rate`: chance of a false alarm over all metrics together (Bonferroni: each gets its part). Raises ValueError for a
    rate or threshold out of range, or a metric that no record of this work has.
    """
    if not 0 < rate < 0.5 or not 0 <= threshold < 1:
        raise ValueError(f"--false-alarms {rate} must be above 0 and below 0.5, --threshold {threshold} in 0..1")
    chosen = gate_metrics(run) if metrics is None else tuple(metrics)
    alike = [record for record in records if work_of(record) == work_of(run)]
    for name in chosen:
        if name not in METRICS and not any(name in record.measures for record in alike):
            known = ", ".join((*METRICS, *sorted({name for record in alike for name in record.measures})))
            raise ValueError(f"--metrics {name}: not a metric of these runs; known: {known}")
    before = _baseline(alike, run)
    reason = None
    if run.profiled:
        reason = "the run was profiled: its absolute numbers do not count"
    elif not chosen:
        reason = "figures of live traffic depend on its load; name --metrics to compare them all the same"
    if reason is not None:
        return Check(run, before, (), (), reason)
    judged = _judgements(run, before, chosen, rate, threshold)
    canaries = []
    for size in sorted({record.num_devices for record in countable(alike) if record.num_devices < run.num_devices}):
        latest = max((r for r in countable(alike) if r.num_devices == size), key=lambda record: record.ended)
        small = _judgements(latest, _baseline(alike, latest), chosen, rate, threshold)
        canaries.append(Canary(latest, small))
    return Check(run, before, judged, tuple(canaries), None)


def _baseline(alike: Sequence[RunRecord], run: RunRecord) -> tuple[RunRecord, ...]:
    earlier = [
        record
        for record in countable(alike)
        if record.num_devices == run.num_devices and record.id != run.id and record.ended <= run.ended
    ]
    return tuple(sorted(earlier, key=lambda record: record.ended)[-MAX_RECORDS:])


def _judgements(
    run: RunRecord, before: Sequence[RunRecord], metrics: Sequence[str], rate: float, threshold: float
) -> tuple[Judgement, ...]:
    return tuple(
        judge(
            name,
            run.metric(name),
            values(before, name),
            rate=rate / len(metrics),
            threshold=threshold,
            larger_is_better=not (name.endswith(("_ms", "_seconds")) or name in ("scaling_tax", "compiles")),
            reason=run.reasons.get(name, "not measured in this run"),
        )
        for name in metrics
    )
