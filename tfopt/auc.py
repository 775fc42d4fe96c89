"""AUC as a tally: the area under the ROC curve from counts, which merge.

    AUC = P(s+ > s-) + P(s+ = s-) / 2 = (2 #{s+ > s-} + #{s+ = s-}) / (2 P Q)

with P positive and Q negative rows. Kept are the distinct scores and how many rows of either class have each; what is
complete for a range of scores shrinks to four integers, since between ranges only P and Q count: for ranges r < t,

    #{s+ > s-} = sum_r #{s+ > s- in r} + sum_{r < t} P_t Q_r
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.scores import class_scores
from tfopt.tally_base import Tally

_RANGE_SHIFT = 48  # a range of scores has the top 16 bits in common: sign, exponent and 4 bits of the mantissa


class Auc(Tally):
    """auc: per distinct score the positive and the negative rows; of ranges of scores that are complete, four integers.

    Of two columns the second is the positive class.

    Attributes:
      ranges: top bits of the scores -> (positive rows, negative rows, 2 #{s+ > s-} + #{s+ = s-} within the range).
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.ranges: dict[int, tuple[int, int, int]] = {}
        # Scores with rows (2, n): negative, positive. First the distinct ones, ascending, then what was added since.
        self._chunks = [(np.zeros(0), np.zeros((2, 0), np.int64))]
        self._added = 0

    def parts(self) -> list[tuple[int, Tally]]:
        """One part per range of scores; the count of rows goes with the first."""
        found: list[tuple[int, Auc]] = []
        for key, scores, rows in self._by_range():
            part = Auc(self.name)
            part.form, part._chunks = self.form, [(scores, rows)]
            found.append((key, part))
        found = found or [(0, Auc(self.name))]
        self._hand_on(found[0][1])
        return list(found)

    def reduced(self) -> Auc:
        """Four integers per range of scores in place of the scores; more rows of a range can no longer be merged."""
        result = Auc(self.name)
        self._hand_on(result)
        for key, _, (negative, positive) in self._by_range():
            if key in result.ranges:
                raise ValueError("a range of scores that was reduced has got more rows: merge first, then reduce")
            q, p = int(negative.sum()), int(positive.sum())
            dtype = np.int64 if 2 * p * q < 2**63 else object
            negative, positive = negative.astype(dtype), positive.astype(dtype)
            result.ranges[key] = (p, q, int(np.dot(positive, 2 * np.cumsum(negative) - negative)))
        return result

    def _add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        columns, truth = class_scores(scores, labels, least=1, most=2)
        self._append(columns[:, -1] + 0.0, np.stack([truth == 0, truth == 1]))  # + 0.0 makes 0 of -0

    def _merge(self, other: Auc) -> None:
        if self.ranges.keys() & other.ranges.keys():
            raise ValueError("two tallies hold the same range of scores: merge the parts of a range, then reduce them")
        self.ranges.update(other.ranges)
        self._append(*other._table())

    def _value(self) -> float:
        p = q = twice = 0
        for _, (positive, negative, within) in sorted(self.reduced().ranges.items()):
            twice += within + 2 * positive * q
            p, q = p + positive, q + negative
        if not p or not q:
            raise TfoptError(f"auc: wants rows of both classes, received {p} positive and {q} negative ones")
        return twice / (2 * p * q)

    def _counts(self) -> dict[str, int]:
        ranges = self.reduced().ranges.values()
        return {"positives": sum(p for p, _, _ in ranges), "negatives": sum(q for _, q, _ in ranges)}

    def _hand_on(self, other: Auc) -> None:
        """Gives another tally what is not by score."""
        other.form, other.rows, other.bad, other.ranges = self.form, self.rows, dict(self.bad), dict(self.ranges)

    def _append(self, scores: np.ndarray, rows: np.ndarray) -> None:
        self._chunks.append((scores, rows))
        self._added += len(scores)
        if self._added > len(self._chunks[0][0]) + 4096:  # at least as many: each is sorted a few times in all
            self._table()

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """All distinct scores, ascending, and their rows."""
        if len(self._chunks) > 1:
            scores, place = np.unique(np.concatenate([s for s, _ in self._chunks]), return_inverse=True)
            rows = np.zeros((2, len(scores)), np.int64)
            for side in (0, 1):
                np.add.at(rows[side], place, np.concatenate([r[side] for _, r in self._chunks], dtype=np.int64))
            self._chunks, self._added = [(scores, rows)], 0
        return self._chunks[0]

    def _by_range(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (top bits of the scores, distinct scores, their rows)."""
        scores, rows = self._table()
        bits = scores.view(np.uint64)
        ordered = np.where(bits >> 63, ~bits, bits | np.uint64(1 << 63))  # ascending as the scores are
        keys, starts = np.unique(ordered >> np.uint64(_RANGE_SHIFT), return_index=True)
        for key, start, end in zip(keys.tolist(), starts, [*starts, len(scores)][1:], strict=True):
            yield key, scores[start:end], rows[:, start:end]

    def __getstate__(self) -> dict[str, Any]:
        self._table()
        return self.__dict__
