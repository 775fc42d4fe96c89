"""Batch inference: an artifact over all rows of a source, to TFRecords.

In one process, or on Beam: the same records in the same files (batch k goes to file k mod n, in order).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tfopt import batches, runtime
from tfopt.data import batch_size as fixed_batch
from tfopt.environment import need_beam
from tfopt.errors import TfoptError
from tfopt.inference_job import Job, check_signature
from tfopt.prediction_records import EXAMPLE, FORMATS, Encoder, check, place, write

ROWS = 32  # of a batch, where the signature does not fix it
_BEAM_SHARDS = 8


@dataclass(frozen=True)
class Inferred:
    """What was written.

    Attributes:
      seconds: of it all, the opening of the artifact included.
    """

    rows: int
    seconds: float
    files: list[str]
    warnings: tuple[str, ...] = ()


def infer(
    model: str | Path,
    data: str,
    output: str,
    *,
    signature: str | None = None,
    outputs: Sequence[str] = (),
    keep: Sequence[str] = (),
    format: str = EXAMPLE,
    beam_args: str | None = None,
    batch_size: int | None = None,
    shards: int | None = None,
    overwrite: bool = False,
    threads: int = 2,
    limit: int | None = None,
) -> Inferred:
    """Runs a signature on every row of a source, and writes a record for each.

    Args:
      model: a SavedModel directory or a .tflite file; remote ones for Beam only.
      data: a source of rows (see `tfopt.data.load`).
      output: a directory, or what the names of the files begin with (see `prediction_records.place`).
      signature: None takes serving_default, or the only one.
      outputs: of the signature; empty for all.
      keep: features of the input tf.Examples to copy.
      format: a name of `prediction_records.FORMATS`.
      beam_args: options of a Beam runner (see `tfopt.beam.pipeline`); None runs in this process.
      batch_size: rows of a call; None takes the signature's fixed batch, or else `ROWS`.
      shards: files to write; None is 1, or 8 on Beam.
      overwrite: replace the files of an earlier run.
      threads: of the runtime, in each process.
      limit: no more than so many rows, the first ones.

    Raises:
      TfoptError: the artifact cannot run, the rows do not fit, or the place cannot be written: nothing is there then.
    """
    started = time.monotonic()
    if format not in FORMATS:
        raise TfoptError(f"--format={format}: choose from {', '.join(FORMATS)}")
    if beam_args is not None:
        need_beam("--beam_args")
    elif "://" in output:
        raise TfoptError(f"--output={output}: this process writes local files; --beam_args='' writes to Beam's others")
    where = place(output, shards or (1 if beam_args is None else _BEAM_SHARDS))
    with contextlib.ExitStack() as stack:
        path = str(model)
        if beam_args is not None and "://" in path:
            from tfopt.beam.model_handler import local_copy

            path = local_copy(path)
        program = stack.enter_context(runtime.open(path, threads=threads))
        name = check_signature(program, signature)
        encoder = Encoder(format, name, tuple(outputs), tuple(keep), Path(model).name)
        specs = program.signatures[name].inputs
        size = batch_size or fixed_batch(specs, ROWS)
        rows = batches.cut(data, specs, size=size, limit=limit, signature=name, keep_records=bool(keep))
        check(encoder, program.signatures[name].outputs, rows.features)
        job = Job(str(model), rows, encoder, threads)
        if beam_args is None:
            count, warnings = write(where, overwrite, lambda paths: _run(job, program, paths))
        else:
            from tfopt.beam import infer as on_beam  # which needs Beam

            stack.close()
            count, warnings = on_beam.run(job, where, overwrite, beam_args)
    return Inferred(count, time.monotonic() - started, where.names, warnings)


def _run(job: Job, program: runtime.Program, paths: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Writes the files in this process; returns the number of rows, and warnings."""
    import tensorflow as tf

    warnings: set[str] = set()
    total = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(tf.io.TFRecordWriter(path, "GZIP")) for path in paths]
        bar = stack.enter_context(tqdm(desc="infer", unit="row", leave=False, disable=None))
        for number, batch in enumerate(job.batches):
            for record in job.records(program, batch):
                writers[number % len(writers)].write(record)
            warnings.update(batch.warnings)
            total += len(batch)
            bar.update(len(batch))
    return total, tuple(sorted(warnings))
