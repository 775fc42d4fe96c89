"""What all metrics that merge have in common: rows are checked, counted, added, merged, and give a value in the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.report import Metric


class Tally:
    """What a metric needs to know of the rows seen so far.

    Attributes:
      name: of the metric.
      rows: how many were added.
      bad: how many of them hold NaN or infinity in their scores, and in their labels.
      form: shape of a row of scores, and their dtype; None before the first.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows = 0
        self.bad = {"scores": 0, "labels": 0}
        self.form: tuple[tuple[int, ...], str] | None = None

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Adds rows.

        Args:
          scores: (N,), (N, 1) or (N, C) class scores, probabilities or class ids, or values of any shape.
          labels: class ids (N,) or (N, 1), one-hot (N, C), or values of the scores' shape.

        Raises:
          TfoptError: scores and labels that the metric cannot compare; nothing was added.
        """
        scores, labels = np.asarray(scores), np.asarray(labels)
        if not scores.ndim or not labels.ndim or len(scores) != len(labels):
            raise TfoptError(
                f"{self.name}: wants one row of scores per label, received scores {scores.shape} and "
                f"labels {labels.shape}"
            )
        if not len(scores):
            return
        finite = np.ones(len(scores), bool)
        bad = {}
        for what, array in (("scores", scores), ("labels", labels)):
            if array.dtype.kind in "OSUMmc":
                raise TfoptError(f"{self.name}: wants {what} that are numbers, received {array.dtype} {array.shape}")
            good = np.isfinite(array.astype(np.float64)).reshape(len(array), -1).all(axis=1)
            bad[what] = int(np.count_nonzero(~good))
            finite &= good
        self._check_form((scores.shape[1:], scores.dtype.name))
        try:
            if finite.all():
                self._add(scores, labels)
            elif finite.any():  # `value` will refuse the others, whose number it tells
                self._add(scores[finite], labels[finite])
        except TfoptError as error:
            raise TfoptError(f"{self.name}: {error}") from error
        self.form = (scores.shape[1:], scores.dtype.name)
        self.rows += len(scores)
        self.bad = {what: count + bad[what] for what, count in self.bad.items()}

    def merge(self, other: Tally) -> None:
        """Adds the rows of another tally of the same metric, which is left as it is.

        Raises:
          TfoptError: its scores have another shape.
        """
        if other.name != self.name:
            raise ValueError(f"a tally of {other.name} cannot be merged into one of {self.name}")
        if other.form is not None:
            self._check_form(other.form)
            self.form = other.form
        self.rows += other.rows
        self.bad = {what: count + other.bad[what] for what, count in self.bad.items()}
        self._merge(other)

    def value(self) -> Metric:
        """The metric over all rows.

        Raises:
          TfoptError: no rows, NaN or infinity in them, or of one class alone where both are needed.
        """
        if not self.rows:
            raise TfoptError(f"{self.name}: received no rows")
        for what, count in self.bad.items():
            if count:
                raise TfoptError(f"{self.name}: the {what} hold NaN or infinity in {count} of {self.rows} rows")
        try:
            return Metric(self.name, self._value(), self.rows)
        except ZeroDivisionError as error:
            raise TfoptError(f"{self.name}: received rows without values") from error

    def counts(self) -> dict[str, int]:
        """The integers behind the value: rows, and of two classes those of the confusion matrix."""
        return {"rows": self.rows, **self._counts()}

    def parts(self) -> list[tuple[int, Tally]]:
        """The tally in parts that share a key with parts of others: those of one key are merged, then `reduced`."""
        return [(0, self)]

    def reduced(self) -> Tally:
        """What of a part that is complete must be kept to merge it with parts of other keys."""
        return self

    def _check_form(self, form: tuple[tuple[int, ...], str]) -> None:
        if self.form not in (None, form):
            had, has = (f"{dtype}{list(shape)}" for shape, dtype in (self.form or form, form))
            raise TfoptError(f"{self.name}: the scores of a row change between batches, from {had} to {has}")

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        raise NotImplementedError

    def _merge(self, other: Any) -> None:
        raise NotImplementedError

    def _value(self) -> float:
        raise NotImplementedError

    def _counts(self) -> dict[str, int]:
        return {}
