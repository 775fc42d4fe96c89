"""Runs a pipeline on this machine, and says in one line which component failed and why."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from tfx.orchestration.local.local_dag_runner import LocalDagRunner

from tfopt.beam import pipeline as beam
from tfopt.errors import TfoptError, one_line
from tfopt.tfx import last_run, lineage


def run(pipeline: Any, metadata: str | Path, quiet: bool = True) -> lineage.Lineage:
    """Runs a pipeline by TFX's LocalDagRunner.

    Args:
      pipeline: a tfx.orchestration.pipeline.Pipeline, whose metadata are in `metadata`.
      metadata: SQLite file of ML Metadata; made where it is missing.
      quiet: no logs below errors, and nothing on standard output: what components print goes to standard error.

    Returns:
      The record of the run.

    Raises:
      TfoptError: `metadata` is another kind of file, or a component failed.
    """
    if Path(metadata).exists():
        lineage.open_store(metadata)  # or TFX would make its tables in whatever database it is
    Path(metadata).absolute().parent.mkdir(parents=True, exist_ok=True)
    name = pipeline.pipeline_info.pipeline_name
    try:
        with _quiet() if quiet else contextlib.nullcontext():
            LocalDagRunner().run(pipeline)
    except Exception as error:  # of any component
        logging.debug("a component failed", exc_info=True)
        done = last_run.last_run(metadata, name).executions.values()
        failed = [f"{each.component} failed: " for each in done if each.state == "FAILED"]
        raise TfoptError("".join(failed[-1:]) + _reason(error)) from error
    return last_run.last_run(metadata, name)


def beam_arguments(beam_args: str) -> list[str]:
    """The arguments of Beam for a pipeline, with what TFX needs beside those of the user.

    Raises:
      TfoptError: Beam's local runner does not know one of them.
    """
    beam.options(beam_args)
    arguments = shlex.split(beam_args)
    if not any(each.startswith("--runner") for each in arguments):
        arguments.insert(0, "--runner=FnApiRunner")  # Beam's own choice would be one that it downloads
    return [*arguments, "--beam_plugins=tfx"]  # tensorflow_data_validation cannot be imported before tfx


def _reason(error: Exception) -> str:
    """The line of a component's exception that says what went wrong; those of Beam carry a worker's stack trace."""
    lines = [line for line in str(error).splitlines() if line and not line[0].isspace()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1]
    return one_line(error).rpartition(" and error message ")[2]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends standard output to standard error, that of other processes and of native code too."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # what ends a run is raised
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        logging.set_verbosity(verbosity)
