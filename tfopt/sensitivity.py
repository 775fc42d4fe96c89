"""Sensitivity: the error that changing one layer alone brings to the outputs of a model.

    e_L = sum (f(x; W_L -> W'_L) - f(x))^2 / sum f(x)^2

noise over signal, of the worst output. Small errors of several layers add up: their noise is hardly correlated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tfopt.data import Dataset, batch_size
from tfopt.function import Function
from tfopt.model import Model
from tfopt.verify import input_specs

_BATCH = 128


def sensitivity(
    model: Model, signature: str, rows: Dataset, changes: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Measures what each of several changes does to the outputs, one at a time, in one session.

    Args:
      model: with all weights as they should be.
      signature: the one that the rows are of.
      rows: what to run it on; where its batch is fixed, rows that do not fill one are left out.
      changes: name of a change -> reference of a weight or constant -> what to put in its place.

    Returns:
      Name -> noise over signal; infinity where an output is not finite, 0 where there is no float output.
    """
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {name: {} for name in changes}
    fixed = batch_size(input_specs(model, signature), 0)
    with Function(model) as function:
        for batch in rows.take(slice(0, len(rows) // fixed * fixed if fixed else None)).batches(fixed or _BATCH):
            wanted = {k: v.astype(np.float64) for k, v in function(signature, batch).items() if v.dtype.kind == "f"}
            for output, value in wanted.items():
                signal[output] = signal.get(output, 0.0) + float(np.sum(value**2))
            for name, change in changes.items():
                received = function(signature, batch, change)
                for output, value in wanted.items():
                    error = float(np.sum((received[output] - value) ** 2))
                    noise[name][output] = noise[name].get(output, 0.0) + error
    return {
        name: max((_ratio(error, signal[output]) for output, error in errors.items()), default=0.0)
        for name, errors in noise.items()
    }


def _ratio(noise: float, signal: float) -> float:
    return noise / max(signal, 1e-30) if np.isfinite(noise) else float("inf")
