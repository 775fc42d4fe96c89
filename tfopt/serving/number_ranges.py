"""Floats as integers of one byte.

x ~ q scale + offset    q = round((x - offset) / scale), 0 <= q <= 255
"""

from __future__ import annotations

import dataclasses

import numpy as np

LEVELS = 255
# How pictures are scaled: (offset, scale).
_PICTURES = (
    (0.0, 1.0),
    (0.0, 1 / 255),
    (-1.0, 2 / 255),
    (-0.5, 1 / 255),
    (0.0, 1 / 256),
    (-1.0, 1 / 128),
    (-128.0, 1.0),
)
_EXACT = 1e-6  # of the range: rounding of float32


@dataclasses.dataclass(frozen=True)
class Range:
    """Scale and offset, one of each or one for each column, and whether all rows are met but for rounding."""

    scale: np.ndarray
    offset: np.ndarray
    exact: bool

    def restored(self, values: np.ndarray) -> np.ndarray:
        """What the model computes of values that were sent as bytes, in float32."""
        sent = np.clip(np.rint((values.astype(np.float64) - self.offset) / self.scale), 0, LEVELS).astype(np.float32)
        return sent * self.scale.astype(np.float32) + self.offset.astype(np.float32)


def byte_range(values: np.ndarray, by_column: bool) -> Range:
    """The scale and offset that hold rows of finite floats.

    Args:
      values: the rows, on axis 0.
      by_column: whether each column of (rows, columns) gets its own.
    """
    values = values.astype(np.float64)
    if not by_column:
        scale, offset, exact = _fitted(values.reshape(-1))
        return Range(np.array(scale), np.array(offset), exact)
    found = [_fitted(column) for column in values.T]
    scales, offsets = (np.array([each[i] for each in found]) for i in range(2))
    return Range(scales, offsets, all(each[2] for each in found))


def _fitted(values: np.ndarray) -> tuple[float, float, bool]:
    distinct = np.unique(values)
    least, most = float(distinct[0]), float(distinct[-1])
    tolerance = _EXACT * max(abs(least), abs(most), 1e-30)
    for offset, scale in _PICTURES:
        levels = (distinct - offset) / scale
        inside = levels[0] > -0.01 and levels[-1] < LEVELS + 0.01
        if inside and np.abs(np.rint(levels) * scale + offset - distinct).max() <= tolerance:
            return scale, offset, True
    if len(distinct) == 1:
        return 1.0, least, True
    step = float(np.diff(distinct).min())
    if len(distinct) <= LEVELS + 1 and round((most - least) / step) <= LEVELS:
        levels = np.rint((distinct - least) / step)
        if np.abs(levels * step + least - distinct).max() <= tolerance:
            return step, least, True
    return (most - least) / LEVELS, least, False
