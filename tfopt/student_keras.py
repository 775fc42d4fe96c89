"""Trains a Keras student as Keras would: batch norms by the statistics of the batch, dropout on.

    min over W of  loss(f(W, x; training=True), teacher(x)),    judged by f(W, x; training=False)

In a child process, since there is only one Keras in a process; loss, optimizer, schedule and checkpoints are those of
every other training here.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfopt import distribution
from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.losses import SIGMOID, SOFTMAX, heads
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.student import Names, dress
from tfopt.training_data import Goal, goal
from tfopt.training_loop import Teaching, train
from tfopt.training_settings import History, Settings
from tfopt.training_step import Tensors

_TIMEOUT = 7 * 24 * 3600.0  # seconds: a training is as long as its owner makes it
_LEAST = 1e-7  # of a probability whose logarithm is taken, and of what it lacks to 1


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the child is to do.

    Attributes:
      goal: rows, and what is right.
      kinds: output -> its kind as the file has it: of a softmax or a sigmoid it gives probabilities.
      names: what the file calls its inputs and outputs -> the original's names.
      settings, checkpoint: see `tfopt.training_loop.train`.
      destination: the SavedModel to write.
    """

    goal: Goal
    kinds: Mapping[str, str]
    names: tuple[Names, Names]
    settings: Settings
    checkpoint: Path | None
    destination: Path


def teach(
    path: str | Path, student: Model, names: tuple[Names, Names], data: Any, settings: Settings, checkpoint: Path | None
) -> tuple[Model, History]:
    """Trains the model of a Keras file.

    Args:
      path: the file, already checked for code that it may carry (see `tfopt.keras_file`).
      student: it, loaded and dressed as the original (see `tfopt.student`).
      names: what it calls the inputs and outputs of its main signature -> the original's names.
      data: `passes.Data`.
      settings: how to train.
      checkpoint: a directory from which a killed run goes on, or None.

    Returns:
      The trained student, dressed, and what happened.

    Raises:
      TfoptError: it cannot be trained.
    """
    for option in ("hints", "mixup"):
        if getattr(settings, option):
            raise TfoptError(f"distill: {option} wants a SavedModel as the student; received student={path}")
    if distribution.current() is not None:
        raise TfoptError(f"distill: --strategy wants a SavedModel as the student; received student={path}")
    lessons = goal(student, data.signature, data.rows, data.teacher, data.labelled, settings.batch_size)
    kinds = {head.output: head.kind for head in heads(student, data.signature)}
    failures = []
    with tempfile.TemporaryDirectory(prefix="tfopt-student-") as work:
        job = _Job(lessons, kinds, names, settings, checkpoint, Path(work) / "trained")
        for library in ("keras", "tf_keras"):
            environ = {"KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "1" if library == "tf_keras" else "0"}
            with Child("tfopt.student_keras:worker", environ) as child:
                try:
                    child.ask((library, str(path), settings.seed), _TIMEOUT)
                except ChildError as error:
                    failures.append(f"{library}: {error}")
                    continue
                try:
                    history = child.ask(job, _TIMEOUT)
                except ChildError as error:
                    raise TfoptError(f"distill: student={path}: {error}") from error
                trained = load_model(job.destination)
                dress(trained, data.teacher, str(path))
                return trained, history
    raise TfoptError(f"distill: student={path} cannot be loaded to be trained. {'; '.join(failures)}")


def worker() -> Callable[[Any], History | None]:
    """The worker of the child: takes (library, file, seed), and then a job."""
    loaded: list[tuple[str, Any]] = []

    def answer(request: tuple[str, str, int] | _Job) -> History | None:
        if isinstance(request, _Job):
            return _train(*loaded[-1], request)
        library, path, seed = request
        if library == "keras":
            import keras

            keras.utils.set_random_seed(seed)  # of dropout
            loaded.append((library, keras.saving.load_model(path, compile=False)))
        else:
            import tf_keras

            tf_keras.utils.set_random_seed(seed)
            loaded.append((library, tf_keras.models.load_model(path, compile=False)))
        return None

    return answer


def _train(library: str, model: Any, job: _Job) -> History:
    call = _call(model, job)
    settings = job.settings
    step_loss = job.goal.loss(settings, judged=False)

    def lesson(_: Tensors, inputs: Tensors, wanted: Tensors, share: tf.Tensor) -> tf.Tensor:
        if settings.teacher_until < 1:
            wanted = {**wanted, "alpha:": tf.where(share < settings.teacher_until, settings.alpha, 1.0)}
        losses = step_loss(call(inputs, True), wanted)
        return losses + tf.add_n(model.losses) if model.losses else losses  # regularizers of its own

    def plain(variables: list[Any]) -> dict[str, tf.Variable]:
        own = [v.value if library == "keras" else v for v in variables]
        return {f"{index} {variables[index].name}": variable for index, variable in enumerate(own)}

    history = train(
        lambda _, inputs: call(inputs, False),
        plain(model.trainable_variables),
        job.goal.rows,
        job.goal.wanted,
        job.goal.loss(settings, judged=True),
        settings,
        teaching=Teaching(lesson, state=plain(model.non_trainable_variables)),
        checkpoint=job.checkpoint,
        title="distill",
    )
    model.export(str(job.destination))
    return history


def _call(model: Any, job: _Job) -> Callable[[Tensors, bool], dict[str, tf.Tensor]]:
    """f(inputs, training) -> what losses look at, all by the original's names."""
    names, results = job.names
    order = [tensor.name.split(":")[0] for tensor in model.inputs]
    if len(order) == 1:
        order = list(names)
    if set(order) != set(names):
        raise TfoptError(f"its inputs are {', '.join(order)}, and its signature has {', '.join(names)}")

    def call(inputs: Tensors, training: bool) -> dict[str, tf.Tensor]:
        fed = [inputs[names[name]] for name in order]
        given = model(fed if len(fed) > 1 else fed[0], training=training)
        if not isinstance(given, Mapping):
            flat = tf.nest.flatten(given)
            given = {f"output_{index}": value for index, value in enumerate(flat)}
        return {
            results[n]: _logits(tf.cast(value, tf.float32), job.kinds.get(results[n])) for n, value in given.items()
        }

    return call


def _logits(value: tf.Tensor, kind: str | None) -> tf.Tensor:
    """What a softmax or a sigmoid was taken of, up to a constant that neither sees."""
    if kind == SOFTMAX:
        return tf.math.log(tf.maximum(value, _LEAST))
    if kind == SIGMOID:
        value = tf.clip_by_value(value, _LEAST, 1 - _LEAST)
        return tf.math.log(value) - tf.math.log1p(-value)
    return value
