"""What folds, what must not, and why, on Keras models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, inputs_of, left_of, ops, run
from tests.conftest import randomise_batch_norms
from tfopt.graph import Graph, const_node, make_node
from tfopt.passes.fold_affine import fold_affine
from tfopt.rewrite import Log

layers = keras.layers


def model_of(shape, *stack) -> Graph:
    """A sequential model with batch norms that have something to do, frozen."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([layers.Input(shape), *stack])
    return settled(model)


def settled(model: keras.Model) -> Graph:
    randomise_batch_norms(model)
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name in ("bias", "beta", "gamma") and "normalization" not in weight.path:
            weight.assign(rng.normal(0.5, 0.3, weight.shape).astype("float32"))
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs]
    return frozen(model if len(specs) == 1 else lambda *x: model(list(x)), *specs)


def norm() -> layers.Layer:
    return layers.BatchNormalization()


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


def test_training_mode_is_reported_and_left():
    def network(x):
        y = tf.nn.conv2d(x, np.ones((1, 1, 3, 3), "float32"), 1, "VALID")
        return tf.compat.v1.nn.fused_batch_norm(y, [1.5, 2, 3], [0.1, 0.2, 0.3], is_training=True)[0]

    graph = frozen(network, tf.TensorSpec((2, 5, 5, 3)))
    log = fold(graph)
    assert any("serves in training mode" in note for note in log.notes)
    assert "FusedBatchNormV3" in ops(graph)


def test_a_result_between_conv_and_batch_norm_stays_what_it_is():
    x = layers.Input(IMAGE)
    features = layers.Conv2D(4, 3)(x)
    graph = settled(keras.Model(x, [features, norm()(features)]))
    fold(graph)
    assert "scale" in [what for _, what in left_of(graph)]


def test_twins_fold_together_and_go_on_sharing_their_weights():
    layer = layers.Conv2D(64, 3)
    norm_layer = norm()
    a, b = layers.Input((16, 16, 32)), layers.Input((16, 16, 32))
    outputs = [layers.ReLU()(norm_layer(layer(x))) for x in (a, b)]
    graph = settled(keras.Model([a, b], outputs))
    fold(graph)
    assert not left_of(graph)
    convs = [node for node in graph.nodes.values() if node.op == "Conv2D"]
    assert len({node.input[1] for node in convs}) == 1


def test_a_large_shared_weight_is_not_copied():
    layer = layers.Conv2D(64, 3, use_bias=False)
    a, b = layers.Input((8, 8, 32)), layers.Input((8, 8, 32))
    graph = settled(keras.Model([a, b], [layers.Activation("tanh")(norm()(layer(a))), layers.ReLU()(layer(b))]))
    log = fold(graph)
    assert any("a copy would grow the model" in text for text in log.refused.values())
    assert (
        len([node for node in graph.nodes.values() if node.op == "Const" and graph.constant(node.name).nbytes > 9999])
        == 1
    )


def test_integers_are_left_alone():
    graph = frozen(lambda x: (x * 3 + 1) * 1, tf.TensorSpec((None, 4), tf.int32))
    fold(graph)
    assert ops(graph) == ["Mul", "AddV2"]


def test_an_enlarging_constant_is_no_affine():
    graph = frozen(lambda x: x * np.ones((3, 4), "float32") * 2.0, tf.TensorSpec((1, 4)))
    assert [what for _, what in left_of(graph)] == ["scale"]
    fold(graph)
    assert not left_of(graph)


def test_a_dead_channel_folds():
    kernel = np.ones((4, 3), "float32")
    scale = np.array([0.0, 2.0, -1.0], "float32")
    back = frozen(lambda x: (x @ kernel) * scale + 1.0, tf.TensorSpec((None, 4)))
    fold(back)
    assert not left_of(back)
    forward = frozen(lambda x: (tf.nn.relu(x) * np.array([0, 1, 2, 3], "float32")) @ kernel, tf.TensorSpec((None, 4)))
    fold(forward)
    assert not left_of(forward)


@pytest.mark.parametrize("scale", [1e-44, 1e39])
def test_what_float32_cannot_hold_is_refused(scale):
    kernel = np.full((4, 3), 1e-3 if scale < 1 else 1e3, "float32")
    graph = frozen(
        lambda x: tf.tanh((x @ kernel) * tf.cast(tf.cast(scale, tf.float64), tf.float32)), tf.TensorSpec((None, 4))
    )
    before = run(graph, inputs_of(graph))
    fold_affine(graph, [], Log())
    np.testing.assert_array_equal(run(graph, inputs_of(graph))[0], before[0])


def test_a_shift_that_would_drown_its_operand_stays():
    kernel = np.ones((4, 3), "float32")
    graph = frozen(lambda x: (x - 1.7e9) @ kernel, tf.TensorSpec((None, 4)))
    log = fold(graph, [np.full((2, 4), 1.7e9, "float32")])
    assert any("drown" in text for text in log.refused.values())


def test_gelu_keeps_its_constants():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input(ROW), layers.Dense(8, activation="gelu"), layers.Dense(3)])
    graph = settled(model)
    count = len(ops(graph))
    fold(graph)
    assert len(ops(graph)) == count
    assert not left_of(graph)


def test_a_long_chain_does_not_overflow():
    nodes = [make_node("x", "Placeholder", dtype=tf.float32, shape=(2, 4)), const_node("k", np.full(4, 2, "float32"))]
    nodes.append(make_node("y", "Mul", ["x", "k"], T=tf.float32))
    last = "y"
    for index in range(3000):
        nodes.append(make_node(f"relu{index}", "Relu", [last], T=tf.float32))
        last = f"relu{index}"
    graph = Graph(nodes, {"out": last}, arguments=["x"])
    log = fold(graph)
    assert "travel" in log.refused["fold_affine", "y"]


def test_function_bodies_have_unknown_shapes():
    nodes = [
        make_node("x", "Placeholder", dtype=tf.float32),
        const_node("w", np.ones((1, 1, 3, 4), "float32")),
        const_node("s", np.arange(1, 5).astype("float32")),
        make_node("conv", "Conv2D", ["x", "w"], T=tf.float32, strides=[1, 1, 1, 1], padding="VALID"),
        make_node("scaled", "Mul", ["conv", "s"], T=tf.float32),
        make_node("other", "Mul", ["x", "s"], T=tf.float32),
    ]
    graph = Graph(nodes, {"out": "scaled", "other": "other"}, arguments=["x"], is_body=True)
    fold_affine(graph, [], Log())
    assert ops(graph).count("Mul") == 1
    assert graph.outputs["out"] == "conv"
