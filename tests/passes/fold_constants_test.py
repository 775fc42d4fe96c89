from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from tests.origins import answers, assert_same, memory_answers, rows, save_tf1, v1
from tfopt import model
from tfopt.export import saved_model
from tfopt.passes import fold_constants, prune_graph
from tfopt.rewrite import Log


def _model(path, build):
    """A TF 1 model of `x` float32 (None, 4)."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        y = build(x)
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})
    return model.load(path)


def _folded(loaded, **options):
    log = Log()
    prune_graph.run(loaded, Log())
    fold_constants.run(loaded, log, **options)
    loaded.check()
    return log


def _weight(*shape):
    return v1.get_variable("w", initializer=rows(*shape, seed=1))


GROWING = {
    "Fill": lambda x: x[:1, :1] + tf.fill([300, 300], 0.5),
    "Tile": lambda x: x[:1, :1] + tf.tile(_weight(2, 5), [90, 60]),
    "BroadcastTo": lambda x: x[:1, :1] + tf.broadcast_to(_weight(1, 4), [9000, 4]),
    "OneHot": lambda x: x[:1, :1] * tf.one_hot(tf.constant(np.arange(200) % 9), 300),
    "Range": lambda x: x[:1, :1] * tf.range(0.0, 20000.0),
    "MatMul": lambda x: x[:1, :1] + _weight(150, 1) @ tf.constant(rows(1, 150)),
    "GatherV2": lambda x: x[:1, :1] * tf.gather(_weight(3, 400), np.zeros(90, np.int64) + 1) + tf.zeros((90, 400)),
}


@pytest.mark.parametrize("op", GROWING)
def test_what_would_grow_the_model_stays(op, tmp_path):
    loaded = _model(tmp_path / "m", GROWING[op])
    saved_model.save(loaded, tmp_path / "before")
    before = loaded.weight_bytes
    _folded(loaded)
    assert op in {node.op for node in loaded.graph.nodes.values()}
    assert loaded.weight_bytes <= before + 4096
    saved_model.save(loaded, tmp_path / "after")
    size = {name: (tmp_path / name / "saved_model.pb").stat().st_size for name in ("before", "after")}
    assert size["after"] <= size["before"] + 4096
    inputs = {"serving_default": {"x": rows(3, 4)}}
    assert_same(answers(tmp_path / "m", inputs), memory_answers(loaded, inputs))


def test_what_the_cap_allows_is_folded(tmp_path):
    log = _folded(_model(tmp_path / "a", GROWING["Tile"]), max_growth_bytes=0)
    assert any("make the model larger" in reason for reason in log.refused.values())
    loaded = _model(tmp_path / "b", GROWING["Tile"])
    _folded(loaded, max_growth_bytes=1 << 20)
    assert "Tile" not in {node.op for node in loaded.graph.nodes.values()}
    assert [w.shape for w in loaded.weights.values()] == [(180, 300)]


def test_what_hangs_on_weights_is_computed(tmp_path):
    def build(x):
        w = _weight(400, 4)
        return tf.matmul(x, tf.transpose(w * 2.0 + 1.0)[:, :300] / tf.constant(4.0))

    loaded = _model(tmp_path / "m", build)
    _folded(loaded)
    assert {node.op for node in loaded.graph.nodes.values()} == {"Placeholder", "MatMul"}
    (weight,) = loaded.weights.values()
    np.testing.assert_allclose(weight, ((rows(400, 4, seed=1) * 2 + 1).T[:, :300]) / 4, rtol=1e-6)


def test_a_weight_that_others_use_too_is_not_doubled(tmp_path):
    def build(x):
        w = _weight(4, 1000)
        return tf.concat([x @ w, x @ (w * 2.0), x @ (w * 3.0 + 1.0)], 1)

    loaded = _model(tmp_path / "m", build)
    log = _folded(loaded)
    assert loaded.weight_bytes < 4 * 1000 * 4 + 4096
    assert sum("make the model larger" in reason for reason in log.refused.values()) >= 2
    inputs = {"serving_default": {"x": rows(3, 4)}}
    assert_same(answers(tmp_path / "m", inputs), memory_answers(loaded, inputs))


def test_the_batch_norm_chain_of_keras_3_becomes_one_scale_and_one_shift(built):
    loaded = model.load(built("keras3_export"), ["serving_default"])
    _folded(loaded)
    ops = [node.op for node in loaded.graph.nodes.values()]
    assert "Rsqrt" not in ops and "Sub" not in ops
    assert ops.count("Mul") == 1 and ops.count("AddV2") == 1


def test_random_ops_are_not_constants(tmp_path):
    loaded = _model(tmp_path / "m", lambda x: x[:1, :1] + tf.random.normal([3, 4]) * 2.0)
    _folded(loaded)
    assert "RandomStandardNormal" in {node.op for node in loaded.graph.nodes.values()}


def test_empty_and_scalar_results(tmp_path):
    def build(x):
        return tf.concat([tf.zeros((0, 4)) * 3.0, x * (tf.constant(3.0) - tf.constant(1.0))], 0)

    loaded = _model(tmp_path / "m", build)
    _folded(loaded)
    inputs = {"serving_default": {"x": rows(3, 4)}}
    assert_same(answers(tmp_path / "m", inputs), memory_answers(loaded, inputs))


def test_what_a_file_holds_is_not_folded(tmp_path):
    file = tmp_path / "weight.bin"
    np.arange(4, dtype=np.float32).tofile(file)

    def build(x):
        return x * tf.reshape(tf.io.decode_raw(tf.io.read_file(str(file)), tf.float32), [4])

    loaded = _model(tmp_path / "model", build)
    _folded(loaded)
    assert "ReadFile" in {node.op for node in loaded.graph.nodes.values()}
    assert loaded.weight_bytes < 500


def test_hard_swish_stays_one_that_the_converter_knows(tmp_path):
    loaded = _model(tmp_path / "m", lambda x: tf.tanh(x) * (tf.nn.relu6(tf.tanh(x) + 3) / 6))
    given = {"serving_default": {"x": np.linspace(-4, 4, 20, dtype=np.float32).reshape(5, 4)}}
    before = memory_answers(loaded, given)
    fold_constants.run(loaded, Log())
    assert_same(memory_answers(loaded, given), before)
    saved_model.save(loaded, tmp_path / "folded")
    content = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "folded")).convert()
    interpreter = Interpreter(model_content=content)
    assert [op["op_name"] for op in interpreter._get_ops_details()] == ["TANH", "HARD_SWISH"]
