"""Running a signature whose inputs a client must make first, on rows as the original model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

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
