"""Small nets for the tests of structured pruning, each with the groups of channels that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.origins import rows, save_tf1, v1
from tfopt import model
from tfopt.passes import fold_constants, prune_graph
from tfopt.rewrite import Log

IMAGE, ROW, SEQUENCE = (None, 8, 8, 6), (None, 24), (None, 6, 16)


@dataclasses.dataclass(frozen=True)
class Net:
    """A net.

    Attributes:
      shape: of its input.
      compute: from the input.
      groups: (channels, places that each takes) of each group, sorted.
      refused: part of a reason why channels cannot go.
    """

    shape: tuple[int | None, ...]
    compute: Callable
    groups: list[tuple[int, int]]
    refused: str = ""


def w(*shape: int, seed: int = 1) -> tf.Tensor:
    return tf.constant(rows(*shape, seed=seed) / np.float32(np.sqrt(max(1, np.prod(shape[:-1])))))


def conv(x, size, out, seed=1, stride=1, groups=1):
    return tf.nn.conv2d(x, w(size, size, x.shape[-1] // groups, out, seed=seed), stride, "SAME") + w(out, seed=seed + 9)


def head(x, out=3, seed=7):
    return tf.reduce_mean(x, [1, 2]) @ w(x.shape[-1], out, seed=seed)


def depthwise(x, multiplier=1, seed=1):
    return tf.nn.depthwise_conv2d(x, w(3, 3, x.shape[-1], multiplier, seed=seed), [1, 1, 1, 1], "SAME") + w(
        x.shape[-1] * multiplier, seed=seed + 3
    )


def plain(x):
    h = tf.nn.relu(conv(x, 3, 10))
    return head(tf.nn.relu6(conv(tf.nn.max_pool2d(h, 2, 2, "SAME"), 3, 12, seed=2)))


def residual(x):
    h = tf.nn.relu(conv(x, 3, 10))
    for seed in (2, 3):
        h += conv(tf.nn.relu(conv(h, 3, 7, seed=seed)), 3, 10, seed=seed + 20)
    return head(tf.nn.relu(h))


def inverted(x):
    h = conv(x, 3, 8)
    return head(h + conv(tf.nn.relu6(depthwise(tf.nn.relu6(conv(h, 1, 20, seed=2)))), 1, 8, seed=3))


def squeeze_excite(x):
    h = tf.nn.relu(conv(x, 3, 12))
    gate = tf.nn.relu(conv(tf.reduce_mean(h, [1, 2], keepdims=True), 1, 5, seed=2))
    return head(h * tf.sigmoid(conv(gate, 1, 12, seed=3)))


def dense_net(x):
    for seed in (1, 2, 3):
        x = tf.concat([x, tf.nn.relu(conv(x, 3, 5, seed=seed))], -1)
    return head(x)


def flattened(x):
    h = tf.nn.relu(conv(x, 3, 9, stride=2))
    h = tf.nn.relu(tf.reshape(h, [-1, 4 * 4 * 9]) @ w(144, 11, seed=2))
    return h @ w(11, 3, seed=3)


def flattened_at_run_time(x):
    h = tf.nn.relu(conv(x, 3, 9, stride=2))
    return tf.reshape(h, tf.stack([tf.shape(h)[0], 144])) @ w(144, 3, seed=2)


def grouped(x, groups, out):
    h = tf.nn.relu(conv(x, 3, out))
    h = tf.nn.relu(conv(h, 3, out, seed=2, groups=groups))
    return head(conv(h, 1, 6, seed=3))


def shuffled(x):
    h = tf.nn.relu(conv(x, 3, 32))
    h = conv(h, 1, 32, seed=2, groups=2)
    h = tf.reshape(tf.transpose(tf.reshape(h, [-1, 8, 8, 2, 16]), [0, 1, 2, 4, 3]), [-1, 8, 8, 32])
    return head(conv(tf.nn.relu(h), 1, 32, seed=3, groups=2))


def heads_by_reshape(x, heads=4, size=5):
    q, k, v = (
        tf.transpose(tf.reshape(tf.matmul(x, w(16, heads * size, seed=s)), [-1, 6, heads, size]), [0, 2, 1, 3])
        for s in (1, 2, 3)
    )
    h = tf.matmul(tf.nn.softmax(tf.matmul(q, k, transpose_b=True)), v)
    h = tf.reshape(tf.transpose(h, [0, 2, 1, 3]), [-1, 6, heads * size])
    return x + tf.matmul(h, w(heads * size, 16, seed=4))


def heads_by_einsum(x, heads=4, size=5):
    q, k, v = (tf.einsum("abc,cde->abde", x, w(16, heads, size, seed=s)) + w(heads, size, seed=s) for s in (1, 2, 3))
    weights = tf.nn.softmax(tf.einsum("aecd,abcd->acbe", k, q))
    h = tf.einsum("acbe,aecd->abcd", weights, v)
    return x + tf.einsum("abcd,cde->abe", h, w(heads, size, 16, seed=4))


def gated(x):
    a, b = tf.split(x @ w(24, 20), 2, -1)
    return (a * tf.sigmoid(b)) @ w(10, 4, seed=2)


def split_apart(x):
    a, b, c = tf.split(x @ w(24, 30), [8, 12, 10], -1)
    return tf.nn.relu(a) @ w(8, 4, seed=2) + b @ w(12, 4, seed=3) + tf.tanh(c) @ w(10, 4, seed=4)


def sliced(x):
    h = tf.nn.relu(x @ w(24, 20))
    parts = [h[:, 3:9], tf.slice(h, [0, 5], [-1, 10]), h[..., -6:]]
    return sum(part @ w(part.shape[-1], 4, seed=i) for i, part in enumerate(parts))


def padded(x):
    h = tf.nn.relu(conv(x, 3, 8))
    return head(conv(h, 3, 12, seed=2) + tf.pad(h, [[0, 0], [0, 0], [0, 0], [2, 2]]))


def transposed(x):
    h = tf.nn.relu(conv(x, 3, 8))
    shape = tf.stack([tf.shape(h)[0], 16, 16, 10])
    h = tf.nn.relu(tf.nn.conv2d_transpose(h, w(3, 3, 10, 8, seed=2), shape, 2))
    return head(tf.image.resize(h, (8, 8)))


def sequence(x):
    h = tf.nn.relu(tf.nn.conv1d(x, w(3, 16, 12), 1, "SAME") + w(12))
    h = tf.nn.conv1d(h, w(3, 12, 9, seed=2), 1, "SAME", dilations=2)
    return tf.reduce_max(h, 1) @ w(9, 4, seed=3)


def with_itself(x):
    kernel = w(3, 3, 8, 8, seed=3)
    h = tf.nn.relu(conv(x, 3, 8))
    for _ in range(2):
        h = tf.nn.relu(tf.nn.conv2d(h, kernel, 1, "SAME"))
    return head(h)


def parametric(x):
    h = conv(x, 3, 9)
    h = tf.nn.relu(h) - w(1, 1, 9, seed=4) * tf.nn.relu(-h)
    scale, shift, mean = (w(9, seed=s) + 1 for s in (4, 5, 6))
    h = tf.compat.v1.nn.fused_batch_norm(h, scale, shift, mean, mean + 9, is_training=False)[0]
    return head(tf.where(h > 0, h, tf.nn.elu(h)))


def tokens(x):
    table = w(40, 14)
    ids = tf.cast(tf.abs(x) * 9, tf.int32)
    h = tf.gather(table, ids) + w(24, 14, seed=2)
    return tf.reduce_mean(h, 1) @ w(14, 4, seed=3)


def mixer(x):
    h = tf.transpose(x, [0, 2, 1])
    h = tf.matmul(tf.nn.relu(tf.matmul(h, w(6, 11)) + w(11)), w(11, 6, seed=2))
    return tf.transpose(h, [0, 2, 1]) + x


def tiled(x):
    h = tf.nn.relu(conv(x, 3, 6))
    pooled = tf.reduce_mean(h, [1, 2], keepdims=True)
    wide = tf.tile(pooled, [1, 8, 8, 1]) + tf.broadcast_to(pooled, tf.stack([tf.shape(x)[0], 8, 8, 6]))
    return head(tf.concat([h, wide], -1))


def stacked(x):
    a, b = tf.nn.relu(x @ w(24, 9)), tf.nn.relu(x @ w(24, 9, seed=2))
    first, second = tf.unstack(tf.stack([a, b], 1), axis=1)
    return tf.maximum(first, second) @ w(9, 4, seed=3) + tf.add_n([a, b, first]) @ w(9, 4, seed=4)


def reads_one_channel(x):
    h = tf.nn.relu(x @ w(24, 9))
    return h @ w(9, 4, seed=2) + h[:, 3:4]


def put_back(x):
    h = tf.nn.relu(x @ w(24, 9))
    return tf.concat([h[:, 1:], tf.tanh(h[:, :1])], -1) @ w(9, 4, seed=2)


def loop(x):
    h = tf.nn.relu(x @ w(24, 9))
    return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h) * 0.5), (0, h))[1] @ w(9, 4, seed=2)


def over_channels(x):
    h = x @ w(24, 9)
    return tf.nn.softmax(h) @ w(9, 4, seed=2)


NETS = {
    "plain": Net(IMAGE, plain, [(10, 1), (12, 1)], "output 'y'"),
    "residual": Net(IMAGE, residual, [(7, 1), (7, 1), (10, 1)]),
    "inverted residual": Net(IMAGE, inverted, [(8, 1), (20, 1)]),
    "depthwise multiplier": Net(IMAGE, lambda x: head(conv(depthwise(conv(x, 1, 7), 2), 1, 5, 2)), [(5, 1), (7, 1)]),
    "squeeze and excite": Net(IMAGE, squeeze_excite, [(5, 1), (12, 1)]),
    "dense net": Net(IMAGE, dense_net, [(5, 1)] * 3),
    "flattened": Net(IMAGE, flattened, [(9, 1), (11, 1)]),
    "flattened at run time": Net(IMAGE, flattened_at_run_time, [(9, 1)]),
    "wide groups": Net(IMAGE, lambda x: grouped(x, 2, 24), [(6, 1), (12, 1), (12, 2)]),
    "narrow groups": Net(IMAGE, lambda x: grouped(x, 6, 24), [(6, 1), (6, 4)]),
    "channel shuffle": Net(IMAGE, shuffled, [(16, 1), (16, 2)]),
    "heads by reshape": Net(SEQUENCE, heads_by_reshape, [(4, 5)]),
    "heads by einsum": Net(SEQUENCE, heads_by_einsum, [(4, 1), (5, 1), (5, 1)]),
    "gated": Net(ROW, gated, [(10, 1)]),
    "split": Net(ROW, split_apart, [(8, 1), (10, 1), (12, 1)]),
    "sliced": Net(ROW, sliced, [(2, 1), (3, 1), (4, 1), (5, 1), (5, 1)]),
    "padded": Net(IMAGE, padded, [(4, 1), (8, 1)]),
    "transposed": Net(IMAGE, transposed, [(8, 1), (10, 1)]),
    "sequence": Net(SEQUENCE, sequence, [(9, 1), (12, 1)]),
    "a kernel used twice": Net(IMAGE, with_itself, [(8, 1)]),
    "parametric": Net(IMAGE, parametric, [(9, 1)]),
    "tokens": Net(ROW, tokens, [(14, 1)]),
    "mixer": Net(SEQUENCE, mixer, [(11, 1)]),
    "tiled": Net(IMAGE, tiled, [(6, 1)]),
    "stacked": Net(ROW, stacked, [(9, 1)]),
    "one channel is read": Net(ROW, reads_one_channel, [(8, 1)]),
    "put back": Net(ROW, put_back, [(9, 1)]),
    "loop": Net(ROW, loop, [], "StatelessWhile"),
    "softmax": Net(ROW, over_channels, [], "normalises over them"),
}


def build(path: Path, shape: tuple[int | None, ...], compute: Callable) -> model.Model:
    """A TF 1 model of `x`, loaded, with its constants folded."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, shape, "x")
        y = tf.identity(compute(x), "y")
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(path)
    prune_graph.run(loaded, Log())
    fold_constants.run(loaded, Log())
    prune_graph.run(loaded, Log())
    return loaded
