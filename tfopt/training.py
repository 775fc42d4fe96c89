"""Fine-tunes the weights of any model: towards what a teacher says to rows without labels, towards labels, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from tfopt import distribution
from tfopt.data import Dataset, batch_size
from tfopt.differentiable import differentiable
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.invariants import hold
from tfopt.lessons import Lesson, hints
from tfopt.losses import (
    PROBABILITIES,
    VALUE,
    Head,
    distillation,
    heads,
    label_head,
    prepare_labels,
    refine,
    trainable_outputs,
)
from tfopt.model import Model
from tfopt.trainable import demote, promote
from tfopt.training_loop import Schedule, Teaching, Tensors, Transform, train
from tfopt.training_settings import History, Settings
from tfopt.verify import input_specs

__all__ = ["History", "Schedule", "Settings", "Transform", "demote", "fine_tune", "promote", "targets", "train"]


def fine_tune(
    model: Model,
    signature: str,
    rows: Dataset | None,
    teacher: Model | None,
    labelled: Dataset | None = None,
    settings: Settings | None = None,
    *,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    names: Iterable[str] | None = None,
    output: str | None = None,
    checkpoint: str | Path | None = None,
    title: str = "fine-tuning",
) -> History:
    """Trains the weights of a model, in place; zeros of sparse kernels and clusters stay (see `tfopt.invariants`).

    Args:
      model: the student; its structure stays as it is.
      signature: the one that is trained; others that share its weights follow.
      rows: inputs for which the teacher says what is right, or None.
      teacher: a model with the same signature, or None to learn from labels alone. It may be any model whose outputs
        are of the student's shapes.
      labelled: inputs with labels, or None.
      settings: how to train.
      transform: makes the weights of the variables; what it gives for weights of the model is what they become. It may
        give weights that are no variables.
      schedule: what changes between steps, such as masks that `transform` reads.
      names: the weights to train, which must be weights already (see `promote`); None trains all that can be.
      output: the output that the labels belong to; it may be left out where that is clear.
      checkpoint: a directory from which a killed run goes on.
      title: of the progress bar.

    Returns:
      What happened; the weights are those with the lowest loss on rows held back.

    Raises:
      TfoptError: no rows, no float output, no trainable weights, labels that do not fit, an op without a gradient.
    """
    settings = settings or Settings()
    parts = [part for part in (rows if teacher else None, labelled) if part is not None]
    if not parts:
        raise TfoptError("fine-tuning wants rows and a teacher, or labelled rows; received neither")
    if labelled is not None and labelled.labels is None:
        raise TfoptError(f"{labelled.source}: holds no labels")
    specs = input_specs(model, signature)
    size = batch_size(specs, 0)
    settings = dataclasses.replace(settings, batch_size=size or settings.batch_size)
    before = set(model.weights)
    chosen = promote(model, signature) if names is None else list(names)
    made = set(chosen) - before
    try:
        found = heads(model, signature)
        pairs = hints(teacher, model, signature, settings.hints)
        student = trainable_outputs(model, signature, [*found, *(pair.student for pair in pairs)])
        function = differentiable(student, signature)
        missing = [name for name in chosen if name not in model.weights]
        if missing or not chosen:
            what = f"{missing[0]!r} is no weight" if missing else "no float32 constant can be trained"
            raise TfoptError(f"signature {signature!r} cannot be fine-tuned: {what}")
        data = _together(parts)
        if teacher is None:
            found, wanted = _of_itself(model, signature, found, data.take(slice(0, settings.batch_size)))
        else:
            found, wanted = targets(teacher, signature, data, settings.batch_size, found)
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
        loss = distillation(found, labels, settings.alpha, settings.temperature, teacher is not None)
        exam = loss
        if settings.teacher_until < 1:  # in the end the labels count
            exam = distillation(found, labels, 1.0, settings.temperature, teacher is not None)
        initial, keep = hold({name: model.weights[name] for name in chosen})
        teaching = Teaching()
        if settings.hints or settings.mixup or settings.teacher_until < 1:
            own = {head.output: head for head in heads(teacher, signature, every=True)} if teacher else {}
            asked = [own[head.output] for head in found if head.output in own]
            some = data.take(slice(0, settings.batch_size))
            lesson = Lesson(function, teacher, signature, asked, pairs, loss, settings, some)
            teaching = Teaching(lesson, lesson.mix if settings.mixup else None)
            initial |= lesson.regressors

        def whole(variables: Mapping[str, tf.Variable]) -> Tensors:
            kept = keep(variables)
            return {**kept, **(transform({**variables, **kept}) if transform else {})}

        with distribution.scope():
            variables = {name: tf.Variable(value, name=f"w{i}") for i, (name, value) in enumerate(initial.items())}
        history = train(
            function,
            variables,
            data,
            wanted,
            exam,
            settings,
            transform=whole,
            schedule=schedule,
            teaching=teaching,
            checkpoint=checkpoint,
            fixed_batch=bool(size),
            title=title,
        )
        weights = {**variables, **whole(variables)}
        for name in weights.keys() & model.weights.keys():
            model.weights[name] = tf.convert_to_tensor(weights[name]).numpy().astype(model.weights[name].dtype)
    finally:
        demote(model, made)
    return history


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
