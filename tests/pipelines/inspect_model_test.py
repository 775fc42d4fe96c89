from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.forked import Server

MODEL = str(REPO / "saved_models" / "digits")


@pytest.fixture(scope="module")
def server():
    with Server("pipelines.inspect_model", "tfopt.inspection", "tfopt.inspection_text") as started:
        yield started


def test_text_and_json(server, tmp_path):
    text = server.run([MODEL, "--signatures=serving_default", "--top=3"], tmp_path)
    assert text.code == 0 and "\nerror: " not in text.stderr
    assert "serving_default  (predict)" in text.stdout and "\n  serve  " not in text.stdout
    assert "and 16 more" in text.stdout
    found = json.loads(server.run([MODEL, "--format=json"], tmp_path).stdout)
    assert [signature["name"] for signature in found["signatures"]] == ["serve", "serving_default"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give one model"),
        ([MODEL, MODEL], "received 2"),
        (["/no/such/model"], "there is no model at /no/such/model"),
        ([MODEL, "--signatures=nope"], "no signature 'nope'; it has 'serve', 'serving_default'"),
    ],
)
def test_bad_usage_ends_in_one_line(server, tmp_path, flags, message):
    ended = server.run(flags, tmp_path)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and message in line and not ended.stdout


def test_help_needs_no_tensorflow():
    program = "import sys, runpy; sys.argv = ['inspect', '--help']\n"
    program += "try: runpy.run_module('pipelines.inspect_model', run_name='__main__')\n"
    program += "except SystemExit: print('tensorflow' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip().endswith("False"), ended.stdout + ended.stderr
