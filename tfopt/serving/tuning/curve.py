"""The batch curve of a model: how long a batch of b rows takes while k of them run at once.

    T(b, k)    seconds, the median of calls in a v1 session, in a process of its own
    b k / T    rows per second

All (b, k) take turns, so that a slow minute of the machine slows them all.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError

_ROUNDS = 5
_ROUND_S = 0.15  # seconds of calls of one (b, k) in a round, at the least one call
_GAIN = 1.03  # a doubling that brings less than this is not worth its latency
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Curve:
    """Measured times of batches.

    Attributes:
      sizes: rows of a batch, increasing.
      parallel: batches that run at once, increasing from 1.
      times: (size, parallel) -> seconds.
    """

    sizes: tuple[int, ...]
    parallel: tuple[int, ...]
    times: Mapping[tuple[int, int], float]

    def seconds(self, rows: float, parallel: int = 1) -> float:
        """T(b, k): linear between the measured b and k; beyond the last of them as many rows per second as there."""
        most = self.parallel[-1]
        if parallel > most:
            return self.seconds(rows, most) * parallel / most
        if rows > self.sizes[-1]:
            return self.seconds(self.sizes[-1], parallel) * rows / self.sizes[-1]
        each = [float(np.interp(rows, self.sizes, [self.times[b, k] for b in self.sizes])) for k in self.parallel]
        return float(np.interp(parallel, self.parallel, each))

    def throughput(self, rows: int, parallel: int = 1) -> float:
        """Rows per second of batches that follow on each other without a gap."""
        return rows * parallel / self.seconds(rows, parallel)

    def best(self, rows: int) -> float:
        """The most rows per second with batches of so many rows, over all k."""
        return max(self.throughput(rows, k) for k in self.parallel)


def measure(
    model: str | Path,
    signature: str,
    rows: Callable[[int], Mapping[str, np.ndarray]],
    *,
    smallest: int = 1,
    largest: int = 128,
    limit_s: float = 2.0,
    cpus: int,
    progress: bool = False,
) -> Curve:
    """Measures a batch curve.

    Args:
      model: SavedModel directory.
      signature: which to run.
      rows: gives the inputs of a batch of so many rows.
      smallest: rows of one request; sizes are this times powers of two.
      largest: no size above it.
      limit_s: no size beyond the first that takes longer.
      cpus: as many batches run at once at most, and 1, 2, 4, ... below that.
      progress: show a bar.

    Raises:
      TfoptError: the model cannot be run.
    """
    parallel = tuple(sorted({*(2**i for i in range(20) if 2**i < cpus), cpus}))
    with Child("tfopt.serving.tuning.curve:worker") as child:

        def ask(request: Mapping[str, Any]) -> Any:
            try:
                return child.ask(dict(request), _TIMEOUT_S)
            except ChildError as error:
                raise TfoptError(f"{model}: the batch curve cannot be measured: {error}") from error

        ask({"open": str(model), "signature": signature})
        rough: dict[int, float] = {}
        size = smallest
        while size <= largest and _worth_it(rough, limit_s):
            ask({"rows": size, "inputs": dict(rows(size))})
            ask({"time": size, "parallel": 1, "calls": 2})
            rough[size] = min(ask({"time": size, "parallel": 1, "calls": 3}))
            size *= 2
        times: dict[tuple[int, int], list[float]] = {(b, k): [] for b in rough for k in parallel}
        for turn in tqdm(range(_ROUNDS), desc="batch curve", leave=False, disable=None if progress else True):
            for b, k in list(times)[:: 1 if turn % 2 else -1]:
                calls = max(1, round(_ROUND_S / rough[b] / k))
                times[b, k] += ask({"time": b, "parallel": k, "calls": calls})
    return Curve(tuple(rough), parallel, {key: statistics.median(values) for key, values in times.items()})


def _worth_it(rough: Mapping[int, float], limit_s: float) -> bool:
    """Whether a larger size may still help: the last two doublings brought something, and the last was not too slow."""
    rates = [size / seconds for size, seconds in rough.items()]
    if rough and list(rough.values())[-1] > limit_s:
        return False
    return len(rates) < 3 or max(rates[-2:]) > _GAIN * max(rates[:-2])


def worker() -> Callable[[dict[str, Any]], Any]:
    """Returns the child's side of `measure`."""
    program: Any = None
    signature = ""
    calls: dict[int, Callable[[], Any]] = {}

    def timed(call: Callable[[], Any], count: int, into: list[float]) -> None:
        call()  # not counted: others ran meanwhile, and not all threads start at once
        for _ in range(count):
            start = time.perf_counter()
            call()
            into.append(time.perf_counter() - start)

    def answer(request: dict[str, Any]) -> Any:
        nonlocal program, signature
        if "open" in request:
            from tfopt import runtime

            program, signature = runtime.open(request["open"]), request["signature"]
            return None
        if "rows" in request:
            calls[request["rows"]] = program.prepare(signature, request["inputs"])
            return None
        call, found = calls[request["time"]], list[float]()
        threads = [
            threading.Thread(target=timed, args=(call, request["calls"], found)) for _ in range(request["parallel"])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return answer
