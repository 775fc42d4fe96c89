"""Where folding stops: shared weights, results, training mode, numbers that float32 cannot hold, long travels."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, inputs_of, left_of, norm, ops, run, settled
from tfopt.graph import Graph, const_node, make_node
from tfopt.passes.fold_affine import fold_affine
from tfopt.rewrite import Log

layers = keras.layers
IMAGE, ROW = (8, 8, 3), (6,)


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
