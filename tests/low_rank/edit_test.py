"""Factors in the place of a layer compute what the layer computes: every method, padding, stride and layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import rows, save_tf1, v1
from tests.passes.int8_weights_test import _build
from tfopt import model
from tfopt.function import Function
from tfopt.low_rank.edit import replace
from tfopt.low_rank.factors import Factors, decompose
from tfopt.low_rank.layers import find
from tfopt.rewrite import Log


def weight(*shape, name="w"):
    return v1.get_variable(name, initializer=rows(*shape, seed=1))


def layer_of(loaded, **options):
    log = Log()
    (layer,) = find(loaded, log, set(), **{"keep_first": False, **options})
    assert not log.refused
    return layer


def answer(loaded, x, signature="serving_default"):
    with Function(loaded) as function:
        return function(signature, {"x": x})["y"]


def assert_equal(received, expected):
    assert received.shape == expected.shape
    np.testing.assert_allclose(received, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())


PRODUCTS = {
    "dense": ((5, 48), (48, 40), lambda x, w: x @ w, 40),
    "dense, transposed": ((48, 5), (40, 48), lambda x, w: tf.matmul(x, w, transpose_a=True, transpose_b=True), 40),
    "weights first": ((48, 5), (40, 48), lambda x, w: tf.matmul(w, x), 40),
    "weights first, transposed": (
        (5, 48),
        (48, 40),
        lambda x, w: tf.matmul(w, x, transpose_a=True, transpose_b=True),
        40,
    ),
    "batch": ((3, 5, 48), (48, 40), lambda x, w: tf.raw_ops.BatchMatMulV2(x=x, y=w), 40),
    "batch, transposed": ((3, 5, 48), (40, 48), lambda x, w: tf.raw_ops.BatchMatMulV2(x=x, y=w, adj_y=True), 40),
    "batch, weights first": ((3, 48, 5), (40, 48), lambda x, w: tf.raw_ops.BatchMatMulV2(x=w, y=x), 40),
    "batch of one": ((5, 48), (1, 48, 40), lambda x, w: tf.raw_ops.BatchMatMulV2(x=x, y=w), 40),
    "heads": ((2, 5, 48), (48, 4, 10), lambda x, w: tf.einsum("abc,cde->abde", x, w), 40),
    "heads to one": ((2, 5, 4, 12), (4, 12, 40), lambda x, w: tf.einsum("abcd,cde->abe", x, w), 40),
    "einsum, weights first": ((2, 48, 5), (40, 48), lambda x, w: tf.einsum("ok,bkj->boj", w, x), 40),
    "einsum, any rank": ((2, 5, 48), (48, 40), lambda x, w: tf.einsum("...k,ko->...o", x, w), 40),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_at_full_rank(name, tmp_path):
    x_shape, w_shape, compute, rank = PRODUCTS[name]
    loaded = _build(tmp_path / "m", x_shape, lambda x: compute(x, weight(*w_shape)))
    x = rows(*x_shape)
    expected = answer(loaded, x)
    layer = layer_of(loaded)
    assert layer.kernel.shape == (1, 1, 48, 40) and layer.sized
    np.testing.assert_array_equal(layer.restored(layer.kernel), rows(*w_shape, seed=1))
    replace(loaded.graph, layer, decompose(layer.kernel, "svd", (rank,)))
    loaded.graph.sweep()
    loaded.check()
    assert_equal(answer(loaded, x), expected)
    assert len(loaded.weights) == 2 and layer.weight not in loaded.weights


@pytest.mark.parametrize("ids", [(7,), (3, 4)], ids=str)
def test_an_embedding_at_full_rank(ids, tmp_path):
    loaded = _build(tmp_path / "m", (None, *ids[1:]), lambda x: tf.gather(weight(100, 24), x), tf.int32)
    x = np.random.default_rng(0).integers(0, 100, ids).astype(np.int32)
    expected = answer(loaded, x)
    layer = layer_of(loaded)
    replace(loaded.graph, layer, decompose(layer.kernel, "svd", (24,)))
    loaded.graph.sweep()
    loaded.check()
    assert_equal(answer(loaded, x), expected)
    assert {value.shape for value in loaded.weights.values()} == {(100, 24)}  # 24 x 24 is a constant of the graph


def random_factors(method, shape, rank=3):
    """Random factors and their product."""
    random = np.random.default_rng(3)
    x, y, i, o = shape
    sizes = {
        "svd": [(x * y * i, rank), (rank, o)],
        "tucker": [(i, rank), (x, y, rank, rank + 1), (rank + 1, o)],
        "cp": [(i, rank), (x, rank), (y, rank), (rank, o)],
        "spatial": [(x, i, rank), (y, rank, o)],
    }
    ranks = (rank, rank + 1) if method == "tucker" else (rank,)
    factors = Factors(method, ranks, tuple(random.normal(size=size) for size in sizes[method]))
    return factors, factors.kernel(shape).astype(np.float32)


PADDINGS = ["SAME", "VALID", [[0, 0], [2, 1], [0, 3], [0, 0]]]
CONVOLUTIONS = [
    (method, kernel, padding, stride, (1, 1), "NHWC")
    for method in ("svd", "tucker", "cp", "spatial")
    for kernel, padding, stride in itertools.product([(3, 3), (1, 5), (1, 1)], PADDINGS, [(1, 1), (2, 2), (2, 1)])
    if (method == "svd" or kernel != (1, 1)) and (method != "spatial" or kernel == (3, 3))
]
CONVOLUTIONS += [(method, (3, 3), "SAME", (1, 1), (2, 1), "NHWC") for method in ("svd", "tucker", "spatial")]
CONVOLUTIONS += [(method, (3, 3), "SAME", (2, 2), (1, 1), "NCHW") for method in ("svd", "tucker", "cp", "spatial")]


@pytest.mark.parametrize("method", ["svd", "tucker", "cp", "spatial"])
def test_a_convolution_of_the_factors_rank(method, tmp_path):
    """All variants in one model, an output each."""
    cases = [case for case in CONVOLUTIONS if case[0] == method]
    made = [random_factors(method, (*kernel, 16, 24 * (1 if kernel[0] > 1 else 3))) for _, kernel, *_ in cases]
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 11, 9, 16), "x")
        outputs = {}
        for number, (case, (_, w)) in enumerate(zip(cases, made, strict=True)):
            _, _, padding, strides, dilations, layout = case
            kernel = v1.get_variable(f"w{number}", initializer=w)
            fed = tf.transpose(x, (0, 3, 1, 2)) if layout == "NCHW" else x
            y = tf.nn.conv2d(fed, kernel, strides, padding, layout, dilations, name=f"conv{number}")
            outputs[f"y{number}"] = tf.transpose(y, (0, 2, 3, 1)) if layout == "NCHW" else tf.identity(y)
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, outputs)})
    loaded = model.load(tmp_path / "m")
    fed = {"x": rows(2, 11, 9, 16)}
    with Function(loaded) as function:
        expected = function("serving_default", fed)
    layers = {layer.nodes[0]: layer for layer in find(loaded, Log(), set(), keep_first=False)}
    assert len(layers) == len(cases)
    for number, (factors, _) in enumerate(made):
        layer = layers[f"conv{number}"]
        assert method in layer.methods() and layer.sized
        replace(loaded.graph, layer, factors)
    loaded.graph.sweep()
    loaded.check()
    with Function(loaded) as function:
        received = function("serving_default", fed)
    for number, case in enumerate(cases):
        print(case)
        assert_equal(received[f"y{number}"], expected[f"y{number}"])


def test_signatures_that_share_a_weight_share_its_factors(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        one, two = (v1.placeholder(tf.float32, (None, 64), name) for name in ("one", "two"))
        w = weight(64, 64)
        outputs = [tf.nn.relu(one @ w), two @ w]
        session.run(v1.global_variables_initializer())
        save_tf1(
            tmp_path / "m",
            session,
            {"a": ({"x": one}, {"y": outputs[0]}), "b": ({"x": two}, {"y": outputs[1]})},
        )
    loaded = model.load(tmp_path / "m")
    x = rows(4, 64)
    expected = [answer(loaded, x, signature) for signature in "ab"]
    layer = layer_of(loaded)
    assert len(layer.nodes) == 2 and layer.macs() == 2 * 64 * 64
    replace(loaded.graph, layer, decompose(layer.kernel, "svd", (64,)))
    loaded.graph.sweep()
    assert len(loaded.weights) == 2
    for signature, wanted in zip("ab", expected, strict=True):
        assert_equal(answer(loaded, x, signature), wanted)


def test_names_of_results_and_control_edges_stay(tmp_path):
    def compute(x):
        y = tf.matmul(x, weight(64, 64), name="dense")
        with tf.control_dependencies([v1.assert_less(x, 1e6)]):
            return tf.matmul(y, weight(64, 64, name="v"), name="last")

    loaded = _build(tmp_path / "m", (None, 64), compute)
    held = loaded.graph.control_inputs(loaded.graph.nodes["last"])
    for layer in find(loaded, Log(), set(), keep_first=True):
        replace(loaded.graph, layer, decompose(layer.kernel, "svd", (8,)))
    loaded.check()
    assert loaded.graph.control_inputs(loaded.graph.nodes["last"]) == held
    assert {"dense", "last"} <= loaded.graph.nodes.keys()


def _loop(x):
    w = weight(64, 64)
    return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ w)), (0, x))[1]


def _tied(x):
    w = weight(64, 64)
    return tf.gather(w, tf.argmax(x @ w, axis=-1))


REFUSED = {
    "share it, and read it differently": _tied,
    "While": _loop,
    "depthwise": lambda x: tf.nn.depthwise_conv2d(x[:, None, None], weight(5, 5, 64, 1), [1] * 4, "SAME"),
    "grouped": lambda x: tf.nn.conv2d(x[:, None, None], weight(3, 3, 16, 64), 1, "SAME"),
    "not Conv2DBackpropInput": lambda x: tf.nn.conv2d_transpose(
        x[:, None, None], weight(3, 3, 8, 64), (2, 1, 1, 8), 1, "SAME"
    ),
    "reads it too": lambda x: x @ (w := weight(64, 64)) + tf.reduce_sum(w),
    "not finite": lambda x: x @ v1.get_variable("w", initializer=np.full((64, 64), np.nan, "f4")),
    "result of the graph": lambda x: (weight(64, 64), x @ weight(64, 64, name="v"))[0],
    "for each element of a batch": lambda x: tf.matmul(x[:, None], weight(2, 64, 64)),
    "single row": lambda x: tf.gather(weight(64, 64), tf.cast(x[0, 0], tf.int32)),
    "reads 1 channels": lambda x: tf.nn.conv2d(tf.reshape(x, (-1, 8, 8, 1)), weight(5, 5, 1, 64), 1, "SAME"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_factored_is_named(reason, tmp_path):
    loaded = _build(tmp_path / "m", [2, 64], REFUSED[reason])
    log = Log()
    found = find(loaded, log, set(), keep_first=True)
    if reason == "result of the graph":  # nothing multiplies by it
        assert not found and not log.refused
    elif reason == "for each element of a batch":
        assert not found and reason in next(iter(log.refused.values()))
    else:
        assert not found and reason in next(iter(log.refused.values())), log.refused
