"""Fine-tunes the weights of any model: towards what a teacher says to rows without labels, towards labels, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import tensorflow as tf

from tfopt import distribution
from tfopt.data import Dataset, batch_size
from tfopt.differentiable import differentiable
from tfopt.errors import TfoptError
from tfopt.invariants import hold
from tfopt.lessons import Lesson, hints
from tfopt.losses import heads, trainable_outputs
from tfopt.model import Model
from tfopt.trainable import demote, promote
from tfopt.training_data import check_rows, goal, targets
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
    check_rows(rows, teacher, labelled)
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
        lessons = goal(model, signature, rows, teacher, labelled, settings.batch_size, output)
        data = lessons.rows
        initial, keep = hold({name: model.weights[name] for name in chosen})
        teaching = Teaching()
        if settings.hints or settings.mixup or settings.teacher_until < 1:
            own = {head.output: head for head in heads(teacher, signature, every=True)} if teacher else {}
            asked = [own[head.output] for head in lessons.heads if head.output in own]
            some = data.take(slice(0, settings.batch_size))
            loss = lessons.loss(settings, judged=False)
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
            lessons.wanted,
            lessons.loss(settings, judged=True),
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
