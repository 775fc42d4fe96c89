"""tfopt-deployment: its flags, its errors, its exit codes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.forked import Server


@pytest.fixture(scope="module")
def server():
    with Server("pipelines.deployment", "tfopt.serving.deployment") as started:
        yield started


@pytest.fixture
def base(tmp_path):
    root = tmp_path / "digits"
    shutil.copytree(REPO / "saved_models" / "digits", root / "3")
    return root


def test_files_and_the_line(server, base, tmp_path):
    flags = [f"--model_base_path={base}", "--model_name=digits", "--memory_bytes=500000000", "--nosession_config"]
    ended = server.run([*flags, "--warmup_batch_sizes=1,4"], tmp_path)
    assert ended.code == 0, ended.stderr
    assert f"wrote {base}/kubernetes.yaml" in ended.stdout and "4 warmup requests" in ended.stdout
    line = ended.stdout.splitlines()[-1]
    assert line.startswith("tensorflow_model_server --port=8500") and f"--model_base_path={base}" in line
    again = server.run(flags, tmp_path)
    assert again.code == 2 and "pass --overwrite" in again.stderr
    assert server.run([*flags, "--overwrite", "--nowarmup"], tmp_path).code == 0
    assert (base / "3" / "assets.extra" / "tf_serving_warmup_requests").exists()  # not asked for, not touched


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_base_path={base}/nothing", "--model_name=m"], "digits/nothing: no such directory"),
        (["--model_base_path={base}/3", "--model_name=m"], "give the directory above"),
        (["--model_base_path={base}", "--model_name=m", "--version=4"], "holds no version 4"),
        (["--model_base_path={base}", "--model_name=m", "--warmup_batch_sizes=1,no"], "--warmup_batch_sizes=1,no"),
        (["--model_base_path={base}", "--model_name=m", "--batching_parameters_file=x"], "x: cannot be read"),
        (["--model_base_path={base}", "--model_name=m", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_usage_ends_in_one_line(server, base, tmp_path, flags, message):
    ended = server.run([flag.replace("{base}", str(base)) for flag in flags], tmp_path)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.code == 2 and message in line and not ended.stdout
    assert sorted(p.name for p in base.iterdir()) == ["3"]


def test_help_needs_no_tensorflow():
    program = "import sys, runpy; sys.argv = ['deployment', '--help']\n"
    program += "try: runpy.run_module('pipelines.deployment', run_name='__main__')\n"
    program += "except SystemExit: print('tensorflow' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip().endswith("False"), ended.stdout + ended.stderr
