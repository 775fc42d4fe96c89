"""Optimizers, by TensorFlow's own fused kernels, and the learning rate's schedule.

adam    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2    w -= rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + e)
adamw   the same after w -= rate decay w (Loshchilov and Hutter 2019)
sgd     m = b1 m - rate g    w += b1 m - rate g (Nesterov)
rate    learning_rate min(1, t / warmup) (1 + cos(pi t / steps)) / 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

NAMES = ("adam", "adamw", "sgd")

_B1, _B2, _EPSILON = 0.9, 0.999, 1e-7


class Optimizer:
    """An optimizer over a fixed list of variables.

    Attributes:
      slots: all state besides the step, in a fixed order; to be saved and restored.
    """

    def __init__(self, name: str, variables: Sequence[tf.Variable], weight_decay: float = 0.0):
        self._name = name
        self._decay = weight_decay if name == "adamw" else 0.0
        self._variables = list(variables)
        count = 1 if name == "sgd" else 2
        self._slots = [[tf.Variable(tf.zeros_like(v), trainable=False) for _ in range(count)] for v in variables]

    @property
    def slots(self) -> list[tf.Variable]:
        """All state besides the step, in a fixed order."""
        return [slot for slots in self._slots for slot in slots]

    def apply(self, gradients: Sequence[tf.Tensor | None], rate: tf.Tensor, step: tf.Tensor) -> None:
        """Moves the variables; those without a gradient stay.

        Args:
          gradients: one for each variable.
          rate: the learning rate, a scalar.
          step: float32 scalar, from 1.
        """
        for variable, slots, gradient in zip(self._variables, self._slots, gradients, strict=True):
            if gradient is None:
                continue
            handle, gradient = variable.handle, tf.convert_to_tensor(gradient)
            if self._name == "sgd":
                tf.raw_ops.ResourceApplyKerasMomentum(
                    var=handle, accum=slots[0].handle, lr=rate, grad=gradient, momentum=_B1, use_nesterov=True
                )
                continue
            if self._decay and variable.shape.rank > 1:  # biases and scales are not drawn to 0
                tf.raw_ops.AssignSubVariableOp(resource=handle, value=rate * self._decay * variable.read_value())
            tf.raw_ops.ResourceApplyAdam(
                **{"var": handle, "m": slots[0].handle, "v": slots[1].handle, "lr": rate, "grad": gradient},
                **{"beta1": _B1, "beta2": _B2, "epsilon": _EPSILON},
                **{"beta1_power": tf.pow(_B1, step), "beta2_power": tf.pow(_B2, step)},
            )


def learning_rate(peak: float, step: int, steps: int) -> float:
    """The rate of a step (from 0) of so many: a short linear warmup, then half a cosine down to 0."""
    warmup = min(100, max(1, steps // 20))
    return peak * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
