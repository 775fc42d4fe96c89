"""An affine passes through each op back to a linear one, and forward to the next, with equal numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, left_of

RNG = np.random.default_rng(5)
SCALE = RNG.uniform(0.5, 2, 4).astype("float32")
SHIFT = RNG.normal(size=4).astype("float32")
KERNEL = RNG.normal(size=(1, 1, 4, 4)).astype("float32")
IMAGE = (2, 6, 6, 4)


def conv(x):
    return tf.nn.conv2d(x, KERNEL, 1, "VALID")


def affine(x):
    return x * SCALE + SHIFT


# Ops that keep four channels last: name -> (function, kinds that pass back, kinds that pass forward).
BOTH, SCALES, NONE = {"scale", "shift"}, {"scale"}, set()
OPS = {
    "relu": (tf.nn.relu, SCALES, SCALES),
    "leaky": (tf.nn.leaky_relu, SCALES, SCALES),
    "abs": (tf.abs, SCALES, SCALES),
    "tanh": (tf.tanh, NONE, NONE),
    "max pool same": (lambda x: tf.nn.max_pool2d(x, 3, 2, "SAME"), BOTH, BOTH),
    "avg pool same": (lambda x: tf.nn.avg_pool2d(x, 3, 2, "SAME"), BOTH, BOTH),
    "avg pool valid": (lambda x: tf.nn.avg_pool2d(x, 2, 2, "VALID"), BOTH, BOTH),
    "bilinear": (lambda x: tf.image.resize(x, (9, 5)), BOTH, BOTH),
    "bicubic": (lambda x: tf.image.resize(x, (9, 5), "bicubic"), BOTH, BOTH),
    "nearest": (lambda x: tf.image.resize(x, (9, 5), "nearest"), BOTH, BOTH),
    "bilinear v1": (lambda x: tf.compat.v1.image.resize_bilinear(x, (9, 5), align_corners=True), BOTH, BOTH),
    "zero pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [2, 1], [0, 0]]), SCALES, SCALES),
    "mirror pad": (lambda x: tf.pad(x, [[0, 0], [1, 2], [2, 1], [0, 0]], "REFLECT"), BOTH, BOTH),
    "pad with a number": (lambda x: tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]], constant_values=3.0), NONE, NONE),
    "slice": (lambda x: tf.slice(x, [0, 1, 2, 0], [2, 3, -1, 4]), BOTH, BOTH),
    "strided slice": (lambda x: x[:, 1:-1, ::2, :], BOTH, BOTH),
    "reversed channels": (lambda x: x[..., ::-1], BOTH, BOTH),
    # Back, each slice asks for a part of the coefficient only, and the two do not meet.
    "channels taken apart": (lambda x: tf.concat([x[..., 2:], x[..., :2]], -1), NONE, BOTH),
    "index and stack": (lambda x: tf.stack([x[:, 0], x[:, 3]], 1), BOTH, BOTH),
    "new axis": (lambda x: tf.squeeze(x[:, tf.newaxis], 1), BOTH, BOTH),
    "tile": (lambda x: tf.tile(x, [1, 2, 1, 1]), BOTH, BOTH),
    "reverse": (lambda x: tf.reverse(x, [1]), BOTH, BOTH),
    "transpose there and back": (lambda x: tf.transpose(tf.transpose(x, (3, 1, 2, 0)), (3, 1, 2, 0)), BOTH, BOTH),
    "reshape there and back": (lambda x: tf.reshape(tf.reshape(x, (2, 36, 4)), IMAGE), BOTH, BOTH),
    "flatten and back": (lambda x: tf.reshape(tf.reshape(x, (2, 144)), IMAGE), BOTH, BOTH),
    "space to batch": (lambda x: tf.space_to_batch(x, [2, 2], [[0, 0], [0, 0]]), BOTH, BOTH),
    "space to batch padded": (lambda x: tf.space_to_batch(x, [2, 2], [[1, 1], [0, 0]]), SCALES, SCALES),
    "to batch and back": (
        lambda x: tf.batch_to_space(tf.space_to_batch(x, [2, 3], [[0, 0], [0, 0]]), [2, 3], [[1, 0], [0, 1]]),
        BOTH,
        BOTH,
    ),
    "to depth and back": (lambda x: tf.nn.depth_to_space(tf.nn.space_to_depth(x, 2), 2), BOTH, BOTH),
    "split": (lambda x: tf.concat(tf.split(x, 2, -1)[::-1], -1), BOTH, BOTH),
    "split unevenly": (lambda x: tf.concat(tf.split(x, [1, 3], -1)[::-1], -1), BOTH, BOTH),
    "unstack": (lambda x: tf.stack(tf.unstack(x, axis=3)[::-1], 3), BOTH, BOTH),
    "mean keeps": (lambda x: tf.reduce_mean(x, (1, 2), keepdims=True), BOTH, BOTH),
    "max keeps": (lambda x: tf.reduce_max(x, (1, 2), keepdims=True), BOTH, BOTH),
    "sum keeps": (lambda x: tf.reduce_sum(x, (1, 2), keepdims=True), SCALES, SCALES),
    "maximum of halves": (lambda x: tf.maximum(x[:, :3], x[:, 3:]), BOTH, BOTH),
    "maximum with zero": (lambda x: tf.maximum(x, 0.0), SCALES, SCALES),
    "twice": (lambda x: x + x, SCALES, BOTH),
    "residual": (lambda x: x + tf.nn.relu(x), SCALES, SCALES),
    "two pools": (
        lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME") + tf.nn.avg_pool2d(x, 3, 1, "SAME"),
        SCALES,
        BOTH,
    ),
    "pools side by side": (
        lambda x: tf.concat([tf.nn.max_pool2d(x, 3, 1, "SAME"), tf.nn.avg_pool2d(x, 3, 1, "SAME")], 1),
        BOTH,
        BOTH,
    ),
    "gate": (lambda x: x * tf.reduce_mean(tf.ones_like(x), (1, 2), keepdims=True), SCALES, SCALES),
    "choice": (lambda x: tf.where(tf.constant(RNG.integers(0, 2, (2, 6, 6, 4)) > 0), x, x[:, ::-1]), BOTH, BOTH),
    "difference": (lambda x: x[:, :3] - x[:, 3:], SCALES, BOTH),
    "sum of three": (lambda x: tf.add_n([x, tf.nn.relu(x), x]), SCALES, SCALES),
}


@pytest.mark.parametrize("name", OPS)
def test_back(name):
    function, passes, _ = OPS[name]
    graph = frozen(lambda x: tf.tanh(affine(function(conv(x)))), tf.TensorSpec(IMAGE))
    log = fold(graph)
    assert {what for _, what in left_of(graph)} == BOTH - passes, log.refused


@pytest.mark.parametrize("name", OPS)
def test_forward(name):
    function, _, passes = OPS[name]
    graph = frozen(lambda x: tf.tanh(conv(function(affine(x)))), tf.TensorSpec(IMAGE))
    log = fold(graph)
    assert {what for _, what in left_of(graph)} == BOTH - passes, log.refused


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_three_dimensions(padding):
    kernel = RNG.normal(size=(1, 1, 1, 4, 3)).astype("float32")
    graph = frozen(
        lambda x: tf.nn.avg_pool3d(tf.nn.conv3d(x, kernel, [1] * 5, "VALID"), 2, 2, padding) * SCALE[:3] + SHIFT[:3],
        tf.TensorSpec((2, 5, 5, 5, 4)),
    )
    fold(graph)
    assert not left_of(graph)


def test_a_negative_scale_passes_average_but_not_maximum():
    for pool, left in ((tf.nn.avg_pool2d, set()), (tf.nn.max_pool2d, {"scale"})):
        graph = frozen(lambda x, pool=pool: tf.tanh(pool(conv(x), 2, 2, "VALID") * -SCALE), tf.TensorSpec(IMAGE))
        fold(graph)
        assert {what for _, what in left_of(graph)} == left
