"""What a step of a training looks at beyond the outputs on the rows as they are: inner tensors, and mixed rows.

    hints   + weight sum over pairs of  |R s - v|^2 / var(v)     (Romero et al. 2015, FitNets)
            s, v inner tensors of student and teacher, R a linear map where their widths differ
    mixup   x' = l x + (1 - l) y,  l ~ Beta(a, a),  against teacher(x')     (Zhang et al. 2018; Beyer et al. 2022)
    until   alpha = 1 after a share of the steps     (Cho and Hariharan 2019)

Hints and mixup want the teacher's answer in the step itself: it is run along, as a part of the same function.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from tfopt.data import Dataset
from tfopt.differentiable import differentiable
from tfopt.errors import TfoptError
from tfopt.graph import join, split
from tfopt.losses import VALUE, Head, Loss, hint, trainable_outputs
from tfopt.model import Model
from tfopt.training_settings import Settings
from tfopt.training_step import Tensors

_HINT = "hint:"


@dataclasses.dataclass(frozen=True)
class Hint:
    """A pair of inner tensors: names of the heads are `hint:<i>`, that of the map between them is `regressor:<i>`."""

    teacher: Head
    student: Head


def hints(teacher: Model | None, student: Model, signature: str, text: str) -> list[Hint]:
    """The pairs that the option names.

    Args:
      teacher, student: where the tensors are.
      signature: which signature.
      text: "a, b" or "a=c, b=d": names of nodes of the teacher, and of the student where they differ.

    Raises:
      TfoptError: no teacher, or no such float tensor.
    """
    if text and teacher is None:
        raise TfoptError("hints: there is no teacher to give them")
    found: list[Hint] = []
    if teacher is None:
        return found
    for index, pair in enumerate(part.strip() for part in text.split(",") if part.strip()):
        own, _, other = pair.partition("=")
        name = f"{_HINT}{index}"
        theirs = _head("teacher", teacher, own, signature, name)
        found.append(Hint(theirs, _head("student", student, other or own, signature, name)))
    return found


def _head(role: str, model: Model, ref: str, signature: str, name: str) -> Head:
    node, port = split(ref.strip())
    outputs = [ref for label, ref in model.graph.outputs.items() if label.startswith(f"{signature}:")]
    live = model.graph.reachable(split(output)[0] for output in outputs)
    if node not in live:
        near = difflib.get_close_matches(node, sorted(live), 3, 0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise TfoptError(f"hints: the {role} has no tensor {ref.strip()!r} in signature {signature!r}{hint}")
    return Head(name, VALUE, join(node, port))


class Lesson:
    """The losses of a step; a callable as `tfopt.training_step.Lesson` describes.

    Attributes:
      regressors: name -> initial value of the maps from a student's hint to the teacher's; to be trained along.
    """

    def __init__(
        self,
        function: Callable[[Tensors, Tensors], Tensors],
        teacher: Model | None,
        signature: str,
        asked: list[Head],
        pairs: list[Hint],
        loss: Loss,
        settings: Settings,
        rows: Dataset,
    ):
        """Prepares it.

        Args:
          function: of the student; gives its heads and hints, by name.
          teacher: as `fine_tune` is given it.
          signature: which signature.
          asked: the heads of the teacher that the loss looks at.
          pairs: the hints.
          loss: of the outputs.
          settings: the fields that are explained above.
          rows: a batch, by which the scale of the hints is known.

        Raises:
          TfoptError: hints of different shapes, mixup without float inputs, or a teacher that keeps state.
        """
        self._function, self._loss, self._settings, self._pairs = function, loss, settings, pairs
        self._live: Callable[[Tensors, Tensors], Tensors] | None = None
        self._weights: dict[str, tf.Tensor] = {}
        self.regressors: dict[str, np.ndarray] = {}
        if teacher is not None and (pairs or settings.mixup):
            asked = [*asked, *(pair.teacher for pair in pairs)]
            self._live = differentiable(trainable_outputs(teacher, signature, asked), signature)
            self._weights = {name: tf.constant(value) for name, value in teacher.weights.items()}
        self._variances = self._measure(rows) if pairs else {}
        self._mixed = [n for n, a in rows.inputs.items() if n not in rows.whole and a.dtype.kind == "f"]
        if settings.mixup and (teacher is None or not self._mixed):
            why = "there is no teacher" if teacher is None else "no input is of a float dtype"
            raise TfoptError(f"mixup: {why}")

    def __call__(self, weights: Tensors, inputs: Tensors, wanted: Tensors, share: tf.Tensor) -> tf.Tensor:
        """The losses (rows,)."""
        outputs = self._function(weights, inputs)
        wanted = dict(wanted)
        if self._settings.teacher_until < 1:
            wanted["alpha:"] = tf.where(share < self._settings.teacher_until, self._settings.alpha, 1.0)
        taught = self._live(self._weights, inputs) if self._live else {}
        if self._settings.mixup:
            wanted |= {name: tf.cast(value, tf.float32) for name, value in taught.items() if name in wanted}
        total = self._loss(outputs, wanted)
        for pair in self._pairs:
            name = pair.student.output
            given = tf.cast(outputs[name], tf.float32)
            if _regressor(name) in weights:
                given = tf.tensordot(given, weights[_regressor(name)], 1)
            total += self._settings.hint_weight * hint(given, taught[name], self._variances[name])
        return total

    def _measure(self, rows: Dataset) -> dict[str, float]:
        """The variance of each hint of the teacher; regressors where widths differ."""
        inputs = {name: tf.constant(array) for name, array in rows.inputs.items()}
        assert self._live is not None
        theirs, ours = self._live(self._weights, inputs), self._function({}, inputs)
        variances = {}
        random = np.random.default_rng(self._settings.seed)
        for pair in self._pairs:
            name = pair.student.output
            given, taught = ours[name], theirs[name]
            if not (given.dtype.is_floating and taught.dtype.is_floating) or given.shape[:-1] != taught.shape[:-1]:
                raise TfoptError(
                    f"hints: {pair.teacher.ref!r} of the teacher is {taught.dtype.name}{list(taught.shape)}, and "
                    f"{pair.student.ref!r} of the student {given.dtype.name}{list(given.shape)}: they may differ in "
                    "the last axis alone"
                )
            if given.shape[-1] != taught.shape[-1]:
                scale = np.sqrt(1 / given.shape[-1])
                value = scale * random.standard_normal((given.shape[-1], taught.shape[-1]))
                self.regressors[_regressor(name)] = value.astype(np.float32)
            variances[name] = float(np.var(taught.numpy(), dtype=np.float64)) or 1.0
        return variances

    def mix(
        self, inputs: dict[str, np.ndarray], wanted: Mapping[str, np.ndarray], random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Mixes each row without a label with the next one of the batch, which has been shuffled."""
        rows = len(inputs[self._mixed[0]])
        share = random.beta(self._settings.mixup, self._settings.mixup, rows)
        share = np.where(wanted.get("labelled:", np.zeros(rows)) > 0, 1.0, share)
        mixed = dict(inputs)
        for name in self._mixed:
            array = inputs[name]
            part = share.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))
            mixed[name] = part * array + (1 - part) * np.roll(array, -1, axis=0)
        return mixed


def _regressor(name: str) -> str:
    return f"regressor:{name.removeprefix(_HINT)}"
