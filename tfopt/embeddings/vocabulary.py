"""A smaller vocabulary: the rows of rare ids go, and one row stands for all of them.

    E[i] = V[p(i)]        p(i) = k for each of the ids that went: their mean, weighted as they are read, is V[k]

Where the ids that stay are the first k, p(i) = min(i, k) is computed; otherwise it is a table of small integers.
The rows that stay are those of the trained table, bit by bit.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.embeddings.tables import Form, Writer
from tfopt.rewrite import Refused


class Vocabulary(Form):
    """V; and p, unless it is min(i, k)."""

    method = "vocabulary"

    def __init__(self, size: int, table: np.ndarray, places: np.ndarray | None):
        self.size = size
        self.arrays = {"rows": table}
        if places is not None:
            self.arrays["places"] = places
        self.detail = f"{len(table) - 1:,} of {size:,} rows stay, one stands for the others"

    def rows(self) -> np.ndarray:
        """See `Form.rows`."""
        table = self.arrays["rows"]
        places = self.arrays.get("places", np.minimum(np.arange(self.size), len(table) - 1))
        return table[places]

    def lookup(self, write: Writer, stored: dict[str, str]) -> str:
        """See `Form.lookup`."""
        if "places" in stored:
            kept = tf.as_dtype(self.arrays["places"].dtype)
            place = write.gather("place", stored["places"], write.ids, kept, write.dtype)
            place = write.cast(place, kept, tf.int32)
        else:
            last = write.constant("last", len(self.arrays["rows"]) - 1, tf.int32)
            place = write.op("place", "Minimum", write.checked(self.size), last, T=tf.int32)
        return write.gather("rows", stored["rows"], place, tf.float32, tf.int32)


def fit(table: np.ndarray, weights: np.ndarray, counts: np.ndarray | None, budget: int, min_count: int) -> Vocabulary:
    """The most frequent rows.

    Args:
      table: (n, d) float32.
      weights: (n,), how much each row counts in the mean of those that go; positive.
      counts: (n,), how often each was read; None where that is not known.
      budget: bytes, where `min_count` is 0.
      min_count: rows that were read less often go; 0 keeps as many as the bytes hold.

    Raises:
      Refused: the counts are not known, or no row goes.
    """
    if counts is None:
        raise Refused("how often each row is read is not known: --representative_data (or --labels) tells")
    size, width = table.shape
    bound = max(min_count, 1)
    stay = np.flatnonzero(counts >= bound)
    if not min_count:
        frequent = np.argsort(-counts, kind="stable")[: max(_most(size, width, budget), 0)]
        stay = np.sort(frequent[counts[frequent] >= bound])
        read = np.flatnonzero(counts)
        first = min(budget // (4 * width) - 1, int(read[-1]) + 1 if len(read) else 0)
        if 0 < first < size and counts[:first].sum() >= counts[stay].sum():  # the first ids serve as many lookups
            return _clipped(table, weights, first)
    if not len(stay):
        raise Refused(f"no row was read {bound} times")
    if len(stay) == size:
        raise Refused(f"every row was read {bound} times")
    last = int(stay[-1]) + 1
    mapped = _mapped(table, weights, stay)
    clipped = _clipped(table, weights, last) if last < size else mapped
    return min(clipped, mapped, key=lambda form: form.nbytes)


def _most(size: int, width: int, budget: int) -> int:
    """How many rows fit beside the one that is shared, and the places."""
    for numbers in (np.uint8, np.int16, np.int32):
        rows = (budget - size * np.dtype(numbers).itemsize) // (4 * width) - 1
        if rows <= np.iinfo(numbers).max:
            return rows
    return np.iinfo(np.int32).max


def _shared(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.average(table.astype(np.float64), axis=0, weights=weights)[None].astype(np.float32)


def _clipped(table: np.ndarray, weights: np.ndarray, count: int) -> Vocabulary:
    shared = _shared(table[count:], weights[count:])
    return Vocabulary(len(table), np.concatenate([table[:count], shared]), None)


def _mapped(table: np.ndarray, weights: np.ndarray, stay: np.ndarray) -> Vocabulary:
    gone = np.ones(len(table), bool)
    gone[stay] = False
    numbers = next(t for t in (np.uint8, np.int16, np.int32) if len(stay) <= np.iinfo(t).max)
    places = np.full(len(table), len(stay), numbers)
    places[stay] = np.arange(len(stay))
    return Vocabulary(len(table), np.concatenate([table[stay], _shared(table[gone], weights[gone])]), places)
