"""What the Keras model is trained towards: the answers of the original, and labels.

t = a label + (1 - a) teacher(x): every loss here is linear in its target
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.errors import TfoptError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows, and what is to be said to them.

    Attributes:
      inputs: one array for each input of the model.
      targets, losses: one for each output.
    """

    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    losses: list[Any]

    def few(self, number: int) -> list[np.ndarray]:
        """The inputs of so many rows, from everywhere."""
        return [array[:: -(-len(array) // number)] for array in self.inputs]


def examples(teacher: Any, names: list[str], job: dict[str, Any]) -> Examples | None:
    """The rows of a job, and the answers of the original to them.

    Args:
      teacher: the Keras model as it was loaded.
      names: of its inputs.
      job: `rows` and `labelled`, arrays by input name or None; `labels`; `alpha`; `batch_size`.

    Returns:
      The examples; None where there are no rows.

    Raises:
      TfoptError: labels do not fit the output.
    """
    import tf_keras

    sets = [rows for rows in (job["rows"], job["labelled"]) if rows is not None]
    if not sets:
        return None
    inputs = [np.concatenate([rows[name] for rows in sets]) for name in names]
    answers = teacher.predict(inputs, batch_size=job["batch_size"], verbose=0)
    targets = list(answers) if isinstance(answers, list) else [answers]
    labels = job["labels"]
    classes = labels is not None and _are_classes(labels, targets[0])
    if labels is not None and len(targets) > 1:
        raise TfoptError(f"it has {len(targets)} outputs, and labels fit one: leave out --labels")
    losses: list[Any] = []
    for index, target in enumerate(targets):
        within = bool(target.min() >= 0 and target.max() <= 1)
        if target.shape[-1] > 1 and within and np.allclose(target.sum(-1), 1, atol=1e-3):
            losses.append(tf_keras.losses.CategoricalCrossentropy())
        elif classes:
            targets[index] = np.exp(target - target.max(-1, keepdims=True))
            targets[index] /= targets[index].sum(-1, keepdims=True)
            losses.append(tf_keras.losses.CategoricalCrossentropy(from_logits=True))
        elif within:
            losses.append(tf_keras.losses.BinaryCrossentropy())
        else:
            losses.append(_relative_error(float(np.var(target)) or 1.0))
    if labels is not None:
        wanted = np.eye(targets[0].shape[-1])[labels.reshape(-1).astype(int)] if classes else labels
        taught = targets[0][-len(labels) :]
        targets[0][-len(labels) :] = job["alpha"] * wanted.reshape(taught.shape) + (1 - job["alpha"]) * taught
    return Examples(inputs, targets, losses)


def _are_classes(labels: np.ndarray, output: np.ndarray) -> bool:
    """Whether labels are class ids of an output of scores, instead of values like it."""
    width = output.shape[-1]
    if labels.size == output.size:
        return False
    if output.ndim != 2 or labels.size != len(labels):
        raise TfoptError(f"labels of shape {labels.shape} do not fit its output of shape {output.shape}")
    if labels.min() < 0 or labels.max() >= width:
        raise TfoptError(f"labels go from {labels.min()} to {labels.max()}, and its output has {width} classes")
    return True


def _relative_error(variance: float) -> Callable[[Any, Any], Any]:
    import tensorflow as tf

    return lambda wanted, got: tf.reduce_mean(tf.square(wanted - got), axis=-1) / variance
