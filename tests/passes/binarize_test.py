from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tests.origins import python_answers, rows, v1
from tests.passes.int8_weights_test import _build, _computed
from tfopt import model
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.passes import Data, binarize, fold_affine, fold_constants, get, prune_graph
from tfopt.rewrite import Log


def _weight(*shape, seed=1, name="w"):
    return v1.get_variable(name, initializer=rows(*shape, seed=seed))


def _binarize(loaded, data=None, **options):
    log = Log()
    data = data or Data("serving_default", loaded.copy())
    binarize.run(loaded, log, data, **{"epochs": 0, "keep_ends": False, **options})
    loaded.check()
    return log


INNER = {
    "dense": ((5, 48), (48, 41), (0,), lambda x, w: x @ w),
    "dense, transposed": ((5, 48), (40, 48), (1,), lambda x, w: tf.matmul(x, w, transpose_b=True)),
    "convolution": ((2, 6, 6, 12), (3, 3, 12, 15), (0, 1, 2), lambda x, w: tf.nn.conv2d(x, w, 1, "SAME")),
    "einsum": ((2, 5, 48), (48, 4, 10), (0,), lambda x, w: tf.einsum("abc,cde->abde", x, w)),
}


@pytest.mark.parametrize("name", INNER)
def test_sign_times_mean_by_hand(name, tmp_path):
    x_shape, w_shape, axes, compute = INNER[name]
    loaded = _build(tmp_path / "m", x_shape, lambda x: compute(x, _weight(*w_shape)))
    log = _binarize(loaded)
    assert log.applied == {"weight stored as one bit": 1}
    w = rows(*w_shape, seed=1)
    binary = np.where(w >= 0, 1, -1) * np.abs(w).mean(axis=axes, keepdims=True)
    saved_model.save(loaded, tmp_path / "b")
    x = rows(*x_shape)
    received = serve_v1(tmp_path / "b", {"x": x})["y"]
    np.testing.assert_allclose(received, compute(x, binary.astype(np.float32)), atol=1e-4)
    again = python_answers(tmp_path / "b", {"serving_default": {"x": x}})["serving_default"][0]["y"]
    np.testing.assert_allclose(again, received, atol=1e-5)
    assert not {"RightShift", "BitwiseAnd", "Cast"} & set(_computed(tmp_path / "b", {"x": x}))  # unpacked at loading


def test_one_bit_a_weight_on_disk(tmp_path):
    w = rows(1024, 2700, seed=3)  # 10.5 MiB: in two blocks, since TensorFlow unpacks no more than 10 MiB at loading
    loaded = _build(tmp_path / "m", [None, 1024], lambda x: tf.nn.relu(x @ v1.get_variable("w", initializer=w)))
    log = _binarize(loaded)
    assert log.applied == {"weight stored as one bit": 1, "product in blocks of output channels": 1}
    saved_model.save(loaded, tmp_path / "b")
    size = (tmp_path / "b" / "saved_model.pb").stat().st_size
    assert w.nbytes / 32 < size < w.nbytes / 30
    x = rows(3, 1024)
    expected = np.maximum(x @ (np.sign(w) * np.abs(w).mean(axis=0)), 0)
    np.testing.assert_allclose(serve_v1(tmp_path / "b", {"x": x})["y"], expected, rtol=1e-3, atol=1e-2)
    assert "RightShift" not in _computed(tmp_path / "b", {"x": x})


def _chain(x):
    for index in range(3):
        x = tf.nn.relu(tf.matmul(x, _weight(64, 64, name=f"w{index}"), name=f"dense_{index}"))
    return x


def test_the_first_and_the_last_layer_stay_float32(tmp_path):
    loaded = _build(tmp_path / "m", [None, 64], _chain)
    log = _binarize(loaded.copy(), keep_ends=True)
    assert log.applied["weight stored as one bit"] == 1
    assert sorted(reason.split(" linear")[0] for reason in log.refused.values()) == [
        "it belongs to the first",
        "it belongs to the last",
    ]
    assert _binarize(loaded.copy(), keep_float32="dense_1").applied["weight stored as one bit"] == 2
    with pytest.raises(TfoptError, match=r"no weight of the model can be binary: .*keep_float32"):
        _binarize(loaded.copy(), keep_ends=True, keep_float32="dense_1")


REFUSED = {
    "depthwise": lambda x: tf.nn.depthwise_conv2d(x[:, None, None], _weight(5, 5, 64, 1), [1] * 4, "SAME"),
    "reads it too": lambda x: x @ (w := _weight(64, 64)) + tf.reduce_sum(w),
    "not finite": lambda x: x @ v1.get_variable("w", initializer=np.full((64, 64), np.nan, "f4")),
    "1,024 weights or more": lambda x: x @ _weight(64, 4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_binary_is_named(reason, tmp_path):
    loaded = _build(tmp_path / "m", [None, 64], REFUSED[reason])
    with pytest.raises(TfoptError, match="otherwise than a product" if reason == "reads it too" else reason):
        _binarize(loaded)


def test_training_needs_rows(tmp_path):
    loaded = _build(tmp_path / "m", [None, 64], _chain)
    with pytest.raises(TfoptError, match="binarize learns from data: give --representative_data"):
        _binarize(loaded, epochs=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A convnet for 8x8 digits, trained for a moment: (its directory, training rows, test rows)."""
    import keras
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(3)
    found = load_digits()
    images, labels = (found.images[..., None] / 16).astype(np.float32), found.target
    layers = keras.layers
    net = keras.Sequential(
        [
            layers.Input((8, 8, 1), name="image"),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.Conv2D(64, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(3e-3), loss)
    net.fit(images[:1400], labels[:1400], epochs=15, batch_size=64, verbose=0)
    path = tmp_path_factory.mktemp("digits") / "model"
    net.export(path, verbose=False)
    return path, Dataset({"image": images[:1400]}, labels[:1400], "digits"), (images[1400:], labels[1400:])


def _accuracy(loaded, test):
    with Function(loaded) as function:
        (scores,) = function("serving_default", {"image": test[0]}).values()
    return float(np.mean(scores.argmax(axis=1) == test[1]))


@pytest.mark.parametrize("learn", ["from the original", "from labels"])
def test_training_brings_accuracy_back(learn, digits, tmp_path):
    path, train, test = digits
    original = model.load(path)
    prepared = original.copy()
    for cleaning in (prune_graph, fold_constants, fold_affine):
        cleaning.run(prepared, Log())
    once = prepared.copy()
    _binarize(once, keep_ends=True)
    data = Data(
        "serving_default",
        original,
        rows=Dataset(train.inputs, None, "digits") if learn == "from the original" else None,
        labelled=train if learn == "from labels" else None,
    )
    trained = prepared.copy()
    log = _binarize(trained, data, keep_ends=True, epochs=15)
    before, one_shot, after = (_accuracy(m, test) for m in (original, once, trained))
    print(f"digits, {learn}: float32 {before:.3f}, binary without training {one_shot:.3f}, trained {after:.3f}")
    assert before > 0.93 and one_shot < before - 0.1 and after > before - 0.03
    assert log.applied["weight stored as one bit"] == 2
    assert any("before training" in note for note in log.notes) and any("no faster" in note for note in log.notes)
    assert all(n.name not in trained.weights for n in trained.graph.nodes.values() if "latent" in n.name)
    saved_model.save(trained, tmp_path / "b")
    served = next(iter(serve_v1(tmp_path / "b", {"image": test[0]}).values()))
    assert np.mean(served.argmax(axis=1) == test[1]) == pytest.approx(after, abs=0.01)


def test_it_is_a_pass_that_learns():
    chosen = get("binarize")
    assert chosen.learns and not chosen.lossless
