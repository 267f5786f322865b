"""What holds a run back: findings, each with its evidence, the time at stake and the setting to change.

A finding is made by a function of `Evidence` that returns one or None. They are told in the order in which a
bottleneck is looked for: input, host, communication, then what the devices compute; a device that waits for data says
nothing about its kernels. Within a domain the most time comes first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from perf.breakdown import Breakdown
from perf.hlo import Module
from perf.run_facts import RunFacts
from perf.serving_facts import ServingFacts
from perf.trace import Timeline

DOMAINS = ("input", "host", "communication", "compute", "memory")

# What is worth a change, as a share of a step. The CPU's cores are also the host's, and its devices share them: the
# profiler alone opens gaps of a tenth of a step there.
WORTH = {"gpu": 0.02, "tpu": 0.02, "cpu": 0.2}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A change of settings that a finding can be checked by: compile with it, and predict again.

    `settings`: dotted path and value of a training run. `option`: the same as words for a command line.
    """

    settings: tuple[tuple[str, Any], ...]
    option: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """A trial, compiled: predicted milliseconds of a step before and after. `reason`: why there is no prediction."""

    option: str
    before: float | None
    after: float | None
    reason: str | None = None

    @property
    def gain(self) -> float | None:
        return None if self.before is None or self.after is None else self.before - self.after


@dataclasses.dataclass(frozen=True)
class Finding:
    """`milliseconds` of a step, or of a decoded token, that the change can save at most; None with `reason`."""

    name: str
    domain: str
    sentence: str
    evidence: tuple[str, ...]
    milliseconds: float | None
    setting: str
    reason: str | None = None
    is_prediction: bool = False
    """From the compiler's cost model, where nothing ran."""
    trial: Trial | None = None
    verified: Verified | None = None

    def __post_init__(self) -> None:
        assert self.domain in DOMAINS, self.domain
        assert (self.milliseconds is None) == (self.reason is not None), self
        assert self.milliseconds is None or (math.isfinite(self.milliseconds) and self.milliseconds >= 0), self


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one op of a program, in a step: nanoseconds measured in a trace, or predicted."""

    nanoseconds: float
    exposed: float
    """Of a collective: while nothing else ran. Else all of it."""
    flops: float | None = None
    """Of its matrix products in that time, if they were counted."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of a run. What was not there to be read is None."""

    run: RunFacts | None = None
    timeline: Timeline | None = None
    breakdown: Breakdown | None = None
    program: Module | None = None
    costs: Mapping[str, Cost] | None = None
    """By instruction of `program`."""
    step_ns: float | None = None
    """Nanoseconds of a step: measured in the trace, or predicted."""
    predicted: bool = False
    """Whether `costs` and `step_ns` are predictions."""
    serving: ServingFacts | None = None
    settings: Mapping[str, Any] | None = None
    """Of the training run, as JSON."""
    mesh: Mapping[str, int] | None = None
    """Devices along each mesh axis."""
    platform: str | None = None
    """gpu, tpu or cpu."""
    decode: bool = False
    """Whether the program is a decode step."""

    def setting(self, path: str) -> Any:
        """Value of a dotted setting; None where the settings are not known."""
        value: Any = self.settings
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return None
            value = value[name]
        return value

    def now(self, path: str) -> str:
        """The setting's value to print behind it; empty where it isn't known."""
        value = self.setting(path)
        return "" if value is None else f" (now {value})"

    @property
    def worth(self) -> float:
        return WORTH[self.platform] if self.platform in WORTH else WORTH["gpu"]


Check = Callable[[Evidence], Finding | None]


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """In the order of decision, then by milliseconds; what has no figure comes last in its domain."""
    return tuple(
        sorted(
            findings, key=lambda one: (DOMAINS.index(one.domain), one.milliseconds is None, -(one.milliseconds or 0))
        )
    )


def examine(evidence: Evidence) -> tuple[Finding, ...]:
    """Every finding that there is evidence of, in order. A healthy run has none."""
    # Here, so that each file of checks can name what is above.
    from perf.findings_communication import COMMUNICATION_CHECKS
    from perf.findings_program import PROGRAM_CHECKS
    from perf.findings_run import RUN_CHECKS
    from perf.findings_serving import SERVING_CHECKS

    checks = (*RUN_CHECKS, *COMMUNICATION_CHECKS, *PROGRAM_CHECKS, *SERVING_CHECKS)
    return ordered([found for check in checks if (found := check(evidence)) is not None])
