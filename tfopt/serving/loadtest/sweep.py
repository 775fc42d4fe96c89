"""The knee: the highest offered rate that a server holds.

Rates grow geometrically until one is not held, then the interval between the highest that was held and the lowest
that was not is halved (geometrically) until it is narrow. A rate is held where there are no errors, the achieved rate
is that which was offered (`Result.kept_up`), and the latency is within the SLO if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfopt.serving.loadtest.plan import Plan
from tfopt.serving.loadtest.result import Result


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
      steps: every run, in the order of the runs.
      knee: the run at the highest rate that was held; None where none was.
      bounded: whether a higher rate was tried and not held.
    """

    steps: tuple[Result, ...]
    knee: Result | None
    bounded: bool

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "knee_rate": None if self.knee is None else self.knee.plan.rate,
            "bounded": self.bounded,
            "steps": [step.to_dict() for step in self.steps],
        }


def sweep(
    measure: Callable[[Plan], Result],
    plan: Plan,
    *,
    start: float,
    factor: float = 2.0,
    resolution: float = 0.1,
    most_steps: int = 20,
    attempts: int = 2,
) -> Sweep:
    """Looks for the knee.

    Args:
      measure: runs a plan; for instance `lambda plan: run(target, requests, plan)`.
      plan: all but the rate.
      start: the first rate, in requests per second; lower ones are tried where it is not held.
      factor: from one rate to the next, until one is not held.
      resolution: how far apart, relative to each other, the two rates around the knee may be in the end.
      most_steps: no more runs than this.
      attempts: a rate counts as not held when it failed so often; another process may disturb one run.
    """
    steps: list[Result] = []
    held: Result | None = None
    low, high = 0.0, math.inf
    rate = start
    while len(steps) < most_steps:
        found = None
        for attempt in range(attempts):
            found = measure(plan.at(rate, attempt))
            steps.append(found)
            if found.good or len(steps) >= most_steps:
                break
        assert found is not None
        if found.good:
            low, held = rate, found
        else:
            high = rate
        if low and high < low * (1 + resolution):
            break
        if high == math.inf:
            rate = low * factor
        elif low:
            rate = math.sqrt(low * high)
        else:
            rate = high / factor
            if rate * (plan.warmup_s + plan.duration_s) < 1:
                break
    return Sweep(tuple(steps), held, high < math.inf)
