"""Rows of two widths: frequent ones whole, rare ones narrow, and a matrix that widens these.

    E[i] = F[p(i)]  where p(i) < f,   else   N[p(i) - f] P          p: the place of an id, frequent ones first
                                                                    (Ginart et al. 2021, Mixed Dimension Embeddings)

N P is the truncated SVD of the rare rows, each weighted as it is read. How many rows stay whole follows, for each
width, from the bytes; the width is the one that loses least. Where ids are numbered by frequency already, or nearly so,
p is not stored.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.embeddings.tables import Form, Writer
from tfopt.rewrite import Refused

_WIDTHS = 12  # that are tried at most


class Mixed(Form):
    """F, N and P; and p, unless it changes nothing."""

    method = "mixed_dimension"

    def __init__(self, frequent: np.ndarray, rare: np.ndarray, projection: np.ndarray, places: np.ndarray | None):
        self.size = len(frequent) + len(rare)
        self.arrays = {"frequent": frequent, "rare": rare, "projection": projection}
        if places is not None:
            self.arrays["places"] = places
        self.detail = f"{len(frequent):,} rows whole, {len(rare):,} of width {rare.shape[1]}"

    def rows(self) -> np.ndarray:
        """See `Form.rows`."""
        placed = np.concatenate([self.arrays["frequent"], self.arrays["rare"] @ self.arrays["projection"]])
        return placed[self.arrays["places"]] if "places" in self.arrays else placed

    def lookup(self, write: Writer, stored: dict[str, str]) -> str:
        """See `Form.lookup`."""
        if write.rank == 0:
            raise Refused("it is looked up by a single id, which has no row axis")
        count = len(self.arrays["frequent"])
        place, dtype = write.ids, write.dtype
        if "places" in stored:
            kept = tf.as_dtype(self.arrays["places"].dtype)
            place = write.cast(write.gather("place", stored["places"], place, kept, dtype), kept, tf.int32)
            dtype = tf.int32
        first = write.constant("count", count, dtype)
        # Ids that are out of range stay so in one of the two lookups.
        near = write.op("frequent", "Minimum", place, write.constant("last", count - 1, dtype), T=dtype)
        after = write.op("after", "Sub", place, first, T=dtype)
        far = write.op("rare", "Maximum", after, write.constant("zero", 0, dtype), T=dtype)
        whole = write.gather("whole", stored["frequent"], near, tf.float32, dtype)
        narrow = write.gather("narrow", stored["rare"], far, tf.float32, dtype)
        op = "MatMul" if write.rank == 1 else "BatchMatMulV2"
        wide = write.op("wide", op, narrow, stored["projection"], T=tf.float32)
        is_whole = write.op("is_frequent", "Less", place, first, T=dtype)
        axis = write.constant("axis", -1, tf.int32)
        mask = write.op("mask", "ExpandDims", is_whole, axis, T=tf.bool, Tdim=tf.int32)
        return write.either("rows", mask, whole, wide, tf.float32)


def fit(table: np.ndarray, weights: np.ndarray, budget: int) -> Mixed:
    """The division that loses least.

    Args:
      table: (n, d) float32.
      weights: (n,), how much each row counts; positive.
      budget: bytes.

    Raises:
      Refused: too few bytes for even the narrowest rows.
    """
    size, width = table.shape
    if width < 2:
        raise Refused("its rows have one element, and cannot be narrower")
    by_frequency = np.argsort(-weights, kind="stable")
    numbers = np.int16 if size <= 1 << 15 else np.int32
    options = []
    for order, overhead in ((None, 0), (by_frequency, size * np.dtype(numbers).itemsize)):
        ordered, share = (table, weights) if order is None else (table[order], weights[order])
        for narrow in dict.fromkeys(np.geomspace(1, width - 1, _WIDTHS).round().astype(int).tolist()):
            spare = budget - overhead - 4 * narrow * (size + width)
            count = min(spare // (4 * (width - narrow)), size - narrow)
            if count > 0:
                rare, of = ordered[count:], share[count:, None]
                energy = np.linalg.eigvalsh((rare * of).T.astype(np.float64) @ rare)
                options.append((float(energy[: width - narrow].sum()), narrow, int(count), order is not None))
    if not options:
        raise Refused(f"{budget:,} bytes hold no narrow rows beside a whole one")
    _, narrow, count, sort = min(options)
    order = by_frequency if sort else np.arange(size)
    ordered, share = table[order], weights[order]
    rare = ordered[count:]
    _, vectors = np.linalg.eigh((rare * share[count:, None]).T.astype(np.float64) @ rare)
    projection = np.ascontiguousarray(vectors[:, ::-1][:, :narrow].T.astype(np.float32))
    places = None
    if sort:
        places = np.empty(size, numbers)
        places[order] = np.arange(size)
    return Mixed(ordered[:count].copy(), rare @ projection.T, projection, places)
