from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO

SCRIPT = """
import os, signal, sys
from pathlib import Path
from absl import flags
from tfopt import isolate
from tfopt.errors import TfoptError
from tfopt.publish import Workspace, remove_stale

flags.DEFINE_string("output_dir", None, "Where.")
flags.DEFINE_string("do", "", "What.")

def main(argv):
    with Workspace(Path(flags.FLAGS.output_dir), ["result"], overwrite=False) as workspace:
        workspace.write("result", "done")
        print("I0000 00:00:1.2 33 native.cc:1] first line\\n\\tsecond line", file=sys.stderr)
        print("for the user", file=sys.stderr, flush=True)
        exec(flags.FLAGS.do)
        workspace.publish()

isolate.run(main, lambda: remove_stale(Path(flags.FLAGS.output_dir)))
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "main.py"
    script.write_text(SCRIPT)

    def start(do: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), f"--output_dir={tmp_path / 'new' / 'out'}", f"--do={do}", *arguments]
        return subprocess.run(command, env={"PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=60)

    return start


def test_output_and_exit_code_are_those_of_the_script(run, tmp_path):
    done = run("print('result')")
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert done.stderr == "for the user\n", "TensorFlow's own log is kept away"
    assert (tmp_path / "new" / "out" / "result").read_text() == "done"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_warnings_of_tfopt_are_shown_and_those_of_others_are_not(run):
    code = "from absl import logging; logging.warning('%s of others', 1);"
    code += "import tfopt.isolate; exec(compile('logging.warning(\"ours\")', tfopt.isolate.__file__, 'exec'))"
    assert run(code).stderr == "for the user\nwarning: ours\n"


def test_verbosity_shows_everything(run):
    assert "second line" in run("", "--verbosity=1").stderr


@pytest.mark.parametrize(
    "do, message",
    [
        ("raise TfoptError('file x:\\n is wrong')", "error: file x: is wrong"),
        ("os.abort()", "error: TensorFlow ended the process (SIGABRT)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "error: TensorFlow ended the process (SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: TensorFlow ended the process (SIGKILL)"),
        (
            "print('F0000 00:00:1.2 33 shape.cc:9] Check failed: 1 == 2', file=sys.stderr, flush=True); os.abort()",
            "Check failed: 1 == 2",
        ),
    ],
)
def test_failures_and_crashes_are_one_line_and_leave_nothing(run, tmp_path, do, message):
    done = run(do)
    first, line = done.stderr.splitlines()
    assert done.returncode == 2 and first == "for the user" and message in line
    assert {path.name for path in tmp_path.iterdir()} == {"script"}, "not even the parent of the output is made"


def test_unknown_flags(run):
    done = run("", "--nope")
    assert done.returncode == 2
    assert done.stderr == "error: Unknown command line flag 'nope'; see --help\n"
