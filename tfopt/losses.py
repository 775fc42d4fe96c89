"""What a student is trained on: its outputs against a teacher's, against labels, or both.

With student logits z and teacher logits v, at temperature T (Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a
neural network", equation 4: soft targets are scaled by T^2, so that their gradients keep their size):

    softmax   (1 - alpha) T^2 KL(softmax(v / T) || softmax(z / T)) + alpha CE(y, softmax(z))
    sigmoid   (1 - alpha) T^2 KL(Bernoulli(v / T) || Bernoulli(z / T)) + alpha CE(y, sigmoid(z))
    value     ((1 - alpha) (v - z)^2 + alpha (y - z)^2) / var(v)

in nats, the mean over what a row holds: pixels, steps, values. alpha is 0 for rows without a label, and 1 without a
teacher. Several outputs are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.graph import join, split
from tfopt.inline import label, tensor_names
from tfopt.model import Model

SOFTMAX, SIGMOID, PROBABILITIES, VALUE = "softmax", "sigmoid", "probabilities", "value"

_THROUGH = ("Identity", "Reshape", "Squeeze", "ExpandDims", "Cast", "StopGradient", "Snapshot")
_KINDS = {"Softmax": SOFTMAX, "LogSoftmax": SOFTMAX, "Sigmoid": SIGMOID}
_LEAST = 1e-7  # of a probability whose logarithm is taken

Loss = Callable[[Mapping[str, tf.Tensor], Mapping[str, tf.Tensor]], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Head:
    """A float output as the loss sees it.

    Attributes:
      output: its name in the signature.
      kind: "softmax" or "sigmoid" (logits below one), "probabilities" (rows that sum to 1), or "value".
      ref: what the loss is computed on: the logits, or the output itself.
      variance: of the targets, by which a squared error is divided.
    """

    output: str
    kind: str
    ref: str
    variance: float = 1.0


def heads(model: Model, signature: str, *, every: bool = False) -> list[Head]:
    """The float outputs of a signature, with the logits where they end in a softmax or a sigmoid.

    An output that is just the logits of another one is left out, unless `every` is set.

    Raises:
      TfoptError: no output is of a float dtype.
    """
    found = []
    for name, info in sorted(model.signatures[signature].outputs.items()):
        if [component for component, _ in tensor_names(info)] != [""] or not tf.as_dtype(info.dtype).is_floating:
            continue
        ref = model.graph.outputs[label(signature, name, "")]
        inner = _below(model, ref)
        kind = _KINDS.get(model.graph.producer(inner).op, VALUE)
        if kind != VALUE:
            ref = model.graph.producer(inner).input[0]
        found.append(Head(name, kind, join(*split(ref))))
    logits = {_below(model, head.ref) for head in found if head.kind != VALUE}
    kept = [head for head in found if every or head.kind != VALUE or _below(model, head.ref) not in logits]
    if not kept:
        names = ", ".join(sorted(model.signatures[signature].outputs))
        raise TfoptError(f"signature {signature!r} has no float output to train on; its outputs are {names}")
    return kept


def _below(model: Model, ref: str) -> str:
    """The reference behind ops that only reshape, cast or fake-quantize."""
    while True:
        node = model.graph.producer(ref)
        if (node.op not in _THROUGH and not node.op.startswith("FakeQuant")) or not model.graph.data_inputs(node):
            return join(*split(ref))
        ref = node.input[0]


def trainable_outputs(model: Model, signature: str, found: list[Head]) -> Model:
    """A copy of a model whose signature gives just what the losses need, under the names of the heads."""
    copy = model.copy()
    outputs = copy.signatures[signature].outputs
    for name in list(outputs):
        if name not in {head.output for head in found}:
            del outputs[name]
    for head in found:
        outputs[head.output].name = outputs[head.output].name or head.ref  # an inner tensor becomes an output
    kept = {label(signature, head.output, ""): head.ref for head in found}
    others = {key: ref for key, ref in copy.graph.outputs.items() if not key.startswith(f"{signature}:")}
    copy.graph.outputs = {**others, **kept}
    return copy


def refine(head: Head, target: np.ndarray) -> Head:
    """A head with what its targets tell: their variance, and whether a value is really probabilities."""
    columns = head.kind == VALUE and target.size and target.ndim > 1 and target.shape[-1] > 1
    if columns and target.min() >= 0 and np.allclose(target.sum(axis=-1, dtype=np.float64), 1, atol=1e-3):
        head = dataclasses.replace(head, kind=PROBABILITIES)
    variance = float(np.var(target, dtype=np.float64)) if target.size else 1.0
    return dataclasses.replace(head, variance=variance if variance > 0 else 1.0)


def label_head(
    found: list[Head], labels: np.ndarray, shapes: Mapping[str, tuple[int, ...]], output: str | None
) -> Head:
    """The head that labels belong to; class ids make logits of a value of several columns.

    Args:
      found: the heads.
      labels: rows on axis 0.
      shapes: output -> shape of what the loss is computed on.
      output: the name that the user gave, or None.

    Raises:
      TfoptError: no such output, or several that could be meant.
    """
    if output is not None:
        chosen = [head for head in found if head.output == output]
    else:
        kinds = [[h for h in found if h.kind in k] for k in ((SOFTMAX, PROBABILITIES), (SIGMOID,))]
        chosen = next((of_kind for of_kind in (found, *kinds) if len(of_kind) == 1), [])
    if not chosen:
        names = ", ".join(sorted(head.output for head in found))
        raise TfoptError(f"which output do the labels belong to? Received {output!r}; choose from {names}")
    head = chosen[0]
    shape = shapes[head.output]
    classes = labels.dtype.kind in "iub" and labels.size == labels.shape[0]
    if head.kind == VALUE and len(shape) == 2 and shape[1] > 1 and classes:
        head = dataclasses.replace(head, kind=SOFTMAX)
    return head


def prepare_labels(head: Head, labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels as the loss takes them: int32 class ids, or float32 of the shape of the head.

    Args:
      head: whose labels they are.
      labels: class ids, one-hot rows, or values.
      shape: of what the loss is computed on, rows included.

    Raises:
      TfoptError: they do not fit.
    """
    labels = np.asarray(labels)
    problem = f"output {head.output!r} ({head.kind}) is {list(shape)}, and the labels are {labels.dtype}"
    problem += f"{list(labels.shape)}"
    if labels.dtype.kind not in "iufb":
        raise TfoptError(f"{problem}: wants numbers")
    if head.kind in (SOFTMAX, PROBABILITIES):
        if labels.size == np.prod(shape) and labels.shape[-1] == shape[-1]:
            labels = labels.reshape(shape).argmax(axis=-1)
        if labels.size != np.prod(shape[:-1]):
            raise TfoptError(f"{problem}: wants one class id per row, or one-hot rows")
        if labels.min() < 0 or labels.max() >= shape[-1] or np.any(labels != np.floor(labels)):
            raise TfoptError(f"{problem}, from {labels.min()} to {labels.max()}: wants class ids below {shape[-1]}")
        return labels.reshape(shape[:-1]).astype(np.int32)
    if labels.size != np.prod(shape):
        raise TfoptError(f"{problem}: wants as many values as the output has")
    if head.kind == SIGMOID and (labels.min() < 0 or labels.max() > 1):
        raise TfoptError(f"{problem}, from {labels.min()} to {labels.max()}: wants labels from 0 to 1")
    return labels.reshape(shape).astype(np.float32)


def distillation(found: list[Head], labelled: Head | None, alpha: float, temperature: float, taught: bool) -> Loss:
    """The loss of a batch.

    Args:
      found: the heads, refined.
      labelled: the head that labels belong to, or None.
      alpha: the share of the labels' loss in that of a labelled row.
      temperature: T.
      taught: whether there is a teacher.

    Returns:
      (outputs, targets) -> (rows,) float32. `targets` holds the teacher's values by output, and where there are labels
      "labels:" and "labelled:", a float32 vector that is 1 for rows with a label; "alpha:" is an alpha for this batch.
    """

    def loss(outputs: Mapping[str, tf.Tensor], targets: Mapping[str, tf.Tensor]) -> tf.Tensor:
        total = tf.zeros([], tf.float32)
        for head in found:
            student = tf.cast(outputs[head.output], tf.float32)
            soft = _soft(head, student, targets[head.output], temperature) if taught else None
            if labelled is not None and labelled.output == head.output:
                hard = _hard(labelled, student, targets["labels:"])
                share = targets["labelled:"] * (targets.get("alpha:", alpha) if taught else 1.0)
                soft = hard * share if soft is None else (1 - share) * soft + share * hard
            if soft is not None:
                total += soft
        return total

    return loss


def hint(student: tf.Tensor, teacher: tf.Tensor, variance: float) -> tf.Tensor:
    """(v - s)^2 / var(v) of an inner tensor, the mean of each row: (rows,) float32."""
    return _per_row(tf.math.squared_difference(tf.cast(student, tf.float32), tf.cast(teacher, tf.float32))) / variance


def _soft(head: Head, student: tf.Tensor, teacher: tf.Tensor, temperature: float) -> tf.Tensor:
    if head.kind == VALUE:
        return _per_row(tf.math.squared_difference(student, teacher)) / head.variance
    if head.kind == PROBABILITIES:
        student, teacher = (tf.math.log(tf.maximum(p, _LEAST)) for p in (student, teacher))
    z, v = student / temperature, teacher / temperature
    if head.kind == SIGMOID:
        p = tf.sigmoid(v)
        cross = tf.nn.sigmoid_cross_entropy_with_logits
        divergence = cross(labels=p, logits=z) - cross(labels=p, logits=v)
    else:
        p = tf.nn.softmax(v)
        divergence = tf.nn.softmax_cross_entropy_with_logits(p, z)
        divergence -= tf.nn.softmax_cross_entropy_with_logits(p, v)
    return temperature**2 * _per_row(divergence)


def _hard(head: Head, student: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    if head.kind == VALUE:
        return _per_row(tf.math.squared_difference(student, labels)) / head.variance
    if head.kind == SIGMOID:
        return _per_row(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=student))
    if head.kind == PROBABILITIES:
        student = tf.math.log(tf.maximum(student, _LEAST))
    return _per_row(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=student))


def _per_row(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.reshape(values, [tf.shape(values)[0], -1]), axis=1)
