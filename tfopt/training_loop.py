"""The loop of a training: w <- w - rate * gradient of the loss of f(weights, inputs), the best weights kept.

It knows nothing of models: a function, its variables, rows, targets and a loss. What is best is said by the loss on
rows that are not trained on, so that the end is never worse there than the beginning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfopt import distribution
from tfopt.checkpoint import Checkpoint
from tfopt.data import Dataset
from tfopt.errors import TfoptError, one_line
from tfopt.losses import Loss
from tfopt.optimizers import Optimizer, learning_rate
from tfopt.training_settings import History, Settings
from tfopt.training_step import Lesson, Steps, Tensors

Transform = Callable[[Mapping[str, tf.Variable]], Tensors]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What changes between steps other than by gradients, such as masks that grow.

    Attributes:
      state: variables that a transform reads and `update` assigns; they are part of a checkpoint.
      update: called with (step, all steps, the variables that are trained by name) before each step.
      settled: the share of the steps after which it changes nothing more: weights count as the best only from there.
    """

    state: Mapping[str, tf.Variable]
    update: Callable[[int, int, Mapping[str, tf.Variable]], None]
    settled: float = 0.0


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What is done in the steps alone, and not where weights are judged.

    Attributes:
      lesson: the losses of a step in place of `loss(function(weights, inputs), targets)`.
      prepare: changes the inputs of a step: (inputs, targets, a generator of this step's own) -> inputs.
      state: variables that the lesson assigns, such as batch statistics: kept with the best weights.
    """

    lesson: Lesson | None = None
    prepare: Callable[[dict[str, np.ndarray], dict[str, np.ndarray], np.random.Generator], dict] | None = None
    state: Mapping[str, tf.Variable] = dataclasses.field(default_factory=dict)


def train(
    function: Callable[[Tensors, Tensors], Tensors],
    variables: Mapping[str, tf.Variable],
    rows: Dataset,
    targets: Mapping[str, np.ndarray],
    loss: Loss,
    settings: Settings,
    *,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    teaching: Teaching = Teaching(),
    checkpoint: str | Path | None = None,
    fixed_batch: bool = False,
    title: str = "training",
) -> History:
    """Trains variables, which hold the best values at the end.

    Args:
      function: f(weights, inputs) -> outputs, all by name (see `tfopt.differentiable`).
      variables: name -> float variable.
      rows: the inputs.
      targets: what the loss compares outputs with, by name; as many rows.
      loss: (outputs, targets) -> (rows,), see `tfopt.losses`.
      settings: how to train.
      transform: makes the weights of the variables (a mask, a quantizer); what it leaves out is taken as it is.
      schedule: what changes between steps.
      teaching: what is done in the steps alone.
      checkpoint: a directory for the state; a killed run that is started again goes on from there, and ends with the
        same weights as one that was not killed.
      fixed_batch: whether the function takes batches of just `settings.batch_size`.
      title: of the progress bar.

    Raises:
      TfoptError: nothing to train, an op without a gradient, or a checkpoint of another training.
    """
    begin = time.monotonic()
    loop = _Loop(function, variables, rows, targets, loss, settings, transform, schedule, teaching, fixed_batch)
    saved = Checkpoint(Path(checkpoint), loop.fingerprint()) if checkpoint else None
    loop.start(saved)
    with tqdm(total=loop.total, initial=loop.step, desc=title, unit="step", leave=False, disable=None) as bar:
        while not loop.history.stopped:
            loop.advance()
            bar.update(1)
            if loop.history.validation:
                bar.set_postfix(validation=f"{loop.history.validation[-1]:.4g}", refresh=False)
            due = loop.history.stopped or 0 in (loop.step % settings.checkpoint_steps, loop.step % loop.per_epoch)
            if saved and due and distribution.is_chief():
                loop.save(saved)
    loop.finish()
    loop.history.seconds = time.monotonic() - begin
    return loop.history


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says in one line what TensorFlow cannot run, or has no gradient of."""
    try:
        yield
    except (LookupError, tf.errors.OpError, ValueError) as error:
        raise TfoptError(f"the model cannot be trained: {one_line(error)}") from error


class _Loop:
    """The state of a training between two steps."""

    def __init__(
        self,
        function: Callable[[Tensors, Tensors], Tensors],
        variables: Mapping[str, tf.Variable],
        rows: Dataset,
        targets: Mapping[str, np.ndarray],
        loss: Loss,
        settings: Settings,
        transform: Transform | None,
        schedule: Schedule | None,
        teaching: Teaching,
        fixed_batch: bool,
    ):
        if not variables:
            raise TfoptError("there is nothing to train: no variable was given")
        self.settings = settings
        self._rows, self._targets = rows, dict(targets)
        self._names, self._variables = list(variables), list(variables.values())
        with distribution.scope():
            self._optimizer = Optimizer(settings.optimizer, self._variables, settings.weight_decay)
        order = np.random.default_rng(settings.seed).permutation(len(rows))
        held = int(len(rows) * settings.validation)
        self._held, self._train = np.sort(order[:held]) if held else order, order[held:]
        size, replicas = settings.batch_size, distribution.replicas()
        self._batch = size * replicas if fixed_batch else min(size, len(self._train))
        if self._batch < replicas:
            raise TfoptError(f"a batch of {self._batch} rows is less than a row for each of {replicas} replicas")
        self.per_epoch = max(1, len(self._train) // self._batch)
        more = max(1, math.ceil(settings.min_steps / max(1, self.per_epoch * settings.epochs)))
        self._epochs, self._patience = settings.epochs * more, settings.patience * more
        self.total = self.per_epoch * self._epochs
        if settings.max_steps:
            self.total = min(self.total, settings.max_steps)
        self.step = 0
        self._schedule = schedule
        self._state = list(schedule.state.values()) if schedule else []
        self._kept = [*self._variables, *teaching.state.values()]
        self._prepare = teaching.prepare
        self._settled = math.ceil(self.total * schedule.settled) if schedule else 0
        self.history = History(rows=len(self._train), validation_rows=len(self._held), apart=held > 0)
        self._running: list[float] = []  # losses of this epoch's steps
        self._best: list[np.ndarray] = []
        self._best_loss = math.inf
        self._order = (-1, order)

        def weights() -> Tensors:
            return dict(variables) if transform is None else {**variables, **transform(variables)}

        def exam(inputs: Tensors, wanted: Tensors) -> tf.Tensor:
            return loss(function(weights(), inputs), wanted)

        def lesson(inputs: Tensors, wanted: Tensors, share: tf.Tensor) -> tf.Tensor:
            return teaching.lesson(weights(), inputs, wanted, share) if teaching.lesson else exam(inputs, wanted)

        clip = settings.gradient_clip
        self._steps = Steps(variables, lesson, exam, self._optimizer, clip, self._batch, rows.whole)

    def fingerprint(self) -> str:
        """What makes two trainings the same: settings, initial weights, rows and targets."""
        digest = hashlib.sha256(repr(self.settings).encode())
        arrays: dict[str, Any] = {n: v.numpy() for n, v in zip(self._names, self._variables, strict=True)}
        for name, array in [*arrays.items(), *self._rows.inputs.items(), *self._targets.items()]:
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            data = repr(array.tolist()).encode() if array.dtype.kind == "O" else np.ascontiguousarray(array)
            digest.update(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def start(self, saved: Checkpoint | None) -> None:
        """Goes to where the checkpoint left off, or to the beginning."""
        state = distribution.shared(saved.restore if saved and distribution.is_chief() else None)
        if state is None:
            self._judge()
            self._end()
            return
        progress, arrays = state
        for variable, value in zip([*self._kept, *self._optimizer.slots, *self._state], arrays, strict=False):
            variable.assign(value)
        self._best = arrays[-len(self._kept) :]
        self.step, self._running, self._best_loss = progress["step"], progress["running"], progress["best_loss"]
        self.history = History(**progress["history"])

    def save(self, saved: Checkpoint) -> None:
        """Writes everything that the next step depends on; the order of the rows follows from seed and step."""
        progress = {
            **{"step": self.step, "running": self._running, "best_loss": self._best_loss},
            "history": dataclasses.asdict(self.history),
        }
        arrays = [variable.numpy() for variable in [*self._kept, *self._optimizer.slots, *self._state]]
        saved.save(progress, [*arrays, *self._best])

    def advance(self) -> None:
        """Takes a step; after the last one of an epoch, sees whether the weights are better."""
        epoch, position = divmod(self.step, self.per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(self._train)
            self._order = (epoch, np.resize(order, max(len(order), self._batch)))
        chosen = self._order[1][position * self._batch : (position + 1) * self._batch]
        rate = learning_rate(self.settings.learning_rate, self.step, self.total)
        if self._schedule:
            self._schedule.update(self.step, self.total, dict(zip(self._names, self._variables, strict=True)))
        inputs, wanted = self._take(chosen)
        if self._prepare:
            inputs = self._prepare(inputs, wanted, np.random.default_rng([self.settings.seed, self.step, 1]))
        with _explained():
            mean = self._steps.step(inputs, wanted, rate, self.step + 1, self.step / self.total)
        self.history.trained = self._steps.trained or self.history.trained
        if not self.history.trained:
            raise TfoptError("the model cannot be trained: none of its weights has a gradient")
        self.step = self.history.steps = self.step + 1
        self._running.append(mean)
        if not math.isfinite(self._running[-1]):
            self.history.stopped = f"the loss is not finite at step {self.step}"
        elif self.step % self.per_epoch == 0 or self.step == self.total:
            self.history.losses.append(math.fsum(self._running) / len(self._running))
            self._running = []
            self._judge()
            self._end()

    def _judge(self) -> None:
        """Validates the weights, and keeps them where they are the best so far."""
        found = []
        for start in range(0, len(self._held), self._batch):
            chosen = self._held[start : start + self._batch]
            padded = np.resize(chosen, self._batch)  # one shape, so one trace
            with _explained():
                found.append(self._steps.losses(*self._take(padded))[: len(chosen)])
        value = float(np.mean(np.concatenate(found), dtype=np.float64))
        self.history.validation.append(value)
        if not self._best or (self.step >= self._settled and value < self._best_loss):
            self._best = [variable.numpy() for variable in self._kept]
            self.history.best_step = self.step
            if math.isfinite(value) and self.step >= self._settled:
                self._best_loss = self.history.best_loss = value

    def _end(self) -> None:
        """Says why the training is over, if it is."""
        values = self.history.validation
        waited = (self.step - max(self.history.best_step, self._settled)) // self.per_epoch
        if not math.isfinite(values[-1]):
            self.history.stopped = f"the validation loss is not finite after step {self.step}"
        elif self.step == self.total:
            short = self.total < self.per_epoch * self._epochs
            self.history.stopped = f"max_steps ({self.settings.max_steps}) reached" if short else "all epochs done"
        elif self._patience and waited >= self._patience:
            self.history.stopped = f"no better validation loss for {waited} epochs"

    def finish(self) -> None:
        """Gives the variables their best values."""
        for variable, value in zip(self._kept, self._best, strict=True):
            variable.assign(value)

    def _take(self, chosen: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        inputs = {n: a if n in self._rows.whole else a[chosen] for n, a in self._rows.inputs.items()}
        return inputs, {name: array[chosen] for name, array in self._targets.items()}
