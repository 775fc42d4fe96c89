"""Quality metrics as tallies: batches are added in any order and grouping, and the value is the same to the last bit.

    accuracy   mean_i 1[c(s_i) = y_i]                                     c the predicted class
    top5       mean_i 1[#{j : s_ij > s_iy} < 5]                           of equal scores the first class is the higher
    auc        (2 #{s+ > s-} + #{s+ = s-}) / (2 P Q)                       see `tfopt.auc`
    f1         2 TP / (2 TP + FP + FN)                                    or its mean over classes
    logloss    -mean_i log p_iy                                           in nats, p clipped to [1e-15, 1]
    mse, rmse, mae   mean (s - y)^2, its root, mean |s - y|               over all elements

with s scores, y labels, P positive and Q negative rows. Counts are integers, sums are exact (`tfopt.exact_sum`), and
the one division at the end rounds correctly. Where one column of scores, or a row of them, may be probabilities or
logits, all rows decide: probabilities where every score is in [0, 1]. Both readings are kept until one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tfopt.auc import Auc
from tfopt.errors import TfoptError
from tfopt.exact_sum import ExactSum
from tfopt.scores import class_ids, class_scores, difference, in_unit_interval
from tfopt.tally_base import Tally

_FEW = 1 << 12  # classes
_PROBABILITIES, _LOGITS = "probabilities", "logits"


class _Classes(Tally):
    """accuracy and f1: per class id how often it was predicted rightly, predicted, and true.

    c(s) is argmax_j s_ij for C >= 2 columns; for one column it is 1[p > 0.5], or the scores themselves where they are
    integer class ids. f1 is that of class 1 where there are two, else the mean over the classes that occur.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.found: dict[str, dict[float, list[int]]] = {_PROBABILITIES: {}, _LOGITS: {}}

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        ids = class_ids(scores, labels)
        columns, truth = class_scores(scores, labels, least=1) if ids is None else (ids[0][:, None], ids[1])
        one = ids is None and columns.shape[1] == 1
        if not (one and in_unit_interval(columns)):
            self.found.pop(_PROBABILITIES, None)
        for reading, table in self.found.items():
            if one:  # 1 / (1 + exp(-s)) > 1/2 where s > 0
                predicted = (columns[:, 0] > (0.5 if reading == _PROBABILITIES else 0)).astype(np.int64)
            else:
                predicted = columns[:, 0] if ids is not None else columns.argmax(axis=1)
            for place, chosen in enumerate((predicted[predicted == truth], predicted, truth)):
                for c, count in _counted(chosen):
                    table.setdefault(c, [0, 0, 0])[place] += count

    def _merge(self, other: _Classes) -> None:
        if _PROBABILITIES not in other.found:
            self.found.pop(_PROBABILITIES, None)
        for reading, table in self.found.items():
            for c, counts in other.found[reading].items():
                table[c] = [a + b for a, b in zip(table.get(c, (0, 0, 0)), counts, strict=True)]

    def _table(self) -> dict[float, list[int]]:
        return self.found.get(_PROBABILITIES, self.found[_LOGITS])

    def _binary(self) -> bool:
        assert self.form is not None
        return math.prod(self.form[0][-1:]) <= 2 and max(self._table(), default=0) <= 1

    def _value(self) -> float:
        table = self._table()
        if self.name == "accuracy":
            return sum(right for right, _, _ in table.values()) / sum(true for _, _, true in table.values())
        chosen = [table.get(1, [0, 0, 0])] if self._binary() else table.values()
        return math.fsum(2 * right / max(predicted + true, 1) for right, predicted, true in chosen) / len(chosen)

    def _counts(self) -> dict[str, int]:
        table = self._table()
        hits, total = (sum(counts[place] for counts in table.values()) for place in (0, 2))
        if not table or not self._binary():
            return {"hits": hits}
        right, predicted, true = table.get(1, (0, 0, 0))
        apart = {"tp": right, "fp": predicted - right, "fn": true - right}
        return {"hits": hits, "positives": true, **apart, "tn": total - sum(apart.values())}


def _counted(ids: np.ndarray) -> Iterable[tuple[float, int]]:
    """Each class id, and how often it is there."""
    if ids.dtype == np.int64 and ids.size and ids.min() >= 0 and ids.max() < _FEW:  # which needs no sorting
        counts = np.bincount(ids)
        classes = np.flatnonzero(counts)
        return zip(classes.tolist(), counts[classes].tolist(), strict=True)
    classes, counts = np.unique(ids, return_counts=True)
    return zip(classes.tolist(), counts.tolist(), strict=True)


class _Top5(Tally):
    """top5: how often the label was among the five highest scores."""

    def __init__(self, name: str):
        super().__init__(name)
        self.hits = self.total = 0

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        columns, truth = class_scores(scores, labels, least=2)
        of_label = np.take_along_axis(columns, truth[:, None], axis=1)
        before = np.arange(columns.shape[1]) < truth[:, None]
        higher = np.count_nonzero((columns > of_label) | (before & (columns == of_label)), axis=1)
        self.hits += int(np.count_nonzero(higher < 5))
        self.total += len(truth)

    def _merge(self, other: _Top5) -> None:
        self.hits += other.hits
        self.total += other.total

    def _value(self) -> float:
        return self.hits / self.total

    def _counts(self) -> dict[str, int]:
        return {"hits": self.hits}


class _LogLoss(Tally):
    """logloss: the sum of -log p_iy for either reading of the scores.

    C >= 2 columns are probabilities where all are in [0, 1] (each row is divided by its sum), else p = softmax(s).
    One column is the p of the positive class where all are in [0, 1], else p = 1 / (1 + exp(-s)).
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.found = {_PROBABILITIES: ExactSum(), _LOGITS: ExactSum()}
        self.total = 0

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        columns, truth = class_scores(scores, labels, least=1)
        if not in_unit_interval(columns):
            self.found.pop(_PROBABILITIES, None)
        for reading, total in self.found.items():
            p = columns
            if columns.shape[1] == 1:
                p = columns if reading == _PROBABILITIES else np.exp(-np.logaddexp(0, -columns))
                p = np.concatenate([1 - p, p], axis=1)
            elif reading == _LOGITS:
                p = np.exp(columns - columns.max(axis=1, keepdims=True))
            sums = p.sum(axis=1)
            chosen = np.take_along_axis(p, truth[:, None], axis=1)[:, 0] / np.where(sums > 0, sums, 1)
            total.add(-np.log(np.clip(chosen, 1e-15, 1)))
        self.total += len(truth)

    def _merge(self, other: _LogLoss) -> None:
        if _PROBABILITIES not in other.found:
            self.found.pop(_PROBABILITIES, None)
        for reading, total in self.found.items():
            total.merge(other.found[reading])
        self.total += other.total

    def _value(self) -> float:
        return self.found.get(_PROBABILITIES, self.found[_LOGITS]).mean(self.total)


class _Errors(Tally):
    """mse, rmse and mae: the sum of (s - y)^2 or |s - y|."""

    def __init__(self, name: str):
        super().__init__(name)
        self.sum = ExactSum()
        self.total = 0

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # what overflows is infinite in the sum, too
            apart = difference(scores, labels)
            self.sum.add(np.abs(apart) if self.name == "mae" else apart * apart)
        self.total += apart.size

    def _merge(self, other: _Errors) -> None:
        self.sum.merge(other.sum)
        self.total += other.total

    def _value(self) -> float:
        mean = self.sum.mean(self.total)
        return math.sqrt(mean) if self.name == "rmse" else mean


METRICS: dict[str, type[Tally]] = {
    **{"accuracy": _Classes, "top5": _Top5, "auc": Auc, "f1": _Classes, "logloss": _LogLoss},
    **{"mse": _Errors, "rmse": _Errors, "mae": _Errors},
}


def tally(name: str) -> Tally:
    """An empty tally of a metric.

    Raises:
      TfoptError: there is no such metric.
    """
    if name not in METRICS:
        raise TfoptError(f"metric '{name}' is unknown: choose from {', '.join(METRICS)}")
    return METRICS[name](name)
