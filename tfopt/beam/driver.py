"""The process that drives a pipeline of the DirectRunner in multi_processing mode, and how it is watched.

    python -m tfopt.beam.driver FOLDER WORKERS

It runs the pipeline that lies in the folder, and leaves there how that went. It leads a process group that holds all
workers, and so they can be ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PIPELINE, PROVISION, _OUTCOME, _LOG = "pipeline.pb", "provision.pb", "outcome.json", "log.txt"

_GRACE = 30.0  # seconds that a pipeline may go on after the first worker has ended,
_SHORT_GRACE = 5.0  # and where that worker did not end well
_LOST = 3
_CODE = re.compile(r"^Worker subprocess exited with return code (-?\d+)$")  # what Beam raises in a thread


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      error: what a step raised, with its traceback, or None.
      lost: why it must run again, or None.
    """

    error: str | None = None
    lost: str | None = None


def run(folder: Path, workers: int) -> Outcome:
    """Runs the pipeline of a folder in a process of its own; when this returns, neither it nor a worker is left."""
    (folder / _OUTCOME).unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environ = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, *_paths(), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "tfopt.beam.driver", str(folder), str(workers), str(os.getpid())]
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    try:
        return Outcome(**json.loads((folder / _OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Outcome(lost=f"the process that drives the pipeline died ({describe(code)})")


def describe(code: int) -> str:
    """An exit code in words; a shell gives 128 more than the number of the signal."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"exit code {code}"


def _paths() -> list[str]:
    """Where the functions of a pipeline may come from: what Python was given here, such as a script's folder."""
    return [path for path in sys.path if path and Path(path).is_dir() and "site-packages" not in path]


def _main(folder: Path, workers: int, parent: int) -> None:
    _die_with(parent)
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2, beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner

    proto = beam_runner_api_pb2.Pipeline.FromString((folder / PIPELINE).read_bytes())
    info = beam_provision_api_pb2.ProvisionInfo.FromString((folder / PROVISION).read_bytes())
    runner = fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
    runner._num_workers = workers or os.cpu_count() or 1  # Beam sets it from the options of a pipeline object only
    deaths: list[str] = []
    threading.excepthook = lambda caught: deaths.extend(_CODE.findall(str(caught.exc_value)))
    threading.Thread(target=_watch, args=(folder, deaths), daemon=True).start()
    try:
        runner.run_via_runner_api(proto, PipelineOptions())
        outcome = Outcome()
    except Exception as error:  # whatever a step raises
        text = str(error) or type(error).__name__
        if "Traceback" not in text:
            _wait_for(deaths)
        lost = "Traceback" not in text and ("Channel closed" in text or "UNAVAILABLE" in text or bool(deaths))
        outcome = Outcome(lost=_death(deaths)) if lost else Outcome(error=text)
    _leave(folder, outcome)


def _watch(folder: Path, deaths: list[str]) -> None:
    """Ends this process where a worker is gone and Beam does not notice, as before the worker had connected."""
    seen: set[threading.Thread] = set()
    while True:
        time.sleep(0.2)
        now = {thread for thread in threading.enumerate() if thread.name == "run_worker"}
        seen |= now
        if seen - now or deaths:
            time.sleep(_SHORT_GRACE if deaths else _GRACE)
            _leave(folder, Outcome(lost=_death(deaths)))


def _wait_for(deaths: list[str]) -> None:
    """Gives the threads that wait for workers the time to say how one died."""
    deadline = time.monotonic() + _SHORT_GRACE
    while not deaths and time.monotonic() < deadline:
        time.sleep(0.1)


def _death(deaths: list[str]) -> str:
    return f"a worker process died ({describe(int(deaths[0])) if deaths else 'it left no exit code'})"


def _leave(folder: Path, outcome: Outcome) -> None:
    partial = folder / f"{_OUTCOME}.{threading.get_ident()}"
    partial.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    partial.replace(folder / _OUTCOME)
    os._exit(_LOST if outcome.lost else 0)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
