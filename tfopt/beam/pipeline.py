"""Runs a Beam pipeline to its end, and gives back its one small result, whatever the runner.

The DirectRunner of Beam may pass a pipeline on to a runner that it downloads; here it is always Beam's local runner
for Python (FnApiRunner). With --direct_running_mode=multi_processing that runner fails when a worker process dies,
and waits for ever where one dies before it has connected: so the pipeline runs in a process of its own
(`driver.py`), which is watched and, where a worker was lost, started again from the beginning. The result, one
element, is written by rename, so a lost run leaves nothing that counts: no row is lost, and none counts twice.

Other runners replay what a lost worker did, by themselves.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import re
import shlex
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import PipelineRunner, create_runner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from tfopt.beam import driver
from tfopt.errors import TfoptError

RUNS = 3  # how often a pipeline is started where workers die

_LOCAL = ("direct", "directrunner", "switchingdirectrunner", "fnapirunner")


def options(beam_args: str) -> PipelineOptions:
    """Parses Beam's command line options, such as "--runner=DirectRunner --direct_num_workers=2".

    Raises:
      TfoptError: the local runner does not know an option, or a value is wrong. The options of other runners, which
        Beam's Python side need not know, are passed on.
    """
    try:
        arguments = shlex.split(beam_args)
    except ValueError as error:
        raise TfoptError(f"--beam_args={beam_args!r}: {error}") from error
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _quiet():
            parsed = PipelineOptions(arguments)
            known = parsed.get_all_options()
            everything = parsed.get_all_options(retain_unknown_options=True)
    except SystemExit as error:
        problem = (said.getvalue().strip().splitlines() or [""])[-1]
        raise TfoptError(f"--beam_args: {re.sub('^[^:]*: error: ', '', problem)}") from error
    strange = [f"--{name}" for name in everything if name not in known]
    strange += [a for a, before in zip(arguments, ["", *arguments], strict=False) if "-" not in (a[:1], before[:1])]
    if strange and _is_local(parsed):
        raise TfoptError(f"--beam_args: Beam's DirectRunner knows no {', '.join(strange)}")
    threads = _is_local(parsed) and parsed.view_as(DirectOptions).direct_running_mode == "multi_threading"
    if threads or parsed.view_as(DebugOptions).lookup_experiment("data_buffer_time_limit_ms"):
        # Beam 2.77 clears the buffer of a stream after a timer sent it: what was written in between is gone.
        raise TfoptError(
            "--beam_args: --direct_running_mode=multi_threading and data_buffer_time_limit_ms lose rows, by a race in "
            "Beam: use multi_processing"
        )
    return parsed


def run(build: Callable[[beam.Pipeline], beam.PCollection], beam_args: str, *, runs: int = RUNS) -> Any:
    """Builds a pipeline and runs it to its end.

    Args:
      build: adds transforms to a pipeline, and returns a PCollection of one element, small and picklable. It is called
        once, however often the pipeline runs.
      beam_args: see `options`. Workers on other machines need --temp_location, a folder that all can write.
      runs: how often at most it is started, where worker processes die.

    Returns:
      The one element.

    Raises:
      TfoptError: a step failed, workers died in every run, or the runner cannot be reached: one line that says which.
    """
    parsed = options(beam_args)
    local = _is_local(parsed)
    with tempfile.TemporaryDirectory(prefix="tfopt-beam-") as folder, _quiet():
        runner = fn_runner.FnApiRunner(provision_info=_provision(parsed)) if local else _other_runner(parsed)
        shared = parsed.view_as(GoogleCloudOptions).temp_location
        if shared is None and not (local or _is_loopback(parsed)):
            raise TfoptError(
                "--beam_args: add --temp_location=..., a folder that every worker and this machine can use"
            )
        place = FileSystems.join(shared or folder, f"tfopt-{uuid.uuid4().hex}")
        try:
            pipeline = beam.Pipeline(runner=runner, options=parsed)
            _ = build(pipeline) | "WriteResult" >> beam.Map(_write, place)
            if local and parsed.view_as(DirectOptions).direct_running_mode == "multi_processing":
                _run_watched(pipeline, parsed, Path(folder), place, runs)
            else:
                _run_here(pipeline)
            return _read(place)
        finally:
            _delete(place)


def check_rows(seen: int, end: int) -> None:
    """Raises where a runner did not bring every row once.

    Args:
      seen: how many rows it brought.
      end: number of the last of them, plus 1.

    Raises:
      TfoptError: it says how many rows it brought.
    """
    if seen != end:
        raise TfoptError(
            f"--beam_args: the runner lost or doubled rows: {seen:,} were seen of {end:,}; use another one"
        )


def _run_here(pipeline: beam.Pipeline) -> None:
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:  # a runner may raise anything
        text = str(error)
        raise TfoptError(_reason(text if "Traceback" in text else f"{type(error).__name__}: {text}")) from error


def _run_watched(pipeline: beam.Pipeline, parsed: PipelineOptions, folder: Path, place: str, runs: int) -> None:
    """Runs a pipeline in a process of its own, again where a worker is lost."""
    command = f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
    environment = SubprocessSDKEnvironment.from_command_string(command)
    proto = pipeline.to_runner_api(default_environment=environment)
    (folder / driver.PIPELINE).write_bytes(proto.SerializeToString())
    (folder / driver.PROVISION).write_bytes(_provision(parsed).provision_info.SerializeToString())
    workers = parsed.view_as(DirectOptions).direct_num_workers
    for attempt in range(1, runs + 1):
        outcome = driver.run(folder, workers)
        if outcome.lost is None:
            if outcome.error is not None:
                raise TfoptError(_reason(outcome.error))
            return
        _delete(place)
        if attempt < runs:
            again = f"the pipeline starts again from the beginning (run {attempt + 1} of {runs})"
            print(f"warning: Beam: {outcome.lost}: {again}", file=sys.stderr, flush=True)
    raise TfoptError(
        f"Beam: {outcome.lost}, in each of {runs} runs: if memory ran out, use smaller batches or fewer "
        "--direct_num_workers; if the model crashes, run without --beam_args to see where"
    )


def _provision(parsed: PipelineOptions) -> fn_runner.ExtendedProvisionInfo:
    """What Beam's own DirectRunner tells its workers: the options."""
    encoded = JobServiceHandle.encode_pipeline_options(parsed.get_all_options())
    return fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))


def _other_runner(parsed: PipelineOptions) -> PipelineRunner:
    name = parsed.view_as(StandardOptions).runner
    try:
        return create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise TfoptError(f"--beam_args: --runner={name}: {' '.join(str(error).split())}") from error


def _is_local(parsed: PipelineOptions) -> bool:
    name = parsed.view_as(StandardOptions).runner
    return name is None or name.lower().rpartition(".")[2] in _LOCAL


def _is_loopback(parsed: PipelineOptions) -> bool:
    return parsed.view_as(PortableOptions).environment_type == "LOOPBACK"


def _reason(text: str) -> str:
    """The one line of an exception of a worker: what tfopt said, or else the last line of the traceback."""
    said = re.findall(r"TfoptError: (.*?)(?: \[while running .*)?$", text, re.MULTILINE)
    if said:
        return said[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = max(
        (i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)), default=-1
    )
    line = re.sub(r" \[while running ('.*?')(-\S+)?\]", r" (in step \1)", " ".join(lines[start:]))
    return f"Beam: {line[:500] or 'the pipeline failed'}"


def _write(value: Any, place: str) -> None:
    """Puts the result in its place by rename: a bundle that runs twice does the same twice."""
    partial = f"{place}-{uuid.uuid4().hex}"
    with FileSystems.create(partial) as stream:
        stream.write(pickle.dumps(value))
    if FileSystems.exists(place):
        FileSystems.delete([place])
    FileSystems.rename([partial], [place])


def _read(place: str) -> Any:
    if not FileSystems.exists(place):
        raise TfoptError(f"Beam: the pipeline ended and wrote no result to {place}: workers must reach that folder")
    with FileSystems.open(place) as stream:
        return pickle.loads(stream.read())


def _delete(place: str) -> None:
    with contextlib.suppress(Exception):  # what is in the way of a next run shows there
        if FileSystems.exists(place):
            FileSystems.delete([place])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Beam's log from the terminal: what matters of it comes as one line."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
