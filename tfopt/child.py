"""A child process that answers requests, so that its crash is an answer too.

Converting and measuring run native code that can abort, hang or run out of memory. The parent asks, one request at a
time; a child that dies or hangs raises ChildError in one line; no child outlives its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tfopt.errors import TfoptError

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class ChildError(Exception):
    """The child refused, died or hung: one line that says which."""


class Child:
    """A Python process that serves one worker; a context manager.

    Args:
        worker: "package.module:factory"; the factory is called once, in the child, and returns a function from request
            to reply. Both are pickled. An exception in it raises ChildError in the parent, and the child lives on.
        environ: variables to set beside the parent's.
    """

    def __init__(self, worker: str, environ: Mapping[str, str] | None = None):
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        root = str(Path(__file__).resolve().parent.parent)
        settings = {
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            **(environ or {}),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tfopt.child", str(theirs.fileno()), str(os.getpid()), worker],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=settings,
        )
        theirs.close()

    def ask(self, request: Any, timeout: float) -> Any:
        """Returns the worker's reply to `request`.

        Args:
            request: whatever can be pickled.
            timeout: seconds; a child that does not answer in time is killed.

        Raises:
            ChildError: the worker raised, or the child died or was killed.
        """
        try:
            self._connection.send(request)
            if not self._connection.poll(timeout):
                self.kill()
                raise ChildError(f"gave no answer in {timeout:g} s, and was stopped")
            good, reply = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildError(self._death()) from error
        if not good:
            raise ChildError(reply)
        return reply

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the child at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the child."""
        self._connection.close()  # it ends when it reads the end of the pipe
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipe and hung; it was stopped"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        # TensorFlow's own log lines begin with a level and a date; what killed the process comes last.
        said = next((line for line in reversed(lines) if line and line[:3] not in ("I00", "W00", "WAR", "INF")), "")
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        if code == -signal.SIGKILL:
            return f"died of {how} (out of memory?)"
        return f"died of {how}" if code == -signal.SIGSEGV or not said else f"died of {how}: {said[:200]}"


def _main(fd: int, parent: int, worker: str) -> None:
    if sys.platform == "linux":
        # Without this, a parent killed during a long request would leave the child running until its end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    connection = Connection(fd)
    module, _, factory = worker.partition(":")
    answer = getattr(importlib.import_module(module), factory)()
    # A parent that is gone, or done, is no error: the pipe ends.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.recv()
            try:
                reply = True, answer(request)
            except TfoptError as error:
                reply = False, str(error)
            except Exception as error:
                reply = False, " ".join(f"{type(error).__name__}: {error}".split())[:2000]
            connection.send(reply)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.stdout.flush()
    os._exit(0)  # tearing TensorFlow down takes longer than it is worth
