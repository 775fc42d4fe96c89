"""A model of the batcher over a measured batch curve.

TensorFlow's SharedBatchScheduler with one queue: a request joins the open batch if its rows fit, or else opens the
next one. A batch can run when it is full, when another was opened after it, or `timeout` after its first request; the
first of N threads that is free takes the oldest such batch. With arrivals t_i, batch B of b rows:

    start(B)   = max(min over threads of free time, ready(B)),  ready(B) = min(when full, t_first(B) + timeout)
    latency_i  = start(B) + T(p(b), k) + n k o - t_i + c

p(b) is the least allowed size that holds b, T the batch curve, k the batches that run when B starts (B included), n
the requests in B, o the seconds of the whole machine that a request costs outside the model (parsing, answering), and
c what it takes besides. The queue holds `max_enqueued_batches`; what comes then fails. Without batching all requests
run at once and share the processors:

    dV/dt = 1 / (T(r, k) + k o),   request i ends when V = V(t_i) + 1

Padding waste is sum(p(b) - b) / sum(p(b)).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.tuning.curve import Curve

_REQUESTS, _WARMUP = (3000, 15_000), 300  # at least and at most; not counted


@dataclass(frozen=True)
class Overhead:
    """What a request takes outside the model, in seconds.

    Attributes:
      latency_s: c, which costs nobody else anything.
      cost_s: o, of the whole machine.
    """

    latency_s: float = 0.0
    cost_s: float = 0.0


_NONE = Overhead()


@dataclass(frozen=True)
class Expected:
    """What the model expects; latencies in ms.

    Attributes:
      p50, p99: of requests that did not fail.
      failed: share of the requests that found the queue full.
      padding: share of the computed rows that are padding.
      mean_batch: rows of a batch, without padding.
      achieved: requests per second that were answered.
    """

    p50: float
    p99: float
    failed: float
    padding: float
    mean_batch: float
    achieved: float


def simulate(
    curve: Curve,
    parameters: BatchingParameters | None,
    rate: float,
    rows: int = 1,
    overhead: Overhead = _NONE,
    seed: int = 0,
) -> Expected:
    """Simulates Poisson arrivals.

    Args:
      curve: of the model.
      parameters: of the batcher, all of them given (`filled()`); None: batching is off.
      rate: requests per second.
      rows: of each request.
      overhead: what a request takes outside the model.
      seed: of the arrivals.
    """
    # At least twenty times as long as a batch takes: a shorter run would end before a queue has grown.
    longest = curve.seconds(min((parameters and parameters.max_batch_size) or rows, curve.sizes[-1]))
    count = int(np.clip(20 * rate * longest, *_REQUESTS))
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    arrivals = np.cumsum(gaps)
    if parameters is None:
        ends = _sharing(curve, arrivals, rows, overhead.cost_s)
        return _expected(arrivals, ends, overhead.latency_s, 0.0, float(rows))
    ends, computed, batches = _batched(curve, parameters, arrivals, rows, overhead.cost_s)
    real = float(np.isfinite(ends).sum() * rows)
    return _expected(arrivals, ends, overhead.latency_s, 1 - real / max(computed, 1), real / max(batches, 1))


def capacity(run: Callable[[float], Expected], slo_ms: float, low: float, high: float, steps: int = 9) -> float:
    """The highest rate between two at which nothing fails and p99 is within the SLO; 0 where not even the lowest is."""

    def held(rate: float) -> bool:
        found = run(rate)
        return found.failed == 0 and found.p99 <= slo_ms

    if not held(low):
        return 0.0
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if held(middle) else (low, middle)
    return low


def _expected(arrivals: np.ndarray, ends: np.ndarray, latency_s: float, padding: float, mean_batch: float) -> Expected:
    took = (ends - arrivals)[_WARMUP:]
    good = np.isfinite(took)
    p50, p99 = np.percentile(took[good], [50, 99]) if good.any() else (np.inf, np.inf)
    span = float(np.nanmax(np.where(np.isfinite(ends), ends, np.nan)) - arrivals[0]) if good.any() else np.inf
    return Expected(
        float(p50 + latency_s) * 1e3,
        float(p99 + latency_s) * 1e3,
        float(1 - good.mean()),
        padding,
        mean_batch,
        float(np.isfinite(ends).sum() / span),
    )


def _sharing(curve: Curve, arrivals: np.ndarray, rows: int, cost_s: float) -> np.ndarray:
    """Ends of requests that run as they come; equal ones end in the order in which they came."""
    seconds = [curve.seconds(rows, max(k, 1)) + k * cost_s for k in range(curve.parallel[-1] + 1)]
    most = curve.parallel[-1]

    def each(running: int) -> float:
        return seconds[running] if running <= most else seconds[most] * running / most

    ends = np.empty(len(arrivals))
    work: list[float] = []  # V at which each running one ends
    virtual, now, oldest = 0.0, 0.0, 0
    for at in (*arrivals, np.inf):
        while oldest < len(work):
            step = (work[oldest] - virtual) * each(len(work) - oldest)
            if now + step > at:
                break
            now, virtual = now + step, work[oldest]
            ends[oldest] = now
            oldest += 1
        if at == np.inf:
            break
        if oldest < len(work):
            virtual += (at - now) / each(len(work) - oldest)
        now = at
        work.append(virtual + 1)
    return ends


def _batched(
    curve: Curve, parameters: BatchingParameters, arrivals: np.ndarray, rows: int, cost_s: float
) -> tuple[np.ndarray, float, int]:
    """Ends of requests (NaN: refused), the rows that were computed, and the number of batches."""
    most, threads = parameters.max_batch_size or 1, parameters.num_batch_threads or 1
    timeout, queue = (parameters.batch_timeout_micros or 0) / 1e6, parameters.max_enqueued_batches or 1
    fits = max(1, most // rows)
    times: dict[tuple[int, int], float] = {}
    ends = np.full(len(arrivals), np.nan)
    free = [0.0] * threads
    running: list[float] = []  # ends of started batches
    waiting: list[list[int]] = []  # batches of requests, the last one open
    computed, batches = 0.0, 0

    def start_until(now: float) -> None:
        """Starts what starts before `now`."""
        nonlocal computed, batches
        while waiting:
            first = waiting[0]
            ready = arrivals[first[0]] + timeout
            if len(first) >= fits:  # all requests have as many rows, so that only full batches are followed by others
                ready = min(ready, arrivals[first[-1]])
            start = max(free[0], ready)
            if start > now:
                return
            heapq.heappop(free)
            while running and running[0] <= start:
                heapq.heappop(running)
            k, size = len(running) + 1, parameters.padded(len(first) * rows)
            if (size, k) not in times:
                times[size, k] = curve.seconds(size, k)
            end = start + times[size, k] + len(first) * k * cost_s
            heapq.heappush(free, end)
            heapq.heappush(running, end)
            ends[first] = end
            computed, batches = computed + size, batches + 1
            waiting.pop(0)

    for index, at in enumerate(arrivals):
        start_until(at)
        if waiting and len(waiting[-1]) < fits:
            waiting[-1].append(index)
        elif len(waiting) < queue:
            waiting.append([index])
    start_until(np.inf)
    return ends, computed, batches


def allowed_sizes(curve: Curve, most: int, rows: int, every: bool) -> tuple[int, ...]:
    """Allowed sizes up to `most`: those that were measured, or every multiple of a request's rows."""
    if every:
        return tuple(range(rows, most + 1, rows))
    sizes = list(curve.sizes[: bisect.bisect_right(curve.sizes, most)])
    return tuple(sizes)
