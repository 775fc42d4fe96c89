"""Artifacts side by side: each batch of rows is run once by all of them, and what is kept of it merges exactly.

The same batches give the same bits in any order and grouping (see `tally.py` and `equivalence.py`), in one process or
in many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from tfopt import runtime
from tfopt.batches import filled, without_filling
from tfopt.counterparts import Asked
from tfopt.data import Dataset
from tfopt.equivalence import Equivalence
from tfopt.errors import TfoptError
from tfopt.tally import Tally, tally

_WARNINGS = 10  # of which each batch may have its own

Key = tuple[int, str, int]  # artifact, or -1 for all; metric, or "" for the outputs; range of scores


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of which artifacts; it can be pickled, so that other processes can do it.

    Attributes:
      asked: the artifacts. The first is the reference, A, whose names inputs and outputs have.
      metrics: names of `metrics.METRICS`; none for rows without labels.
      output: the one that they score.
      least: rows that a call has at least: an artifact may have a fixed batch.
    """

    asked: tuple[Asked, ...]
    metrics: tuple[str, ...] = ()
    output: str | None = None
    least: int = 1


class Seen:
    """What has been seen of the rows so far; can be pickled.

    Attributes:
      rows: how many.
      end: number of the last row, plus 1; `rows` where none was lost and none doubled.
      tallies: (index of the artifact, metric) -> its tally.
      equivalences: index of the artifact -> how far its outputs are from those of the first.
      failures: index of the artifact -> why it cannot be run; of several reasons the first by the alphabet.
      warnings: about the data, the first few by the alphabet.
    """

    def __init__(self, job: Job):
        self.rows = self.end = 0
        artifacts = range(len(job.asked))
        self.tallies: dict[tuple[int, str], Tally] = {(i, m): tally(m) for i in artifacts for m in job.metrics}
        self.equivalences = {i: Equivalence() for i in artifacts[1:]}
        self.failures: dict[int, str] = {}
        self.warnings: set[str] = set()

    def add(self, job: Job, programs: Sequence[runtime.Program], rows: Dataset) -> None:
        """Runs every artifact on one batch.

        Raises:
          TfoptError: the rows have no labels to score by, or the reference cannot be run or scored.
        """
        if job.metrics and rows.labels is None:
            raise TfoptError(f"{rows.source}: {job.metrics[0]} needs labels, and there are none")
        count = len(rows)
        ids = range(rows.start, rows.start + count)
        inputs = filled(rows, job.least)
        expected: runtime.Outputs = {}
        for index, (asked, program) in enumerate(zip(job.asked, programs, strict=True)):
            if index in self.failures:
                continue
            try:
                outputs = without_filling(asked.run(program, inputs), count, max(count, job.least))
                self._score(job, index, outputs, rows)
                if index:
                    self.equivalences[index].add(expected, _alike(expected, outputs), ids)
                else:
                    expected = outputs
            except TfoptError as error:
                if not index:
                    raise
                self.failures[index] = str(error)
        self.rows, self.end = self.rows + count, max(self.end, ids.stop)
        self._warn(rows.warnings)

    def _score(self, job: Job, index: int, outputs: runtime.Outputs, rows: Dataset) -> None:
        for metric in job.metrics:
            assert rows.labels is not None
            scores = outputs.get(job.output or "")
            if scores is None:
                raise TfoptError(f"{metric}: {job.asked[index].path} has no output for '{job.output}' of the first")
            if not scores.ndim or len(scores) != len(rows):
                raise TfoptError(
                    f"{metric}: wants one row of output '{job.output}' per row of input, "
                    f"received {scores.shape} for {len(rows)} rows"
                )
            self.tallies[index, metric].add(scores, rows.labels)

    def merge(self, other: Seen) -> None:
        """Adds what was seen of other rows."""
        self.rows, self.end = self.rows + other.rows, max(self.end, other.end)
        for key, each in other.tallies.items():
            self.tallies[key].merge(each)
        for index, apart in other.equivalences.items():
            self.equivalences[index].merge(apart)
        for index, reason in other.failures.items():
            self.failures[index] = min(reason, self.failures.get(index, reason))
        self._warn(other.warnings)

    def _warn(self, words: Iterable[str]) -> None:
        self.warnings = set(sorted({*self.warnings, *words})[:_WARNINGS])

    def pieces(self) -> Iterator[tuple[Key, Any]]:
        """Everything in pieces by key: those of one key are merged, then `reduced`; `joined` makes a whole of them."""
        for (index, metric), each in self.tallies.items():
            for part, piece in each.parts():
                yield (index, metric, part), piece
        for index, apart in self.equivalences.items():
            yield (index, "", 0), apart
        rest = Seen(Job(()))
        rest.rows, rest.end, rest.failures, rest.warnings = self.rows, self.end, self.failures, self.warnings
        yield (-1, "", 0), rest


def reduced(key: Key, piece: Any) -> tuple[Key, Any]:
    """What must be kept of a piece that is complete, and the key by which it is merged on."""
    index, metric, _ = key
    return (index, metric, 0), piece.reduced() if metric else piece


def joined(job: Job, pieces: Iterable[tuple[Key, Any]]) -> Seen:
    """What was seen, of its reduced pieces."""
    whole = Seen(job)
    for (index, metric, _), piece in pieces:
        if metric:
            whole.tallies[index, metric].merge(piece)
        elif index >= 0:
            whole.equivalences[index].merge(piece)
        else:
            whole.merge(piece)
    return whole


def observe(job: Job, programs: Sequence[runtime.Program], batches: Iterable[Dataset], rows: int | None = None) -> Seen:
    """Runs the artifacts in this process.

    Args:
      job: what to do.
      programs: the artifacts, opened.
      batches: of rows.
      rows: how many there are in all, where that is known.
    """
    seen = Seen(job)
    with tqdm(total=rows, desc="evaluate", unit="row", leave=False, disable=None) as bar:
        for batch in batches:
            seen.add(job, programs, batch)
            bar.update(len(batch))
    return seen


def _alike(expected: runtime.Outputs, received: runtime.Outputs) -> runtime.Outputs:
    """Outputs in the shape and dtype of the reference, where only axes of size 1 or the width of floats differ."""
    alike = {}
    for name, array in received.items():
        ours = expected[name]
        if array.shape != ours.shape and array.size == ours.size:
            array = array.reshape(ours.shape)
        alike[name] = array.astype(ours.dtype) if {array.dtype.kind, ours.dtype.kind} <= set("fV") else array
    return alike
