from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tfopt import measure
from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError


def worker():
    """A worker that does what the test asks: see test_a_child_that_fails_says_why."""

    def answer(request):
        if request == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if request == "exit":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if request == "sleep":
            time.sleep(60)
        if request == "raise":
            raise ValueError("two\nlines")
        if request == "print":
            print("noise on stdout")
        return request

    return answer


@pytest.fixture
def child(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Child("measure_test:worker") as process:
        yield process


@pytest.mark.parametrize(
    ("request_", "message", "alive"),
    [
        ("segfault", "^died of SIGSEGV", False),
        ("exit", "^died of exit code 3: the last words$", False),
        ("sleep", "^gave no answer in 1 s, and was stopped$", False),
        ("raise", "^ValueError: two lines$", True),
    ],
)
def test_a_child_that_fails_says_why(child, request_, message, alive):
    assert child.ask("print", 60) == "print"
    with pytest.raises(ChildError, match=message):
        child.ask(request_, 1 if request_ == "sleep" else 60)
    assert child.alive == alive


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_dies_with_its_parent():
    code = (
        "import sys, time; from tfopt.child import Child\n"
        "child = Child('measure_test:worker'); child.ask('ready', 60)\n"
        "print(child._process.pid, flush=True); child.ask('sleep', 60)"
    )
    here = Path(__file__).parent
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"},
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"the child {pid} outlived its parent")


def test_sizes_of_a_file_and_of_a_directory(tmp_path):
    contents = {"a/weights.bin": bytes(100_000), "saved_model.pb": np.random.default_rng(0).bytes(5000)}
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    zipped = {name: len(gzip.compress(data, 6)) for name, data in contents.items()}
    assert measure.sizes(tmp_path) == (105_000, sum(zipped.values()))
    assert measure.sizes(tmp_path / "a/weights.bin") == (100_000, zipped["a/weights.bin"])
    with pytest.raises(TfoptError, match="none"):
        measure.sizes(tmp_path / "none")


def test_latency_of_artifacts_and_an_error_for_a_bad_one(plain_module, tmp_path):
    (tmp_path / "bad.tflite").write_bytes(b"no flatbuffer")
    paths = {"original": plain_module, "bad": tmp_path / "bad.tflite"}
    x = np.ones((1, 4), np.float32)
    measured = measure.latency(paths, "score", {"x": x}, runs=7, warmup=1, threads=1, rounds=3)
    assert list(measured) == ["original", "bad"]
    good, bad = measured["original"], measured["bad"]
    assert good.error is None and good.runs == 7 and good.loader == "v1 session"
    assert 0 < good.p50_ms <= good.p95_ms
    assert 50e6 < good.peak_memory_bytes < 5e9
    assert "bad.tflite" in bad.error and "\n" not in bad.error and bad.p50_ms is None
    # A wrong input is an error of each, not a crash.
    assert "takes the inputs" in measure.latency({"a": plain_module}, "score", {"z": x}, runs=1)["a"].error


def test_a_tflite_process_holds_no_tensorflow(shared):
    path = shared / "models/kws-ds-cnn/kws_ref_model.tflite"
    x = {"input_1": np.zeros((1, 49, 10, 1), np.float32)}
    measured = measure.latency({"int8": path}, "serving_default", x, runs=20, threads=1)["int8"]
    assert measured.error is None
    assert measured.peak_memory_bytes < 150e6
