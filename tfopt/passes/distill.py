"""distill: trains the weights, or a student in place of the model, to answer as the original does or as labels say.

min over W of  (1 - alpha) T^2 KL(teacher(x) / T || f(W, x) / T) + alpha CE(y, f(W, x))     (Hinton et al. 2015)

Without a student it is the training that follows every compression, as a step by itself: longer, with other settings,
or after several compressions at once. `losses.py` has the whole equation, `lessons.py` hints and mixed rows.
"""

from __future__ import annotations

from typing import Any

from tfopt import recipe, student_keras
from tfopt import student as students
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass, get
from tfopt.recovery import OPTIONS, recover, settings_of
from tfopt.rewrite import Log
from tfopt.sources import KERAS_SUFFIXES
from tfopt.training import History
from tfopt.verify import Verifier


def run(model: Model, log: Log, data: Data, student: str = "", **training: Any) -> None:
    """Trains, in place; zeros of sparse kernels and clusters stay.

    Args:
      model: the model.
      log: gets how the loss fell.
      data: with representative rows, labelled rows, or both.
      student: a SavedModel directory or a Keras file that takes the place of the model; "" trains the model itself.
      **training: see OPTIONS, and `Settings` for what they mean. A student takes epochs=0 too: it is taken as it is.

    Raises:
      TfoptError: no rows, no epochs, nothing that can be trained, or a student that is none.
    """
    epochs = training.get("epochs", OPTIONS["epochs"])
    if epochs or not student:
        data.need_rows("distill")
    if student:
        before = model.weight_bytes
        history = _replace(model, log, data, student, **training)
        log.applied["model replaced by a student"] += 1
        log.notes.append(f"{before:,} bytes of weights became the {model.weight_bytes:,} of {student}")
    elif not epochs:
        raise TfoptError("distill: with epochs=0 it does nothing; give it some, or leave it out of the recipe")
    else:
        history = recover(model, log, data, "distill", **training)
    if history is not None and history.best_step:
        log.applied["weight trained"] += len(history.trained)


def _replace(model: Model, log: Log, data: Data, path: str, **training: Any) -> History | None:
    """Puts a student in the place of a model, and trains it."""
    student, names = students.load(path, data.teacher)
    if not path.lower().endswith(KERAS_SUFFIXES):
        student = _lossless(student, log, data.seed)
        history = recover(student, log, data, "distill", **training)
    else:
        history, settings = None, settings_of(data, training)
        if settings.epochs:
            checkpoint = data.checkpoint / "distill" if data.checkpoint else None
            student, history = student_keras.teach(path, student, names[data.signature], data, settings, checkpoint)
            log.notes.append(history.summary())
        student = _lossless(student, log, data.seed)
    vars(model).update(vars(student))
    return history


def _lossless(student: Model, log: Log, seed: int) -> Model:
    """What the lossless passes make of it, which the model has had already."""
    verifier, simpler = Verifier(student, None, seed), student.copy()
    for name, options in recipe.read("lossless").steps:
        get(name).run(simpler, Log(), **options)
    problem = verifier.check(simpler).broken
    if problem is not None:
        log.warnings.append(f"distill: the lossless passes were undone on the student: {problem}")
    return student if problem else simpler


PASS = Pass(
    "distill",
    run,
    options={
        "student": "",
        **OPTIONS,
        **{"optimizer": "adam", "weight_decay": 1e-4, "patience": 3, "validation": 0.1, "max_steps": 0},
        **{"teacher_until": 1.0, "hints": "", "hint_weight": 1.0, "mixup": 0.0, "checkpoint_steps": 500},
    },
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
