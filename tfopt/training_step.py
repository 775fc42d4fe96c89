"""What a training runs on its devices: a step down the gradient of a batch, and the losses of rows.

    g = d/dW mean over the batch of loss     W <- W - optimizer(g clipped to a norm)

On several replicas each has a slice of the batch, and the gradients are summed (see `tfopt.distribution`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt import distribution
from tfopt.optimizers import Optimizer

Tensors = Mapping[str, tf.Tensor]
Arrays = Mapping[str, np.ndarray]
# (weights, inputs, targets, share of the training that is done) -> losses (rows,)
Lesson = Callable[[Tensors, Tensors, Tensors, tf.Tensor], tf.Tensor]
Exam = Callable[[Tensors, Tensors], tf.Tensor]


class Steps:
    """The two functions, compiled when they are first called.

    Attributes:
      trained: names of the variables that have a gradient; known after the first step.
    """

    def __init__(
        self,
        variables: Mapping[str, tf.Variable],
        lesson: Callable[[Tensors, Tensors, tf.Tensor], tf.Tensor],
        exam: Exam,
        optimizer: Optimizer,
        clip: float,
        rows: int,
        whole: frozenset[str],
    ):
        """Prepares both.

        Args:
          variables: what is trained, by name.
          lesson: (inputs, targets, share of the training that is done) -> losses (rows,), to be made smaller.
          exam: (inputs, targets) -> losses (rows,), to be looked at.
          optimizer: of the variables, in this order.
          clip: the largest norm of the gradient; 0: any.
          rows: of a batch.
          whole: names of the inputs without a row axis.
        """
        self.trained: list[str] = []
        self._names, self._variables = list(variables), list(variables.values())
        self._optimizer, self._clip, self._rows, self._whole = optimizer, clip, rows, whole
        self._lesson = lesson
        strategy = distribution.current()
        self._step: Callable[..., tf.Tensor] = self._descend
        self._exam: Callable[..., tf.Tensor] = exam
        if strategy is not None:

            def summed(values: list[tf.Tensor]) -> list[tf.Tensor]:
                return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)

            def gathered(inputs: Tensors, wanted: Tensors) -> tf.Tensor:
                return tf.distribute.get_replica_context().all_gather(exam(inputs, wanted), axis=0)

            def first(function: Callable[..., Any], *args: Any) -> Any:
                return strategy.experimental_local_results(strategy.run(function, args=args))[0]

            descend = functools.partial(self._descend, summed=summed)
            self._step, self._exam = functools.partial(first, descend), functools.partial(first, gathered)
        self._step = tf.function(self._step, autograph=False)
        self._exam = tf.function(self._exam, autograph=False)

    def step(self, inputs: Arrays, wanted: Arrays, rate: float, number: int, share: float) -> float:
        """Moves the variables.

        Args:
          inputs, wanted: a batch.
          rate: the learning rate.
          number: of the step, from 1.
          share: of the training that is done.

        Returns:
          The mean loss before.
        """
        scalars = (tf.constant(value, tf.float32) for value in (rate, number, share))
        return float(self._step(*self._tensors(inputs, wanted), *scalars))

    def losses(self, inputs: Arrays, wanted: Arrays) -> np.ndarray:
        """The losses (rows,) of a batch."""
        return self._exam(*self._tensors(inputs, wanted)).numpy()

    def _descend(
        self,
        inputs: Tensors,
        wanted: Tensors,
        rate: tf.Tensor,
        number: tf.Tensor,
        share: tf.Tensor,
        summed: Callable[[list[tf.Tensor]], list[tf.Tensor]] | None = None,
    ) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._variables)
            values = self._lesson(inputs, wanted, share)
            mean = tf.reduce_mean(values) if summed is None else tf.reduce_sum(values) / self._rows
        gradients = tape.gradient(mean, self._variables)
        self.trained = [name for name, g in zip(self._names, gradients, strict=True) if g is not None]
        if summed is not None:
            found = [tf.convert_to_tensor(g) for g in gradients if g is not None]
            mean, *found = summed([mean, *found])
            rest = iter(found)
            gradients = [None if g is None else next(rest) for g in gradients]
        if self._clip:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip)
        self._optimizer.apply(gradients, rate, number)
        return mean

    def _tensors(self, inputs: Arrays, wanted: Arrays) -> Any:
        def part(chosen: slice) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
            return (
                {n: tf.constant(array if n in self._whole else array[chosen]) for n, array in inputs.items()},
                {n: tf.constant(array[chosen]) for n, array in wanted.items()},
            )

        return part(slice(None)) if distribution.current() is None else distribution.sliced(part, self._rows)
