"""Checking settings of the batcher by load tests, all of them under the same conditions.

The settings take turns at each rate, so that a slow minute of the machine slows them all.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tfopt.errors import TfoptError
from tfopt.serving.batching_parameters import FILE, BatchingParameters
from tfopt.serving.loadtest.plan import Plan
from tfopt.serving.loadtest.result import Result

_ROUNDS = 3
_STEP = 1.15  # from one rate to the next
_DOWN = 4  # steps down at the most, each of _FAR, for a setting that does not hold the first rate
_FAR = 1.5
_ATTEMPTS = 3

Serve = Callable[[str, BatchingParameters | None], contextlib.AbstractContextManager[str]]
Measure = Callable[[Plan], Result]


@dataclass(frozen=True)
class Checked:
    """What a load test found of one setting.

    Attributes:
      rate: requests per second: the given one, or the highest that was held within the SLO; 0 where none was.
      p50, p99: at that rate, in ms; medians of rounds where the rate was given.
      failed: requests that failed at it.
      runs: load tests of this setting.
    """

    rate: float
    p50: float
    p99: float
    failed: int
    runs: int


@contextlib.contextmanager
def local(model: Path, name: str, parameters: BatchingParameters | None) -> Iterator[str]:
    """Serves a SavedModel by tfopt-serve; gives its gRPC address."""
    from tfopt.serving.server.child import running

    with tempfile.TemporaryDirectory(prefix="tfopt-tune-") as folder:
        base = Path(folder) / "model"
        base.mkdir()
        (base / "1").symlink_to(model.resolve(), target_is_directory=True)
        flags = [f"--model_name={name}", f"--model_base_path={base}"]
        if parameters is not None:
            file = Path(folder) / FILE
            file.write_text(parameters.text(), encoding="utf-8")
            flags += ["--enable_batching", f"--batching_parameters_file={file}"]
        with running(flags) as server:
            yield server.grpc


def by_hand(address: str, folder: Path) -> Serve:
    """Asks the user to restart a server of theirs with each setting."""

    @contextlib.contextmanager
    def serve(_: str, parameters: BatchingParameters | None) -> Iterator[str]:
        flags = "without --enable_batching"
        if parameters is not None:
            file = folder / FILE
            file.write_text(parameters.text(), encoding="utf-8")
            flags = f"with --enable_batching --batching_parameters_file={file}, a file that holds\n{parameters.text()}"
        print(f"Restart the server at {address} {flags}\nand press Enter when it serves.", file=sys.stderr, flush=True)
        if not sys.stdin.readline():
            raise TfoptError("--server: nobody pressed Enter; run this on a terminal, or drop --server")
        yield address

    return serve


def at_rate(measures: Mapping[str, Measure], plan: Plan, progress: bool = False) -> dict[str, Checked]:
    """Measures all settings at one rate, in turns."""
    found: dict[str, list[Result]] = {name: [] for name in measures}
    turns = [(name, turn) for turn in range(_ROUNDS) for name in list(measures)[:: -1 if turn % 2 else 1]]
    for name, turn in tqdm(turns, desc="checking", leave=False, disable=None if progress else True):
        found[name].append(measures[name](plan.at(plan.rate, turn)))
    return {
        name: Checked(
            plan.rate,
            statistics.median(result.latency.p50 for result in results),
            statistics.median(result.latency.p99 for result in results),
            sum(result.failed for result in results),
            len(results),
        )
        for name, results in found.items()
    }


def knees(measures: Mapping[str, Measure], plan: Plan, start: float, progress: bool = False) -> dict[str, Checked]:
    """Looks for the highest rate that each setting holds within the SLO, all settings at the same rates.

    A setting is out when it failed three times at a rate: other processes disturb single runs. One that does not hold
    the first rate goes down from there.
    """
    runs = dict.fromkeys(measures, 0)
    held: dict[str, tuple[float, Result]] = {}

    def try_at(name: str, rate: float) -> bool:
        for attempt in range(_ATTEMPTS):
            runs[name] += 1
            result = measures[name](plan.at(rate, attempt))
            bar.update()
            if result.good:
                held[name] = rate, result
                return True
        return False

    with tqdm(desc="checking", unit=" load tests", leave=False, disable=None if progress else True) as bar:
        alive, rate, turn = list(measures), start, 0
        while alive:
            alive = [name for name in alive[:: -1 if turn % 2 else 1] if try_at(name, rate)]
            rate, turn = rate * _STEP, turn + 1
        for name in measures:
            for step in range(1, _DOWN + 1):
                if name in held or try_at(name, start / _FAR**step):
                    break
    found = {}
    for name in measures:
        if name in held:
            rate, result = held[name]
            found[name] = Checked(rate, result.latency.p50, result.latency.p99, 0, runs[name])
        else:
            found[name] = Checked(0.0, math.nan, math.nan, 0, runs[name])
    return found
