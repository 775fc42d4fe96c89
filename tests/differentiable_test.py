"""f(weights, inputs): the same outputs as the model, and gradients that a step down the slope confirms."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt.differentiable import differentiable
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import load
from tfopt.verify import input_specs


class _Loop(tf.Module):
    """A while loop and a branch over one weight."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(np.linspace(-0.3, 0.4, 64, dtype=np.float32).reshape(8, 8), name="w")

    @tf.function(input_signature=[tf.TensorSpec([None, 8], name="x")])
    def serve(self, x):
        _, y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tf.tanh(y @ self.w)), (0, x))
        return {"y": tf.cond(tf.reduce_sum(x) > 0, lambda: y @ self.w, lambda: y * 2.0)}


def _check_gradient(model, inputs, output):
    """A small step against the gradient lowers the loss by |g|^2 times the step, to first order."""
    function = differentiable(model, "serving_default")
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    weights = {n: tf.Variable(w) for n, w in model.weights.items() if w.dtype == np.float32}

    def loss():
        return tf.reduce_sum(tf.square(function(weights, tensors)[output]))

    with tf.GradientTape() as tape:
        before = loss()
    gradients = tape.gradient(before, weights)
    assert any(g is not None for g in gradients.values())
    square = sum(float(tf.reduce_sum(tf.square(g))) for g in gradients.values() if g is not None)
    assert square > 0
    step = 1e-3 * float(before) / square
    for name, gradient in gradients.items():
        if gradient is not None:
            weights[name].assign_sub(step * gradient)
    assert float(before - loss()) == pytest.approx(step * square, rel=0.1)


@pytest.fixture
def loop(tmp_path):
    module = _Loop()
    tf.saved_model.save(module, str(tmp_path / "loop"), signatures=module.serve)
    return load(tmp_path / "loop")


@pytest.mark.parametrize("sign", [1, -1])
def test_same_outputs_and_gradients_through_control_flow(loop, sign):
    x = sign * np.abs(np.random.default_rng(0).standard_normal((2, 8), np.float32))
    with Function(loop) as reference:
        expected = reference("serving_default", {"x": x})["y"]
    np.testing.assert_allclose(differentiable(loop, "serving_default")({}, {"x": x})["y"], expected, rtol=1e-5)
    _check_gradient(loop, {"x": x}, "y")


def test_two_functions_of_one_model_do_not_clash(loop):
    x = np.ones((2, 8), np.float32)
    for _ in range(2):
        _check_gradient(loop, {"x": x}, "y")


@pytest.mark.parametrize(
    ("path", "inputs", "output"),
    [
        ("kws-ds-cnn/saved_model", {"input_1": (2, 49, 10, 1)}, "dense"),
        ("basic-pitch/nmp", {"input_2": (1, 43844, 1)}, "note"),
    ],
)
def test_real_models(shared, path, inputs, output):
    model = load(shared / "models" / path)
    assert set(inputs) == set(input_specs(model, "serving_default"))
    random = np.random.default_rng(0)
    _check_gradient(model, {k: random.standard_normal(s).astype(np.float32) for k, s in inputs.items()}, output)


def test_tables_filled_from_large_constants(built):
    """Keys of 1,024 elements and more are weights, which the table's initializer reads."""
    model, x = load(built("static_tables")), np.array([3, 1999, 5000], np.int64)
    with Function(model) as reference:
        expected = reference("serving_default", {"x": x})
    got = differentiable(model, "serving_default")({}, {"x": tf.constant(x)})
    assert {name: value.numpy().tolist() for name, value in got.items()} == {n: v.tolist() for n, v in expected.items()}


def test_state_is_refused(shared):
    model = load(shared / "models" / "dtln" / "saved_model")
    with pytest.raises(TfoptError, match="keeps state"):
        differentiable(model, "serving_default")
