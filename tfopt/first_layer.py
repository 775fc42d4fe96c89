"""What the owner's rows say of the inputs of a dense layer: which have one value, and what the others do together.

x W = x[live] W[live] + c W[dead]        where x[dead] = c
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tfopt.calibration import values
from tfopt.model import Model
from tfopt.passes import Data


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box of a matrix: rows [top, bottom), columns [left, right); what lies outside has one value each."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    def of(self, kernel: np.ndarray) -> np.ndarray:
        """What of (T, F, ..) lies inside."""
        return kernel[self.top : self.bottom, self.left : self.right]

    def outside(self, kernel: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The bias that the inputs outside bring: (nodes,) float32.

        Args:
          kernel: (T, F, nodes).
          found: (T F,), the value of each input outside.
        """
        dead = np.ones(kernel.shape[:2], bool)
        self.of(dead)[:] = False
        return (found.reshape(dead.shape)[dead] @ kernel[dead].astype(np.float64)).astype(np.float32)


def constant_inputs(model: Model, data: Data, ref: str, inputs: int) -> np.ndarray:
    """The value of each input of a layer that has only one.

    Args:
      model: the model.
      data: its rows.
      ref: the reference to what the layer reads: (rows, inputs).
      inputs: how many.

    Returns:
      (inputs,) float64, NaN where an input varies.

    Raises:
      TfoptError: the rows do not reach this layer.
    """
    low, high = np.full(inputs, np.inf), np.full(inputs, -np.inf)
    for rows in (data.rows, data.labelled):
        for _, tensors in values(model, data.signature, [ref], rows) if rows is not None else ():
            low = np.minimum(low, tensors[ref].min(axis=0))
            high = np.maximum(high, tensors[ref].max(axis=0))
    return np.where(low == high, low, np.nan)


def box(found: np.ndarray, frames: int, width: int) -> Crop:
    """The smallest box of (T, F) that holds all inputs that vary; `found` is of `constant_inputs`."""
    live = np.isnan(found).reshape(frames, width)
    rows, columns = np.flatnonzero(live.any(axis=1)), np.flatnonzero(live.any(axis=0))
    if not len(rows):
        return Crop(0, frames, 0, width)
    return Crop(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def fewest(found: np.ndarray, nodes: int) -> np.ndarray:
    """Which inputs stay, so that the bytes of weights and of their numbers are fewest: (kept,) ascending.

    Inputs in one piece need no numbers: a slice reads them.

    Args:
      found: of `constant_inputs`.
      nodes: how many weights each input has.
    """
    live = np.flatnonzero(np.isnan(found))
    if not len(live):
        return np.arange(len(found))
    piece = np.arange(live[0], live[-1] + 1)
    return piece if len(piece) * nodes <= len(live) * (nodes + 1) else live


def moments(model: Model, data: Data, ref: str, frames: int, width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Second moments of the inputs of a layer, folded into X (T, F).

    Returns:
      The sums of X X' (T, T) and X' X (F, F) over the rows; None without rows.

    Raises:
      TfoptError: as `constant_inputs`.
    """
    of_frames, of_width = np.zeros((frames, frames)), np.zeros((width, width))
    for rows in (data.rows, data.labelled):
        for _, tensors in values(model, data.signature, [ref], rows) if rows is not None else ():
            x = tensors[ref].reshape(-1, frames, width).astype(np.float64)
            of_frames += np.tensordot(x, x, ([0, 2], [0, 2]))
            of_width += np.tensordot(x, x, ([0, 1], [0, 1]))
    return (of_frames, of_width) if of_width.any() else None
