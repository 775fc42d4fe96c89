"""Rows shared by chance: k hash functions give an id k rows of small tables, whose sum is its embedding.

    E[i] ~ sum_j H_j[h_j(i)]        h_j(i) = ((a_j i + b_j) mod p) mod m,  p a prime >= n   (Carter and Wegman 1979)
                                    (Weinberger et al. 2009; k of them: Svenstrup et al. 2017, without their weights)

The tables start from the trained one: in turn, each row becomes the mean of what is left over for the ids that share
it, each weighted as often as it is read, which is block coordinate descent on the least squares.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.embeddings.tables import Form, Writer
from tfopt.rewrite import Refused

_SWEEPS = 25
_LIMIT = (1 << 31) - 1  # a i + b stays in 32 bits, which every runtime multiplies alike


class Hashing(Form):
    """The tables H_j and the factors of their hash functions."""

    method = "hashing"

    def __init__(self, size: int, buckets: int, prime: int, factors: list[tuple[int, int]], width: int):
        self.size = size
        self.buckets = buckets
        self.prime = prime
        self.factors = factors
        self.arrays = {f"hashed_{j}": np.zeros((buckets, width), np.float32) for j in range(len(factors))}
        self.detail = f"the sum of {len(factors)} of {buckets:,} hashed rows"

    def indices(self) -> list[np.ndarray]:
        """h_j of every id, for each j: (n,) int64."""
        ids = np.arange(self.size, dtype=np.int64)
        return [(a * ids + b) % self.prime % self.buckets for a, b in self.factors]

    def rows(self) -> np.ndarray:
        """See `Form.rows`."""
        found = zip(self.arrays.values(), self.indices(), strict=True)
        return np.sum([table[index] for table, index in found], axis=0)

    def lookup(self, write: Writer, stored: dict[str, str]) -> str:
        """See `Form.lookup`."""
        ids = write.checked(self.size)
        bad = write.op("bad", "Less", ids, write.constant("zero", 0, tf.int32), T=tf.int32)
        prime = write.constant("prime", self.prime, tf.int32)
        buckets = write.constant("buckets", self.buckets, tf.int32)
        total = ""
        for (role, table), (a, b) in zip(stored.items(), self.factors, strict=True):
            product = write.op(f"{role}/product", "Mul", ids, write.constant(f"{role}/a", a, tf.int32), T=tf.int32)
            shifted = write.op(f"{role}/sum", "AddV2", product, write.constant(f"{role}/b", b, tf.int32), T=tf.int32)
            mixed = write.op(f"{role}/mixed", "FloorMod", shifted, prime, T=tf.int32)
            index = write.op(f"{role}/bucket", "FloorMod", mixed, buckets, T=tf.int32)
            index = write.either(f"{role}/index", bad, ids, index, tf.int32)  # a lookup of -1 fails
            rows = write.gather(f"{role}/rows", table, index, tf.float32, tf.int32)
            total = write.op("rows", "AddV2", total, rows, T=tf.float32) if total else rows
        return total


def fit(table: np.ndarray, weights: np.ndarray, budget: int, hashes: int, seed: int) -> Hashing:
    """Hashed tables that come near a trained one.

    Args:
      table: (n, d) float32.
      weights: (n,), how much each row counts; positive.
      budget: bytes.
      hashes: k.
      seed: of the hash functions.

    Raises:
      Refused: too few bytes for two rows a hash function.
    """
    size, width = table.shape
    buckets = budget // (4 * width * hashes)
    if buckets < 2:
        raise Refused(f"{budget:,} bytes hold fewer than two rows for each of {hashes} hash functions")
    prime = _prime(max(size, buckets))
    largest = min(prime - 1, (_LIMIT - prime) // size)
    random = np.random.default_rng(seed)
    factors = [(int(random.integers(1, largest + 1)), int(random.integers(prime))) for _ in range(hashes)]
    form = Hashing(size, buckets, prime, factors, width)
    left = table.astype(np.float32)  # what the sums miss
    share = weights.astype(np.float64)
    indices = form.indices()
    masses = [np.bincount(index, share, buckets)[:, None] for index in indices]
    for _ in range(_SWEEPS if hashes > 1 else 1):
        for hashed, index, mass in zip(form.arrays.values(), indices, masses, strict=True):
            sums = np.stack([np.bincount(index, share * column, buckets) for column in left.T], axis=1)
            change = np.divide(sums, mass, out=np.zeros_like(sums), where=mass > 0).astype(np.float32)
            hashed += change
            left -= change[index]
    return form


def _prime(least: int) -> int:
    """The smallest prime that is at least `least`."""
    number = max(least, 2)
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
