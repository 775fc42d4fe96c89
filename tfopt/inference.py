"""Batch inference: an artifact over all rows of a source, to TFRecords.

In one process, or on Beam: the same records in the same files (batch k goes to file k mod n, in order).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tfopt import batches, runtime
from tfopt.data import Dataset
from tfopt.data import batch_size as fixed_batch
from tfopt.environment import need_beam
from tfopt.errors import TfoptError
from tfopt.prediction_records import EXAMPLE, FORMATS, Encoder, check, place, write

ROWS = 32  # of a batch, where the signature does not fix it
_BEAM_SHARDS = 8


@dataclass(frozen=True)
class Job:
    """What to run, and how to write it; picklable.

    Attributes:
      model: the artifact.
      batches: the rows.
      encoder: makes records.
      threads: of the runtime.
    """

    model: str
    batches: batches.Batches
    encoder: Encoder
    threads: int

    def records(self, program: runtime.Program, batch: Dataset) -> list[bytes]:
        """Runs a batch; returns a record for each row."""
        return self.encoder.records(batch, call(program, self.encoder.signature, batch))


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
      model: a SavedModel directory or a .tflite file.
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
        program = stack.enter_context(runtime.open(model, threads=threads))
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


def call(program: runtime.Program, signature: str, batch: Dataset, size: int | None = None) -> runtime.Outputs:
    """Runs a signature on a batch, also one that is smaller than the signature's fixed batch.

    Args:
      program: an opened artifact.
      signature: its name.
      batch: rows as the signature takes them.
      size: fill the batch up to so many rows with copies of its last; None only where the signature has a fixed batch.

    Returns:
      The outputs, without what was filled up. An output that has no row for each row of input is given as it is.
    """
    rows = len(batch)
    wanted = size or fixed_batch(program.signatures[signature].inputs, rows)
    inputs = batch.inputs
    if rows < wanted:
        pick = np.minimum(np.arange(wanted), rows - 1)
        inputs = {name: array if name in batch.whole else array[pick] for name, array in inputs.items()}
    outputs = program.run(signature, inputs)
    if rows < wanted:
        outputs = {name: a[:rows] if a.ndim and len(a) == wanted else a for name, a in outputs.items()}
    return outputs


def check_signature(program: runtime.Program, signature: str | None) -> str:
    """The signature that is meant: serving_default, or the only one, where none is named."""
    have = list(program.signatures)
    if signature is None:
        if "serving_default" in have or len(have) == 1:
            return "serving_default" if "serving_default" in have else have[0]
        raise TfoptError(f"{program.path}: --signature: name one of {', '.join(have)}")
    if signature not in have:
        raise TfoptError(f"{program.path} has no signature '{signature}'; it has: {', '.join(have)}")
    return signature
