"""Killed by SIGKILL in the middle of its trainings and started again, a run ends with the same files."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.forked import Server
from tests.pipelines.kill_test import marked
from tests.pipelines.optimize_test import MODEL
from tfopt.recipe import NAMED

TRAINING = {"batch_size": 16, "epochs": 3}
FEW = {**TRAINING, "min_steps": 0}
RECIPE = [
    *NAMED["lossless"]["passes"],
    {"pass": "prune_magnitude", "sparsity": 0.7, **FEW},
    {"pass": "distill", "checkpoint_steps": 7, **FEW},
    {"pass": "train_quantized", "calibrator": "minmax", **TRAINING},
]
# Which training is killed, and after how many more of its checkpoints.
MOMENTS = [("11_prune_magnitude", 1), ("12_distill", 2), ("12_distill", 5), ("13_train_quantized", 1)]


def _state(folder: Path) -> int:
    """When the state of a training was written, in ns; 0 where there is none."""
    found = list(folder.rglob("training.npz"))
    return found[0].stat().st_mtime_ns if found else 0


def _kill(folder: Path, saves: int, delay: float, mark: str, server: int) -> None:
    """Kills the run when it has saved the state of a training so often."""
    last, deadline = _state(folder), time.monotonic() + 120
    while saves and time.monotonic() < deadline:
        now = _state(folder)
        saves, last = saves - (now != last), now
        time.sleep(0.002)
    time.sleep(delay)
    for pid in marked(mark):
        if pid != server:
            os.kill(pid, signal.SIGKILL)


def _weights(output: Path) -> dict[str, np.ndarray]:
    from tfopt.model import load

    model = load(output / "serving" / "1")
    constants = {node.name: model.graph.constant(node.name) for node in model.graph.nodes.values()}
    return {name: value for name, value in constants.items() if value is not None}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_killed_in_its_trainings(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:500] / 16).astype(np.float32)[..., None]
    np.savez(tmp_path / "rows.npz", image=images)
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    flags = [f"--model={MODEL}", f"--recipe={tmp_path / 'recipe.json'}", "--tflite=int8", "--nomeasure_latency"]
    flags += [f"--representative_data={tmp_path / 'rows.npz'}"]
    mark, rng = f"tfopt-resume-{uuid.uuid4().hex}", random.Random(3)
    with Server("pipelines.optimize", "tfopt.optimize", environ={"TFOPT_TEST_MARK": mark}) as server:
        whole = server.run([*flags, f"--output_dir={tmp_path / 'whole'}"], tmp_path / "log", timeout=300)
        assert whole.code == 0, whole.stderr[-2000:]
        flags += [f"--output_dir={tmp_path / 'out'}", f"--checkpoint_dir={tmp_path / 'states'}"]
        finished = 0
        for name, saves in MOMENTS:
            kill = (tmp_path / "states" / name, saves, rng.uniform(0, 0.05), mark, server.pid)
            watcher = threading.Thread(target=_kill, args=kill)
            watcher.start()
            killed = server.run(flags, tmp_path / "log", timeout=300)
            watcher.join()
            assert killed.code == -signal.SIGKILL, f"{name}: {killed}"
            assert not (tmp_path / "out").exists()
            assert finished in (0, _state(tmp_path / "states" / "11_prune_magnitude")), "it was trained again"
            finished = _state(tmp_path / "states" / "11_prune_magnitude") if name != "11_prune_magnitude" else 0
        again = server.run(flags, tmp_path / "log", timeout=300)
    assert again.code == 0, again.stderr[-2000:]
    assert list((tmp_path / "states").iterdir()) == []  # nobody needs them any more
    files = [(tmp_path / name / "device" / "int8.tflite").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    first, second = (_weights(tmp_path / name) for name in ("whole", "out"))
    assert first.keys() == second.keys() and len(first) > 5
    assert all(np.array_equal(value, second[name]) for name, value in first.items())
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out")]
    notes = [[note for step in report["steps"] for note in step["notes"] if "held back" in note] for report in reports]
    assert notes[0] == notes[1] and len(notes[0]) == 3
