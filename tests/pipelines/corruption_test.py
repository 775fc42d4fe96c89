"""200 damaged copies of a real SavedModel: each ends in one line, or in a valid result where the damage is harmless."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.forked import TIMEOUT, Server
from tfopt.publish import remove_stale

MODEL = REPO / "saved_models" / "digits"
CASES = 200


@pytest.fixture(scope="module")
def server():
    with Server("pipelines.optimize", "tfopt.optimize") as started:
        yield started


def damage(model: Path, seed: int) -> str:
    """Damages one file of a SavedModel; returns what was done, in words."""
    rng = random.Random(seed)
    files = ["saved_model.pb"] * 2 + ["variables/variables.data-00000-of-00001", "variables/variables.index"]
    file = model / rng.choice(files)
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip"] * 6 + ["cut", "cut", "zero", "insert", "missing"])
    place = rng.randrange(len(content))
    if how == "flip":
        count = rng.choice([1, 1, 1, 4, 64])
        for _ in range(count):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        how = f"{count} bits flipped"
    elif how == "cut":
        del content[place:]
    elif how == "zero":
        content[place : place + 100] = bytes(len(content[place : place + 100]))
    elif how == "insert":
        content[place:place] = rng.randbytes(10)
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{file.name}: {how}"


@pytest.mark.slow
def test_damaged_models(server, tmp_path):
    cases, what = [], []
    for seed in range(CASES):
        folder = tmp_path / str(seed)
        shutil.copytree(MODEL, folder / "model")
        what.append(damage(folder / "model", seed))
        cases.append([f"--model={folder / 'model'}", f"--output_dir={folder / 'out'}", "--tflite="])
        cases[-1] += ["--nomeasure_latency"]
    codes = []
    for seed, ended in enumerate(server.run_all(cases, tmp_path / "log")):
        seen = f"case {seed} ({what[seed]}): exit code {ended.code}: {ended.stderr}"
        folder = tmp_path / str(seed)
        assert ended.code != TIMEOUT, seen
        assert "Traceback" not in ended.stderr, seen
        if ended.code < 0:
            remove_stale(folder / "out")  # as tfopt.isolate does when a child crashes
        else:
            assert ended.code in (0, 2), seen
            lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
            assert len(lines) == (1 if ended.code == 2 else 0), seen
            assert all(len(line) < 600 for line in lines), seen
        left = {path.name for path in folder.iterdir()} - {"model"}
        assert left == ({"out"} if ended.code == 0 else set()), seen
        if ended.code == 0:
            assert (folder / "out" / "serving" / "1" / "saved_model.pb").is_file(), seen
        codes.append(ended.code)
    assert codes.count(2) > CASES // 4 and codes.count(0) > 0
