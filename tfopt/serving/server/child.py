"""A server in a child process, for tests, load tests and benchmarks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tfopt.errors import TfoptError

_GRPC_AT, _REST_AT, _READY = "Running gRPC ModelServer at ", "Exporting HTTP/REST API at:", "Serving\n"
_STOP_S = 60


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
      grpc: "127.0.0.1:PORT".
      rest: "127.0.0.1:PORT"; "" where it has no REST.
      pid: of the process that answers.
      log: file that holds what it wrote to standard error.
    """

    grpc: str
    rest: str
    pid: int
    log: Path

    def cpu_seconds(self) -> float:
        """CPU time of the process so far, user and system; field 14 and 15 of /proc/PID/stat (Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM (Linux)."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running(flags: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 120) -> Iterator[Server]:
    """Starts tfopt-serve on free ports, and stops it at the end of the block.

    Args:
      flags: as on the command line; `--port=0 --rest_api_port=0` stand before them.
      env: variables to set beside this process's own.
      timeout_s: how long loading may take.

    Yields:
      The server, once all its models are available.

    Raises:
      TfoptError: it ended or did not come up in time; the message has its last line.
    """
    from tfopt.serving.server.run import PARENT

    root = str(Path(__file__).resolve().parents[3])
    environ = {**os.environ, **(env or {}), PARENT: str(os.getpid())}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pipelines.serve", "--port=0", "--rest_api_port=0", *flags]
    with tempfile.NamedTemporaryFile(prefix="tfopt-serve-", suffix=".log") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
        try:
            text = _wait(process, Path(log.name), time.monotonic() + timeout_s)
            yield Server(_after(text, _GRPC_AT), _after(text, _REST_AT), process.pid, Path(log.name))
        finally:
            _stop(process)


def _wait(process: subprocess.Popen, log: Path, end: float) -> str:
    while True:
        text = log.read_text(errors="replace")
        if _READY in text:
            return text
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
        if process.poll() is not None:
            raise TfoptError(f"the server ended with exit code {process.returncode}: {last}")
        if time.monotonic() > end:
            raise TfoptError(f"the server did not come up in time; last it said: {last}")
        time.sleep(0.05)


def _after(text: str, phrase: str) -> str:
    return next((line.partition(phrase)[2].split()[0] for line in text.splitlines() if phrase in line), "")


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)  # where a test has paused it
        process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
