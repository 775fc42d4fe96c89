"""How much the outputs of a model change with each of its weights: the diagonal of the Fisher information.

    h_i = E over x, y ~ p(y | x) of  (d log p(y | x) / d w_i)^2

It is the diagonal of the Hessian of the loss where the model is its own teacher, so it needs no labels: y is drawn from
what the model says (Martens 2020; Choi, El-Khamy and Lee 2017 weigh k-means by it). A value counts as the mean of a
normal distribution, whose gradient is a random sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfopt.data import batch_size
from tfopt.differentiable import differentiable
from tfopt.losses import PROBABILITIES, SIGMOID, SOFTMAX, heads, trainable_outputs
from tfopt.model import Model
from tfopt.passes import Data
from tfopt.verify import input_specs

_BATCHES = 64
_ROWS = 16  # of a batch: what is drawn for one row is independent of the others, so that their products cancel


def fisher(model: Model, data: Data, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The importance of each element of some weights.

    Args:
      model: left as it is.
      data: with rows; labels are not looked at.
      names: weights of the model.

    Returns:
      name -> float32 of the weight's shape, at least 0.

    Raises:
      TfoptError: no rows, or the model has no gradient.
    """
    rows = data.need_rows("weighting=fisher")
    found = heads(model, data.signature)
    function = differentiable(trainable_outputs(model, data.signature, found), data.signature)
    variables = {name: tf.Variable(model.weights[name]) for name in names}
    kinds = {head.output: head.kind for head in found}

    @tf.function(autograph=False)
    def squares(inputs: Mapping[str, tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = function(variables, inputs)
            total = tf.add_n([_drawn(outputs[name], kind, seed) for name, kind in kinds.items()])
        gradients = tape.gradient(total, list(variables.values()), unconnected_gradients="zero")
        return [tf.square(tf.convert_to_tensor(gradient)) for gradient in gradients]

    size = batch_size(input_specs(model, data.signature), min(_ROWS, len(rows)))
    sums = {name: np.zeros(model.weights[name].shape, np.float32) for name in names}
    random = np.random.default_rng(data.seed)
    for _ in range(_BATCHES):
        chosen = random.choice(len(rows), size, replace=size > len(rows))
        inputs = {n: tf.constant(a if n in rows.whole else a[chosen]) for n, a in rows.inputs.items()}
        seed = tf.constant(random.integers(0, 1 << 30, 2), tf.int32)
        for name, square in zip(names, squares(inputs, seed), strict=True):
            sums[name] += square.numpy() / (size * _BATCHES)
    return sums


def _drawn(output: tf.Tensor, kind: str, seed: tf.Tensor) -> tf.Tensor:
    """log p of a result drawn from an output, summed; the result itself is constant."""
    if kind in (SOFTMAX, PROBABILITIES):
        logs = tf.nn.log_softmax(output) if kind == SOFTMAX else tf.math.log(tf.maximum(output, 1e-7))
        flat = tf.reshape(logs, [-1, tf.shape(logs)[-1]])
        drawn = tf.random.stateless_categorical(tf.stop_gradient(flat), 1, seed)
        return tf.reduce_sum(tf.gather(flat, drawn, batch_dims=1))
    uniform = tf.random.stateless_uniform(tf.shape(output), seed)
    if kind == SIGMOID:
        drawn = tf.cast(uniform < tf.sigmoid(tf.stop_gradient(output)), output.dtype)
        return -tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(drawn, output))
    return tf.reduce_sum(output * tf.where(uniform < 0.5, -1.0, 1.0))
