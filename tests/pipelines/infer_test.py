from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPO
from tests.forked import Server

MODEL = str(REPO / "saved_models" / "digits")


@pytest.fixture(scope="module")
def server():
    with Server("pipelines.infer", "tfopt.inference", "tfopt.runtime_saved_model") as started:
        yield started


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(path, image=np.random.default_rng(0).random((40, 8, 8, 1), np.float32))
    return str(path)


def test_rows_speed_and_files(server, rows, tmp_path):
    flags = [f"--model={MODEL}", f"--data={rows}", f"--output={tmp_path}/out/", "--shards=2"]
    ended = server.run(flags, tmp_path / "log")
    first, *files = ended.stdout.splitlines()
    assert ended.code == 0 and first.startswith("40 rows in ") and first.endswith(" rows/s")
    assert sorted(map(Path, files)) == sorted((tmp_path / "out").iterdir())
    ended = server.run(flags, tmp_path / "log")
    assert ended.code == 2 and "pass --overwrite" in ended.stderr
    assert server.run([*flags, "--overwrite"], tmp_path / "log").code == 0


def test_what_the_data_hold_beside_is_a_warning(server, rows, tmp_path):
    with np.load(rows) as arrays:
        np.savez(tmp_path / "more.npz", other=arrays["image"], **arrays)
    flags = [f"--model={MODEL}", f"--data={tmp_path}/more.npz", f"--output={tmp_path}/out/"]
    ended = server.run(flags, tmp_path / "log")
    assert ended.code == 0 and "'other' is not an input of the model: ignored" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["extra"], "error: takes flags only"),
        (["--model=/no/such"], "error: /no/such: no such SavedModel"),
        (["--format=csv"], "error: flag --format"),
        (["--batch_size=0"], "error: flag --batch_size"),
        (["--data=none.npz"], "error: none.npz: no such file"),
    ],
)
def test_bad_use_is_one_line_and_leaves_nothing(server, rows, tmp_path, flags, message):
    given = [f"--model={MODEL}", f"--data={rows}", f"--output={tmp_path}/out/"]
    ended = server.run([*given, *flags], tmp_path / "log")
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is here")
def test_beam_that_is_missing_is_one_line(server, rows, tmp_path):
    ended = server.run(
        [f"--model={MODEL}", f"--data={rows}", f"--output={tmp_path}/out/", "--beam_args="], tmp_path / "log"
    )
    assert ended.code == 2 and "error: --beam_args needs apache-beam: pip install 'tfopt[beam]'" in ended.stderr


def test_a_killed_run_leaves_no_file_that_looks_complete(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, image=np.random.default_rng(0).random((60_000, 8, 8, 1), np.float32))
    command = [sys.executable, "-m", "pipelines.infer", f"--model={MODEL}", f"--data={path}"]
    command += [f"--output={tmp_path}/out/", "--batch_size=1"]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (begun := list(tmp_path.glob(".predictions.tfopt-*/out/*.gz"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert begun and not list(tmp_path.glob("out/*"))
