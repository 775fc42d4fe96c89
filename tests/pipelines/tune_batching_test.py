from __future__ import annotations

import json

import pytest

from tests.conftest import REPO
from tests.forked import Server
from tfopt.serving import batching_parameters

MODEL = f"--model={REPO / 'saved_models' / 'digits'}"


@pytest.fixture(scope="module")
def command():
    with Server("pipelines.tune_batching", "tfopt.serving.tuning.text", "tfopt.model") as started:
        yield started


def test_files(command, tmp_path):
    flags = [MODEL, "--slo_ms=100", "--nocheck", "--max_batch_size=4", f"--output_dir={tmp_path}/out"]
    ended = command.run(flags, tmp_path)
    assert ended.code == 0, ended.stderr
    assert "The batch curve of the model alone" in ended.stdout and "Verdict: " in ended.stdout
    facts = json.loads((tmp_path / "out" / "tuning.json").read_text())
    file = tmp_path / "out" / batching_parameters.FILE
    assert file.exists() == (facts["parameters"] is not None)
    if file.exists():
        written = batching_parameters.read(file)
        assert written.max_batch_size == facts["parameters"]["max_batch_size"] <= 4
    again = command.run(flags, tmp_path)
    assert again.code == 2 and "pass --overwrite" in again.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ([MODEL], "--rate, --slo_ms: give at least one of them"),
        ([MODEL, "--rate=-1"], "--rate=-1: wants more than 0"),
        (["--model=/no/such", "--rate=1"], "/no/such: no such file or directory"),
        ([MODEL, "--rate=1", "--data=/no/such.npz"], "/no/such.npz: no such file"),
        ([MODEL, "--rate=1", "--in_graph"], "--in_graph: writes a model: give --output_dir"),
        ([MODEL, "--rate=1", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_bad_input(command, tmp_path, flags, message):
    ended = command.run(flags, tmp_path)
    assert ended.code == 2 and message in ended.stderr and "Traceback" not in ended.stderr
