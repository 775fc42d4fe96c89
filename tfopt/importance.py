"""What a channel is worth: by the size of its weights, by its batch norm's scale, or by what the outputs say.

    l1, l2     |w| summed (root of w^2 summed) over the weights that make and read it; 1 is the mean of its layer
    bn_scale   |gamma|                                              (Liu et al. 2017, Network Slimming)
    taylor     1/2 E[(sum_w w dL/dw)^2] over the weights that read it   (Molchanov et al. 2019, eq. 8, on gates)

A gate m = 1 on what reads a channel has dL/dm = sum_w w dL/dw. With labels drawn from the model's own outputs the
expectation is the gate's Fisher information (Theis et al. 2018), so half of it is, to second order, the KL divergence
from the outputs that taking the channel out brings: the loss that recovery has, whose gradient itself is 0 before
anything is cut. Small batches do for single rows, since the drawn gradients of different rows are independent.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfopt.channels.groups import Channels
from tfopt.data import Dataset, batch_size
from tfopt.differentiable import differentiable
from tfopt.errors import TfoptError
from tfopt.losses import PROBABILITIES, SIGMOID, SOFTMAX, Head, heads, refine, trainable_outputs
from tfopt.model import Model
from tfopt.trainable import promote
from tfopt.training import targets
from tfopt.verify import input_specs

BY = ("taylor", "l1", "l2", "bn_scale")

_ROWS = 1024  # that Taylor looks at
_BATCH = 8


def magnitude(channels: Channels, model: Model, power: int) -> np.ndarray:
    """Worth by the size of weights: (classes,) float64, whose mean over the channels of a group is 1.

    Args:
      channels: the model's.
      model: its weights.
      power: 1 for l1, 2 for l2.
    """
    worth = np.zeros(channels.classes.total)
    for (name, axis), role in channels.spread.roles.items():
        if role == "gamma":
            continue
        value = model.graph.constant(name)
        assert value is not None
        sums = np.sum(np.abs(value.astype(np.float64)) ** power, axis=_others(value.ndim, axis)) ** (1 / power)
        if sums.mean() > 0:
            np.add.at(worth, channels.axis(name, axis), sums / sums.mean())
    for group in channels.groups:
        mean = worth[group.classes].mean()
        worth[group.classes] = worth[group.classes] / mean if mean > 0 else 1.0
    return worth


def batch_norm_scale(channels: Channels, model: Model) -> np.ndarray:
    """Worth by |gamma|; a group without a batch norm counts by the size of its weights.

    Raises:
      TfoptError: there is no batch norm.
    """
    worth = np.zeros(channels.classes.total)
    seen = np.zeros(channels.classes.total, bool)
    for (name, axis), role in channels.spread.roles.items():
        if role == "gamma":
            value = model.graph.constant(name)
            assert value is not None
            np.add.at(worth, channels.axis(name, axis), np.abs(value.astype(np.float64)))
            seen[channels.axis(name, axis)] = True
    if not any(seen[group.classes].any() for group in channels.groups):
        raise TfoptError(
            "prune_channels: importance=bn_scale finds no batch norm; put prune_channels before fold_affine, or choose "
            f"from {', '.join(by for by in BY if by != 'bn_scale')}"
        )
    fallback = magnitude(channels, model, 2)
    for group in channels.groups:
        if not seen[group.classes].any():
            known = worth[seen].mean() if seen.any() else 1.0
            worth[group.classes] = fallback[group.classes] * known
    return worth


def taylor(channels: Channels, model: Model, signature: str, rows: Dataset, seed: int) -> np.ndarray:
    """Worth by the outputs: the divergence that taking a channel out brings, in nats a row (see the top).

    Args:
      channels: the model's.
      model: stays as it is.
      signature: that of the rows; what it does not use is worth infinitely much.
      rows: inputs; at most 1,024 of them are used.
      seed: of what is drawn.

    Raises:
      TfoptError: the signature has no gradient.
    """
    copy = model.copy()
    names = promote(copy, signature)
    found = heads(copy, signature)
    function = differentiable(trainable_outputs(copy, signature, found), signature)
    fixed = batch_size(input_specs(copy, signature), 0)
    size = fixed or min(_BATCH, len(rows))
    rows = rows.take(slice(0, min(len(rows), _ROWS) // size * size))
    if not len(rows):
        raise TfoptError(f"{rows.source}: fewer rows than a batch of {size}")
    found, wanted = targets(copy, signature, rows, size, found)
    found = [refine(head, wanted[head.output]) for head in found]
    gated = [entry for entry in _gates(channels) if entry[0] in names]
    used = dict.fromkeys(name for name, _ in gated)
    variables = {name: tf.Variable(copy.weights[name]) for name in used}
    draw = tf.random.Generator.from_seed(seed)

    @tf.function(autograph=False)
    def gradients(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = function(variables, inputs)
            loss = tf.add_n([_drawn(head, outputs[head.output], draw) for head in found])
        return tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    worth = np.zeros(channels.classes.total)
    for batch in rows.batches(size):
        found_gradients = gradients({name: tf.constant(value) for name, value in batch.items()})
        slope = np.zeros_like(worth)
        for name, axis in gated:
            product = (found_gradients[name] * variables[name]).numpy().astype(np.float64)
            np.add.at(slope, channels.axis(name, axis), product.sum(axis=_others(product.ndim, axis)))
        worth += 0.5 * slope**2
    known = np.zeros(len(worth), bool)
    for name, axis in gated:
        known[channels.axis(name, axis)] = True
    return np.where(known, worth / len(rows), np.inf)


def _gates(channels: Channels) -> list[tuple[str, int]]:
    """The axes of weights on which a gate of each channel sits: where it is read, or else where it is made."""
    roles = channels.spread.roles
    read = np.zeros(channels.classes.total, bool)
    for (name, axis), role in roles.items():
        if role == "reads":
            read[channels.axis(name, axis)] = True
    return [
        entry
        for entry, role in roles.items()
        if role == "reads" or (role == "makes" and not read[channels.axis(*entry)].all())
    ]


def _drawn(head: Head, logits: tf.Tensor, draw: tf.random.Generator) -> tf.Tensor:
    """A loss whose gradient is that of -log p(y) for y drawn from the model itself, summed over rows."""
    logits = tf.cast(logits, tf.float32)
    if head.kind in (SOFTMAX, PROBABILITIES):
        if head.kind == PROBABILITIES:
            logits = tf.math.log(tf.maximum(logits, 1e-7))
        noise = -tf.math.log(-tf.math.log(draw.uniform(tf.shape(logits), 1e-7, 1 - 1e-7)))
        chosen = tf.one_hot(tf.argmax(tf.stop_gradient(logits) + noise, axis=-1), tf.shape(logits)[-1])
        slope = tf.nn.softmax(logits) - chosen
    elif head.kind == SIGMOID:
        chance = tf.sigmoid(logits)
        slope = chance - tf.cast(draw.uniform(tf.shape(logits)) < chance, tf.float32)
    else:  # a Gaussian whose variance is that of the outputs
        slope = draw.normal(tf.shape(logits)) * (2 / head.variance) ** 0.5
    count = tf.cast(tf.reduce_prod(tf.shape(logits)[1:]), tf.float32)
    if head.kind in (SOFTMAX, PROBABILITIES):
        count /= tf.cast(tf.shape(logits)[-1], tf.float32)
    return tf.reduce_sum(tf.stop_gradient(slope) * logits) / tf.sqrt(tf.maximum(count, 1.0))


def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(rank) if a != axis)
