"""The rows of a source as a PCollection of batches, the same that `tfopt.batches` gives in one process.

A large TFRecord file that is not gzipped is cut where records begin, after a scan that reads their headers only; a
gzipped file is read by one worker. Where there are few files, their batches are spread over the workers; with many
files each worker keeps what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import apache_beam as beam

from tfopt import batches
from tfopt.data import Dataset, TensorSpec
from tfopt.data import batch_size as fixed_batch

ROWS = 32  # of a batch, where the signature does not fix it
_MANY = 16  # files


class ReadRows(beam.PTransform):
    """PBegin -> PCollection[tfopt.data.Dataset]."""

    def __init__(
        self,
        source: str,
        specs: Mapping[str, TensorSpec],
        feature_spec: Mapping[str, Any] | None = None,
        label: str = "label",
        batch_size: int | None = None,
        limit: int | None = None,
        signature: str | None = None,
    ):
        """Opens the source, and reads its first record.

        Args:
          source: TFRecord glob, .npz or python:module:function; see `tfopt.data.load`, as for all arguments.
          specs: the inputs of the signature.
          feature_spec: what the model parses tf.Examples by.
          label: the array or feature that holds the labels.
          batch_size: rows of a batch; None takes the signature's fixed batch, or else `ROWS`.
          limit: read no more than this many rows, the first ones.
          signature: its name, which logged requests must name.

        Raises:
          TfoptError: the source is missing or empty, or does not fit.
        """
        super().__init__()
        size = batch_size or fixed_batch(specs, ROWS)
        self.batches = batches.cut(
            source, specs, size=size, feature_spec=feature_spec, label=label, limit=limit, signature=signature
        )

    @classmethod
    def of(cls, found: batches.Batches) -> ReadRows:
        """Reads a source that was opened already."""
        read = cls.__new__(cls)
        beam.PTransform.__init__(read)
        read.batches = found
        return read

    def expand(self, start: beam.pvalue.PBegin) -> beam.PCollection:
        """Scans the files where that is needed, cuts them into parts, and reads these."""
        found = self.batches
        parts: beam.PCollection
        if not found.needs_scan:
            parts = start | "Part" >> beam.Create([batches.Part()])
        else:
            scans = (
                start
                | "Files" >> beam.Create(list(enumerate(found.files)))
                | "SpreadFiles" >> beam.Reshuffle()
                | "Scan" >> beam.MapTuple(lambda index, file: (index, found.scan(file)))
            )
            parts = (
                start
                | "Once" >> beam.Create([None])
                | "Cut" >> beam.FlatMap(_parts, found, beam.pvalue.AsList(scans))
                | "SpreadParts" >> beam.Reshuffle()
            )
        rows = parts | "Read" >> beam.FlatMap(found.read).with_output_types(Dataset)
        return rows if len(found.files) >= _MANY else rows | "SpreadBatches" >> beam.Reshuffle()


def _parts(_: None, found: batches.Batches, scans: list[tuple[int, batches.Scan]]) -> list[batches.Part]:
    return found.parts([scan for _, scan in sorted(scans)])
