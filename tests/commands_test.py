"""The console commands: each is there, says what it does, and loads nothing heavy for that."""

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


@pytest.fixture(scope="module")
def without_heavy_packages(tmp_path_factory) -> dict[str, str]:
    """An environment in which each import of a heavy package ends the process."""
    folder = tmp_path_factory.mktemp("heavy")
    for name in ("tensorflow", "keras", "grpc", "apache_beam", "tfx"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPO)])}


@pytest.mark.parametrize("module", MODULES)
def test_help_loads_nothing_heavy(module, without_heavy_packages, tmp_path):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(
        command, env=without_heavy_packages, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    # absl ends --help with exit code 1, argparse with 0.
    assert done.returncode in (0, 1), done.stderr
    assert "was imported" not in done.stderr
    assert "--" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_the_package_loads_nothing_heavy(without_heavy_packages, tmp_path):
    subprocess.run(
        [sys.executable, "-c", "import tfopt"], env=without_heavy_packages, check=True, cwd=tmp_path, timeout=120
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_each_command(command):
    assert command in (REPO / "README.md").read_text()
