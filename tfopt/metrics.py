"""Quality metrics of scores, and their evaluation over a dataset; `tfopt.tally` has the formulas.

Notation: N rows, C classes, s scores, y labels, 1[.] the indicator function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from tfopt import tally
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.report import Metric

METRICS = tuple(tally.METRICS)
HIGHER_IS_BETTER: dict[str, bool] = {name: name in ("accuracy", "top5", "auc", "f1") for name in METRICS}


def drop(reference: Metric, metric: Metric) -> float:
    """Returns how much worse `metric` is than `reference`, in the metric's own units; negative where it is better."""
    worse = reference.value - metric.value
    return worse if HIGHER_IS_BETTER[metric.name] else -worse


def agreement(scores: np.ndarray, reference: np.ndarray) -> float | None:
    """Returns the share of rows with the same top class: mean_i 1[argmax_j s_ij = argmax_j r_ij].

    None where the outputs are no class scores: other than two axes, or a single column.
    """
    if scores.shape != reference.shape or scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        return None
    return float(np.mean(scores.argmax(axis=1) == reference.argmax(axis=1)))


def score(name: str, scores: np.ndarray, labels: np.ndarray) -> Metric:
    """Computes a metric.

    Args:
        name: one of METRICS.
        scores: (N,), (N, 1) or (N, C) class scores, probabilities or class ids, or values of any shape.
        labels: class ids (N,) or (N, 1), one-hot (N, C), or values of the scores' shape.

    Raises:
        TfoptError: an unknown metric, or scores and labels that it cannot compare.
    """
    found = tally.tally(name)
    found.add(scores, labels)
    return found.value()


def evaluate(
    name: str,
    run: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
    dataset: Dataset,
    output: str | None = None,
    *,
    batch_size: int = 32,
    pad: bool = False,
) -> Metric:
    """Runs a program over labelled rows, and scores one of its outputs.

    Args:
        name: one of METRICS.
        run: inputs by name -> outputs by name.
        dataset: with labels.
        output: name of the output to score; it may be left out where one alone is of a float dtype.
        batch_size: rows per call (`data.batch_size` gives that of a signature with a fixed batch).
        pad: fill the last batch with copies of its last row, for programs that take full batches only.

    Raises:
        TfoptError: no labels, an unknown metric or output, or shapes that do not fit.
    """
    if dataset.labels is None:
        raise TfoptError(f"{dataset.source}: {name} needs labels, and there are none")
    found = tally.tally(name)
    start = 0
    with tqdm(total=len(dataset), desc=name, unit="row", leave=False, disable=None) as bar:
        for batch in dataset.batches(batch_size):
            rows = next((len(a) for n, a in batch.items() if n not in dataset.whole), 1)
            missing = batch_size - rows if pad else 0
            if missing:
                batch = {
                    n: a if n in dataset.whole else np.concatenate([a, *[a[-1:]] * missing]) for n, a in batch.items()
                }
            outputs = run(batch)
            output = output or _only_float(name, outputs)
            if output not in outputs:
                raise TfoptError(f"{name}: no output '{output}': choose from {', '.join(sorted(outputs))}")
            result = np.asarray(outputs[output])
            if not result.ndim or len(result) != rows + missing:
                raise TfoptError(
                    f"{name}: wants one row of output '{output}' per row of input, "
                    f"received {result.shape} for {rows + missing} rows"
                )
            found.add(result[:rows], dataset.labels[start : start + rows])
            start += rows
            bar.update(rows)
    return found.value()


def _only_float(name: str, outputs: Mapping[str, np.ndarray]) -> str:
    """Returns the output that needs no choosing: the only one, or the only one of a float dtype."""
    floats = [n for n, value in outputs.items() if len(outputs) == 1 or np.asarray(value).dtype.kind in "fV"]
    if len(floats) != 1:
        raise TfoptError(f"{name}: which output holds the scores? Choose from {', '.join(sorted(floats or outputs))}")
    return floats[0]
