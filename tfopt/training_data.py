"""What a training is to bring about: rows, and for each what a teacher or a label says is right."""

from __future__ import annotations

import dataclasses

import numpy as np
from absl import logging
from tqdm import tqdm

from tfopt.data import Dataset, batch_size
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.losses import (
    PROBABILITIES,
    VALUE,
    Head,
    Loss,
    distillation,
    heads,
    label_head,
    prepare_labels,
    refine,
    trainable_outputs,
)
from tfopt.model import Model
from tfopt.training_settings import Settings
from tfopt.verify import input_specs


@dataclasses.dataclass(frozen=True)
class Goal:
    """Rows and what is right for them.

    Attributes:
      rows: unlabelled ones, and after them the labelled.
      wanted: what losses compare outputs with, by name; as many rows.
      heads: the student's outputs as losses see them.
      labelled: the head that labels belong to, or None.
      taught: whether there is a teacher.
    """

    rows: Dataset
    wanted: dict[str, np.ndarray]
    heads: list[Head]
    labelled: Head | None
    taught: bool

    def loss(self, settings: Settings, *, judged: bool) -> Loss:
        """The loss of a batch, in a step or where weights are judged: where the teacher leaves, labels decide."""
        alpha = 1.0 if judged and settings.teacher_until < 1 else settings.alpha
        return distillation(self.heads, self.labelled, alpha, settings.temperature, self.taught)


def check_rows(rows: Dataset | None, teacher: Model | None, labelled: Dataset | None) -> list[Dataset]:
    """The parts that there are to train on.

    Raises:
      TfoptError: none, or labelled rows without labels.
    """
    parts = [part for part in (rows if teacher else None, labelled) if part is not None]
    if not parts:
        raise TfoptError("fine-tuning wants rows and a teacher, or labelled rows; received neither")
    if labelled is not None and labelled.labels is None:
        raise TfoptError(f"{labelled.source}: holds no labels")
    return parts


def goal(
    model: Model,
    signature: str,
    rows: Dataset | None,
    teacher: Model | None,
    labelled: Dataset | None,
    size: int,
    output: str | None = None,
) -> Goal:
    """Asks the teacher, and fits the labels to their output.

    Args:
      model: the student.
      signature: which signature.
      rows, teacher, labelled, output: see `fine_tune`.
      size: rows of a call.

    Raises:
      TfoptError: no rows, no float output, outputs that are not alike, labels that do not fit.
    """
    data = _together(check_rows(rows, teacher, labelled))
    found = heads(model, signature)
    if teacher is None:
        found, wanted = _of_itself(model, signature, found, data.take(slice(0, size)))
    else:
        found, wanted = targets(teacher, signature, data, size, found)
    shapes = {name: (len(data), *value.shape[1:]) for name, value in wanted.items()}
    wanted = wanted if teacher else {}
    labels = None
    if labelled is not None and labelled.labels is not None:
        labels = label_head(found, labelled.labels, shapes, output)
        found = [labels if head.output == labels.output else head for head in found]
        values = prepare_labels(labels, labelled.labels, (len(labelled), *shapes[labels.output][1:]))
        if teacher is None:
            labels = refine(labels, values) if labels.kind == VALUE else labels
        rest = len(data) - len(labelled)
        wanted["labels:"] = np.concatenate([np.zeros((rest, *values.shape[1:]), values.dtype), values])
        wanted["labelled:"] = np.repeat(np.array([0, 1], np.float32), [rest, len(labelled)])
    return Goal(data, wanted, found, labels, teacher is not None)


def targets(
    teacher: Model, signature: str, rows: Dataset, size: int, wanted: list[Head]
) -> tuple[list[Head], dict[str, np.ndarray]]:
    """What a teacher says to rows, computed once.

    Args:
      teacher: the model.
      signature: which signature.
      rows: the inputs.
      size: rows a call; a teacher with a fixed batch has its own.
      wanted: the student's heads.

    Returns:
      The heads that have a row for each row of the inputs, with what the targets tell of them; output name -> float32
      logits or values.

    Raises:
      TfoptError: an output that the teacher does not have or makes in another way, or that is not finite.
    """
    own = {head.output: head for head in heads(teacher, signature, every=True)}
    for head in wanted:
        if head.output not in own or own[head.output].kind != head.kind:
            kind = own[head.output].kind if head.output in own else "missing"
            raise TfoptError(
                f"output {head.output!r} of signature {signature!r} is {kind} in the teacher, and {head.kind} in the "
                "model: they must be alike"
            )
    size = batch_size(input_specs(teacher, signature), size)
    asked = [own[head.output] for head in wanted]
    parts: dict[str, list[np.ndarray]] = {head.output: [] for head in wanted}
    with (
        Function(trainable_outputs(teacher, signature, asked)) as function,
        tqdm(total=len(rows), desc="teacher", unit="row", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(rows), size):
            chosen = np.arange(start, min(start + size, len(rows)))
            padded = np.resize(chosen, size)
            inputs = {n: a if n in rows.whole else a[padded] for n, a in rows.inputs.items()}
            for name, value in function(signature, inputs).items():
                if name in parts and value.ndim and len(value) == size:
                    parts[name].append(value[: len(chosen)].astype(np.float32))
                elif parts.pop(name, None) is not None:
                    logging.warning("output %r has no row for each row of the inputs: not trained on", name)
            bar.update(len(chosen))
    if not parts:
        raise TfoptError(f"signature {signature!r} has no float output with a row for each row of its inputs")
    arrays = {name: np.concatenate(batches) for name, batches in parts.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
            raise TfoptError(f"{rows.source}: output {name!r} of the teacher is not finite for row {row}")
    return [refine(head, arrays[head.output]) for head in wanted if head.output in arrays], arrays


def _of_itself(
    model: Model, signature: str, found: list[Head], rows: Dataset
) -> tuple[list[Head], dict[str, np.ndarray]]:
    """Heads and shapes without a teacher: the model's own outputs on some rows."""
    refined, values = targets(model, signature, rows, len(rows), found)
    return [head if head.kind == PROBABILITIES else dataclasses.replace(head, variance=1.0) for head in refined], values


def _together(parts: list[Dataset]) -> Dataset:
    """Rows without labels, and after them the labelled ones."""
    first = parts[0]
    inputs = {
        name: array if name in first.whole else np.concatenate([part.inputs[name] for part in parts])
        for name, array in first.inputs.items()
    }
    return Dataset(inputs, None, ", ".join(part.source for part in parts), first.whole)
