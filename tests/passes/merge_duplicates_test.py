from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import ORIGINS, answers, assert_same, memory_answers, original_answers, rows, save_tf1, v1
from tfopt import model
from tfopt.export import saved_model
from tfopt.passes import merge_duplicates, prune_graph
from tfopt.rewrite import Log


def _merged(path, build, variables=()):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        y = build(x, *[v1.get_variable(f"w{i}", initializer=value) for i, value in enumerate(variables)])
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, y if isinstance(y, dict) else {"y": y})})
    loaded, log = model.load(path), Log()
    prune_graph.run(loaded, Log())
    merge_duplicates.run(loaded, log)
    loaded.check()
    return loaded, log, [node.op for node in loaded.graph.nodes.values()]


@pytest.mark.parametrize("op", [tf.add, tf.multiply, tf.maximum, tf.minimum])
def test_commutative_ops_merge_in_either_order(op, tmp_path):
    _, log, ops = _merged(tmp_path / "m", lambda x: op(x, tf.nn.relu(x)) - tf.exp(op(tf.nn.relu(x), x)))
    assert sum(log.applied.values()) == 2  # the relu and the op
    assert ops.count("Relu") == 1


def test_others_do_not(tmp_path):
    _, log, ops = _merged(tmp_path / "m", lambda x: (x - tf.exp(x)) * (tf.exp(x) - x) + tf.exp(tf.nn.relu(x)))
    assert ops.count("Sub") == 2 and ops.count("Exp") == 2 and log.applied == {"duplicate Exp": 1}


def test_attributes_must_be_equal(tmp_path):
    _, _, ops = _merged(tmp_path / "m", lambda x: tf.reduce_sum(x, 1, keepdims=True) + tf.reduce_sum(x, 1)[0])
    assert ops.count("Sum") == 2


@pytest.mark.parametrize("equal", [True, False])
def test_equal_weights_are_stored_once(equal, tmp_path):
    other = rows(4, 300) if equal else np.nextafter(rows(4, 300), 1, dtype=np.float32)
    values = [rows(4, 300), other, rows(4, 300).reshape(300, 4).copy()]
    loaded, log, _ = _merged(tmp_path / "m", lambda x, a, b, c: (x @ a) * (x @ b) + tf.reduce_sum(c), values)
    assert len(loaded.weights) == (2 if equal else 3)  # another shape is another weight
    assert log.applied["duplicate weight"] == (1 if equal else 0)
    saved_model.save(loaded, tmp_path / "out", max_constant_bytes=0)
    inputs = {"serving_default": {"x": rows(3, 4)}}
    assert_same(answers(tmp_path / "m", inputs), answers(tmp_path / "out", inputs))


def test_not_a_number_and_negative_zero_are_told_apart_by_their_bits(tmp_path):
    nan, zero = np.full(2000, np.nan, np.float32), np.arange(2000, dtype=np.float32)
    negative = zero.copy()
    negative[0] = -0.0
    loaded, _, _ = _merged(
        tmp_path / "m", lambda x, *w: {str(i): 1.0 / v for i, v in enumerate(w)}, [nan, nan.copy(), zero, negative]
    )
    assert len(loaded.weights) == 3


@pytest.mark.parametrize("op", [tf.random.uniform, tf.random.normal])
def test_random_ops_never_merge(op, tmp_path):
    _, _, ops = _merged(tmp_path / "m", lambda x: op([3, 4]) - op([3, 4]) + x)
    assert sum(name.startswith("Random") for name in ops) == 2


def test_state_never_merges(built):
    loaded = model.load(built("counter"))
    prune_graph.run(loaded, Log())
    merge_duplicates.run(loaded, Log())
    assert len(loaded.state) == 2
    assert_same(original_answers("counter", built("counter")), memory_answers(loaded, ORIGINS["counter"].inputs, 3))


def test_every_port_of_a_duplicate_is_taken_over(built):
    loaded, log = model.load(built("several_ports")), Log()
    prune_graph.run(loaded, Log())
    merge_duplicates.run(loaded, log)
    assert log.applied["duplicate TopKV2"] == 1
    assert loaded.graph.outputs["serving_default:indices"] == loaded.graph.outputs["serving_default:places"]
    expected = original_answers("several_ports", built("several_ports"))
    assert_same(expected, memory_answers(loaded, ORIGINS["several_ports"].inputs))


def test_results_may_become_one_tensor_and_keep_their_names(tmp_path):
    loaded, _, ops = _merged(tmp_path / "m", lambda x: {"a": tf.exp(x), "b": tf.exp(x)})
    assert ops.count("Exp") == 1
    saved_model.save(loaded, tmp_path / "out")
    inputs = {"serving_default": {"x": rows(3, 4)}}
    assert_same(answers(tmp_path / "m", inputs), answers(tmp_path / "out", inputs))


def test_signatures_that_compute_the_same_share_it(built):
    loaded = model.load(built("keras3_export"))
    prune_graph.run(loaded, Log())
    before = loaded.node_count()
    merge_duplicates.run(loaded, Log())
    assert loaded.node_count() < 0.7 * before
    outputs = loaded.graph.outputs
    assert outputs["serve:output_0"] == outputs["serving_default:output_0"]
