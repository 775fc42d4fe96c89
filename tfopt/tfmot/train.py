"""Trains what TFMOT made of a Keras 2 model, and keeps the weights that did best on rows held back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.tfmot.examples import Examples
from tfopt.tfmot.keras_model import batch_norms

_HELD_BACK = 10  # every tenth row decides which weights are best
_MOMENTUM = 0.9  # of batch norms that learn: a training here has few steps, and Keras's 0.99 takes hundreds to arrive


class Training:
    """Epochs of Adam, whose rate falls along a cosine.

    Attributes:
      examples: what is learned.
      steps: in all epochs.
    """

    def __init__(
        self, examples: Examples, epochs: int, min_steps: int, batch_size: int, learning_rate: float, seed: int
    ):
        """Splits the rows.

        Args:
          examples: what is learned.
          epochs, min_steps, batch_size, learning_rate, seed: as of `tfopt.training_settings.Settings`.
        """
        order = np.random.default_rng(seed).permutation(len(examples.inputs[0]))
        held, used = order[::_HELD_BACK], np.delete(order, slice(None, None, _HELD_BACK))
        used = used if len(used) else held
        self.examples = examples
        each = -(-len(used) // batch_size)
        self._epochs = epochs * max(1, math.ceil(min_steps / max(1, each * epochs)))
        self._batch_size, self._learning_rate = batch_size, learning_rate
        self.steps = self._epochs * each
        self._held, self._used = len(held), len(used)
        self._train, self._check = (
            ([array[part] for array in examples.inputs], [array[part] for array in examples.targets])
            for part in (used, held)
        )

    def run(
        self, model: Any, callbacks: tuple[Any, ...] = (), settled: int = 0, statistics: bool = True
    ) -> dict[str, Any]:
        """Trains a model, in place.

        Args:
          model: of Keras 2.
          callbacks: of each epoch; they see one `fit` an epoch.
          settled: steps after which the weights may count as the best: a schedule that prunes has ended.
          statistics: whether batch norms adapt theirs to what was taken from the weights; in a quantized model they
            keep those that they are served with.

        Returns:
          `losses` on `held` rows, before training and after each epoch; the `best` epoch, 0 being before training;
          `rows` that were trained on.

        Raises:
          TfoptError: no weights that may count give a finite loss.
        """
        import tf_keras

        for norm in batch_norms(model):
            if statistics:
                norm.momentum = min(norm.momentum, _MOMENTUM)
            else:
                norm.call = _as_served(norm.call)
        rate = tf_keras.optimizers.schedules.CosineDecay(self._learning_rate, max(self.steps, 1))
        model.compile(tf_keras.optimizers.Adam(rate), loss=self.examples.losses)
        losses, best, weights = [], -1, []
        for epoch in range(self._epochs + 1):
            if epoch:
                model.fit(*self._train, batch_size=self._batch_size, epochs=1, verbose=0, callbacks=list(callbacks))
            found = model.evaluate(*self._check, batch_size=self._batch_size, verbose=0, return_dict=True)
            losses.append(float(np.sum(found["loss"])))
            counts = epoch * self.steps >= settled * self._epochs and np.isfinite(losses[-1])
            if counts and (best < 0 or losses[-1] <= losses[best]):
                best, weights = epoch, [variable.numpy() for variable in model.variables]
        if best < 0:
            raise TfoptError(
                f"the loss is not finite at learning_rate={self._learning_rate:g}: take a lower one, or look for "
                "values in the rows that are not finite"
            )
        for variable, value in zip(model.variables, weights, strict=True):
            variable.assign(value)
        return {"losses": losses, "best": best, "held": self._held, "rows": self._used}


def _as_served(call: Callable[..., Any]) -> Callable[..., Any]:
    def answer(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return call(inputs, training=False)

    return answer
