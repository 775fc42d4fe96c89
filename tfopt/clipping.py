"""What to cut off: from the values seen of a tensor to the range [low, high] in which it is quantized.

A range and b bits give the affine quantization of TFLite, whose zero point is an integer, so that 0 is exact:

    s = (high - low) / (2^b - 1)     z = round(-low / s)
    q(x) = clip(round(x / s) + z, 0, 2^b - 1)            x' = s (q(x) - z)

    minmax       all that was seen
    percentile   the p-th and (100 - p)-th percentile of the values
    mse          argmin over [low, high] of E (x - x')^2
    entropy      argmin over T of KL(P || Q), P the values in [-T, T] with what lies outside at its ends, Q the same in
                 2^b steps (Migacz, "8-bit Inference with TensorRT", GTC 2017)

0 is the edge of a bin of the histograms, and zeros are counted apart: they cost nothing under any range.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

METHODS = ("minmax", "percentile", "mse", "entropy")

# Bins on the longer side of 0.
_BINS = 4096

# The search for the least error: (step, as a fraction of the extremes; which ends move).
_TURNS = tuple((step, sides) for step in (1 / 32, 1 / 32, 1 / 256) for sides in ([0, 1], [0], [1]))

# A range narrower than this has a scale with which no int32 bias can be written; all zeros are exact in any range.
_NARROWEST = 1e-9


@dataclasses.dataclass
class Observed:
    """What was seen of one tensor.

    Attributes:
      low, high: extremes, and 0 where all values lie on one side of it.
      zeros: how many values are exactly 0.
      negative, positive: counts of the other values by |x|, in bins of `width` from 0 outwards.
      width: of a bin.
    """

    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    negative: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    positive: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    width: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts values, all of them within the extremes."""
        if not self.width:
            self.width = max(-self.low, self.high) / _BINS or 1.0
            self.negative, self.positive = (np.zeros(math.ceil(end / self.width)) for end in (-self.low, self.high))
        values = values.reshape(-1)
        self.zeros += values.size - int(np.count_nonzero(values))
        for counts, side in ((self.positive, values[values > 0]), (self.negative, values[values < 0])):
            if side.size and len(counts):
                bins = np.minimum((np.abs(side) / side.dtype.type(self.width)).astype(np.intp), len(counts) - 1)
                counts += np.bincount(bins, minlength=len(counts))

    def merge(self, other: Observed) -> None:
        """Takes in what was seen elsewhere of the same tensor: extremes, and counts of bins of the same width.

        Counts are whole numbers below 2^53, so that any order and grouping gives the same.

        Raises:
          ValueError: bins of another width: both must have begun with the extremes of all values.
        """
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.width:
            if not self.width:
                self.width = other.width
                self.negative, self.positive = (np.zeros(len(side)) for side in (other.negative, other.positive))
            if self.width != other.width:
                raise ValueError(f"bins of width {other.width} cannot be added to bins of width {self.width}")
            self.negative, self.positive = self.negative + other.negative, self.positive + other.positive
        self.zeros += other.zeros


def clipped(seen: Observed, method: str, bits: int = 8, percentile: float = 99.99) -> tuple[float, float]:
    """The range that a method gives; see `ranges`."""
    low, high = seen.low, seen.high
    if method == "percentile":
        total = seen.zeros + seen.negative.sum() + seen.positive.sum()
        beyond = total * (100 - percentile) / 100
        low = 0.0 - _quantile(seen.negative, seen.width, -low, beyond)
        high = _quantile(seen.positive, seen.width, high, beyond)
    elif method == "mse":
        low, high = _least_error(seen, bits)
    elif method == "entropy":
        threshold = _least_divergence(seen, bits)
        low, high = max(low, -threshold), min(high, threshold)
    if high == low:
        return 0.0, 1.0
    return low, max(high, low + _NARROWEST)


def _quantile(counts: np.ndarray, width: float, extreme: float, beyond: float) -> float:
    """The |x| of one side that `beyond` values exceed."""
    inner = np.concatenate([[0.0], np.cumsum(counts)])
    kept = inner[-1] - beyond
    return 0.0 if kept <= 0 else min(extreme, float(np.interp(kept, inner, np.arange(len(inner)) * width)))


def _least_error(seen: Observed, bits: int) -> tuple[float, float]:
    """The range of least squared error, by turns over its two ends, on finer and finer grids."""
    x = np.concatenate([-(np.arange(len(seen.negative)) + 0.5), np.arange(len(seen.positive)) + 0.5]) * seen.width
    counts = np.concatenate([seen.negative, seen.positive])
    x, counts = x[counts > 0], counts[counts > 0]
    ends = best = np.array([seen.low, seen.high])
    for spacing, sides in _TURNS:
        if ends[sides].any():
            reach = spacing * (np.arange(-8, 9) if spacing < 1 / 32 else np.arange(-31, 32))
            candidates = np.tile(best, (len(reach), 1))
            fractions = candidates[:, sides] / (ends[sides] + (ends[sides] == 0)) + reach[:, None]
            candidates[:, sides] = np.clip(fractions, spacing, 1) * ends[sides]
            best = candidates[np.argmin(_errors(x, counts, candidates, bits, seen.width))]
    return float(best[0]), float(best[1])


def _errors(x: np.ndarray, counts: np.ndarray, candidates: np.ndarray, bits: int, width: float) -> np.ndarray:
    """The squared error of every candidate [low, high] on a histogram."""
    low, high = candidates[:, :1], candidates[:, 1:]
    levels = 2**bits - 1
    step = (high - low) / levels
    zero = np.round(-low / step)
    back = step * (np.clip(np.round(x / step), -zero, levels - zero))
    error = (x - back) ** 2
    # Steps finer than bins: rounding is uniform noise, and only what is cut off is left to be counted.
    outside = np.maximum(np.maximum(step * -zero - x, x - step * (levels - zero)), 0)
    return np.where(step > 2 * width, error, outside**2 + step**2 / 12) @ counts


def _least_divergence(seen: Observed, bits: int) -> float:
    """The threshold on |x| of least divergence, over at most 128 candidates."""
    counts = np.zeros(_BINS + 2)
    for side in (seen.negative, seen.positive):
        counts[: len(side)] += side
    counts = counts.reshape(-1, 2).sum(axis=1)
    total, width = len(counts), 2 * seen.width
    best, least = total, math.inf
    for size in range(total, 0, -max(total // 128, 1)):
        threshold = size * width
        span = min(threshold, seen.high) + min(threshold, -seen.low)
        levels = int(2**bits * threshold / max(span, width))
        if levels >= size or not counts[:size].any():
            break
        inside = counts[:size]
        seen_as = inside.copy()
        seen_as[-1] += counts[size:].sum()
        group = np.arange(size) * levels // size
        filled = seen_as > 0
        sums, sizes = (np.bincount(group, weights, levels) for weights in (inside, filled))
        given = np.where(filled, (sums / np.maximum(sizes, 1))[group], 0)
        # Half a count where the quantized values have none, so that the divergence stays finite.
        given = np.where(filled, np.maximum(given, 0.5), 0)
        p, q = seen_as[filled] / seen_as.sum(), given[filled] / given.sum()
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < least:
            best, least = size, divergence
    return best * width
