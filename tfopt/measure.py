"""What an artifact costs on disk, in time and in memory. (Parameters and FLOPs: cost.py.)"""

from __future__ import annotations

import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError

_GZIP_BLOCK = 64 << 20


@dataclass(frozen=True)
class Latency:
    """Times of one artifact, or why there are none.

    Attributes:
        p50_ms, p95_ms: of a call, in milliseconds.
        peak_memory_bytes: the largest resident set of the process that loaded and ran the artifact.
        runs: how many calls were timed.
        loader: how the artifact was loaded (see runtime).
        error: one line; None where all went well.
    """

    p50_ms: float | None = None
    p95_ms: float | None = None
    peak_memory_bytes: int | None = None
    runs: int = 0
    loader: str | None = None
    error: str | None = None


def sizes(path: str | Path) -> tuple[int, int]:
    """Returns the bytes of a file, or of all files of a directory, raw and gzipped one by one (level 6)."""
    path = Path(path)
    if not path.exists():
        raise TfoptError(f"{path}: no such file or directory")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return sum(file.stat().st_size for file in files), sum(map(_gzip_bytes, files))


def latency(
    paths: Mapping[str, str | Path],
    signature: str,
    inputs: Mapping[str, np.ndarray],
    *,
    runs: int = 50,
    warmup: int = 5,
    threads: int = 2,
    rounds: int = 10,
    timeout: float = 600,
    calls: Mapping[str, tuple[str, Mapping[str, np.ndarray]]] | None = None,
) -> dict[str, Latency]:
    """Times artifacts against each other.

    Each has a process of its own. They take turns, so that a slow minute of the machine slows them all: compare the
    times of one call of this function, not across calls.

    Args:
        paths: name -> SavedModel directory or .tflite file.
        signature: which to run; all of them have it.
        inputs: what to run it on.
        runs: timed calls of each.
        warmup: calls of each before the first timed one.
        threads: of the runtime.
        rounds: into how many turns the runs are divided.
        timeout: seconds for one turn, or for loading.
        calls: name -> (signature, inputs) of those that name them otherwise.

    Returns:
        Name -> times; one that failed has an `error`, and does not stop the others.
    """
    results: dict[str, Latency] = {}
    loaders: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in paths}
    children: dict[str, Child] = {}

    def ask(name: str, request: dict[str, Any]) -> Any:
        try:
            return children[name].ask(request, timeout)
        except ChildError as error:
            results[name] = Latency(error=f"{paths[name]}: measuring failed: {error}")
            children.pop(name).close()
            return None

    per_round = -(-runs // rounds)
    try:
        for name, path in paths.items():
            children[name] = Child("tfopt.measure:worker")
            key, arrays = (calls or {}).get(name, (signature, inputs))
            job = {"path": str(path), "signature": key, "inputs": dict(arrays), "threads": threads}
            if loader := ask(name, {"open": job, "warmup": warmup}):
                loaders[name] = loader
        for turn in range(-(-runs // per_round)):
            # Back and forth: nobody always runs after the same one.
            for name in list(children)[:: 1 if turn % 2 else -1]:
                times[name] += ask(name, {"runs": min(per_round, runs - turn * per_round)}) or []
        for name in list(children):
            if peak := ask(name, {"peak_memory": True}):
                p50, p95 = (float(value) * 1e3 for value in np.percentile(times[name], [50, 95]))
                results[name] = Latency(p50, p95, peak, len(times[name]), loaders[name])
    finally:
        for child in children.values():
            child.close()
    return {name: results[name] for name in paths}


def worker() -> Callable[[dict[str, Any]], Any]:
    """Returns the child's side of `latency`."""
    call: Callable[[], Any] | None = None
    program: Any = None

    def answer(request: dict[str, Any]) -> Any:
        nonlocal call, program
        if job := request.get("open"):
            from tfopt import runtime

            program = runtime.open(job["path"], job["threads"])
            call = program.prepare(job["signature"], job["inputs"])
            for _ in range(request["warmup"]):
                call()
            return program.loader
        assert call is not None
        if "runs" not in request:
            return peak_memory_bytes()
        call()  # untimed: the others had the caches in the meantime
        times = []
        for _ in range(request["runs"]):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    return answer


def peak_memory_bytes() -> int:
    """Returns the largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: that one begins with the parent's size when the process was forked.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gzip_bytes(path: Path) -> int:
    """Returns the size of `gzip -6`, without holding the file in memory; large files block by block on all cores."""

    def compressed(start: int) -> int:
        compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
        total, end = 0, start + _GZIP_BLOCK
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(min(1 << 20, end - file.tell())):
                total += len(compressor.compress(block))
        return total + len(compressor.flush())

    starts = range(0, max(path.stat().st_size, 1), _GZIP_BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib lets other threads run
        return sum(pool.map(compressed, starts))
