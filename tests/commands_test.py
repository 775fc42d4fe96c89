"""The console commands: each is there, says what it does, and does so without loading TensorFlow."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPO

COMMANDS = dict(re.findall(r'"(tfopt-[\w-]+) = ([\w.]+:\w+)"', (REPO / "setup.py").read_text()))
MODULES = sorted({entry.split(":")[0] for entry in COMMANDS.values()})


def test_readme_tells_of_all_of_them():
    text = (REPO / "README.md").read_text()
    assert not [command for command in COMMANDS if f"**{command}**" not in text]


@pytest.mark.parametrize("command", COMMANDS)
def test_entry_points_exist(command):
    module, _, function = COMMANDS[command].partition(":")
    # A process each: absl's flags are global, and two scripts may define the same one.
    code = f"import {module}; assert callable({module}.{function})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)


@pytest.mark.parametrize("module", MODULES)
def test_help_loads_no_tensorflow(module, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    # absl ends --help with exit code 1, argparse with 0.
    assert done.returncode in (0, 1), done.stderr
    assert "TensorFlow was imported" not in done.stderr
    assert "--" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_each_command(command):
    assert command in (REPO / "README.md").read_text()
