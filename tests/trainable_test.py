"""Which constants can be trained, and that promoting them and back leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import ORIGINS, rows
from tfopt import passes, recipe
from tfopt.function import Function
from tfopt.graph import split
from tfopt.model import load
from tfopt.rewrite import Log
from tfopt.trainable import demote, promote


def folded(path):
    model = load(path)
    for name, options in recipe.read("lossless").steps:
        passes.get(name).run(model, Log(), **options)
    return model


def module(tmp_path, call, width=8):
    net = tf.Module()
    net.call = tf.function(call, input_signature=[tf.TensorSpec((None, width), name="x")])
    tf.saved_model.save(net, str(tmp_path), signatures={"serving_default": net.call})
    return load(tmp_path)


def users(model, name):
    return sorted(model.graph.nodes[user].op for user in model.graph.users(name))


def test_small_kernels_and_shifts_are_promoted(built):
    model = folded(built("keras3_export"))
    assert [w.shape for w in model.weights.values()] == [(512, 10)]
    names = promote(model, "serving_default")
    assert sorted(model.weights[name].shape for name in names) == [(3, 3, 1, 8), (8,), (512, 10)]
    assert set(names) == set(model.weights)


@pytest.mark.parametrize("name", ["keras3_export", "keras3_saved_by_tf", "control_flow", "shared_weights"])
def test_there_and_back_leaves_the_model_as_it_was(built, name):
    model = folded(built(name))
    same = model.copy()
    for signature in model.signatures:
        before = set(model.weights)
        demote(model, set(promote(model, signature)) - before)
    assert model.graph.same_as(same.graph)
    for signature, inputs in ORIGINS[name].inputs.items():
        with Function(model) as a, Function(same) as b:
            for key, value in b(signature, inputs).items():
                np.testing.assert_array_equal(a(signature, inputs)[key], value)


def test_what_is_no_weight_stays(tmp_path):
    scale, shift, limit = rows(8, seed=1), rows(8, seed=2), np.abs(rows(8, seed=3))
    mask = np.float32([0, -1e9] * 4)

    def call(x):
        y = x * scale + shift
        variance = tf.reduce_mean(y * y, -1, keepdims=True)
        y = y * tf.math.rsqrt(variance + 1e-3) * 0.5
        y = tf.minimum(y, limit) + mask
        return {"y": tf.gather(y, [3, 1, 2], axis=1)}

    model = module(tmp_path, call)
    names = promote(model, "serving_default")
    assert sorted(model.weights[name].tolist() for name in names) == sorted([scale.tolist(), shift.tolist()])


def test_the_layer_norm_of_keras_2_stays(tmp_path):
    """A batch norm in training mode, whose scale and shift are ones and zeros of as many elements as there are rows."""
    gamma = rows(8, seed=1)

    def call(x):
        y, *_ = tf.compat.v1.nn.fused_batch_norm(
            x[None, :, :, None], np.ones(1, np.float32), np.zeros(1, np.float32), is_training=True
        )
        return {"y": tf.reshape(y, [-1, 8]) * gamma}

    model = module(tmp_path, call)
    assert [model.weights[name].tolist() for name in promote(model, "serving_default")] == [gamma.tolist()]


def test_constants_behind_constants(tmp_path):
    """A batch norm that nobody folded: scale and shift are computed from four vectors, of which the variance stays."""
    gamma, beta, mean, variance = (np.abs(rows(8, seed=i)) for i in range(4))

    def call(x):
        s = tf.math.rsqrt(tf.constant(variance) + 1e-3) * gamma
        return {"y": x * s + (beta - mean * s)}

    model = module(tmp_path, call)
    found = [model.weights[name].tolist() for name in promote(model, "serving_default")]
    assert all(v.tolist() in found for v in (gamma, beta, mean))
    assert variance.tolist() not in found


def test_equal_constants_of_one_value_are_not_tied(tmp_path):
    zeros, bias, kernel = np.zeros(8, np.float32), rows(8, seed=1), rows(8, 8)

    def call(x):
        y = tf.nn.bias_add(tf.nn.relu(tf.nn.bias_add(x @ kernel, zeros)), zeros)
        return {"y": tf.nn.bias_add(tf.nn.relu(tf.nn.bias_add(tf.minimum(y, zeros), bias)), bias)}

    model = module(tmp_path, call)
    passes.get("merge_duplicates").run(model, Log())
    with Function(model) as function:
        expected = function("serving_default", {"x": rows(3, 8)})["y"]
    names = promote(model, "serving_default")
    values = [model.weights[name].tolist() for name in names]
    assert values.count(zeros.tolist()) == 2
    assert values.count(bias.tolist()) == 1  # equal by more than chance
    assert all(users(model, n) == ["BiasAdd"] for n in names if not model.weights[n].any())
    with Function(model) as function:
        np.testing.assert_array_equal(function("serving_default", {"x": rows(3, 8)})["y"], expected)


@pytest.mark.parametrize("signature", ["loop", "cond", "nested"])
def test_weights_that_come_to_bodies_as_arguments(built, signature):
    model = load(built("control_flow"))
    live = model.graph.reachable(
        split(ref)[0] for label, ref in model.graph.outputs.items() if label.startswith(signature)
    )
    names = promote(model, signature)
    assert set(names) == {name for name in model.weights if name in live}
    assert names


def test_ranges_of_fake_quantization(tmp_path):
    kernel, low, high = rows(8, 8), -np.abs(rows(8, seed=1)), np.abs(rows(8, seed=2))

    def call(x):
        x = tf.quantization.fake_quant_with_min_max_vars(x, -1.0, 2.0)
        k = tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, low, high, narrow_range=True)
        return {"y": x @ k}

    model = module(tmp_path, call)
    copy = model.copy()
    (name,) = promote(copy, "serving_default")
    assert copy.weights[name].shape == (8, 8)
    names = promote(model, "serving_default", ranges=True)
    assert sorted(model.weights[n].shape for n in names) == [(), (), (8,), (8,), (8, 8)]
