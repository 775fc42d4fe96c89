"""tfopt-lint-serving: its flags, its errors, its exit codes."""

from __future__ import annotations

import json

import pytest

from tests.conftest import REPO
from tests.forked import Server

MODEL = str(REPO / "saved_models" / "digits")


@pytest.fixture(scope="module")
def server():
    with Server("pipelines.lint_serving", "tfopt.serving.lint.run") as started:
        yield started


def test_findings_and_exit_codes(server, tmp_path):
    ended = server.run([f"--model={MODEL}", "--norun", f"--output_json={tmp_path / 'found.json'}"], tmp_path)
    assert ended.code == 0 and "0 errors" in ended.stdout, ended.stderr
    assert [f["rule"] for f in json.loads((tmp_path / "found.json").read_text())["findings"]]
    bad = tmp_path / "b.pbtxt"
    bad.write_text("max_batch_size { value: 0 }")
    flags = ["--norun", "--enable_batching", f"--batching_parameters_file={bad}"]
    ended = server.run([f"--model={MODEL}", *flags], tmp_path)
    assert ended.code == 1 and "max_batch_size is 0" in ended.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=/no/such"], "--model=/no/such: no such directory"),
        ([f"--model={MODEL}", "more"], "unexpected argument 'more'"),
        ([f"--model={MODEL}", "--output_json=/no/such/x.json"], "--output_json=/no/such/x.json"),
    ],
)
def test_bad_usage_ends_in_one_line(server, tmp_path, flags, message):
    ended = server.run(flags, tmp_path)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and message in line and not ended.stdout
