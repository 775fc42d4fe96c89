"""Equivalence over any number of rows: how far outputs of B are from those of A, as a summary that merges.

    absolute = max |a - b|     relative = max |a - b| / max |a|     agreement = mean_i 1[argmax_j a_ij = argmax_j b_ij]

per output, over the elements that are finite in A; where A is not finite, B must be the same. Everything kept is a
maximum or an integer, so that any order and grouping of rows gives the same bits. On the rows of one call the verdict
is that of `tfopt.verify.difference`; over several, the scale max |a| is that of all rows.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Bound on max|a - b| / max|a| by the dtype of the output. What is no float must be equal.
BOUNDS = {
    **{"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3},
    **{"complex128": 1e-4, "complex64": 1e-4},
}

_WORST = 10


@dataclasses.dataclass
class Output:
    """How far one output is apart.

    Attributes:
      dtype: in A.
      rows, elements: how many were compared.
      unequal: elements that differ at all.
      not_finite: float elements that are not finite in A or in B, and not the same.
      distance: max |a - b| over elements that are finite in both; 0 for what is no float.
      scale: max |a| over the elements that are finite in A.
      powers: k -> elements with 2^k <= |a - b| < 2^(k + 1).
      hits, scored: rows with the same top class, and rows of class scores, (rows, 2 classes or more), of floats.
      worst: (error, id) of the rows that are furthest apart, of those that have ids: max |a - b|, or for what is no
        float the number of elements that differ.
      missing: whether B once did not give it.
      changed: how its shape or dtype in B was another.
    """

    dtype: str = ""
    rows: int = 0
    elements: int = 0
    unequal: int = 0
    not_finite: int = 0
    distance: float = 0.0
    scale: float = 0.0
    powers: dict[int, int] = dataclasses.field(default_factory=dict)
    hits: int = 0
    scored: int = 0
    worst: list[tuple[float, Any]] = dataclasses.field(default_factory=list)
    missing: bool = False
    changed: tuple[str, ...] = ()

    @property
    def absolute(self) -> float:
        """max |a - b|; infinite where one side alone is finite."""
        return float("inf") if self.not_finite else self.distance

    @property
    def relative(self) -> float:
        """max |a - b| / max |a|."""
        if self.not_finite or not self.scale:
            return float("inf") if self.not_finite or self.distance else 0.0
        return self.distance / self.scale

    @property
    def agreement(self) -> float | None:
        """The share of rows with the same top class; None where it holds no class scores."""
        return self.hits / self.scored if self.scored else None

    def broken(self, name: str) -> str | None:
        """What is wrong with it, in words that call it `name`; None where it is within its bound."""
        bound = BOUNDS.get(self.dtype)
        if self.missing:
            return f"output {name!r} is missing"
        if self.changed:
            return f"output {name!r} changed from {self.changed[0]}"
        if bound is None:
            different = f"output {name!r} ({self.dtype}) is not equal in {self.unequal} of {self.elements}"
            return different if self.unequal else None
        if self.not_finite:
            return f"output {name!r} differs where it is not finite"
        if self.relative > bound:
            return f"output {name!r} is off by {self.relative:.2g} of its scale (bound {bound:g})"
        return None

    def add(self, a: Any, b: Any, ids: Sequence[Any] | None = None) -> None:
        """Adds rows: arrays of A and of B, where None is missing; see `Equivalence.add`."""
        a, b = (np.asarray(value, object if isinstance(value, bytes) else None) for value in (a, b))
        self.dtype = a.dtype.name
        if b.dtype == object and b.shape == () and b.item() is None:
            self.missing = True
            return
        if a.shape != b.shape or a.dtype != b.dtype:
            self._change(f"{_form(a, b)} to {_form(b, a)}")
            return
        self.rows += len(a) if a.ndim else 1
        self.elements += a.size
        if not a.size:
            return
        by_element = self._floats(a, b) if self.dtype in BOUNDS else np.asarray(a != b)
        self.unequal += int(np.count_nonzero(by_element))
        if ids is not None and a.ndim and len(a) == len(ids):
            table = by_element.reshape(len(a), -1)
            errors = table.max(axis=1) if self.dtype in BOUNDS else np.count_nonzero(table, axis=1)
            far = np.flatnonzero(errors)
            if len(far) > _WORST:  # and all that are as far as the last of them
                far = far[errors[far] >= np.partition(errors[far], -_WORST)[-_WORST]]
            self._keep([(float(errors[row]), ids[row]) for row in far.tolist()])

    def merge(self, other: Output) -> None:
        """Adds the rows of another summary."""
        self.dtype = self.dtype or other.dtype
        for field in ("rows", "elements", "unequal", "not_finite", "hits", "scored"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        self.distance, self.scale = max(self.distance, other.distance), max(self.scale, other.scale)
        for power, count in other.powers.items():
            self.powers[power] = self.powers.get(power, 0) + count
        self.missing |= other.missing
        for words in other.changed:
            self._change(words)
        self._keep(other.worst)

    def _floats(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Counts float elements, and returns |a - b| of each; infinity where they differ and are not finite."""
        if a.ndim == 2 and a.shape[1] > 1:
            self.hits += int(np.count_nonzero(a.argmax(axis=1) == b.argmax(axis=1)))
            self.scored += len(a)
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(a) & np.isfinite(b)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        self.not_finite += int(np.count_nonzero(~finite & ~same))
        with np.errstate(over="ignore", invalid="ignore"):
            apart = np.where(finite, np.abs(a - b), np.where(same, 0, np.inf))
        self.distance = max(self.distance, float(np.max(apart, where=finite, initial=0)))
        self.scale = max(self.scale, float(np.max(np.abs(a), where=np.isfinite(a), initial=0)))
        powers = np.frexp(apart[(apart > 0) & np.isfinite(apart)])[1] - 1
        if powers.size:
            least = int(powers.min())
            for place, count in enumerate(np.bincount(powers - least).tolist(), least):
                if count:
                    self.powers[place] = self.powers.get(place, 0) + count
        return apart

    def _change(self, words: str) -> None:
        self.changed = tuple(sorted({*self.changed, words}))

    def _keep(self, rows: Sequence[tuple[float, Any]]) -> None:
        self.worst = heapq.nsmallest(_WORST, [*self.worst, *rows], key=lambda each: (-each[0], each[1]))


class Equivalence:
    """How far the outputs of B are from those of A, over the rows that were added.

    Attributes:
      rows: how many were added.
      outputs: output of A -> how far it is apart.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.outputs: dict[str, Output] = {}

    def add(self, expected: Mapping[str, Any], received: Mapping[str, Any], ids: Sequence[Any] | None = None) -> None:
        """Adds rows.

        Args:
          expected: output name -> array of A, rows on axis 0.
          received: the same of B; outputs that A lacks are left out of account.
          ids: what to call each row, all of one type that can be ordered; without them no worst rows are kept.
        """
        sizes = [len(value) for value in map(np.asarray, expected.values()) if value.ndim]
        self.rows += len(ids) if ids is not None else next(iter(sizes), 1)
        for name, value in expected.items():
            self.outputs.setdefault(name, Output()).add(value, received.get(name), ids)

    def merge(self, other: Equivalence) -> None:
        """Adds the rows of another summary, which is left as it is."""
        self.rows += other.rows
        for name, output in other.outputs.items():
            self.outputs.setdefault(name, Output()).merge(output)

    @property
    def absolute(self) -> float:
        """max |a - b| over all float outputs."""
        return max((output.absolute for output in self.outputs.values()), default=0.0)

    @property
    def relative(self) -> float:
        """The same over the output's scale; the worst output."""
        return max((output.relative for output in self.outputs.values()), default=0.0)

    @property
    def max_error(self) -> float:
        """`relative`, and infinite where an output is missing, changed its form, or differs though it is no float."""
        wrong = any(
            each.missing or each.changed or (each.unequal and each.dtype not in BOUNDS)
            for each in self.outputs.values()
        )
        return float("inf") if wrong else self.relative

    @property
    def broken(self) -> str | None:
        """The first output that is beyond its bound, differs though it is no float, or changed its form; or None."""
        found = (output.broken(name) for name, output in self.outputs.items())
        return next((words for words in found if words), None)

    @property
    def agreement(self) -> float | None:
        """The worst top-1 agreement; None where no output holds class scores."""
        shares = [output.agreement for output in self.outputs.values()]
        return min((share for share in shares if share is not None), default=None)


def _form(array: np.ndarray, other: np.ndarray) -> str:
    """dtype and shape, without the number of rows where both have the same, as it is that of a batch."""
    rows = array.shape[:1] == other.shape[:1] and array.ndim
    return f"{array.dtype}[{', '.join(map(str, ('rows', *array.shape[1:]) if rows else array.shape))}]"
