from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from tests.conftest import REPO
from tests.forked import Server

MODEL = str(REPO / "saved_models" / "digits")


@pytest.fixture(scope="module")
def server():
    with Server(
        "pipelines.evaluate", "tfopt.evaluation", "tfopt.evaluation_text", "tfopt.runtime_saved_model"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    image = np.random.default_rng(0).random((40, 8, 8, 1), np.float32)
    np.savez(path, image=image, label=np.arange(40) % 10)
    return f"--data={path}"


def test_text_and_json(server, rows, tmp_path):
    text = server.run([MODEL, MODEL, rows, "--metric=accuracy,top5", "--worst=3"], tmp_path)
    assert text.code == 0 and "the same" in text.stdout and "100.00%" in text.stdout
    found = json.loads(server.run([MODEL, MODEL, rows, "--metric=accuracy", "--format=json"], tmp_path).stdout)
    assert [each["counts"]["accuracy"]["rows"] for each in found["artifacts"]] == [40, 40]
    assert found["artifacts"][1]["max_error"] == 0


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ([MODEL, MODEL, "--metric=accuracy", "--max_accuracy_drop=0", "--max_error=0", "--min_agreement=1"], 0, ""),
        ([MODEL, MODEL, "--min_agreement=1.1"], 1, f"failed: {MODEL}: top-1 agreement is 1.0000, less than"),
        ([MODEL, "--metric=accuracy", "--bar=accuracy=0.99"], 1, "worse than 0.99"),
        ([], 2, "error: give artifacts"),
        ([MODEL], 2, "error: one artifact is evaluated by a metric"),
        ([MODEL, "/no/such.tflite"], 2, "error: there is no model at /no/such.tflite"),
        ([MODEL, MODEL, "--metric=nope"], 2, "error: --metric: unknown 'nope'"),
        ([MODEL, MODEL, "--bar=auc"], 2, "error: --bar: wants METRIC=VALUE"),
        ([MODEL, MODEL, "--bar=auc=0.9"], 2, "error: the bar auc=0.9 is on what is not measured: nothing"),
        ([MODEL, MODEL, "--max_error=-1"], 2, "error: flag --max_error"),
    ],
)
def test_exit_codes(server, rows, tmp_path, flags, code, message):
    ended = server.run([*flags, rows], tmp_path)
    lines = [line for line in ended.stderr.splitlines() if line.startswith(("error: ", "failed: "))]
    assert ended.code == code and len(lines) == (code > 0)
    assert all(message in line for line in lines)


def test_rows_are_named(server, tmp_path):
    ended = server.run([MODEL, MODEL], tmp_path)
    assert ended.code == 2 and "error: --data: give the rows to evaluate on" in ended.stderr


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_without_beam(server, rows, tmp_path):
    ended = server.run([MODEL, MODEL, rows, "--beam_args="], tmp_path)
    assert ended.code == 2 and "error: --beam_args needs apache-beam: pip install 'tfopt[beam]'" in ended.stderr
