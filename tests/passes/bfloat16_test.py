from __future__ import annotations

import collections

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tests.origins import answers, control_flow_v1, memory_answers, python_answers, rows, save_tf1, v1
from tfopt import model
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.optimize import run_pass
from tfopt.passes import bfloat16, fold_affine, fold_constants, prune_graph
from tfopt.rewrite import Log
from tfopt.verify import Verifier


def _build(path, shape, build, dtype=tf.float32):
    """A TF 1 model of `x`; what `build` gives are its outputs. Returns it loaded."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(dtype, shape, "x")
        y = build(x)
        outputs = y if isinstance(y, dict) else {"y": y}
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, outputs)})
    return _cleaned(path)


def _cleaned(path):
    loaded = model.load(path)
    for cleaning in (prune_graph, fold_constants, fold_affine):
        cleaning.run(loaded, Log())
    return loaded


def _move(loaded, **options):
    log = Log()
    bfloat16.run(loaded, log, **options)
    loaded.check()
    return log


def _dtypes(loaded):
    """op -> dtypes that its nodes compute in."""
    found = collections.defaultdict(set)
    for node in loaded.graph.nodes.values():
        key = "Tparams" if "Tparams" in node.attr else "T"
        if key in node.attr:
            found[node.op].add(tf.as_dtype(node.attr[key].type).name)
    return found


def _weight(*shape, seed=1, name="w"):
    return v1.get_variable(name, initializer=rows(*shape, seed=seed) / np.float32(np.sqrt(shape[-2])))


def _close(path, loaded, x, bound=0.03):
    """Saved and loaded again, in a session and in Python, the outputs are float32 and near the original's."""
    saved_model.save(loaded, path / "bf16")
    expected = serve_v1(path / "m", {"x": x})
    received = serve_v1(path / "bf16", {"x": x})
    again = python_answers(path / "bf16", {"serving_default": {"x": x}})["serving_default"][0]
    for name, value in expected.items():
        assert received[name].dtype == value.dtype
        np.testing.assert_allclose(received[name], value, atol=bound * np.abs(value).max())
        np.testing.assert_allclose(again[name], value, atol=bound * np.abs(value).max())


def test_a_convnet_is_half_the_size_and_answers_in_float32(keras3_convnet, tmp_path):
    (tmp_path / "m").symlink_to(keras3_convnet)
    loaded = _cleaned(keras3_convnet)
    log = _move(loaded)
    kinds = _dtypes(loaded)
    for op in ("Conv2D", "DepthwiseConv2dNative", "MatMul", "Relu"):
        assert kinds[op] == {"bfloat16"}, op
    assert kinds["Mean"] == kinds["Softmax"] == {"float32"}
    # For each of the two signatures: of the input, before Mean, after it, and before Softmax.
    assert log.applied["cast at run time"] == 2 * 4 and log.applied["op moved to bfloat16"] >= 2 * 7
    products = [
        node for node in loaded.graph.nodes.values() if node.op in ("Conv2D", "DepthwiseConv2dNative", "MatMul")
    ]
    assert all(loaded.graph.constant(node.input[1]).dtype == tf.bfloat16.as_numpy_dtype for node in products)
    saved_model.save(loaded, tmp_path / "bf16")
    x = rows(5, 8, 8, 1)
    expected = next(iter(answers(tmp_path / "m", {"serving_default": {"image": x}})["serving_default"][0].values()))
    received = next(iter(serve_v1(tmp_path / "bf16", {"image": x}).values()))
    assert received.dtype == np.float32 and np.abs(received - expected).max() < 0.02
    assert not np.array_equal(received, expected)


def _attention(x):
    y = tf.matmul(x, _weight(16, 16, name="q"))
    scores = tf.nn.softmax(tf.matmul(y, y, transpose_b=True))
    y = x + tf.matmul(scores, y)
    mean, variance = tf.nn.moments(y, [-1], keepdims=True)
    y = (y - mean) * tf.math.rsqrt(variance + 1e-3)
    return tf.matmul(tf.nn.elu(tf.matmul(y, _weight(16, 16, name="up"))), _weight(16, 16, name="down"))


def test_softmax_and_layer_norm_stay_float32(tmp_path):
    loaded = _build(tmp_path / "m", [None, 5, 16], _attention)
    _move(loaded)
    kinds = _dtypes(loaded)
    assert kinds["BatchMatMulV2"] | kinds["MatMul"] == {"bfloat16"} and kinds["Elu"] == {"bfloat16"}
    for op in ("Softmax", "Mean", "SquaredDifference", "Rsqrt", "Sub", "Mul"):
        assert kinds[op] <= {"float32"}, op
    _close(tmp_path, loaded, rows(2, 5, 16))


def test_what_loses_nothing_moves_with_its_neighbours(tmp_path):
    def build(x):
        table = v1.get_variable("table", initializer=rows(100, 16, seed=3))
        y = tf.pad(tf.gather(table, x), [[0, 0], [0, 1], [0, 0]])  # [None, 5, 16]
        a, b = tf.split(tf.reshape(y, [-1, 80]), 2, axis=1)
        y = tf.nn.relu(a @ _weight(40, 8, name="a")) + tf.nn.relu(b @ _weight(40, 8, name="b"))
        return {"inner": y, "y": tf.exp(tf.nn.relu(y @ _weight(8, 8, name="c")))}

    loaded = _build(tmp_path / "m", [None, 4], build, tf.int32)
    log = _move(loaded)
    kinds = _dtypes(loaded)
    for op in ("GatherV2", "Pad", "Reshape", "Split", "Relu", "AddV2", "MatMul"):
        assert kinds[op] <= {"bfloat16"}, op
    assert kinds["Exp"] == {"float32"}
    assert log.applied["cast at run time"] == 2  # the two results
    _close(tmp_path, loaded, np.array([[3, 0, 99, 7]], np.int32))


def test_constants_that_lose_digits_keep_an_exact_op_in_float32(tmp_path):
    loaded = _build(tmp_path / "m", [None, 8], lambda x: tf.maximum(x @ _weight(8, 8), 0.1))
    _move(loaded)
    assert _dtypes(loaded)["Maximum"] == {"float32"}
    loaded = _build(tmp_path / "m2", [None, 8], lambda x: tf.maximum(x @ _weight(8, 8), 0.5))
    _move(loaded)
    assert _dtypes(loaded)["Maximum"] == {"bfloat16"}


def test_a_batch_norm_keeps_its_statistics_in_float32(tmp_path):
    def build(x):
        y = tf.nn.conv2d(x, _weight(3, 3, 4, 8), 1, "SAME")
        y = tf.nn.relu(tf.nn.relu(y) + y)  # nothing to fold the batch norm into
        y, _, _ = v1.nn.fused_batch_norm(
            y, rows(8, seed=4), rows(8, seed=5), rows(8, seed=6), np.abs(rows(8, seed=7)) + 0.5, is_training=False
        )
        return tf.nn.conv2d(tf.nn.tanh(y), _weight(3, 3, 8, 8, name="w2"), 1, "SAME")

    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 6, 6, 4], "x")
        y = build(x)
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(tmp_path / "m")
    prune_graph.run(loaded, Log())
    _move(loaded)
    (norm,) = (node for node in loaded.graph.nodes.values() if node.op.startswith("FusedBatchNorm"))
    assert norm.op == "FusedBatchNormV3" and norm.attr["T"].type == tf.bfloat16 and norm.attr["U"].type == tf.float32
    _close(tmp_path, loaded, rows(2, 6, 6, 4))


def test_what_the_owner_keeps_stays_float32(tmp_path):
    def build(x):
        return tf.matmul(tf.matmul(x, _weight(8, 8), name="body"), _weight(8, 8, name="v"), name="head")

    loaded = _build(tmp_path / "m", [None, 8], build)
    log = _move(loaded, keep_float32="head")
    assert _dtypes(loaded)["MatMul"] == {"bfloat16", "float32"}
    assert log.refused == {("bfloat16", "head"): "MatMul stays float32 as keep_float32 wants it"}
    for pattern in ("nothing", "("):
        with pytest.raises(TfoptError, match="bfloat16: keep_float32="):
            _move(loaded, keep_float32=pattern)


def _loop(x):
    w = _weight(8, 8)
    return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ w)), (0, x))[1]


def _branch(x):
    w = _weight(8, 8)
    return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ w, lambda: x)


@pytest.mark.parametrize("kind", ["v1 loop", "v1 branch", "v2 loop"])
def test_products_in_control_flow_are_named_and_stay(kind, tmp_path):
    if kind.startswith("v1"):
        with control_flow_v1():
            loaded = _build(tmp_path / "m", [None, 8], _loop if kind == "v1 loop" else _branch)
    else:

        class Loop(tf.Module):
            def __init__(self):
                self.w = tf.Variable(rows(8, 8))

            @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, name="x")])
            def f(self, x):
                body = lambda i, h: (i + 1, tf.tanh(h @ self.w))  # noqa: E731
                return {"y": tf.while_loop(lambda i, h: i < 3, body, (0, x))[1]}

        module = Loop()
        tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
        loaded = _cleaned(tmp_path / "m")
    before = loaded.copy()
    log = _move(loaded)
    assert not log.applied and loaded.graph.same_as(before.graph)
    assert len(log.refused) == 1 and "loop" in next(iter(log.refused.values()))


def test_other_dtypes_are_named(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float64, [None, 8], "x")
        y = x @ rows(8, 8).astype("f8")
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(tmp_path / "m")
    log = _move(loaded)
    assert not log.applied and list(log.refused.values()) == ["MatMul is float64, not float32"]


def test_a_run_says_no_effect_and_how_far_outputs_moved(tmp_path):
    loaded = _build(tmp_path / "m", [None, 8], lambda x: tf.exp(x) + 1.0)
    _, step = run_pass(loaded, "bfloat16", {}, Verifier(loaded, None, 0))
    assert step.status == "no effect"
    loaded = _build(tmp_path / "m2", [None, 64], lambda x: x @ _weight(64, 64))
    moved, step = run_pass(loaded, "bfloat16", {}, Verifier(loaded, None, 0))
    assert step.status == "applied" and 1e-4 < step.max_error < 0.02
    assert step.weight_bytes_after < 0.6 * step.weight_bytes_before
    memory_answers(moved, {"serving_default": {"x": rows(2, 64)}})
