"""Quality metrics in plain NumPy, float64, and their evaluation over a dataset.

Every metric is a function (scores, labels) -> float. Notation: N rows, C classes, s scores, y labels, 1[.] the
indicator function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.report import Metric


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose predicted class is the label: mean_i 1[c(s_i) = y_i].

    c(s) is argmax_j s_ij for C >= 2 columns; for one column it is 1[p_i > 0.5] (see `positive_probability`), or the
    scores themselves where they are integer class ids.
    """
    predicted, truth = _classes(scores, labels)
    return float(np.mean(predicted == truth))


def top5(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose label is among the five highest scores: mean_i 1[#{j : s_ij > s_iy} < 5].

    Of equal scores the first class counts as the higher one, as argmax has it.
    """
    scores, truth = _class_scores(scores, labels, least=2)
    of_label = np.take_along_axis(scores, truth[:, None], axis=1)
    before = np.arange(scores.shape[1]) < truth[:, None]
    return float(np.mean(np.count_nonzero((scores > of_label) | (before & (scores == of_label)), axis=1) < 5))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: P(s+ > s-) + P(s+ = s-) / 2 for a random positive and a random negative row.

    By ranks, ties having the mean of theirs: (sum of the positives' ranks - P (P + 1) / 2) / (P Q), with P positive
    and Q negative rows. Of two columns the second is the positive class.
    """
    scores, truth = _class_scores(scores, labels, least=1, most=2)
    positive = truth == 1
    p, q = np.count_nonzero(positive), np.count_nonzero(~positive)
    if not p or not q:
        raise TfoptError(f"auc: wants rows of both classes, received {p} positive and {q} negative ones")
    _, inverse, counts = np.unique(scores[:, -1], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * q))


def f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """F1 = 2 TP / (2 TP + FP + FN): of class 1 where there are two, else the mean over the classes that occur."""
    predicted, truth = _classes(scores, labels)
    seen = np.union1d(predicted, truth)
    binary = _rows_by_columns(scores).shape[1] <= 2 and seen.max() <= 1
    values = []
    for c in [1] if binary else seen:
        hits = np.count_nonzero((predicted == c) & (truth == c))
        total = np.count_nonzero(predicted == c) + np.count_nonzero(truth == c)
        values.append(2 * hits / total if total else 0.0)
    return float(np.mean(values))


def logloss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy in nats: -mean_i log p_iy, probabilities clipped to [1e-15, 1].

    C >= 2 columns are probabilities where all are in [0, 1] (each row is divided by its sum), else logits:
    p = softmax(s). For one column see `positive_probability`.
    """
    scores, truth = _class_scores(scores, labels, least=1)
    if scores.shape[1] == 1:
        p = positive_probability(scores[:, 0])
        scores = np.stack([1 - p, p], axis=1)
    elif scores.min() < 0 or scores.max() > 1:
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    sums = scores.sum(axis=1)
    p = np.take_along_axis(scores, truth[:, None], axis=1)[:, 0] / np.where(sums > 0, sums, 1)
    return float(-np.mean(np.log(np.clip(p, 1e-15, 1))))


def mse(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error: mean (s - y)^2 over all elements."""
    return float(np.mean(_difference(scores, labels) ** 2))


def rmse(scores: np.ndarray, labels: np.ndarray) -> float:
    """Root of the mean squared error: sqrt(mean (s - y)^2)."""
    return float(np.sqrt(np.mean(_difference(scores, labels) ** 2)))


def mae(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean absolute error: mean |s - y| over all elements."""
    return float(np.mean(np.abs(_difference(scores, labels))))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    f.__name__: f for f in (accuracy, top5, auc, f1, logloss, mse, rmse, mae)
}
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


def positive_probability(scores: np.ndarray) -> np.ndarray:
    """Returns the probability of the positive class: s where all scores are in [0, 1], else 1 / (1 + exp(-s))."""
    if scores.min() >= 0 and scores.max() <= 1:
        return scores
    return np.exp(-np.logaddexp(0, -scores))


def score(name: str, scores: np.ndarray, labels: np.ndarray) -> Metric:
    """Computes a metric.

    Args:
        name: a key of METRICS.
        scores: (N,), (N, 1) or (N, C) class scores, probabilities or class ids, or values of any shape.
        labels: class ids (N,) or (N, 1), one-hot (N, C), or values of the scores' shape.

    Raises:
        TfoptError: an unknown metric, or scores and labels that it cannot compare.
    """
    if name not in METRICS:
        raise TfoptError(f"metric '{name}' is unknown: choose from {', '.join(METRICS)}")
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not scores.ndim or not labels.ndim or len(scores) != len(labels):
        raise TfoptError(
            f"{name}: wants one row of scores per label, received scores {scores.shape} and labels {labels.shape}"
        )
    if not len(scores):
        raise TfoptError(f"{name}: received no rows")
    for what, array in (("scores", scores), ("labels", labels)):
        if array.dtype.kind in "OSUMmc":
            raise TfoptError(f"{name}: wants {what} that are numbers, received {array.dtype} {array.shape}")
        not_finite = ~np.isfinite(array.astype(np.float64)).reshape(len(array), -1)
        if bad := np.count_nonzero(not_finite.any(axis=1)):
            raise TfoptError(f"{name}: the {what} hold NaN or infinity in {bad} of {len(array)} rows")
    try:
        return Metric(name, METRICS[name](scores, labels), len(scores))
    except TfoptError as error:
        raise TfoptError(f"{name}: {error}") from error


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
        name: a key of METRICS.
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
    if name not in METRICS:
        raise TfoptError(f"metric '{name}' is unknown: choose from {', '.join(METRICS)}")
    parts = []
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
            parts.append(result[:rows])
            bar.update(rows)
    if len({part.shape[1:] for part in parts}) > 1:
        raise TfoptError(f"{name}: output '{output}' changes its shape between batches")
    return score(name, np.concatenate(parts), dataset.labels)


def _only_float(name: str, outputs: Mapping[str, np.ndarray]) -> str:
    """Returns the output that needs no choosing: the only one, or the only one of a float dtype."""
    floats = [n for n, value in outputs.items() if len(outputs) == 1 or np.asarray(value).dtype.kind in "fV"]
    if len(floats) != 1:
        raise TfoptError(f"{name}: which output holds the scores? Choose from {', '.join(sorted(floats or outputs))}")
    return floats[0]


def _class_scores(
    scores: np.ndarray, labels: np.ndarray, least: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores (rows, C) in float64 and class ids (rows,); the steps of a sequence count as rows."""
    received = f"scores {scores.shape}, labels {labels.shape}"
    per_step = scores.ndim > 2 and labels.shape in (scores.shape, scores.shape[:-1], (*scores.shape[:-1], 1))
    columns = _rows_by_columns(scores, per_step)
    rows, classes = columns.shape
    if classes < least or (most is not None and classes > most):
        wanted = f"{least} columns or more" if most is None else f"{least} to {most} columns"
        raise TfoptError(f"wants scores of {wanted}, received {received}")
    if labels.size == rows:
        ids = labels.reshape(rows)
    elif labels.size == columns.size and labels.shape[-1] == classes:
        one_hot = labels.reshape(columns.shape)
        if not (np.isin(one_hot, (0, 1)).all() and (one_hot.sum(axis=1) == 1).all()):
            raise TfoptError(f"wants one-hot labels, received others of the same shape {labels.shape}")
        ids = one_hot.argmax(axis=1)
    else:
        raise TfoptError(f"wants labels of one class id per row, or one-hot, received {received}")
    highest = max(classes, 2) - 1
    wrong = ids[(ids != np.floor(ids)) | (ids < 0) | (ids > highest)]
    if len(wrong):
        raise TfoptError(f"wants labels that are class ids from 0 to {highest}, received {wrong[0]}")
    return columns.astype(np.float64), ids.astype(np.int64)


def _classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the predicted and the true class ids, (rows,) each."""
    if scores.dtype.kind in "iu" and scores.size == labels.size:
        if scores.dtype.itemsize < 4:
            raise TfoptError(f"wants scores as floats, received a column of quantized {scores.dtype}")
        return scores.ravel(), labels.ravel()
    columns, truth = _class_scores(scores, labels, least=1)
    if columns.shape[1] == 1:
        return (positive_probability(columns[:, 0]) > 0.5).astype(np.int64), truth
    return columns.argmax(axis=1), truth


def _rows_by_columns(scores: np.ndarray, per_step: bool = False) -> np.ndarray:
    if scores.ndim == 1:
        return scores[:, None]
    if per_step or set(scores.shape[1:-1]) <= {1}:
        return scores.reshape(-1, scores.shape[-1])
    raise TfoptError(f"wants scores (rows,) or (rows, classes), received {scores.shape}")


def _difference(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns s - y in float64, never broadcast: shapes may differ by axes of size 1 only."""
    if [d for d in scores.shape[1:] if d != 1] != [d for d in labels.shape[1:] if d != 1]:
        raise TfoptError(f"wants scores and labels of one shape, received {scores.shape} and {labels.shape}")
    return scores.astype(np.float64) - labels.astype(np.float64).reshape(scores.shape)
