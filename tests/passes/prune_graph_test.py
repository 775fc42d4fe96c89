from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import (
    ORIGINS,
    answers,
    assert_same,
    control_flow_v1,
    memory_answers,
    original_answers,
    rows,
    save_tf1,
    spec,
    v1,
)
from tfopt import model, recipe
from tfopt.optimize import run_pass
from tfopt.passes import prune_graph
from tfopt.rewrite import Log
from tfopt.verify import Verifier


def ops(loaded) -> set[str]:
    return {node.op for node in loaded.graph.nodes.values()}


def lossless(path):
    """The model after the lossless recipe, verified at each step."""
    current = model.load(path)
    verifier = Verifier(current, None, 0)
    for name, options in recipe.read("lossless").steps:
        current, step = run_pass(current, name, options, verifier)
        assert step.status != "undone", step.notes
    return current


@pytest.mark.parametrize("name", ORIGINS)
def test_pruning_and_the_whole_recipe_keep_every_model_right(name, built):
    expected = original_answers(name, built(name))
    inputs, calls = ORIGINS[name].inputs, ORIGINS[name].calls
    loaded = model.load(built(name))
    before = loaded.node_count()
    prune_graph.run(loaded, Log())
    loaded.check()
    assert loaded.node_count() <= before
    assert_same(expected, memory_answers(loaded, inputs, calls))
    assert_same(expected, memory_answers(lossless(built(name)), inputs, calls), bound=1e-5)


def _serve(path, function, *specs, **variables) -> None:
    module = tf.Module()
    for name, value in variables.items():
        setattr(module, name, tf.Variable(value))
    tf.saved_model.save(module, str(path), tf.function(lambda *args: function(module, *args), input_signature=specs))


def _hand_on(_, x):
    y = tf.identity(tf.stop_gradient(tf.raw_ops.Snapshot(input=x)))
    y = tf.debugging.check_numerics(tf.raw_ops.PreventGradient(input=y), "bad")
    y = tf.raw_ops.CheckNumericsV2(tensor=y, message="bad")
    a, b = tf.identity_n([y, y * 2.0])
    with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_sum(x), 1e9)]):
        y = tf.identity(a) + b
    tf.print("seen", y)
    return {"y": v1.Print(y, [x], "printed")}


def test_what_hands_its_input_on_is_removed(tmp_path, capfd):
    _serve(tmp_path / "m", _hand_on, spec(None, 3))
    loaded = model.load(tmp_path / "m")
    log = Log()
    prune_graph.run(loaded, log)
    assert ops(loaded) == {"Placeholder", "Const", "Mul", "AddV2"}
    assert loaded.node_count() == 4
    removed = {name.split(" ")[0] for name in log.applied}
    assert removed >= {"Identity", "IdentityN", "Snapshot", "StopGradient", "PreventGradient", "CheckNumerics", "Print"}
    capfd.readouterr()
    x = rows(2, 3)
    (outputs,) = memory_answers(loaded, {"serving_default": {"x": x}})["serving_default"]
    np.testing.assert_array_equal(outputs["y"], x * 3)
    assert "seen" not in capfd.readouterr().err


def test_summaries_assertions_and_slots_go(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        w = v1.get_variable("w", initializer=rows(4, 3, seed=1))
        y = x @ w
        merged = v1.summary.merge([v1.summary.histogram("y", y), v1.summary.scalar("m", tf.reduce_mean(y))])
        with tf.control_dependencies([merged, tf.debugging.assert_all_finite(y, "bad"), tf.Assert(True, ["no"])]):
            y = tf.identity(y)
        v1.train.AdamOptimizer().minimize(tf.reduce_sum(y))
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(tmp_path / "m")
    assert {"beta1_power", "w/Adam", "w/Adam_1"} <= set(loaded.unused)
    prune_graph.run(loaded, Log())
    assert ops(loaded) == {"Placeholder", "MatMul"} and len(loaded.weights) == 1


def test_no_slot_metric_or_counter_is_emitted(tmp_path):
    from tfopt.export import saved_model

    class Trained(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(rows(4, 3))
            self.slot, self.iterations = tf.Variable(rows(4, 3)), tf.Variable(12, dtype=tf.int64)
            self.metric = tf.Variable(0.5)

        @tf.function(input_signature=[spec(None, 4)])
        def serve(self, x):
            return {"y": x @ self.w}

        @tf.function(input_signature=[spec(None, 4)])
        def train(self, x):
            self.slot.assign_add(self.w)
            self.iterations.assign_add(1)
            self.metric.assign(tf.reduce_mean(x))
            return {"m": self.metric}

    module = Trained()
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": module.serve})
    saved_model.save(model.load(tmp_path / "m"), tmp_path / "out", max_constant_bytes=0)
    variables = tf.train.list_variables(str(tmp_path / "out" / "variables" / "variables"))
    assert [shape for _, shape in variables] == [[4, 3]]


def _new_dropout(x, rate):
    return tf.nn.dropout(x, rate=rate)


def _old_dropout(x, rate):
    """As TensorFlow 1 wrote it: floor(keep_prob + uniform), with the uniform's range spelled out."""
    keep = 1.0 - rate
    uniform = v1.random_uniform(tf.shape(x))
    uniform = uniform * (tf.constant(1.0) - tf.constant(0.0)) + tf.constant(0.0)
    return tf.math.divide(x, keep) * tf.floor(keep + uniform)


def _noise(x, rate):
    return x + tf.random.normal(tf.shape(x), stddev=rate)


def _noise_mean(x, rate):
    return x * (1.0 + tf.random.truncated_normal(tf.shape(x), stddev=1.0) * rate)


_RANDOM = {"RandomUniform", "RandomStandardNormal", "TruncatedNormal"}


@pytest.mark.parametrize("form", [_new_dropout, _old_dropout, _noise, _noise_mean])
@pytest.mark.parametrize("rate", ["constant", "placeholder with default", "keep_prob"])
def test_dropout_and_noise_at_rate_zero_vanish_in_the_forms_of_tf1(form, rate, tmp_path):
    with control_flow_v1(), tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        w = v1.get_variable("w", initializer=rows(4, 3, seed=1))
        if rate == "constant":
            value = tf.constant(0.0)
        elif rate == "keep_prob":
            value = 1.0 - v1.placeholder_with_default(1.0, [], "keep_prob")
        else:
            value = v1.placeholder_with_default(0.0, [], "rate")
        y = form(x, value) @ w
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    optimized = lossless(tmp_path / "m")
    assert ops(optimized) == {"Placeholder", "MatMul"}
    inputs = {"serving_default": {"x": rows(2, 4)}}
    assert_same(answers(tmp_path / "m", inputs), memory_answers(optimized, inputs))


@pytest.mark.parametrize("form", [_new_dropout, _old_dropout, _noise])
def test_dropout_and_noise_that_are_active_stay_and_the_run_says_so(form, tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 40], "x")
        y = form(x, tf.constant(0.5))
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y}), "sum": ({"x": x}, {"s": x + 1.0})})
    loaded = model.load(tmp_path / "m")
    verifier = Verifier(loaded, None, 0)
    assert verifier.random == ["serving_default"]
    assert ops(lossless(tmp_path / "m")) & _RANDOM


@pytest.mark.parametrize("v1_control_flow", [False, True])
@pytest.mark.parametrize("training", ["constant", "learning_phase", "not"])
def test_branches_for_training_are_cut(training, v1_control_flow, tmp_path):
    """Batch norm and dropout behind tf.cond(training), as tf.layers and Keras in TensorFlow 1 write them."""
    with tf.Graph().as_default(), v1.Session() as session:
        (v1.disable_control_flow_v2 if v1_control_flow else v1.enable_control_flow_v2)()
        try:
            x = v1.placeholder(tf.float32, [None, 4], "x")
            if training == "constant":
                phase = tf.constant(False)
            elif training == "not":
                phase = tf.logical_not(v1.placeholder_with_default(True, [], "serving"))
            else:
                phase = v1.placeholder_with_default(False, [], "keras_learning_phase")
            w = v1.get_variable("w", initializer=rows(4, 3, seed=1), use_resource=True)
            mean = v1.get_variable("mean", initializer=rows(3, seed=2), use_resource=True)
            y = x @ w
            y = y - v1.cond(phase, lambda: tf.reduce_mean(y, 0), lambda: tf.identity(mean))
            y = v1.cond(phase, lambda: tf.nn.dropout(y, rate=0.5), lambda: tf.identity(y))
            session.run(v1.global_variables_initializer())
            save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
        finally:
            v1.enable_control_flow_v2()
    optimized = lossless(tmp_path / "m")
    assert not ops(optimized) & {"Switch", "Merge", "If", "StatelessIf", "PlaceholderWithDefault", *_RANDOM}
    assert ops(optimized) <= {"Placeholder", "Const", "MatMul", "Sub", "AddV2", "BiasAdd"}
    inputs = {"serving_default": {"x": rows(2, 4)}}
    assert_same(answers(tmp_path / "m", inputs), memory_answers(optimized, inputs))


def test_a_branch_that_an_input_decides_stays(built):
    optimized = lossless(built("control_flow_switch_merge"))
    assert {"Switch", "Merge", "Enter", "NextIteration", "Exit", "LoopCond"} <= ops(optimized)


def test_a_learning_phase_that_a_signature_feeds_stays(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        phase = v1.placeholder_with_default(False, [], "phase")
        y = v1.cond(phase, lambda: x * 2.0, lambda: x + 1.0)
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x, "phase": phase}, {"y": y})})
    optimized = lossless(tmp_path / "m")
    for value, expected in ((True, 2.0), (False, 2.0), (True, 6.0)):
        x = np.full((1, 4), expected / 2 if value else expected - 1, np.float32)
        inputs = {"serving_default": {"x": x, "phase": np.array(value)}}
        (outputs,) = memory_answers(optimized, inputs)["serving_default"]
        np.testing.assert_array_equal(outputs["y"], np.full((1, 4), expected))


def test_keras3_exports_lose_dropout_noise_and_identities(built):
    optimized = lossless(built("keras3_export"))
    assert not ops(optimized) & {"Identity", "ReadVariableOp", "Mul", "Rsqrt", *_RANDOM}


def test_a_random_generator_with_state_goes_on_from_its_saved_state(tmp_path):
    module = tf.Module()
    module.generator = tf.random.Generator.from_seed(3)

    @tf.function(input_signature=[spec(None, 30)])
    def serve(x):
        keep = module.generator.uniform(tf.shape(x)) >= 0.5
        return {"y": tf.where(keep, x * 2.0, 0.0)}

    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": serve})
    loaded = model.load(tmp_path / "m")
    with_state = lossless(tmp_path / "m")
    # Two calls differ, and two runs do not.
    assert loaded.state and with_state.state.keys() == loaded.state.keys()
    inputs = {"serving_default": {"x": np.ones((2, 30), np.float32)}}
    first, second = memory_answers(with_state, inputs, 2)["serving_default"]
    assert (first["y"] != second["y"]).any() and set(np.unique(first["y"])) == {0.0, 2.0}
    assert_same(memory_answers(loaded, inputs, 2), memory_answers(with_state, inputs, 2))


def test_stateful_branches_and_order_are_kept(built):
    """Reads that must follow assignments still do, also once the Identity nodes between them are gone."""
    optimized = lossless(built("counter"))
    expected = original_answers("counter", built("counter"))
    assert [int(call["calls"]) for call in expected["count"]] == [8, 9, 10]
    assert_same(expected, memory_answers(optimized, ORIGINS["counter"].inputs, 3))


def test_unused_functions_are_dropped(built):
    loaded = model.load(built("control_flow"), ["loop"])
    prune_graph.run(loaded, Log())
    assert len(loaded.functions) == 2


@pytest.mark.slow
def test_tf_keras_dropout_and_batch_norm(tmp_path):
    """Keras 2, by tf_keras in a process of its own: a SavedModel with training and serving functions."""
    script = textwrap.dedent("""
        import sys, numpy as np, tensorflow as tf, tf_keras as keras
        keras.utils.set_random_seed(1)
        layers = keras.layers
        model = keras.Sequential([
            layers.Input((8, 8, 1), name="image"), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU(),
            layers.Dropout(0.3), layers.GaussianNoise(0.1), layers.SpatialDropout2D(0.2), layers.Flatten(),
            layers.Dense(3)])
        for layer in model.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.set_weights([np.random.default_rng(0).uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
        model.compile("adam", "mse", metrics=["mae"])
        model.fit(np.ones((4, 8, 8, 1)), np.ones((4, 3)), verbose=0)
        model.save(sys.argv[1], save_format="tf")
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], check=True, capture_output=True)
    inputs = {"serving_default": {"image": rows(2, 8, 8, 1)}}
    expected = answers(tmp_path / "m", inputs)
    optimized = lossless(tmp_path / "m")
    assert_same(expected, memory_answers(optimized, inputs), bound=1e-5)
    assert not ops(optimized) & {"Identity", "FusedBatchNormV3", "Mul", "AddV2", "Switch", "If", *_RANDOM}
    assert not optimized.state and len(optimized.weights) <= 4
