"""Runs a command of tfopt many times, each in a forked child of one process that has TensorFlow imported already.

A process of its own for each case would spend seconds on the import. The children are what `tfopt.isolate` starts: a
crash of native code ends the child alone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal (TIMEOUT: it was killed), and what it printed."""

    code: int
    stdout: str
    stderr: str


TIMEOUT = -1000


class Server:
    """A process that runs `main` of a script with other flags as often as it is asked; a context manager.

    Args:
        script: module of the script, for instance "pipelines.optimize".
        preload: modules to import before the first fork.
        environ: variables to set beside the parent's.
    """

    def __init__(self, script: str, *preload: str, environ: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", script, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPO,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **(environ or {})},
        )

    @property
    def pid(self) -> int:
        """Of the process that forks."""
        return self._process.pid

    def run_all(
        self, cases: list[list[str]], folder: Path, *, timeout: float | list[float] = 60, jobs: int = 2
    ) -> list[Ended]:
        """Runs the script once for every list of flags, `jobs` at a time.

        Args:
            cases: flags of each run.
            folder: where their output is kept meanwhile.
            timeout: seconds after which a run is killed; one number, or one for each.
            jobs: how many run at once.
        """
        seconds = timeout if isinstance(timeout, list) else [timeout] * len(cases)
        request = {"cases": cases, "folder": str(folder), "timeout": seconds, "jobs": jobs}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            Ended(
                code,
                (folder / f"{i}.out").read_text(errors="replace"),
                (folder / f"{i}.err").read_text(errors="replace"),
            )
            for i, code in enumerate(codes)
        ]

    def run(self, flags: list[str], folder: Path, timeout: float = 120) -> Ended:
        """Runs the script once."""
        (ended,) = self.run_all([flags], folder, timeout=timeout)
        return ended

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve(script: str) -> None:
    """Answers requests until the pipe ends; standard output carries nothing else."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        codes = [TIMEOUT] * len(request["cases"])
        running: dict[int, tuple[int, float]] = {}
        waiting = list(enumerate(request["cases"]))[::-1]
        while waiting or running:
            while waiting and len(running) < request["jobs"]:
                index, flags = waiting.pop()
                running[_fork(script, flags, folder / str(index))] = index, time.monotonic() + request["timeout"][index]
            for pid, (index, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[index] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                else:
                    continue
                del running[pid]
            time.sleep(0.01)
        replies.write(json.dumps(codes) + "\n")
        replies.flush()


def _fork(script: str, flags: list[str], name: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{name}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ["TFOPT_CHILD"] = str(parent)
    sys.argv = [script, *flags]
    code = 99
    try:
        importlib.import_module(script).run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    _serve(sys.argv[1])
