"""bfloat16 on the stock TensorFlow runtime: the recipe serving_bf16 against the original SavedModel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.models import CACHE, REPOSITORY, SEED, all_models, picture

NAME, IMAGE = "resnet50", (224, 224, 3)
BATCH = 8
ROWS = 200  # of which the top class is compared
THREADS = 2
GOAL = 2.2


def _has_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def row() -> str:
    """Returns the measurement, or the reason why there is none, as a Markdown table."""
    if not _has_bfloat16():
        return "serving_bf16: skipped, since this machine's processor has no avx512_bf16"
    from tfopt import measure, runtime

    original = all_models([NAME])[NAME]
    output = CACHE.parent / "quantization" / NAME
    command = [sys.executable, "-m", "pipelines.optimize", f"--model={original}", f"--output_dir={output}"]
    command += ["--recipe=serving_bf16", "--tflite=", "--overwrite", "--measure_latency=false"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return f"serving_bf16: {lines[-1] if lines else done.returncode}"
    images = picture(np.random.default_rng(SEED), (ROWS, *IMAGE), -1.0, 1.0)
    paths = {"original": original, "bf16": str(output / "serving" / "1")}
    top = {}
    for name, path in paths.items():
        with runtime.open(path) as program:
            (key,) = program.signatures["serving_default"].inputs
            calls = [images[i : i + BATCH] for i in range(0, ROWS, BATCH)]
            scores = [next(iter(program.run("serving_default", {key: call}).values())) for call in calls]
            top[name] = np.concatenate(scores).argmax(1)
    inputs = {key: images[:BATCH]}
    times = measure.latency(paths, "serving_default", inputs, runs=30, threads=THREADS, rounds=15)
    for name, time in times.items():
        if time.p50_ms is None:
            return f"serving_bf16: {name}: {time.error}"
    ratio = times["original"].p50_ms / times["bf16"].p50_ms
    lines = [
        "| model | batch | original | bfloat16 | ratio | goal | bytes, original | bytes | same top class | rows |",
        "|---" * 10 + "|",
        f"| {NAME} | {BATCH} | {times['original'].p50_ms:.0f} ms | {times['bf16'].p50_ms:.0f} ms "
        f"| {ratio:.2f} | {GOAL} "
        f"| {measure.sizes(original)[0]:,} | {measure.sizes(paths['bf16'])[0]:,} "
        f"| {np.mean(top['original'] == top['bf16']):.2%} | {ROWS} |",
    ]
    return "\n".join(lines)
