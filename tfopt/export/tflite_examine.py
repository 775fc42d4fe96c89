"""Loads and runs a .tflite file, and compares it with the float32 file on the representative rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.export.tflite_file import TfliteFile
from tfopt.export.tflite_losses import losses
from tfopt.export.tflite_old_runtime import problems
from tfopt.export.tflite_rows import calls, probes

_COMPARED_CALLS = 128


def examine(job: Mapping[str, Any]) -> dict[str, Any]:
    """Examines `job["path"]` beside `job["float32"]`.

    Returns:
        quantized: number of weights that are int8, int4 or float16. float_ops: name -> number. problems: what keeps
        tflite-runtime 2.14 from running it. snr: 10 log10(sum want^2 / sum (want - got)^2) in dB, of the worst output;
        None without rows. seconds: of the fastest call. rows: on how many. loses: zeros or clusters of float32 that are
        not in it. notes: the rest.

    Raises:
        TfoptError: it does not load, does not run, or gives outputs that are not finite where float32's are.
    """
    file = TfliteFile(job["path"])
    facts: dict[str, Any] = {
        "quantized": file.weights("INT8", "INT4", "FLOAT16"),
        "float_ops": file.float_ops(),
        "problems": problems(file),
        "loses": losses(file, TfliteFile(job["float32"])),
        "snr": None,
        "seconds": 0.0,
        "rows": 0,
        "notes": [],
    }
    if flex := file.select_ops():
        facts["notes"] += [
            f"needs the Flex delegate for {', '.join(flex)}; not run here, since ai_edge_litert has none"
        ]
        return facts
    # Fewer than for calibration: a ratio settles sooner than the extremes of a range.
    rows = {key: each[:: -(-len(each) // _COMPARED_CALLS) or 1] for key, each in calls(job).items()}
    facts["rows"] = sum(map(len, rows.values()))
    ratios = []
    if job["path"] == job["float32"]:
        _wanted.clear()  # it was made again
    with runtime.open(job["path"]) as made, runtime.open(job["float32"]) as base:
        if made.loader == runtime.PLAIN:
            facts["notes"].append(
                "the XNNPACK delegate of ai_edge_litert cannot prepare it; it runs without, and slower"
            )
        for key in job["signatures"]:
            if made.signatures[key].inputs.keys() != base.signatures[key].inputs.keys():
                raise TfoptError(f"signature '{key}' lost inputs: it has {sorted(made.signatures[key].inputs)}")
            sums, seconds = _compare(made, base, key, rows.get(key))
            facts["seconds"] = max(facts["seconds"], seconds)
            for name, (signal, noise) in sums.items():
                if not np.isfinite(signal):
                    facts["notes"].append(f"output '{name}' of signature '{key}' is not finite, in float32 already")
                elif not np.isfinite(noise):
                    raise TfoptError(f"output '{name}' of signature '{key}' is not finite")
                elif key in rows:  # random inputs show that the file runs, and no more than that
                    ratios.append(float(10 * np.log10(signal / noise)) if noise else float("inf"))
    if ratios and job["name"] != "float32":
        facts["snr"] = min(ratios)
    return facts


_wanted: dict[tuple[str, str, int], list[runtime.Outputs]] = {}  # of float32, for all files of a model


def _compare(
    made: runtime.Program, base: runtime.Program, key: str, rows: list[dict[str, np.ndarray]] | None
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the energy of the signal and of the noise of each float output, and the seconds of the fastest call."""
    seconds = float("inf")
    sums: dict[str, np.ndarray] = {}
    calls_made = probes(base.signatures[key]) if rows is None else rows
    known = (base.path, key, len(calls_made))
    if known not in _wanted:
        _wanted[known] = [base.run(key, call) for call in calls_made]
    for call, wants in zip(calls_made, _wanted[known], strict=True):
        start = time.perf_counter()
        gots = made.run(key, call)
        seconds = min(seconds, time.perf_counter() - start)
        for name, want in wants.items():
            if want.dtype.kind == "f":
                sums[name] = sums.get(name, 0) + _signal_and_noise(want, gots[name])
    return sums, seconds


def _signal_and_noise(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    want, got = want.astype(np.float64), got.astype(np.float64)
    return np.array([np.sum(want**2), np.sum((want - got) ** 2)])
