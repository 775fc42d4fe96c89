"""Batch inference on Beam (see `tfopt.inference`).

    batches | RunInference | one record a row | by file | a worker writes each file

A file's records are sorted by where their batch stands in the source, so the files do not depend on the runner; a
worker holds one file's records at a time, so take more --shards for more rows. Files lie hidden until all are whole.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.ml.inference.base import PredictionResult, RunInference

from tfopt import prediction_records
from tfopt.beam import pipeline
from tfopt.beam.model_handler import ProgramHandler
from tfopt.beam.rows import ReadRows
from tfopt.errors import TfoptError
from tfopt.inference_job import Job
from tfopt.prediction_records import Encoder, Place

_WARNINGS = 20  # that are kept

Encoded = tuple[int, list[bytes], tuple[str, ...]]  # place of the first row, records, warnings
Written = tuple[int, int, tuple[str, ...]]  # rows, place after the last one, warnings


class Infer(beam.PTransform):
    """PBegin -> PCollection of one `Written`; writes the files on the way."""

    def __init__(self, job: Job, paths: Sequence[str]):
        """Takes what can be pickled.

        Args:
          job: what to run.
          paths: the files to write, where every worker can; batch k goes to file k mod n.
        """
        super().__init__()
        self._job = job
        self._paths = list(paths)

    def expand(self, start: beam.pvalue.PBegin) -> beam.PCollection:
        """Reads, runs, encodes, groups by file, writes."""
        job, files = self._job, len(self._paths)
        handler = ProgramHandler(job.model, job.encoder.signature, job.threads)
        records = (
            start
            | "ReadRows" >> ReadRows.of(job.batches)
            | "RunInference" >> RunInference(handler)
            | "Encode" >> beam.Map(_encode, job.encoder, job.batches.size, files)
        )
        every_file = start | "Files" >> beam.Create([(file, None) for file in range(files)])
        return (
            (records, every_file)
            | beam.Flatten()
            | "ByFile" >> beam.GroupByKey()
            | "WriteFile" >> beam.Map(_write, self._paths)
            | "Count" >> beam.CombineGlobally(_total)
        )


def run(job: Job, where: Place, overwrite: bool, beam_args: str) -> tuple[int, tuple[str, ...]]:
    """Runs `Infer` to its end, and puts all files in their place, or none.

    Returns:
      The number of rows, and warnings.

    Raises:
      TfoptError: see `pipeline.run`; or the runner has lost or doubled rows.
    """

    def fill(paths: Sequence[str]) -> tuple[int, tuple[str, ...]]:
        rows, end, warnings = pipeline.run(lambda start: start | "Infer" >> Infer(job, paths), beam_args)
        if rows != end:
            raise TfoptError(f"Beam: the runner gave back {rows} rows of {end}: it lost or doubled some; use another")
        return rows, warnings

    if "://" not in where.prefix:
        return prediction_records.write(where, overwrite, fill)
    pipeline.options(beam_args)  # registers the file systems' own options
    return _write_remote(where, overwrite, fill)


def _write_remote(where: Place, overwrite: bool, fill: Callable[[Sequence[str]], Any]) -> Any:
    """What `prediction_records.write` does, on a remote file system."""
    found = FileSystems.match([f"{where.prefix}-*-of-*.tfrecord.gz"])
    earlier = [meta.path for matched in found for meta in matched.metadata_list]
    if earlier and not overwrite:
        raise TfoptError(f"--output: {min(earlier)} is there already; pass --overwrite to replace it")
    hidden = f"{where.prefix}.tfopt-{uuid.uuid4().hex}"
    FileSystems.mkdirs(hidden)
    try:
        paths = [FileSystems.join(hidden, name.rpartition("/")[2]) for name in where.names]
        result = fill(paths)
        if earlier:
            FileSystems.delete(earlier)
        FileSystems.rename(paths, where.names)
        return result
    finally:
        with contextlib.suppress(Exception):
            FileSystems.delete([hidden])


def _encode(result: PredictionResult, encoder: Encoder, size: int, files: int) -> tuple[int, Encoded]:
    batch = result.example
    records = encoder.records(batch, result.inference)
    return batch.start // size % files, (batch.start, records, batch.warnings)


def _write(grouped: tuple[int, Iterable[Encoded | None]], paths: list[str]) -> Written:
    file, batches = grouped
    ordered = sorted((batch for batch in batches if batch is not None), key=lambda batch: batch[0])
    _write_anywhere(paths[file], (record for _, records, _ in ordered for record in records))
    return _total([(len(records), start + len(records), warnings) for start, records, warnings in ordered])


def _write_anywhere(path: str, records: Iterable[bytes]) -> None:
    if "://" not in path:
        prediction_records.write_file(path, records)
        return
    with tempfile.TemporaryDirectory(prefix="tfopt-infer-") as folder:
        local = Path(folder) / "file"
        prediction_records.write_file(str(local), records)
        as_it_is = CompressionTypes.UNCOMPRESSED  # Beam would compress what is called .gz again
        with local.open("rb") as source, FileSystems.create(path, compression_type=as_it_is) as target:
            shutil.copyfileobj(source, target, 1 << 24)


def _total(parts: Iterable[Written]) -> Written:
    """Rows and warnings of several; the same whatever their order."""
    rows = end = 0
    warnings: set[str] = set()
    for count, after, said in parts:
        rows += count
        end = max(end, after)
        warnings.update(said)
    return rows, end, tuple(sorted(warnings)[:_WARNINGS])
