"""Which host a synchronous run waits for.

All hosts of such a run take the same time for a step: one that is slow makes the others wait, and shows by waiting
least itself. Two signals of each host and step, each held against the median of the other hosts:

`barrier`: seconds at the barrier that all hosts pass before a step is started. What a host lost to slow input, to its
own Python or to other processes is the time that the others wait there for it. Devices have a step queued meanwhile: as
much as the late host itself still waits for its devices afterwards is hidden by them, costs nothing, and is taken off.

`probe`: seconds of a fixed computation on the host's own devices, without a collective, right behind a step. It shows a
device that is throttled or shares its machine. One that is slow at a step's own operations alone (a link, an expert
with more tokens) holds the others back in the collectives, where no host sees it; a trace of every process shows it.

A host is hit in a step if it is among the last eighth of the hosts (of up to 15, the last of all) and is behind the
others' median by `THRESHOLD`. Evidence is a CUSUM of hits over misses (Page, Biometrika 41, 1954). Where no host is
slower than another, each is among the last with the same chance, whatever the noise and however heavy its tails: by
Ville's inequality the sum then reaches its limit, counted from any one step, with a chance of at most exp(-limit). So
there is one false alarm in `STEPS_BETWEEN_ALARMS` steps at most, as long as one step's noise says nothing about the
next one's: in 2 of 10,000 runs of 200 steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from perf.host_steps import HostSteps, join

Signal = Literal["barrier", "probe"]
SIGNALS: tuple[Signal, ...] = ("barrier", "probe")

THRESHOLD = 0.05
"""Behind the others' median by this share: of the step (barrier), or of the median (probe)."""
STEPS_BETWEEN_ALARMS = 1e6
HIT_RATE = 0.8
"""Of steps in which a straggler is hit: the alternative of the likelihood ratio. Noise hides some."""


def peer_median(values: np.ndarray) -> np.ndarray:
    """Median over the other hosts, [hosts, steps] -> [hosts, steps]; NaN for a step that has a NaN."""
    ordered = np.sort(values, axis=0)
    rank = values.argsort(axis=0, kind="stable").argsort(axis=0)
    peers = len(values) - 1
    # Without a host itself, those that sort behind it move up by one place.
    low, high = (
        np.take_along_axis(ordered, place + (place >= rank), axis=0) for place in ((peers - 1) // 2, peers // 2)
    )
    return np.where(np.isnan(values).any(axis=0), np.nan, (low + high) / 2)


def behind(data: HostSteps, signal: Signal) -> np.ndarray:
    """How far each host is behind the others' median, [hosts, steps]: as a share of the step, or of the median. Below 0
    for a host that waits more, and for one that is late in time for its devices."""
    if signal == "barrier":
        return (peer_median(data.barrier) - data.barrier - data.result) / np.median(data.seconds, axis=0)
    return data.probe / peer_median(data.probe) - 1


def num_last(num_hosts: int) -> int:
    """Hosts among which one is hit. Of many hosts another is often the last by chance, and seldom an eighth of them."""
    return max(1, num_hosts // 8)


def hits(data: HostSteps, signal: Signal, threshold: float = THRESHOLD) -> np.ndarray:
    """Who was among the last, and behind by the threshold: float64 [hosts, steps] of 0 and 1, NaN where not measured.

    Equals are counted as if each came after the others: in no step are there more than `num_last`.
    """
    share = behind(data, signal)
    # The smallest share that so many hosts at most can have or exceed.
    bar = np.sort(share, axis=0)[-num_last(data.num_hosts) - 1]
    found = ((share > bar) & (share >= threshold)).astype(float)
    found[:, np.isnan(share).any(axis=0)] = np.nan
    return found


def alarm_limit(num_hosts: int) -> float:
    """Of the CUSUM: all hosts and signals together alarm once in `STEPS_BETWEEN_ALARMS` steps at most."""
    return math.log(num_hosts * len(SIGNALS) * STEPS_BETWEEN_ALARMS)


def evidence(num_hosts: int) -> tuple[float, float]:
    """Logarithm of the likelihood ratio of a hit, and of a miss."""
    chance = num_last(num_hosts) / num_hosts
    return math.log(HIT_RATE / chance), math.log((1 - HIT_RATE) / (1 - chance))


def steps_to_alarm(num_hosts: int) -> int:
    """Hits in a row that name a host: 33 with 2 hosts, 14 with 4, 9 with 8, 11 with 64."""
    return math.ceil(alarm_limit(num_hosts) / evidence(num_hosts)[0])


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A host that the others wait for."""

    host: int
    """Process index."""
    signal: Signal
    first_step: int
    """Since when, as the evidence has it."""
    named_step: int
    """The step whose measurement completed the evidence."""
    behind: float
    """Median since the first step: share of a step that the others wait for it, or by which its probe takes longer."""
    ratio: float
    """Its time to that of the others' median: of the step without waiting for hosts, or of the probe."""
    where: str
    """What takes it longer."""

    def sentence(self) -> str:
        if self.signal == "probe":
            return (
                f"straggler: host {self.host}; its devices take {self.ratio:.3g} times as long as the other hosts' for "
                f"the same computation, since step {self.first_step}"
            )
        return (
            f"straggler: host {self.host}; the others wait for it {self.behind:.1%} of a step, since step "
            f"{self.first_step} ({self.where})"
        )


class StragglerJudge:
    """Takes measurements as they come, and names each host once as long as it stays slow."""

    def __init__(self, num_hosts: int, threshold: float = THRESHOLD) -> None:
        if num_hosts < 2:
            raise ValueError(f"num_hosts={num_hosts}: one host has no others to be held against; give 2 or more")
        self.num_hosts, self.threshold = num_hosts, threshold
        self._limit = alarm_limit(num_hosts)
        self._gain, self._loss = evidence(num_hosts)
        self._sums = {signal: np.zeros(num_hosts) for signal in SIGNALS}
        self._named: dict[Signal, set[int]] = {signal: set() for signal in SIGNALS}
        self._kept: list[HostSteps] = []

    def update(self, data: HostSteps) -> tuple[Straggler, ...]:
        """Hosts that these steps complete the evidence against, in the order of steps."""
        assert data.num_hosts == self.num_hosts
        self._keep(data)
        found = []
        for signal in SIGNALS:
            hit = hits(data, signal, self.threshold)
            for place in np.flatnonzero(~np.isnan(hit[0])):
                for host in self._step(signal, hit[:, place]):
                    found.append(self._describe(host, signal, data.steps[place]))
        return tuple(sorted(found, key=lambda one: one.named_step))

    def _step(self, signal: Signal, hit: np.ndarray) -> list[int]:
        """Hosts that one step names."""
        sums, named = self._sums[signal], self._named[signal]
        # Held at the limit: a host that is well again is so after a few steps, not after as many as it was slow.
        sums[:] = np.clip(sums + np.where(hit == 1, self._gain, self._loss), 0, self._limit)
        named.difference_update(np.flatnonzero(sums == 0).tolist())
        new = [host for host in np.flatnonzero(sums >= self._limit).tolist() if host not in named]
        named.update(new)
        return new

    def _keep(self, data: HostSteps) -> None:
        """The last steps, enough to say how slow a host is and since when."""
        self._kept.append(data)
        while sum(len(one.steps) for one in self._kept[1:]) >= 8 * steps_to_alarm(self.num_hosts):
            del self._kept[0]

    def _describe(self, host: int, signal: Signal, step: int) -> Straggler:
        recent = join(self._kept)
        recent = recent.select(np.asarray(recent.steps) <= step)
        hit = hits(recent, signal, self.threshold)[host]
        first = _onset(hit, self._gain, self._loss)
        since = recent.select(np.arange(len(recent.steps)) >= first)
        times = since.busy if signal == "barrier" else since.probe
        ratio = np.nanmedian(times[host] / peer_median(times)[host])
        share = np.nanmedian(behind(since, signal)[host])
        where = "its devices" if signal == "probe" else slower_part(since, host)
        return Straggler(host, signal, recent.steps[first], step, float(share), float(ratio), where)


def _onset(hit: np.ndarray, gain: float, loss: float) -> int:
    """Place of the first step after the CUSUM was last 0."""
    total, first = 0.0, 0
    for place, one in enumerate(hit):
        if np.isnan(one):
            continue
        if total == 0:
            first = place
        total = max(0.0, total + (gain if one else loss))
    return first


PARTS: Mapping[str, str] = {
    "input": "its input",
    "host": "its own Python, or other processes on it",
}


def slower_part(data: HostSteps, host: int) -> str:
    """The part of a step that takes this host longest beyond the other hosts' median."""
    excess = {}
    for name in PARTS:
        values = getattr(data, name)
        excess[name] = float(np.median(values[host] - peer_median(values)[host]))
    return PARTS[max(excess, key=excess.__getitem__)]
