"""What came of a load test, as data.

Latency is counted from the time at which a request was due. The offered rate is that of the requests that were due
in the measured window, the achieved rate that of the good answers that came in it:

    achieved - offered = (outstanding at the start - outstanding at the end) / window

which is about 0 while the server keeps up, and grows with the queue where it does not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfopt.serving.loadtest.plan import OPEN, Plan, Target

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_CURVE = (0.0, *(100 * (1 - 10 ** -(i / 8)) for i in range(1, 41)))  # evenly spread over log10(1 / (1 - p))
_HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Latency:
    """A distribution of times, in milliseconds, from an HDR histogram (1 us to 1 h, three significant digits).

    Attributes:
      count: how many.
      mean, max: exact.
      p50, p90, p99, p999: percentiles; with fewer than 100 (1,000) values p99 (p99.9) is the largest of them.
      curve: (percentile, ms), closer together towards 100.
      histogram: HdrHistogram's own compressed form, base64, values in microseconds: histograms of several runs add up.
    """

    count: int = 0
    mean: float = math.nan
    p50: float = math.nan
    p90: float = math.nan
    p99: float = math.nan
    p999: float = math.nan
    max: float = math.nan
    curve: tuple[tuple[float, float], ...] = ()
    histogram: str = ""

    @staticmethod
    def of(seconds: Sequence[float] | np.ndarray) -> Latency:
        """The distribution of some times."""
        values = np.asarray(seconds, np.float64)
        if not values.size:
            return Latency()
        histogram = _histogram(values)

        def at(percentile: float) -> float:
            return min(histogram.get_value_at_percentile(percentile) / 1e3, top)

        top = float(values.max()) * 1e3
        p50, p90, p99, p999 = map(at, PERCENTILES)
        last = 100 * (1 - 1 / len(values))
        curve = tuple((p, at(p)) for p in _CURVE if p <= last)
        text = histogram.encode()
        return Latency(
            len(values),
            float(values.mean()) * 1e3,
            p50,
            p90,
            p99,
            p999,
            top,
            curve,
            text.decode() if isinstance(text, bytes) else text,
        )

    def percentile(self, percent: float) -> float:
        """The latency at any percentile, in ms."""
        from hdrh.histogram import HdrHistogram

        if not self.count:
            return math.nan
        return min(HdrHistogram.decode(self.histogram).get_value_at_percentile(percent) / 1e3, self.max)


@dataclass(frozen=True)
class ServerSide:
    """What the server says of the run, from its first request to its last answer, warmup included.

    Attributes:
      cpu_seconds: user and system time of its process; None where it is not known.
      metrics: what its counters grew by: Prometheus name with labels -> difference.
      notes: what could not be read, one line each.
    """

    cpu_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of one run; the window is what follows the warmup.

    Attributes:
      target, plan: what was asked.
      offered: requests per second that were due in the window.
      achieved: good answers per second that came in the window.
      window_s: its length in seconds.
      sent: requests that were sent, warmup included.
      answered: good answers, warmup included.
      errors: code -> failed requests of the window; gRPC's names, "HTTP 400", NOT_SENT, WRONG_ANSWER.
      messages: code -> what the server said the first time.
      warmup_errors: failed requests of the warmup.
      latency: from when a request was due to its answer; of good answers.
      from_send: the same from when it was really sent.
      lateness: how late the generator sent.
      outstanding: mean of the requests that waited for an answer.
      request_bytes, response_bytes: means of bodies.
      rows: mean of examples in a request.
      generator_cpu: CPU seconds of the generator for each second of the run; near 1 it is the limit itself.
      timeline: (second after the start, answers, greatest latency in ms) for tenths of a second; by due time.
      server: what the server says.
      warnings: one line each.
    """

    target: Target
    plan: Plan
    offered: float
    achieved: float
    window_s: float
    sent: int
    answered: int
    errors: dict[str, int]
    messages: dict[str, str]
    warmup_errors: int
    latency: Latency
    from_send: Latency
    lateness: Latency
    outstanding: float
    request_bytes: float
    response_bytes: float
    rows: float
    generator_cpu: float
    timeline: tuple[tuple[float, int, float], ...] = ()
    server: ServerSide = ServerSide()
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """Requests of the window without a good answer."""
        return sum(self.errors.values())

    @property
    def kept_up(self) -> bool:
        """Whether the server answered as fast as it was asked.

        True where the achieved rate is at least 99% of the offered one, or where what is missing is no more than
        chance: the number outstanding is about Poisson, so that it differs by some sqrt(mean) between two moments.
        """
        missing = (self.offered - self.achieved) * self.window_s
        chance = 1 + 3 * math.sqrt(self.outstanding)
        return bool(self.answered) and not self.failed and missing <= max(0.01 * self.offered * self.window_s, chance)

    @property
    def slo_latency(self) -> float:
        """The latency that the SLO is about, in ms."""
        return self.latency.p99 if self.plan.slo_percentile == 99 else self.latency.percentile(self.plan.slo_percentile)

    @property
    def missed_slo(self) -> bool:
        """Whether there is an SLO, and it was missed."""
        return self.plan.slo_ms is not None and not self.slo_latency <= self.plan.slo_ms

    @property
    def good(self) -> bool:
        """Whether the rate was held: no errors, the server kept up, the SLO was met."""
        return (self.kept_up or self.plan.mode != OPEN) and not self.failed and not self.missed_slo

    @property
    def server_cpu_ms(self) -> float | None:
        """CPU milliseconds of the server for each request."""
        cpu = self.server.cpu_seconds
        return None if cpu is None or not self.answered else 1e3 * cpu / self.answered

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; what is not a number is None."""
        facts = _plain(dataclasses.asdict(self))
        derived = {
            "failed": self.failed,
            "kept_up": self.kept_up,
            "missed_slo": self.missed_slo,
            "good": self.good,
            "server_cpu_ms_per_request": self.server_cpu_ms,
        }
        return facts | derived


def to_json(facts: Any) -> str:
    """JSON that any parser takes."""
    return json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _histogram(seconds: np.ndarray) -> Any:
    from hdrh.histogram import HdrHistogram

    histogram = HdrHistogram(1, _HOUR_US, 3)
    micros, counts = np.unique(np.clip(np.rint(seconds * 1e6), 1, _HOUR_US).astype(np.int64), return_counts=True)
    for value, count in zip(micros.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    return histogram
