"""Scores and labels as models and datasets give them, brought to one form for the metrics.

Notation of shapes: N rows, C classes. Nothing here depends on how rows are cut into batches.
"""

from __future__ import annotations

import numpy as np

from tfopt.errors import TfoptError


def class_scores(
    scores: np.ndarray, labels: np.ndarray, least: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Class scores and class ids; the steps of a sequence count as rows.

    Args:
      scores: (N,), (N, C), or (N, T, C) for sequences of T steps.
      labels: class ids (N,) or (N, 1), or one-hot (N, C); the same of every step.
      least, most: how many columns the scores may have.

    Returns:
      float64 (rows, C) in C order, int64 (rows,).

    Raises:
      TfoptError: shapes that do not fit, or labels that are no class ids.
    """
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
    return columns.astype(np.float64, order="C"), ids.astype(np.int64)


def class_ids(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores that are class ids themselves, and the labels, (rows,) each; None where the scores are others.

    Raises:
      TfoptError: quantized scores, which look like class ids.
    """
    if scores.dtype.kind not in "iu" or scores.size != labels.size:
        return None
    if scores.dtype.itemsize < 4:
        raise TfoptError(f"wants scores as floats, received a column of quantized {scores.dtype}")
    return scores.ravel(), labels.ravel()


def difference(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """s - y in float64, never broadcast: shapes may differ by axes of size 1 only.

    Raises:
      TfoptError: they differ otherwise.
    """
    if [d for d in scores.shape[1:] if d != 1] != [d for d in labels.shape[1:] if d != 1]:
        raise TfoptError(f"wants scores and labels of one shape, received {scores.shape} and {labels.shape}")
    return scores.astype(np.float64) - labels.astype(np.float64).reshape(scores.shape)


def in_unit_interval(scores: np.ndarray) -> bool:
    """Whether all scores are in [0, 1], as probabilities are."""
    return bool(scores.min(initial=0) >= 0 and scores.max(initial=0) <= 1)


def _rows_by_columns(scores: np.ndarray, per_step: bool) -> np.ndarray:
    if scores.ndim == 1:
        return scores[:, None]
    if per_step or set(scores.shape[1:-1]) <= {1}:
        return scores.reshape(-1, scores.shape[-1])
    raise TfoptError(f"wants scores (rows,) or (rows, classes), received {scores.shape}")
