"""Running a signature whose inputs a client must make first, on rows as the original model takes them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.serving.encode import Arrays, Step, encode

Run = Callable[[Arrays], Arrays]


def call(steps: Sequence[Step], run: Run, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """Encodes rows, runs them, and gives the outputs in the order of the rows.

    Args:
      steps: see `tfopt.serving.encode`; none of them leaves the rows as they are.
      run: takes the inputs of the signature.
      inputs: name -> array, as the original signature takes them. Where a step sends some inputs once for all rows,
        rows that agree in them and stand together are one call.

    Raises:
      TfoptError: a value that the form of the request cannot hold.
    """
    try:
        parts = [run(encode(steps, rows)) for rows in _requests(steps, inputs)]
    except ValueError as error:
        raise TfoptError(str(error)) from error
    return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def aligned(rows: Dataset, once: Sequence[str]) -> Dataset:
    """Gives all rows what the first has in some inputs, as a request that sends these once has it.

    Args:
      rows: of arrays, or of serialized tf.Examples.
      once: globs of the names of inputs, or of features.
    """

    def chosen(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in once)

    inputs = dict(rows.inputs)
    for name, array in rows.inputs.items():
        if chosen(name) and name not in rows.whole:
            inputs[name] = np.repeat(array[:1], len(array), axis=0)
        elif array.dtype == object and len(rows.inputs) == 1:
            inputs[name] = _examples_aligned(array, chosen)
    return dataclasses.replace(rows, inputs=inputs)


def _examples_aligned(records: np.ndarray, chosen: Callable[[str], bool]) -> np.ndarray:
    from tensorflow.core.example.example_pb2 import Example

    changed = np.empty_like(records)
    shared: dict[str, Any] | None = None
    for index, record in np.ndenumerate(records):
        example = Example.FromString(record)
        features = example.features.feature
        if shared is None:
            shared = {
                name: value for name, value in Example.FromString(record).features.feature.items() if chosen(name)
            }
        for name in [name for name in features if chosen(name)]:
            del features[name]
        for name, value in shared.items():
            features[name].CopyFrom(value)
        changed[index] = example.SerializeToString(deterministic=True)
    return changed


def _requests(steps: Sequence[Step], inputs: Mapping[str, np.ndarray]) -> Iterator[Arrays]:
    position = next((i for i, step in enumerate(steps) if step["step"] == "once"), None)
    if position is None:
        yield dict(inputs)
        return
    before = encode(steps[:position], inputs)
    sent_once = [before[name] for name in steps[position]["inputs"]]
    count = len(sent_once[0])
    starts = [r for r in range(count) if r == 0 or any(not np.array_equal(a[r], a[r - 1]) for a in sent_once)]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        yield {name: a[start:end] if a.ndim and len(a) == count else a for name, a in inputs.items()}
