"""Linear ops absorb a scale and a shift on both sides, along every axis that their weights have."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.affine_graphs import fold, frozen, inputs_of, left_of, ops
from tfopt.graph import Graph, const_node, infer_shapes, make_node
from tfopt.rules.linear import linear
from tfopt.rules.view import View

RNG = np.random.default_rng(11)


def weights(*shape):
    return RNG.normal(size=shape).astype("float32")


def factor(*shape):
    return RNG.uniform(0.5, 2, shape).astype("float32")


W = {key: weights(*map(int, key)) for key in ("45", "54", "345", "543", "256", "435", "1145", "3345", "3324", "3354")}

# name: (function of x, shape of x)
PRODUCTS = {
    "matmul": (lambda x: x @ W["45"], (3, 4)),
    "matmul transpose b": (lambda x: tf.matmul(x, W["54"], transpose_b=True), (3, 4)),
    "matmul transpose a": (lambda x: tf.matmul(x, W["45"], transpose_a=True), (4, 3)),
    "matmul of weights and x": (lambda x: tf.matmul(W["54"], x), (4, 3)),
    "batch matmul": (lambda x: tf.matmul(x, W["345"]), (3, 2, 4)),
    "batch matmul broadcast weights": (lambda x: tf.matmul(x, W["45"]), (2, 3, 4)),
    "batch matmul broadcast x": (lambda x: tf.matmul(x, W["345"]), (1, 2, 4)),
    "batch matmul adjoint": (lambda x: tf.matmul(x, W["543"], transpose_b=True), (5, 2, 3)),
    "einsum dense": (lambda x: tf.einsum("bti,io->bto", x, W["45"]), (2, 3, 4)),
    "einsum heads": (lambda x: tf.einsum("bti,iho->btho", x, W["435"]), (2, 6, 4)),
    "einsum heads back": (lambda x: tf.einsum("bthi,hio->bto", x, W["345"]), (2, 6, 3, 4)),
    "einsum ellipsis": (lambda x: tf.einsum("...i,io->...o", x, W["45"]), (2, 3, 4)),
    "einsum weights first": (lambda x: tf.einsum("io,bti->bto", W["45"], x), (2, 3, 4)),
    "einsum transposing": (lambda x: tf.einsum("bti,io->bot", x, W["45"]), (2, 3, 4)),
}
CONVOLUTIONS = {
    "conv": (lambda x: tf.nn.conv2d(x, W["3345"], 1, "VALID"), (2, 6, 6, 4)),
    "conv strided dilated": (lambda x: tf.nn.conv2d(x, W["3345"], [1, 2], "VALID", dilations=[1, 1]), (2, 7, 9, 4)),
    "conv explicit without padding": (
        lambda x: tf.nn.conv2d(x, W["3345"], 1, [[0, 0], [0, 0], [0, 0], [0, 0]]),
        (2, 6, 6, 4),
    ),
    "pointwise same": (lambda x: tf.nn.conv2d(x, W["1145"], 2, "SAME"), (2, 5, 5, 4)),
    "grouped": (lambda x: tf.nn.conv2d(x, W["3324"], 1, "VALID"), (2, 6, 6, 4)),
    "depthwise": (lambda x: tf.nn.depthwise_conv2d(x, W["3345"], [1, 1, 1, 1], "VALID"), (2, 6, 6, 4)),
}


def bounds(function, shape):
    out = tf.convert_to_tensor(function(tf.zeros(shape))).shape
    return shape[-1], out[-1]


@pytest.mark.parametrize("name", [*PRODUCTS, *CONVOLUTIONS])
def test_both_sides(name):
    function, shape = (PRODUCTS | CONVOLUTIONS)[name]
    fan_in, fan_out = bounds(function, shape)
    a, b, c, d = factor(fan_in), factor(fan_in), factor(fan_out), factor(fan_out)
    graph = frozen(lambda x: tf.tanh(function(x * a + b) * c + d), tf.TensorSpec(shape))
    log = fold(graph)
    along_a_free_axis = "transpose a" in name or "weights and x" in name or name == "einsum transposing"
    if not along_a_free_axis:
        assert not left_of(graph), log.refused
        assert len(ops(graph)) == 3


@pytest.mark.parametrize("name", PRODUCTS)
def test_uniform_scales_fold_whatever_the_layout(name):
    function, shape = PRODUCTS[name]
    graph = frozen(lambda x: tf.tanh(function(x * 3.0) * 0.5 + 0.25), tf.TensorSpec(shape))
    log = fold(graph)
    assert not left_of(graph), log.refused


def test_a_scale_along_several_axes_of_the_weights():
    k = factor(3, 5)
    graph = frozen(lambda x: tf.tanh(tf.einsum("bti,iho->btho", x, W["435"]) * k + k), tf.TensorSpec((2, 6, 4)))
    fold(graph)
    assert not left_of(graph)


def test_transposed_convolution_takes_scales_on_both_sides():
    a, c, d = factor(4), factor(5), factor(5)
    graph = frozen(
        lambda x: tf.tanh(tf.nn.conv2d_transpose(x * a, W["3354"], (2, 11, 11, 5), 2, "SAME") * c + d),
        tf.TensorSpec((2, 6, 6, 4)),
    )
    fold(graph)
    assert not left_of(graph)


def test_scaled_dot_product_takes_its_factor_into_the_query():
    def attend(x):
        query, key = x @ W["45"], x @ W["45"][::-1]
        return tf.nn.softmax(tf.matmul(query, key, transpose_b=True) * 0.125)

    graph = frozen(attend, tf.TensorSpec((2, 3, 4)))
    fold(graph)
    assert not left_of(graph)


def test_a_lookup_absorbs():
    table, k, t = weights(9, 4), factor(4), factor(4)
    graph = frozen(lambda ids: tf.tanh(tf.gather(table, ids) * k + t), tf.TensorSpec((2, 3), tf.int32))
    fold(graph)
    assert not left_of(graph)
    assert ops(graph) == ["GatherV2", "Tanh"]


@pytest.mark.parametrize("padding, stride, size, left", [("SAME", 1, 6, True), ("SAME", 3, 6, False)])
def test_a_shift_passes_same_padding_only_where_it_pads_nothing(padding, stride, size, left):
    graph = frozen(
        lambda x: tf.tanh(tf.nn.conv2d(x + 1.5, W["3345"], stride, padding)), tf.TensorSpec((2, size, size, 4))
    )
    log = fold(graph)
    assert bool(left_of(graph)) == left
    if left:
        assert "would not reach the border" in next(iter(log.refused.values()))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_channels_first(layout):
    """The CPU cannot run every NCHW op: the new weights are compared with what mathematics says."""
    axis = 1 if layout == "NCHW" else 3
    shape = [2, 5, 5, 5]
    shape[axis] = 4
    k = factor(5)
    wide = k.reshape([-1 if a == axis else 1 for a in range(4)])
    nodes = [
        make_node("x", "Placeholder", dtype=tf.float32, shape=tuple(shape)),
        const_node("w", W["3345"]),
        const_node("k", wide),
        make_node("conv", "Conv2D", ["x", "w"], T=tf.float32, strides=[1] * 4, padding="SAME", data_format=layout),
        make_node("scaled", "Mul", ["conv", "k"], T=tf.float32),
        make_node("shifted", "AddV2", ["scaled", "k"], T=tf.float32),
    ]
    graph = Graph(nodes, {"out": "shifted"}, arguments=["x"])
    from tfopt.passes.fold_affine import fold_affine
    from tfopt.rewrite import Log

    fold_affine(graph, [], Log())
    assert ops(graph) == ["Conv2D", "BiasAdd"]
    conv = graph.nodes["conv"]
    np.testing.assert_allclose(graph.constant(conv.input[1]), W["3345"] * k, rtol=1e-6)
    bias = graph.producer(graph.outputs["out"])
    assert bias.attr["data_format"].s.decode() == layout
    np.testing.assert_array_equal(graph.constant(bias.input[1]), k)


@pytest.mark.parametrize("equation, operands", [("bij->bji", 1), ("bij,bjk,bkl->bil", 3)])
def test_an_einsum_that_is_no_product_of_two_refuses(equation, operands):
    graph = frozen(lambda x: tf.einsum(equation, *[x * 2.0] * operands, optimize="greedy"), tf.TensorSpec((2, 3, 3)))
    fold(graph)


def test_weights_that_vary_are_not_linear():
    graph = frozen(lambda x, y: tf.matmul(x, y), tf.TensorSpec((2, 3)), tf.TensorSpec((3, 4)))
    view = View(graph, infer_shapes(graph))
    product = next(node for node in graph.nodes.values() if node.op == "MatMul")
    assert linear(view, product) is None
    assert len(inputs_of(graph)) == 2
