"""Latency of quantized files against LiteRT's float32: medians of runs in turns, so that a slow minute slows all."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quantization_cases import Case, default_signature
from benchmarks.quantization_peers import openvino_python

THREADS = 1
RUNS = 200
ROUNDS = 20


def latencies(files: Mapping[str, str], found: Case) -> dict[str, dict]:
    """Returns row -> {"ratio", "p50_ms"} or {"latency_error"}.

    Args:
        files: row -> .tflite file, or OpenVINO's .xml; "float32" is what the ratios are to.
    """
    from tfopt import measure, runtime

    lite = {row: path for row, path in files.items() if path.endswith(".tflite")}
    row = np.load(found.representative)[found.key][:1]
    calls, refused = {}, {}
    for name, path in lite.items():
        try:
            with runtime.open(path, THREADS) as program:
                signature = default_signature(program)
                (key,) = program.signatures[signature].inputs
                calls[name] = (signature, {key: row})
        except Exception as error:  # a file that does not load is a cell
            refused[name] = {"latency_error": str(error)}
    lite = {name: path for name, path in lite.items() if name not in refused}
    signature, inputs = calls["float32"]
    times = measure.latency(lite, signature, inputs, runs=RUNS, warmup=20, threads=THREADS, rounds=ROUNDS, calls=calls)
    results: dict[str, dict] = dict(refused)
    for name, time in times.items():
        if time.p50_ms is None:
            results[name] = {"latency_error": time.error}
        else:
            results[name] = {"ratio": times["float32"].p50_ms / time.p50_ms, "p50_ms": time.p50_ms}
    for name, path in files.items():
        if path.endswith(".xml"):
            results[name] = _openvino(Path(path), files["float32"], calls["float32"], found)
    return results


def _openvino(path: Path, float32: str, call: tuple[str, dict], found: Case) -> dict:
    """Times OpenVINO, in a process of its own, in turns with another LiteRT process that runs float32."""
    from tfopt.child import Child

    script = Path(__file__).with_name("openvino_child.py")
    command = [openvino_python(), str(script), "serve", str(path), str(THREADS), str(found.representative), found.key]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with Child("tfopt.measure:worker") as child, subprocess.Popen(command, **pipes) as server:
        signature, inputs = call
        job = {"path": float32, "signature": signature, "inputs": inputs, "threads": THREADS}
        child.ask({"open": job, "warmup": 20}, 600)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            ours += child.ask({"runs": RUNS // ROUNDS}, 600)
            server.stdin.write(f"runs {RUNS // ROUNDS}\n")
            server.stdin.flush()
            line = server.stdout.readline()
            if not line:
                return {"latency_error": f"{path.name}: OpenVINO's process ended with {server.wait()}"}
            theirs += json.loads(line)
        server.stdin.close()
    p50 = float(np.median(theirs))
    return {"ratio": float(np.median(ours)) / p50, "p50_ms": p50 * 1e3}
