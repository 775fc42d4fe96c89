"""Runs a script in a child process, so that a crash of native code ends in one clear line too.

TensorFlow aborts the process on some damaged inputs. The parent imports nothing heavy, passes the child's output on,
keeps TensorFlow's own log lines from the user's terminal, and turns a death by signal into a message and exit code 2.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from tfopt.errors import TfoptError, printable

_CHILD = "TFOPT_CHILD"
_OWN = (Path(__file__).parent, Path(__file__).parent.parent / "pipelines")
_NATIVE_LOG = re.compile(
    rb"^(WARNING: All log messages before absl|INFO: (Created|Initialized) TensorFlow Lite|[IWE]\d{4} \d\d:\d\d|"
    rb"[IWEF]0000 00:00:|\d{4}(-\d\d){2} [\d:]{8}\.\d+: )"
)


def run(main: Callable[[Sequence[str]], int | None], clean_up: Callable[[], None] | None = None) -> None:
    """Runs an absl main function in a child process and exits as it does.

    Args:
      main: takes the positional arguments and returns the exit code; a TfoptError becomes one line and exit code 2.
      clean_up: called with the flags parsed after the child was killed or crashed, to remove what it left behind.
    """
    if _CHILD in os.environ or any(a.startswith(("--help", "-help", "--version_info")) for a in sys.argv[1:]):
        app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)
        return
    environ = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, _CHILD: str(os.getpid())}
    verbose = any(re.fullmatch(r"--?(verbosity|v)=?[1-9]", argument) for argument in sys.argv[1:])
    command = [sys.executable, *_how_started(), *sys.argv[1:]]
    child = subprocess.Popen(command, env=environ, stderr=None if verbose else subprocess.PIPE)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    last = b""
    try:
        if child.stderr is not None:
            last = _pass_on(child.stderr)
        code = child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)
        code = child.wait()
    if code < 0:
        name = signal.Signals(-code).name
        why = re.sub(r"^[A-Z]\d{4} \S+\s+\d+ ", "", last.decode(errors="replace")).strip()
        asked = code == -signal.SIGTERM
        what = "terminated" if asked else f"TensorFlow ended the process ({name}){': ' + why[:300] if why else ''}"
        print(f"error: {what}", file=sys.stderr)
        code = 128 + signal.SIGTERM if asked else 2
        if clean_up is not None:
            _parse_flags(sys.argv)
            clean_up()
    sys.exit(code)


def _how_started() -> list[str]:
    """The arguments that start this script again: as a module, or by its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return ["-m", spec.name]
    return [sys.argv[0]]


def _pass_on(stream: Any) -> bytes:
    """Copies a stream to standard error but for TensorFlow's native log; returns the last line of that log."""
    last, line = b"", b""
    crashed = False
    native = False  # whether the last line was of that log; what belongs to one follows it indented by a tab
    while byte := stream.read1(4096):
        line += byte
        *done, line = re.split(rb"(?<=[\r\n])", line)
        for text in done:
            native = bool(_NATIVE_LOG.match(text)) or (native and text.startswith(b"\t"))
            crashed = crashed or text.startswith(b"Fatal Python error: ")  # where it was goes on from here
            if not native and not crashed:
                sys.stderr.buffer.write(text)
            elif native and text[:1] == b"F":
                last = text
        sys.stderr.flush()
    if line and not crashed and not _NATIVE_LOG.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    return last


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
        sys.exit(2)


class _Warnings(logging.Handler):
    """Shows warnings of tfopt's own code; those of TensorFlow and of the packages around it stay in the log."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and any(Path(record.pathname).is_relative_to(own) for own in _OWN):
            print(f"warning: {printable(record.getMessage())}", file=sys.stderr, flush=True)


def _guarded(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> None:
    _die_with_parent()
    logging.getLogger("absl").addHandler(_Warnings())
    try:
        code = main(argv)
    except TfoptError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # tearing TensorFlow down takes longer than it is worth


def _die_with_parent() -> None:
    if sys.platform == "linux" and _CHILD in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_CHILD]):
            os._exit(1)
        del os.environ[_CHILD]  # for processes that this one starts
