"""Hints, mixed rows and labels alone towards the end: what they make of a student, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import rows, save_module, spec
from tests.training_test import FAST, X, Y, accuracy, data, error, noised
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import load
from tfopt.training import Settings, fine_tune


def deep(path, width=16, seed=0):
    """A classifier of two layers, whose inner tensors are called `first` and `second`."""

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            shapes = ((6, width), (width, width), (width, 3))
            self.kernels = [
                tf.Variable(rows(*s, seed=seed + i) / np.float32(np.sqrt(s[0]))) for i, s in enumerate(shapes)
            ]

        @tf.function(input_signature=[spec(None, 6)])
        def serving_default(self, x):
            h = tf.nn.relu(x @ self.kernels[0], name="first")
            h = tf.nn.relu(h @ self.kernels[1], name="second")
            return {"y": tf.nn.softmax(4 * h @ self.kernels[2])}

    save_module(path, Net(), "serving_default")
    return load(path)


@pytest.fixture
def nets(tmp_path):
    return deep(tmp_path / "teacher"), deep(tmp_path / "student", width=8, seed=5)


def inner(model, name):
    """What a node gives for X."""
    copy = model.copy()
    (key,) = copy.graph.outputs
    copy.graph.outputs = {key: next(node for node in copy.graph.nodes if node.endswith(name))}
    with Function(copy) as function:
        (value,) = function("serving_default", {"x": X}).values()
    return value


def node(model, name):
    return next(node for node in model.graph.nodes if node.endswith(name))


def test_a_hint_draws_an_inner_tensor_to_the_teachers(nets):
    teacher, student = nets
    explained = {}
    for weight in (0.0, 30.0):
        model = student.copy()
        name = f"{node(teacher, 'first')}={node(model, 'first')}"
        settings = dataclasses.replace(FAST, epochs=30, hints=name, hint_weight=weight)
        history = fine_tune(model, "serving_default", data(x=X), teacher, settings=settings)
        assert "regressor:0" in history.trained or not weight  # 8 channels against 16
        assert "regressor:0" not in model.weights
        given, wanted = inner(model, "first"), inner(teacher, "first")
        left = wanted - given @ np.linalg.lstsq(given, wanted, rcond=None)[0]
        explained[weight] = 1 - np.var(left) / np.var(wanted)
    assert explained[30.0] > explained[0.0] + 0.02


def test_mixed_rows_help_where_there_are_few(nets):
    teacher, student = nets
    few, errors = data(x=X[:24]), {}
    for mixup in (0.0, 1.0):
        model = student.copy()
        settings = Settings(epochs=150, learning_rate=1e-2, batch_size=24, patience=0, validation=0, mixup=mixup)
        fine_tune(model, "serving_default", few, teacher, settings=settings)
        errors[mixup] = error(model, teacher, "serving_default", data(x=X[24:]))
    assert errors[1.0] < 0.95 * errors[0.0]


def test_labels_alone_after_a_share_of_the_steps(nets):
    """Cho and Hariharan: a teacher that is wrong holds the student back; without it the student learns the labels."""
    teacher, _ = nets
    right = {}
    for until in (1.0, 0.5, 0.0):
        model = noised(teacher, "serving_default")
        settings = dataclasses.replace(FAST, epochs=20, learning_rate=1e-2, alpha=0.1, teacher_until=until, patience=0)
        fine_tune(model, "serving_default", None, teacher, data(Y, x=X), settings)
        right[until] = accuracy(model)
    assert right[0.0] > right[1.0] + 0.05


def test_a_lesson_can_be_resumed(nets, tmp_path, monkeypatch):
    from tests.training_test import _killed_at

    teacher, student = nets
    hint = f"{node(teacher, 'first')}={node(student, 'first')}"
    settings = dataclasses.replace(FAST, epochs=3, checkpoint_steps=5, mixup=0.5, hints=hint)
    whole, model = student.copy(), student.copy()
    fine_tune(whole, "serving_default", data(x=X), teacher, settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr("tfopt.training_loop.learning_rate", _killed_at(17))
        with pytest.raises(KeyboardInterrupt):
            fine_tune(student.copy(), "serving_default", data(x=X), teacher, settings=settings, checkpoint=tmp_path)
    fine_tune(model, "serving_default", data(x=X), teacher, settings=settings, checkpoint=tmp_path)
    assert all(np.array_equal(value, model.weights[name]) for name, value in whole.weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hints": "third"}, "hints: the teacher has no tensor 'third' in signature 'serving_default'"),
        ({"hints": "{first}=third"}, "hints: the student has no tensor 'third'"),
        ({"hints": "{first}={sum}"}, "they may differ in the last axis alone"),
        ({"mixup": -1.0}, "mixup: must be at least 0, received -1.0"),
        ({"teacher_until": 2.0}, "alpha and teacher_until must be at most 1"),
    ],
)
def test_refusals(nets, change, message):
    teacher, student = nets
    if "hints" in change:
        # Any tensor of another rank.
        scalar = next(n.name for n in teacher.graph.nodes.values() if n.op == "Const")
        change = {"hints": change["hints"].format(first=node(teacher, "first"), sum=scalar)}
    with pytest.raises(TfoptError, match=message):
        settings = Settings(epochs=1, **change)
        fine_tune(student, "serving_default", data(x=X), teacher, settings=settings)


def test_mixup_wants_a_teacher(nets):
    _, student = nets
    with pytest.raises(TfoptError, match="mixup: there is no teacher"):
        fine_tune(student, "serving_default", None, None, Dataset({"x": X}, Y, "x"), Settings(epochs=1, mixup=1.0))
