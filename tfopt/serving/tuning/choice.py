"""Choosing batching parameters over a measured batch curve, by simulation (tuning_simulation.py).

Searched: max_batch_size over the sizes of the curve; allowed sizes, all multiples of a request's rows or only the
powers of two; batch_timeout_micros, 0 to four times the time of one request; num_batch_threads, 1, 2, 4, ... CPUs. The
queue is as long as it may be for its last request to be answered within the SLO, or within 1 s where there is none:

    max_enqueued_batches = ceil(N SLO / T(M, N)) + N       M: max_batch_size, N: threads

Of what is within 3% of the best, the simplest is taken: the shortest timeout, the fewest threads, the fewest sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.tuning.curve import Curve
from tfopt.serving.tuning.simulation import Expected, Overhead, capacity, simulate

_CLOSE = 1.03
_MANY = 16  # allowed sizes of which each has to be warmed up
_OF_A_REQUEST = (0, 0.25, 0.5, 1, 2, 4)  # timeouts, in times of one request


@dataclass(frozen=True)
class Workload:
    """What the server has to do.

    Attributes:
      rate: requests per second; None: as many as can be held within the SLO.
      slo_ms: bound of the p99 latency, or None.
      rows: of each request.
    """

    rate: float | None
    slo_ms: float | None
    rows: int = 1


@dataclass(frozen=True)
class Choice:
    """One setting and what is expected of it.

    Attributes:
      parameters: None: batching is off.
      rate: requests per second: the workload's, or the highest within the SLO.
      expected: at that rate.
    """

    parameters: BatchingParameters | None
    rate: float
    expected: Expected

    def better_than(self, other: Choice, workload: Workload, by: float) -> bool:
        """Whether it is better by a factor: of the rate within the SLO, or of the p99 at the given rate."""
        if workload.rate is None:
            return self.rate > by * other.rate
        return _p99(self) * by < _p99(other)


def judge(curve: Curve, parameters: BatchingParameters | None, workload: Workload, overhead: Overhead) -> Choice:
    """Simulates one setting; None is batching off."""

    def run(rate: float) -> Expected:
        return simulate(curve, parameters, rate, workload.rows, overhead)

    rate = workload.rate
    if rate is None:
        assert workload.slo_ms is not None
        most = 1 / (1 / _stable(curve, parameters, workload.rows) + overhead.cost_s)
        rate = capacity(run, workload.slo_ms, 0.02 * most, most)
    return Choice(parameters, rate, run(rate or 1e-3))


def _stable(curve: Curve, parameters: BatchingParameters | None, rows: int) -> float:
    """Requests per second beyond which the queue grows without end: full batches on all threads."""
    if parameters is None:
        return curve.best(rows) / rows
    p = parameters.filled()
    assert p.max_batch_size is not None and p.num_batch_threads is not None
    sizes = [size for size in curve.sizes if size <= p.max_batch_size]
    return max(curve.throughput(size, p.num_batch_threads) for size in sizes) / rows


def candidates(curve: Curve, workload: Workload, threads: int) -> list[BatchingParameters]:
    """All settings that are searched, with so many batch threads."""
    rows = workload.rows
    one = curve.seconds(rows)
    found = []
    for most in curve.sizes[1:]:
        within = workload.slo_ms / 1e3 if workload.slo_ms else 1.0
        queue = math.ceil(threads * within / curve.seconds(most, threads)) + threads
        measured = tuple(size for size in curve.sizes if size <= most)
        every = tuple(range(rows, most + 1, rows))
        for sizes in (measured, every)[: 2 if len(every) <= _MANY and every != measured else 1]:
            for factor in _OF_A_REQUEST:
                micros = round(factor * one * 1e6, -2) if factor * one > 1e-4 else 0
                if factor and (not micros or micros / 1e6 > within / 2):
                    continue
                found.append(
                    BatchingParameters(
                        max_batch_size=most,
                        batch_timeout_micros=int(micros),
                        max_enqueued_batches=queue,
                        num_batch_threads=threads,
                        allowed_batch_sizes=sizes,
                    )
                )
    return found


def choose(curve: Curve, workload: Workload, threads: Sequence[int], overhead: Overhead) -> tuple[Choice, list[Choice]]:
    """Finds the best settings.

    Args:
      curve: of the model.
      workload: what the server has to do.
      threads: numbers of batch threads to try.
      overhead: what a request takes outside the model.

    Returns:
      Batching off; and the best setting for each number of threads, the best of all first. Empty where the curve has
      one size only.
    """
    best = []
    for number in threads:
        judged = [judge(curve, each, workload, overhead) for each in candidates(curve, workload, number)]
        if judged:
            best.append(_simplest(judged, workload))
    best.sort(key=lambda choice: -choice.rate if workload.rate is None else _p99(choice))
    return judge(curve, None, workload, overhead), best


def _simplest(judged: Sequence[Choice], workload: Workload) -> Choice:
    if workload.rate is None:
        top = max(choice.rate for choice in judged)
        close = [choice for choice in judged if choice.rate * _CLOSE >= top]
    else:
        least = min(map(_p99, judged))
        close = [choice for choice in judged if _p99(choice) <= _CLOSE * least]

    def cost(choice: Choice) -> tuple[float, ...]:
        p = choice.parameters
        assert p is not None and p.batch_timeout_micros is not None and p.max_batch_size is not None
        return p.batch_timeout_micros, len(p.allowed_batch_sizes), p.max_batch_size

    return min(close, key=cost)


def _p99(choice: Choice) -> float:
    return math.inf if choice.expected.failed else choice.expected.p99
