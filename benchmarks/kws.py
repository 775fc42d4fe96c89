"""MLPerf Tiny's keyword spotting: accuracy of tfopt's artifacts on real recordings, and size against the reference.

    python -m benchmarks.kws

Optimizes kws-ds-cnn with int8 calibrated on the first 100 of the 500 recordings, then scores all 500, and the 400 that
calibration never saw, with the original, the serving SavedModel (both in a v1 session) and the TFLite files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import peers, samples
from benchmarks.models import REPOSITORY, SHARED, all_models

NAME = "kws-ds-cnn"
REFERENCE = SHARED / NAME
CALIBRATION = 100


def saved_model_scores(directory: str, rows: np.ndarray) -> np.ndarray:
    """Returns the class scores of a SavedModel run in a v1 session, shape (rows, 12)."""
    program = peers.Program(peers.serving(directory))
    (key,) = program.candidate.inputs
    (scores,) = program.run({key: rows}).values()
    program.close()
    return scores


def tflite_scores(path: Path, rows: np.ndarray) -> np.ndarray:
    """Returns the class scores of a TFLite file, dequantized where they are int8, one row at a time."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=2)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for row in rows:
        value = row.reshape(source["shape"])
        if source["dtype"] == np.int8:
            scale, zero = source["quantization"]
            value = np.clip(np.round(value / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(source["index"], value)
        interpreter.invoke()
        found.append(interpreter.get_tensor(result["index"]).astype(np.float32).reshape(-1))
    return np.array(found)  # int8 scores keep their order, so they need no scale for the top class


def main() -> None:
    """Command line."""
    data = np.load(samples.DATA / "kws" / "kws01_first500.npz")
    rows, truth = data["input_1"], data["label"]
    original = all_models([NAME])[NAME]
    with tempfile.TemporaryDirectory() as scratch:
        calibration, output = Path(scratch) / "calibration.npz", Path(scratch) / "out"
        np.savez(calibration, input_1=rows[:CALIBRATION])
        command = [sys.executable, "-m", "pipelines.optimize", f"--model={original}", f"--output_dir={output}"]
        command += ["--tflite=float32,float16,dynamic_int8,int8", f"--representative_data={calibration}"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pipelines.optimize ended with {done.returncode}: {done.stderr[-2000:]}")
        scores = {"original SavedModel": (Path(original), saved_model_scores(original, rows))}
        scores["tfopt serving"] = (output / "serving", saved_model_scores(str(output / "serving" / "1"), rows))
        files = [("tfopt", path) for path in sorted((output / "device").glob("*.tflite"))]
        files += [("MLPerf", path) for path in sorted(REFERENCE.glob("*.tflite"))]
        for owner, path in files:
            scores[f"{owner} {path.name}"] = (path, tflite_scores(path, rows))
        print("| artifact | bytes | accuracy, 500 rows | accuracy, 400 not in calibration | top class as original |")
        print("|---|---|---|---|---|")
        top = scores["original SavedModel"][1].argmax(1)
        for name, (path, values) in scores.items():
            files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
            right = values.argmax(1) == truth
            size = sum(x.stat().st_size for x in files)
            held_out = right[CALIBRATION:].mean()
            same = (values.argmax(1) == top).mean()
            print(f"| {name} | {size:,} | {right.mean():.1%} | {held_out:.1%} | {same:.1%} |")


if __name__ == "__main__":
    main()
