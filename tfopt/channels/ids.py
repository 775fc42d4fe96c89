"""Names for channels: every index of every axis of every tensor has one, and joins say which are one and the same.

    class of a channel = connected component of the graph (ids, joins)

An axis is an int array with an id for each index. Ids from 0 on are channels that may go; a negative one stands for
what must stay, with a reason, and so does every id that is joined with it. An axis of unknown size is a scalar array
that holds a negative id.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Axes = tuple[np.ndarray, ...]


class Ids:
    """Ids handed out so far, and their joins."""

    def __init__(self) -> None:
        self._free = 0
        self._reasons: list[str] = []
        self._joins: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, size: int) -> np.ndarray:
        """An axis of `size` channels of its own."""
        self._free += size
        return np.arange(self._free - size, self._free, dtype=np.int64)

    def fixed(self, size: int | None, reason: str) -> np.ndarray:
        """An axis that stays as it is; `size` is None where it is not known."""
        self._reasons.append(reason)
        return np.full(() if size is None else (size,), -len(self._reasons), dtype=np.int64)

    def join(self, first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        """Says that axes, which broadcast, hold the same channels; returns one of them, fixed where any is."""
        for other in others:
            a, b = np.broadcast_arrays(first, other)
            self._joins.append((a.ravel(), b.ravel()))
            first = np.where(a < 0, a, b) if first.ndim or other.ndim else first
        return first

    def pin(self, axis: np.ndarray, reason: str) -> np.ndarray:
        """Says that an axis must stay as it is."""
        return self.join(axis, self.fixed(None, reason)) if live(axis) else axis

    def classes(self) -> Classes:
        """What the joins amount to."""
        fixed = len(self._reasons)
        count = fixed + self._free
        pairs = self._joins or [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        a, b = (np.concatenate([pair[side] for pair in pairs]) + fixed for side in (0, 1))
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(count, count))
        total, labels = connected_components(graph, directed=False)
        reasons: dict[int, str] = {}
        for index in range(fixed):  # id -1 is the last of them
            reasons.setdefault(int(labels[fixed - 1 - index]), self._reasons[index])
        return Classes(labels, fixed, total, reasons)


class Classes:
    """Classes of ids.

    Attributes:
      total: how many; they are numbered from 0.
      reasons: class that must stay -> why.
    """

    def __init__(self, labels: np.ndarray, offset: int, total: int, reasons: dict[int, str]) -> None:
        self._labels = labels
        self._offset = offset
        self.total = total
        self.reasons = reasons
        self.free = np.ones(total, bool)
        self.free[list(reasons)] = False

    def of(self, axis: np.ndarray) -> np.ndarray:
        """The class of each id of an axis."""
        return self._labels[axis + self._offset]


def live(axis: np.ndarray) -> bool:
    """Whether something of an axis may go, as far as is known when it is met."""
    return bool((axis >= 0).any())
