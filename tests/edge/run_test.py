"""Runs what emit.py made under tflite-runtime, which is frozen at 2.14 and still on devices. No TensorFlow here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TFOPT_EDGE_DIR", REPO / "build/edge"))
CASES = json.loads((FOLDER / "cases.json").read_text()) if (FOLDER / "cases.json").exists() else []

# Of the output's scale. Kernels of two releases sum in another order, and integer ones may then round by a step or
# two, each a 1/256 of a tensor's range.
RTOL = {
    "float32": 1e-4,
    "float16": 1e-3,
    "weight_int8": 1e-3,
    "dynamic_int8": 0.02,
    "int8": 0.05,
    "int8_io": 0.05,
    "int16x8": 0.01,
}

pytestmark = [
    pytest.mark.edge,
    pytest.mark.skipif(
        not importlib.util.find_spec("tflite_runtime"), reason="tflite-runtime is not here: make test-edge"
    ),
    pytest.mark.skipif(not CASES, reason=f"{FOLDER} has no cases: python -m tests.edge.emit {FOLDER}"),
]


def test_the_environment_is_a_device_s():
    for package in ("tensorflow", "absl", "ai_edge_litert"):
        assert importlib.util.find_spec(package) is None, f"{package} is installed: this environment proves nothing"


@pytest.mark.parametrize("case", [c for c in CASES if "problem" not in c], ids=lambda case: "-".join(case.values()))
def test_the_same_outputs_as_where_it_was_made(case):
    done = _run(case, RTOL[case["file"]])
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["runtime"].startswith("tflite_runtime 2.14")
    assert result["check"]["passed"] and result["rows"] > 1
    assert 0 < result["latency"]["p50_ms"] <= result["latency"]["p95_ms"]
    assert 5e6 < result["peak_memory_bytes"] < 1e9


@pytest.mark.parametrize("case", [c for c in CASES if "problem" in c], ids=lambda c: f"{c['model']}-{c['file']}")
def test_what_tfopt_says_that_this_runtime_cannot_run(case):
    """It does not load, or gives other outputs."""
    assert _run(case, 0.05).returncode, case["problem"]


def test_the_latest_version_of_each_op():
    from tflite_runtime.interpreter import Interpreter

    files = sorted((FOLDER / "versions").iterdir())
    assert len(files) > 250
    for path in files:
        if path.name.startswith("has."):
            Interpreter(str(path))
        else:
            with pytest.raises(ValueError, match="Didn't find op"):
                Interpreter(str(path))


def _run(case, rtol):
    folder = FOLDER / case["model"]
    command = [
        sys.executable,
        str(REPO / "pipelines/run_tflite.py"),
        str(folder / f"{case['file']}.tflite"),
        f"--signature={case['signature']}",
        f"--inputs={folder}/inputs.{case['signature']}.npz",
        f"--check={folder}/{case['file']}.{case['signature']}.npz",
        f"--rtol={rtol}",
        "--runs=5",
        "--json",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
