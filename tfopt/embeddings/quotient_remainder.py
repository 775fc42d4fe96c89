"""Two small tables in the place of one: the quotient and the remainder of an id by m each have a row.

    E[i] ~ Q[i // m] R[i mod m]     or     E[i] ~ Q[i // m] + R[i mod m]        elementwise
                                                                      (Shi et al. 2020, Compositional Embeddings)

Both tables start from the trained one: for each column, E seen as a matrix (n / m, m) is fitted by one of rank 1 (or by
row and column effects) by alternating least squares, in which a row counts as often as it is read.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from tfopt.embeddings.tables import Form, Writer, lost
from tfopt.rewrite import Refused

_SWEEPS = 25


class Quotient(Form):
    """Q and R, and how they combine."""

    method = "quotient_remainder"

    def __init__(self, size: int, quotient: np.ndarray, remainder: np.ndarray, multiply: bool):
        self.size = size
        self.multiply = multiply
        self.arrays = {"quotient": quotient, "remainder": remainder}
        how = "product" if multiply else "sum"
        self.detail = f"the {how} of {len(quotient):,} and {len(remainder):,} rows"

    def rows(self) -> np.ndarray:
        """See `Form.rows`."""
        ids = np.arange(self.size)
        quotient, remainder = self.arrays["quotient"], self.arrays["remainder"]
        q, r = quotient[ids // len(remainder)], remainder[ids % len(remainder)]
        return q * r if self.multiply else q + r

    def lookup(self, write: Writer, stored: dict[str, str]) -> str:
        """See `Form.lookup`."""
        quotient, remainder = self.arrays["quotient"], self.arrays["remainder"]
        exact = len(quotient) * len(remainder) == self.size
        ids = write.ids if exact and write.dtype == tf.int32 else write.checked(self.size)
        base = write.constant("base", len(remainder), tf.int32)
        which = {
            "quotient": write.op("quotient", "FloorDiv", ids, base, T=tf.int32),
            "remainder": write.op("remainder", "FloorMod", ids, base, T=tf.int32),
        }
        rows = [write.gather(f"{role}_rows", stored[role], ref, tf.float32, tf.int32) for role, ref in which.items()]
        return write.op("rows", "Mul" if self.multiply else "AddV2", *rows, T=tf.float32)


def fit(table: np.ndarray, weights: np.ndarray, budget: int, seed: int) -> Quotient:
    """The best of four: either table the large one, a product or a sum.

    Args:
      table: (n, d) float32.
      weights: (n,), how much each row counts; positive.
      budget: bytes.
      seed: of the start.

    Raises:
      Refused: too few bytes for two tables that tell all rows apart.
    """
    size, width = table.shape
    total = budget // (4 * width)
    bases = [base for base in range(1, total) if base + -(-size // base) <= total]
    if not bases:
        least = 4 * width * math.ceil(2 * math.sqrt(size))
        raise Refused(f"a quotient and a remainder table take {least:,} bytes at least; {budget:,} are wanted")
    forms = [
        _fit(table, weights, base, multiply, seed)
        for base in dict.fromkeys((bases[-1], bases[0]))
        for multiply in (True, False)
    ]
    return min(forms, key=lambda form: lost(table, form.rows(), weights))


def _fit(table: np.ndarray, weights: np.ndarray, base: int, multiply: bool, seed: int) -> Quotient:
    size, width = table.shape
    count = -(-size // base)
    cells = np.zeros((count * base, width), np.float32)
    cells[:size] = table
    cells = cells.reshape(count, base, width)
    weight = np.zeros(count * base, np.float32)
    weight[:size] = weights / weights.max()
    weight = weight.reshape(count, base)
    start = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    quotient = start if multiply else np.zeros_like(start)
    if multiply:
        # First with equal weights, of which the best is found from anywhere.
        for share in (weight > 0).astype(np.float32), weight:
            for _ in range(_SWEEPS):
                remainder = _ratio(
                    np.einsum("qr,qrd,qd->rd", share, cells, quotient), np.einsum("qr,qd->rd", share, quotient**2)
                )
                quotient = _ratio(
                    np.einsum("qr,qrd,rd->qd", share, cells, remainder), np.einsum("qr,rd->qd", share, remainder**2)
                )
        # A column of Q and one of R share a scale: alike, they learn alike.
        scale = np.sqrt(_ratio(_size_of(remainder), _size_of(quotient)))
        scale = np.where(scale > 0, scale, 1)
        return Quotient(size, (quotient * scale).astype(np.float32), (remainder / scale).astype(np.float32), True)
    sums = np.einsum("qr,qrd->qd", weight, cells), np.einsum("qr,qrd->rd", weight, cells)
    for _ in range(_SWEEPS):
        remainder = _ratio(sums[1] - weight.T @ quotient, weight.sum(axis=0)[:, None])
        quotient = _ratio(sums[0] - weight @ remainder, weight.sum(axis=1)[:, None])
    return Quotient(size, quotient.astype(np.float32), remainder.astype(np.float32), False)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _size_of(array: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(array), axis=0))
