from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tests.origins import python_answers, rows, save_tf1, v1
from tfopt import model
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.passes import int8_weights, prune_graph
from tfopt.rewrite import Log

# name -> (shape of the input, shape of the weights, axes with one scale, what is computed)
PRODUCTS = {
    "dense": ((5, 48), (48, 40), (0,), lambda x, w: x @ w),
    "dense, transposed": ((5, 48), (40, 48), (1,), lambda x, w: tf.matmul(x, w, transpose_b=True)),
    "weights first": ((48, 5), (40, 48), (1,), lambda x, w: tf.matmul(w, x)),
    "batch": ((3, 5, 48), (3, 48, 40), (1,), lambda x, w: tf.matmul(x, w)),
    "einsum": ((2, 5, 48), (48, 4, 10), (0,), lambda x, w: tf.einsum("abc,cde->abde", x, w)),
    "convolution": ((2, 6, 6, 12), (3, 3, 12, 16), (0, 1, 2), lambda x, w: tf.nn.conv2d(x, w, 1, "SAME")),
    "depthwise": ((2, 6, 6, 64), (3, 3, 64, 2), (0, 1), lambda x, w: tf.nn.depthwise_conv2d(x, w, [1] * 4, "SAME")),
    "transposed convolution": (
        (2, 6, 6, 12),
        (3, 3, 16, 12),
        (0, 1, 3),
        lambda x, w: tf.nn.conv2d_transpose(x, w, (2, 6, 6, 16), 1, "SAME"),
    ),
}


def _build(path, shape, build, dtype=tf.float32):
    """A TF 1 model of `x`, whose weights are variables; returns it loaded."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(dtype, shape, "x")
        y = tf.identity(build(x), "y")
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(path)
    prune_graph.run(loaded, Log())
    return loaded


def _quantize(loaded, **options):
    log = Log()
    int8_weights.run(loaded, log, **options)
    loaded.check()
    return log


def _weight(*shape, seed=1, name="w"):
    return v1.get_variable(name, initializer=rows(*shape, seed=seed))


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_output_channel_has_its_scale(name, tmp_path):
    x_shape, w_shape, axes, compute = PRODUCTS[name]
    loaded = _build(tmp_path / "m", x_shape, lambda x: compute(x, _weight(*w_shape)))
    log = _quantize(loaded)
    assert log.applied["weight stored as int8"] == 1
    (stored,) = (w for w in loaded.weights.values() if w.dtype == np.int8)
    w = rows(*w_shape, seed=1)
    scale = np.abs(w).max(axis=axes, keepdims=True) / 127
    assert np.abs(stored).max() == 127 and np.abs(w - stored * scale).max() <= scale.max() / 2 * 1.001
    saved_model.save(loaded, tmp_path / "q")
    x = rows(*x_shape)
    received = serve_v1(tmp_path / "q", {"x": x})["y"]
    np.testing.assert_allclose(received, compute(x, (stored * scale).astype(np.float32)), atol=1e-3)
    np.testing.assert_array_equal(
        python_answers(tmp_path / "q", {"serving_default": {"x": x}})["serving_default"][0]["y"], received
    )
    assert loaded.weight_bytes < w.nbytes * 0.4


def test_rows_of_a_table_become_float_after_they_are_gathered(tmp_path):
    ids = np.array([3, 0, 99], np.int32)
    table = rows(100, 32, seed=2) * np.logspace(-3, 2, 100, dtype=np.float32)[:, None]
    table[0] = 0
    loaded = _build(tmp_path / "m", [None], lambda x: tf.gather(v1.get_variable("t", initializer=table), x), tf.int32)
    log = _quantize(loaded)
    assert log.applied == {"table of embeddings stored as int8": 1, "weight stored as int8": 1}
    saved_model.save(loaded, tmp_path / "q")
    received = serve_v1(tmp_path / "q", {"x": ids})["y"]
    bound = np.abs(table[ids]).max(axis=1, keepdims=True) / 254 * 1.001  # half a step of each row, whatever the others
    assert (np.abs(received - table[ids]) <= bound).all()
    assert not any(n.op == "Cast" and n.input[0] in loaded.weights for n in loaded.graph.nodes.values())


def test_a_table_that_also_multiplies_is_stored_once(tmp_path):
    table = rows(100, 32, seed=2)

    def tied(x):
        t = v1.get_variable("t", initializer=table)
        return tf.matmul(tf.gather(t, x), t, transpose_b=True)

    loaded = _build(tmp_path / "m", [None], tied, tf.int32)
    _quantize(loaded)
    assert sum(w.dtype == np.int8 for w in loaded.weights.values()) == 1
    saved_model.save(loaded, tmp_path / "q")
    ids = np.array([3, 0, 99], np.int32)
    np.testing.assert_allclose(serve_v1(tmp_path / "q", {"x": ids})["y"], table[ids] @ table.T, atol=0.3)


def _computed(path, inputs):
    """What the session really runs, after TensorFlow's own optimizations: the ops of its partition graph."""
    with tf.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ["serve"], str(path))
        signature = meta.signature_def["serving_default"]
        metadata = v1.RunMetadata()
        feeds = {signature.inputs[name].name: value for name, value in inputs.items()}
        options = v1.RunOptions(output_partition_graphs=True)
        session.run(signature.outputs["y"].name, feeds, options=options, run_metadata=metadata)
        return [node.op for graph in metadata.partition_graphs for node in graph.node]


def test_a_large_product_is_computed_in_blocks_that_are_restored_when_the_model_is_loaded(tmp_path):
    w = rows(1024, 2700, seed=3)  # 10.5 MiB
    loaded = _build(tmp_path / "m", [None, 1024], lambda x: tf.nn.relu(x @ v1.get_variable("w", initializer=w)))
    log = _quantize(loaded)
    assert log.applied["product in blocks of output channels"] == 1
    saved_model.save(loaded, tmp_path / "q")
    x = rows(3, 1024)
    np.testing.assert_allclose(serve_v1(tmp_path / "q", {"x": x})["y"], np.maximum(x @ w, 0), atol=3)
    assert "Cast" not in _computed(tmp_path / "q", {"x": x})


def test_a_variable_is_restored_at_every_call(tmp_path):
    loaded = _build(tmp_path / "m", [None, 64], lambda x: x @ _weight(64, 64))
    _quantize(loaded)
    saved_model.save(loaded, tmp_path / "constant")
    saved_model.save(loaded, tmp_path / "variable", max_constant_bytes=0)
    assert "Cast" not in _computed(tmp_path / "constant", {"x": rows(3, 64)})
    assert "Cast" in _computed(tmp_path / "variable", {"x": rows(3, 64)})


def test_a_recurrent_kernel_is_restored_before_the_loop(tmp_path):
    w = rows(64, 64, seed=4) * 0.1

    def recurrent(x):
        return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ w)), (0, x))[1]

    class Loop(tf.Module):
        def __init__(self):
            self.w = tf.Variable(w)

        @tf.function(input_signature=[tf.TensorSpec((None, 64), tf.float32, name="x")])
        def f(self, x):
            return {"y": tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ self.w)), (0, x))[1]}

    module = Loop()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    loaded = model.load(tmp_path / "m")
    assert _quantize(loaded).applied["weight stored as int8"] == 1
    saved_model.save(loaded, tmp_path / "q")
    x = rows(3, 64)
    np.testing.assert_allclose(serve_v1(tmp_path / "q", {"x": x})["y"], recurrent(x), atol=0.02)


REFUSED = {
    "float64": (
        lambda x: (
            tf.cast(x, tf.float64) @ tf.cast(v1.get_variable("w", initializer=rows(64, 64).astype("f8")), tf.float64)
        ),
        "float64",
    ),
    "several axes": (lambda x: x @ (w := _weight(64, 64)) @ tf.transpose(w @ x, [1, 0])[:64], "different axes"),
    "another reader": (lambda x: x @ (w := _weight(64, 64)) + tf.reduce_sum(w), "otherwise than a product"),
    "few share a scale": (lambda x: tf.matmul(x[:, :2], _weight(2, 600)), "what int8 saves"),
    "not finite": (lambda x: x @ v1.get_variable("w", initializer=np.full((64, 64), np.nan, "f4")), "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_named(name, tmp_path):
    build, reason = REFUSED[name]
    loaded = _build(tmp_path / "m", [64, 64], build)
    log = _quantize(loaded)
    assert not log.applied and any(reason in text for text in log.refused.values()), log.refused


def test_what_the_owner_keeps_stays_float32(tmp_path):
    def build(x):
        return tf.matmul(tf.matmul(x, _weight(64, 64)), _weight(64, 64, seed=2, name="v"), name="head")

    loaded = _build(tmp_path / "m", [None, 64], build)
    log = _quantize(loaded, keep_float32="head")
    assert log.applied["weight stored as int8"] == 1
    assert list(log.refused.values()) == ["it stays float32 as keep_float32 wants it"]
    for pattern in ("nothing", "("):
        with pytest.raises(TfoptError, match="int8_weights: keep_float32="):
            _quantize(loaded, keep_float32=pattern)


def test_a_model_without_large_weights_is_left_alone(tmp_path):
    loaded = _build(tmp_path / "m", [None, 4], lambda x: x @ _weight(4, 4))
    log = _quantize(loaded)
    assert not log.applied and not log.notes
