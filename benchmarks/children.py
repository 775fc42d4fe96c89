"""Running one measurement in a child process: a crash, a hang or a leak there costs one cell of a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.models import REPOSITORY


def run(module: str, arguments: list[str], timeout: float = 1800) -> dict:
    """Runs `python -m module arguments --json=FILE`; returns what it wrote there.

    Returns:
        The child's JSON, or {"error": one line} where it left none.
    """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        command = [sys.executable, "-m", module, *arguments, f"--json={output}"]
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, timeout=timeout, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer in {timeout:.0f} s"}
        if output.is_file():
            return json.loads(output.read_text())
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f"signal {-done.returncode}" if done.returncode < 0 else lines[-1] if lines else "no message"
        return {"error": f"crashed: {reason}"[:300]}


def one_line(error: BaseException) -> str:
    """Returns an exception as "Type: first line", short enough for a table's footnote."""
    headings = ("Graph execution error:", "Detected at node", "Defined at")
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line and not line.startswith(headings)), "")
    return f"{type(error).__name__}: {text}"[:240]
