"""A sum of float64 numbers that is exact, so that it does not depend on their order or on how they are grouped.

Every finite float64 is an integer times 2^-1126, and so is the sum, which one Python integer holds:

    x = m 2^e, 1/2 <= |m| < 1      x = (2^53 m) 2^(e + 1073) / 2^1126

The integers 2^53 m are added by exponent, in two halves, each of which stays below 2^53 and thus exact in float64.
"""

from __future__ import annotations

import numpy as np

_UNIT = 1126  # the least exponent of frexp is -1073, that of 2^-1074; 53 bits below it the mantissa is whole
_HALF = 27
_CHUNK = 1 << 25


class ExactSum:
    """The sum of what was added.

    Attributes:
      units: the sum of the finite numbers, times 2^1126.
      beyond: the sum of the others, infinity or NaN; 0 where there are none.
    """

    def __init__(self) -> None:
        self.units = 0
        self.beyond = 0.0

    def add(self, terms: np.ndarray) -> None:
        """Adds float64 numbers of any shape."""
        terms = terms.reshape(-1)
        finite = np.isfinite(terms)
        if not finite.all():
            self.beyond += float(terms[~finite].sum())
            terms = terms[finite]
        for start in range(0, len(terms), _CHUNK):
            mantissas, exponents = np.frexp(terms[start : start + _CHUNK])
            whole = np.ldexp(mantissas, 53).astype(np.int64)
            least = int(exponents.min())
            bins = exponents - least
            high = np.bincount(bins, whole >> _HALF).astype(np.int64)
            low = np.bincount(bins, whole & (1 << _HALF) - 1).astype(np.int64)
            for place in np.flatnonzero(high | low):
                self.units += ((int(high[place]) << _HALF) + int(low[place])) << (least + int(place) + 1073)

    def merge(self, other: ExactSum) -> None:
        """Adds what was added to another sum."""
        self.units += other.units
        self.beyond += other.beyond

    def mean(self, count: int) -> float:
        """The sum over a number of terms, rounded once; infinity or NaN where one of them was."""
        return self.units / (count << _UNIT) if self.beyond == 0 else self.beyond
