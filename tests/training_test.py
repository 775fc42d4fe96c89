"""Training: what was disturbed is recovered, what has labels gets better, and every run can be repeated and resumed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tests.origins import rows, save_module, spec
from tfopt.data import Dataset
from tfopt.data import load as data_load
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.losses import heads
from tfopt.model import load
from tfopt.optimizers import Optimizer, learning_rate
from tfopt.trainable import symmetric
from tfopt.training import Settings, fine_tune, promote, targets, train
from tfopt.verify import input_specs

FAST = Settings(epochs=25, learning_rate=5e-3, batch_size=32, patience=0)


def data(labels=None, **inputs) -> Dataset:
    return Dataset(inputs, labels, "the test")


def noised(teacher, signature, scale=0.2, seed=3):
    """A copy whose trainable weights are off by so much of their size."""
    model = teacher.copy()
    before = set(model.weights)
    names = promote(model, signature)
    random = np.random.default_rng(seed)
    for name in names:
        weight = model.weights[name]
        noise = scale * np.sqrt(np.mean(np.square(weight)) + 1e-4) * random.standard_normal(weight.shape)
        model.weights[name] = weight + noise.astype(np.float32)
    assert before <= set(model.weights)
    return model


def outputs(model, signature, dataset):
    with Function(model) as function:
        return function(signature, dataset.inputs)


def error(model, teacher, signature, dataset):
    """Mean squared difference of all float outputs, in units of their variance."""
    a, b = outputs(model, signature, dataset), outputs(teacher, signature, dataset)
    return sum(float(np.mean((a[k] - b[k]) ** 2) / np.var(b[k])) for k in a if a[k].dtype == np.float32)


def keras2(path):
    import tf_keras

    tf_keras.utils.set_random_seed(1)
    layers = tf_keras.layers
    tf_keras.Sequential(
        [
            *(layers.Input((8, 8, 1)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU()),
            *(layers.Flatten(), layers.Dense(4, activation="softmax")),
        ]
    ).save(path, save_format="tf")


def lstm(path):
    import keras

    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential([keras.Input((6, 5), name="x"), layers.LSTM(12), layers.Dense(3, activation="softmax")])
    model.export(path, verbose=False)


def embedding(path):
    """Text through a table to an embedding, a sigmoid of several columns, and the class as a string."""

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            words = tf.constant([f"w{i}" for i in range(20)])
            table = tf.lookup.KeyValueTensorInitializer(words, tf.range(20, dtype=tf.int64))
            self.table = tf.lookup.StaticHashTable(table, 0)
            self.vectors = tf.Variable(rows(20, 6, seed=1))
            self.kernel = tf.Variable(rows(6, 4, seed=2))
            self.bias = tf.Variable(rows(4, seed=3))

        @tf.function(input_signature=[spec(None, 5, dtype=tf.string)])
        def serving_default(self, x):
            y = tf.reduce_mean(tf.gather(self.vectors, self.table.lookup(x)), 1) @ self.kernel + self.bias
            return {"likely": tf.sigmoid(y), "class": tf.as_string(tf.argmax(y, 1))}

    save_module(path, Net(), "serving_default")


def regression(path):
    """Two outputs in units that are far apart, with an input that has no rows, for batches of four."""

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = tf.Variable(rows(5, 40, seed=1)), tf.Variable(rows(40, 3, seed=2))

        @tf.function(input_signature=[spec(4, 5), spec(name="gain")])
        def serving_default(self, x, gain):
            y = tf.tanh(x @ self.a) @ self.b
            return {"small": 1e-3 * y[:, :1], "large": gain * 1e3 * y[:, 1:]}

    save_module(path, Net(), "serving_default")


def words(count):
    return np.array([[f"w{i}".encode() for i in row] for row in np.random.default_rng(0).integers(0, 20, (count, 5))])


MODELS = {
    "keras3_export": (None, {"image": rows(256, 8, 8, 1)}),
    "keras3_saved_by_tf": (None, {"inputs": rows(256, 8)}),
    "keras2": (keras2, {"input_1": rows(256, 8, 8, 1)}),
    "tf1_partitioned_variables": (None, {"x": rows(256, 40)}),
    "lstm": (lstm, {"x": rows(256, 6, 5)}),
    "embedding": (embedding, {"x": words(256).astype(object)}),
    "regression": (regression, {"x": rows(256, 5), "gain": np.float32(2)}),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, built):
    """A function from a name to its loaded model and rows for it."""
    known: dict[str, tuple] = {}

    def get(name):
        if name not in known:
            build, inputs = MODELS[name]
            path = tmp_path_factory.mktemp(name) / "model" if build else built(name)
            if build:
                build(path)
            whole = frozenset(n for n, a in inputs.items() if not np.ndim(a))
            known[name] = (load(path), dataclasses.replace(data(**inputs), whole=whole))
        return known[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_distillation_recovers_what_noise_disturbed(teacher, name):
    original, dataset = teacher(name)
    (only,) = [name for name, signature in original.signatures.items() if signature.inputs][:1]
    signature = "serving_default" if "serving_default" in original.signatures else only
    inputs = {n: dataset.inputs[m] for n, m in zip(_inputs(original, signature), dataset.inputs, strict=True)}
    dataset = dataclasses.replace(dataset, inputs=inputs)
    model = noised(original, signature)
    probe = dataset.take(slice(0, 4))
    before = error(model, original, signature, probe)
    structure = {node.name: node.op for node in model.graph.nodes.values()}
    history = fine_tune(model, signature, dataset, original, settings=FAST)
    after = error(model, original, signature, probe)
    assert before > 1e-3
    assert after < before / 8
    assert history.validation[-1] < history.validation[0] / 8
    assert history.stopped == "all epochs done"
    assert {node.name: node.op for node in model.graph.nodes.values()} == structure
    assert history.rows + history.validation_rows == 256


def _inputs(model, signature):
    return sorted(model.signatures[signature].inputs, reverse=True)  # x before gain


def _net(path, seed=0, classes=3, width=6):
    """A small classifier with random weights."""

    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = tf.Variable(rows(width, 16, seed=seed)), tf.Variable(rows(16, classes, seed=seed + 1))

        @tf.function(input_signature=[spec(None, width)])
        def serving_default(self, x):
            return {"y": tf.nn.softmax(tf.nn.relu(x @ self.a) @ self.b)}

    save_module(path, Net(), "serving_default")
    return load(path)


@pytest.fixture
def net(tmp_path):
    return _net(tmp_path / "net")


X = rows(512, 6, seed=11)
Y = (X[:, 0] * X[:, 1] > 0).astype(np.int64) + (X[:, 2] > 1)  # classes that the random net knows nothing of


def accuracy(model):
    return float(np.mean(outputs(model, "serving_default", data(x=X))["y"].argmax(1) == Y))


@pytest.mark.parametrize("labels", [Y, np.eye(3)[Y]], ids=["ids", "one_hot"])
def test_labels_alone_raise_accuracy(net, labels):
    before = accuracy(net)
    settings = dataclasses.replace(FAST, epochs=60, learning_rate=2e-2)
    fine_tune(net, "serving_default", None, None, data(labels, x=X), settings)
    assert before < 0.5
    assert accuracy(net) > 0.8


def test_alpha_weighs_labels_against_the_teacher(tmp_path):
    """The teacher is right in most rows: with labels for some rows the student gets better than it."""
    teacher, got = _net(tmp_path / "teacher"), {}
    fine_tune(teacher, "serving_default", None, None, data(Y, x=X), dataclasses.replace(FAST, learning_rate=1e-2))
    for alpha in (0.0, 0.9):
        student = noised(teacher, "serving_default", 0.5)
        settings = dataclasses.replace(FAST, epochs=30, learning_rate=1e-2, alpha=alpha)
        fine_tune(student, "serving_default", data(x=X), teacher, data(Y[:256], x=X[:256]), settings)
        got[alpha] = accuracy(student), error(student, teacher, "serving_default", data(x=X))
    assert got[0.9][0] > got[0.0][0] + 0.02
    assert got[0.0][1] < got[0.9][1] / 2


def test_class_ids_for_an_output_without_softmax(teacher):
    original, _ = teacher("keras3_saved_by_tf")
    x = rows(256, 8)
    labels = (x[:, 0] > 0) + 1 * (x[:, 1] > 0)
    model = original.copy()
    fine_tune(model, "serving_default", None, None, data(labels, inputs=x), FAST)
    (scores,) = outputs(model, "serving_default", data(inputs=x)).values()
    assert np.mean(scores.argmax(1) == labels) > 0.78


def test_one_seed_gives_one_result(teacher):
    original, dataset = teacher("keras3_export")
    results = []
    for seed in (0, 0, 1):
        model = noised(original, "serving_default")
        fine_tune(model, "serving_default", dataset, original, settings=dataclasses.replace(FAST, epochs=2, seed=seed))
        results.append(model.weights)
    assert results[0].keys() == results[1].keys()
    assert all(np.array_equal(w, results[1][n]) for n, w in results[0].items())
    assert not all(np.array_equal(w, results[2][n]) for n, w in results[0].items())


def test_a_real_model_recovers_without_labels(shared):
    """Keyword spotting: trained on rows 0-299 without their labels, scored on rows 300-499."""
    original = load(shared / "models" / "kws-ds-cnn" / "saved_model")
    rows = data_load(str(shared / "data/kws/kws01_first500.npz"), input_specs(original, "serving_default"))
    scored = rows.take(slice(300, 500))

    def right(model):
        (scores,) = outputs(model, "serving_default", scored).values()
        return int(np.sum(scores.argmax(1) == scored.labels))

    model = noised(original, "serving_default", 0.3)
    before = right(model)
    settings = Settings(epochs=10, learning_rate=2e-3, batch_size=32)
    fine_tune(model, "serving_default", rows.take(slice(0, 300)), original, settings=settings)
    assert before < right(original) - 20
    assert right(model) > (before + 3 * right(original)) / 4  # three quarters of what was lost are back


def test_it_never_gets_worse(net):
    """A learning rate that destroys the model: the initial weights are kept."""
    model = noised(net, "serving_default", 0.01)
    before = {n: w.copy() for n, w in model.weights.items()}
    settings = Settings(epochs=9, learning_rate=30.0, patience=2)
    history = fine_tune(model, "serving_default", data(x=X), net, settings=settings)
    assert history.best_step == 0
    assert history.stopped == "no better validation loss for 2 epochs"
    assert len(history.validation) == 3
    assert all(np.array_equal(w, before[n]) for n, w in model.weights.items())


def test_a_loss_that_is_not_finite_stops():
    x = X.copy()
    x[100] = np.inf
    kernel = tf.Variable(rows(6, 3))
    history = train(
        lambda weights, inputs: {"y": inputs["x"] @ weights["kernel"]},
        {"kernel": kernel},
        data(x=x),
        {"y": np.zeros((512, 3), np.float32)},
        lambda a, b: tf.reduce_mean(tf.square(a["y"] - b["y"]), 1),
        Settings(epochs=3, batch_size=16, validation=0.05),
    )
    assert "the loss is not finite at step" in history.stopped
    assert history.steps < 31
    assert len(history.validation) == 1 + history.best_step // 30
    assert np.isfinite(kernel.numpy()).all()


def test_bounds(net):
    settings = Settings(epochs=3, max_steps=7, validation=0.25, batch_size=64)
    model = noised(net, "serving_default")
    history = fine_tune(model, "serving_default", data(x=X), net, settings=settings)
    assert history.stopped == "max_steps (7) reached"
    assert (history.steps, history.rows, history.validation_rows) == (7, 384, 128)
    assert len(history.losses) == 2
    none = fine_tune(model, "serving_default", data(x=X), net, settings=Settings(epochs=0))
    assert (none.steps, none.stopped) == (0, "all epochs done")
    expected = (
        r"^loss on 128 rows held back: [\d.e-]+ before training, [\d.e-]+ after 7 of 7 steps on 384 rows \(max_.*\)$"
    )
    assert re.match(expected, history.summary())
    few = fine_tune(model, "serving_default", data(x=X[:3]), net, settings=Settings(epochs=2))
    assert (few.steps, few.rows, few.validation_rows, few.apart) == (2, 3, 3, False)


def test_transform_makes_the_weights(net):
    """A mask: where it is 0 the weights end as 0, and the others make up for it."""
    masks = {n: (np.abs(w) > 0.4).astype(np.float32) for n, w in net.weights.items()}
    model = net.copy()
    for name, mask in masks.items():
        model.weights[name] = model.weights[name] * mask
    before = error(model, net, "serving_default", data(x=X))

    def transform(variables):
        return {name: variables[name] * mask for name, mask in masks.items()}

    fine_tune(model, "serving_default", data(x=X), net, settings=FAST, transform=transform)
    assert error(model, net, "serving_default", data(x=X)) < before / 3
    for name, mask in masks.items():
        assert not model.weights[name][mask == 0].any()


def test_names_choose_what_is_trained(net):
    model = noised(net, "serving_default")
    first, second = sorted(model.weights)
    before = dict(model.weights)
    history = fine_tune(model, "serving_default", data(x=X), net, settings=Settings(epochs=1), names=[first])
    assert history.trained == [first]
    assert np.array_equal(model.weights[second], before[second])
    assert not np.array_equal(model.weights[first], before[first])


@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantization_is_trained_through(tmp_path, per_channel):
    """Ranges that are far too narrow, 4-bit weights: training all of them gets most of the error back."""
    kernel = rows(8, 8, seed=1)

    class Net(tf.Module):
        def __init__(self, quantized):
            super().__init__()
            self.kernel, self.quantized = tf.Variable(kernel), quantized

        @tf.function(input_signature=[spec(None, 8)])
        def serving_default(self, x):
            k, quantization = self.kernel, tf.quantization
            if self.quantized:
                x = quantization.fake_quant_with_min_max_vars(x, -1.0, 1.0)
                if per_channel:
                    low, high = np.full(8, -1, np.float32), np.full(8, 1, np.float32)
                    k = quantization.fake_quant_with_min_max_vars_per_channel(k, low, high, 4, True)
                else:
                    k = quantization.fake_quant_with_min_max_vars(k, -1.0, 1.0, 4, True)
            return {"y": x @ k}

    for quantized in (False, True):
        save_module(tmp_path / str(quantized), Net(quantized), "serving_default")
    original, model = load(tmp_path / "False"), load(tmp_path / "True")
    dataset = data(x=rows(512, 8, seed=5))
    before = error(model, original, "serving_default", dataset)
    names = promote(model, "serving_default", ranges=True)
    assert len(names) == 5
    names, transform = symmetric(model, names)
    assert len(names) == 4
    settings = Settings(epochs=40, learning_rate=3e-2, patience=0)
    history = fine_tune(
        model, "serving_default", dataset, original, settings=settings, names=names, transform=transform
    )
    assert set(history.trained) == set(names)
    for node in model.graph.nodes.values():
        if node.op.startswith("FakeQuant") and node.attr["narrow_range"].b:
            low, high = (model.graph.constant(ref) for ref in node.input[1:])
            assert np.all(high > 1)
            np.testing.assert_array_equal(low, -high)
    assert error(model, original, "serving_default", dataset) < before / 3


def test_a_training_goes_on_from_its_checkpoint(net, tmp_path, monkeypatch):
    settings = dataclasses.replace(FAST, epochs=3, checkpoint_steps=4)
    whole = noised(net, "serving_default")
    expected = fine_tune(whole, "serving_default", data(x=X), net, settings=settings)
    for stop in (3, 6, 14, 17):  # before the first checkpoint, after it, at the end of an epoch, in the next one
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr("tfopt.training_loop.learning_rate", _killed_at(stop))
            with pytest.raises(KeyboardInterrupt):
                fine_tune(
                    noised(net, "serving_default"),
                    "serving_default",
                    data(x=X),
                    net,
                    settings=settings,
                    checkpoint=folder,
                )
        model = noised(net, "serving_default")
        history = fine_tune(model, "serving_default", data(x=X), net, settings=settings, checkpoint=folder)
        assert all(np.array_equal(w, whole.weights[n]) for n, w in model.weights.items())
        assert dataclasses.replace(history, seconds=0) == dataclasses.replace(expected, seconds=0)
    again = noised(net, "serving_default")
    fine_tune(again, "serving_default", data(x=X), net, settings=settings, checkpoint=folder)
    assert all(np.array_equal(w, whole.weights[n]) for n, w in again.weights.items())


def _killed_at(stop):
    def rate(peak, step, steps):
        if step == stop:
            raise KeyboardInterrupt
        return learning_rate(peak, step, steps)

    return rate


def test_a_checkpoint_of_another_training_is_refused(net, tmp_path):
    settings = dataclasses.replace(FAST, epochs=1)
    fine_tune(noised(net, "serving_default"), "serving_default", data(x=X), net, settings=settings, checkpoint=tmp_path)
    for other in (dataclasses.replace(settings, learning_rate=1e-3), settings):
        x = X if other != settings else X + 1
        with pytest.raises(TfoptError, match="is the state of another training"):
            fine_tune(
                noised(net, "serving_default"), "serving_default", data(x=x), net, settings=other, checkpoint=tmp_path
            )
    (tmp_path / "training.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TfoptError, match="cannot be read as the state of a training"):
        fine_tune(
            noised(net, "serving_default"), "serving_default", data(x=X), net, settings=settings, checkpoint=tmp_path
        )


_LONG = Settings(epochs=100, checkpoint_steps=50, patience=0)
_SCRIPT = """
import sys
from tests.training_test import X, _LONG, data, noised
from tfopt.model import load
from tfopt.training import fine_tune
net = load(sys.argv[1])
fine_tune(noised(net, "serving_default"), "serving_default", data(x=X), net, settings=_LONG, checkpoint=sys.argv[2])
"""


def test_a_killed_process_goes_on_in_another(tmp_path):
    net, state = _net(tmp_path / "net"), tmp_path / "state"
    killed = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "net"), str(state)], cwd=REPO, stderr=subprocess.DEVNULL
    )
    whole, resumed = noised(net, "serving_default"), noised(net, "serving_default")
    expected = fine_tune(whole, "serving_default", data(x=X), net, settings=_LONG)
    deadline = time.monotonic() + 60
    while not (state / "training.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    history = fine_tune(resumed, "serving_default", data(x=X), net, settings=_LONG, checkpoint=state)
    assert all(np.array_equal(w, whole.weights[n]) for n, w in resumed.weights.items())
    assert dataclasses.replace(history, seconds=0) == dataclasses.replace(expected, seconds=0)


def test_what_a_teacher_says(teacher):
    original, dataset = teacher("keras3_export")
    found = heads(original, "serving_default")
    (head,), got = targets(original, "serving_default", dataset, 48, found)  # 256 rows: the last batch is cut
    logits = got[head.output]
    assert head.kind == "softmax"
    assert logits.dtype == np.float32
    p = np.exp(logits - logits.max(1, keepdims=True))
    (expected,) = outputs(original, "serving_default", dataset).values()
    np.testing.assert_allclose(p / p.sum(1, keepdims=True), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "wants rows and a teacher, or labelled rows; received neither"),
        ({"labelled": data(x=X)}, "the test: holds no labels"),
        ({"names": ["nothing"]}, "'nothing' is no weight"),
        ({"names": []}, "no float32 constant can be trained"),
        ({"labelled": data(Y + 1, x=X)}, "wants class ids below 3"),
        ({"rows": data(x=np.where(X > 2, np.nan, X))}, "output 'y' of the teacher is not finite for row"),
        ({"labelled": data(Y, x=X), "output": "z"}, "which output do the labels belong to"),
    ],
)
def test_bad_cases_end_in_a_clear_line(net, change, message):
    arguments = {"rows": data(x=X), "teacher": net, "labelled": None, **change}
    with pytest.raises(TfoptError, match=message):
        fine_tune(net.copy(), "serving_default", settings=Settings(epochs=1), **arguments)


def test_models_that_cannot_be_trained(tmp_path):
    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(rows(6, 3))

        @tf.function(input_signature=[spec(None, 6)])
        def rounded(self, x):
            return {"y": tf.round(x @ self.kernel)}

        @tf.function(input_signature=[spec(None, 6)])
        def reduced(self, x):
            return {"y": tf.reduce_sum(x @ self.kernel, 0)}

        @tf.function(input_signature=[spec(None, 6)])
        def no_gradient(self, x):
            image = tf.reshape(x @ self.kernel, [-1, 1, 3, 1])
            return {"y": tf.raw_ops.ResizeArea(images=image, size=[2, 2])}

    save_module(tmp_path, Net(), "rounded", "reduced", "no_gradient")
    model = load(tmp_path)
    with pytest.raises(TfoptError, match="none of its weights has a gradient"):
        fine_tune(model, "rounded", data(x=X), model.copy())
    with pytest.raises(TfoptError, match=r"cannot be trained: .*ResizeArea"):
        fine_tune(model, "no_gradient", data(x=X), model.copy())
    with pytest.raises(TfoptError, match="no float output with a row for each row"):
        fine_tune(model, "reduced", data(x=X), model.copy())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "lion"}, "choose from adam, adamw, sgd; received 'lion'"),
        ({"batch_size": 0}, "batch_size: must be at least 1, received 0"),
        ({"learning_rate": math.nan}, "learning_rate: must be at least 0, received nan"),
        ({"alpha": 1.5}, "alpha and teacher_until must be at most 1"),
        ({"temperature": 0.0}, "temperature above 0"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(TfoptError, match=message):
        Settings(**setting)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_are_those_of_keras(name):
    import keras

    ours, theirs = tf.Variable(rows(4, 3)), keras.Variable(rows(4, 3))
    optimizer = Optimizer(name, [ours], weight_decay=0.01)
    reference = {
        "adam": lambda: keras.optimizers.Adam(0.1),
        "adamw": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.01),
        "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    }[name]()
    for step in range(5):
        gradient = rows(4, 3, seed=step)
        optimizer.apply([tf.constant(gradient)], tf.constant(0.1), tf.constant(step + 1.0))
        reference.apply([tf.constant(gradient)], [theirs])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_the_page_shows_the_defaults():
    text = (REPO / "docs" / "training.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ?`?([\w.-]*)`? \|", text, re.MULTILINE))
    for field in dataclasses.fields(Settings):
        shown = table.pop(field.name)
        assert (shown if isinstance(field.default, str) else float(shown)) == field.default
    assert not table


def test_schedule():
    rates = [learning_rate(0.1, step, 1000) for step in range(1000)]
    assert rates[:3] == pytest.approx([0.002, 0.004, 0.006], rel=1e-3)
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[500] == pytest.approx(0.05)
    assert rates[-1] < 1e-5 < 1e-3 < rates[-100]
    assert learning_rate(0.1, 0, 1) == 0.1
