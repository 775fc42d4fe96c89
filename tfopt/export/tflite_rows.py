"""Representative rows: which to take, whether they are sound, and as calls of the signatures of a .tflite file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import runtime
from tfopt.data import Dataset

_PROBE_ROWS = 2


def pick(dataset: Dataset, limit: int) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Returns up to `limit` evenly spaced rows (sorted data would show one class only), and what has no rows."""
    picks = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int))
    arrays = {n: array if n in dataset.whole else array[picks] for n, array in dataset.inputs.items()}
    return arrays, dataset.whole


def not_finite(key: str, dataset: Dataset) -> str | None:
    """Returns which rows hold NaN or infinity, in one line."""
    for name, array in dataset.inputs.items():
        if array.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1) if array.ndim else array).all(axis=-1))
            if len(bad):
                more = f" and {len(bad) - 1} more rows" if len(bad) > 1 else ""
                what = f"input '{name}' of signature '{key}' is NaN or infinite in row {bad[0]}{more}"
                return f"the representative data ({dataset.source}) are bad: {what}; leave these out"
    return None


def calls(job: Mapping[str, Any]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns the rows of a job (`signatures`, `rows`, `float32`) as calls: one fixed batch, or one row, at a time."""
    stored = pickle.loads(Path(job["rows"]).read_bytes())
    with runtime.open(job["float32"]) as program:
        # What has no inputs needs no data.
        stored |= {key: ({}, frozenset()) for key, value in program.signatures.items() if not value.inputs}
        return {
            key: list(_calls(stored[key][0], stored[key][1], program.signatures[key]))
            for key in job["signatures"]
            if key in stored
        }


def _calls(
    inputs: Mapping[str, np.ndarray], whole: frozenset[str], signature: runtime.Signature
) -> Iterator[dict[str, np.ndarray]]:
    by_row = [name for name in inputs if name not in whole]
    shapes = [signature.inputs[name].shape for name in by_row]
    size = max((shape[0] or 1 for shape in shapes if shape), default=1)
    total = len(inputs[by_row[0]]) if by_row else 1
    for start in range(0, max(total - size, 0) + 1, size):
        call = {name: array if name in whole else array[start : start + size] for name, array in inputs.items()}
        yield {
            name: array if array.dtype == object else np.asarray(array, signature.inputs[name].dtype)
            for name, array in call.items()
        }


def probes(signature: runtime.Signature) -> list[dict[str, np.ndarray]]:
    """Returns random calls, which show whether a file runs at all."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(_PROBE_ROWS):
        call = {}
        for name, spec in signature.inputs.items():
            shape = [size or 1 for size in spec.shape or ()]
            if spec.dtype == "string":
                call[name] = np.full(shape, b"", object)
            else:
                call[name] = random.uniform(0, 1, shape).astype(spec.dtype)
        made.append(call)
    return made
