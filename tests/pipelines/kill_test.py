"""kill -9 at any moment: no half-written model, no process that lives on, nothing that the next run does not clear."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.forked import TIMEOUT, Server

MODEL = REPO / "saved_models" / "digits"
MOMENTS = 20
FLAGS = [f"--model={MODEL}", "--tflite=float32", "--nomeasure_latency"]


def marked(mark: str) -> list[int]:
    """Processes that were started with `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # gone in the meantime
    return found


def survivors(mark: str, besides: int = 0) -> list[int]:
    """Marked processes that are still there when the dying have had time to die."""
    for _ in range(50):
        left = [pid for pid in marked(mark) if pid != besides]
        if not left:
            break
        time.sleep(0.1)
    return left


def check(output: Path) -> None:
    """A version directory is complete and can be loaded, or is not there."""
    from tfopt import runtime

    left = {path.name for path in output.parent.iterdir() if not path.name.startswith(".")}
    assert left <= {"out"}
    if (output / "serving").exists():
        assert [path.name for path in (output / "serving").iterdir()] == ["1"]
        with runtime.open(output / "serving" / "1", loader=runtime.SESSION) as program:
            assert "serving_default" in program.signatures


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_killed_at_random_moments(tmp_path):
    mark = f"tfopt-kill-{uuid.uuid4().hex}"
    with Server("pipelines.optimize", "tfopt.optimize", environ={"TFOPT_TEST_MARK": mark}) as server:
        start = time.monotonic()
        whole = server.run([*FLAGS, f"--output_dir={tmp_path / 'whole' / 'out'}"], tmp_path / "log", timeout=300)
        duration = time.monotonic() - start
        assert whole.code == 0, whole.stderr[-2000:]
        check(tmp_path / "whole" / "out")

        rng = random.Random(0)
        killed: list[Path] = []
        while len(killed) < MOMENTS:
            output = tmp_path / uuid.uuid4().hex / "out"
            output.parent.mkdir()
            start = time.monotonic()
            moment = rng.uniform(0, duration)
            result = server.run([*FLAGS, f"--output_dir={output}"], tmp_path / "log", timeout=moment)
            assert result.code in (0, TIMEOUT), result.stderr[-2000:]
            assert survivors(mark, besides=server.pid) == []
            check(output)
            if result.code == TIMEOUT:
                killed.append(output)
            else:  # it was faster than those before: later moments would miss it too
                duration = time.monotonic() - start

        stale = [output for output in killed if any(p.name.startswith(".") for p in output.parent.iterdir())]
        assert stale, "no run was killed while it had a workspace"
        again = server.run([*FLAGS, f"--output_dir={stale[-1]}", "--overwrite"], tmp_path / "log", timeout=300)
        assert again.code == 0, again.stderr[-2000:]
        assert {path.name for path in stale[-1].parent.iterdir()} == {"out"}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("who", ["command", "worker"])
def test_neither_half_of_the_command_outlives_the_other(who, tmp_path):
    mark = f"tfopt-kill-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "pipelines.optimize", *FLAGS, f"--output_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, "TFOPT_TEST_MARK": mark}, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        while not any(tmp_path.iterdir()):  # until it has a workspace
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        (worker,) = [pid for pid in marked(mark) if pid != process.pid]
        os.kill(process.pid if who == "command" else worker, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert survivors(mark) == []
    assert not (tmp_path / "out").exists()
    if who == "worker":
        assert process.returncode == 2
        assert b"error: TensorFlow ended the process (SIGKILL)" in stderr
        assert list(tmp_path.iterdir()) == [], "the command removes the workspace of its worker"
