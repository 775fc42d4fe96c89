from __future__ import annotations

import json

import pytest

from tests.conftest import REPO
from tests.forked import Server

MODEL = str(REPO / "saved_models" / "digits")
SAME = [MODEL, MODEL, "--nomeasure_latency"]


@pytest.fixture(scope="module")
def server():
    with Server(
        "pipelines.compare", "tfopt.comparison", "tfopt.comparison_text", "tfopt.runtime_saved_model"
    ) as started:
        yield started


def test_text_and_json(server, tmp_path):
    text = server.run(SAME, tmp_path)
    assert text.code == 0 and "top-1 agreement 100.00%" in text.stdout
    found = json.loads(server.run([*SAME, "--format=json"], tmp_path).stdout)
    assert found["max_error"] == 0 and found["a"]["bytes"] == found["b"]["bytes"]


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ([*SAME, "--max_error=0", "--min_agreement=1"], 0, ""),
        ([*SAME, "--min_agreement=1.1"], 1, "failed: top-1 agreement is 1.0000, less than --min_agreement=1.1"),
        ([MODEL], 2, "error: give two artifacts"),
        ([MODEL, "/no/such.tflite"], 2, "error: there is no model at /no/such.tflite"),
        ([*SAME, "--metric=nope"], 2, "error: --metric: unknown 'nope'"),
        ([*SAME, "--beam_args="], 2, "error: --beam_args needs --data or --eval_data"),
        ([*SAME, "--max_error=-1"], 2, "error: flag --max_error"),
    ],
)
def test_exit_codes(server, tmp_path, flags, code, message):
    ended = server.run(flags, tmp_path)
    lines = [line for line in ended.stderr.splitlines() if line.startswith(("error: ", "failed: "))]
    assert ended.code == code and len(lines) == (code > 0)
    assert all(message in line for line in lines)
