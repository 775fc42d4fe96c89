"""Evaluation on Beam: every worker runs all artifacts on its batches, and only sums that merge exactly travel.

    rows | ReadRows(...) | Evaluate(job)      one element, a tfopt.side_by_side.Seen

AUC needs all scores in order. They are cut by ranges, each of which one worker merges and then reduces to its counts
of positive and negative rows and of ordered pairs within the range: no worker holds all scores, and the result is the
same to the last bit as that of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from tfopt.beam import pipeline
from tfopt.beam.model_handler import LockedProgram
from tfopt.beam.rows import ReadRows
from tfopt.data import Dataset
from tfopt.side_by_side import Job, Key, Seen, joined, reduced

_ROWS = 1 << 17  # that a worker gathers before it sends: it holds their scores


class Evaluate(beam.PTransform):
    """PCollection[tfopt.data.Dataset] -> PCollection of one tfopt.side_by_side.Seen."""

    def __init__(self, job: Job, threads: int = 2):
        """Takes what can be pickled.

        Args:
          job: what to ask of which artifacts, at paths that workers can read.
          threads: of the runtimes in each process; outputs may depend on it in their last bits.
        """
        super().__init__()
        self._job = job
        self._threads = threads

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        """Observes, merges by range, reduces, merges."""
        return (
            rows
            | "Observe" >> beam.ParDo(_Observe(self._job, self._threads))
            | "MergeRanges" >> beam.CombinePerKey(_Merge())
            | "Reduce" >> beam.MapTuple(reduced)
            | "Merge" >> beam.CombinePerKey(_Merge())
            | "Gather" >> beam.combiners.ToList()
            | "Join" >> beam.Map(lambda pieces, job: joined(job, sorted(pieces, key=lambda piece: piece[0])), self._job)
        )


def observe(job: Job, rows: ReadRows, beam_args: str, threads: int) -> Seen:
    """Runs `Evaluate` to its end.

    Raises:
      TfoptError: see `pipeline.run`; or the runner lost or doubled rows, as some do.
    """
    seen = pipeline.run(lambda start: start | "Rows" >> rows | "Evaluate" >> Evaluate(job, threads), beam_args)
    pipeline.check_rows(seen.rows, seen.end)
    return seen


class _Programs:
    """The artifacts, opened once in a process for all its threads."""

    def __init__(self, paths: Iterable[str], threads: int):
        self.all = [LockedProgram(path, threads) for path in paths]


class _Observe(beam.DoFn):
    """Batches -> pieces of what was seen, as many as a bundle needs."""

    def __init__(self, job: Job, threads: int):
        self._job = job
        self._threads = threads
        self._shared = Shared()

    def setup(self) -> None:
        paths = [asked.path for asked in self._job.asked]
        self._programs = self._shared.acquire(lambda: _Programs(paths, self._threads))

    def start_bundle(self) -> None:
        self._seen = Seen(self._job)

    def process(self, rows: Dataset) -> Iterator[tuple[Key, Any]]:
        self._seen.add(self._job, self._programs.all, rows)
        if self._seen.rows >= _ROWS:
            yield from self._seen.pieces()
            self._seen = Seen(self._job)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for piece in self._seen.pieces():
            yield WindowedValue(piece, GlobalWindow().max_timestamp(), [GlobalWindow()])


class _Merge(beam.CombineFn):
    """Merges pieces; does not change what it is given."""

    def create_accumulator(self) -> Any:
        return None

    def add_input(self, merged: Any, piece: Any) -> Any:
        if merged is None:
            return copy.deepcopy(piece)
        merged.merge(piece)
        return merged

    def merge_accumulators(self, accumulators: Iterable[Any]) -> Any:
        merged = None
        for each in accumulators:
            if each is not None:
                merged = self.add_input(merged, each)
        return merged

    def extract_output(self, merged: Any) -> Any:
        return merged
