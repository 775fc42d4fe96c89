"""A recurrent layer takes the affine of its input into the operands of its loop."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen_with_library, left_of, norm
from tests.conftest import randomise_batch_norms

layers = keras.layers


def folded(*stack):
    keras.utils.set_random_seed(2)
    model = keras.Sequential([layers.Input((7, 4)), *stack])
    randomise_batch_norms(model)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name == "bias":
            weight.assign(rng.normal(size=weight.shape))
    graph, library = frozen_with_library(model, tf.TensorSpec((None, 7, 4)))
    assert any("While" in node.op for node in graph.nodes.values())
    log = fold(graph, library=library)
    return left_of(graph, library), log


@pytest.mark.parametrize("layer", ["LSTM", "SimpleRNN"])
def test_nothing_is_left(layer):
    left, log = folded(norm(), getattr(layers, layer)(5, return_sequences=True))
    assert not left, log.refused


def test_a_loop_without_a_bias_takes_the_scale_only():
    left, log = folded(norm(), layers.LSTM(5, use_bias=False))
    assert [what for _, what in left] == ["shift"]
    assert "adds no bias" in next(iter(log.refused.values()))


def test_a_loop_whose_steps_have_other_uses_refuses():
    def network(x):
        kernel = tf.constant(np.random.default_rng(0).normal(size=(4, 4)), tf.float32)
        x = x * tf.constant([1.0, 2.0, 3.0, 4.0])

        def step(state, item):
            return state + tf.tanh(item @ kernel) + tf.tanh(item)

        return tf.scan(step, tf.transpose(x, (1, 0, 2)), tf.zeros_like(x[:, 0]))

    graph, library = frozen_with_library(network, tf.TensorSpec((2, 7, 4)))
    log = fold(graph, library=library)
    assert "scale" in [what for _, what in left_of(graph, library)], log.applied
