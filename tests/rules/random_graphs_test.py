"""Seeded random graphs of affine, linear, commuting and non-linear ops: folding never changes what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, left_of

CHANNELS = 4
SHAPE = (2, 8, 8, CHANNELS)


def random_network(seed):
    """A function of one image, built from a random list of steps over a pool of tensors of one shape."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        # Small, so that chains keep a scale at which float32 can be compared.
        return rng.uniform(-1, 1, shape).astype("float32")

    def scale():
        k = rng.uniform(0.3, 2, CHANNELS) * rng.choice([1, 1, 1, -1], CHANNELS)
        return k.astype("float32") if rng.random() < 0.7 else np.float32(rng.uniform(0.3, 2))

    def conv(x):
        size = int(rng.choice([1, 3]))
        padding = str(rng.choice(["SAME", "VALID"])) if size == 1 else "SAME"
        return tf.nn.conv2d(x, draw(size, size, CHANNELS, CHANNELS) / size, 1, padding)

    def depthwise(x):
        return tf.nn.depthwise_conv2d(x, draw(3, 3, CHANNELS, 1), [1, 1, 1, 1], "SAME")

    def dense(x):
        return tf.reshape(tf.matmul(tf.reshape(x, (-1, CHANNELS)), draw(CHANNELS, CHANNELS)), SHAPE)

    def halves(x):
        a, b = tf.split(x, 2, -1)
        return tf.concat([b, tf.nn.relu(a)], -1)

    def padded(x):
        return tf.pad(x[:, 1:-1, 1:-1], [[0, 0], [1, 1], [1, 1], [0, 0]])

    single = [
        lambda x: x * scale(),
        lambda x: x + draw(CHANNELS),
        lambda x: x - draw(CHANNELS),
        lambda x: draw(CHANNELS) - x,
        lambda x: x / scale(),
        lambda x: tf.nn.bias_add(x, draw(CHANNELS)),
        lambda x: tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=scale() * np.ones(CHANNELS, "float32"),
            offset=draw(CHANNELS),
            mean=draw(CHANNELS),
            variance=np.abs(draw(CHANNELS)) + 0.5,
            is_training=False,
        )[0],
        conv,
        conv,
        depthwise,
        dense,
        halves,
        padded,
        tf.nn.relu,
        tf.nn.leaky_relu,
        tf.negative,
        tf.tanh,
        lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME"),
        lambda x: tf.nn.avg_pool2d(x, 3, 1, "SAME"),
        lambda x: tf.transpose(tf.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1)),
        lambda x: x * tf.sigmoid(tf.reduce_mean(x, (1, 2), keepdims=True)),
        lambda x: x - tf.reduce_mean(x, -1, keepdims=True),
    ]
    double = [
        tf.add,
        tf.subtract,
        tf.maximum,
        lambda a, b: 0.3 * (a * b),
        lambda a, b: tf.concat([a[..., :2], b[..., 2:]], -1),
        lambda a, b: tf.add_n([a, b, a]),
    ]

    def network(x):
        pool = [x]
        for _ in range(int(rng.integers(5, 22))):
            recent = pool[-3:]
            if rng.random() < 0.2:
                picks = rng.integers(0, len(recent), 2)
                y = double[rng.integers(len(double))](recent[picks[0]], recent[picks[1]])
            else:
                y = single[rng.integers(len(single))](recent[-1] if rng.random() < 0.8 else recent[0])
            pool.append(y)
        return [pool[-1], tf.tanh(pool[-2])] if rng.random() < 0.3 else [pool[-1]]

    return network


@pytest.mark.parametrize("block", range(4))
def test_numbers_stay(block):
    moved = 0
    for seed in range(block * 20, block * 20 + 20):
        graph = frozen(random_network(seed), tf.TensorSpec(SHAPE))
        before = len(left_of(graph))
        try:
            fold(graph)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        moved += before - len(left_of(graph))
    assert moved > 10
