"""What folds, what must not, and why, on Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, left_of, model_of, norm, ops, settled
from tfopt.passes.fold_affine import fold_affine
from tfopt.rewrite import Log

layers = keras.layers


IMAGE, ROW, SIGNAL = (8, 8, 3), (6,), (12, 4)
DEPTHWISE = "DepthwiseConv2dNative"

# name: (input shape, layers, ops that are left; None where they do not matter)
FOLDS = {
    "conv-bn": (IMAGE, lambda: [layers.Conv2D(4, 3, use_bias=False), norm()], "Conv2D BiasAdd"),
    "conv-bias-bn": (IMAGE, lambda: [layers.Conv2D(4, 3), norm()], "Conv2D BiasAdd"),
    "conv-same-bn": (IMAGE, lambda: [layers.Conv2D(4, 3, padding="same"), norm()], "Conv2D BiasAdd"),
    "dense-bn": (ROW, lambda: [layers.Dense(5), norm()], "MatMul BiasAdd"),
    "conv-gap-bn": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), norm()],
        "Conv2D BiasAdd Mean",
    ),
    "conv-average-bn": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3), layers.AveragePooling2D(2), norm()],
        "Conv2D BiasAdd AvgPool",
    ),
    "conv-max-bn": (IMAGE, lambda: [layers.Conv2D(4, 3), layers.MaxPooling2D(2), norm()], "Conv2D BiasAdd MaxPool"),
    "depthwise-bn": (IMAGE, lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2), norm()], f"{DEPTHWISE} BiasAdd"),
    "transposed-bn": (IMAGE, lambda: [layers.Conv2DTranspose(5, 3, strides=2, padding="same"), norm()], None),
    "separable-bn": (IMAGE, lambda: [layers.SeparableConv2D(4, 3), norm()], f"{DEPTHWISE} Conv2D BiasAdd"),
    "conv1d-bn": (SIGNAL, lambda: [layers.Conv1D(5, 3), norm()], "ExpandDims Conv2D BiasAdd Squeeze"),
    "conv3d-bn": ((4, 4, 4, 2), lambda: [layers.Conv3D(3, 2), norm()], "Conv3D BiasAdd"),
    "dilated-bn": (IMAGE, lambda: [layers.Conv2D(4, 3, dilation_rate=2), norm()], None),
    "bn-conv": (IMAGE, lambda: [norm(), layers.Conv2D(4, 3)], "Conv2D BiasAdd"),
    "bn-conv-without-bias": (IMAGE, lambda: [norm(), layers.Conv2D(4, 3, use_bias=False)], "Conv2D BiasAdd"),
    "bn-conv-1x1-same": (IMAGE, lambda: [norm(), layers.Conv2D(4, 1, padding="same")], "Conv2D BiasAdd"),
    "bn-conv-same-that-pads-nothing": (
        IMAGE,
        lambda: [norm(), layers.Conv2D(4, 2, 2, padding="same")],
        "Conv2D BiasAdd",
    ),
    "bn-depthwise": (IMAGE, lambda: [norm(), layers.DepthwiseConv2D(3, depth_multiplier=2)], f"{DEPTHWISE} BiasAdd"),
    "bn-conv3d": ((4, 4, 4, 2), lambda: [norm(), layers.Conv3D(3, 2)], "Conv3D BiasAdd"),
    "bn-dense": (ROW, lambda: [norm(), layers.Dense(5)], "MatMul BiasAdd"),
    "bn-flatten-dense": (IMAGE, lambda: [norm(), layers.Flatten(), layers.Dense(5)], None),
    "conv-relu-bn-conv": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3, activation="relu"), norm(), layers.Conv2D(5, 3)],
        "Conv2D BiasAdd Relu Conv2D BiasAdd",
    ),
    "dense-relu-bn-dense": (
        ROW,
        lambda: [layers.Dense(5, activation="relu"), norm(), layers.Dense(3)],
        "MatMul BiasAdd Relu MatMul BiasAdd",
    ),
    "bn-bn-dense-bn": (ROW, lambda: [norm(), norm(), layers.Dense(5), norm()], "MatMul BiasAdd"),
    "rescaling-conv": (IMAGE, lambda: [layers.Rescaling(1 / 127.5, offset=-1), layers.Conv2D(4, 3)], "Conv2D BiasAdd"),
    "dense-on-sequence-bn": (SIGNAL, lambda: [layers.Dense(5), norm()], None),
    "conv-permute-bn": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3), layers.Permute((3, 1, 2)), layers.BatchNormalization(axis=1)],
        "Conv2D BiasAdd Transpose",
    ),
    "conv-bilinear-bn": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3), layers.UpSampling2D(2, interpolation="bilinear"), norm()],
        None,
    ),
    "conv-upsample-bn": (IMAGE, lambda: [layers.Conv2D(4, 3), layers.UpSampling2D(2), norm()], None),
    "conv-crop-bn": (IMAGE, lambda: [layers.Conv2D(4, 3), layers.Cropping2D(1), norm()], "Conv2D BiasAdd StridedSlice"),
    "conv-reshape-bn": (IMAGE, lambda: [layers.Conv2D(4, 3), layers.Reshape((36, 4)), norm()], None),
    "conv-flatten-bn": (IMAGE, lambda: [layers.Conv2D(4, 8), layers.Flatten(), norm()], None),
    "layernorm-dense": (SIGNAL, lambda: [layers.LayerNormalization(), layers.Dense(5)], None),
}


@pytest.mark.parametrize("name", FOLDS)
def test_nothing_is_left(name):
    shape, stack, wanted = FOLDS[name]
    graph = model_of(shape, *stack())
    log = fold(graph)
    left = [(n, what) for n, what in left_of(graph) if "Rsqrt" not in [graph.nodes[u].op for u in graph.users(n)]]
    assert not left, log.refused
    assert log.applied
    if wanted is not None:
        assert [op for op in ops(graph) if op not in ("Shape", "Pack")] == wanted.split()


# name: (input shape, layers, leftovers, part of the reason)
KEPT = {
    "bn-conv-same": (
        IMAGE,
        lambda: [norm(), layers.Conv2D(4, 3, padding="same")],
        "shift",
        "would not reach the border",
    ),
    "conv-relu-bn": (IMAGE, lambda: [layers.Conv2D(4, 3, activation="relu"), norm()], "shift", "is a result"),
    "conv-tanh-bn": (
        IMAGE,
        lambda: [layers.Conv2D(4, 3, activation="tanh"), norm()],
        "scale shift",
        "back through Tanh",
    ),
    "bn-relu": (ROW, lambda: [norm(), layers.ReLU()], "scale shift", "is an input"),
    "bn-pad-conv": (
        IMAGE,
        lambda: [norm(), layers.ZeroPadding2D(1), layers.Conv2D(4, 3)],
        "shift",
        "would not reach the border",
    ),
    "bn-sigmoid-dense": (
        ROW,
        lambda: [norm(), layers.Activation("sigmoid"), layers.Dense(3)],
        "scale shift",
        "Sigmoid",
    ),
    "bn-transposed": (IMAGE, lambda: [norm(), layers.Conv2DTranspose(4, 3, strides=2)], "shift", "border"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_mathematics_forbids_stays_with_its_reason(name):
    shape, stack, kept, reason = KEPT[name]
    graph = model_of(shape, *stack())
    log = fold(graph)
    assert sorted(what for _, what in left_of(graph)) == kept.split()
    assert any(reason in text for text in log.refused.values()), log.refused


def test_a_negative_scale_stays_before_relu():
    graph = frozen(
        lambda x: tf.nn.relu(x * np.array([1, -2, 3, -4], "float32")) @ np.ones((4, 2), "float32"),
        tf.TensorSpec((None, 4)),
    )
    log = fold(graph)
    assert [what for _, what in left_of(graph)] == ["scale"]
    assert any("the scale is negative in 2 of 4 channels" in text for text in log.refused.values()), log.refused


def test_bn_relu_conv_leaves_one_add():
    graph = model_of(IMAGE, norm(), layers.ReLU(), layers.Conv2D(4, 3))
    fold(graph)
    assert [what for _, what in left_of(graph)] == ["shift"]
    assert ops(graph) == ["AddV2", "Relu", "Conv2D", "BiasAdd"]


def test_grouped_convolutions_fold_on_both_sides():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 2, 6)).astype("float32")
    a, b, c, d = rng.uniform(0.5, 2, (4, 12)).astype("float32")
    graph = frozen(
        lambda x: tf.nn.conv2d(x * a[:4] + b[:4], kernel, 1, "VALID") * c[:6] + d[:6], tf.TensorSpec((None, 6, 6, 4))
    )
    fold(graph)
    assert ops(graph) == ["Conv2D", "BiasAdd"]


def test_residual_add_takes_the_scale_in_both_branches():
    x = layers.Input(IMAGE)
    y = layers.Add()([layers.Conv2D(4, 3)(x), layers.Conv2D(4, 3, use_bias=False)(x)])
    graph = settled(keras.Model(x, layers.ReLU()(norm()(y))))
    fold(graph)
    assert not left_of(graph)
    assert sorted(ops(graph)) == ["AddV2", "BiasAdd", "Conv2D", "Conv2D", "Relu"]


def test_concat_splits_the_coefficients():
    x = layers.Input(IMAGE)
    y = layers.Concatenate()([layers.Conv2D(4, 3)(x), layers.Conv2D(5, 3)(x)])
    graph = settled(keras.Model(x, norm()(y)))
    fold(graph)
    assert not left_of(graph)
    assert sorted(ops(graph)) == ["BiasAdd", "BiasAdd", "ConcatV2", "Conv2D", "Conv2D"]


def test_concat_with_a_branch_that_cannot_take_it_moves_forward():
    x = layers.Input(IMAGE)
    y = layers.Concatenate()([layers.Conv2D(4, 3, padding="same", activation="relu")(x), x])
    graph = settled(keras.Model(x, layers.Conv2D(3, 3)(norm()(y))))
    fold(graph)
    assert not left_of(graph)


def test_a_conv_that_others_use_is_folded_only_where_they_can_make_up_for_it():
    x = layers.Input(IMAGE)
    shared = layers.Conv2D(4, 3, padding="same")(x)
    graph = settled(keras.Model(x, [layers.ReLU()(norm()(shared)), layers.Activation("tanh")(shared)]))
    log = fold(graph)
    assert sorted(what for _, what in left_of(graph)) == ["scale", "shift"]
    assert any("also feeds Tanh" in text for text in log.refused.values()), log.refused


def test_two_batch_norms_on_one_conv_leave_one():
    x = layers.Input(IMAGE)
    shared = layers.Conv2D(4, 3)(x)
    graph = settled(keras.Model(x, [layers.ReLU()(norm()(shared)), layers.Activation("tanh")(norm()(shared))]))
    fold(graph)
    assert sum("scale" in what for _, what in left_of(graph)) == 1


def test_squeeze_and_excite_lets_a_scale_through():
    x = layers.Input(IMAGE)
    gate = layers.Dense(4, activation="sigmoid")(layers.GlobalAveragePooling2D()(x))
    y = layers.Multiply()([layers.Conv2D(4, 3)(x), layers.Reshape((1, 1, 4))(gate)])
    y = layers.Rescaling(3.0)(y)
    graph = settled(keras.Model(x, layers.Conv2D(2, 1)(y)))
    fold(graph)
    assert not left_of(graph)


def test_an_embedding_takes_the_scale():
    x = layers.Input((7,), dtype="int32")
    y = layers.Rescaling(8.0)(layers.Embedding(11, 6)(x))
    graph = settled(keras.Model(x, layers.Activation("tanh")(y)))
    fold(graph)
    assert not left_of(graph)


def test_a_scale_before_layer_norm_cancels():
    graph = model_of(SIGNAL, layers.Rescaling(100.0), layers.LayerNormalization(), layers.Dense(3))
    log = fold(graph)
    assert [what for _, what in left_of(graph)] == ["shift"], log.refused  # the epsilon


def test_layer_norm_of_tf_keras_is_no_bug():
    tf_keras = pytest.importorskip("tf_keras")
    norm_layer = tf_keras.layers.LayerNormalization()
    model = tf_keras.Sequential([tf_keras.layers.Input((5, 8)), norm_layer, tf_keras.layers.Dense(3)])
    norm_layer.set_weights([np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)])
    graph = frozen(model, tf.TensorSpec((None, 5, 8)))
    assert "FusedBatchNormV3" in ops(graph)
    log = fold(graph)
    assert not log.notes
    assert not left_of(graph)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_fused_batch_norm(data_format, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(1, 1, 3, 4)).astype("float32")
    gamma, beta, mean = rng.normal(size=(3, 4)).astype("float32")
    variance = rng.uniform(0.5, 2, 4).astype("float32")
    transposed = data_format == "NCHW"

    def network(x):
        y = tf.nn.conv2d(x, kernel, 1, "VALID")
        y = tf.transpose(y, (0, 3, 1, 2)) if transposed else y
        return tf.raw_ops.FusedBatchNormV3(
            x=y, scale=gamma, offset=beta, mean=mean, variance=variance, is_training=False, data_format=data_format
        )[0]

    graph = frozen(network, tf.TensorSpec((2, 5, 5, 3)))
    if transposed:  # the CPU has no kernel for it: compare only what is left
        fold_affine(graph, [], Log())
    else:
        fold(graph)
    assert not left_of(graph)
    assert "FusedBatchNormV3" not in ops(graph)
